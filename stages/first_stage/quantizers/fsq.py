"""Finite scalar quantization: the codebook is a grid, so nothing can collapse."""

import math

import torch
from torch import Tensor

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.gradients import straight_through


class ScalarQuantizer(Quantizer):
    """Every dimension is bounded and rounded to one of its levels (FSQ, Mentzer et al. 2023, section 3).

    The first dimension counts fastest in a code. Code vectors lie in [-1, 1]. There are no losses and no parameters.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__(math.prod(levels), len(levels))
        self.levels = levels
        self.register_buffer("levels_D", torch.tensor(levels), persistent=False)
        self.register_buffer(
            "strides_D", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), persistent=False
        )
        self.levels_D: Tensor
        self.strides_D: Tensor

    def bounded(self, vectors_ND: Tensor) -> Tensor:
        """Smoothly into the range whose integers are the levels; 0 stays 0."""
        half_D = (self.levels_D - 1) * (1.0 + 1e-3) / 2.0
        offset_D = torch.where(self.levels_D % 2 == 0, 0.5, 0.0)
        return (vectors_ND + torch.atanh(offset_D / half_D)).tanh() * half_D - offset_D

    def assign(self, vectors_ND: Tensor) -> Tensor:
        return self._codes(self.bounded(vectors_ND).round())

    def code_vectors(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.strides_D % self.levels_D
        half_D = self.levels_D // 2
        return (digits - half_D) / half_D

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        bounded_ND = self.bounded(to_vectors(z_BDHW))
        rounded_ND = bounded_ND.detach().round()
        half_D = self.levels_D // 2
        return Quantized(
            z_BDHW=to_map(straight_through(bounded_ND / half_D, rounded_ND / half_D), z_BDHW),
            codes_BHW=to_map(self._codes(rounded_ND), z_BDHW)[:, 0],
            losses={},
            vectors_ND=to_vectors(z_BDHW.detach()),
        )

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return "fsq", {}

    def _codes(self, rounded_ND: Tensor) -> Tensor:
        return ((rounded_ND.long() + self.levels_D // 2) * self.strides_D).sum(-1)
