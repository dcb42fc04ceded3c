"""What things are called on the report page."""

from collections.abc import Mapping
from typing import Any

from stages.config import to_dict
from stages.options import SamplingOptions

# In the order in which they are shown; what is not named here follows.
ORDER = ("gfid", "gfd", "rfid", "rfd", "fid_holdout", "fd_holdout", "validation_nll", "validation_bits_per_image", "psnr")
DISTANCES = {
    "fd": "Distance",
    "fid": "FID",
    "sfid": "sFID",
    "kd": "Kernel distance",
    "kid": "KID",
    "cmmd": "CMMD",
}
IMAGES = {"g": "samples", "r": "reconstructions", "": "held-out images"}
LABELS = {
    "psnr": "PSNR of reconstructions, dB",
    "ssim": "SSIM of reconstructions",
    "pixel_accuracy": "Share of pixels with the right label",
    "mean_iou": "Mean IoU of labels",
    "nearest_training_distance": "Distance of samples to the nearest training image",
    "nearest_training_distance_holdout": "Distance of held-out images to the nearest training image",
    "copied_share": "Share of samples nearer to training images than held-out images are",
    "nearest_training_codes": "Largest share of codes of samples equal to a training image's",
    "nearest_training_codes_holdout": "Largest share of codes of held-out images equal to a training image's",
    "copied_code_share": "Share of samples with more codes of a training image than held-out images have",
    "codebook_usage": "Share of codebook used",
    "codebook_perplexity": "Codebook perplexity",
    "validation_nll": "Validation NLL, nats per code",
    "validation_bits_per_image": "Validation, bits per image",
}


def metric_label(metric: str) -> str:
    """A metric's name in a record, in words: `gfd_dinov2` is `Distance of samples (dinov2)`."""
    if metric in LABELS:
        return LABELS[metric]
    for prefix, images in IMAGES.items():
        for name, text in DISTANCES.items():
            if metric == prefix + name or metric.startswith(f"{prefix}{name}_"):
                rest = metric.removeprefix(prefix + name).removesuffix("_holdout").strip("_")
                return f"{text} of {images}" + (f" ({rest})" if rest else "")
    return metric.replace("_", " ").capitalize()


def run_name(path: str) -> str:
    """The last two parts of a run's path."""
    return "/".join(path.rstrip("/").split("/")[-2:])


def sampling_text(sampling: Mapping[str, Any]) -> str:
    """The sampling options that are not the defaults, `cfg_scale 2, top_p 0.98`."""
    defaults = to_dict(SamplingOptions())
    changed = [
        f"{name} {value}" for name, value in sampling.items() if value != defaults.get(name) and name not in ("seed", "group_size")
    ]
    return ", ".join(changed) or "default sampling"
