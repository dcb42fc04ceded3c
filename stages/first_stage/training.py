"""One optimizer step of the first stage: one forward pass, two backward passes (tokenizer, then discriminator)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.first_stage.adversary import Adversary
from stages.first_stage.discriminator import PatchDiscriminator
from stages.first_stage.losses import adaptive_weight, label_loss, last_layer_grad_norm, reconstruction_loss
from stages.first_stage.lpips import Lpips
from stages.first_stage.quantizers.base import Quantized
from stages.first_stage.quantizers.loss_weights import loss_weights
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.weight_average import WeightAverage
from stages.options import TokenizerTrainOptions
from stages.schedule import warmup_constant, warmup_cosine

BETAS = (0.5, 0.9)
NUM_RECENT_VECTORS = 16_384  # where dead codes may move: a small batch has fewer vectors than a codebook entries


class FirstStageTrainer:
    """Tokenizer and discriminator with their optimizers and weight average.

    Args:
        tokenizer: trained in place.
        discriminator: or None to train without one.
        options: losses and schedules.
        perceptual: the network of the perceptual term, or None where its weight is 0.
        is_labels: inputs are one-hot labels, outputs their logits; the reconstruction is judged by binary cross entropy.
        wrap: makes a module data-parallel (identity for one process).
        all_reduce_mean: averages a tensor over the ranks, in place (no-op for one process).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        discriminator: PatchDiscriminator | None,
        options: TokenizerTrainOptions,
        perceptual: Lpips | None = None,
        is_labels: bool = False,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        all_reduce_mean: Callable[[Tensor], None] = lambda tensor: None,
    ):
        self.options, self.perceptual, self.is_labels = options, perceptual, is_labels
        self.loss_weights, self.all_reduce_mean = loss_weights(tokenizer.config.quantizer, options), all_reduce_mean
        tokenizer.quantize.configure(options)
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.tokenizer_parallel = wrap(tokenizer)
        self.tokenizer_optimizer = _optimizer(tokenizer)
        self.adversary, self.discriminator_optimizer = None, None
        if discriminator is not None:
            self.adversary = Adversary(discriminator, wrap(discriminator), options, all_reduce_mean)
            self.discriminator_optimizer = _optimizer(discriminator)
        self.average = WeightAverage(tokenizer, options.weight_average_decay)
        self.device = next(tokenizer.parameters()).device
        self.recent_vectors_ND = torch.zeros(0, tokenizer.config.codebook_dim, device=self.device)
        # Uses of each code since the last revival, and since its health was last logged.
        self.code_counts_K, self.health_counts_K = (
            torch.zeros(tokenizer.codebook_size, dtype=torch.int64, device=self.device) for _ in range(2)
        )

    def learning_rate(self, num_seen: int) -> float:
        """Learning rate after `num_seen` images."""
        o = self.options
        if o.decay == "none":
            return o.learning_rate * warmup_constant(num_seen + o.global_batch_size, o.warmup_samples)
        return o.learning_rate * warmup_cosine(num_seen + o.global_batch_size, o.warmup_samples, o.num_samples, 0.01)

    def step(self, images_BCHW: Tensor, num_seen: int) -> dict[str, Tensor]:
        """One step on float images in [-1, 1], or one-hot labels, after `num_seen` images; returns detached scalars to log.

        Returns:
            reconstruction, the quantizer's losses, grad_norm; perceptual if there is such a term; generator and adversarial_weight
            while that term counts; discriminator, logit_real, logit_fake (and lecam, r1) while the discriminator learns.
        """
        self.tokenizer.quantize.advance(num_seen)
        if num_seen == 0 and self.options.kmeans_start and self.tokenizer.quantize.row_tensors:
            self._start_codebook(images_BCHW)
        learning_rate = self.learning_rate(num_seen)
        reconstructions, metrics = self._tokenizer_step(images_BCHW, num_seen, learning_rate)
        if self.adversary is not None and self.adversary.learns(num_seen):
            metrics |= self._discriminator_step(images_BCHW, reconstructions, num_seen, learning_rate)
        self.average.update(self.tokenizer)
        return metrics

    def _tokenizer_step(self, images: Tensor, num_seen: int, learning_rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        with self._autocast():
            reconstructions, quantized = self.tokenizer_parallel(images)
        reconstruction, metrics = self._reconstruction(images, reconstructions)
        loss = reconstruction + sum(self.loss_weights[name] * value for name, value in quantized.losses.items())
        metrics |= {name: value.detach() for name, value in quantized.losses.items()}
        share = 0.0 if self.adversary is None else self.adversary.share(num_seen)
        if self.adversary is not None and share > 0:
            with self._autocast():
                generator = self.adversary.judge(reconstructions)
            weight = share * o.discriminator_weight * self._balance(reconstruction, generator)
            loss = loss + weight * generator
            metrics |= {"generator": generator.detach(), "adversarial_weight": weight.detach()}
        loss.backward()
        metrics["grad_norm"] = self._update(self.tokenizer, self.tokenizer_optimizer, learning_rate)
        self._count(quantized)
        if self.tokenizer.quantize.row_tensors:
            self.recent_vectors_ND = torch.cat([self.recent_vectors_ND, quantized.vectors_ND])[-NUM_RECENT_VECTORS:]
        return reconstructions.detach(), metrics

    @torch.no_grad()
    def _count(self, quantized: Quantized) -> None:
        """Counts codes as they are when encoding: what a quantizer draws in training is spread wider."""
        quantize, size = self.tokenizer.quantize, len(self.code_counts_K)
        codes_N = quantize.assign(quantized.vectors_ND) if quantize.draws else quantized.codes_BHW.flatten()
        counts_K = torch.bincount(codes_N, minlength=size)
        self.code_counts_K += counts_K
        self.health_counts_K += counts_K

    @torch.no_grad()
    def _start_codebook(self, images_BCHW: Tensor) -> None:
        with self._autocast():
            z_BDHW = self.tokenizer.quant_conv(self.tokenizer.encoder(images_BCHW))
        self.tokenizer.quantize.start(self.tokenizer.quantize(z_BDHW).vectors_ND)
        self._copy_rows_to_average(torch.arange(self.tokenizer.codebook_size, device=z_BDHW.device))

    def revive_dead_codes(self) -> int:
        """Moves entries that no rank used since the last call onto recent encoder outputs; returns how many."""
        rows_M = self.tokenizer.quantize.revive(self.code_counts_K, self.recent_vectors_ND)
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

    def _reconstruction(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the original calls the negative log likelihood: all terms that compare with the input."""
        o = self.options
        if self.is_labels:
            loss = label_loss(images, reconstructions)
            return loss, {"reconstruction": loss.detach()}
        loss = reconstruction_loss(images, reconstructions, o.l1_weight, o.l2_weight)
        metrics = {}
        if self.perceptual is not None:
            with self._autocast():
                perceptual = self.perceptual(images, reconstructions).mean()
            loss = loss + o.perceptual_weight * perceptual
            metrics["perceptual"] = perceptual.detach()
        return loss, {"reconstruction": loss.detach(), **metrics}

    def _balance(self, reconstruction: Tensor, generator: Tensor) -> Tensor:
        """The adaptive weight; its norms are averaged over the ranks, so that all use the same."""
        if not self.options.adaptive_weight:
            return torch.ones((), device=reconstruction.device)
        last_layer = self.tokenizer.decoder.conv_out.weight
        norms = torch.stack(
            [last_layer_grad_norm(reconstruction, last_layer), last_layer_grad_norm(generator, last_layer)]
        )
        self.all_reduce_mean(norms)
        return adaptive_weight(norms[0], norms[1], self.options.max_adaptive_weight)

    def _discriminator_step(
        self, images: Tensor, reconstructions: Tensor, num_seen: int, learning_rate: float
    ) -> dict[str, Tensor]:
        assert self.adversary is not None and self.discriminator is not None
        loss, metrics = self.adversary.loss(images, reconstructions, num_seen // self.options.global_batch_size)
        loss.backward()
        self._update(self.discriminator, self.discriminator_optimizer, learning_rate)
        return metrics

    def _update(self, module: nn.Module, optimizer: Any, learning_rate: float) -> Tensor:
        """An optimizer step; returns the norm of the gradient before it was clipped."""
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.options.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def averaged_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer with the averaged weights (the current ones when averaging is off): the result of training."""
        copy = Tokenizer(self.tokenizer.config).to(self.device)
        copy.load_state_dict(self.average.state_of(self.tokenizer))
        return copy.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs to go on."""
        state = {
            "tokenizer": self.tokenizer.state_dict(),
            "tokenizer_optimizer": self.tokenizer_optimizer.state_dict(),
            "average": self.average.average,
            "num_updates": self.average.num_updates,
            "code_counts": self.code_counts_K,
            "health_counts": self.health_counts_K,
            "recent_vectors": self.recent_vectors_ND,
        }
        if self.adversary is not None and self.discriminator_optimizer is not None:
            state["adversary"] = self.adversary.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.tokenizer_optimizer.load_state_dict(state["tokenizer_optimizer"])
        self.average.average = state["average"]
        self.average.num_updates = state["num_updates"]
        self.code_counts_K, self.health_counts_K = state["code_counts"], state["health_counts"]
        self.recent_vectors_ND = state["recent_vectors"]
        if self.adversary is not None and self.discriminator_optimizer is not None:
            self.adversary.load_state_dict(state["adversary"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
