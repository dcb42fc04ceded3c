"""What `tokenize` refuses before it writes anything. Needs no Ray: nothing gets that far."""

import dataclasses

import pytest
import torch
from PIL import Image
from tests_support import TINY_TOKENIZER

from pipeline.tokenize_images import TokenizeOptions, check_images, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions


def stored_tokenizer(folder, **changes):
    torch.manual_seed(0)
    store_tokenizer(Tokenizer(dataclasses.replace(TINY_TOKENIZER, **changes)), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    Image.new("RGB", (20, 24)).save(folder / "images" / "1.png")
    return TokenizeOptions(
        source=SourceOptions(name="image-folder", path=str(folder / "images")),
        images=ImageOptions(size=16, views=("center", "flip")),
        tokenizer=TokenizerOptions(path=stored_tokenizer(folder / "tokenizer")),
        codes=CodesOptions(path=str(folder / "codes")),
    )


def with_codes(options, **changes):
    return dataclasses.replace(options, codes=dataclasses.replace(options.codes, **changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 17}, "images.size is 17"),
        ({"channels": 1}, "images.channels is 1"),
        ({"views": ("center", "mirror")}, "images.views is"),
        ({"views": ("flip", "flip")}, "flip more than once"),
        ({"views": ()}, "at least one view"),
    ],
)
def test_images_that_do_not_fit_are_refused(options, tmp_path, change, message):
    job = with_codes(options, path=str(tmp_path / "codes"))
    with pytest.raises(ConfigError, match=message):
        tokenize(dataclasses.replace(job, images=dataclasses.replace(options.images, **change)))
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row_group_rows": 1 << 21}, "codes.row_group_rows is 2097152, but .* more than the 98 MB of a part.* Use at most 1048576"),
        ({"row_group_rows": 48}, "codes.row_group_rows is 48, .* power of two, such as 64"),
        ({"shard_size": 1_398_102}, "codes.shard_size is 1398102, .* 2 GiB .* Use at most 1398101"),
        ({"conditions": ("depth",)}, "depth is no map of this source's images, which have: none"),
    ],
)
def test_codes_that_do_not_fit_are_refused(options, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        tokenize(with_codes(options, path=str(tmp_path / "codes"), **change))
    assert not (tmp_path / "codes").exists()


def test_conditions_that_a_source_lacks_are_refused_with_what_there_is(options, tmp_path):
    job = dataclasses.replace(options, source=SourceOptions(name="scenes", num_images=5))
    for name in ("pose", "keypoints"):
        with pytest.raises(ConfigError, match=f"but {name} is no map .*: segmentation, depth, edges. Choose"):
            tokenize(with_codes(job, path=str(tmp_path / "codes"), conditions=("segmentation", name)))


def test_a_map_that_does_not_fit_the_tokenizer_is_refused(options, tmp_path):
    job = dataclasses.replace(
        with_codes(options, path=str(tmp_path / "codes")), source=SourceOptions(name="scenes", num_images=5)
    )
    path = options.tokenizer.path
    for changes, message in (
        ({"input": "depth"}, r"tokenizer.num_labels \(1 without labels\) is 1, but the tokenizer in .* takes 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(dataclasses.replace(job, tokenizer=TokenizerOptions(path=path, **changes)))
    assert not (tmp_path / "codes").exists()
    assert not (tmp_path / "codes").exists()


def test_a_codebook_larger_than_the_column_is_refused(options, tmp_path):
    path = stored_tokenizer(tmp_path / "tokenizer", codebook_size=65537, codebook_dim=1)
    job = with_codes(options, path=str(tmp_path / "codes"))
    with pytest.raises(ConfigError, match="codebook_size is 65537"):
        tokenize(dataclasses.replace(job, tokenizer=TokenizerOptions(path=path)))
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("section, error", [("source", ConfigError), ("tokenizer", ArtefactError)])
def test_missing_inputs_are_named(options, tmp_path, section, error):
    job = with_codes(options, path=str(tmp_path / "codes"))
    missing = dataclasses.replace(getattr(options, section), path=str(tmp_path / "nothing"))
    with pytest.raises(error, match=f"{section}.path is {tmp_path / 'nothing'}"):
        tokenize(dataclasses.replace(job, **{section: missing}))
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_images_that_are_held_out_and_trained_on_are_refused(options, tmp_path, split):
    source = dataclasses.replace(options.source, holdout_path=options.source.path, split=split)
    with pytest.raises(ConfigError, match="source.holdout_path is .*, but 1 of its images are among those of source.path.*such as .*1.png"):
        tokenize(dataclasses.replace(with_codes(options, path=str(tmp_path / "codes")), source=source))
    assert not (tmp_path / "codes").exists()


def test_what_just_fits_is_accepted(options):
    tokenizer = open_tokenizer(options.tokenizer.path)
    assert check_images(tokenizer, with_codes(options, shard_size=1_398_101, row_group_rows=1 << 20)) == ("center", "flip")
