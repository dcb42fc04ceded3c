"""What a checkpoint of CompVis or latent-diffusion brings along: a project file, several models, and variants of the network."""

import logging

import pytest
import torch
import yaml
from foreign_support import foreign, tokenizer

from pipeline.tokenizers import store_tokenizer
from stages.compvis_project import read_project
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import fingerprint, load_tokenizer
from stages.first_stage.import_export import export_tokenizer, import_tokenizer

NETWORK = dict(
    double_z=False,
    z_channels=16,
    resolution=256,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[128],
    dropout=0.0,
)


@pytest.fixture
def project(tmp_path):
    """Writes a project file and returns it."""

    def write(tree=None, **changes):
        network = {**NETWORK, **changes}
        params = {"embed_dim": 4, "n_embed": 32, "ddconfig": network, "lossconfig": {"target": "os.system"}}
        tree = tree or {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
        path = tmp_path / "project.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return read_project(str(path))

    return write


@pytest.fixture
def checkpoint(tmp_path):
    def write(tensors):
        path = str(tmp_path / "last.ckpt")
        torch.save({"state_dict": tensors}, path)
        return path

    return write


def test_the_project_file_gives_the_resolution(checkpoint, project):
    model = tokenizer(resolution=512, attention_resolutions=(256,))
    path = checkpoint(foreign(model, "compvis"))
    imported = import_tokenizer(path, project=project(resolution=512, attn_resolutions=[256, 32]))
    assert imported.config == model.config and imported.fingerprint == fingerprint(model)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(ch=64), r"ddconfig.ch in .* is 64, but the tensors of .* give 32"),
        (dict(ch_mult=[1, 2, 4]), r"ch_mult .* is \(1, 2, 4\), but"),
        (dict(attn_resolutions=[]), r"attn_resolutions .* is \(\), but the tensors of .* give \(128,\)"),
        (dict(resolution=128), r"attn_resolutions .* is \(128,\), but the tensors of .* give \(64,\)"),
        (dict(double_z=True), "double_z"),
        (dict(out_ch=1), "out_ch .* is 1, but"),
    ],
)
def test_a_project_file_of_another_model_is_refused(checkpoint, project, change, message):
    path = checkpoint(foreign(tokenizer(), "compvis"))
    with pytest.raises(ConfigError, match=message):
        import_tokenizer(path, project=project(**change))


@pytest.mark.parametrize("tree", ["[1, 2", "[1, 2]", "model: 3", "model: {target: 3}", "model: {target: a.B, params: 4}"])
def test_a_file_that_is_no_project_is_refused(project, tree):
    with pytest.raises(ConfigError, match="--config is .*, but"):
        project(tree)


def test_a_project_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "project.yaml").write_bytes("# für".encode("latin-1"))
    with pytest.raises(ConfigError, match="--config is .*not valid YAML"):
        read_project(str(tmp_path / "project.yaml"))


@pytest.mark.parametrize(
    "params",
    [
        {"n_embed": 999},
        {"n_embed": 999, "ddConfig": NETWORK},
        {"first_stage_config": "__is_first_stage__"},
        {"first_stage_config": {"target": "x.VQModel", "params": {"n_embed": 999}}},
    ],
)
def test_a_project_file_without_an_autoencoder_is_refused(checkpoint, project, params):
    path = checkpoint(foreign(tokenizer(), "compvis"))
    with pytest.raises(ConfigError, match="--config is .*, but it describes no autoencoder"):
        import_tokenizer(path, project=project({"model": {"target": "x.Something", "params": params}}))


def test_a_missing_project_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_project(str(tmp_path / "missing.yaml"))


def transformer_checkpoint(first, cond):
    content = {f"first_stage_model.{name}": tensor for name, tensor in foreign(first, "compvis").items()}
    content |= {f"cond_stage_model.{name}": tensor for name, tensor in foreign(cond, "compvis").items()}
    content |= {"cond_stage_model.colorize": torch.zeros(3, 5, 1, 1), "first_stage_model.loss.x": torch.zeros(1)}
    return content | {"transformer.pos_emb": torch.zeros(1, 4, 8)}


def test_both_tokenizers_of_a_transformer_are_found(checkpoint, project, caplog):
    caplog.set_level(logging.INFO)
    first, cond = tokenizer(0), tokenizer(1, in_channels=5)
    path = checkpoint(transformer_checkpoint(first, cond))
    params = dict(embed_dim=4, n_embed=32, ddconfig=NETWORK)
    seg = dict(params, n_labels=5, ddconfig=dict(NETWORK, in_channels=5, out_ch=5))
    tree = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "first_stage_config": {"target": "taming.models.vqgan.VQModel", "params": params},
            "cond_stage_config": {"target": "taming.models.vqgan.VQSegmentationModel", "params": seg},
        },
    }
    described = project({"model": tree})
    assert import_tokenizer(path, project=described).fingerprint == fingerprint(first)
    assert import_tokenizer(path, project=described, part="cond_stage").fingerprint == fingerprint(cond)
    assert "1 of the training losses (loss.x)" in caplog.text and "1 of the transformer" in caplog.text
    assert "colours for pictures" in caplog.text


