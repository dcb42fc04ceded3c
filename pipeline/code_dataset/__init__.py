"""The code-dataset format: bit-packed Parquet parts, receipts, a manifest, and one file that publishes a version.

docs/code-dataset.md describes it for readers and writers in any language. In the order in which a dataset comes to be:

codec     bit packing                   plan      the frozen split into shards      receipts   one per finished shard, first wins
parts     Parquet with known offsets    compact   from shards to parts              publish    manifest and version
garbage   what may be deleted           layout    where files are
manifest  found and checked             reader    rows by number                    row_groups rows in memory, each group checked
verify    everything to the last byte   integrity hashes of every file
"""

from pipeline.code_dataset.reader import CodeDataset

__all__ = ["CodeDataset"]
