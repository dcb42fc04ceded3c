"""Which metrics there are, and what an evaluation of some of them needs. `tests/contracts/test_metrics.py` checks every
one.

Metrics of sets of images are classes over features of an extractor; metrics of reconstructions are functions per image;
`codebook` and `likelihood` come from codes. Records name the metrics as the field does: FID and KID only over FID's
Inception-v3, on other extractors they are the Fréchet distance (fd) and the kernel distance (kd).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.extractors import FEATURES, LOGITS, SPATIAL, extractor_class
from evaluation.gaussian_metric import FrechetDistance
from evaluation.inception_score import InceptionScore
from evaluation.kernel_metrics import ClipMeanDiscrepancy, KernelDistance
from evaluation.neighbour_metrics import DensityCoverage, NearestTraining, PrecisionRecall
from evaluation.pixel_metrics import PIXEL_METRICS
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, SetMetric
from pipeline.inputs import IMAGE
from stages.errors import ConfigError
from stages.options import EvaluationOptions, TokenizerOptions

# An extractor, and which of its outputs.
FeatureKey = tuple[str, str]
INCEPTION, CLIP = "inception-v3", "clip-vitl14-336"


@dataclass(frozen=True)
class SetMetricKind:
    """A metric of sets of images.

    Attributes:
        cls: measures it.
        output: of the extractor.
        family: the network that the metric is defined on; None: any.
        inception_name: what it is called on FID's Inception.
    """

    cls: type[SetMetric]
    output: str = FEATURES
    family: str | None = None
    inception_name: str | None = None


SET_METRICS: dict[str, SetMetricKind] = {
    "fd": SetMetricKind(FrechetDistance, inception_name="fid"),
    "fid": SetMetricKind(FrechetDistance, family=INCEPTION),
    "sfid": SetMetricKind(FrechetDistance, output=SPATIAL, family=INCEPTION),
    "kd": SetMetricKind(KernelDistance, inception_name="kid"),
    "kid": SetMetricKind(KernelDistance, family=INCEPTION),
    "cmmd": SetMetricKind(ClipMeanDiscrepancy, family=CLIP),
    "inception_score": SetMetricKind(InceptionScore, output=LOGITS, family=INCEPTION),
    "precision_recall": SetMetricKind(PrecisionRecall),
    "density_coverage": SetMetricKind(DensityCoverage),
    "memorisation": SetMetricKind(NearestTraining),
}
# What of these is measured on reconstructed maps, and on nothing else.
LABEL_METRICS = ("pixel_accuracy", "mean_iou")
METRICS_OF_LABELS, METRICS_OF_NUMBERS = (*LABEL_METRICS, "codebook"), ("psnr", "ssim", "codebook")
CODE_METRICS = {
    "codebook": "share of the codebook that held-out images use, and the perplexity of that use",
    "likelihood": "negative log-likelihood of held-out images, in nats per code and bits per image",
}
METRICS = (*SET_METRICS, *PIXEL_METRICS, "mean_iou", *CODE_METRICS)


@dataclass(frozen=True, kw_only=True)
class PlannedSetMetric:
    """A metric of sets as it will be measured.

    Attributes:
        name: in records, without what says which set it is of.
        suffix: of that name, where the extractor is not `evaluation.extractor`.
        kind: how it is measured.
        extractor: name of the extractor.
    """

    name: str
    suffix: str
    kind: SetMetricKind
    extractor: str

    @property
    def features(self) -> FeatureKey:
        return self.extractor, self.kind.output

    def record_name(self, image_set: str, part: str = "") -> str:
        """Name in a record of one of its values. Distances of samples and reconstructions are `g…` and `r…`."""
        stem = (part or self.name) + self.suffix
        if image_set == HOLDOUT:
            return f"{stem}_holdout"
        if issubclass(self.kind.cls, FrechetDistance | KernelDistance | ClipMeanDiscrepancy):
            return ("g" if image_set == SAMPLES else "r") + stem
        return stem if image_set == SAMPLES else f"{stem}_{image_set}"

    def record_names(self, image_set: str) -> list[str]:
        """Names in a record of all of its values."""
        return [self.record_name(image_set, part) for part in self.kind.cls.parts]


@dataclass(frozen=True, kw_only=True)
class MetricPlan:
    """What `evaluation.metrics` asks for.

    Attributes:
        sets: metrics of sets of images.
        pixels: names of metrics of reconstructions, per image.
        has_mean_iou, has_codebook, has_likelihood: whether these are measured.
        has_code_matches: whether codes of samples are compared with those of the training data.
    """

    sets: tuple[PlannedSetMetric, ...]
    pixels: tuple[str, ...]
    has_mean_iou: bool
    has_codebook: bool
    has_likelihood: bool
    has_code_matches: bool

    def features(self) -> list[FeatureKey]:
        """(extractor, output) pairs that are needed, the first metric's first."""
        return list(dict.fromkeys(metric.features for metric in self.sets))

    def extractors(self) -> list[str]:
        """Names of the extractors that are needed."""
        return list(dict.fromkeys(extractor for extractor, _ in self.features()))

    def of_set(self, image_set: str) -> list[PlannedSetMetric]:
        """The metrics that are measured on samples, reconstructions or held-out images."""
        return [metric for metric in self.sets if image_set in metric.kind.cls.measures]

    def values_of(self, image_set: str) -> list[str]:
        """Names in records of the values that metrics of this set give."""
        return [name for metric in self.of_set(image_set) for name in metric.record_names(image_set)]

    def features_of(self, image_set: str) -> list[FeatureKey]:
        """The features that metrics of this set need."""
        return list(dict.fromkeys(metric.features for metric in self.of_set(image_set)))

    def needs_reference(self, features: FeatureKey) -> bool:
        return any(metric.features == features and metric.kind.cls.needs_reference for metric in self.sets)

    def is_pairwise(self, features: FeatureKey) -> bool:
        """Whether a metric over these features compares images one by one."""
        return any(metric.features == features and metric.kind.cls.is_pairwise for metric in self.sets)

    def names(self) -> list[str]:
        """What is measured, in words that belong to a record's identity."""
        others = {"mean_iou": self.has_mean_iou, "codebook": self.has_codebook, "likelihood": self.has_likelihood}
        names = [metric.name + metric.suffix for metric in self.sets]
        return sorted([*names, *self.pixels, *(name for name, is_wanted in others.items() if is_wanted)])


