"""The tokenizer: images to codes and back."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stages.first_stage.blocks import Decoder, Encoder
from stages.first_stage.quantizers import Quantized, build_quantizer
from stages.first_stage.tokenizer_config import TokenizerConfig


class Tokenizer(nn.Module):
    """VQGAN without its losses. State-dict keys are those of CompVis `VQModel`.

    Attributes:
        config: the architecture.
        fingerprint: sha-256 of tensors and configuration; set on tokenizers loaded from an artefact, else "".
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.fingerprint = ""
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = build_quantizer(
            config.quantizer, config.codebook_size, config.codebook_dim, config.fsq_levels
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def downsample(self) -> int:
        return self.config.downsample

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of codes of a square image of `size` pixels."""
        return size // self.downsample, size // self.downsample

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes of float images in [-1, 1], int64 (B, h * w), row by row."""
        return self.quantize.encode(self.quant_conv(self.encoder(images_BCHW))).flatten(1)

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Images (B, C, H, W) of int64 codes (B, h, w); around [-1, 1], not clamped."""
        # Entries looked up lie channels last, in which convolutions and norms on CPUs are further from the exact result.
        entries_BDHW = self.quantize.decode(codes_BHW).contiguous()
        return self.decoder(self.post_quant_conv(entries_BDHW))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions and what the losses need."""
        quantized = self.quantize(self.quant_conv(self.encoder(images_BCHW)))
        return self.decoder(self.post_quant_conv(quantized.z_BDHW)), quantized

    @torch.no_grad()
    def baked(self) -> "Tokenizer":
        """This tokenizer as it is stored: without what only training needs, its quantizer of the simplest kind."""
        kind, tensors = self.quantize.stored()
        copy = Tokenizer(replace(self.config, quantizer=kind, dropout=0.0)).to(self.quant_conv.weight.device)
        others = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("quantize.")}
        copy.load_state_dict({**others, **{f"quantize.{name}": tensor for name, tensor in tensors.items()}})
        return copy.eval()
