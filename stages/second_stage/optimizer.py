"""AdamW that keeps an exponential average of the weights in its state, so that whatever shards the state shards the average."""

from typing import Any

import torch

from stages.schedule import average_decay

WEIGHT_AVERAGE = "weight_average"


class AveragingAdamW(torch.optim.AdamW):
    """torch's fused AdamW with the average of the weights after each step as a third state beside the moments.

    DeepSpeed hands an optimizer the flat slice of fp32 weights that its rank owns, and saves, loads and offloads whatever state
    belongs to it. The average follows faster at first, see `average_decay`.

    Args:
        groups: parameter groups as for AdamW.
        average_decay: decay per step in (0, 1); 0 keeps no average.
        arguments: of AdamW.
    """

    def __init__(self, groups: Any, *, average_decay: float, **arguments: Any):
        super().__init__(groups, fused=True, **arguments)
        self.average_decay = average_decay

    def step(self, closure: Any = None) -> Any:
        """One step of AdamW, then of the average."""
        result = super().step(closure)
        if self.average_decay > 0.0:
            self._average()
        return result

    @torch.no_grad()
    def _average(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state.get(weight)
                if not state:  # no gradient yet
                    continue
                if WEIGHT_AVERAGE not in state:
                    state[WEIGHT_AVERAGE] = weight.detach().clone()
                    continue
                decay = average_decay(self.average_decay, float(state["step"]))
                state[WEIGHT_AVERAGE].lerp_(weight.detach(), 1.0 - decay)
