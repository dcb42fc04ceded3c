"""Quantizers with a codebook of free entries, of which the nearest is chosen: plain, on the unit sphere, behind a linear map."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.entropy import choice_entropy_loss
from stages.first_stage.quantizers.gradients import GRADIENTS, straight_through
from stages.first_stage.quantizers.nearest import kmeans, nearest, spread
from stages.first_stage.quantizers.ranks import copy_from_first_rank, sum_over_ranks
from stages.options import TokenizerTrainOptions

KMEANS_ITERATIONS = 10
ENTROPY_TEMPERATURE = 0.01


class VectorQuantizer(Quantizer):
    """Nearest entry in Euclidean distance (van den Oord et al. 2017, eq. 3; CompVis `VectorQuantizer2`).

    Losses: `codebook` |sg[z] - e|^2 moves the entries, `commitment` |z - sg[e]|^2 the encoder. With a weight for it also
    `entropy`, mean entropy per vector minus entropy of the mean of softmax(-|z - e|^2 / 0.01) (LlamaGen, Sun et al. 2024).
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("embedding.weight",)
    is_spherical: ClassVar[bool] = False

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__(codebook_size, codebook_dim)
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.pass_gradient = straight_through
        self.has_entropy = False
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def configure(self, options: TokenizerTrainOptions) -> None:
        self.pass_gradient = GRADIENTS[options.quantizer_gradient]
        self.has_entropy = bool(options.entropy_weight)

    def codebook(self) -> Tensor:
        return self.embedding.weight.float()

    def compared(self, vectors_ND: Tensor) -> Tensor:
        """The vectors as they are compared with the codebook."""
        return vectors_ND

    def assign(self, vectors_ND: Tensor) -> Tensor:
        return nearest(self.compared(vectors_ND), self.codebook())

    def code_vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook())

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        vectors_ND = self.compared(to_vectors(z_BDHW))
        codebook_KD = self.codebook()
        codes_N = nearest(vectors_ND.detach(), codebook_KD.detach())
        entries_ND = F.embedding(codes_N, codebook_KD)
        return Quantized(
            z_BDHW=to_map(self.pass_gradient(vectors_ND, entries_ND.detach()), z_BDHW),
            codes_BHW=to_map(codes_N, z_BDHW)[:, 0],
            losses=self.losses(vectors_ND, entries_ND) | self._entropy(vectors_ND, codebook_KD),
            vectors_ND=vectors_ND.detach(),
        )

    def losses(self, vectors_ND: Tensor, entries_ND: Tensor) -> dict[str, Tensor]:
        """What pulls the vectors and their entries together."""
        return {
            "codebook": F.mse_loss(entries_ND, vectors_ND.detach()),
            "commitment": F.mse_loss(vectors_ND, entries_ND.detach()),
        }

    def _entropy(self, vectors_ND: Tensor, codebook_KD: Tensor) -> dict[str, Tensor]:
        if not self.has_entropy:
            return {}
        # The loss computes with it again in the backward pass, when moving averages have moved the entries.
        codebook_KD = codebook_KD.clone()
        squares_K = codebook_KD.square().sum(-1)  # |z|^2 is the same for every entry and left out

        def logits_of(rows_ND: Tensor) -> Tensor:
            return (2.0 * rows_ND @ codebook_KD.t() - squares_K) / ENTROPY_TEMPERATURE

        return {"entropy": choice_entropy_loss(logits_of, vectors_ND, self.codebook_size)}

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return "vq", {"embedding.weight": self.codebook().detach()}

    @torch.no_grad()
    def start(self, vectors_ND: Tensor) -> None:
        """Entries at the k-means centres of these vectors (Lancucki et al. 2020)."""
        entries_KD = kmeans(vectors_ND, self.codebook_size, KMEANS_ITERATIONS, is_spherical=self.is_spherical)
        self._place(torch.arange(self.codebook_size, device=vectors_ND.device), copy_from_first_rank(entries_KD))

    @torch.no_grad()
    def revive(self, counts_K: Tensor, vectors_ND: Tensor) -> Tensor:
        dead_M = (sum_over_ranks(counts_K.clone()) == 0).nonzero().flatten()
        entries_MD = spread(vectors_ND, len(dead_M)).contiguous()
        self._place(dead_M, copy_from_first_rank(entries_MD))
        return dead_M

    def _place(self, rows_M: Tensor, entries_MD: Tensor) -> None:
        self.embedding.weight[rows_M] = entries_MD.to(self.embedding.weight.dtype)


class SphericalQuantizer(VectorQuantizer):
    """Nearest entry on the unit sphere (Yu et al. 2022, section 3.2; LlamaGen).

    Vectors and entries are normalised before they are compared, and the decoder sees unit vectors. Meant for entries of
    few dimensions.
    """

    is_spherical = True

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight)
        self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def codebook(self) -> Tensor:
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def compared(self, vectors_ND: Tensor) -> Tensor:
        return F.normalize(vectors_ND, dim=-1)


class LinearQuantizer(VectorQuantizer):
    """Nearest of the images of fixed random entries under one learned linear map (SimVQ, Zhu et al. 2024, section 4).

    One map moves all entries at once, so none stays behind; there is nothing to start or to revive.
    """

    row_tensors = ()

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight, std=codebook_dim**-0.5)
        self.embedding.weight.requires_grad_(False)
        self.map = nn.Linear(codebook_dim, codebook_dim)

    def codebook(self) -> Tensor:
        return self.map(self.embedding.weight).float()

    def start(self, vectors_ND: Tensor) -> None:
        Quantizer.start(self, vectors_ND)

    def revive(self, counts_K: Tensor, vectors_ND: Tensor) -> Tensor:
        return Quantizer.revive(self, counts_K, vectors_ND)
