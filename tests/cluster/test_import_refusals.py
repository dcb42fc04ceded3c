"""What `import-transformer` does with files, numbers and project files that do not belong together: an error that names both sides."""

import os
from dataclasses import replace

import pytest
import torch
import yaml
from foreign_support import llamagen_tensors, net2net_tensors, tokenizer

from cluster import checkpoints
from cluster.import_run import ImportTransformerOptions, import_transformer
from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError, ConfigError

SIDE, CODEBOOK = 4, 48


def codes_tokenizer():
    return tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK)


def change(name, value):
    return lambda tensors: tensors.update({name: value})


def without(prefix):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda t: t.pop("transformer.blocks.1.ln1.bias"), "has no blocks.1.ln1.bias"),
        (change("transformer.blocks.0.surprise", torch.zeros(2)), "unknown blocks.0.surprise"),
        (change("surprise", torch.zeros(2)), "unknown surprise"),
        (change("transformer.tok_emb.weight", torch.zeros(50, 32)), "50 codes, but the tokenizer has 48"),
        (change("transformer.pos_emb", torch.zeros(1, 9, 32)), "9 positions, but 1 condition tokens and a grid of 4 x 4"),
        (change("transformer.head.weight", torch.zeros(48, 31)), r"shape \(48, 31\) for head.weight"),
        (change("transformer.ln_f.bias", torch.full((32,), torch.nan)), "not finite"),
        (change("transformer.blocks.0.attn.mask", torch.ones(1, 1, 17, 17)), "not causal"),
        (change("transformer.blocks.0.attn.mask", torch.ones(17)), r"attn.mask of shape \(17,\), but a causal mask has 4 dimensions"),
        (change("transformer.blocks.0.attn.mask", "none"), "attn.mask, but every weight must be a tensor"),
        (change("permuter.forward_shuffle_idx", torch.arange(16).flip(0)), "another order than row by row"),
        (change("permuter.forward_shuffle_idx", torch.tensor(0)), r"forward_shuffle_idx of shape \(\), but an order of codes has 1"),
        (change("permuter.surprise", torch.zeros(2)), "unknown permuter.surprise"),
        (without("transformer.blocks."), r"has no blocks\.\*, but a transformer has one block at least"),
        (change("transformer.tok_emb.weight", torch.ones(48, 32, dtype=torch.int64)), "tok_emb.weight of torch.int64, but weights are"),
        (change("transformer.blocks.0.attn.key.weight", torch.ones(32, 16)), r"attn.key.weight of shape \(32, 16\), but .*query.weight"),
    ],
)
def test_anything_but_exactly_such_a_transformer_is_refused(tmp_path, edit, message):
    tensors = net2net_tensors(1 + SIDE**2, CODEBOOK)
    edit(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "last.ckpt")
    store_tokenizer(codes_tokenizer(), str(tmp_path / "tokenizer"))
    with pytest.raises(ArtefactError, match=message):
        import_transformer(
            ImportTransformerOptions(
                file=str(tmp_path / "last.ckpt"),
                output=str(tmp_path / "run"),
                tokenizer=str(tmp_path / "tokenizer"),
                num_heads=2,
                num_classes=0,
            )
        )
    assert not os.path.exists(tmp_path / "run")


def llamagen_options(folder, tensors, **changes):
    """Of an import of these tensors, with a tokenizer beside them."""
    torch.save({"model": tensors}, folder / "c2i.pt")
    store_tokenizer(codes_tokenizer(), str(folder / "tokenizer"))
    paths = {"file": "c2i.pt", "output": "run", "tokenizer": "tokenizer"}
    given = {"num_heads": 2, **{name: str(folder / path) for name, path in paths.items()}}
    return ImportTransformerOptions(**{**given, **changes})


