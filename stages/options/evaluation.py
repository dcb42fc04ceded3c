"""Options of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured, on how many samples, against what."""

    path: str = option("runs/evaluation", "Folder of records, reference statistics and the report.")
    num_samples: int = option(10_000, "Samples drawn, reconstructions made and held-out images taken.", low=2)
    num_reference_images: int | None = option(
        None, "Training images behind the reference statistics; all if not given.", low=2
    )
    num_sampler_actors: int = option(1, "Actors that draw and decode samples.", low=1)
    num_feature_actors: int = option(1, "Actors that compute features.", low=1)
    metrics: tuple[str, ...] = option(
        ("fd", "psnr", "ssim", "codebook", "likelihood"),
        "Names from evaluation.metrics.METRICS; NAME@EXTRACTOR measures on another extractor than the one below.",
    )
    item_size: int = option(
        32, "Images per work item, rounded up to whole sampling groups; no number depends on it.", low=1
    )
    cpus_per_actor: float | None = option(
        None,
        "CPUs that Ray reserves per actor; one, or an equal share of fewer, if not given. An actor computes on one thread, because more "
        "round otherwise: what is faster is more actors.",
        above=0.0,
    )
    gpus_per_actor: float | None = option(
        None, "GPUs per actor, a share of one or whole ones; one, or an equal share of fewer, if not given.", low=0.0
    )
    actor_resource: str | None = option(
        None, "Custom Ray resource of which each actor takes one: on nodes that offer it, evaluations run, and only there."
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option(
        "PACK", "How Ray places the actors on nodes."
    )
    start_timeout_seconds: float = option(
        600.0, "How long to wait until the cluster has room for all actors at once; then it is an error.", above=0.0
    )
    extractor: str = option(
        "efficientnet-lite0", "A name from evaluation.extractors.EXTRACTORS, or `package.module:Class`."
    )
    extractor_resolution: int | None = option(
        None,
        "Side to which images are resized for that extractor, part of the metric's name; the network's own if not given.",
        low=32,
    )
    weights_path: str = option(
        "~/.cache/tessera/weights", "Folder of pretrained weights under their published names. Local or s3://."
    )
    download_weights: bool = option(False, "Fetch weights that are not there from where their authors publish them.")
    reference_path: str | None = option(
        None, "Statistics to measure against (.npz of pytorch-fid or ADM) in place of those of the training images."
    )
    num_pairwise_images: int = option(
        10_000, "Images of each set for metrics that compare images one by one (kd, cmmd, precision …).", low=16
    )
    num_blocks: int = option(10, "Blocks of the jackknife that gives the standard errors.", low=2)
    num_grid_images: int = option(64, "Images per grid on the report page.", low=1)
