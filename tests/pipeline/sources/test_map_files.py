"""Condition maps beside images: in folders of files, and in columns of Parquet files."""

import io
import logging
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
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


def few_bits(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG of so many bits per pixel, which Pillow reads but does not write."""
    h, w = ids.shape
    packed = np.packbits(np.unpackbits(ids.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(h, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
    return open_source(SourceOptions(name="image-folder", **options), IMAGES, ["segmentation", "depth", "image"])


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
    for i, maps in examples(open_source(options, IMAGES, ["annotation", "depth"])).items():
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


def test_maps_on_s3(folder, s3):
    (folder / "depth/class0/2.npy").unlink()
    for name in ("images", "segmentation", "depth"):
        for path in (folder / name).rglob("*.*"):
            storage.put_if_absent(f"{s3}/{path.relative_to(folder)}", path.read_bytes())
    there, here = source_of(s3), source_of(folder)
    assert there.list_images("train")["etag"].equals(here.list_images("train")["etag"])
    found, expected = examples(there), examples(here)
    assert list(found[2]) == ["segmentation"] and sorted(found) == sorted(expected)
    for i, maps in expected.items():
        assert all(np.array_equal(found[i][name], values) for name, values in maps.items())


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
        (encoded(LABELS[..., None], "NPY"), LABELS),
        (few_bits(LABELS % 4, 2), LABELS % 4),
        (few_bits(LABELS % 16, 4), LABELS % 16),
    ],
    ids=["grey", "palette", "16 bits", "1 bit", "npy", "tiff", "npy of one channel", "2 bits", "4 bits"],
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
        (encoded((DEPTH * 65535).round().astype(">u2"), "NPY"), 1e-5),
        (encoded((DEPTH * 255).round().astype(np.uint8), "GIF"), 0.002),
    ],
    ids=["8 bits", "16 bits", "float tiff", "npy", "other byte order", "grey palette"],
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
        ("number_maps", paletted(LABELS), "unfit-map.*a map of numbers is grey, but this image has colours"),
        ("number_maps", encoded(LABELS.astype(np.int32), "NPY"), "unfit-map.*floats or 8 or 16 bits, but this one holds int32"),
        ("number_maps", encoded(np.zeros((3, *SHAPE)), "NPY"), r"unfit-map.*this array is of \(3, 18, 20\)"),
        ("label_maps", encoded(LABELS[:9].astype(np.uint8)), "unfit-map.*map has 20 x 9 pixels and the image 20 x 18"),
        ("label_maps", encoded(LABELS, "NPY")[:200], "undecodable.*map: "),
        ("label_maps", b"not a picture", "not-an-image.*map: "),
        ("label_maps", b"", "empty.*map: "),
    ],
    ids=["colours", "floats", "coloured numbers", "wide numbers", "3-D", "another size", "cut npy", "no image", "empty"],
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


def test_upper_case_suffixes_and_names_with_dots(folder):
    for name in ("images", "segmentation", "depth"):
        suffix = "npy" if name == "depth" else "png"
        (folder / name / "class0" / f"0.{suffix}").rename(folder / name / "class0" / f"a.b.{suffix.upper()}")
    assert list(examples(source_of(folder))[0]) == ["segmentation", "depth"]


def test_two_files_for_one_map_are_refused(folder):
    write(folder / "depth/class0/0.png", encoded(LABELS.astype(np.uint8)))
    with pytest.raises(ConfigError, match="more than one file there is that of class0/0, such as .*0.png. Keep one"):
        source_of(folder).list_images("train")


def test_maps_among_the_images_are_refused(folder):
    for place in (f"{folder}/images", f"{folder}/images/labels"):
        with pytest.raises(ConfigError, match="within .*images, where every file counts as an image. Move the maps beside it"):
            source_of(folder, label_maps=(f"segmentation={place}",))


def test_paths_of_a_list_need_not_be_tidy(folder):
    (folder / "train.txt").write_text("./images/class0/0.png\nimages/class1/../class1/1.png\n")
    for name in ("segmentation", "depth"):
        (folder / "maps" / name).mkdir(parents=True)
        (folder / name).rename(folder / "maps" / name / "images")
    maps = {"label_maps": (f"segmentation={folder}/maps/segmentation",), "number_maps": (f"depth={folder}/maps/depth",)}
    found = examples(source_of(folder, path=f"{folder}/train.txt", **maps))
    assert [list(found[i]) for i in (0, 1)] == [["segmentation", "depth"]] * 2


def test_maps_that_are_not_needed_change_nothing(folder):
    write(folder / "segmentation/class0/0.png", b"damaged")
    options = SourceOptions(name="image-folder", path=f"{folder}/images", label_maps=(f"segmentation={folder}/segmentation",))
    plain = open_source(SourceOptions(name="image-folder", path=f"{folder}/images"), IMAGES)
    source = open_source(options, IMAGES)
    assert source.list_images("train").equals(plain.list_images("train"))
    for uri in source.list_images("train")["uri"].to_pylist():
        assert source.fetch(uri) == plain.fetch(uri) and source.decode(source.fetch(uri)).conditions == {}


def test_sources_without_map_files_refuse_them():
    with pytest.raises(ConfigError, match="source.label_maps is .*, but only image-folder and parquet read maps. Leave it out"):
        open_source(SourceOptions(name="scenes", label_maps=("segmentation=a",)), IMAGES)


def test_a_map_in_parquet_may_be_called_label(tmp_path):
    columns = {"image": [picture(0)], "label": [{"bytes": encoded(LABELS.astype(np.uint8)), "path": "x"}]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(SourceOptions(name="parquet", path=str(tmp_path), label_maps=("label",)), IMAGES, ["label"])
    assert source.class_names == () and np.array_equal(examples(source)[0]["label"], LABELS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"label_maps": ("segmentation",)}, "source.label_maps names segmentation, .* Write segmentation=FOLDER"),
        ({"label_maps": ("depth=a",)}, "source.number_maps names depth=.*a name of its own"),
        ({"label_maps": ("image=a",)}, "source.label_maps names image=a.* which is not image"),
        ({"label_maps": ("segmentation=a", "segmentation=b")}, "source.label_maps names segmentation=b, .* a name of its own"),
        ({"label_maps": (), "holdout_path": ".", "holdout_maps": ("segmentation=a",)}, "names segmentation, but the maps are depth"),
        ({"holdout_path": ".", "holdout_maps": ("depth=a", "depth=b")}, "source.holdout_maps names depth more than once"),
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
        ({"label_maps": ("number",)}, "its number column is int64, and maps are encoded images. Store their bytes"),
        ({"label_maps": ("mask",)}, "it has no column mask, .* Its columns are image, number; name maps of these"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, changes, words):
    pq.write_table(pa.table({"image": [picture(0)], "number": [3]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=words):
        open_source(SourceOptions(name="parquet", path=str(tmp_path), **changes), IMAGES, ["mask", "number"])