def test_a_stray_tensor_beside_the_tokenizer_is_refused(checkpoint):
    content = transformer_checkpoint(tokenizer(0), tokenizer(1))
    with pytest.raises(ArtefactError, match="unknown surprise.weight"):
        import_tokenizer(checkpoint({**content, "surprise.weight": torch.zeros(2)}))


def test_a_tokenizer_alone_has_no_second_one(checkpoint):
    with pytest.raises(ConfigError, match="--part is cond_stage"):
        import_tokenizer(checkpoint(foreign(tokenizer(), "compvis")), part="cond_stage")


@pytest.mark.parametrize("format", ["compvis", "llamagen", "diffusers"])
def test_a_network_without_attention_is_kept_so(tmp_path, format):
    model = tokenizer(middle_attention=False, attention_resolutions=())
    mark = store_tokenizer(model, str(tmp_path / "artefact"))
    assert mark != fingerprint(tokenizer(attention_resolutions=())) and "encoder.mid.attn_1.q.weight" not in model.state_dict()
    file = export_tokenizer(load_tokenizer(str(tmp_path / "artefact")), format, str(tmp_path / "out"))
    back = import_tokenizer(file)
    assert back.fingerprint == mark and back.config == model.config


def test_a_fingerprint_from_before_a_field_came_is_the_same():
    assert fingerprint(tokenizer()) == "b0a762c8102c5c5d726d95789857193eb0b1922d7175985e0526611f526c1f01"


def test_a_resolution_that_is_no_number_is_refused(checkpoint, project):
    path = checkpoint(foreign(tokenizer(), "compvis"))
    with pytest.raises(ConfigError, match="resolution in the project file .* must be a whole number"):
        import_tokenizer(path, project=project(resolution="${data.size}"))


def test_used_codes_of_a_gumbel_tokenizer(checkpoint):
    model = tokenizer(quantizer="gumbel")
    used = torch.tensor([3, 5, 7, 30])
    imported = import_tokenizer(checkpoint({**foreign(model, "compvis"), "quantize.used": used}))
    codes = torch.randint(0, 4, (1, 8, 8))
    assert imported.codebook_size == 4 and torch.equal(imported.decode(codes), model.decode(used[codes]))


def test_a_codebook_of_used_codes_is_cut_to_them(checkpoint, project, caplog):
    model = tokenizer()
    used = torch.tensor([3, 5, 7, 30])
    path = checkpoint({**foreign(model, "compvis"), "quantize.used": used})
    imported = import_tokenizer(path)
    assert import_tokenizer(path, project=project()).fingerprint == imported.fingerprint, "it names the whole codebook"
    codes = torch.randint(0, 4, (1, 8, 8))
    assert imported.codebook_size == 4 and "4 of 32 codebook entries" in caplog.text
    assert torch.equal(imported.decode(codes), model.decode(used[codes]))
    for wrong in ([32], [0.5], [[1]], torch.tensor([], dtype=torch.int64), [True] * 32):
        wrong = torch.as_tensor(wrong)
        with pytest.raises(ArtefactError, match="must number entries"):
            import_tokenizer(checkpoint({**foreign(model, "compvis"), "quantize.used": wrong}))


def test_used_codes_may_be_small_integers(checkpoint):
    tensors = foreign(tokenizer(), "compvis")
    wide, narrow = (
        import_tokenizer(checkpoint({**tensors, "quantize.used": torch.tensor([3, 5, 30], dtype=dtype)}))
        for dtype in (torch.int64, torch.uint8)
    )
    assert narrow.fingerprint == wide.fingerprint


@pytest.mark.parametrize("name", ["quantize.embed.weight", "quantize.proj.weight", "quantize.proj.bias"])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_codebook_of_another_shape_than_its_used_codes_is_refused(checkpoint, name, shape):
    tensors = {**foreign(tokenizer(quantizer="gumbel"), "compvis"), "quantize.used": torch.tensor([3, 5, 30])}
    with pytest.raises(ArtefactError, match=f"{name}|must number entries"):
        import_tokenizer(checkpoint({**tensors, name: torch.zeros(shape)}))


def test_a_gumbel_tokenizer_is_known_by_its_tensors(checkpoint, tmp_path):
    model = tokenizer(quantizer="gumbel")
    path = checkpoint(foreign(model, "compvis"))
    imported = import_tokenizer(path)
    assert imported.config.quantizer == "gumbel" and imported.fingerprint == fingerprint(model)
    assert import_tokenizer(export_tokenizer(imported, "compvis", str(tmp_path / "out"))).fingerprint == fingerprint(model)
    with pytest.raises(ConfigError, match="has no quantizer gumbel.*compvis"):
        export_tokenizer(imported, "diffusers", str(tmp_path / "other"))


def test_a_quantizer_that_no_other_project_has_stays(tmp_path):
    model = tokenizer(quantizer="lfq", codebook_size=16)
    with pytest.raises(ConfigError, match="has no quantizer lfq"):
        export_tokenizer(model, "compvis", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
