"""What an evaluation needs, made in seconds: a tiny tokenizer, a code dataset, checkpoints of an untrained transformer."""

import os
from pathlib import Path

import torch
from code_dataset_support import Recipe, replace_manifest
from safetensors.torch import save_file

from cluster.checkpoints import WEIGHTS, Commit, checkpoint_path, file_entry, write_commit
from evaluation.evaluate import EvaluateOptions
from pipeline.binding import encoding_of
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.manifest import read_manifest
from pipeline.encoding import numeric_mode
from pipeline.probe import freeze_probe
from pipeline.sources.scenes import Scenes
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import preprocessing_spec
from stages.config import to_dict
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig
from stages.options import (
    CodesOptions,
    ConditioningOptions,
    EvaluationOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    SamplingOptions,
    SourceOptions,
    TokenizerOptions,
)
from stages.second_stage.transformer import Transformer, transformer_config

SIZE, GRID, CODEBOOK, NUM_SAMPLES, STEP = 16, (4, 4), 32, 40, 7


def make_tokenizer(folder: str, seed: int) -> str:
    torch.manual_seed(seed)
    config = TokenizerConfig(
        resolution=SIZE,
        in_channels=3,
        codebook_size=CODEBOOK,
        codebook_dim=4,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
    )
    return store_tokenizer(Tokenizer(config), folder)


def make_checkpoint(run_path: str, dataset: CodeDataset, step: int = STEP, seed: int = 0, **more) -> Commit:
    num_classes = len(dataset.class_names)
    torch.manual_seed(seed)
    options = ModelOptions(num_layers=1, hidden_size=16, num_heads=2)
    config = transformer_config(
        options,
        ConditioningOptions(name="class" if num_classes else "none"),
        codebook_size=CODEBOOK,
        grid=GRID,
        num_classes=num_classes,
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = checkpoint_path(run_path, step, "attempt")
    os.makedirs(folder)
    save_file(model.state_dict(), os.path.join(folder, WEIGHTS))
    content = {
        "step": step,
        "train_loss": 3.0,
        "log": [],
        "root_hash": dataset.root_hash,
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "encoding": encoding_of(dataset.manifest),
        "transformer": to_dict(config),
        "files": [file_entry(os.path.join(folder, WEIGHTS), WEIGHTS)],
        **more,
    }
    return write_commit(folder, content)


def write_codes(images: ImageOptions, tokenizer: TokenizerOptions, codes: CodesOptions) -> None:
    """A code dataset that says it was made of scenes with this tokenizer; an evaluation reads nothing else of it."""
    recipe = Recipe(num_images=22, bad_images=(), grid=GRID, codebook_size=CODEBOOK)
    root, opened = recipe.write(codes.path), open_tokenizer(tokenizer.path)
    manifest = read_manifest(root)
    made_with = {
        "class_names": list(Scenes.class_names),
        "tokenizer": {"fingerprint": opened.fingerprint},
        "preprocess": preprocessing_spec(images),
        "encode": numeric_mode(codes),
        "probe": freeze_probe(root, manifest["plan_fp"], opened, codes),
    }
    replace_manifest(root, manifest | made_with)


def write_job(root: Path) -> EvaluateOptions:
    """Writes tokenizer, code dataset and a run with one checkpoint below a folder, as the jobs do but without Ray."""
    source, images = SourceOptions(num_images=60, num_holdout_images=48), ImageOptions(size=SIZE)
    tokenizer, codes = TokenizerOptions(path=str(root / "tokenizer")), CodesOptions(path=str(root / "codes"))
    make_tokenizer(tokenizer.path, seed=0)
    write_codes(images, tokenizer, codes)
    make_checkpoint(str(root / "run"), CodeDataset.open(codes.path, verify=True))
    return EvaluateOptions(
        run=RunOptions(path=str(root / "run")),
        source=source,
        images=images,
        tokenizer=tokenizer,
        codes=codes,
        conditioning=ConditioningOptions(),
        sampling=SamplingOptions(group_size=8, cfg_scale=2.0, seed=5),
        evaluation=EvaluationOptions(
            path=str(root / "evaluation"),
            num_samples=NUM_SAMPLES,
            num_blocks=4,
            num_grid_images=20,
            extractor_resolution=32,
        ),
    )
