"""The whole `train-tokenizer` job on real Ray: images streamed by Ray Data, two workers, an artefact that is sound, and refusals."""

import dataclasses
import os

import numpy as np
import pytest
from quantizer_support import QUANTIZER_SHAPES
from tests_support import tiny_config

from cluster import checkpoints, run_log
from cluster.tokenizer_job import train_tokenizer
from cluster.tokenizer_options import TokenizerJobOptions, training_path
from evaluation.verify import verify_artefact
from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.tokenize_images import TokenizeOptions, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from stages.config import select_sections
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.quantizers import QUANTIZERS
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import tokenizer_config

TRAIN = {"precision": "fp32", "num_samples": 64, "checkpoint_every_steps": 2, "log_every_steps": 2, "min_crop": 0.7}


def options_for(folder, **sections):
    train = {**TRAIN, **sections.pop("tokenizer_train", {})}
    return select_sections(TokenizerJobOptions, tiny_config(folder, tokenizer_train=train, **sections))


@pytest.mark.ray
def test_a_tokenizer_is_trained_once_and_found_sound(ray_cluster, tmp_path):
    options = options_for(tmp_path, scaling={"num_workers": 2, "cpus_per_worker": 0.5})
    summary = train_tokenizer(options)
    path = options.tokenizer.path
    assert open_tokenizer(path).fingerprint == summary.fingerprint
    assert summary.num_samples == 64 and 0 < summary.codebook_usage <= 1
    assert verify_artefact(path) == verify_artefact(training_path(path)) == []
    commit = checkpoints.latest_commit(training_path(path))
    records = run_log.read_log(training_path(path), commit.content["log"])
    assert [len(record["digests"]) for record in records] == [2] * 4
    assert train_tokenizer(options) == summary  # nothing is left to do
    longer = dataclasses.replace(options, tokenizer_train=dataclasses.replace(options.tokenizer_train, num_samples=128))
    with pytest.raises(ArtefactError, match="num_samples is 128.*64"):
        train_tokenizer(longer)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer",
    [{"input": "segmentation", "num_labels": 64}, {"input": "depth"}, {"input": "edges", "num_labels": 2}],
    ids=lambda tokenizer: tokenizer["input"],
)
def test_condition_maps_have_tokenizers_too(ray_cluster, tmp_path, tokenizer):
    base = tiny_config(tmp_path).tokenizer
    given = {name: getattr(base, name) for name in ("path", "codebook_size", "base_channels", "z_channels")}
    more = {"codebook_dim": 4, "channel_multipliers": [1, 2], "num_res_blocks": 1, "attention_resolutions": []}
    options = options_for(
        tmp_path, tokenizer={**given, **more, **tokenizer}, tokenizer_train={"discriminator_weight": 0.0}
    )
    summary = train_tokenizer(options)
    tokenizer_of_maps = open_tokenizer(options.tokenizer.path)
    assert tokenizer_of_maps.config.in_channels == (tokenizer.get("num_labels") or 1)
    assert 0 < summary.reconstruction_loss < 2
    assert verify_artefact(options.tokenizer.path) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_every_quantizer_goes_from_training_to_a_code_dataset(ray_cluster, tmp_path, kind):
    size, dim, levels = QUANTIZER_SHAPES[kind]
    shape = {"codebook_size": size, "codebook_dim": dim, "fsq_levels": levels}
    sections = {"tokenizer": {**vars(tiny_config(tmp_path).tokenizer), "quantizer": kind, **shape}}
    options = options_for(tmp_path, scaling={"num_workers": 2, "cpus_per_worker": 0.5}, **sections)
    assert train_tokenizer(options).num_samples == 64
    path = options.tokenizer.path
    assert verify_artefact(path) == verify_artefact(training_path(path)) == []
    job = select_sections(TokenizeOptions, tiny_config(tmp_path, **sections))
    summary = tokenize(job)
    dataset = CodeDataset.open(job.codes.path, verify=True)
    assert (summary.num_rows, dataset.codebook_size) == (120, open_tokenizer(path).codebook_size)
    assert len(np.unique(dataset.codes(np.arange(dataset.num_rows)))) > 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_s3(ray_cluster, s3, tmp_path):
    options = options_for(tmp_path, tokenizer={**vars(tiny_config(tmp_path).tokenizer), "path": f"{s3}/tokenizer"})
    summary = train_tokenizer(options)
    assert summary.tokenizer.startswith("s3://")
    assert verify_artefact(options.tokenizer.path) == []
    names = [os.path.basename(path) for path in storage.list_files(training_path(options.tokenizer.path))]
    assert names.count("COMMIT.json") == 2 and "config.yaml" in names


@pytest.mark.ray
def test_a_map_that_the_source_lacks_is_refused_before_any_worker_starts(ray_cluster, tmp_path):
    base = tiny_config(tmp_path).tokenizer
    options = options_for(tmp_path, tokenizer={**vars(base), "input": "weather"})
    with pytest.raises(ConfigError, match="tokenizer.input is weather.*segmentation"):
        train_tokenizer(options)
    assert not os.path.exists(training_path(options.tokenizer.path))


def test_a_tokenizer_that_was_not_trained_here_is_left_alone(tmp_path):
    options = options_for(tmp_path)
    store_tokenizer(Tokenizer(tokenizer_config(options.tokenizer, options.images)), options.tokenizer.path)
    with pytest.raises(ConfigError, match="was not trained by this command"):
        train_tokenizer(options)


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"scaling": {"num_workers": [1, 2]}}, ["scaling.num_workers is [1, 2]", "fixed number"]),
        ({"scaling": {"num_workers": 3}}, ["global_batch_size is 16", "multiple of", "Use 18"]),
        ({"tokenizer_train": {"perceptual_weight": 1.0}}, ["perceptual_vgg names no weights"]),
        ({"tokenizer_train": {"perceptual_weight": 1.0, "perceptual_vgg": "/nowhere"}}, ["no such file"]),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_worker_starts(tmp_path, sections, words):
    with pytest.raises(ConfigError) as caught:
        train_tokenizer(options_for(tmp_path, **sections))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("key", ["discriminator_weight", "perceptual_weight"])
def test_labels_have_no_adversary_and_no_perceptual_term(tmp_path, key):
    base = tiny_config(tmp_path).tokenizer
    labels = {**vars(base), "input": "segmentation", "num_labels": 64}
    weights = {"discriminator_weight": 0.0, "perceptual_weight": 0.0, key: 1.0}
    with pytest.raises(ConfigError, match=f"tokenizer_train.{key} is 1.0, but labels"):
        train_tokenizer(options_for(tmp_path, tokenizer=labels, tokenizer_train=weights))
