import dataclasses
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from code_dataset_support import files_of
from PIL import Image
from tests_support import TINY_TOKENIZER

from pipeline import storage, tokenize_images
from pipeline.binding import check_dataset
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.parts import CROP_COLUMNS
from pipeline.code_dataset.verify import verify_code_dataset
from pipeline.encoding import encode_views
from pipeline.shard_jobs import shards_per_decoder, share_per_actor
from pipeline.sources import open_source
from pipeline.tokenize_images import TokenizeOptions, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import apply_view, crop_of, expand_views, render, render_map
from stages.errors import ArtefactError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

NUM_IMAGES = 40
BAD = {"a/text.png": b"this is no image", "b/empty.png": b"", "b/half.png": None}


def png(seed, size=(20, 24)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 images of two classes, and three files that only look like images."""
    folder = tmp_path_factory.mktemp("images")
    contents = {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(NUM_IMAGES)}
    for name, data in {**contents, **BAD, "b/half.png": png(99)[:300]}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def stored_tokenizer(folder):
    torch.manual_seed(0)
    store_tokenizer(Tokenizer(TINY_TOKENIZER), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def options(images, tmp_path_factory):
    """Of a job whose dataset has not been written yet."""
    return TokenizeOptions(
        source=SourceOptions(name="image-folder", path=images),
        images=ImageOptions(size=16, views=("center", "flip")),
        tokenizer=TokenizerOptions(path=stored_tokenizer(tmp_path_factory.mktemp("tokenizer"))),
        codes=CodesOptions(
            path=str(tmp_path_factory.mktemp("codes") / "codes"),
            shard_size=6,
            encode_batch_size=8,
            max_quarantined_fraction=0.1,
        ),
    )


@pytest.fixture(scope="module")
def summary(options, ray_cluster):
    return tokenize(options)


def with_codes(options, **changes):
    return dataclasses.replace(options, codes=dataclasses.replace(options.codes, **changes))


def with_source(options, **changes):
    return dataclasses.replace(options, source=SourceOptions(**changes))


@pytest.fixture(scope="module")
def unswept(options, tmp_path_factory, ray_cluster):
    """The dataset as a job leaves it that is killed once it has published: its shards are still there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_images, "collect_garbage", lambda root: [])
        return tokenize(with_codes(options, path=str(tmp_path_factory.mktemp("unswept") / "codes")))


def copy_dataset(source, target, leave_out=lambda name: False):
    for path in storage.list_files(source):
        name = path[len(source) + 1 :]
        if not leave_out(name):
            storage.put_file_if_absent(storage.join(target, name), path)
    return target


@pytest.mark.ray
def test_the_dataset_holds_the_codes_of_every_view(options, summary):
    dataset = CodeDataset.open(summary.dataset, verify=True)
    source = open_source(options.source, options.images)
    listing = {row["image_id"]: row for row in source.list_images("train").to_pylist()}
    assert (dataset.num_images, dataset.num_rows) == (NUM_IMAGES, 2 * NUM_IMAGES)
    rows = np.arange(dataset.num_rows)
    ids = dataset.image_ids(rows)
    assert len(set(ids)) == NUM_IMAGES
    np.testing.assert_array_equal(ids[::2], ids[1::2])
    np.testing.assert_array_equal(dataset.views(rows), rows % 2)
    np.testing.assert_array_equal(dataset.labels(rows), [listing[i]["label"] for i in ids])
    views = []
    for image_id in ids[::2]:
        image = source.decode(source.fetch(listing[image_id]["uri"])).image
        views += [apply_view(image, view, options.images) for view in options.images.views]
    codes = dataset.codes(rows)
    expected = encode_views(open_tokenizer(options.tokenizer.path), np.stack(views), options.codes)
    assert (codes == expected).mean() > 0.999  # near ties may fall either way in another batch
    assert len(np.unique(codes)) > 3


