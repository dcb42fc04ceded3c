"""A published transformer as a run: sampled from, verified, trained on, and refused where it does not belong."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from code_dataset_support import Recipe
from foreign_support import foreign, llamagen_tensors, net2net_tensors, tokenizer
from safetensors.torch import load_file
from train_support import log_of, losses, options_for, train

from cluster import checkpoints
from cluster.import_run import ImportTransformerOptions, import_transformer
from cluster.resume import check_resumable
from cluster.sampler_actor import SamplerActor, load_transformer
from cluster.train_options import dataset_transformer_config, training_conditions
from cluster.verify_run import verify_run
from pipeline.code_dataset import CodeDataset
from pipeline.tokenizers import store_tokenizer, tokenizer_fingerprint
from stages.errors import ArtefactError, ConfigError
from stages.options import SamplingOptions
from stages.second_stage.sampling import sample_codes

SIDE, CODEBOOK = 4, 48
SAMPLING = SamplingOptions(group_size=3, top_k=20)


def codes_tokenizer(seed=0):
    return tokenizer(seed, resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folder, options and summary of an unconditional transformer whose checkpoint holds its tokenizer."""
    folder = str(tmp_path_factory.mktemp("imported"))
    first = {f"first_stage_model.{name}": t for name, t in foreign(codes_tokenizer(), "compvis").items()}
    torch.save({"state_dict": {**first, **net2net_tensors(1 + SIDE**2, CODEBOOK)}}, f"{folder}/last.ckpt")
    options = ImportTransformerOptions(
        file=f"{folder}/last.ckpt",
        output=f"{folder}/run",
        tokenizer=f"{folder}/tokenizer",
        num_heads=2,
        num_classes=0,
        image_size=2 * SIDE,
    )
    return folder, options, import_transformer(options)


def test_an_imported_run_verifies_and_knows_its_tokenizer(imported):
    folder, options, summary = imported
    commit = checkpoints.resolve_checkpoint("latest", options.output)
    assert commit.path == summary.checkpoint and commit.step == 0 and commit.is_imported and commit.root_hash is None
    assert verify_run(options.output) == []
    assert commit.tokenizer_fingerprint == summary.fingerprint == tokenizer_fingerprint(options.tokenizer)


def test_it_is_sampled_from_like_any_run(imported):
    folder, options, summary = imported
    actor = SamplerActor(summary.checkpoint, options.tokenizer, SAMPLING)
    images = actor.images(0, 4)
    model = load_transformer(checkpoints.open_commit(summary.checkpoint))
    assert images.shape == (4, 2 * SIDE, 2 * SIDE, 3)
    assert np.array_equal(actor.codes(0, 4), sample_codes(model, SAMPLING, 0, 4))
    assert (actor.labels(0, 4) == -1).all()
    both = actor.images_and_codes(2, 7)
    assert np.array_equal(both[0], actor.images(2, 7)) and np.array_equal(both[1], actor.codes(2, 7))


def test_another_tokenizer_is_refused_by_name(imported, tmp_path):
    _, _, summary = imported
    other = store_tokenizer(codes_tokenizer(1), str(tmp_path / "other"))
    with pytest.raises(ArtefactError, match=f"{other}, but .* rests on codes of tokenizer {summary.fingerprint}"):
        SamplerActor(summary.checkpoint, str(tmp_path / "other"), SAMPLING)


def test_a_run_that_is_there_is_not_touched(imported):
    _, options, _ = imported
    with pytest.raises(ArtefactError, match="it is a run already"):
        import_transformer(options)


def training(imported, folder, recipe=None, **sections):
    """Options of training on, in a copy of the imported run, with the configuration that came with it."""
    source, _, summary = imported
    codes = (recipe or dataset_recipe(summary)).write(os.path.join(folder, "codes"))
    shutil.copytree(f"{source}/run", f"{folder}/run")
    with open(summary.config) as file:
        described = {name: section for name, section in yaml.safe_load(file).items() if name in ("model", "conditioning")}
    return options_for(folder, codes, **described, **sections)


def dataset_recipe(summary, **changes):
    sizes = dict(num_images=22, bad_images=(), grid=(SIDE, SIDE), codebook_size=CODEBOOK)
    return Recipe(**{**sizes, "tokenizer_fingerprint": summary.fingerprint, **changes})


def check(options):
    dataset = CodeDataset.open(options.codes.path, verify=False)
    conditions = training_conditions(options, dataset, verify=False)
    config = dataset_transformer_config(options, dataset, conditions)
    check_resumable(checkpoints.latest_commit(options.run.path), options, dataset, conditions, config)


