"""Whether a discriminator that is switched on ruins the reconstructions: at several points of training, three seeds.

    python benchmarks/collapse.py tiles/train [--vgg vgg16.pth --heads vgg.pth] [--output collapse.json]

One tokenizer per seed is trained without an adversary's term; where the discriminator starts to learn, a training with the term branches
off for each switch. Right before the switch, and at several points after it, the same held-out crops are reconstructed by the averaged
weights, as they would be published. What counts is the worst of the points after the switch over the one before: of the Fréchet
distance of EfficientNet-Lite0 features and, where weights are given, of LPIPS. A young tokenizer's distance rises and falls by itself,
so the same is said of the training without the term, and the two are compared step by step.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import copy
import json
import logging
import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.extractors import FEATURES, open_extractor
from evaluation.frechet import Reference, frechet_distance
from evaluation.pixel_metrics import psnr
from evaluation.statistics import GaussianStatistics
from pipeline.image_order import augmentation
from pipeline.perceptual import load_lpips
from pipeline.views import render
from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.lpips import Lpips
from stages.first_stage.pixels import to_float, to_uint8
from stages.first_stage.quantizers.revival import is_time_to_revive
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import tokenizer_config
from stages.first_stage.training import FirstStageTrainer
from stages.hashing import hash64
from stages.options import EvaluationOptions, ImageOptions, TokenizerOptions, TokenizerTrainOptions

logger = logging.getLogger("collapse")

IMAGES = ImageOptions(size=32)
TOKENIZER = TokenizerOptions(
    codebook_size=512,
    codebook_dim=8,
    base_channels=32,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=64,
)
NEVER = 10**9
WARM = 5  # the discriminator learns for a fifth of the training before its term is switched on


def options_for(num_steps: int, switch: int, batch_size: int, weight: float) -> TokenizerTrainOptions:
    """The recipe: a warm discriminator, a ramp of a tenth of the training, a capped adaptive weight, LeCam, a low weight."""
    return TokenizerTrainOptions(
        num_samples=num_steps * batch_size,
        global_batch_size=batch_size,
        learning_rate=1e-3,
        warmup_samples=20 * batch_size,
        decay="none",
        weight_average_decay=0.99,
        discriminator_weight=weight,
        discriminator_channels=32,
        discriminator_layers=2,
        discriminator_start_samples=switch * batch_size,
        discriminator_warm_samples=num_steps // WARM * batch_size,
        discriminator_ramp_samples=num_steps // 10 * batch_size,
        max_adaptive_weight=10.0,
        lecam_weight=0.01,
        revive_every_steps=50,
        precision="fp32",
    )


class Crops:
    """Random crops of image files in memory, each a function of its number."""

    def __init__(self, folder: str, limit: int):
        paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix in (".png", ".jpg"))[:limit]
        self.images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    def take(self, numbers: np.ndarray, seed: int) -> Tensor:
        """uint8 (n, size, size, 3)."""
        keys = hash64(seed, numbers)
        chosen = [self.images[int(key % np.uint64(len(self.images)))] for key in keys]
        views = [
            render(image, augmentation(int(key), *image.shape[:2], min_crop=0.125, flips=True), IMAGES)
            for image, key in zip(chosen, keys)
        ]
        return torch.from_numpy(np.stack(views))


class Judge:
    """Measures a tokenizer on crops that no training sees."""

    def __init__(self, held_out: Tensor, lpips: Lpips | None):
        self.held_out, self.lpips = held_out, lpips
        name = "efficientnet-lite0"
        self.extractor = open_extractor(name, EvaluationOptions(extractor=name, extractor_resolution=64))
        self.real = Reference.of(self.statistics(held_out))

    def statistics(self, images: Tensor) -> GaussianStatistics:
        return GaussianStatistics.of(self.extractor(images.numpy())[FEATURES])

    @torch.no_grad()
    def __call__(self, tokenizer: Tokenizer) -> dict[str, float]:
        batches = []
        for pixels in self.held_out.split(128):
            codes = tokenizer.encode(to_float(pixels)).view(len(pixels), *tokenizer.grid(IMAGES.size))
            batches.append(to_uint8(tokenizer.decode(codes)))
        made = torch.cat(batches)
        values = {"psnr": float(psnr(self.held_out.numpy(), made.numpy()).mean())}
        values["fd"] = frechet_distance(self.statistics(made), self.real)
        if self.lpips is not None:
            values["lpips"] = self.lpips(to_float(self.held_out), to_float(made)).mean().item()
        return values


def new_trainer(seed: int, switch: int, args: argparse.Namespace) -> FirstStageTrainer:
    """Whose adversary's term is switched on after so many steps."""
    torch.manual_seed(seed)
    options = options_for(args.num_steps, switch, args.batch_size, args.weight)
    tokenizer = Tokenizer(tokenizer_config(TOKENIZER, IMAGES))
    return FirstStageTrainer(tokenizer, build_discriminator(options, 3, IMAGES.size), options)


