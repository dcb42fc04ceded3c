"""Cuts the photographs of Debian's wallpaper packages into tiles that a tokenizer can be trained on.

    mkdir photographs && cd photographs
    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg-deb -x "$package" .; done
    python benchmarks/photographs.py photographs tiles
    python ray_job.py train-tokenizer -c configs/tokenizers/photographs.yaml source.path=tiles/train source.holdout_path=tiles/holdout

36 photographs, at most 2048 pixels a side, give tiles of 256 pixels side by side. Every tenth tile is held out. With `--quarters FOLDER`
the quarters of each tile at half resolution, 64 pixels, are written too: many small images, to evaluate tokenizers on.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import os

from PIL import Image

from benchmarks.codebook_health import read_photographs

SIDE = 256
HOLDOUT_EVERY = 10


def write_quarters(tiles: str, output: str) -> int:
    """Writes a folder's tiles as four quarters each at half resolution; how many there are."""
    os.makedirs(output, exist_ok=True)
    side = SIDE // 4
    boxes = [(left, top, left + side, top + side) for top in (0, side) for left in (0, side)]
    names = sorted(os.listdir(tiles))
    for name in names:
        half = Image.open(os.path.join(tiles, name)).reduce(2)
        for i, box in enumerate(boxes):
            half.crop(box).save(os.path.join(output, name.replace(".png", f"-{i}.png")))
    return len(names) * len(boxes)


def write_tiles(photographs: str, output: str) -> tuple[int, int]:
    """Writes PNG files below output/train and output/holdout; how many of each."""
    counts = {"train": 0, "holdout": 0}
    for split in counts:
        os.makedirs(os.path.join(output, split), exist_ok=True)
    number = 0
    for i, photograph in enumerate(read_photographs(photographs)):
        height, width = photograph.shape[:2]
        for top in range(0, height - SIDE + 1, SIDE):
            for left in range(0, width - SIDE + 1, SIDE):
                split = "holdout" if number % HOLDOUT_EVERY == 0 else "train"
                tile = photograph[top : top + SIDE, left : left + SIDE].numpy()
                Image.fromarray(tile).save(os.path.join(output, split, f"{i:02d}-{top:04d}-{left:04d}.png"))
                number += 1
                counts[split] += 1
    return counts["train"], counts["holdout"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder of the unpacked packages")
    parser.add_argument("output", help="folder of the tiles")
    parser.add_argument("--quarters", help="folder of the quarters of the tiles")
    args = parser.parse_args()
    print("%d tiles to train on, %d held out" % write_tiles(args.photographs, args.output))
    if args.quarters:
        for split in ("train", "holdout"):
            tiles, quarters = (os.path.join(folder, split) for folder in (args.output, args.quarters))
            print(f"{write_quarters(tiles, quarters)} quarters in {quarters}")