@pytest.mark.parametrize(
    "edit,message",
    [
        (without("layers."), r"has no layers\.\*, but a transformer has one block at least"),
        (change("layers.0.feed_forward.w3.weight", torch.ones(64, 16)), r"w3.weight of shape \(64, 16\), but .*w1.weight"),
        (change("layers.0.attention.wqkv.weight", torch.ones(48, 16)), r"wqkv.weight of shape \(48, 16\), but only models of one width"),
        (change("cls_embedding.embedding_table.weight", torch.ones(1, 32)), "a table of 1 class, but it must hold one class and the null"),
    ],
)
def test_anything_but_exactly_llamagens_transformer_is_refused(tmp_path, edit, message):
    tensors = llamagen_tensors(CODEBOOK, num_classes=3)
    edit(tensors)
    with pytest.raises(ArtefactError, match=message):
        import_transformer(llamagen_options(tmp_path, tensors))
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(num_classes=10), "--num-classes is 10, but the tensors of .* have 3 classes and the null class"),
        (dict(num_classes=0), "--num-classes is 0, but the tensors of .* have 3 classes"),
        (dict(num_heads=-2), "--num-heads is -2"),
        (dict(num_heads=0), "--num-heads is 0"),
        (dict(image_size=0), "--image-size is 0, but .* multiple of 2"),
        (dict(image_size=-8), "--image-size is -8"),
        (dict(image_size=7), "--image-size is 7"),
    ],
)
def test_sizes_that_contradict_llamagens_tensors_are_refused(tmp_path, changes, message):
    options = llamagen_options(tmp_path, llamagen_tensors(CODEBOOK, num_classes=3), **changes)
    with pytest.raises(ConfigError, match=message):
        import_transformer(options)


def test_rotations_in_llamagens_file_tell_the_grid(tmp_path):
    tensors = llamagen_tensors(CODEBOOK, num_classes=3)
    options = llamagen_options(tmp_path, {**tensors, "freqs_cis": torch.zeros(1 + SIDE**2, 8, 2)}, image_size=4 * SIDE)
    with pytest.raises(ConfigError, match=f"makes 8 x 8 codes, but .* rotations of {SIDE**2}"):
        import_transformer(options)
    import_transformer(replace(options, image_size=2 * SIDE))


def test_a_project_file_says_nothing_of_llamagens_transformer(tmp_path):
    config = described_options(tmp_path, {}).config
    options = llamagen_options(tmp_path, llamagen_tensors(CODEBOOK, num_classes=3), config=config)
    with pytest.raises(ConfigError, match="--config is .*project.yaml, but LlamaGen's checkpoints come without a project file"):
        import_transformer(options)


def test_the_number_of_classes_that_llamagens_tensors_have_may_be_named(tmp_path):
    summary = import_transformer(llamagen_options(tmp_path, llamagen_tensors(CODEBOOK, num_classes=3), num_classes=3))
    assert checkpoints.open_commit(summary.checkpoint).content["transformer"]["num_classes"] == 3


SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": CODEBOOK, "block_size": 1 + SIDE**2}


def described_options(folder, tensors, stage="__is_unconditional__", sizes=SIZES, **changes):
    """Of an import of these tensors with a project file that gives sizes and the condition."""
    torch.save({"state_dict": tensors}, folder / "last.ckpt")
    store_tokenizer(codes_tokenizer(), str(folder / "tokenizer"))
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": sizes}
    params = {"transformer_config": gpt, "cond_stage_config": stage}
    project = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    paths = {"file": "last.ckpt", "output": "run", "tokenizer": "tokenizer", "config": "project.yaml"}
    return ImportTransformerOptions(**{**{name: str(folder / path) for name, path in paths.items()}, **changes})


def test_a_project_file_that_describes_the_tensors_is_enough(tmp_path):
    summary = import_transformer(described_options(tmp_path, net2net_tensors(1 + SIDE**2, CODEBOOK)))
    assert checkpoints.open_commit(summary.checkpoint).content["transformer"]["num_heads"] == 2


