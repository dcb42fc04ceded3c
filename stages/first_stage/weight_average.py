"""Averaged weights of a network in training."""

import torch
from torch import Tensor, nn

from stages.schedule import average_decay


class WeightAverage:
    """Exponential moving average of a module's parameters, with a shorter memory over the first steps.

    Attributes:
        decay: 0 averages nothing.
        average: the averaged parameters by name.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the parameters as they are now."""
        self.num_updates += 1
        decay = average_decay(self.decay, self.num_updates)
        names = list(self.average)
        current = dict(module.named_parameters())
        torch._foreach_lerp_([self.average[n] for n in names], [current[n].detach() for n in names], 1.0 - decay)

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """State dict of the module with the averaged parameters, or as it is when nothing is averaged. Buffers are current ones."""
        return {**module.state_dict(), **(self.average if self.decay > 0 else {})}
