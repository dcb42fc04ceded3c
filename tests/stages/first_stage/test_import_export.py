"""Bring your own tokenizer: strict import, one fingerprint under three namings, and a way back."""

import logging
import os

import pytest
import torch
import torch.nn.functional as F
from foreign_support import foreign, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import fingerprint, load_tokenizer
from stages.first_stage.import_export import export_tokenizer, import_tokenizer
from stages.first_stage.names import FORMATS
from stages.first_stage.tokenizer import Tokenizer


def unit_codebook(model: Tokenizer) -> Tokenizer:
    model.quantize.embedding.weight.copy_(F.normalize(model.quantize.embedding.weight, dim=-1))
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """Writes content and returns the path."""

    def write(content, name="last.ckpt"):
        path = str(tmp_path / name)
        save_file(content, path) if name.endswith(".safetensors") else torch.save(content, path)
        return path

    return write


def test_the_same_weights_have_one_fingerprint_under_three_namings(checkpoint):
    model = unit_codebook(tokenizer())
    files = {
        "compvis": checkpoint({"state_dict": foreign(model, "compvis")}, "a.ckpt"),
        "llamagen": checkpoint({"model": foreign(model, "llamagen")}, "b.pt"),
        "diffusers": checkpoint(foreign(model, "diffusers"), "c.safetensors"),
    }
    marks = [import_tokenizer(path, format).fingerprint for format, path in files.items()]
    assert set(marks) == {fingerprint(model)}
    assert [import_tokenizer(path).fingerprint for path in files.values()] == marks


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_is_exact(tmp_path, format):
    for i, model in enumerate(
        [tokenizer(1), tokenizer(2, quantizer="vq-l2"), tokenizer(3, resolution=32, attention_resolutions=(16, 7))]
    ):
        mark = store_tokenizer(model, str(tmp_path / f"artefact{i}"))
        file = export_tokenizer(load_tokenizer(str(tmp_path / f"artefact{i}")), format, str(tmp_path / f"out{i}"))
        back = import_tokenizer(file)
        assert back.fingerprint == mark == store_tokenizer(back, str(tmp_path / f"back{i}"))


@given(
    multipliers=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3).map(tuple),
    num_res_blocks=st.integers(1, 2),
    attended=st.sets(st.integers(0, 3)),
    channels=st.sampled_from([1, 3]),
    codebook=st.tuples(st.integers(2, 40), st.integers(1, 9)),
    z_channels=st.integers(1, 20),
    format=st.sampled_from(FORMATS),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_architecture_is_read_off_its_tensors(
    tmp_path_factory, multipliers, num_res_blocks, attended, channels, codebook, z_channels, format
):
    model = tokenizer(
        channel_multipliers=multipliers,
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(sorted((256 >> i for i in attended if i < len(multipliers)), reverse=True)),
        in_channels=channels,
        codebook_size=codebook[0],
        codebook_dim=codebook[1],
        z_channels=z_channels,
    )
    path = str(tmp_path_factory.mktemp("any") / "weights.safetensors")
    save_file(foreign(unit_codebook(model), format), path)
    imported = import_tokenizer(path)
    assert imported.config == model.config and imported.fingerprint == fingerprint(model)


def test_the_imported_tokenizer_computes_what_the_original_did(checkpoint):
    model = tokenizer(resolution=256, attention_resolutions=(128,))
    imported = import_tokenizer(checkpoint({"state_dict": foreign(model, "compvis")}))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(imported.encode(images), model.encode(images))
    codes = torch.randint(0, 32, (2, 8, 8))
    assert torch.equal(imported.decode(codes), model.decode(codes))


def test_llamagen_codes_are_those_of_normalised_vectors(checkpoint):
    model = tokenizer()
    imported = import_tokenizer(checkpoint({"model": foreign(model, "llamagen")}))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    vectors = F.normalize(model.quant_conv(model.encoder(images)).flatten(2).transpose(1, 2), dim=-1)
    codebook = F.normalize(model.quantize.embedding.weight, dim=-1)
    assert torch.equal(imported.encode(images), (vectors @ codebook.t()).argmax(-1))
    assert torch.equal(imported.quantize.embedding.weight, codebook)


def test_what_belongs_to_training_is_left_out(checkpoint):
    model = unit_codebook(tokenizer())
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "colorize": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.9),
    }
    compvis = checkpoint({"state_dict": {**foreign(model, "compvis"), **extra}, "global_step": 7})
    llamagen = {**foreign(model, "llamagen"), "quantize.codebook_used": torch.zeros(65536)}
    assert import_tokenizer(compvis).fingerprint == fingerprint(model)
    assert import_tokenizer(checkpoint({"model": llamagen, "steps": 3}, "l.pt")).fingerprint == fingerprint(model)


