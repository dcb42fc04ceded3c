"""What else lies in a folder of weights: the config.json of diffusers, and tokenizers of this project's own."""

import json

import pytest
import torch
from foreign_support import foreign, tokenizer
from safetensors.torch import load_file, save_file

from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import CONFIG, WEIGHTS, fingerprint, load_tokenizer, own_metadata
from stages.first_stage.import_export import export_tokenizer, import_tokenizer


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_diffusers_folder_describes_its_model(tmp_path):
    model = tokenizer(attention_resolutions=(128,))
    file = export_tokenizer(model, "diffusers", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    assert (config["block_out_channels"], config["num_vq_embeddings"], config["vq_embed_dim"]) == ([32, 64], 32, 4)
    assert load_file(file)["encoder.mid_block.attentions.0.to_q.weight"].shape == (64, 64)
    assert import_tokenizer(str(tmp_path / "out")).fingerprint == fingerprint(model)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"norm_type": "spatial"}, "norm_type spatial, but only group"),
        ({"norm_num_groups": 0}, "norm_num_groups 0, but it must be a positive integer"),
        ({"norm_num_groups": 8}, "norm_num_groups 8, but .* was exported with 32"),
    ],
)
def test_a_diffusers_model_of_another_kind_is_refused(tmp_path, change, words):
    export_tokenizer(tokenizer(), "diffusers", str(tmp_path))
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(ArtefactError, match=words):
        import_tokenizer(str(tmp_path))


def test_groups_that_do_not_divide_the_channels_are_refused(tmp_path):
    file = export_tokenizer(tokenizer(), "diffusers", str(tmp_path))
    save_file(load_file(file), file)  # without what an export says
    change_json(tmp_path / "config.json", norm_num_groups=24)
    with pytest.raises(ArtefactError, match="32 channels at full resolution, but its norms' 24 groups .* config.json"):
        import_tokenizer(str(tmp_path))


def test_a_diffusers_config_that_is_no_mapping_is_damage(tmp_path):
    export_tokenizer(tokenizer(), "diffusers", str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtefactError, match="holds list, but it must be a mapping"):
        import_tokenizer(str(tmp_path))


def test_groups_are_told_by_an_exported_file_alone(tmp_path):
    model = tokenizer(num_norm_groups=8)
    file = export_tokenizer(model, "diffusers", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "of something else"}')
    assert import_tokenizer(file).fingerprint == fingerprint(model)
    (tmp_path / "config.json").unlink()
    assert import_tokenizer(file).fingerprint == fingerprint(model)


def test_an_export_into_the_artefact_itself_is_refused(tmp_path):
    mark = store_tokenizer(tokenizer(), str(tmp_path))
    with pytest.raises(ConfigError, match="Choose another folder"):
        export_tokenizer(load_tokenizer(str(tmp_path)), "diffusers", str(tmp_path))
    assert load_tokenizer(str(tmp_path)).fingerprint == mark


def test_an_artefact_is_not_taken_for_a_published_tokenizer(tmp_path):
    store_tokenizer(tokenizer(quantizer="vq-l2", num_norm_groups=8), str(tmp_path / "artefact"))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "artefact" / WEIGHTS).read_bytes())
    for file in (tmp_path / "artefact" / WEIGHTS, tmp_path / "artefact", tmp_path / WEIGHTS):
        with pytest.raises(ArtefactError, match=f"{file} is of a tokenizer artefact, but .* set tokenizer.path to its folder"):
            import_tokenizer(str(file))


def test_an_artefact_without_a_mark_is_known_by_its_config(tmp_path):
    mark = store_tokenizer(tokenizer(), str(tmp_path))
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    assert load_tokenizer(str(tmp_path)).fingerprint == mark
    with pytest.raises(ArtefactError, match="is of a tokenizer artefact, but"):
        import_tokenizer(str(tmp_path / WEIGHTS))
    (tmp_path / CONFIG).write_text('{"format": "of another kind"}')
    assert import_tokenizer(str(tmp_path / WEIGHTS)).fingerprint == mark


def test_other_files_in_the_folder_of_an_artefact_are_imported(tmp_path):
    """The folder to import into may be that of the checkpoint, and importing it again is harmless."""
    tensors = foreign(tokenizer(), "compvis")
    torch.save({"state_dict": tensors}, tmp_path / "last.ckpt")
    save_file(tensors, tmp_path / "last.safetensors")
    mark = store_tokenizer(import_tokenizer(str(tmp_path / "last.ckpt")), str(tmp_path))
    for name in ("last.ckpt", "last.safetensors"):
        assert store_tokenizer(import_tokenizer(str(tmp_path / name)), str(tmp_path)) == mark


def test_weights_of_a_training_belong_to_it(tmp_path):
    save_file(foreign(tokenizer(), "compvis"), tmp_path / "w.safetensors", own_metadata("training"))
    with pytest.raises(ArtefactError, match="of a commit of train-tokenizer, but its weights belong to that training"):
        import_tokenizer(str(tmp_path / "w.safetensors"))
