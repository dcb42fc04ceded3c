"""What a real `train` job needs, made in seconds: a tokenizer, a code dataset that says it was made with it, a configuration."""

import os

from code_dataset_support import Recipe, replace_manifest
from tests_support import TINY_TOKENIZER, tiny_config

from pipeline.code_dataset.manifest import read_manifest
from pipeline.encoding import numeric_mode
from pipeline.probe import freeze_probe
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import preprocessing_spec
from stages.config import to_yaml
from stages.first_stage.tokenizer import Tokenizer

RECIPE = Recipe(num_images=22, bad_images=(), grid=(8, 8), codebook_size=32)


def write_train_job(folder: str, recipe: Recipe = RECIPE, config_path: str | None = None, **sections) -> str:
    """Writes the inputs of a tiny `train` job below a folder and returns the path of its configuration.

    Args:
        folder: for the tokenizer, the code dataset and the run.
        recipe: of the code dataset.
        config_path: of the configuration; `folder/config.yaml` if not given.
        sections: of the configuration, merged on top of `tiny_config`.
    """
    config = tiny_config(folder, **sections)
    if not os.path.exists(config.codes.path):
        store_tokenizer(Tokenizer(TINY_TOKENIZER), config.tokenizer.path)
        tokenizer, root = open_tokenizer(config.tokenizer.path), recipe.write(config.codes.path)
        manifest = read_manifest(root)
        made_with = {
            "tokenizer": {"fingerprint": tokenizer.fingerprint},
            "preprocess": preprocessing_spec(config.images),
            "encode": numeric_mode(config.codes),
            "probe": freeze_probe(root, manifest["plan_fp"], tokenizer, config.codes),
        }
        replace_manifest(root, manifest | made_with)
    path = config_path or os.path.join(folder, "config.yaml")
    with open(path, "w") as file:
        file.write(to_yaml(config))
    return path
