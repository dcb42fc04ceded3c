"""One optimizer step of the first stage: one forward pass, two backward passes (tokenizer, then discriminator)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import ConfigError
from stages.first_stage.discriminator import PatchDiscriminator, smallest_image
from stages.first_stage.losses import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    last_layer_grad_norm,
    ramp,
    reconstruction_loss,
)
from stages.first_stage.quantizers.loss_weights import loss_weights
from stages.first_stage.tokenizer import Tokenizer
from stages.options import TokenizerTrainOptions
from stages.schedule import warmup_constant, warmup_cosine


def build_discriminator(options: TokenizerTrainOptions, in_channels: int, size: int) -> PatchDiscriminator | None:
    """The discriminator asked for, or None when its weight is 0.

    Raises:
        ConfigError: the image is too small to leave one patch.
    """
    if options.discriminator_weight == 0:
        return None
    needed = smallest_image(options.discriminator_layers)
    if size < needed:
        raise ConfigError(
            f"tokenizer_train.discriminator_layers is {options.discriminator_layers}, but that needs images of at least {needed} "
            f"pixels and images.size is {size}. Use fewer layers."
        )
    return PatchDiscriminator(in_channels, options.discriminator_channels, options.discriminator_layers)


class WeightAverage:
    """Exponential moving average of a module's parameters, with a shorter memory over the first steps."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        names = list(self.average)
        current = dict(module.named_parameters())
        torch._foreach_lerp_([self.average[n] for n in names], [current[n].detach() for n in names], 1.0 - decay)