def plan_metrics(options: EvaluationOptions, sets: Sequence[str] = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)) -> MetricPlan:
    """Resolves `evaluation.metrics` into what is measured on which features.

    Args:
        options: names the metrics and the extractor.
        sets: the sets of images there are; metrics of others are left out.

    Raises:
        ConfigError: an unknown metric or extractor, one that is named twice, or a metric over a network that it is not
            defined on.
    """
    planned = []
    for written in options.metrics:
        key, _, extractor = written.partition("@")
        if key not in METRICS or extractor and key not in SET_METRICS:
            raise ConfigError(
                f"evaluation.metrics names {written}, but it must name some of: {', '.join(METRICS)}; those up to "
                "memorisation perhaps with @EXTRACTOR. Choose from these."
            )
        if key in SET_METRICS:
            planned.append(_plan(key, extractor, written, options))
    named = [metric.name + metric.suffix for metric in planned]
    named += [key for key in options.metrics if key not in SET_METRICS and "@" not in key]
    if repeated := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"evaluation.metrics names {repeated[0]} more than once. Name every metric once.")
    return MetricPlan(
        sets=tuple(metric for metric in planned if set(metric.kind.cls.measures) & set(sets)),
        pixels=tuple(name for name in PIXEL_METRICS if name in options.metrics),
        has_mean_iou="mean_iou" in options.metrics,
        has_codebook="codebook" in options.metrics,
        has_likelihood="likelihood" in options.metrics and SAMPLES in sets,
        has_code_matches=any(metric.kind.cls is NearestTraining for metric in planned) and SAMPLES in sets,
    )


def check_metrics_fit(options: EvaluationOptions, tokenizer: TokenizerOptions) -> None:
    """Refuses metrics that say nothing of what a tokenizer reconstructs.

    Raises:
        ConfigError: naming those that do.
    """
    if tokenizer.input == IMAGE:
        what, fitting = "images", tuple(name for name in METRICS if name not in LABEL_METRICS)
    elif tokenizer.num_labels is not None:
        what, fitting = "maps of labels", METRICS_OF_LABELS
    else:
        what, fitting = "maps of numbers", METRICS_OF_NUMBERS
    for written in options.metrics:
        name = written.partition("@")[0]
        if name in METRICS and name not in fitting:
            raise ConfigError(
                f"evaluation.metrics names {written}, but tokenizer.input is {tokenizer.input}, and reconstructions of {what} are measured "
                f"by {', '.join(fitting)}. Name some of these."
            )


def _plan(key: str, extractor: str, written: str, options: EvaluationOptions) -> PlannedSetMetric:
    kind = SET_METRICS[key]
    main = options.extractor
    family = extractor_class(main).family
    name = extractor or (main if kind.family in (None, family) else kind.family)
    found = extractor_class(name).family
    if kind.family and found != kind.family:
        raise ConfigError(
            f"evaluation.metrics names {written}, but {key} is defined on {kind.family}. "
            f"Write {key}, or fd or kd for distances on other extractors."
        )
    by_definition = name == kind.family
    suffix = "" if name == main or by_definition else "_" + name.replace("-", "_").replace(":", "_").replace(".", "_")
    record_name = kind.inception_name if found == INCEPTION and kind.inception_name else key
    if key == "memorisation":
        record_name = "nearest_training_distance"
    return PlannedSetMetric(name=record_name, suffix=suffix, kind=kind, extractor=name)
