"""Condition maps beside images: in folders of files, and in columns of Parquet files."""

import io
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources import open_source
from pipeline.sources.map_files import decode_packed, pack
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=16)
SHAPE = (18, 20)
LABELS = np.arange(18 * 20).reshape(SHAPE) % 150
DEPTH = np.linspace(0, 1, 18 * 20, dtype=np.float32).reshape(SHAPE)


def encoded(values: np.ndarray, mode: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    if mode == "NPY":
        np.save(buffer, values)
    else:
        Image.fromarray(values).save(buffer, mode)
    return buffer.getvalue()


def paletted(ids: np.ndarray) -> bytes:
    image = Image.fromarray(ids.astype(np.uint8), "L").convert("P")
    image.putdata(ids.reshape(-1).tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(value: int) -> bytes:
    return encoded(np.full((*SHAPE, 3), value, np.uint8))


def write(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
    """Six images of two classes, and their maps: labels as PNG, depth as arrays."""
    for i in range(6):
        write(tmp_path / f"images/class{i % 2}/{i}.png", picture(40 * i))
        write(tmp_path / f"segmentation/class{i % 2}/{i}.png", encoded((LABELS + i).astype(np.uint8)))
        write(tmp_path / f"depth/class{i % 2}/{i}.npy", encoded(DEPTH * (i + 1) / 6, "NPY"))
    return tmp_path


def source_of(folder, **changes):
    options = {
        "path": f"{folder}/images",
        "label_maps": (f"segmentation={folder}/segmentation",),
        "number_maps": (f"depth={folder}/depth",),
        **changes,
    }
    return open_source(SourceOptions(name="image-folder", **options), IMAGES)


def examples(source, split: str = "train") -> dict[int, dict[str, np.ndarray]]:
    """Maps by the number of the image, which its colour tells."""
    found = [source.decode(source.fetch(uri)) for uri in source.list_images(split)["uri"].to_pylist()]
    return {int(example.image[0, 0, 0]) // 40: example.conditions for example in found}


def test_maps_of_image_files_lie_in_folders_of_their_own(folder):
    source = pickle.loads(pickle.dumps(source_of(folder)))
    found = examples(source)
    assert sorted(found) == list(range(6)) and source.class_names == ("class0", "class1")
    for i, maps in found.items():
        assert list(maps) == ["segmentation", "depth"]
        assert np.array_equal(maps["segmentation"], LABELS + i)
        assert maps["depth"].dtype == np.float32 and np.allclose(maps["depth"], DEPTH * (i + 1) / 6)


def test_maps_of_parquet_files_are_columns(tmp_path):
    columns = {
        "image": [picture(40 * i) for i in range(6)],
        "annotation": [{"bytes": encoded((LABELS + i).astype(np.uint8)), "path": "x.png"} for i in range(6)],
        "depth": [encoded((DEPTH * 65535).astype(np.uint16)) for i in range(6)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=4)
    options = SourceOptions(name="parquet", path=str(tmp_path), label_maps=("annotation",), number_maps=("depth",))
    for i, maps in examples(open_source(options, IMAGES)).items():
        assert np.array_equal(maps["annotation"], LABELS + i) and np.abs(maps["depth"] - DEPTH).max() < 1e-4


def test_held_out_maps_have_folders_of_their_own_or_the_same(folder):
    for i in range(2):
        write(folder / f"val/class0/v{i}.png", picture(40 * i))
        write(folder / f"val-maps/class0/v{i}.png", encoded(np.full(SHAPE, 90 + i, np.uint8)))
        write(folder / f"depth/class0/v{i}.npy", encoded(DEPTH, "NPY"))
    source = source_of(folder, holdout_path=f"{folder}/val", holdout_maps=(f"segmentation={folder}/val-maps",))
    assert {i: int(maps["segmentation"][0, 0]) for i, maps in examples(source, "holdout").items()} == {0: 90, 1: 91}
    assert all(np.array_equal(maps["depth"], DEPTH) for maps in examples(source, "holdout").values())
    assert np.array_equal(examples(source)[5]["segmentation"], LABELS + 5)


def test_maps_of_a_list_file_follow_the_paths_in_it(folder):
    (folder / "train.txt").write_text("images/class0/0.png\nimages/class1/1.png\n")
    (folder / "maps").mkdir()
    (folder / "segmentation").rename(folder / "maps/images")
    source = source_of(folder, path=f"{folder}/train.txt", label_maps=(f"segmentation={folder}/maps",), number_maps=())
    assert sorted(examples(source)) == [0, 1] and np.array_equal(examples(source)[1]["segmentation"], LABELS + 1)


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(LABELS.astype(np.uint8)), LABELS),
        (paletted(LABELS), LABELS),
        (encoded(LABELS.astype(np.uint16)), LABELS),
        (encoded(LABELS > 75), LABELS > 75),
        (encoded(LABELS, "NPY"), LABELS),
        (encoded(LABELS.astype(np.uint8), "TIFF"), LABELS),
    ],
    ids=["grey", "palette", "16 bits", "1 bit", "npy", "tiff"],
)
def test_ids_come_as_they_are_stored(data, expected):
    options = SourceOptions(label_maps=("segmentation",))
    found = decode_packed(pack(picture(0), {"segmentation": data}), options).conditions["segmentation"]
    assert found.dtype == np.int64 and np.array_equal(found, expected)


@pytest.mark.parametrize(
    "data, tolerance",
    [
        (encoded((DEPTH * 255).round().astype(np.uint8)), 0.002),
        (encoded((DEPTH * 65535).round().astype(np.uint16)), 1e-5),
        (encoded(DEPTH, "TIFF"), 0),
        (encoded(DEPTH.astype(np.float64), "NPY"), 1e-7),
    ],
    ids=["8 bits", "16 bits", "float tiff", "npy"],
)
def test_numbers_are_scaled_by_the_bits_they_have(data, tolerance):
    options = SourceOptions(number_maps=("depth",))
    found = decode_packed(pack(picture(0), {"depth": data}), options).conditions["depth"]
    assert found.dtype == np.float32 and np.abs(found - DEPTH).max() <= tolerance


@pytest.mark.parametrize(
    "kind, data, words",
    [
        ("label_maps", picture(9), "unfit-map.*map: a map has one channel, but this image is RGB"),
        ("label_maps", encoded(DEPTH, "TIFF"), "unfit-map.*whole numbers, but this one holds float32"),
        ("number_maps", encoded(LABELS.astype(np.int32), "NPY"), "unfit-map.*floats or 8 or 16 bits, but this one holds int32"),
        ("number_maps", encoded(np.zeros((3, *SHAPE)), "NPY"), r"unfit-map.*this array is of \(3, 18, 20\)"),
        ("label_maps", encoded(LABELS[:9].astype(np.uint8)), "unfit-map.*map has 20 x 9 pixels and the image 20 x 18"),
        ("label_maps", encoded(LABELS, "NPY")[:200], "undecodable.*map: "),
        ("label_maps", b"not a picture", "not-an-image.*map: "),
        ("label_maps", b"", "empty.*map: "),
    ],
    ids=["colours", "labels of floats", "wide numbers", "three dimensions", "another size", "cut npy", "no image", "empty"],
)
def test_a_map_that_cannot_be_used_makes_a_bad_image(kind, data, words):
    with pytest.raises(BadImage, match=words):
        decode_packed(pack(picture(0), {"map": data}), SourceOptions(**{kind: ("map",)}))


def test_arrays_with_objects_are_not_unpickled():
    data = io.BytesIO()
    np.save(data, np.array([[object]], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage, match="undecodable"):
        decode_packed(pack(picture(0), {"map": data.getvalue()}), SourceOptions(label_maps=("map",)))


def test_an_image_without_a_map_is_listed_named_and_read(folder, caplog):
    (folder / "depth/class0/2.npy").unlink()
    with caplog.at_level(logging.WARNING):
        source = source_of(folder)
        assert len(source.list_images("train")) == 6
    assert "1 of 6 images have no depth" in caplog.text and "class0/2.png" in caplog.text
    assert [list(maps) for i, maps in sorted(examples(source).items()) if i in (1, 2)] == [["segmentation", "depth"], ["segmentation"]]


def test_the_listing_changes_with_a_map(folder):
    before = source_of(folder).list_images("train")
    assert before.equals(source_of(folder).list_images("train"))
    write(folder / "segmentation/class0/0.png", encoded(np.zeros(SHAPE, np.uint8)))
    after = source_of(folder).list_images("train")
    assert before["uri"].equals(after["uri"]) and not before["etag"].equals(after["etag"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"label_maps": ("segmentation",)}, "source.label_maps names segmentation, .* Write segmentation=FOLDER"),
        ({"label_maps": ("depth=a",)}, "source.number_maps names depth=.*a name of its own"),
        ({"label_maps": ("image=a",)}, "source.label_maps names image=a.* which is not image"),
        ({"holdout_path": ".", "holdout_maps": ("edges=a",)}, "source.holdout_maps names edges, but the maps are segmentation, depth"),
        ({"holdout_maps": ("segmentation=a",)}, "source.holdout_maps is .*, but held-out images lie in .*, as the others do"),
        ({"label_maps": ("segmentation=/nowhere",)}, "The segmentation of images is in /nowhere, but no image has one"),
    ],
)
def test_entries_that_do_not_fit_are_refused(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        source_of(folder, **changes).list_images("train")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"label_maps": ("mask=folder",)}, "source.label_maps names mask=folder, but maps in Parquet files are columns"),
        ({"label_maps": ("mask",)}, "it has no column mask, .* Its columns are image; name maps of these"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, changes, words):
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=words):
        open_source(SourceOptions(name="parquet", path=str(tmp_path), **changes), IMAGES)
