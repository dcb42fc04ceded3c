import numpy as np
import pytest
import torch

from evaluation.feature_actor import FeatureActor, read_view
from evaluation.metrics import plan_metrics
from evaluation.pixel_metrics import psnr, ssim
from pipeline.sources import open_source
from pipeline.tokenizers import store_tokenizer
from stages.errors import TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig
from stages.options import EvaluationOptions, ImageOptions, SourceOptions, TokenizerOptions

IMAGES = ImageOptions(size=16)
OPTIONS = EvaluationOptions(extractor_resolution=32)
PLAN = plan_metrics(OPTIONS)
(KEY,) = PLAN.features()


class FaultySource:
    """Scenes in a storage that refuses the uri `denied` and has lost `gone`."""

    def __init__(self):
        self.scenes = open_source(SourceOptions(num_images=4), IMAGES)
        self.uris = self.scenes.list_images("train")["uri"].to_pylist()

    def fetch(self, uri: str) -> bytes:
        if uri == "denied":
            raise PermissionError("access denied")
        if uri == "gone":
            raise FileNotFoundError("no such file")
        return self.scenes.fetch(uri)

    def decode(self, data: bytes):
        return self.scenes.decode(data)


@pytest.fixture(scope="module")
def actor(tmp_path_factory) -> FeatureActor:
    torch.manual_seed(0)
    config = TokenizerConfig(
        resolution=16,
        in_channels=3,
        codebook_size=32,
        codebook_dim=4,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
    )
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    store_tokenizer(Tokenizer(config), folder)
    return FeatureActor(FaultySource(), IMAGES, OPTIONS, PLAN, TokenizerOptions(path=folder))


def test_held_out_images_come_with_reconstructions_codes_and_labels(actor):
    uris = actor.source.uris
    labels = np.array([3, 1, 4, 1])
    images, codes, usable_labels = actor.of_holdout([uris[0], "gone", *uris[2:]], labels, tiles=[1, 2])
    assert images.is_usable.tolist() == [True, False, True, True]
    assert usable_labels.tolist() == [3, 4, 1]
    assert codes.shape == (3, 16) and images.features[KEY].shape == (3, 1280)
    assert list(images.tiles) == [2]
    real, reconstruction = images.tiles[2]
    np.testing.assert_array_equal(real, read_view(actor.source, uris[2], IMAGES, TokenizerOptions()))
    assert psnr(real[None], reconstruction[None])[0] == pytest.approx(images.pixels["psnr"][1])
    assert ssim(real[None], reconstruction[None])[0] == pytest.approx(images.pixels["ssim"][1])
    sample, tiles = actor.of_images(np.stack([real]), [0])
    np.testing.assert_array_equal(sample[KEY], actor.of_reference([uris[2]], [KEY])[0][KEY])
    np.testing.assert_array_equal(tiles[0], real)
    assert np.abs(actor.of_damaged([uris[2]], [KEY])[KEY] - sample[KEY]).max() > 0.1


def test_extractors_compute_in_full_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    FeatureActor(FaultySource(), IMAGES, OPTIONS, PLAN, None)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_an_item_without_a_usable_image_is_empty(actor):
    images, codes, labels = actor.of_holdout(["gone"], np.array([0]), tiles=[0])
    assert (len(images.features[KEY]), len(images.pixels["psnr"]), codes.shape, len(labels)) == (0, 0, (0, 16), 0)
    features, is_usable, _ = actor.of_reference(["gone", actor.source.uris[0]], [KEY])
    assert len(features[KEY]) == 1 and is_usable.tolist() == [False, True]


def test_pictures_are_the_views_of_images_that_can_be_used(actor):
    uris = actor.source.uris
    found = actor.pictures([uris[1], "gone", uris[0]])
    assert list(found) == [uris[1], uris[0]]
    for uri, picture in found.items():
        np.testing.assert_array_equal(picture, read_view(actor.source, uri, IMAGES, TokenizerOptions()))


def test_a_storage_fault_is_no_bad_image(actor, monkeypatch):
    monkeypatch.setattr("pipeline.fetch.READ_RETRY_SECONDS", 0.0)
    with pytest.raises(TesseraError, match="denied is listed, but it cannot be read"):
        actor.of_reference(["denied"], [KEY])
