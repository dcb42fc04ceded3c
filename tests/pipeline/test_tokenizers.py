"""Tokenizers and other projects' files in a store: what is on S3 is treated as it would be on a disk."""

import os

import pytest
from foreign_support import foreign, tokenizer
from safetensors.torch import load, save

from pipeline import storage
from pipeline.tokenizers import local_weights, open_project, open_tokenizer, store_export, store_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import CONFIG, WEIGHTS, fingerprint
from stages.first_stage.foreign import DIFFUSERS_WEIGHTS
from stages.first_stage.import_export import import_tokenizer

BOTH = pytest.mark.parametrize("place", ["local", "s3"])


@pytest.fixture
def folder(request, place, tmp_path):
    """An empty folder, local or on S3."""
    return str(tmp_path / "model") if place == "local" else request.getfixturevalue("s3")


def imported(path):
    with local_weights(path) as file:
        return import_tokenizer(file)


def message(path):
    with pytest.raises((ArtefactError, ConfigError)) as caught:
        imported(path)
    return str(caught.value)


@BOTH
def test_of_a_diffusers_folder_what_is_below_it_is_left_out(folder):
    model = tokenizer(num_norm_groups=8)
    store_export(model, "diffusers", folder)
    storage.replace(f"{folder}/zz/{CONFIG}", b"{}")
    storage.replace(f"{folder}/zz/{DIFFUSERS_WEIGHTS[0]}", b"another network")
    assert imported(folder).fingerprint == imported(folder + "/").fingerprint == fingerprint(model)


def test_only_the_weights_and_the_config_of_a_folder_are_fetched(s3):
    store_export(tokenizer(), "diffusers", s3)
    for name in ("optimizer.bin", *DIFFUSERS_WEIGHTS[1:], f"unet/{CONFIG}"):
        storage.replace(f"{s3}/{name}", b"")
    with local_weights(s3) as local:
        assert sorted(os.listdir(local)) == [CONFIG, DIFFUSERS_WEIGHTS[0]]


@BOTH
def test_a_folder_of_a_pipeline_is_refused(folder):
    for part in ("vqvae", "unet"):
        store_export(tokenizer(), "diffusers", f"{folder}/{part}")
    storage.replace(f"{folder}/model_index.json", b"{}")
    assert message(folder).startswith(f"file is {folder}, but this folder has none of {DIFFUSERS_WEIGHTS[0]}, ")
    assert imported(f"{folder}/vqvae").fingerprint == fingerprint(tokenizer())


@BOTH
def test_half_precision_weights_of_a_folder_are_taken(folder):
    halved = {name: tensor.half() for name, tensor in foreign(tokenizer(), "diffusers").items()}
    storage.replace(f"{folder}/diffusion_pytorch_model.fp16.safetensors", save(halved))
    whole = save({name: tensor.float() for name, tensor in halved.items()})
    storage.replace(f"{folder}-whole/{DIFFUSERS_WEIGHTS[0]}", whole)
    assert imported(folder).fingerprint == imported(f"{folder}-whole").fingerprint


@BOTH
def test_a_missing_file_and_an_artefact_are_named_by_their_path(folder):
    assert message(f"{folder}/none").startswith(f"file is {folder}/none, but there is no such file.")
    store_tokenizer(tokenizer(), folder)
    for path in (folder, f"{folder}/{WEIGHTS}"):
        assert message(path).startswith(f"{path} is of a tokenizer artefact")


@BOTH
def test_a_damaged_file_is_named_by_its_path(folder):
    storage.replace(f"{folder}/{CONFIG}", b"[]")
    storage.replace(f"{folder}/last.ckpt", b"damaged")
    storage.replace(f"{folder}/{DIFFUSERS_WEIGHTS[0]}", save(foreign(tokenizer(), "diffusers")))
    assert message(f"{folder}/last.ckpt").startswith(f"{folder}/last.ckpt cannot be read")
    assert message(folder).startswith(f"{folder}/{CONFIG} holds list")


@BOTH
def test_a_project_file_is_known_by_its_path(folder):
    path = f"{folder}/project.yaml"
    storage.replace(path, b"model: {target: taming.models.vqgan.VQModel, params: {}}")
    assert open_project(path).path == path
    storage.replace(path, b"[")
    with pytest.raises(ConfigError, match=f"--config is {path}, but it is not valid YAML"):
        open_project(path)


@BOTH
def test_storing_again_what_another_version_wrote_is_harmless(folder):
    mark = store_tokenizer(tokenizer(), folder)
    tensors = load(storage.read_bytes(f"{folder}/{WEIGHTS}"))
    storage.replace(f"{folder}/{WEIGHTS}", save(tensors, {"by": "another version"}))
    assert store_tokenizer(tokenizer(), folder) == open_tokenizer(folder).fingerprint == mark
    with pytest.raises(ArtefactError, match="Choose another folder"):
        store_tokenizer(tokenizer(1), folder)


@BOTH
def test_what_another_version_stored_by_half_is_finished_and_damage_is_not_passed_over(folder):
    mark = store_tokenizer(tokenizer(), folder)
    plain = save(load(storage.read_bytes(f"{folder}/{WEIGHTS}")))  # without what files say beside their tensors
    storage.replace(f"{folder}/{WEIGHTS}", plain)
    storage.delete(f"{folder}/{CONFIG}")
    assert store_tokenizer(tokenizer(), folder) == open_tokenizer(folder).fingerprint == mark
    for damaged in (plain[:-4], save({name: tensor + 1 for name, tensor in load(plain).items()})):
        storage.replace(f"{folder}/{WEIGHTS}", damaged)
        with pytest.raises(ArtefactError, match=f"holds another {WEIGHTS}"):
            store_tokenizer(tokenizer(), folder)


@BOTH
def test_two_that_write_different_tokenizers_cannot_mix_them(folder):
    mark = store_tokenizer(tokenizer(), folder)
    storage.delete(f"{folder}/{CONFIG}")  # the first has got as far as this when the second begins
    with pytest.raises(ArtefactError, match=f"holds another {WEIGHTS}, but that of tokenizer {fingerprint(tokenizer(1))}"):
        store_tokenizer(tokenizer(1), folder)
    assert store_tokenizer(tokenizer(), folder) == open_tokenizer(folder).fingerprint == mark


@BOTH
@pytest.mark.parametrize("config", [b"{}", b"[]", b"not JSON"])
def test_a_folder_of_something_else_stays_as_it_is(folder, config):
    storage.replace(f"{folder}/{CONFIG}", config)
    with pytest.raises(ArtefactError, match=f"holds another {CONFIG}"):
        store_tokenizer(tokenizer(), folder)
    assert storage.list_files(folder) == [f"{folder}/{CONFIG}"]