@pytest.mark.parametrize("world_size,zero_stage", [(1, 1), *(pytest.param(2, z, marks=pytest.mark.slow) for z in (0, 2, 3))])
def test_training_goes_on_from_the_imported_weights(imported, tmp_path, world_size, zero_stage):
    _, _, summary = imported
    options = training(
        imported,
        str(tmp_path),
        optim={"learning_rate": 1e-9, "weight_average_decay": 0.9},
        train={"num_steps": 2, "checkpoint_every_steps": 2},
        deepspeed={"zero_stage": zero_stage},
    )
    check(options)
    commit = train(options, world_size)
    before = load_file(os.path.join(summary.checkpoint, checkpoints.WEIGHTS))
    for name in (checkpoints.WEIGHTS, checkpoints.AVERAGES):
        after = load_file(os.path.join(commit.path, name))
        assert after.keys() == before.keys()
        for key, tensor in after.items():
            torch.testing.assert_close(tensor, before[key], atol=1e-6, rtol=1e-5)
    assert (commit.step, commit.is_imported, commit.content["parent"]) == (2, False, os.path.basename(summary.checkpoint))
    assert len(log_of(commit)) == 2 and commit.root_hash == CodeDataset.open(options.codes.path, verify=False).root_hash
    check(options)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(tokenizer_fingerprint="a" * 64), "codes.path gives tokenizer a{64}, but the imported transformer in .* has [0-9a-f]{64}"),
        (dict(grid=(2, 8)), r"codes.path gives grid \[2, 8\], but .* has \[4, 4\]"),
        (dict(codebook_size=32), "codes.path gives codebook_size 32, but .* has 48"),
    ],
)
def test_codes_that_are_not_its_own_are_refused(imported, tmp_path, changes, message):
    options = training(imported, str(tmp_path), dataset_recipe(imported[2], **changes))
    with pytest.raises(ArtefactError, match=message):
        check(options)


def test_a_model_other_than_the_imported_one_is_refused(imported, tmp_path):
    options = training(imported, str(tmp_path))
    with pytest.raises(ArtefactError, match="model gives num_layers 1, but .* has 2"):
        check(type(options)(**{**options.__dict__, "model": type(options.model)(num_layers=1, hidden_size=32, num_heads=2)}))


def test_classes_of_the_dataset_do_not_matter_without_a_condition(imported, tmp_path):
    check(training(imported, str(tmp_path), dataset_recipe(imported[2], num_classes=5)))


def test_llamagen_needs_a_tokenizer_that_is_there(tmp_path):
    torch.save({"model": llamagen_tensors(CODEBOOK, num_classes=3)}, tmp_path / "c2i.pt")
    store_tokenizer(codes_tokenizer(), str(tmp_path / "tokenizer"))
    options = ImportTransformerOptions(
        file=str(tmp_path / "c2i.pt"), output=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"), num_heads=2
    )
    summary = import_transformer(options)
    model = load_transformer(checkpoints.open_commit(summary.checkpoint))
    assert (model.config.num_classes, model.config.grid, model.config.positions) == (3, (SIDE, SIDE), "rope-zero-prefix")
    missing = ImportTransformerOptions(
        file=options.file, output=str(tmp_path / "other"), tokenizer=str(tmp_path / "none"), num_heads=2
    )
    with pytest.raises(ArtefactError, match="tokenizer.path is .*none"):
        import_transformer(missing)
    assert not os.path.exists(missing.output)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """The same of a transformer that is conditioned on codes, whose tokenizer of conditions has fewer codes than the vocabulary."""
    folder = str(tmp_path_factory.mktemp("conditioned"))
    condition = tokenizer(1, resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK - 8)
    cond = {f"cond_stage_model.{name}": t for name, t in foreign(condition, "compvis").items()}
    first = {f"first_stage_model.{name}": t for name, t in foreign(codes_tokenizer(), "compvis").items()}
    torch.save({"state_dict": {**first, **cond, **net2net_tensors(2 * SIDE**2, CODEBOOK)}}, f"{folder}/last.ckpt")
    options = ImportTransformerOptions(
        file=f"{folder}/last.ckpt",
        output=f"{folder}/run",
        tokenizer=f"{folder}/tokenizer",
        condition_tokenizer=f"{folder}/condition",
        num_heads=2,
        image_size=2 * SIDE,
    )
    return folder, options, import_transformer(options)


