"""The Fréchet distance: ours, with the reference factor cached, beside torchmetrics' formula on the same features.

python benchmarks/frechet.py [--dim 2048] [--num-samples 4000] [--repeats 3]
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import statistics
import time

import numpy as np
import torch
from torchmetrics.image.fid import _compute_fid

from evaluation.frechet import Reference, frechet_distance
from evaluation.statistics import GaussianStatistics


def median_seconds(call, repeats: int) -> float:
    """Median wall time of several calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    real, fake = (
        random.normal(size=(args.num_samples, args.dim)) @ random.normal(size=(args.dim, args.dim)) for _ in range(2)
    )
    a, b = GaussianStatistics.of(real), GaussianStatistics.of(fake)
    reference = Reference.of(a)
    tensors = [torch.from_numpy(x) for s in (a, b) for x in (s.mean, s.covariance)]
    ours, theirs = frechet_distance(b, reference), float(_compute_fid(*tensors))
    assert abs(ours - theirs) <= 1e-6 * abs(theirs), (ours, theirs)
    our_time = median_seconds(lambda: frechet_distance(b, reference), args.repeats)
    their_time = median_seconds(lambda: _compute_fid(*tensors), args.repeats)
    print(f"d = {args.dim}, equal to {abs(ours - theirs) / abs(theirs):.1e} relative")
    print(f"tessera {our_time:.2f} s, torchmetrics {their_time:.2f} s, ratio {their_time / our_time:.1f}")


if __name__ == "__main__":
    main()
