"""What every quantizer does: the contract between encoder, quantizer, decoder and trainer.

Shapes: B batch, D codebook_dim, K codebook_size, N = B * h * w vectors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stages.options import TokenizerTrainOptions


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a quantizer hands on in training."""

    z_BDHW: Tensor  # float32 code vectors for the decoder, with a gradient to the encoder
    codes_BHW: Tensor  # int64 in [0, K)
    losses: dict[str, Tensor]  # unweighted scalars by name, each one of loss_weights.LOSS_NAMES
    vectors_ND: Tensor  # detached float32 vectors of this batch, of the kind `start` and `revive` take


class Quantizer(nn.Module):
    """Encoder features (B, D, h, w) to codes and code vectors.

    A kind of quantizer overrides `quantize`, `assign` and `code_vectors`, and of the hooks below what it needs. Whatever
    precision surrounds a quantizer, it computes in float32.

    Attributes:
        codebook_size: K.
        codebook_dim: D.
        row_tensors: names of the tensors with one row per entry, which `start` and `revive` write.
        draws: whether its codes in training mode are drawn, and others than `encode` gives.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[bool] = False

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim

    def forward(self, z_BDHW: Tensor) -> Quantized:
        """Code vectors, codes and losses of features of any float dtype."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            return self.quantize(z_BDHW.float())

    def encode(self, z_BDHW: Tensor) -> Tensor:
        """Codes of features, int64 (B, h, w). The same features always give the same codes."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            return self.assign(to_vectors(z_BDHW.float())).view(z_BDHW.shape[0], *z_BDHW.shape[2:])

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Code vectors of codes, float32 (B, D, h, w)."""
        return self.code_vectors(codes_BHW).permute(0, 3, 1, 2)

    def codebook(self) -> Tensor:
        """Every code vector, as the decoder sees it, float32 (K, D)."""
        device = next((t.device for t in [*self.parameters(), *self.buffers()]), None)
        return self.code_vectors(torch.arange(self.codebook_size, device=device))

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        """`forward` of float32 features, outside autocast."""
        raise NotImplementedError

    def assign(self, vectors_ND: Tensor) -> Tensor:
        """Codes of float32 features, int64 (N,)."""
        raise NotImplementedError

    def code_vectors(self, codes: Tensor) -> Tensor:
        """Code vectors of codes of any shape, float32 (..., D)."""
        raise NotImplementedError

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        """The kind under which an artefact holds this quantizer, and its tensors: the simplest that give the same codes."""
        raise NotImplementedError

    def configure(self, options: TokenizerTrainOptions) -> None:
        """Takes from the training options what concerns this kind. Called once, before training."""

    def advance(self, num_seen: int) -> None:
        """Schedules, for the step after `num_seen` images. Called before every training step."""

    def start(self, vectors_ND: Tensor) -> None:
        """Places the entries on the encoder's first vectors; does nothing where there are no entries to place.

        Every rank calls it; all of them end with the entries of rank 0.
        """

    def revive(self, counts_K: Tensor, vectors_ND: Tensor) -> Tensor:
        """Moves entries that no rank used onto vectors the encoder just produced.

        Every rank calls it; all of them end with the entries of rank 0.

        Args:
            counts_K: int64, how often this rank used each entry.
            vectors_ND: `Quantized.vectors_ND` of this rank.

        Returns:
            int64 (M,), the entries that were moved; none where there is no codebook to mend.
        """
        return torch.zeros(0, dtype=torch.int64, device=counts_K.device)


def to_vectors(z_BDHW: Tensor) -> Tensor:
    """(B, D, h, w) as (B * h * w, D), row by row."""
    return z_BDHW.permute(0, 2, 3, 1).reshape(-1, z_BDHW.shape[1])


def to_map(vectors_ND: Tensor, like_BDHW: Tensor) -> Tensor:
    """The inverse of `to_vectors`: (N, D) on the grid of `like_BDHW`."""
    b, _, h, w = like_BDHW.shape
    return vectors_ND.view(b, h, w, -1).permute(0, 3, 1, 2)
