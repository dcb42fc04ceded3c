"""A published transformer with its tokenizer is evaluated like a run that was trained here."""

import dataclasses

import pytest
import torch
from evaluation_support import CODEBOOK, GRID, SIZE, write_codes
from foreign_support import foreign, net2net_tensors, tokenizer

from cluster.import_run import ImportTransformerOptions, import_transformer
from evaluation.evaluate import EvaluateOptions, evaluate, verify_record
from pipeline.code_dataset import CodeDataset
from stages.config import load_config, select_sections

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def options(ray_cluster, tmp_path_factory) -> EvaluateOptions:
    """Of an imported checkpoint, and images that its tokenizer has made codes of."""
    folder = tmp_path_factory.mktemp("imported")
    first_stage = tokenizer(resolution=SIZE, channel_multipliers=(1, 1, 2), attention_resolutions=(), codebook_size=CODEBOOK)
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in foreign(first_stage, "compvis").items()}
    torch.save({"state_dict": tensors | net2net_tensors(1 + GRID[0] * GRID[1], CODEBOOK)}, folder / "last.ckpt")
    names = {name: str(folder / name) for name in ("run", "tokenizer", "codes", "evaluation")}
    imported = import_transformer(
        ImportTransformerOptions(
            file=str(folder / "last.ckpt"),
            output=names["run"],
            tokenizer=names["tokenizer"],
            num_heads=2,
            num_classes=0,
            image_size=SIZE,
        )
    )
    metrics = "[fd, kd, memorisation, psnr, codebook, likelihood]"
    config = load_config(
        imported.config,
        [
            f"codes.path={names['codes']}",
            f"evaluation.path={names['evaluation']}",
            f"evaluation.metrics={metrics}",
            "evaluation.num_samples=24",
            "evaluation.num_blocks=4",
            "evaluation.num_pairwise_images=24",
            "evaluation.extractor_resolution=32",
            "evaluation.num_grid_images=9",
            "source.num_images=40",
            "source.num_holdout_images=24",
            "sampling.group_size=8",
            f"images.size={SIZE}",
        ],
    )
    options = select_sections(EvaluateOptions, config)
    write_codes(options.images, options.tokenizer, options.codes)
    return options


def test_it_is_measured_with_every_kind_of_metric_and_verified(options):
    record = evaluate(options)
    assert {"gfd", "gkd", "copied_share", "copied_code_share", "psnr", "codebook_usage", "validation_nll"} <= set(record.metrics)
    assert record.content["step"] == 0 and record.content["code_dataset_root_hash"] is None
    assert record.content["identity"]["training_codes_root_hash"] == CodeDataset.open(options.codes.path, verify=False).root_hash
    assert set(record.grids) == {"samples", "neighbours", "real", "reconstructions"}
    assert evaluate(options) == record
    measurement = dataclasses.replace(options.evaluation, num_feature_actors=2, item_size=8)
    assert verify_record(record.path, dataclasses.replace(options, evaluation=measurement)) == []
