"""How much of a large codebook stays in use: the recipe's quantizer beside the original's, same network, images and steps.

    mkdir photographs && cd photographs
    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg-deb -x "$package" .; done
    python benchmarks/codebook_health.py photographs [--num-steps 400] [--rows recipe,original]

Random crops of 36 photographs follow from a seed. Usage, perplexity and entropy are those of the codes of fresh crops by the
tokenizer as it is stored: averaged weights, baked codebook.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import logging
import pathlib
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.pixel_metrics import psnr
from stages.first_stage.pixels import to_float, to_uint8
from stages.first_stage.quantizers.health import codebook_health
from stages.first_stage.quantizers.revival import is_time_to_revive
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import tokenizer_config
from stages.first_stage.training import FirstStageTrainer
from stages.options import ImageOptions, TokenizerOptions, TokenizerTrainOptions

logger = logging.getLogger("codebook_health")

CODEBOOK_SIZE = 16_384
NUM_DECODED = 1024
IMAGES = ImageOptions(size=32)
NETWORK: dict[str, Any] = dict(
    base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(), z_channels=32
)
TRAINING: dict[str, Any] = dict(learning_rate=1e-3, warmup_samples=500, l1_weight=1.0)
# What the original does: no start on data, no revival, its weights of the two losses.
ORIGINAL: dict[str, Any] = dict(kmeans_start=False, revive_every_steps=0, loss_preset="compvis-legacy")
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe": (dict(quantizer="vq-l2", codebook_dim=8), dict(revive_every_steps=40)),
    "original": (dict(quantizer="vq", codebook_dim=256), ORIGINAL),
    "original, mended": (dict(quantizer="vq", codebook_dim=256), dict(revive_every_steps=40)),
    "recipe, no start or revival": (
        dict(quantizer="vq-l2", codebook_dim=8),
        dict(kmeans_start=False, revive_every_steps=0),
    ),
    "vq-ema": (dict(quantizer="vq-ema", codebook_dim=8), dict(revive_every_steps=40)),
    "simvq": (dict(quantizer="simvq", codebook_dim=8), {}),
    "lfq": (dict(quantizer="lfq"), {}),
    "bsq": (dict(quantizer="bsq"), {}),
    "fsq": (dict(quantizer="fsq", fsq_levels=(8, 8, 8, 6, 5), codebook_size=None), {}),
}
PHOTOGRAPHS = (
    "Bridge Dragonfly Picture_0B Picture_1A Wine aitzgorri free_by friends greentock life picosdeeuropa seeding sunset Kleiber Aqua "
    "Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings nature/Wood YellowFlower BytheWater ColorfulCups "
    "DarkestHour EveningGlow FallenLeaf /Grey/ Kite OneStandsOut Path/ summer_1am"
).split()
LARGEST_SIDE = 2048  # halves the largest ones, so that a crop shows more than blur


def read_photographs(folder: str) -> list[Tensor]:
    """uint8 (H, W, 3) of each photograph found under `folder`, in a fixed order."""
    paths = sorted(path for path in pathlib.Path(folder).rglob("*.*") if path.suffix in (".jpg", ".png"))
    photographs = []
    for name in PHOTOGRAPHS:
        found = [path for path in paths if name in str(path) and "screenshot" not in str(path)]
        if not found:
            raise SystemExit(f"{folder} has no {name}. Unpack the four packages there.")
        with Image.open(max(found, key=lambda path: path.stat().st_size)) as image:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            photographs.append(torch.from_numpy(np.array(image.convert("RGB"))))
    return photographs


def crops(photographs: list[Tensor], num: int, seed: int) -> Tensor:
    """uint8 (num, size, size, 3): every photograph and every place in it is equally likely."""
    random, size = np.random.default_rng(seed), IMAGES.size
    images = []
    for _ in range(num):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(side - size + 1) for side in photograph.shape[:2])
        images.append(photograph[top : top + size, left : left + size])
    return torch.stack(images)


def train(row: str, photographs: list[Tensor], num_steps: int, batch_size: int, num_test_crops: int) -> list[str]:
    """Trains one row; returns its cells of the table."""
    of_tokenizer, of_training = ROWS[row]
    options = TokenizerOptions(**{"codebook_size": CODEBOOK_SIZE} | NETWORK | of_tokenizer)
    training = TokenizerTrainOptions(
        num_samples=num_steps * batch_size, global_batch_size=batch_size, **TRAINING | of_training
    )
    torch.manual_seed(0)
    trainer = FirstStageTrainer(Tokenizer(tokenizer_config(options, IMAGES)), None, training)
    started, num_revived = time.monotonic(), 0
    for step in range(num_steps):
        metrics = trainer.step(to_float(crops(photographs, batch_size, seed=step)), step * batch_size)
        if is_time_to_revive(training, step + 1, num_steps):
            num_revived += trainer.revive_dead_codes()
        if (step + 1) % 50 == 0:
            values = "  ".join(f"{name} {value.item():.4f}" for name, value in metrics.items())
            logger.info(
                "%s  step %d  revived %d  %s  %.0f s", row, step + 1, num_revived, values, time.monotonic() - started
            )
    tokenizer = trainer.averaged_tokenizer().baked()
    usage, perplexity, entropy, quality = measure(tokenizer, crops(photographs, num_test_crops, seed=num_steps))
    return [
        row,
        options.quantizer,
        str(tokenizer.config.codebook_dim),
        f"{100 * usage:.1f} %",
        f"{perplexity:,.0f}",
        f"{entropy:.2f}",
        f"{quality:.2f}",
    ]


@torch.no_grad()
def measure(tokenizer: Tokenizer, pixels_NHWC: Tensor) -> tuple[float, float, float, float]:
    """Usage, perplexity and entropy of the codes of these images, and the mean PSNR of their reconstructions."""
    counts_K = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    quality = []
    for pixels in pixels_NHWC.split(256):
        codes = tokenizer.encode(to_float(pixels))
        counts_K += torch.bincount(codes.flatten(), minlength=len(counts_K))
        if len(quality) * 256 < NUM_DECODED:
            images = tokenizer.decode(codes.view(len(pixels), *tokenizer.grid(IMAGES.size)))
            quality.append(psnr(pixels.numpy(), to_uint8(images).numpy()))
    return *codebook_health(counts_K), float(np.concatenate(quality).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder of the unpacked packages")
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-test-crops", type=int, default=2048)
    parser.add_argument("--rows", default="recipe,original", help=f"of: {'; '.join(ROWS)}")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    photographs = read_photographs(args.photographs)
    print("| row | quantizer | dim | codes used | perplexity | bits per code | PSNR |\n|---|---|---|---|---|---|---|")
    for row in args.rows.split(";" if ";" in args.rows else ","):
        cells = train(row, photographs, args.num_steps, args.batch_size, args.num_test_crops)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
