"""Options of images and of the code datasets made of them."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where images come from."""

    name: str = option("scenes", "A name from pipeline.sources.SOURCES, or `package.module:Class`.")
    path: str | None = option(
        None,
        "Folder, list file or Parquet files. Not needed by `scenes`. To read an image its whole row group of Parquet is decoded: groups of "
        "about 100 images suit.",
    )
    num_images: int | None = option(None, "Use the first so many training images; all of them if not given.", low=1)
    seed: int = option(0, "Seed of generated sources (`scenes`) and of the holdout split.", low=0)
    split: Literal["train", "holdout"] = option("train", "Which images `tokenize` takes.")
    holdout_path: str | None = option(
        None, "Held-out images for evaluation, none of which may be in path, where the source has no split of its own."
    )
    holdout_fraction: float = option(
        0.0, "Without holdout_path: share of the images, chosen by hash, kept out of training.", low=0.0, high=0.9
    )
    num_holdout_images: int | None = option(
        None, "Use the first so many held-out images; all of them if not given.", low=1
    )
    label_maps: tuple[str, ...] = option(
        (),
        "Maps of ids that lie beside the images. image-folder: NAME=FOLDER, with a file for each image at the same relative path; "
        "parquet: NAME of a column.",
    )
    number_maps: tuple[str, ...] = option(
        (), "The same of numbers, such as depth: 8 or 16 bits, which stand for 0 to 1, or floats from 0 to 1."
    )
    holdout_maps: tuple[str, ...] = option(
        (), "NAME=FOLDER of the maps of the images in holdout_path, where they are not in the same folders."
    )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What is done to an image before the tokenizer sees it. Part of the code dataset's identity."""

    size: int = option(256, "Side of the square image in pixels.", low=8)
    channels: Literal[1, 3] = option(3, "1 for grey, 3 for RGB.")
    crop: Literal["center"] = option("center", "center: shorter side to `size` with antialiasing, then the middle.")
    views: tuple[str, ...] = option(
        ("center",), "Views stored per image: center, flip, ten-crop[@ENLARGE], random-crop:N[@SHARE]."
    )


@dataclass(frozen=True, kw_only=True)
class CodesOptions:
    """The code dataset."""

    path: str = option("runs/codes", "Folder of the code dataset. Local or s3://.")
    shard_size: int = option(512, "Images per shard: what one task decodes, encodes and commits.", low=1)
    encode_batch_size: int = option(
        64, "Images per encoder call; on a CPU its threads share them. Part of the identity: it can decide near ties.", low=1
    )
    encode_precision: Literal["fp32", "bf16"] = option("fp32", "fp32 is the parity mode. Part of the identity.")
    num_encoder_actors: int = option(1, "Encoders in the actor pool.", low=1)
    conditions: tuple[str, ...] = option(
        (), "Condition maps of the source stored per row on the code grid, 8 bits each, such as segmentation."
    )
    max_quarantined_fraction: float = option(
        0.01, "More unusable images than this share fail the job.", low=0.0, high=1.0
    )
    drop_duplicates: bool = option(
        False, "Leave out images whose bytes are those of an earlier one; they are reported either way."
    )
    remap_unused: bool = option(
        False,
        "Number the codebook entries that occur densely, so that fewer bits hold them; readers see the codes as ever.",
    )
    row_group_rows: int | None = option(
        None, "Rows per row group, a power of two, at most what a part of 98 MB holds; 16384, or fewer of large rows, if not given.", low=1
    )
    verify_on_open: bool = option(
        True,
        "Hash every file of the dataset before training starts. Row groups are checked as they are read either way.",
    )
    cache_path: str | None = option(
        None, "Local folder for row groups of a dataset on S3; the system's temporary folder if not given."
    )
    cache_bytes: int = option(64 << 30, "Row groups kept there at most by one process, per column.", low=1 << 20)
