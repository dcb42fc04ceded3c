"""From maps to images on real Ray: maps become codes, a transformer is trained on them, and samples are drawn and measured for them."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image
from tests_support import TINY_TOKENIZER, tiny_config

from cluster import checkpoints
from cluster.sample_job import SampleJobOptions, sample
from cluster.sampler_actor import SamplerActor
from cluster.train_job import train
from cluster.train_options import TrainJobOptions
from evaluation.evaluate import EvaluateOptions, evaluate, prepare, verify_record
from evaluation.feature_actor import read_view
from evaluation.records import record_id
from pipeline import inputs
from pipeline.code_dataset import CodeDataset
from pipeline.encoding import encode_views
from pipeline.sources import open_source
from pipeline.tokenize_images import TokenizeOptions, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import crop_of, render_map
from stages.config import select_sections
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import ImageOptions, SourceOptions

NUM_LABELS = 32
pytestmark = pytest.mark.ray


def config_of(folder, **sections):
    conditioning = {
        "name": "codes",
        "codes_path": f"{folder}/map-codes",
        "validation_codes_path": f"{folder}/map-holdout",
    }
    return tiny_config(folder, **{"conditioning": conditioning, **sections})


def job_on_maps(folder, split="train", **tokenizer):
    """A `tokenize` job of segmentation maps."""
    name = "map-codes" if split == "train" else "map-holdout"
    config = config_of(folder)
    options = select_sections(TokenizeOptions, config)
    given = {"path": f"{folder}/map-tokenizer", "input": "segmentation", "num_labels": NUM_LABELS, **tokenizer}
    return dataclasses.replace(
        options,
        tokenizer=dataclasses.replace(options.tokenizer, **given),
        codes=dataclasses.replace(options.codes, path=f"{folder}/{name}"),
        source=dataclasses.replace(options.source, split=split),
    )


@pytest.fixture(scope="module")
def folder(ray_cluster, tmp_path_factory):
    """Tokenizers of images and of segmentation maps, and the codes of both."""
    folder = tmp_path_factory.mktemp("conditions")
    store_tokenizer(Tokenizer(TINY_TOKENIZER), f"{folder}/tokenizer")
    of_maps = dataclasses.replace(TINY_TOKENIZER, in_channels=NUM_LABELS, codebook_size=24)
    store_tokenizer(Tokenizer(of_maps), f"{folder}/map-tokenizer")
    tokenize(select_sections(TokenizeOptions, config_of(folder)))
    for split in ("train", "holdout"):
        tokenize(job_on_maps(folder, split))
    return folder


def test_codes_of_maps_are_those_of_the_labels_one_hot(folder):
    job = job_on_maps(folder)
    dataset = CodeDataset.open(job.codes.path, verify=True)
    source = open_source(job.source, job.images)
    maps = []
    for row in source.list_images("train").to_pylist():
        example = source.decode(source.fetch(row["uri"]))
        crops = [crop_of(view, row["image_id"], *example.image.shape[:2]) for view in job.images.views]
        maps += [render_map(example.conditions["segmentation"], crop, (16, 16))[..., None] for crop in crops]
    expected = encode_views(open_tokenizer(job.tokenizer.path), np.stack(maps), job.codes, NUM_LABELS)
    assert (dataset.codes(np.arange(dataset.num_rows)) == expected).mean() > 0.999
    assert len(np.unique(expected)) > 3
    assert dataset.manifest["preprocess"]["input"] == "segmentation"


def test_labels_out_of_range_are_refused_or_quarantined(folder, tmp_path):
    few = dataclasses.replace(TINY_TOKENIZER, in_channels=2)
    store_tokenizer(Tokenizer(few), str(tmp_path / "few"))
    job = job_on_maps(folder, path=str(tmp_path / "few"), num_labels=2)
    job = dataclasses.replace(job, codes=dataclasses.replace(job.codes, path=str(tmp_path / "codes")))
    with pytest.raises(ConfigError, match="tokenizer.num_labels is 2, but the segmentation of .* has the id"):
        tokenize(job)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TesseraError, match="images are unusable .unfit-map [0-9]+"):
        patch.setattr(inputs, "check_map", lambda *given: None)  # as if the first image were a better one
        tokenize(job)


@pytest.mark.parametrize("name, num_labels", [("segmentation", NUM_LABELS), ("depth", None)])
def test_tokenizers_of_maps_are_measured_by_what_maps_are(folder, tmp_path, name, num_labels):
    of_maps = dataclasses.replace(TINY_TOKENIZER, in_channels=num_labels or 1)
    store_tokenizer(Tokenizer(of_maps), f"{tmp_path}/tokenizer")
    metrics = ["pixel_accuracy", "mean_iou", "codebook"] if num_labels else ["psnr", "ssim", "codebook"]
    given = {"path": f"{tmp_path}/tokenizer", "input": name, "num_labels": num_labels}
    sizes = {"num_samples": 24, "num_blocks": 4, "num_grid_images": 6}
    config = config_of(folder, tokenizer=given, evaluation={"path": f"{tmp_path}/evaluation", "metrics": metrics, **sizes})
    options = select_sections(EvaluateOptions, config, checkpoint=None)
    record = evaluate(options)
    assert set(record.metrics) == {*metrics[:2], "codebook_usage", "codebook_perplexity"}
    real, reconstructions = (grid_pixels(f"{tmp_path}/evaluation/{record.grids[grid]}") for grid in ("real", "reconstructions"))
    assert not np.array_equal(real, reconstructions)
    if num_labels:
        assert 0 < record.metrics["mean_iou"]["value"] < record.metrics["pixel_accuracy"]["value"] < 1
        assert record.metrics["mean_iou"]["standard_error"] > 0
        # Untrained, it gives few labels; the real maps have many, in colours.
        assert len(np.unique(real.reshape(-1, 3), axis=0)) > 5
    without_input = dataclasses.replace(options, tokenizer=dataclasses.replace(options.tokenizer, input="image", num_labels=None))
    assert verify_record(record.path, without_input) == []


def test_maps_in_files_are_tokenized_with_their_images(folder, tmp_path, caplog):
    scenes = open_source(SourceOptions(num_images=12), ImageOptions(size=24))
    for i, uri in enumerate(scenes.list_images("train")["uri"].to_pylist()):
        example = scenes.decode(scenes.fetch(uri))
        for name, pixels in (("images", example.image), ("labels", example.conditions["segmentation"])):
            os.makedirs(f"{tmp_path}/{name}", exist_ok=True)
            Image.fromarray(pixels).save(f"{tmp_path}/{name}/{i}.png")
    os.remove(f"{tmp_path}/labels/3.png")
    for i, label in ((4, NUM_LABELS), (5, 256)):  # too many for the tokenizer, and for the byte that is stored
        Image.fromarray(np.full((24, 24), label, np.uint16)).save(f"{tmp_path}/labels/{i}.png")
    job = job_on_maps(folder)
    source = SourceOptions(name="image-folder", path=f"{tmp_path}/images", label_maps=(f"segmentation={tmp_path}/labels",))
    job = dataclasses.replace(job, source=source)
    codes = dataclasses.replace(job.codes, path=f"{tmp_path}/codes", conditions=("segmentation",), max_quarantined_fraction=0.3)
    summary = tokenize(dataclasses.replace(job, codes=codes))
    dataset = CodeDataset.open(summary.dataset, verify=True)
    assert dataset.manifest["counts"]["n_quarantined"] == {"no-condition": 1, "unfit-map": 2}
    assert "1 of 12 images have no segmentation" in caplog.text
    assert dataset.num_rows == 9 * dataset.num_views and len(np.unique(dataset.codes(np.arange(dataset.num_rows)))) > 3


def grid_pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_transformer_is_trained_sampled_and_measured_for_maps(folder, caplog):
    config = config_of(folder)
    run = train(select_sections(TrainJobOptions, config))
    commit = checkpoints.open_commit(run.checkpoint)
    held_out = CodeDataset.open(config.conditioning.validation_codes_path, verify=False)
    assert commit.content["transformer"]["num_classes"] == 24 and commit.content["transformer"]["num_prefix_tokens"] == 64
    summary = sample(select_sections(SampleJobOptions, config, checkpoint=run.checkpoint))
    drawn = np.load(f"{summary.samples}/samples.npz")
    assert np.array_equal(drawn["labels"], held_out.codes(2 * np.arange(6)))
    assert drawn["images"].shape == (6, 16, 16, 3) and Image.open(f"{summary.samples}/grid.png").size[0] > 16
    measured = evaluate(select_sections(EvaluateOptions, config, checkpoint=run.checkpoint))
    assert measured.metrics["validation_nll"]["value"] == pytest.approx(likelihood_of(config, run.checkpoint, held_out), rel=1e-6)
    elsewhere = dataclasses.replace(config.conditioning, validation_codes_path=None)
    other = prepare(
        select_sections(EvaluateOptions, dataclasses.replace(config, conditioning=elsewhere), checkpoint=run.checkpoint)
    )
    assert record_id(other.identity) != measured.id, "samples for other maps are another evaluation"
    assert "24 of 24" not in caplog.text and "likelihood is left out: it needs the center view" in caplog.text
    assert "validation_nll" not in other.identity["metrics"]
    other_scenes = dataclasses.replace(config, source=dataclasses.replace(config.source, seed=1))
    with pytest.raises(ArtefactError, match="map-holdout was made of other images than the held-out images of the source: image_id"):
        prepare(select_sections(EvaluateOptions, other_scenes, checkpoint=run.checkpoint))


def likelihood_of(config, checkpoint, conditions):
    """Nats per code of the held-out images, each under the codes of its own map."""
    actor = SamplerActor(checkpoint, config.tokenizer.path, config.sampling, conditions_path=conditions.path)
    source = open_source(config.source, config.images)
    rows = source.list_images("holdout").to_pylist()
    images = np.stack([read_view(source, row["uri"], config.images, config.tokenizer) for row in rows])
    codes = encode_views(open_tokenizer(config.tokenizer.path), images, config.codes)
    by_id = dict(zip(conditions.image_ids(2 * np.arange(24)).tolist(), conditions.codes(2 * np.arange(24))))
    labels = np.stack([by_id[row["image_id"]] for row in rows]).astype(np.int64)
    nll = actor.nll(codes, labels)
    assert np.abs(nll - actor.nll(codes, labels[::-1])).max() > 1e-3, "maps of others must not give the same"
    return nll.mean() / codes.shape[1]
