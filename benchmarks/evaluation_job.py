"""The whole evaluation beside its parts: how much of its time is its slowest part?

    make demo && .venv/bin/python benchmarks/evaluation_job.py

One sampler actor and one feature actor on two cores, one thread each. Every part is first timed alone in this process on the
same images and the same numbers of them; what the sampler actor does in all and what the feature actor does in all are the two sides
that run beside each other. The evaluation cannot be faster than the slower side. Repeats are interleaved, medians are printed.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from cluster.runtime import connected
from cluster.sampler_actor import SamplerActor
from evaluation.evaluate import measure
from evaluation.feature_actor import FeatureActor
from evaluation.prepare import EvaluateOptions, prepare
from pipeline.job_options import select
from stages.config import load_config

CHUNK = 32


class Stopwatch:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, part: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
        return result


def parts(assignment: Any, sampler: SamplerActor, extractor: FeatureActor) -> dict[str, dict[str, float]]:
    """Seconds of each part alone, by the side that does it."""
    sampling, features = Stopwatch(), Stopwatch()
    for start in range(0, assignment.evaluation.num_samples, CHUNK):
        codes = sampling("sampling", lambda: sampler.codes(start, start + CHUNK))
        images = sampling("decode", lambda: sampler.decode(codes))
        features("features of samples", lambda: extractor.of_images(images, []))
    for start in range(0, len(assignment.reference_uris), CHUNK):
        uris = assignment.reference_uris[start : start + CHUNK]
        features("reference: read and features", lambda: extractor.of_reference(uris, list(assignment.reference_keys)))
    for start in range(0, len(assignment.holdout_uris), CHUNK):
        uris, labels = assignment.holdout_uris[start : start + CHUNK], assignment.holdout_labels[start : start + CHUNK]
        _, codes, usable = features("held-out: read, reconstruct, features", lambda: extractor.of_holdout(uris, labels, []))
        sampling("held-out: likelihood", lambda: sampler.nll(codes, usable))
    return {"sampler actor": sampling.seconds, "feature actor": features.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/demo.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    options = select(EvaluateOptions, load_config(args.config, args.overrides))
    sides: dict[str, dict[str, list[float]]] = {}
    ratios, walls, starts = [], [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder, connected(num_cpus=2):
            evaluation = dataclasses.replace(options.evaluation, path=folder, num_sampler_actors=1, num_feature_actors=1)
            assignment = prepare(dataclasses.replace(options, evaluation=evaluation)).assignment
            a = assignment
            sampler = SamplerActor(a.checkpoint_path, a.tokenizer.path, a.sampling)
            extractor = FeatureActor(a.source, a.images, a.evaluation, a.plan, a.tokenizer)
            found = parts(assignment, sampler, extractor)
            begin = time.perf_counter()
            measurement = measure(assignment)
            total = time.perf_counter() - begin
        wall = measurement.wall_seconds["working"]
        for side, seconds in found.items():
            for part, value in seconds.items():
                sides.setdefault(side, {}).setdefault(part, []).append(value)
        ratios.append(max(sum(seconds.values()) for seconds in found.values()) / wall)
        walls.append(wall)
        starts.append(total - wall)
    for side, named in sides.items():
        medians = {part: statistics.median(values) for part, values in named.items()}
        print(f"{side}, alone: {sum(medians.values()):.1f} s")
        for part, value in medians.items():
            print(f"    {part:<40} {value:8.1f} s")
    print(f"whole evaluation, both at once: {statistics.median(walls):.1f} s, and {statistics.median(starts):.1f} s for starting actors")
    print(f"slowest side / whole evaluation: {statistics.median(ratios):.1%} (of each repeat: {', '.join(f'{r:.1%}' for r in ratios)})")


if __name__ == "__main__":
    main()