class FirstStageTrainer:
    """Tokenizer and discriminator with their optimizers and weight average.

    Args:
        tokenizer: trained in place.
        discriminator: or None to train without one.
        options: losses and schedules.
        wrap: makes a module data-parallel (identity for one process).
        all_reduce_mean: averages a tensor over the ranks, in place (no-op for one process).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        discriminator: PatchDiscriminator | None,
        options: TokenizerTrainOptions,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        all_reduce_mean: Callable[[Tensor], None] = lambda tensor: None,
    ):
        self.options, self.all_reduce_mean = options, all_reduce_mean
        self.loss_weights = loss_weights(options)
        tokenizer.quantize.configure(options)
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.tokenizer_parallel = wrap(tokenizer)
        self.discriminator_parallel = None if discriminator is None else wrap(discriminator)
        betas = (0.5, 0.9)
        self.tokenizer_optimizer = torch.optim.AdamW(
            tokenizer.parameters(), lr=0.0, betas=betas, weight_decay=0.0, fused=True
        )
        self.discriminator_optimizer = (
            None
            if discriminator is None
            else torch.optim.AdamW(discriminator.parameters(), lr=0.0, betas=betas, weight_decay=0.0, fused=True)
        )
        self.average = WeightAverage(tokenizer, options.weight_average_decay)
        self.device_type = next(tokenizer.parameters()).device.type
        self.last_vectors_ND = torch.zeros(0, tokenizer.config.codebook_dim)
        self.code_counts_K = torch.zeros(
            tokenizer.codebook_size, dtype=torch.int64, device=next(tokenizer.parameters()).device
        )

    def learning_rate(self, num_seen: int) -> float:
        """Learning rate after `num_seen` images."""
        o = self.options
        if o.decay == "none":
            return o.learning_rate * warmup_constant(num_seen + o.global_batch_size, o.warmup_samples)
        return o.learning_rate * warmup_cosine(num_seen + o.global_batch_size, o.warmup_samples, o.num_samples, 0.01)

    def step(self, images_BCHW: Tensor, num_seen: int) -> dict[str, Tensor]:
        """One step on float images in [-1, 1] after `num_seen` images; returns detached scalars to log.

        Returns:
            reconstruction, the quantizer's losses, and with a discriminator generator, discriminator, adversarial_weight.
        """
        self.tokenizer.quantize.advance(num_seen)
        if num_seen == 0 and self.options.kmeans_start:
            self._start_codebook(images_BCHW)
        learning_rate = self.learning_rate(num_seen)
        reconstructions, metrics = self._tokenizer_step(images_BCHW, num_seen, learning_rate)
        if self.discriminator is not None:
            metrics["discriminator"] = self._discriminator_step(images_BCHW, reconstructions, learning_rate)
        self.average.update(self.tokenizer)
        return metrics

    def _tokenizer_step(self, images: Tensor, num_seen: int, learning_rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        with self._autocast():
            reconstructions, quantized = self.tokenizer_parallel(images)
        reconstruction = reconstruction_loss(images, reconstructions, o.l1_weight, o.l2_weight)
        loss = reconstruction + sum(self.loss_weights[name] * value for name, value in quantized.losses.items())
        metrics = {"reconstruction": reconstruction.detach()}
        metrics |= {name: value.detach() for name, value in quantized.losses.items()}
        share = ramp(num_seen, o.discriminator_start_samples, o.discriminator_ramp_samples)
        if self.discriminator is not None and share > 0:
            with self._autocast():
                self.discriminator.requires_grad_(False)
                generator = generator_loss(self.discriminator(reconstructions))
                self.discriminator.requires_grad_(True)
            weight = share * o.discriminator_weight * self._balance(reconstruction, generator)
            loss = loss + weight * generator
            metrics |= {"generator": generator.detach(), "adversarial_weight": weight.detach()}
        loss.backward()
        self._update(self.tokenizer, self.tokenizer_optimizer, learning_rate)
        self.code_counts_K += torch.bincount(quantized.codes_BHW.flatten(), minlength=len(self.code_counts_K))
        self.last_vectors_ND = quantized.vectors_ND
        return reconstructions.detach(), metrics

    @torch.no_grad()
    def _start_codebook(self, images_BCHW: Tensor) -> None:
        with self._autocast():
            z_BDHW = self.tokenizer.quant_conv(self.tokenizer.encoder(images_BCHW))
        self.tokenizer.quantize.start(self.tokenizer.quantize(z_BDHW).vectors_ND)
        self._copy_rows_to_average(torch.arange(self.tokenizer.codebook_size, device=z_BDHW.device))

    def revive_dead_codes(self) -> int:
        """Moves entries that no rank used since the last call onto the latest encoder outputs; returns how many."""
        rows_M = self.tokenizer.quantize.revive(self.code_counts_K, self.last_vectors_ND)
        self._copy_rows_to_average(rows_M)
        self.code_counts_K.zero_()
        return len(rows_M)

    @torch.no_grad()
    def _copy_rows_to_average(self, rows_M: Tensor) -> None:
        """A moved entry has no past to average over."""
        for name in self.tokenizer.quantize.row_tensors:
            average = self.average.average.get(f"quantize.{name}")
            if average is not None:
                average[rows_M] = self.tokenizer.quantize.get_parameter(name)[rows_M]

    def _balance(self, reconstruction: Tensor, generator: Tensor) -> Tensor:
        if not self.options.adaptive_weight:
            return torch.ones((), device=reconstruction.device)
        last_layer = self.tokenizer.decoder.conv_out.weight
        norms = torch.stack(
            [last_layer_grad_norm(reconstruction, last_layer), last_layer_grad_norm(generator, last_layer)]
        )
        self.all_reduce_mean(norms)
        return adaptive_weight(norms[0], norms[1], self.options.max_adaptive_weight)

    def _discriminator_step(self, images: Tensor, reconstructions: Tensor, learning_rate: float) -> Tensor:
        assert self.discriminator is not None and self.discriminator_parallel is not None
        with self._autocast():
            logits = self.discriminator_parallel(torch.cat([images, reconstructions.to(images.dtype)]))
        loss = hinge_discriminator_loss(*logits.chunk(2))
        loss.backward()
        self._update(self.discriminator, self.discriminator_optimizer, learning_rate)
        return loss.detach()

    def _update(self, module: nn.Module, optimizer: Any, learning_rate: float) -> None:
        if self.options.grad_clip:
            nn.utils.clip_grad_norm_(module.parameters(), self.options.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def averaged_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer with the averaged weights (the current ones when averaging is off)."""
        copy = Tokenizer(self.tokenizer.config)
        copy.load_state_dict(self.tokenizer.state_dict() | (self.average.average if self.average.decay > 0 else {}))
        return copy.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs to go on."""
        state = {
            "tokenizer": self.tokenizer.state_dict(),
            "tokenizer_optimizer": self.tokenizer_optimizer.state_dict(),
            "average": self.average.average,
            "num_updates": self.average.num_updates,
            "code_counts": self.code_counts_K,
        }
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.tokenizer_optimizer.load_state_dict(state["tokenizer_optimizer"])
        self.average.average = state["average"]
        self.average.num_updates = state["num_updates"]
        self.code_counts_K = state["code_counts"]
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
