"""The adversary of a tokenizer in training: when it learns and counts, its own step, and what keeps it from winning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.first_stage.discriminator import PatchDiscriminator
from stages.first_stage.losses import ADVERSARIAL_LOSSES, gradient_penalty, lecam_regularisation, ramp
from stages.options import TokenizerTrainOptions

LECAM_DECAY = 0.999


class Adversary:
    """A discriminator with its losses and the moving averages of LeCam.

    Args:
        network: the discriminator itself.
        parallel: the same network, data-parallel.
        options: losses and schedule.
        all_reduce_mean: averages a tensor over the ranks, in place.
    """

    def __init__(
        self,
        network: PatchDiscriminator,
        parallel: nn.Module,
        options: TokenizerTrainOptions,
        all_reduce_mean: Callable[[Tensor], None],
    ):
        self.network, self.parallel, self.options, self.all_reduce_mean = network, parallel, options, all_reduce_mean
        self.discriminator_loss, self.generator_loss = ADVERSARIAL_LOSSES[options.discriminator_loss]
        device = next(network.parameters()).device
        self.logit_means = torch.zeros(2, device=device)  # moving averages: of images, of reconstructions

    def share(self, num_seen: int) -> float:
        """From 0 to 1: how far the adversarial term is switched on after `num_seen` images."""
        return ramp(num_seen, self.options.discriminator_start_samples, self.options.discriminator_ramp_samples)

    def learns(self, num_seen: int) -> bool:
        """Whether the discriminator learns at this point: always, or from some images before its term is switched on."""
        warm = self.options.discriminator_warm_samples
        return warm is None or num_seen >= self.options.discriminator_start_samples - warm

    def judge(self, reconstructions: Tensor) -> Tensor:
        """The generator's loss. Gradients flow to the reconstructions only."""
        self.network.requires_grad_(False)
        try:
            return self.generator_loss(self.network(reconstructions))
        finally:
            self.network.requires_grad_(True)

    def loss(self, images: Tensor, reconstructions: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss and detached scalars to log. Gradients flow to the discriminator only.

        Args:
            images: float (B, C, H, W).
            reconstructions: of these images.
            step: decides whether this is one of the steps with a gradient penalty.
        """
        options = self.options
        is_penalised = options.r1_weight > 0 and step % options.r1_every_steps == 0
        images, reconstructions = images.detach(), reconstructions.detach().to(images.dtype)
        images.requires_grad_(is_penalised)
        # The penalty's second derivative is taken in float32; bf16 has too few digits for it.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bf16" and not is_penalised):
            real, fake = self.parallel(torch.cat([images, reconstructions])).chunk(2)
        loss = self.discriminator_loss(real, fake)
        metrics = {"discriminator": loss.detach(), "logit_real": real.detach().float().mean()}
        metrics["logit_fake"] = fake.detach().float().mean()
        if options.lecam_weight > 0:
            self._follow(torch.stack([metrics["logit_real"], metrics["logit_fake"]]))
            lecam = lecam_regularisation(real, fake, *self.logit_means)
            metrics["lecam"], loss = lecam.detach(), loss + options.lecam_weight * lecam
        if is_penalised:
            penalty = gradient_penalty(real, images)
            metrics["r1"], loss = penalty.detach(), loss + options.r1_weight * options.r1_every_steps * penalty
        return loss, metrics

    def _follow(self, means: Tensor) -> None:
        self.all_reduce_mean(means)
        self.logit_means = LECAM_DECAY * self.logit_means + (1 - LECAM_DECAY) * means

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "logit_means": self.logit_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.logit_means = state["logit_means"].to(self.logit_means.device)
