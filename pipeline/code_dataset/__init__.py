"""The code-dataset format: bit-packed Parquet parts, receipts, a manifest, and one file that publishes a version.

codec   bit packing              parts     Parquet parts with known offsets           plan     the frozen split into shards
layout  where files are          receipts  one per finished shard, first wins         publish  manifest and version
reader  opens and reads          verify    checks everything to the last byte
"""

from pipeline.code_dataset.reader import CodeDataset

__all__ = ["CodeDataset"]
