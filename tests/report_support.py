"""Records of a history that never was, for tests of what is made from records."""

import numpy as np

from evaluation.records import Record, list_records, record_id, write_record
from pipeline.grids import grid_png

NAME = "Fréchet distance (efficientnet-lite0@96)"
CLASSES = ["circle", "square", "star"]


def metric(value, error, num_samples=512, **more):
    return {"value": value, "standard_error": error, "num_samples": num_samples, **more}


def content(step, gfd, *, night=None, run="/runs/a", num_samples=512, distance=NAME, sampling=None, seed=0, **more):
    """What a record of `evaluate` says, as far as anyone reads it."""
    metrics = {
        "fd_holdout": metric(21.3, 0.55, num_samples),
        "rfd": metric(58.9, 1.8, num_samples),
        "gfd": metric(gfd, 3.3, num_samples, bias_corrected=gfd - 14),
        "codebook_usage": metric(0.98, None, num_samples),
        "validation_nll": metric(5.0 - step / 1000, 0.01, num_samples),
    }
    sampling = sampling or {"cfg_scale": 2.0, "top_k": None}
    identity = {
        "checkpoint_hash": f"{run}{step}",
        "sampling": sampling,
        "seed": seed,
        "num_samples": num_samples,
        "num_blocks": 10,
        "extractor_fingerprint": distance,
        "reference_key": "reference",
    }
    night = step // 100 if night is None else night
    return {
        "step": step,
        "checkpoint": f"{run}/checkpoints/step-{step:09d}-x",
        "created_at": f"2026-03-{night:02d}T02:14:00.000+00:00",
        "metrics": metrics,
        "distance": distance,
        "extractor_resize": "bilinear",
        "sampling": sampling,
        "seed": seed,
        "evaluation": {"num_samples": num_samples},
        "class_names": CLASSES,
        "wall_seconds": {"total": 60.0},
        "identity": identity,
        **more,
    }


def record(*args, **changes):
    """A record that lies nowhere."""
    body = {"grids": {}, **content(*args, **changes)}
    identifier = record_id(body["identity"])
    return Record(f"/evaluation/records/{identifier}.json", {"record_id": identifier, **body})


def pictures(shade):
    """Grids of three classes with two images each, and their layouts."""
    images = np.zeros((6, 32, 32, 3), np.uint8)
    for i in range(6):
        images[i, 4 : 28 - 4 * (i % 2), 4:28, i // 2] = shade
    layout = {"num_columns": 2, "labels": [0, 0, 1, 1, 2, 2]}
    names = ("samples", "real", "reconstructions")
    return {name: grid_png(images, 2) for name in names}, {name: layout for name in names}


def write_history(path, nights=6):
    """A store with a record per night; the last one is worse than the one before. Returns its records."""
    for night in range(1, nights + 1):
        gfd = 200.0 - 20 * night + (60 if night == nights else 0)
        grids, layouts = pictures(40 * night % 216)
        body = content(100 * night, gfd, layouts=layouts)
        write_record(str(path), record_id(body["identity"]), body, grids)
    return list_records(str(path))
