"""The `import-transformer` command: another project's transformer as a run whose first checkpoint, of step 0, is its weights.

`sample`, `evaluate` and `train` take such a run like any other. It is bound to a tokenizer, not to a code dataset: the first step
that is trained on binds the run to the dataset, which must be of the same tokenizer.
"""

import logging
import os
import tempfile
from dataclasses import dataclass

import yaml
from safetensors.torch import save_file

from cluster import checkpoints, run_log
from cluster.checkpoints import WEIGHTS
from pipeline import storage
from pipeline.order import SAMPLER_VERSION
from pipeline.tokenizers import local_weights, open_project, open_tokenizer, store_tokenizer
from stages.compvis_project import Project
from stages.config import to_dict
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign, read_foreign
from stages.first_stage.import_export import take_tokenizer
from stages.first_stage.tokenizer import Tokenizer
from stages.second_stage.import_transformer import ImportedTransformer, take_transformer

logger = logging.getLogger(__name__)

CONFIG = "model.yaml"


@dataclass(frozen=True, kw_only=True)
class ImportTransformerOptions:
    """What `import-transformer` takes.

    Attributes:
        file: the checkpoint.
        output: folder of the new run.
        tokenizer: folder of its tokenizer: of the new one where the checkpoint holds it, else of one that is there.
        condition_tokenizer: folder for the tokenizer of the condition, where the checkpoint holds one.
        config: the project file of a CompVis checkpoint.
        format: "auto", "compvis" or "llamagen".
        num_heads, num_classes, image_size: what neither tensors nor project file tell.
    """

    file: str
    output: str
    tokenizer: str
    condition_tokenizer: str | None = None
    config: str | None = None
    format: str = "auto"
    num_heads: int | None = None
    num_classes: int | None = None
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What `import-transformer` reports: the run, its checkpoint, the tokenizer, and the configuration of the two."""

    run: str
    checkpoint: str
    tokenizer: str
    fingerprint: str
    config: str


def import_transformer(options: ImportTransformerOptions) -> ImportSummary:
    """Makes a run of published weights.

    Raises:
        ConfigError: no such file, or a size that is missing or contradicts the tensors.
        ArtefactError: not exactly the tensors of such a model, a run or tokenizer that is there already, or another tokenizer's codes.
    """
    if checkpoints.list_commits(options.output):
        raise ArtefactError(f"output is {options.output}, but it is a run already. Choose another folder.")
    project = open_project(options.config)
    with local_weights(options.file) as file:
        foreign = read_foreign(file)
        conditions = _condition_tokenizer(options, foreign, project)
        tokenizer = _tokenizer(options, foreign, project)
        found = take_transformer(
            foreign,
            tokenizer,
            project=project,
            format=options.format,
            num_heads=options.num_heads,
            num_classes=options.num_classes,
            image_size=options.image_size,
            condition_tokenizer=conditions,
        )
    commit = _commit(options, tokenizer, conditions, found)
    config = storage.join(options.output, CONFIG)
    storage.replace(config, _sections(options, tokenizer, found).encode())
    return ImportSummary(
        run=options.output,
        checkpoint=commit.path,
        tokenizer=options.tokenizer,
        fingerprint=tokenizer.fingerprint,
        config=config,
    )


def _tokenizer(options: ImportTransformerOptions, foreign: Foreign, project: Project | None) -> Tokenizer:
    """The tokenizer whose codes the transformer speaks; one that the checkpoint holds is stored."""
    if not foreign.has("first_stage_model."):
        return open_tokenizer(options.tokenizer)
    tokenizer = take_tokenizer(foreign, "compvis", project, "first_stage")
    store_tokenizer(tokenizer, options.tokenizer)
    return tokenizer


def _condition_tokenizer(
    options: ImportTransformerOptions, foreign: Foreign, project: Project | None
) -> Tokenizer | None:
    """The tokenizer of the condition, where the checkpoint holds one; it is stored."""
    if not foreign.has("cond_stage_model."):
        return None
    if options.condition_tokenizer is None:
        raise ConfigError(
            f"--condition-tokenizer is not given, but {options.file} holds the tokenizer of its condition. Name a folder for it."
        )
    tokenizer = take_tokenizer(foreign, "compvis", project, "cond_stage")
    store_tokenizer(tokenizer, options.condition_tokenizer)
    return tokenizer


def _commit(
    options: ImportTransformerOptions, tokenizer: Tokenizer, conditions: Tokenizer | None, found: ImportedTransformer
) -> checkpoints.Commit:
    attempt = checkpoints.new_attempt()
    folder = checkpoints.checkpoint_path(options.output, 0, attempt)
    with tempfile.TemporaryDirectory(prefix="tessera-import-") as temporary:
        weights = os.path.join(temporary, WEIGHTS)
        save_file(found.weights, weights)
        storage.put_file_if_absent(storage.join(folder, WEIGHTS), weights)
        entry = checkpoints.file_entry(weights, WEIGHTS)
    content = {
        "step": 0,
        "attempt": attempt,
        "parent": None,
        "imported": os.path.basename(options.file.rstrip("/")),
        "train_loss": None,
        "measured": {},
        "events": [],
        "codes_path": None,
        "root_hash": None,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "encoding": {"tokenizer": tokenizer.fingerprint, "preprocess": None, "encode": None, "probe": None},
        "conditions": conditions and {"root_hash": None, "tokenizer_fingerprint": conditions.fingerprint},
        "sampler": {"version": SAMPLER_VERSION, "step": 0, "skipped": []},
        "transformer": to_dict(found.config),
        "log": [],
        "sample_log_hash": run_log.EMPTY_HASH,
        "files": [entry],
    }
    return checkpoints.write_commit(folder, content)


def _sections(options: ImportTransformerOptions, tokenizer: Tokenizer, found: ImportedTransformer) -> str:
    """The sections that the run fixes, to be given to other commands with -c."""
    side = found.config.grid[0] * tokenizer.downsample
    tree = {
        "run": {"path": options.output},
        "images": {"size": side, "channels": tokenizer.config.in_channels},
        "tokenizer": {"path": options.tokenizer},
        "model": to_dict(found.model),
        "conditioning": to_dict(found.conditioning),
    }
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