def test_the_first_stage_of_a_transformer_is_found(checkpoint):
    model, other = tokenizer(0), tokenizer(1)
    content = {f"first_stage_model.{name}": tensor for name, tensor in foreign(model, "compvis").items()}
    content |= {f"cond_stage_model.{name}": tensor for name, tensor in foreign(other, "compvis").items()}
    content |= {"transformer.pos_emb": torch.zeros(1, 4, 8), "first_stage_model.loss.x": torch.zeros(1)}
    assert import_tokenizer(checkpoint({"state_dict": content})).fingerprint == fingerprint(model)


def test_older_diffusers_attention_is_read(checkpoint):
    model = tokenizer()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = foreign(model, "diffusers")
    for new, former in old.items():
        tensors = {name.replace(f".{new}.", f".{former}."): tensor for name, tensor in tensors.items()}
    assert import_tokenizer(checkpoint(tensors, "old.safetensors")).fingerprint == fingerprint(model)


def test_half_precision_weights_are_stored_as_float32(checkpoint):
    tensors = {name: tensor.half() for name, tensor in foreign(tokenizer(), "compvis").items()}
    imported = import_tokenizer(checkpoint({"state_dict": tensors}))
    assert {tensor.dtype for tensor in imported.state_dict().values()} == {torch.float32}


def damage(change):
    tensors = foreign(tokenizer(), "compvis")
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.update({"encoder.surprise.weight": torch.zeros(3)}), "unknown encoder.surprise.weight"),
        (lambda t: t.pop("decoder.conv_out.weight"), "lacks decoder.conv_out.weight"),
        (lambda t: t.pop("encoder.conv_in.weight"), "no encoder.conv_in.weight"),
        (lambda t: t.pop("quantize.embedding.weight"), "no quantize.embedding.weight"),
        (lambda t: t.update({"quantize.embedding.weight": torch.tensor(1.0)}), r"a \(\) quantize.embedding.weight"),
        (lambda t: t.update({"decoder.conv_out.weight": torch.zeros(7, 32, 3, 3)}), r"\(7, 32, 3, 3\)"),
        (lambda t: t.update({"encoder.conv_in.weight": torch.zeros(33, 3, 3, 3)}), "must divide the others"),
        (lambda t: t.update({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}), r"\(0, 3, 3, 3\)"),
        (
            lambda t: t.update({"quant_conv.bias": torch.full((4,), torch.nan)}),
            "quant_conv.bias with values that are not finite",
        ),
        (lambda t: t.update({"quant_conv.bias": "four"}), "must be a tensor"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("decoder.up.")], "and .* more"),
    ],
)
def test_anything_but_exactly_a_vqgan_is_refused(checkpoint, change, message):
    with pytest.raises(ArtefactError, match=message):
        import_tokenizer(checkpoint({"state_dict": damage(change)}))


