"""Random reads of a code dataset beside numpy gathering the same rows from an int64 array in memory.

python benchmarks/loader.py [--num-images 100000] [--batch 1024] [--repeats 5]
"""

import argparse
import statistics
import tempfile
import time

import numpy as np

from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.code_dataset.parts import PartRows
from pipeline.code_dataset.plan import freeze, make_plan
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import commit_shard, read_receipts
from pipeline.order import SampleOrder
from pipeline.sources import listing

GRID, CODEBOOK_SIZE, NUM_BATCHES = (16, 16), 1024, 50


def write_dataset(root: str, codes: np.ndarray) -> CodeDataset:
    """A published dataset of these codes (n, 256), without images or a tokenizer."""
    n, bits = len(codes), num_bits(CODEBOOK_SIZE)
    plan = make_plan(listing(np.arange(n), [str(i) for i in range(n)]), {"class_names": []}, n)
    freeze(root, plan)
    rows = PartRows(codes=codes, image_ids=np.arange(n), views=np.zeros(n, np.int32), labels=None)
    commit_shard(root, plan.fingerprint, 0, rows=rows, quarantined=[], codebook_size=CODEBOOK_SIZE, num_views=1)
    row_bytes = bytes_per_row(codes.shape[1], bits)
    codec = {
        "name": "pack_le",
        "bits": bits,
        "bytes_per_row": row_bytes,
        "num_codes": codes.shape[1],
        "codebook_size": CODEBOOK_SIZE,
    }
    description = {"plan_fp": plan.fingerprint, "class_names": [], "views": ["center"], "grid": list(GRID)}
    tokenizer = {"fingerprint": "f" * 64}
    publish(root, read_receipts(root, plan.fingerprint, 1), {**description, "tokenizer": tokenizer, "codec": codec})
    return CodeDataset.open(root, verify=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    codes = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (args.num_images, GRID[0] * GRID[1]))
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(folder, codes)
        order = SampleOrder(
            num_images=args.num_images, num_views=1, seed=0, global_batch_size=args.batch, root_hash=dataset.root_hash
        )
        batches = [order.batch(step).rows for step in range(NUM_BATCHES)]

        def rate(read) -> float:
            times = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                for rows in batches:
                    read(rows)
                times.append(time.perf_counter() - started)
            return NUM_BATCHES * args.batch / statistics.median(times)

        ours, theirs = rate(dataset.codes), rate(lambda rows: codes[rows])
        order_rate = rate(lambda rows: order.batch(int(rows[0])))
    print(f"{dataset.bytes_per_row} bytes per row of {codes.shape[1]} codes; numpy int64 has {codes.shape[1] * 8}")
    print(f"packed rows {ours:,.0f} images/s, numpy int64 in memory {theirs:,.0f} images/s, ratio {ours / theirs:.2f}")
    print(f"sample order alone {order_rate:,.0f} rows/s")


if __name__ == "__main__":
    main()
