import dataclasses
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests_support import TINY_TOKENIZER

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.verify import verify_code_dataset
from pipeline.images import apply_view
from pipeline.shard_tasks import encode_views
from pipeline.sources import open_source
from pipeline.tokenize_images import TokenizeOptions, gpus_per_encoder, shards_per_decoder, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from stages.config import to_yaml
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

ROOT = Path(__file__).parents[2]
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


def stored_tokenizer(folder, **changes):
    torch.manual_seed(0)
    store_tokenizer(Tokenizer(dataclasses.replace(TINY_TOKENIZER, **changes)), str(folder))
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
def test_other_encoders_complete_a_dataset_to_the_same_root_hash(options, summary, tmp_path):
    """Half of the shards are there already; encoders that hold every CPU do the rest."""
    folder = str(tmp_path / "codes")
    for path in storage.list_files(summary.dataset):
        name = path[len(summary.dataset) + 1 :]
        is_late = name.startswith(("versions", "manifests"))
        if not is_late and not (name.startswith("receipts") and int(Path(name).stem) % 2):
            storage.put_file_if_absent(storage.join(folder, name), path)
    finished = tokenize(with_codes(options, path=folder, num_encoder_actors=2))
    assert finished.root_hash == summary.root_hash
    assert verify_code_dataset(folder) == []


@pytest.mark.ray
def test_decoding_runs_beside_encoding_where_there_are_cpus_for_both(ray_cluster):
    assert shards_per_decoder(num_encoder_actors=1)
    assert shards_per_decoder(num_encoder_actors=2) is None
    assert gpus_per_encoder(num_encoder_actors=1) == 0


@pytest.mark.ray
def test_too_many_bad_images_fail_the_job_before_anything_is_published(options, ray_cluster, tmp_path):
    path = str(tmp_path / "codes")
    with pytest.raises(TesseraError) as error:
        tokenize(with_codes(options, path=path, max_quarantined_fraction=0.05))
    assert "3 of 43 images are unusable" in str(error.value) and ".png" in str(error.value)
    assert storage.list_files(storage.join(path, "versions")) == []
    assert tokenize(with_codes(options, path=path, max_quarantined_fraction=0.1)).num_quarantined == 3


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
        dataclasses.replace(options, images=dataclasses.replace(options.images, views=("center",))),
        dataclasses.replace(options, source=dataclasses.replace(options.source, num_images=10)),
    ):
        with pytest.raises(ArtefactError, match="holds a code dataset of plan"):
            tokenize(job)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 17}, "images.size is 17"),
        ({"channels": 1}, "images.channels is 1"),
        ({"views": ("center", "mirror")}, "images.views is"),
        ({"views": ("flip", "flip")}, "each once"),
        ({"views": ()}, "at least one view"),
    ],
)
def test_images_that_do_not_fit_are_refused(options, tmp_path, change, message):
    job = with_codes(options, path=str(tmp_path / "codes"))
    with pytest.raises(ConfigError, match=message):
        tokenize(dataclasses.replace(job, images=dataclasses.replace(options.images, **change)))
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


@pytest.mark.ray
@pytest.mark.parametrize("num_kills", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_drivers_lose_and_repeat_nothing(options, summary, place, num_kills, tmp_path, request):
    path = str(tmp_path / "codes") if place == "local" else request.getfixturevalue("s3")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(with_codes(options, path=path)))
    command = [sys.executable, "ray_job.py", "tokenize", "-c", str(config), "--json"]
    choice = random.Random(0)
    for kill in range(num_kills):
        driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=DEVNULL, stderr=DEVNULL)
        wait_for_progress(driver, path, num_receipts=kill * 7 // num_kills + 2)
        time.sleep(choice.random() * 0.2)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    finished = subprocess.run(command, cwd=ROOT, stdout=PIPE, stderr=PIPE)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout.splitlines()[-1])["root_hash"] == summary.root_hash
    assert verify_code_dataset(path) == []


def wait_for_progress(driver, path, num_receipts):
    """Until so many shards are done, or the job is over."""
    while driver.poll() is None and len(storage.list_files(storage.join(path, "receipts"))) < num_receipts:
        time.sleep(0.02)