@pytest.mark.parametrize("name", ["quantize.embedding.weight", "quant_conv.bias"])
@pytest.mark.parametrize(
    "odd,kind",
    [
        (lambda t: t.to_sparse(), "torch.sparse_coo"),
        (lambda t: t.to("meta"), "on meta"),
        (lambda t: t + 1j, "torch.complex64"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda t: torch.nested.nested_tensor([t, t]), "torch.float32"),
        (lambda t: t.to(torch.float8_e8m0fnu), "torch.float8_e8m0fnu"),
        (lambda t: torch.zeros(1).expand(1 << 40, 1 << 20), "torch.float32"),
    ],
    ids=["sparse", "meta", "complex", "quantized", "nested", "scales", "repeated"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_of_another_kind_are_refused(checkpoint, name, odd, kind):
    path = checkpoint({"state_dict": damage(lambda tensors: tensors.update({name: odd(tensors[name])}))})
    with pytest.raises(ArtefactError, match=f"has {name} as .*({kind}).* but weights must be dense"):
        import_tokenizer(path)


def test_a_checkpoint_of_something_else_is_refused(checkpoint):
    with pytest.raises(ArtefactError, match="not named like"):
        import_tokenizer(checkpoint({"state_dict": {"layer.weight": torch.zeros(2)}}))


def test_another_format_than_asked_for_is_refused(checkpoint):
    path = checkpoint({"state_dict": foreign(tokenizer(), "compvis")})
    with pytest.raises(ArtefactError, match="--format compvis"):
        import_tokenizer(path, "llamagen")
    with pytest.raises(ConfigError, match="format is dalle"):
        import_tokenizer(path, "dalle")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        import_tokenizer(str(tmp_path / "missing.ckpt"))
    with pytest.raises(ConfigError, match="Name the file itself"):
        import_tokenizer(str(tmp_path))


def test_a_damaged_marker_is_refused(checkpoint):
    tensors = foreign(tokenizer(), "compvis")
    for marker in (
        "x",
        {"resolution": "256"},
        {"resolution": -1},
        {"attention_resolutions": 16},
        {"attention_resolutions": ["a"]},
        {"weights_of": ["artefact"]},
    ):
        with pytest.raises(ArtefactError, match="positive integers"):
            import_tokenizer(checkpoint({"state_dict": tensors, "tessera": marker}))
    with pytest.raises(ArtefactError, match="unknown decoder.up.1.attn.0"):
        import_tokenizer(checkpoint({"state_dict": tensors, "tessera": {"attention_resolutions": []}}))


@pytest.mark.parametrize("format", ["compvis", "llamagen"])
def test_groups_that_a_project_would_get_wrong_are_told(tmp_path, format, caplog):
    model = unit_codebook(tokenizer(num_norm_groups=8))
    file = export_tokenizer(model, format, str(tmp_path))
    assert f"{format}'s own code has 32" in caplog.text
    assert import_tokenizer(file).fingerprint == fingerprint(model)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_overwrites_nothing(tmp_path, format):
    model = tokenizer()
    file = export_tokenizer(model, format, str(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(ConfigError, match="there already"):
        export_tokenizer(tokenizer(1), format, str(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert os.path.basename(file) in before
    with pytest.raises(ConfigError, match="format is auto"):
        export_tokenizer(model, "auto", str(tmp_path))


def test_a_euclidean_codebook_in_llamagen_naming_is_announced(tmp_path, caplog):
    export_tokenizer(tokenizer(), "llamagen", str(tmp_path / "a"))
    assert "not of unit length" in caplog.text
    caplog.clear()
    last_level = tokenizer(attention_resolutions=(128,))
    export_tokenizer(unit_codebook(last_level), "llamagen", str(tmp_path / "b"))
    assert not caplog.text


def test_an_export_that_the_other_project_cannot_build_is_announced(tmp_path, caplog):
    def warned(format: str, **changes) -> str:
        caplog.clear()
        export_tokenizer(unit_codebook(tokenizer(**changes)), format, str(tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        return caplog.text

    assert "attention at the last level, 128 x 128, alone, and here it is at none" in warned("llamagen", attention_resolutions=())
    assert "attention at the last level" in warned("llamagen", attention_resolutions=(256, 128))
    assert "always has attention in the middle" in warned("diffusers", middle_attention=False)
    assert not warned("compvis", attention_resolutions=(256,))


def test_weights_that_are_not_taken_are_named(checkpoint, caplog):
    caplog.set_level(logging.INFO)
    plain, averaged = (foreign(unit_codebook(tokenizer(seed)), "llamagen") for seed in (0, 1))
    both = checkpoint({"model": plain, "ema": averaged, "optimizer": {"state": {}}, "steps": 3}, "both.pt")
    assert import_tokenizer(both).fingerprint == fingerprint(unit_codebook(tokenizer(0)))
    assert "the weights called model. Left out: ema, optimizer" in caplog.text
    alone = import_tokenizer(checkpoint({"ema": averaged, "steps": 3}, "ema.pt"))
    assert alone.fingerprint == fingerprint(unit_codebook(tokenizer(1)))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_published_f16_size(tmp_path, format):
    changes = dict(codebook_size=16384, codebook_dim=8, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4))
    model = tokenizer(num_res_blocks=2, attention_resolutions=(16,), z_channels=256, **changes)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 71_883_403
    path = str(tmp_path / "weights.safetensors")
    save_file(foreign(unit_codebook(model), format), path)
    imported = import_tokenizer(path)
    assert imported.fingerprint == fingerprint(model)
    assert (
        import_tokenizer(export_tokenizer(imported, format, str(tmp_path / "out"))).fingerprint == imported.fingerprint
    )


def test_a_tensor_under_an_old_and_a_new_name_is_refused(checkpoint):
    tensors = foreign(tokenizer(), "diffusers")
    name = next(name for name in tensors if name.endswith(".to_q.weight"))
    tensors[name.replace("to_q", "query")] = torch.zeros_like(tensors[name])
    with pytest.raises(ArtefactError, match="query.weight under old and new names"):
        import_tokenizer(checkpoint(tensors, "x.safetensors"))


def test_a_quantizer_that_llamagen_has_not_is_refused(checkpoint):
    with pytest.raises(ArtefactError, match="names of llamagen and the quantizer gumbel"):
        import_tokenizer(checkpoint({"model": foreign(tokenizer(quantizer="gumbel"), "llamagen")}))
