"""Memory of an evaluation's processes by the number of samples: it must not grow with them.

    make demo && .venv/bin/python benchmarks/evaluation_memory.py sampling.cfg_scale=1.0 --num-samples 2000 50000

As many held-out images as samples, all metrics that need no weights of others, one actor of each kind. Every 200 ms each process's own
memory is read (resident, less what it shares: libraries, and the object store, which has a size of its own); peaks are printed.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import dataclasses
import tempfile
import threading
import time

import psutil

from cluster.runtime import connected
from evaluation.evaluate import measure
from evaluation.prepare import EvaluateOptions, prepare
from pipeline.job_options import select
from stages.config import load_config

ACTORS = ("EvaluationActor", "SamplerActor", "FeatureActor")
METRICS = ("fd", "kd", "precision_recall", "density_coverage", "memorisation", "psnr", "ssim", "codebook", "likelihood")


def read_memory() -> dict[str, int]:
    """Bytes by name of the process: this one and the actors."""
    driver = psutil.Process()
    memory = driver.memory_info()
    found = {"driver": memory.rss - memory.shared}
    for process in driver.children(recursive=True):
        try:
            title, memory = " ".join(process.cmdline()), process.memory_info()
        except psutil.Error:
            continue
        for name in ACTORS:
            if title.startswith(f"ray::{name}"):
                found[name] = max(found.get(name, 0), memory.rss - memory.shared)
    return found


class Watch(threading.Thread):
    """Keeps the peaks while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.wait(0.2):
            for name, size in read_memory().items():
                self.peaks[name] = max(size, self.peaks.get(name, 0))

    def stop(self) -> dict[str, int]:
        self._stop_event.set()
        self.join()
        return self.peaks


def measure_peaks(options: EvaluateOptions, num_samples: int) -> tuple[dict[str, int], float]:
    """Peak bytes by process, and seconds, of one evaluation."""
    with tempfile.TemporaryDirectory() as folder, connected(num_cpus=2):
        evaluation = dataclasses.replace(
            options.evaluation,
            path=folder,
            num_samples=num_samples,
            metrics=METRICS,
            num_sampler_actors=1,
            num_feature_actors=1,
            extractor_resolution=32,
        )
        source = dataclasses.replace(options.source, num_holdout_images=num_samples)
        assignment = prepare(dataclasses.replace(options, evaluation=evaluation, source=source)).assignment
        watch, begin = Watch(), time.perf_counter()
        watch.start()
        measure(assignment)
        return watch.stop(), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/demo.yaml")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[2000, 50_000])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    options = select(EvaluateOptions, load_config(args.config, args.overrides))
    for num_samples in args.num_samples:
        peaks, seconds = measure_peaks(options, num_samples)
        sizes = ", ".join(f"{name} {peaks[name] / 1e6:.0f} MB" for name in ("driver", *ACTORS))
        print(f"{num_samples} samples: {sizes}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