@pytest.mark.ray
def test_the_summary_is_what_was_written(options, summary):
    assert dataclasses.asdict(summary) == {
        "dataset": options.codes.path,
        "root_hash": CodeDataset.open(options.codes.path, verify=True).root_hash,
        "num_rows": 2 * NUM_IMAGES,
        "num_quarantined": len(BAD),
        "bytes_per_row": 64 * 5 // 8,
    }
    assert verify_code_dataset(options.codes.path) == []


@pytest.mark.ray
def test_the_dataset_is_bound_to_its_tokenizer_images_and_arithmetic(options, summary):
    dataset = CodeDataset.open(summary.dataset, verify=True)
    check_dataset(dataset, options.tokenizer, options.images)
    assert len(dataset.manifest["probe"]["codes"]) == 64
    assert dataset.manifest["encode"] == {"precision": "fp32", "tf32": False, "batch_size": 8}
    assert sum(encoder["num_shards"] for encoder in dataset.manifest["encoders"]) == 8


@pytest.mark.ray
def test_what_is_not_an_image_is_quarantined_with_its_reason(images, summary):
    files = storage.list_files(storage.join(summary.dataset, "quarantine"))
    rows = {Path(row["uri"]).name: row for file in files for row in pq.read_table(file).to_pylist()}
    assert set(rows) == {Path(name).name for name in BAD}
    assert rows["empty.png"]["kind"] == "empty" and rows["empty.png"]["sha256"] == hashlib.sha256(b"").hexdigest()
    assert rows["text.png"]["sha256"] == hashlib.sha256(BAD["a/text.png"]).hexdigest()
    assert all(row["stage"] == "decode" and row["message"] for row in rows.values())
    counts = CodeDataset.open(summary.dataset, verify=False).manifest["counts"]
    assert counts["n_input"] == NUM_IMAGES + sum(counts["n_quarantined"].values()) == NUM_IMAGES + len(BAD)


@pytest.mark.ray
def test_a_finished_dataset_is_left_alone(options, summary):
    files = {path: os.stat(path).st_mtime_ns for path in storage.list_files(summary.dataset)}
    assert tokenize(options) == summary
    assert {path: os.stat(path).st_mtime_ns for path in storage.list_files(summary.dataset)} == files


@pytest.mark.ray
def test_shards_are_gone_once_they_are_published(options, summary, unswept, tmp_path):
    assert files_of(summary.dataset, "shards") == [] and len(files_of(unswept.dataset, "shards")) == 8
    folder = copy_dataset(unswept.dataset, str(tmp_path / "codes"))
    again = tokenize(with_codes(options, path=folder))
    assert again.root_hash == summary.root_hash and files_of(folder, "shards") == []
    assert verify_code_dataset(folder) == []


@pytest.mark.ray
def test_other_encoders_complete_a_dataset_to_the_same_root_hash(options, summary, unswept, tmp_path):
    """Half of the shards are there already; encoders that hold every CPU do the rest."""

    def is_missing(name):
        return name.startswith(("versions", "manifests", "data")) or (
            name.startswith("receipts") and int(Path(name).stem) % 2
        )

    folder = copy_dataset(unswept.dataset, str(tmp_path / "codes"), leave_out=is_missing)
    receipts = {path: os.stat(path).st_mtime_ns for path in files_of(folder, "receipts")}
    finished = tokenize(with_codes(options, path=folder, num_encoder_actors=2))
    assert finished.root_hash == summary.root_hash
    assert len(receipts) == 4 and {path: os.stat(path).st_mtime_ns for path in receipts} == receipts
    assert verify_code_dataset(folder) == []


@pytest.mark.ray
def test_the_rows_do_not_depend_on_the_size_of_a_shard(options, summary, tmp_path):
    """Nor on whether so many shards are compacted in Ray tasks."""
    one = CodeDataset.open(summary.dataset, verify=True)
    other = CodeDataset.open(
        tokenize(with_codes(options, path=str(tmp_path / "codes"), shard_size=2)).dataset, verify=True
    )
    assert other.manifest["plan_fp"] != one.manifest["plan_fp"]
    rows = np.arange(one.num_rows)
    assert other.describe(rows).equals(one.describe(rows))
    np.testing.assert_array_equal(other.labels(rows), one.labels(rows))
    assert (other.codes(rows) == one.codes(rows)).mean() > 0.999  # near ties may fall either way in another batch


