"""Small code datasets without images, a tokenizer or Ray."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.code_dataset.layout import canonical_json, manifest_path, sha256_hex, version_path
from pipeline.code_dataset.parts import RowFormat, make_rows
from pipeline.code_dataset.plan import freeze, make_plan
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import commit_shard, finished_shards, read_receipts
from pipeline.sources import listing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small code dataset, and writing it shard by shard without Ray."""

    num_images: int = 20
    num_views: int = 2
    num_classes: int = 3
    shard_size: int = 8
    grid: tuple[int, int] = (2, 3)
    codebook_size: int = 20
    bad_images: tuple[int, ...] = (5,)
    conditions: tuple[str, ...] = ()
    row_group_rows: int | None = None
    duplicate_of: tuple[tuple[int, int], ...] = ()  # (image, an earlier one with the same bytes)
    drop_duplicates: bool = False
    remap_unused: bool = False
    used_codes: tuple[int, ...] | None = None
    tokenizer_fingerprint: str = "f" * 64
    uri: str = "image-{}"
    num_bytes: int | None = None  # of every image
    etag: str | None = None
    views: str = "view {}"
    last_crop: tuple[float, float, float, float] = (1.5, 2, 30, 40)  # of the last view of every image

    @property
    def row_format(self):
        return RowFormat(
            num_codes=self.grid[0] * self.grid[1],
            codebook_size=self.codebook_size,
            has_labels=bool(self.num_classes),
            conditions=self.conditions,
        )

    @property
    def kept_images(self):
        """Numbers of the images that are published, in order."""
        dropped = {image for image, _ in self.duplicate_of} if self.drop_duplicates else set()
        return np.array([i for i in range(self.num_images) if i not in self.bad_images and i not in dropped])

    @property
    def codes(self):
        """Of every published image, (images, views, L)."""
        return self._all_codes[self.kept_images]

    @property
    def _all_codes(self):
        shape = (self.num_images, self.num_views, self.grid[0] * self.grid[1])
        choice = np.arange(self.codebook_size) if self.used_codes is None else np.array(self.used_codes)
        return choice[np.random.default_rng(0).integers(0, len(choice), shape)]

    @property
    def image_ids(self):
        """Of every published image."""
        return 100 + self.kept_images

    def labels(self, image_ids):
        return image_ids % self.num_classes if self.num_classes else np.full(len(image_ids), -1)

    def condition(self, name):
        """Of every published row, (rows, L)."""
        rows = np.arange(len(self.kept_images) * self.num_views)[:, None]
        return ((rows * 7 + self.conditions.index(name) + np.arange(self.row_format.num_codes)) % 256).astype(np.uint8)

    @property
    def plan(self):
        ids = 100 + np.arange(self.num_images)
        labels = self.labels(ids) if self.num_classes else None
        identity = {"class_names": [f"class {i}" for i in range(self.num_classes)], "codebook_size": self.codebook_size}
        uris, sizes, tags = ([value] * len(ids) for value in (self.uri, self.num_bytes, self.etag))
        table = listing(ids, [uri.format(i) for uri, i in zip(uris, ids)], labels, sizes, tags)
        return make_plan(table, identity, self.shard_size)

    def write_shard(self, root, shard, codes=None):
        first, stop = shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images)
        images = np.array([i for i in range(first, stop) if i not in self.bad_images], dtype=np.int64)
        codes = (self._all_codes[images] if codes is None else codes).reshape(-1, self.row_format.num_codes)
        n = len(images) * self.num_views
        rows = make_rows(
            self.row_format,
            codes=codes,
            image_ids=(100 + images).repeat(self.num_views),
            views=np.tile(np.arange(self.num_views), len(images)),
            crops=np.tile(np.array([(1.5, 2, 30, 40)] * (self.num_views - 1) + [self.last_crop], np.float32), (len(images), 1)),
            is_flipped=np.arange(n) % 2 == 1,
            source_sha256=self._sha256(images).repeat(self.num_views, axis=0),
            labels=self.labels(100 + images).repeat(self.num_views),
            conditions={name: self._conditions_of(name, images) for name in self.conditions},
        )
        bad = [
            {
                "image_id": 100 + i,
                "uri": f"image-{i}",
                "stage": "decode",
                "kind": "empty",
                "message": "-",
                "sha256": "0" * 64,
            }
            for i in self.bad_images
            if i // self.shard_size == shard
        ]
        return commit_shard(
            root,
            self.plan.fingerprint,
            shard,
            rows=rows,
            quarantined=bad,
            row_format=self.row_format,
            num_views=self.num_views,
        )

    def _conditions_of(self, name, images):
        kept = np.searchsorted(self.kept_images, images)
        rows = (kept[:, None] * self.num_views + np.arange(self.num_views)).ravel()
        return self.condition(name)[np.minimum(rows, len(self.kept_images) * self.num_views - 1)]

    def _sha256(self, images):
        originals = dict(self.duplicate_of)
        digests = [hashlib.sha256(f"image {originals.get(i, i)}".encode()).digest() for i in images.tolist()]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(len(images), 32)

    def write(self, root):
        """Writes and publishes what is missing of the dataset; returns its folder."""
        root, plan = str(root), self.plan
        freeze(root, plan)
        for shard in sorted(set(range(plan.num_shards)) - finished_shards(root, plan.fingerprint)):
            self.write_shard(root, shard)
        publish(
            root,
            read_receipts(root, plan.fingerprint, plan.num_shards),
            self.description,
            drop_duplicates=self.drop_duplicates,
            remap_unused=self.remap_unused,
            row_group_rows=self.row_group_rows,
        )
        return root

    @property
    def description(self):
        return {
            "plan_fp": self.plan.fingerprint,
            "class_names": self.plan.identity["class_names"],
            "conditions": list(self.conditions),
            "views": [self.views.format(i) for i in range(self.num_views)],
            "grid": list(self.grid),
            "tokenizer": {"fingerprint": self.tokenizer_fingerprint},
            "codec": {
                "name": "pack_le",
                "num_codes": self.row_format.num_codes,
                "codebook_size": self.codebook_size,
            },
        }


def replace_manifest(root, manifest):
    """Publishes another manifest in place of the one that is there, with every hash made to fit."""
    data = canonical_json(manifest)
    storage.replace(manifest_path(root, sha256_hex(data)), data)
    version = json.loads(storage.read_bytes(version_path(root, 1)))
    version |= {"manifest_sha256": sha256_hex(data), "root_hash": manifest["root_hash"]}
    del version["sha256"]
    storage.replace(version_path(root, 1), canonical_json({**version, "sha256": sha256_hex(canonical_json(version))}))


def flip_bit(path, position):
    """Changes one bit of a file, counted from its start."""
    data = bytearray(storage.read_bytes(path))
    data[position // 8] ^= 1 << (position % 8)
    storage.replace(path, bytes(data))


def files_of(root, kind):
    """Of one folder of a dataset."""
    return storage.list_files(storage.join(str(root), kind))
