"""What things are called on the report page."""

from collections.abc import Mapping
from typing import Any

from stages.config import to_dict
from stages.options import SamplingOptions

# In the order in which they are shown; what is not named here follows.
ORDER = ("gfid", "gfd", "rfid", "rfd", "fid_holdout", "fd_holdout", "validation_nll", "validation_bits_per_image", "psnr")
LABELS = {
    "fd_holdout": "Distance of held-out images",
    "fid_holdout": "Distance of held-out images",
    "rfd": "Distance of reconstructions",
    "rfid": "Distance of reconstructions",
    "gfd": "Distance of samples",
    "gfid": "Distance of samples",
    "psnr": "PSNR of reconstructions, dB",
    "codebook_usage": "Share of codebook used",
    "codebook_perplexity": "Codebook perplexity",
    "validation_nll": "Validation NLL, nats per code",
    "validation_bits_per_image": "Validation, bits per image",
}


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