@pytest.mark.parametrize(
    "key,value,here",
    [("n_layer", 3, 2), ("n_embd", 64, 32), ("vocab_size", 1024, CODEBOOK), ("block_size", 512, 1 + SIDE**2), ("n_layer", 0, 2)],
)
def test_a_project_file_of_another_transformer_is_refused(tmp_path, key, value, here):
    options = described_options(tmp_path, net2net_tensors(1 + SIDE**2, CODEBOOK), sizes={**SIZES, key: value})
    with pytest.raises(ConfigError, match=f"{key} in .*project.yaml is {value}, but the tensors of .*last.ckpt give {here}"):
        import_transformer(options)
    assert not os.path.exists(options.output)


def test_a_file_that_lost_its_last_block_is_not_a_smaller_transformer(tmp_path):
    tensors = net2net_tensors(1 + SIDE**2, CODEBOOK)
    without("transformer.blocks.1.")(tensors)
    options = described_options(tmp_path, tensors)
    with pytest.raises(ConfigError, match="n_layer in .* is 2, but .* give 1. .* check that the checkpoint is whole"):
        import_transformer(options)


LABELATOR = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}}


@pytest.mark.parametrize(
    "stage,changes,message",
    [
        (LABELATOR, dict(num_classes=5), "--num-classes is 5, but .*project.yaml says 7"),
        ("__is_unconditional__", dict(num_classes=5), "--num-classes is 5, but .*project.yaml says 0"),
        ("__is_unconditional__", dict(sizes={**SIZES, "resid_pdrop": "much"}), "resid_pdrop in the project file is 'much'"),
    ],
)
def test_what_contradicts_the_project_file_is_refused(tmp_path, stage, changes, message):
    with pytest.raises(ConfigError, match=message):
        import_transformer(described_options(tmp_path, net2net_tensors(1 + SIDE**2, CODEBOOK), stage, **changes))


@pytest.mark.parametrize("num_positions,num_unused", [(SIDE**2, 0), (1 + SIDE**2, 0), (2 * SIDE**2, SIDE**2)])
def test_positions_that_stay_unused_are_announced(tmp_path, caplog, num_positions, num_unused):
    """A model of a longer sequence, such as one with coordinates before its codes, is more than an unconditional one."""
    options = described_options(
        tmp_path, net2net_tensors(num_positions, CODEBOOK), sizes={**SIZES, "block_size": num_positions}
    )
    import_transformer(options)
    announced = [record.getMessage() for record in caplog.records if "stay unused" in record.getMessage()]
    assert len(announced) == (num_unused > 0)
    assert all(f"{num_positions} positions, and {num_unused} of them stay unused" in text for text in announced)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(num_heads=None), "--num-heads is None, but .* cannot tell it"),
        (dict(num_heads=5), "--num-heads is 5"),
        (dict(num_classes=None), "--num-classes is not given"),
        (dict(num_classes=49), "49 classes .* vocabulary of 48"),
    ],
)
def test_what_the_tensors_cannot_tell_is_asked_for(tmp_path, changes, message):
    torch.save({"state_dict": net2net_tensors(1 + SIDE**2, CODEBOOK)}, tmp_path / "last.ckpt")
    store_tokenizer(codes_tokenizer(), str(tmp_path / "tokenizer"))
    given = {"num_heads": 2, "num_classes": 0, **changes}
    options = ImportTransformerOptions(
        file=str(tmp_path / "last.ckpt"), output=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer"), **given
    )
    with pytest.raises(ConfigError, match=message):
        import_transformer(options)


def test_a_condition_of_another_kind_is_refused_by_name(tmp_path):
    """Coordinates and boxes are tokens in the original, too, but no tokenizer's codes."""
    torch.save({"state_dict": net2net_tensors(1 + SIDE**2, CODEBOOK)}, tmp_path / "last.ckpt")
    store_tokenizer(codes_tokenizer(), str(tmp_path / "tokenizer"))
    params = {"cond_stage_config": {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 1024, "down_factor": 16}}}
    project = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    options = ImportTransformerOptions(
        file=str(tmp_path / "last.ckpt"),
        output=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        config=str(tmp_path / "project.yaml"),
        num_heads=2,
    )
    with pytest.raises(ConfigError, match="cond_stage_config in .* is CoordStage, but the conditions that can be imported are none"):
        import_transformer(options)
