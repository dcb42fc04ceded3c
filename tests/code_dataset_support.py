"""Small code datasets without images, a tokenizer or Ray."""

from dataclasses import dataclass

import numpy as np

from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.code_dataset.parts import PartRows
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

    @property
    def codes(self):
        """Of every image that is not bad, (images, views, L)."""
        shape = (self.num_images, self.num_views, self.grid[0] * self.grid[1])
        codes = np.random.default_rng(0).integers(0, self.codebook_size, shape)
        return np.delete(codes, self.bad_images, axis=0)

    @property
    def image_ids(self):
        return np.delete(100 + np.arange(self.num_images), self.bad_images)

    def labels(self, image_ids):
        return image_ids % self.num_classes if self.num_classes else np.full(len(image_ids), -1)

    @property
    def plan(self):
        ids = 100 + np.arange(self.num_images)
        labels = self.labels(ids) if self.num_classes else None
        identity = {"class_names": [f"class {i}" for i in range(self.num_classes)], "codebook_size": self.codebook_size}
        return make_plan(listing(ids, [f"image-{i}" for i in ids], labels), identity, self.shard_size)

    def write_shard(self, root, shard, codes=None):
        is_mine = (self.image_ids - 100) // self.shard_size == shard
        ids, codes = self.image_ids[is_mine], self.codes[is_mine] if codes is None else codes
        rows = PartRows(
            codes=codes.reshape(-1, codes.shape[-1]),
            image_ids=ids.repeat(self.num_views),
            views=np.tile(np.arange(self.num_views), len(ids)),
            labels=self.labels(ids).repeat(self.num_views) if self.num_classes else None,
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
            codebook_size=self.codebook_size,
            num_views=self.num_views,
        )

    def write(self, root):
        """Writes and publishes what is missing of the dataset; returns its folder."""
        root, plan = str(root), self.plan
        freeze(root, plan)
        for shard in sorted(set(range(plan.num_shards)) - finished_shards(root, plan.fingerprint)):
            self.write_shard(root, shard)
        publish(root, read_receipts(root, plan.fingerprint, plan.num_shards), self.description)
        return root

    @property
    def description(self):
        num_codes, bits = self.grid[0] * self.grid[1], num_bits(self.codebook_size)
        codec = {"bits": bits, "bytes_per_row": bytes_per_row(num_codes, bits), "num_codes": num_codes}
        return {
            "plan_fp": self.plan.fingerprint,
            "class_names": self.plan.identity["class_names"],
            "views": [f"view {i}" for i in range(self.num_views)],
            "grid": list(self.grid),
            "tokenizer": {"fingerprint": "f" * 64},
            "codec": {"name": "pack_le", **codec, "codebook_size": self.codebook_size},
        }
