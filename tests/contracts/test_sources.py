"""What every source must do. A new entry of SOURCES is tested by itself, on a folder with images in every form."""

import gzip
import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources import SOURCES, open_source
from pipeline.views import apply_view
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

NUM_IMAGES = 40
IMAGES = ImageOptions(size=16)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_idx(path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of image files, a Parquet file and IDX files, side by side."""
    root = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        (root / f"class{i % 4}").mkdir(exist_ok=True)
        (root / f"class{i % 4}" / f"{i}.png").write_bytes(png(i))
    columns = {"image": [png(i) for i in range(NUM_IMAGES)], "label": [i % 4 for i in range(NUM_IMAGES)]}
    pq.write_table(pa.table(columns), root / "images.parquet", row_group_size=7)
    for prefix in ("train", "t10k"):
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 28, 28), dtype=np.uint8)
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", np.arange(NUM_IMAGES, dtype=np.uint8) % 10)
    return root


@pytest.fixture(params=sorted(SOURCES))
def make_source(request, folder):
    """Opens the source under test; keyword arguments go to its options."""

    def make(**changes):
        settings = {"path": str(folder), "holdout_fraction": 0.3, "num_images": 20, "num_holdout_images": 5, **changes}
        return open_source(SourceOptions(name=request.param, **settings), IMAGES)

    return make


def test_the_listing_has_the_promised_columns(make_source):
    table = make_source().list_images("train")
    assert table.schema.field("image_id").type == pa.int64() and table["image_id"].null_count == 0
    assert table.schema.field("uri").type == pa.string() and table["uri"].null_count == 0
    assert table.schema.field("label").type == pa.int32()
    assert table.schema.field("num_bytes").type == pa.int64()
    assert table.schema.field("etag").type == pa.string()


def test_ids_and_uris_are_unique_and_splits_are_disjoint(make_source):
    train, holdout = (make_source().list_images(split) for split in ("train", "holdout"))
    both = pa.concat_tables([train, holdout])
    assert len(pc.unique(both["image_id"])) == len(pc.unique(both["uri"])) == len(both)


def test_two_listings_are_equal(make_source):
    for split in ("train", "holdout"):
        assert make_source().list_images(split).equals(make_source().list_images(split))


def test_fewer_images_are_the_first_of_more(make_source):
    more, fewer = (make_source(num_images=n).list_images("train") for n in (20, 6))
    assert len(more) == 20 and fewer.equals(more.slice(0, 6))


def test_labels_are_numbers_of_class_names(make_source):
    source = make_source()
    labels = source.list_images("train")["label"]
    if source.class_names:
        assert labels.null_count == 0
        assert 0 <= pc.min(labels).as_py() and pc.max(labels).as_py() < len(source.class_names)
        assert len(set(source.class_names)) == len(source.class_names)
    else:
        assert labels.null_count == len(labels)


def test_every_listed_image_can_be_fetched_decoded_and_viewed(make_source):
    source = make_source()
    for split in ("train", "holdout"):
        for uri in source.list_images(split)["uri"].to_pylist():
            image = source.decode(source.fetch(uri)).image
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] in (1, 3)
            assert apply_view(image, "center", IMAGES).shape == (16, 16, 3)


def test_conditions_are_aligned_with_the_image(make_source):
    source = make_source()
    example = source.decode(source.fetch(source.list_images("train")["uri"][0].as_py()))
    for name in {"segmentation", "depth", "edges"} & set(example.conditions):
        assert example.conditions[name].shape == example.image.shape[:2]


def test_fetching_and_decoding_twice_gives_the_same(make_source):
    source, other = make_source(), make_source()
    uri = source.list_images("train")["uri"][3].as_py()
    assert source.fetch(uri) == other.fetch(uri)
    assert np.array_equal(source.decode(source.fetch(uri)).image, other.decode(other.fetch(uri)).image)


def test_a_source_survives_the_way_to_another_process(make_source):
    source = make_source()
    uri = source.list_images("train")["uri"][0].as_py()
    travelled = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 10_000
    assert travelled.class_names == source.class_names and travelled.fetch(uri) == source.fetch(uri)


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\0" * 5000], ids=["empty", "text", "zeros"])
def test_bytes_that_are_no_image_are_bad_images(make_source, data):
    with pytest.raises(BadImage):
        make_source().decode(data)


def test_a_path_that_is_missing_is_refused_by_name(make_source, tmp_path):
    source_name = make_source().options.name
    if source_name == "scenes":
        assert len(make_source(path=None).list_images("train")) == 20
        return
    with pytest.raises(ConfigError, match=f"source.path is {tmp_path}/nowhere, but"):
        make_source(path=str(tmp_path / "nowhere")).list_images("train")
