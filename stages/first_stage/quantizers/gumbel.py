"""A categorical relaxation: entries are drawn in training, the likeliest one is taken when encoding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.nearest import DISTANCES_AT_ONCE
from stages.options import TokenizerTrainOptions


class GumbelQuantizer(Quantizer):
    """Gumbel-softmax over the entries with a hard forward pass (Jang et al. 2017; parameters of CompVis `GumbelQuantize`).

    Losses: `kl`, the divergence of the softmax of the logits from the uniform distribution, in nats. The temperature falls
    along a cosine. Codes are the argmax of the logits; in training mode, of the logits with noise.

    Attributes:
        temperature: of the relaxation.
    """

    draws = True

    def __init__(self, codebook_size: int, codebook_dim: int, temperature: float = 1.0):
        super().__init__(codebook_size, codebook_dim)
        self.proj = nn.Conv2d(codebook_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, codebook_dim)
        self.temperature = temperature
        self._schedule = (temperature, temperature, 1)

    def configure(self, options: TokenizerTrainOptions) -> None:
        self._schedule = (options.gumbel_start_temperature, options.gumbel_end_temperature, options.num_samples)

    def advance(self, num_seen: int) -> None:
        first, last, num_samples = self._schedule
        share = min(1.0, num_seen / num_samples)
        self.temperature = last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * share))

    def assign(self, vectors_ND: Tensor) -> Tensor:
        weight_KD, bias_K = self.proj.weight.float().flatten(1), self.proj.bias
        assert bias_K is not None
        rows_at_once = max(1, DISTANCES_AT_ONCE // self.codebook_size)
        return torch.cat(
            [F.linear(rows, weight_KD, bias_K.float()).argmax(-1) for rows in vectors_ND.split(rows_at_once)]
        )

    def code_vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embed.weight.float())

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        logits_BKHW = self.proj(z_BDHW)
        noisy_BKHW = (logits_BKHW + _noise_like(logits_BKHW)) / self.temperature if self.training else logits_BKHW
        codes_BHW = noisy_BKHW.argmax(1)
        soft_BKHW = noisy_BKHW.softmax(1)
        hard_BKHW = torch.zeros_like(soft_BKHW).scatter_(1, codes_BHW[:, None], 1.0)
        choice_BKHW = hard_BKHW - soft_BKHW.detach() + soft_BKHW
        entries_ND = to_vectors(choice_BKHW) @ self.embed.weight.float()
        p_BKHW = logits_BKHW.softmax(1)
        divergence_BHW = (p_BKHW * (p_BKHW * self.codebook_size + 1e-10).log()).sum(1)
        return Quantized(
            z_BDHW=to_map(entries_ND, z_BDHW),
            codes_BHW=codes_BHW,
            losses={"kl": divergence_BHW.mean()},
            vectors_ND=to_vectors(z_BDHW.detach()),
        )

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return "gumbel", dict(self.state_dict())


def _noise_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.empty_like(logits).exponential_().log()
