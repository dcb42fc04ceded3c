import pytest

from evaluation.metrics import METRICS, plan_metrics
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES
from stages.errors import ConfigError
from stages.options import EvaluationOptions


def plan(*metrics: str, extractor: str = "efficientnet-lite0", sets=(SAMPLES, RECONSTRUCTIONS, HOLDOUT)):
    return plan_metrics(EvaluationOptions(metrics=metrics, extractor=extractor), sets)


def names(*metrics: str, extractor: str = "efficientnet-lite0") -> list[str]:
    return [metric.record_name(SAMPLES) for metric in plan(*metrics, extractor=extractor).sets]


def test_fid_and_kid_are_names_of_fids_inception_alone():
    assert names("fd", "kd") == ["gfd", "gkd"]
    assert names("fd", "kd", extractor="inception-v3") == ["gfid", "gkid"]
    assert names("fd", "kd", extractor="inception-v3-clean") == ["gfid", "gkid"]
    assert names("fid", "kid") == ["gfid", "gkid"]
    with pytest.raises(ConfigError, match="fid is defined on inception-v3"):
        plan("fid@efficientnet-lite0")
    with pytest.raises(ConfigError, match="cmmd is defined on clip-vitl14-336"):
        plan("cmmd@clip-vitb32")


def test_metrics_bring_the_network_they_are_defined_on():
    found = plan("fd", "sfid", "inception_score", "cmmd", "fd@dinov2-vitl14")
    assert found.extractors() == ["efficientnet-lite0", "inception-v3", "clip-vitl14-336", "dinov2-vitl14"]
    assert ("inception-v3", "spatial") in found.features() and ("inception-v3", "logits") in found.features()
    assert plan("fid", extractor="inception-v3-clean").extractors() == ["inception-v3-clean"]
    assert not found.needs_reference(("inception-v3", "logits")) and found.is_pairwise(("clip-vitl14-336", "features"))


def test_names_say_of_which_set_and_extractor_a_value_is():
    fd, other, recall, score = plan("fd", "fd@dinov2-vitl14", "precision_recall", "inception_score").sets
    assert [fd.record_name(s) for s in (SAMPLES, RECONSTRUCTIONS, HOLDOUT)] == ["gfd", "rfd", "fd_holdout"]
    assert other.record_name(HOLDOUT) == "fd_dinov2_vitl14_holdout"
    assert recall.record_name(SAMPLES, "precision") == "precision"
    assert score.record_name(RECONSTRUCTIONS) == "inception_score_reconstructions"


def test_what_is_unknown_or_named_twice_is_refused():
    for written in ("fdi", "psnr@inception-v3", "@inception-v3", ""):
        with pytest.raises(ConfigError, match="evaluation.metrics names"):
            plan(written)
    with pytest.raises(ConfigError, match="evaluation.extractor is nothing"):
        plan("fd@nothing")
    for twice in (("fd", "fd"), ("psnr", "psnr"), ("fid", "fid@inception-v3"), ("fd@efficientnet-lite0", "fd")):
        with pytest.raises(ConfigError, match="more than once"):
            plan(*twice)


def test_a_tokenizer_alone_has_no_samples_and_no_likelihood():
    found = plan(*METRICS[:1], "psnr", "likelihood", "codebook", sets=(RECONSTRUCTIONS, HOLDOUT))
    assert not found.has_likelihood and found.has_codebook and found.pixels == ("psnr",)


def test_codes_are_compared_where_memorisation_is_looked_for_in_samples():
    assert plan("fd", "memorisation@dinov2-vitl14").has_code_matches
    assert not plan("fd", "kd").has_code_matches
    assert not plan("memorisation", sets=(RECONSTRUCTIONS, HOLDOUT)).has_code_matches
