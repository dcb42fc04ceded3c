"""What binds a tokenizer's training to what it was made from: facts of every commit, and whether a job may go on from one."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from cluster import checkpoints
from cluster.tokenizer_options import BEFORE_THE_OPTION, TokenizerJobOptions, fixed_options
from pipeline.image_order import IMAGE_ORDER_VERSION, ImageOrder
from pipeline.image_reader import ImageReader
from pipeline.inputs import needed_maps
from pipeline.sources import Source, list_split, open_source
from stages.config import to_dict
from stages.errors import ArtefactError


@dataclass(frozen=True)
class TrainingInputs:
    """What the driver hands to every worker beside the options.

    Attributes:
        list_hash: of the image list.
        num_images: in it.
        table: reference to the list in Ray's object store.
        perceptual: reference to the perceptual network there, if there is such a term.
        perceptual_hashes: sha-256 of its files by option.
    """

    list_hash: str
    num_images: int
    table: ray.ObjectRef
    perceptual: ray.ObjectRef | None
    perceptual_hashes: dict[str, str]


def list_training_images(options: TokenizerJobOptions, *, compare_splits: bool = False) -> pa.Table:
    """The images of a training in order of their listing: image_id and uri.

    Args:
        options: of the training.
        compare_splits: whether to refuse images that are held out, too.

    Raises:
        ConfigError: the source's, as when it has none.
    """
    source = _source(options)
    table = list_split(source, options.source, "train") if compare_splits else source.list_images("train")
    return table.select(["image_id", "uri"])


def _source(options: TokenizerJobOptions) -> Source:
    return open_source(options.source, options.images, needed_maps(options.tokenizer))


def image_order(options: TokenizerJobOptions, hash_of_list: str, num_images: int) -> ImageOrder:
    """The order in which a training consumes its images."""
    return ImageOrder(
        list_hash=hash_of_list,
        num_images=num_images,
        seed=options.run.seed,
        global_batch_size=options.tokenizer_train.global_batch_size,
    )


def image_reader(options: TokenizerJobOptions, inputs: TrainingInputs) -> ImageReader:
    """Reads the images of a training."""
    order = image_order(options, inputs.list_hash, inputs.num_images)
    return ImageReader(_source(options), order, options.images, options.tokenizer, options.tokenizer_train)


def commit_facts(options: TokenizerJobOptions, inputs: TrainingInputs, world_size: int) -> dict[str, Any]:
    """What every commit says beside its history. `check_resumable` compares all but the world size."""
    return {
        "sampler": {
            "version": IMAGE_ORDER_VERSION,
            "seed": options.run.seed,
            "global_batch_size": options.tokenizer_train.global_batch_size,
            "list_hash": inputs.list_hash,
            "num_images": inputs.num_images,
        },
        "perceptual_hashes": inputs.perceptual_hashes,
        "fixed_options": fixed_options(options),
        "options": to_dict(options),
        "world_size": world_size,
    }


def check_resumable(commit: checkpoints.Commit, options: TokenizerJobOptions, inputs: TrainingInputs) -> None:
    """Refuses a commit that a job cannot continue exactly. The world size may differ.

    Raises:
        ArtefactError: other images, options or perceptual weights; both sides are named.
    """
    content, ours = commit.content, commit_facts(options, inputs, 0)
    pairs = [(f"sampler.{key}", value, content["sampler"].get(key)) for key, value in ours["sampler"].items()]
    pairs += [("the hash of the perceptual weights", ours["perceptual_hashes"], content["perceptual_hashes"])]
    for section, values in ours["fixed_options"].items():
        saved = content["fixed_options"].get(section, {})
        names = {key: f"{section}.{key}" for key in values}
        pairs += [(names[key], value, saved.get(key, BEFORE_THE_OPTION.get(names[key]))) for key, value in values.items()]
    for key, asked, saved in pairs:
        if asked != saved:
            what = "the image list" if key in ("sampler.list_hash", "sampler.num_images") else key
            raise ArtefactError(
                f"{what} is {asked}, but the tokenizer in {options.tokenizer.path} is trained with {saved}. Use the same, or another "
                f"tokenizer.path."
            )