@pytest.mark.ray
@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_the_same_file_twice_is_reported_and_dropped_on_demand(options, ray_cluster, tmp_path, drop_duplicates):
    contents = (0, 1, 2, 1, 0)
    for number, seed in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(png(seed))
    job = with_source(options, name="image-folder", path=str(tmp_path))
    root = tokenize(
        with_codes(job, path=str(tmp_path / "codes"), shard_size=2, drop_duplicates=drop_duplicates)
    ).dataset
    originals, pairs = {}, []
    for row in open_source(job.source, job.images).list_images("train").to_pylist():
        first = originals.setdefault(contents[int(Path(row["uri"]).stem)], row["image_id"])
        pairs.append((row["image_id"], first))
    repeated = [pair for pair in pairs if pair[0] != pair[1]]
    (file,) = files_of(root, "duplicates")
    assert [(row["image_id"], row["first_image_id"]) for row in pq.read_table(file).to_pylist()] == repeated
    dataset = CodeDataset.open(root, verify=True)
    counts = dataset.manifest["counts"]
    assert (counts["n_input"], counts["n_duplicates"], counts["n_dedup_dropped"]) == (5, 2, 2 * drop_duplicates)
    kept = [image_id for image_id, first in pairs if image_id == first or not drop_duplicates]
    assert dataset.image_ids(np.arange(dataset.num_rows))[::2].tolist() == kept
    assert verify_code_dataset(root) == []


@pytest.fixture(scope="module")
def rich(options, ray_cluster, tmp_path_factory):
    """Scenes with many crops and two kinds of condition maps: the options, the dataset and its examples by image id."""
    job = with_source(options, name="scenes", num_images=5)
    images = dataclasses.replace(options.images, views=("center", "ten-crop@1.2", "random-crop:3@0.6"))
    job = dataclasses.replace(job, images=images)
    path = str(tmp_path_factory.mktemp("rich") / "codes")
    job = with_codes(job, path=path, conditions=("segmentation", "depth"), shard_size=3, row_group_rows=16)
    dataset = CodeDataset.open(tokenize(job).dataset, verify=True)
    source = open_source(job.source, job.images)
    listing = source.list_images("train").to_pylist()
    return job, dataset, {row["image_id"]: source.decode(source.fetch(row["uri"])) for row in listing}


def crops_of(job, examples):
    """Of every row: its example and its crop."""
    views = expand_views(job.images.views)
    return [(example, crop_of(view, i, *example.image.shape[:2])) for i, example in examples.items() for view in views]


@pytest.mark.ray
def test_rows_of_many_crops_know_where_they_lie_and_hold_their_codes(rich):
    job, dataset, examples = rich
    crops = crops_of(job, examples)
    assert dataset.num_rows == len(crops) == 5 * 14 and dataset.manifest["views"][1] == "ten-crop@1.2/0"
    rows = np.arange(len(crops))
    found = [tuple(row[name] for name in CROP_COLUMNS) for row in dataset.describe(rows).to_pylist()]
    expected = [(c.left, c.top, c.width, c.height, c.is_flipped) for _, c in crops]
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=1e-6)
    assert len(set(found)) == 1 + 10 + 5 * 3, "scenes are equally large, and only random crops are of their own"
    pixels = np.stack([render(example.image, crop, job.images) for example, crop in crops])
    codes = encode_views(open_tokenizer(job.tokenizer.path), pixels, job.codes)
    assert (dataset.codes(rows) == codes).mean() > 0.999  # near ties may fall either way in another batch