def train(
    trainer: FirstStageTrainer, steps: range, seed: int, judged: set[int], kept: set[int], crops: Crops, judge: Judge
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, Any]]]:
    """Trains on; returns what the judge says and the trainer's state, by number of steps done."""
    options, points, states = trainer.options, {}, {}
    batch_size, num_steps = options.global_batch_size, options.num_samples // options.global_batch_size
    for step in steps:
        if step in kept:
            states[step] = copy.deepcopy(trainer.state_dict())
        if step in judged:
            points[step] = judge(trainer.averaged_tokenizer())
        numbers = step * batch_size + np.arange(batch_size)
        trainer.step(to_float(crops.take(numbers, seed)), step * batch_size)
        if is_time_to_revive(options, step + 1, num_steps):
            trainer.revive_dead_codes()
    points[steps.stop] = judge(trainer.averaged_tokenizer())
    return points, states


def run_seed(seed: int, crops: Crops, judge: Judge, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A training in which the term is never switched on and, from where the discriminator starts to learn, one per switch."""
    places = {
        switch: np.linspace(switch, args.num_steps, args.num_points + 1).astype(int).tolist() for switch in args.switches
    }
    begins = {switch: max(switch - args.num_steps // WARM, 0) for switch in args.switches}
    judged = {step for steps in places.values() for step in steps}
    steps = range(args.num_steps)
    without, states = train(new_trainer(seed, NEVER, args), steps, seed, judged, set(begins.values()), crops, judge)
    logger.info("seed %d without the term: %s", seed, json.dumps(without))
    results = []
    for switch, (first, *rest) in places.items():
        trainer = new_trainer(seed, switch, args)
        trainer.load_state_dict(copy.deepcopy(states[begins[switch]]))
        points, _ = train(trainer, steps[begins[switch] :], seed, {first, *rest}, set(), crops, judge)
        after = {step: points[step] for step in rest}
        result = {"seed": seed, "switch": switch, "before": points[first], "after": after, "ratios": ratios(points[first], after)}
        result["never"] = ratios(without[first], {step: without[step] for step in rest})
        result["beside"] = {name: max(after[step][name] / without[step][name] for step in rest) for name in result["ratios"]}
        logger.info("%s", json.dumps(result))
        results.append(result)
    return results


def ratios(before: dict[str, float], after: dict[int, dict[str, float]]) -> dict[str, float]:
    """The worst point after the switch over the point before it, of what shall be low."""
    return {name: max(point[name] for point in after.values()) / before[name] for name in ("fd", "lpips") if name in before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", help="folder of PNG or JPEG files")
    parser.add_argument("--vgg", help="VGG16 weights, for LPIPS")
    parser.add_argument("--heads", help="its linear heads")
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--switches", type=int, nargs="+", default=[100, 250, 400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-points", type=int, default=3, help="measured after each switch")
    parser.add_argument("--num-held-out", type=int, default=512)
    parser.add_argument("--weight", type=float, default=0.2, help="of the adversarial term")
    parser.add_argument("--output", help="JSON file for every number")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    lpips = None
    if args.vgg:
        names = TokenizerTrainOptions(perceptual_weight=1.0, perceptual_vgg=args.vgg, perceptual_heads=args.heads)
        loaded = load_lpips(names)
        lpips = None if loaded is None else loaded[0]
    crops = Crops(args.tiles, limit=2000)
    judge = Judge(crops.take(np.arange(args.num_held_out), seed=NEVER), lpips)
    results = []
    for seed in args.seeds:
        results += run_seed(seed, crops, judge, args)
        if args.output:
            pathlib.Path(args.output).write_text(json.dumps(results, indent=1))
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    """FD and LPIPS before and at worst, their ratio, the same in the training without the term, and the worst ratio of both at a step."""
    columns = ["before", "worst after", "ratio", "never on", "beside"]
    heads = ["seed", "switched on at step", *(f"{name} {column}" for name in ("FD", "LPIPS") for column in columns)]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for result in results:
        cells = [str(result["seed"]), str(result["switch"])]
        for name in ("fd", "lpips"):
            if name not in result["before"]:
                cells += ["-"] * len(columns)
                continue
            worst = max(point[name] for point in result["after"].values())
            cells += [f"{value:.4g}" for value in (result["before"][name], worst)]
            cells += [f"{result[part][name]:.2f}" for part in ("ratios", "never", "beside")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