def condition_recipe(options, **changes):
    """Of codes of the imported tokenizer of conditions."""
    fingerprint = tokenizer_fingerprint(options.condition_tokenizer)
    sizes = dict(num_images=30, bad_images=(), grid=(SIDE, SIDE), codebook_size=CODEBOOK - 8)
    return Recipe(**{**sizes, "tokenizer_fingerprint": fingerprint, **changes})


def test_a_transformer_conditioned_on_codes_is_sampled_from(conditioned, tmp_path):
    _, options, summary = conditioned
    transformer = checkpoints.open_commit(summary.checkpoint).content["transformer"]
    assert (transformer["conditioning"], transformer["num_prefix_tokens"]) == ("codes", SIDE**2)
    recipe = condition_recipe(options)
    path = recipe.write(str(tmp_path / "conditions"))
    actor = SamplerActor(summary.checkpoint, options.tokenizer, SAMPLING, conditions_path=path)
    assert np.array_equal(actor.labels(28, 33), recipe.codes[[28, 29, 0, 1, 2], 0])
    model = load_transformer(checkpoints.open_commit(summary.checkpoint))
    expected = sample_codes(model, SAMPLING, 0, 6, lambda indices: recipe.codes[indices % 30, 0])
    assert np.array_equal(actor.codes(0, 6), expected)
    assert not np.array_equal(expected, sample_codes(model, SAMPLING, 0, 6, lambda indices: recipe.codes[indices * 0, 0]))
    with pytest.raises(ConfigError, match="conditioning.codes_path is not set, but checkpoint .* is conditioned on codes"):
        SamplerActor(summary.checkpoint, options.tokenizer, SAMPLING)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer_fingerprint": "a" * 64}, "with tokenizer a{64}, but .* trained on conditions with [0-9a-f]{64}"),
        ({"codebook_size": 20}, "with codebook size 20, but .* with 40"),
        ({"grid": (2, 2)}, "with codes per image 4, but .* with 16"),
    ],
)
def test_conditions_of_another_kind_are_refused(conditioned, tmp_path, changes, message):
    _, options, summary = conditioned
    path = condition_recipe(options, **changes).write(str(tmp_path / "conditions"))
    with pytest.raises(ArtefactError, match=message):
        SamplerActor(summary.checkpoint, options.tokenizer, SAMPLING, conditions_path=path)


def test_a_transformer_conditioned_on_codes_is_trained_on(conditioned, tmp_path):
    source, options, summary = conditioned
    codes = dataset_recipe(summary).write(str(tmp_path / "codes"))
    held_out = dataset_recipe(summary, num_images=5).write(str(tmp_path / "held-out"))
    conditions, other = (
        condition_recipe(options, **more).write(str(tmp_path / name))
        for name, more in (("conditions", {}), ("other", {"tokenizer_fingerprint": "a" * 64}))
    )
    shutil.copytree(f"{source}/run", tmp_path / "run")
    with open(summary.config) as file:
        described = yaml.safe_load(file)
    paths = {"codes_path": conditions, "validation_codes_path": conditions}

    def training_on(num_steps, **changes):
        given = {**described["conditioning"], **paths, **changes}
        return options_for(
            str(tmp_path),
            codes,
            model=described["model"],
            conditioning=given,
            train={"num_steps": num_steps, "checkpoint_every_steps": 2, "validation_path": held_out},
        )

    check(training_on(4))
    with pytest.raises(ArtefactError, match="conditioning.codes_path gives tokenizer a{64}, but the imported transformer"):
        check(training_on(4, codes_path=other))
    whole = train(training_on(4), 1)
    assert whole.content["conditions"]["root_hash"] == CodeDataset.open(conditions, verify=False).root_hash
    assert whole.validation_nll > 0
    before = losses(whole)
    shutil.rmtree(whole.path)
    again = train(training_on(4), 1)  # from the commit of step 2
    assert losses(again) == before and again.content["sample_log_hash"] == whole.content["sample_log_hash"]
    with pytest.raises(ArtefactError, match="conditioning.codes_path gives conditions .* with"):
        check(training_on(6, codes_path=other))


def test_the_tokenizer_of_a_condition_needs_a_folder(conditioned, tmp_path):
    _, options, _ = conditioned
    with pytest.raises(ConfigError, match="--condition-tokenizer is not given, but .* holds the tokenizer of its condition"):
        import_transformer(dataclasses.replace(options, output=str(tmp_path / "run"), condition_tokenizer=None))
