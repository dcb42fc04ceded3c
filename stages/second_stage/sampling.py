"""Sampling codes from a transformer.

A sample depends only on the weights, the options, the seed and its global index. Two things make that exact: the uniform number
behind every draw is a hash of (seed, index, position), and indices are computed in whole groups of fixed size, so no matrix
product ever changes its shape with the caller's batch or the number of workers.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.hashing import hash64, uniform
from stages.options import SamplingOptions
from stages.second_stage.transformer import KVCache, Transformer


def uniforms(seed: int, indices: np.ndarray, position: int) -> np.ndarray:
    """One number in [0, 1) per global sample index, float64 (n,): a hash of (seed, index, position)."""
    return uniform(hash64(seed, indices, position))


def cfg_scale_at(options: SamplingOptions, position: int, num_codes: int) -> float:
    """Guidance at one position: constant, rising linearly, or rising as power-cosine (Yu et al. 2024, RAR).

    Schedules rise from 1 at the first code to cfg_scale at the last.
    """
    if options.cfg_schedule == "constant" or num_codes == 1:
        return options.cfg_scale
    progress = position / (num_codes - 1)
    if options.cfg_schedule == "power-cosine":
        progress = 0.5 * (1.0 - np.cos(np.pi * progress**options.cfg_power))
    return 1.0 + (options.cfg_scale - 1.0) * float(progress)


def filter_logits(logits_BV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Sets logits outside the top-k and the nucleus to -inf.

    Ties with the k-th logit are kept; the nucleus is taken over what top-k left and includes the code that crosses top_p
    (Holtzman et al. 2020).
    """
    if top_k is not None and top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.softmax(-1)
        is_outside = p_BV.cumsum(-1) - p_BV >= top_p
        logits_BV = logits_BV.masked_fill(is_outside.gather(-1, order_BV.argsort(-1)), -torch.inf)
    return logits_BV


def draw(logits_BV: Tensor, uniforms_B: Tensor, options: SamplingOptions) -> Tensor:
    """Codes int64 (B,) by inverting the cumulative distribution, in float64, at the given uniforms."""
    filtered_BV = filter_logits(logits_BV.double() / options.temperature, options.top_k, options.top_p)
    cumulative_BV = filtered_BV.softmax(-1).cumsum(-1)
    targets_B1 = uniforms_B[:, None].to(cumulative_BV) * cumulative_BV[:, -1:]
    codes_B = torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0]
    return codes_B.clamp_max(logits_BV.shape[-1] - 1)


def num_drawn_classes(model: Transformer) -> int:
    """Classes that samples of a model can be of; 0 where it was trained without, whatever the images' classes."""
    return model.config.num_classes if model.conditioning.is_conditional else 0


def check_labels(options: SamplingOptions, num_classes: int) -> None:
    """Refuses classes that a model does not know: next to the last one lies the null condition.

    Raises:
        ConfigError: `sampling.labels` is empty, or one of them is not in [0, num_classes).
    """
    labels = options.labels
    if labels is not None and not (labels and 0 <= min(labels) <= max(labels) < num_classes):
        rule = f"it must name some of the classes 0 to {num_classes - 1}" if num_classes else "the model knows no classes"
        raise ConfigError(f"sampling.labels is {list(labels)}, but {rule}. Correct it, or leave it out.")


def sample_labels(options: SamplingOptions, indices: np.ndarray, num_classes: int) -> np.ndarray:
    """Class of each global sample index, int64 (n,): the classes in turn, so any whole number of turns is balanced; -1 without classes.

    Raises what `check_labels` raises.
    """
    check_labels(options, num_classes)
    if num_classes == 0:
        return np.full(len(indices), -1, dtype=np.int64)
    classes = np.asarray(options.labels if options.labels is not None else range(num_classes), dtype=np.int64)
    return classes[indices % len(classes)]


@torch.inference_mode()
def sample_group(
    model: Transformer, options: SamplingOptions, group: int, labels_at: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Codes of the indices [group * group_size, (group + 1) * group_size), int64 (group_size, L), in raster order.

    Args:
        model: in eval mode.
        options: how codes are drawn.
        group: number of the group.
        labels_at: labels of global sample indices, int64 (n,) or (n, P); `sample_labels` if not given.
    """
    config = model.config
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    size = options.group_size
    indices = np.arange(group * size, (group + 1) * size)
    labels = sample_labels(options, indices, num_drawn_classes(model)) if labels_at is None else labels_at(indices)
    labels_B = torch.from_numpy(labels).to(device)
    guided = options.cfg_scale != 1.0 and model.conditioning.is_conditional
    fed_labels = torch.cat([labels_B, model.conditioning.null(labels_B)]) if guided else labels_B
    cache = KVCache(config, len(fed_labels), model.conditioning.num_prefix_tokens + config.num_codes - 1, dtype, device)
    codes_BL = torch.empty(size, config.num_codes, dtype=torch.int64, device=device)
    by_position = [uniforms(options.seed, indices, position) for position in range(config.num_codes)]
    uniforms_LB = torch.from_numpy(np.stack(by_position)).to(device)  # at once, as each transfer waits for a GPU to be idle
    logits = model.prefill(fed_labels, cache)
    for position in range(config.num_codes):
        if position > 0:
            previous_B = codes_BL[:, position - 1]
            logits = model.step(previous_B.repeat(2) if guided else previous_B, cache)
        if guided:
            with_condition, without = logits.double().chunk(2)
            chosen = without + cfg_scale_at(options, position, config.num_codes) * (with_condition - without)
        else:
            chosen = logits
        codes_BL[:, position] = draw(chosen, uniforms_LB[position], options)
    return codes_BL.cpu().numpy()


def sample_codes(
    model: Transformer,
    options: SamplingOptions,
    start: int,
    stop: int,
    labels_at: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Codes of the global sample indices [start, stop), int64 (stop - start, L); whole groups are computed and cut to fit."""
    size = options.group_size
    groups = range(start // size, -(-stop // size))
    codes = np.concatenate([sample_group(model, options, group, labels_at) for group in groups])
    return codes[start - groups.start * size : stop - groups.start * size]
