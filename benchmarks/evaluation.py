"""The evaluation's numbers: speed of the Fréchet distance, its error bar on repeated draws, and ladders of damage.

python benchmarks/evaluation.py speed     [--dim 2048] [--num-samples 4000] [--repeats 3]
python benchmarks/evaluation.py error-bar [--source fashion-mnist] [--num-images 10000] [--dim 256] [--repeats 50]
python benchmarks/evaluation.py ladder    [--source fashion-mnist | FOLDER] [--num-images 1000] [--metrics fd kd …]

speed: ours, with the reference factor cached as in every evaluation, alone and as one of the 16 distances behind an error bar, beside
scipy.linalg.sqrtm (pytorch-fid, clean-fid, ADM) and torchmetrics' formula on the same moments, in turn. error-bar: draws of 2,000
with replacement from a fixed set of images, whose own distance is therefore the truth. ladder: the metrics of real images, ever more
blurred, compressed and noisy, with their bias and without.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from torchmetrics.image.fid import _compute_fid

from evaluation.estimates import assign_blocks
from evaluation.extractors import open_extractor
from evaluation.feature_actor import read_view
from evaluation.frechet import Reference, frechet_distance, frechet_estimate
from evaluation.metrics import plan_metrics
from evaluation.reference import choose_images
from evaluation.set_metric import HOLDOUT, ReferenceSet
from evaluation.statistics import GaussianStatistics
from pipeline.sources import SOURCES, open_source
from stages.memory import keep_freed_memory
from stages.options import EvaluationOptions, ImageOptions, SourceOptions, TokenizerOptions

DRAW, NUM_BLOCKS = 2000, 10
IN_AN_ESTIMATE = "tessera, one of an estimate's"
NUM_DISTANCES = 1 + NUM_BLOCKS + NUM_BLOCKS // 2  # the jackknife leaves out each block, and pairs of them
BLURS, QUALITIES, NOISES = (0.0, 0.5, 1.0, 2.0), (100, 50, 20, 5), (0.0, 8.0, 24.0, 64.0)


def speed(args: argparse.Namespace) -> None:
    """Median seconds per distance and the ratios to ours; every distance equal to 1e-6."""
    keep_freed_memory()  # as the evaluation actor does
    generator = np.random.default_rng(0)
    features = [generator.normal(size=(args.num_samples, args.dim)) @ generator.normal(size=(args.dim,) * 2) for _ in range(2)]
    a, b = map(GaussianStatistics.of, features)
    blocks = [GaussianStatistics.of(part) for part in np.array_split(features[1], NUM_BLOCKS)]
    reference, num_threads = Reference.of(a), torch.get_num_threads()
    tensors = [torch.from_numpy(x) for each in (a, b) for x in (each.mean, each.covariance)]

    def by_scipy() -> float:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root))

    def by_estimate() -> float:
        torch.set_num_threads(1)  # of each of its own threads
        try:
            return frechet_estimate(blocks, reference, num_threads).value
        finally:
            torch.set_num_threads(num_threads)

    calls: dict[str, Callable[[], float]] = {
        "tessera": lambda: frechet_distance(b, reference),
        IN_AN_ESTIMATE: by_estimate,
        "tessera, factor not cached": lambda: frechet_distance(b, Reference.of(a)),
        "scipy.linalg.sqrtm": by_scipy,
        "torchmetrics": lambda: float(_compute_fid(*tensors)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            values[name] = call()
            seconds[name].append((time.perf_counter() - started) / (NUM_DISTANCES if name == IN_AN_ESTIMATE else 1))
    ours = statistics.median(seconds["tessera"])
    print(f"d = {args.dim}, {num_threads} threads, medians of {args.repeats}")
    for name, times in seconds.items():
        difference = abs(values[name] / values["tessera"] - 1)
        assert difference <= 1e-6, (name, difference)
        median = statistics.median(times)
        print(f"{name:<28} {median:7.2f} s, {median / ours:5.1f} x ours, relative difference {difference:.1e}")


def error_bar(args: argparse.Namespace) -> None:
    """Jackknife error and correction beside what repeated draws show."""
    images = read_images(args.source, "holdout", args.num_images)
    training = read_images(args.source, "train", 2 * args.num_images)
    extractor = open_extractor(args.extractor, options_of(args))
    channels = np.random.default_rng(5).permutation(extractor.outputs["features"])[: args.dim]
    reference = Reference.of(GaussianStatistics.of(extractor(training)["features"][:, channels]))
    blocks = assign_blocks(DRAW, NUM_BLOCKS)
    for label, shown in (("held-out images", images), ("the same, blurred", blurred(images, 0.7))):
        features = extractor(shown)["features"][:, channels]
        whole = GaussianStatistics.of(features)
        n = whole.n
        # Drawn with replacement, these images are the whole population: its covariance divides by n.
        truth = frechet_distance(GaussianStatistics(n, whole.mean, whole.m2 * (n - 1) / n), reference)
        estimates = []
        for seed in range(args.repeats):
            drawn = features[np.random.default_rng(seed).integers(n, size=DRAW)]
            estimates.append(frechet_estimate([GaussianStatistics.of(drawn[blocks == k]) for k in range(NUM_BLOCKS)], reference))
        plain, corrected = np.array([[e.value, e.bias_corrected] for e in estimates]).T
        error = np.mean([e.standard_error for e in estimates])
        spread = plain.std(ddof=1)
        print(
            f"{label}: truth {truth:.3f}, {args.repeats} draws of {DRAW}, d = {len(channels)}\n"
            f"  standard deviation {spread:.4f}, mean jackknife error {error:.4f}, ratio {error / spread:.3f}\n"
            f"  bias of the plain value {plain.mean() - truth:+.4f}, of the corrected {corrected.mean() - truth:+.4f}, "
            f"ratio {abs(corrected.mean() - truth) / abs(plain.mean() - truth):.4f}"
        )


def ladder(args: argparse.Namespace) -> None:
    """Every metric on held-out images and on worse and worse copies of them, against training images."""
    options = EvaluationOptions(**{**vars(options_of(args)), "metrics": tuple(args.metrics)})
    plan = plan_metrics(options)
    images, training = (read_images(args.source, split, args.num_images) for split in ("holdout", "train"))
    ladders = {
        "blur, pixels": [(f"{s:g}", blurred(images, s)) for s in BLURS],
        "JPEG, quality": [("none" if q == 100 else f"{q}", images if q == 100 else compressed(images, q)) for q in QUALITIES],
        "noise, deviation": [(f"{s:g}", noisy(images, s)) for s in NOISES],
    }
    for name in plan.extractors():
        extractor = open_extractor(name, options)
        outputs = list(dict.fromkeys(output for each, output in plan.features() if each == name))
        real = extractor(training, outputs)
        for title, rungs in ladders.items():
            found: dict[str, list[float]] = {}
            for _, shown in rungs:
                features = extractor(shown, outputs)
                for planned in plan.of_set(HOLDOUT):
                    if planned.extractor != name:
                        continue
                    values = real[planned.kind.output]
                    against = ReferenceSet(Reference.of(GaussianStatistics.of(values)), values)
                    shown_values = torch.from_numpy(features[planned.kind.output])
                    metric = planned.kind.cls(values.shape[1], num_blocks=NUM_BLOCKS, reference=against)
                    metric.update(shown_values, torch.from_numpy(assign_blocks(len(shown_values), NUM_BLOCKS)))
                    for part, estimate in metric.estimates().items():
                        found.setdefault(part or planned.name, []).append(estimate.value)
                        if estimate.bias_corrected is not None:
                            found.setdefault(f"{part or planned.name}, corrected", []).append(estimate.bias_corrected)
            print(f"{extractor.name}, {title}: " + ", ".join(label for label, _ in rungs))
            for metric_name, ladder_values in found.items():
                steps = np.diff(ladder_values)
                verdict = "monotone" if (steps > 0).all() or (steps < 0).all() else "NOT monotone"
                print(f"  {metric_name:<26}" + " ".join(f"{value:10.4f}" for value in ladder_values) + f"  {verdict}")


def options_of(args: argparse.Namespace) -> EvaluationOptions:
    """How extractors are opened."""
    resolution = args.resolution or (64 if args.extractor == "efficientnet-lite0" else None)
    return EvaluationOptions(extractor=args.extractor, extractor_resolution=resolution, weights_path=args.weights_path)


def read_images(source: str, split: str, num_images: int) -> np.ndarray:
    """uint8 (n, H, W, C) of a source by name, or of a folder, a tenth of which is held out."""
    is_fashion = source == "fashion-mnist"
    images = ImageOptions(size=28, channels=1) if is_fashion else ImageOptions(size=64)
    found = SourceOptions(name=source) if source in SOURCES else SourceOptions(
        name="image-folder", path=source, holdout_fraction=0.5
    )
    opened = open_source(found, images)
    uris = choose_images(opened.list_images(split), num_images)["uri"].to_pylist()
    views = (read_view(opened, uri, images, TokenizerOptions()) for uri in uris)
    return np.stack([view for view in views if view is not None])


def each_pillow(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """The images after a change by Pillow."""
    changed = [np.asarray(change(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))) for image in images]
    return np.stack(changed).reshape(images.shape)


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    """Under a Gaussian of that deviation in pixels; 0 changes nothing."""
    return each_pillow(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius))) if radius else images


def compressed(images: np.ndarray, quality: int) -> np.ndarray:
    """After JPEG of that quality."""

    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return each_pillow(images, change)


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    """With Gaussian noise."""
    noise = np.random.default_rng(0).normal(size=images.shape) * deviation
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "error-bar", "ladder"])
    parser.add_argument("--dim", type=int)
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--source", default="fashion-mnist")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--resolution", type=int, help="of efficientnet-lite0 (64 if not given)")
    parser.add_argument("--weights-path", default=EvaluationOptions().weights_path)
    parser.add_argument("--metrics", nargs="+", default=["fd", "kd", "precision_recall", "density_coverage"])
    parser.add_argument("--threads", type=int, help="torch threads; its own choice if not given")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    defaults = {"speed": (2048, None, 3), "error-bar": (256, 10_000, 50), "ladder": (None, 1000, None)}[args.part]
    for name, value in zip(("dim", "num_images", "repeats"), defaults):
        if getattr(args, name) is None:
            setattr(args, name, value)
    {"speed": speed, "error-bar": error_bar, "ladder": ladder}[args.part](args)


if __name__ == "__main__":
    main()
