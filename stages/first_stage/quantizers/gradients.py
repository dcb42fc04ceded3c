"""How a gradient passes from the chosen entries to the encoder, since choosing has none."""

import torch
import torch.nn.functional as F
from torch import Tensor


def straight_through(vectors_ND: Tensor, entries_ND: Tensor) -> Tensor:
    """The entries, with their gradient handed to the vectors as it is (van den Oord et al. 2017, section 3.2)."""
    return vectors_ND + (entries_ND - vectors_ND).detach()


def rotate(vectors_ND: Tensor, entries_ND: Tensor) -> Tensor:
    """The entries, with their gradient rotated and scaled as the vector was to become the entry.

    Rotation trick (Fifty et al. 2024, section 4): with unit vectors z', q' and r = (z' + q') / |z' + q'|, the matrix
    |q| / |z| (I - 2 r r^T + 2 q' z'^T) maps z to q and counts as a constant. Where there is no such rotation (z = 0),
    the matrix is the identity up to its scale.
    """
    with torch.no_grad():
        from_ND, to_ND = F.normalize(vectors_ND, dim=-1), F.normalize(entries_ND, dim=-1)
        between_ND = F.normalize(from_ND + to_ND, dim=-1)
        scale_N1 = entries_ND.norm(dim=-1, keepdim=True) / vectors_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    reflected_ND = (
        vectors_ND - 2.0 * between_ND * _along(vectors_ND, between_ND) + 2.0 * to_ND * _along(vectors_ND, from_ND)
    )
    rotated_ND = scale_N1 * reflected_ND
    return rotated_ND + (entries_ND - rotated_ND).detach()  # rounding must not reach the decoder


def _along(vectors_ND: Tensor, directions_ND: Tensor) -> Tensor:
    return (vectors_ND * directions_ND).sum(-1, keepdim=True)


GRADIENTS = {"straight-through": straight_through, "rotation": rotate}
