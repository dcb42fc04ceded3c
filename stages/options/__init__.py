"""Every option of the system, one frozen keyword-only dataclass per configuration section.

The text beside each field is its documentation: `docs/configuration.md` is made from it (`python -m stages.config`).
Only dataclasses live here, so that reading a configuration imports neither torch nor ray.
"""

from dataclasses import dataclass

from stages.options.data import CodesOptions, ImageOptions, SourceOptions
from stages.options.evaluation import EvaluationOptions
from stages.options.nightly import NightlyOptions, SweepOptions
from stages.options.sampling import SamplingOptions
from stages.options.tokenizer import TokenizerOptions, TokenizerTrainOptions
from stages.options.transformer import ConditioningOptions, ModelOptions, OptimOptions, RunOptions, TrainOptions
from stages.options.workers import DeepSpeedOptions, ScalingOptions

__all__ = [
    "CodesOptions",
    "ConditioningOptions",
    "Config",
    "DeepSpeedOptions",
    "EvaluationOptions",
    "ImageOptions",
    "ModelOptions",
    "NightlyOptions",
    "OptimOptions",
    "RunOptions",
    "SamplingOptions",
    "ScalingOptions",
    "SourceOptions",
    "SweepOptions",
    "TokenizerOptions",
    "TokenizerTrainOptions",
    "TrainOptions",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. Commands take the sections they need, never this."""

    run: RunOptions = RunOptions()
    source: SourceOptions = SourceOptions()
    images: ImageOptions = ImageOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    tokenizer_train: TokenizerTrainOptions = TokenizerTrainOptions()
    codes: CodesOptions = CodesOptions()
    model: ModelOptions = ModelOptions()
    conditioning: ConditioningOptions = ConditioningOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()
    scaling: ScalingOptions = ScalingOptions()
    sampling: SamplingOptions = SamplingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    nightly: NightlyOptions = NightlyOptions()
    sweep: SweepOptions = SweepOptions()
