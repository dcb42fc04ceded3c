"""Reference statistics: what real training images look like to an extractor, computed once and kept with a hash.

One .npz per reference under `<evaluation.path>/reference/`: n, mean, m2, factor and a description, and beside them mu
and sigma, so that readers of the pytorch-fid layout can use it as it is.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from evaluation.frechet import Reference
from evaluation.hashing import canonical_hash
from evaluation.statistics import GaussianStatistics
from pipeline import storage
from pipeline.views import preprocessing_spec
from stages.errors import ArtefactError
from stages.options import ImageOptions, SourceOptions

FORMAT_VERSION = 1
ARRAYS = ("n", "mean", "m2", "factor")


@dataclass(frozen=True, eq=False)
class StoredReference:
    """A reference as it is kept.

    Attributes:
        reference: the statistics and the factor of their covariance.
        key: sha-256 (hex) of what it was made from.
        sha256: sha-256 (hex) of its arrays.
        num_unusable: listed images that could not be decoded and are not in it.
    """

    reference: Reference
    key: str
    sha256: str
    num_unusable: int


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
    """What decides the pixels of a set of images: source, preprocessing, and a digest over what was listed."""
    digest = hashlib.sha256()
    for name in ("image_id", "uri", "num_bytes", "etag"):
        digest.update(json.dumps([name, rows[name].to_pylist()]).encode())
    return {
        "source": source.name,
        "seed": source.seed,
        "preprocessing": preprocessing_spec(images),
        "num_images": rows.num_rows,
        "rows": digest.hexdigest(),
    }


def reference_key(identity: dict[str, Any], extractor_fingerprint: str) -> str:
    """Key of reference statistics: images and extractor."""
    return canonical_hash({"images": identity, "extractor": extractor_fingerprint, "format_version": FORMAT_VERSION})


def reference_path(evaluation_path: str, key: str) -> str:
    """Where the reference of this key is kept."""
    return storage.join(evaluation_path, "reference", f"{key[:16]}.npz")


def store_reference(
    evaluation_path: str, key: str, statistics: GaussianStatistics, num_unusable: int
) -> StoredReference:
    """Keeps a reference and returns what is kept: the first one stored under a key stays."""
    reference = Reference.of(statistics)
    n, mean, m2 = np.int64(statistics.n), statistics.mean, statistics.m2
    arrays: dict[str, Any] = {"n": n, "mean": mean, "m2": m2, "factor": reference.factor}
    meta = {"key": key, "sha256": _arrays_hash(arrays), "num_unusable": num_unusable, "format_version": FORMAT_VERSION}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, mu=mean, sigma=statistics.covariance, meta=np.array(json.dumps(meta)))
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
            arrays = {name: file[name] for name in ARRAYS}
            meta = json.loads(str(file["meta"]))
            found = _arrays_hash(arrays)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must hold reference statistics. Remove it; it is computed again."
        ) from error
    if (meta["key"], meta["sha256"]) != (key, found):
        raise ArtefactError(
            f"{path} has key {meta['key']} and arrays of sha-256 {found}, but {key} and {meta['sha256']} are expected. "
            "Remove it; it is computed again."
        )
    statistics = GaussianStatistics(int(arrays["n"]), arrays["mean"], arrays["m2"])
    return StoredReference(Reference(statistics, arrays["factor"]), key, found, meta["num_unusable"])


def _arrays_hash(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in ARRAYS:
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{values.shape}:{values.dtype.str}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
