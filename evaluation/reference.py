"""Reference statistics: what real training images look like to an extractor, computed once and kept with a hash.

One .npz per output of an extractor under `<evaluation.path>/reference/`: n, mean, m2, factor, perhaps features of some of
the images and which ones these are, and a description; beside them mu and sigma, so that readers of the pytorch-fid
layout can use it as it is.
Files of pytorch-fid (mu, sigma) and ADM (mu, sigma, mu_s, sigma_s) are read by `read_statistics` and written by
`evaluation.reference_job`.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from evaluation.extractors import FEATURES, SPATIAL, Extractor
from evaluation.frechet import Reference, covariance_factor
from evaluation.hashing import canonical_hash
from evaluation.set_metric import ReferenceSet
from evaluation.statistics import GaussianStatistics
from pipeline import storage
from pipeline.views import preprocessing_spec
from stages.errors import ArtefactError
from stages.options import ImageOptions, SourceOptions

FORMAT_VERSION = 5
ARRAYS = ("n", "mean", "m2", "factor", "features", "kept")
# What mean and covariance of each output are called in files of pytorch-fid and ADM.
LAYOUT = {FEATURES: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
UNREADABLE = (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class StoredReference:
    """A reference as it is kept.

    Attributes:
        reference: what sets are measured against.
        key: sha-256 (hex) of what it was made from.
        sha256: sha-256 (hex) of its arrays.
        num_unusable: listed images that could not be decoded and are not in it.
        m2: float64 (d, d), for other formats; None where a file of others gives none.
        self_test: distances of real images to real and to damaged ones when it was made; None for files of others.
        kept: int64 (m,), positions in the listing of the images whose features are in `reference`; None where none are.
    """

    reference: ReferenceSet
    key: str
    sha256: str
    num_unusable: int = 0
    m2: np.ndarray | None = None
    self_test: Mapping[str, float] | None = None
    kept: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a record says of it."""
        content = {
            "key": self.key,
            "sha256": self.sha256,
            "n": self.reference.gaussian.n,
            "num_unusable": self.num_unusable,
        }
        return content if self.self_test is None else {**content, "self_test": dict(self.self_test)}


def choose_images(listing: pa.Table, num_images: int | None) -> pa.Table:
    """`num_images` rows of a listing, or all if there are no more, in the listing's order.

    Which ones is decided by a hash of image_id, so that a listing sorted by class gives a fair choice.
    """
    if num_images is None or num_images >= listing.num_rows:
        return listing
    image_ids = listing["image_id"].to_numpy().astype("<i8", copy=False)
    ranks = np.array(
        [int.from_bytes(hashlib.blake2b(i.tobytes(), digest_size=8).digest(), "little") for i in image_ids],
        dtype=np.uint64,
    )
    return listing.take(np.sort(np.argsort(ranks, kind="stable")[:num_images]))


def images_identity(source: SourceOptions, images: ImageOptions, rows: pa.Table) -> dict[str, Any]:
    """What decides the pixels of a set of images: source, preprocessing, and a digest over what was listed, except where it lies:
    a copy in another place is the same set."""
    digest = hashlib.sha256()
    for name in ("image_id", "num_bytes", "etag"):
        digest.update(json.dumps([name, rows[name].to_pylist()]).encode())
    return {
        "source": source.name,
        "seed": source.seed,
        "preprocessing": preprocessing_spec(images),
        "num_images": rows.num_rows,
        "rows": digest.hexdigest(),
    }


def reference_key(identity: dict[str, Any], extractor_fingerprint: str, output: str, num_kept: int) -> str:
    """Key of a reference: images, extractor, which of its outputs, and how many features are kept themselves."""
    return canonical_hash(
        {
            "images": identity,
            "extractor": extractor_fingerprint,
            "output": output,
            "num_kept": num_kept,
            "format_version": FORMAT_VERSION,
        }
    )


def reference_path(evaluation_path: str, key: str) -> str:
    """Where the reference of this key is kept."""
    return storage.join(evaluation_path, "reference", f"{key[:16]}.npz")


def store_reference(
    evaluation_path: str,
    key: str,
    statistics: GaussianStatistics,
    num_unusable: int,
    features: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    self_test: Mapping[str, float] | None = None,
    *,
    extractor_fingerprint: str,
) -> StoredReference:
    """Keeps a reference and returns what is kept: the first one stored under a key stays.

    Args:
        evaluation_path: folder of the history.
        key: from `reference_key`.
        statistics: of all images.
        num_unusable: listed images that are not among these.
        features: float32 (m, d) of some of them.
        kept: int64 (m,), positions in the listing of those.
        self_test: see `StoredReference`.
        extractor_fingerprint: of the extractor that made the features; for readers of the file, since `key` does not tell.
    """
    arrays: dict[str, Any] = {
        "n": np.int64(statistics.n),
        "mean": statistics.mean,
        "m2": statistics.m2,
        "factor": covariance_factor(statistics.covariance),
    }
    if features is not None:
        arrays |= {"features": features, "kept": kept}
    meta = {
        "key": key,
        "sha256": _arrays_hash(arrays),
        "num_unusable": num_unusable,
        "self_test": dict(self_test) if self_test is not None else None,
        "extractor_fingerprint": extractor_fingerprint,
        "format_version": FORMAT_VERSION,
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, mu=statistics.mean, sigma=statistics.covariance, meta=np.array(json.dumps(meta)))
    storage.put_if_absent(reference_path(evaluation_path, key), buffer.getvalue())
    stored = load_reference(evaluation_path, key)
    assert stored is not None
    return stored