@pytest.mark.ray
def test_conditions_are_stored_under_the_same_crop(rich):
    job, dataset, examples = rich
    assert dataset.conditions == ("segmentation", "depth") and dataset.row_group_rows == 16
    for name in dataset.conditions:
        maps = [render_map(example.conditions[name], crop, dataset.grid) for example, crop in crops_of(job, examples)]
        found = dataset.condition(name, np.arange(dataset.num_rows))
        np.testing.assert_array_equal(found, np.stack(maps).reshape(-1, 64))
        assert len(np.unique(found)) > 3
    assert verify_code_dataset(dataset.path) == []


@pytest.mark.ray
def test_decoding_runs_beside_encoding_where_there_are_cpus_for_both(ray_cluster):
    assert shards_per_decoder(num_encoder_actors=1)
    assert shards_per_decoder(num_encoder_actors=2) is None
    assert share_per_actor("GPU", num_actors=1) == 0


@pytest.mark.ray
def test_too_many_bad_images_fail_the_job_before_anything_is_published(options, ray_cluster, tmp_path):
    path = str(tmp_path / "codes")
    with pytest.raises(TesseraError) as error:
        tokenize(with_codes(options, path=path, max_quarantined_fraction=0.05))
    assert "3 of 43 images are unusable" in str(error.value) and ".png" in str(error.value)
    assert storage.list_files(storage.join(path, "versions")) == []
    assert tokenize(with_codes(options, path=path, max_quarantined_fraction=0.1)).num_quarantined == 3


@pytest.mark.ray
def test_images_that_were_missing_are_read_once_their_receipt_is_removed(options, ray_cluster, tmp_path):
    pq.write_table(pa.table({"uri": [f"images/{i}.png" for i in range(4)]}), tmp_path / "list.parquet")
    source = SourceOptions(name="parquet", path=str(tmp_path / "list.parquet"))
    job = with_codes(dataclasses.replace(options, source=source), path=str(tmp_path / "codes"))
    with pytest.raises(Exception, match="neither it nor any other of the 4 images of shard 0 is there"):
        tokenize(job)
    assert storage.list_files(storage.join(job.codes.path, "receipts")) == []
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    with pytest.raises(TesseraError, match="1 of 4 images are unusable .missing 1.") as error:
        tokenize(job)
    (receipt,) = storage.list_files(storage.join(job.codes.path, "receipts"))
    assert f"receipts of the same numbers under {job.codes.path}/receipts" in str(error.value)
    (tmp_path / "images" / "3.png").write_bytes(png(3))
    os.remove(receipt)
    assert tokenize(job).num_quarantined == 0
    assert verify_code_dataset(job.codes.path) == []


@pytest.mark.ray
def test_a_source_with_only_bad_images_fails(options, ray_cluster, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    source = SourceOptions(name="image-folder", path=str(tmp_path / "images"))
    job = with_codes(options, path=str(tmp_path / "codes"), max_quarantined_fraction=1.0)
    with pytest.raises(TesseraError, match="1 of 1 images are unusable"):
        tokenize(dataclasses.replace(job, source=source))


@pytest.mark.ray
def test_a_storage_fault_fails_the_job(options, ray_cluster, tmp_path):
    """A path that is a folder cannot be read, but that is not what its bytes are like."""
    (tmp_path / "1.png").mkdir()
    (tmp_path / "list.txt").write_text("1.png\n")
    source = SourceOptions(name="image-folder", path=str(tmp_path / "list.txt"))
    job = with_codes(options, path=str(tmp_path / "codes"), max_quarantined_fraction=1.0)
    with pytest.raises(Exception, match="IsADirectoryError"):
        tokenize(dataclasses.replace(job, source=source))
    assert storage.list_files(storage.join(job.codes.path, "receipts")) == []


@pytest.mark.ray
def test_another_plan_in_the_folder_is_refused(options, summary):
    for job in (
        with_codes(options, encode_batch_size=4),
        with_codes(options, encode_precision="bf16"),
        with_codes(options, remap_unused=True),
        dataclasses.replace(options, images=dataclasses.replace(options.images, views=("center",))),
        dataclasses.replace(options, source=dataclasses.replace(options.source, num_images=10)),
    ):
        with pytest.raises(ArtefactError, match="holds a code dataset of plan"):
            tokenize(job)
