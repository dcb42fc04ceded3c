"""A checkpoint and its tokenizer, ready to draw samples and to score codes. Made a Ray actor by whoever needs one."""

import logging
import os

import numpy as np
import torch
from safetensors.torch import load_file

from cluster import checkpoints
from cluster.checkpoints import AVERAGES, WEIGHTS
from pipeline.binding import check_tokenizer
from pipeline.code_dataset import CodeDataset
from pipeline.encoding import prepare_tokenizer
from pipeline.tokenizers import open_tokenizer
from stages.config import build
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.pixels import to_uint8
from stages.memory import keep_freed_memory
from stages.options import SamplingOptions
from stages.second_stage.sampling import num_drawn_classes, sample_codes, sample_labels
from stages.second_stage.transformer import Transformer, TransformerConfig, nll

logger = logging.getLogger(__name__)


def load_weights(commit: checkpoints.Commit, which: str) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint by name: "average" takes the averaged ones where there are any, "last" those of its step."""
    name = AVERAGES if which == "average" and commit.has(AVERAGES) else WEIGHTS
    with checkpoints.local_folder(commit, [name]) as folder:
        return load_file(os.path.join(folder, name))


def load_transformer(commit: checkpoints.Commit, which: str = "average") -> Transformer:
    """The transformer of a checkpoint in float32, in eval mode; `which` as for `load_weights`."""
    model = Transformer(build(TransformerConfig, commit.content["transformer"]))
    weights = load_weights(commit, which)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval().requires_grad_(False)


def open_sampled_conditions(commit: checkpoints.Commit, path: str | None) -> CodeDataset | None:
    """The code dataset of the conditions that a checkpoint draws for; None where it is not conditioned on codes.

    Raises:
        ConfigError: it is, and no dataset is named.
        ArtefactError: a missing or damaged dataset, or one of another tokenizer, codebook or number of codes than the checkpoint's.
    """
    transformer = commit.content["transformer"]
    if transformer["conditioning"] != "codes":
        return None
    if path is None:
        raise ConfigError(
            f"conditioning.codes_path is not set, but checkpoint {commit.path} is conditioned on codes. Name a code dataset of the "
            f"conditions to draw for."
        )
    dataset = CodeDataset.open(path, verify=False)
    known = commit.content.get("conditions")
    facts = [
        ("tokenizer", dataset.tokenizer_fingerprint, known and known["tokenizer_fingerprint"]),
        ("codebook size", dataset.codebook_size, transformer["num_classes"]),
        ("codes per image", dataset.num_codes, transformer["num_prefix_tokens"]),
    ]
    for what, given, asked in facts:
        if asked is not None and given != asked:
            raise ArtefactError(
                f"conditioning.codes_path is {path} with {what} {given}, but checkpoint {commit.path} was trained on conditions with "
                f"{asked}. Name a code dataset of such conditions."
            )
    return dataset


def warn_of_guidance(commit: checkpoints.Commit, sampling: SamplingOptions) -> None:
    """Says so where guidance is asked for that a checkpoint cannot give."""
    if sampling.cfg_scale == 1.0:
        return
    if commit.content["transformer"]["conditioning"] == "none":
        logger.warning(
            "sampling.cfg_scale is %s, but %s has no condition: its samples are drawn without guidance.", sampling.cfg_scale, commit.path
        )
    elif commit.content.get("options", {}).get("conditioning", {}).get("cond_drop_prob") == 0.0:  # imported ones have no options
        logger.warning(
            "sampling.cfg_scale is %s, but %s was trained with conditioning.cond_drop_prob=0 and never saw the null condition, from which "
            "guidance leads away: expect worse samples than with sampling.cfg_scale=1.",
            sampling.cfg_scale,
            commit.path,
        )


class SamplerActor:
    """Draws samples by global index. Any two instances on the same inputs give the same samples (fp32, CPU).

    Args:
        checkpoint_path: a committed checkpoint.
        tokenizer_path: the tokenizer whose codes it was trained on.
        sampling: how codes are drawn.
        conditions_path: code dataset of the conditions that a checkpoint conditioned on codes draws for.

    Raises:
        ArtefactError: the tokenizer is not the checkpoint's, or works otherwise on this machine; or conditions are damaged, or not of
            the kind that the checkpoint knows.
        ConfigError: the checkpoint is conditioned on codes, and none are named.
    """

    def __init__(
        self,
        checkpoint_path: str,
        tokenizer_path: str,
        sampling: SamplingOptions,
        conditions_path: str | None = None,
    ):
        keep_freed_memory()
        torch.set_num_threads(1)  # sums over more round otherwise, and a code may become another
        commit = checkpoints.open_commit(checkpoint_path)
        self.conditions = open_sampled_conditions(commit, conditions_path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = prepare_tokenizer(open_tokenizer(tokenizer_path), self.device)
        check_tokenizer(tokenizer_path, self.tokenizer, commit.content["encoding"], f"checkpoint {checkpoint_path}")
        self.model = load_transformer(commit, sampling.weights).to(self.device)
        self.sampling = sampling

    def labels(self, start: int, stop: int) -> np.ndarray:
        """Of the global sample indices [start, stop): classes int64 (n,), -1 without classes, or codes of the condition int64 (n, P)."""
        return self._labels_at(np.arange(start, stop))

    def _labels_at(self, indices: np.ndarray) -> np.ndarray:
        """The classes, or the first view of every image of the conditions, in turn."""
        if self.conditions is None:
            return sample_labels(self.sampling, indices, num_drawn_classes(self.model))
        rows = indices % self.conditions.num_images * self.conditions.num_views
        return self.conditions.codes(rows).astype(np.int64)

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Codes of the global sample indices [start, stop), int64 (n, L)."""
        return sample_codes(self.model, self.sampling, start, stop, self._labels_at)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images of the global sample indices [start, stop), uint8 (n, H, W, C)."""
        return self.images_and_codes(start, stop)[0]

    def images_and_codes(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, H, W, C) of the global sample indices [start, stop), and their codes int64 (n, L).

        Groups are decoded whole, like they are drawn, so that pixels do not depend on the bounds either.
        """
        size = self.sampling.group_size
        first, last = start // size, -(-stop // size)
        groups = [self.codes(g * size, (g + 1) * size) for g in range(first, last)]
        wanted = slice(start - first * size, stop - first * size)
        return np.concatenate([self.decode(codes) for codes in groups])[wanted], np.concatenate(groups)[wanted]

    @torch.inference_mode()
    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """Images uint8 (n, H, W, C) of codes int64 (n, L). Give whole groups where pixels must not depend on n."""
        grid = self.model.config.grid
        codes = torch.from_numpy(np.array(codes_NL)).to(self.device).view(-1, *grid)
        return to_uint8(self.tokenizer.decode(codes)).cpu().numpy()

    @torch.inference_mode()
    def nll(self, codes_NL: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Negative log-likelihood of whole images in nats, float64 (n,), of codes int64 (n, L) under labels as of `labels`."""
        # Arrays that come through Ray are read-only, which torch does not like to share.
        codes, given = (torch.from_numpy(np.array(a)).to(self.device) for a in (codes_NL, labels))
        return nll(self.model(codes, given), codes).double().cpu().numpy()