def load_reference(evaluation_path: str, key: str) -> StoredReference | None:
    """The reference of this key, checked against its hash; None when there is none.

    Raises:
        ArtefactError: it is damaged, or of another key.
    """
    path = reference_path(evaluation_path, key)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file}
            meta = json.loads(str(file["meta"]))
            found = _arrays_hash(arrays)
            gaussian = Reference(arrays["mean"], arrays["factor"], int(arrays["n"]))
    except UNREADABLE as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must hold reference statistics. Remove it; it is computed again."
        ) from error
    if (meta["key"], meta["sha256"]) != (key, found):
        raise ArtefactError(
            f"{path} has key {meta['key']} and arrays of sha-256 {found}, but {key} and {meta['sha256']} are expected. "
            "Remove it; it is computed again."
        )
    reference = ReferenceSet(gaussian, arrays.get("features"))
    return StoredReference(
        reference, key, found, meta["num_unusable"], arrays["m2"], meta["self_test"], arrays.get("kept")
    )


def read_statistics(path: str, output: str, extractor: Extractor) -> StoredReference:
    """The statistics of one output of an extractor in a file of pytorch-fid or ADM, or one written by Tessera.

    Args:
        path: a local or s3:// .npz.
        output: features, or spatial (which ADM's files have).
        extractor: what the file must be of, where it says so; files of others do not.

    Raises:
        ArtefactError: there is no such file, it is damaged, or it holds no statistics of this extractor.
    """
    names, width = LAYOUT[output], extractor.outputs[output]
    try:
        data = storage.read_bytes(path)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            mean, covariance = (file[name].astype(np.float64) for name in names) if not missing else (np.empty(0),) * 2
            n = int(file["n"]) if "n" in file else None
            made_with = json.loads(str(file["meta"])).get("extractor_fingerprint") if "meta" in file else None
    except FileNotFoundError:
        raise ArtefactError(f"evaluation.reference_path is {path}, but there is no such file. Name an .npz.") from None
    except UNREADABLE as error:
        raise ArtefactError(
            f"evaluation.reference_path is {path}, but that cannot be read ({error}). Name an .npz of pytorch-fid or ADM."
        ) from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        found = f"no {' and '.join(missing)}" if missing else f"a mean of shape {mean.shape}"
        raise ArtefactError(
            f"evaluation.reference_path is {path}, which has {found}, but the metrics need {names[0]} ({width},) and "
            f"{names[1]} ({width}, {width}). Name statistics of the same extractor."
        )
    if made_with not in (None, extractor.fingerprint):
        raise ArtefactError(
            f"evaluation.reference_path is {path}, made with the extractor of fingerprint {made_with}, but {extractor.name} "
            f"has {extractor.fingerprint}. Name statistics of the same extractor."
        )
    try:
        factor = _checked_factor(mean, covariance)
    except ValueError as error:
        raise ArtefactError(
            f"evaluation.reference_path is {path}, but its {names[1]} {error}, so it is no covariance. Make the file again."
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()
    key = canonical_hash({"file": sha256, "output": output})
    return StoredReference(ReferenceSet(Reference(mean, factor, n)), key, sha256)


def _checked_factor(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.allclose(covariance, covariance.T)):
        raise ValueError("is not symmetric or not finite")
    return covariance_factor(covariance)


def statistics_npz(references: Mapping[str, StoredReference], meta: dict[str, Any]) -> bytes:
    """References by output as one .npz that pytorch-fid reads, with ADM's names: mu and sigma, and of spatial features mu_s
    and sigma_s; beside them n and `meta`."""
    arrays: dict[str, Any] = {}
    for output, stored in references.items():
        gaussian = stored.reference.gaussian
        assert stored.m2 is not None and gaussian.n is not None
        mean, covariance = LAYOUT[output]
        arrays |= {mean: gaussian.mean, covariance: stored.m2 / (gaussian.n - 1), "n": np.int64(gaussian.n)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, meta=np.array(json.dumps(meta)))
    return buffer.getvalue()


def _arrays_hash(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in ARRAYS:
        if name in arrays:
            values = np.ascontiguousarray(arrays[name])
            digest.update(f"{name}:{values.shape}:{values.dtype.str}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()
