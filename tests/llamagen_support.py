"""LlamaGen's class-conditional GPT as its paper and its published code define it, in its few formulas since no package has it."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            mean = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5) + mean)
    return module.eval()


class LlamaGenBlock(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.attention = nn.Module()
        self.attention.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.attention.wo = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Module()
        self.feed_forward.w1 = nn.Linear(width, ffn, bias=False)
        self.feed_forward.w3 = nn.Linear(width, ffn, bias=False)
        self.feed_forward.w2 = nn.Linear(ffn, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)


class LlamaGenGpt(nn.Module):
    """LlamaGen's class-conditional GPT, by its published names. Complex numbers stand for the neighbouring pairs it rotates."""

    def __init__(self, vocabulary, classes, width, ffn, layers, heads):
        super().__init__()
        self.heads = heads
        self.cls_embedding = nn.Module()
        self.cls_embedding.embedding_table = nn.Embedding(classes + 1, width)
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LlamaGenBlock(width, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def rotations(self, side, head_size):
        """e^(i angle) per position and pair; 0 at the class, whose queries and keys vanish."""
        frequencies = [10000.0 ** (-2 * j / (head_size // 2)) for j in range(head_size // 4)]
        angles = [
            [row * f for f in frequencies] + [col * f for f in frequencies]
            for row in range(side)
            for col in range(side)
        ]
        unit = torch.polar(torch.ones(side * side, head_size // 2), torch.tensor(angles))
        return torch.cat([torch.zeros(1, head_size // 2, dtype=unit.dtype), unit])

    def forward(self, codes, classes, side):
        x = torch.cat([self.cls_embedding.embedding_table(classes)[:, None], self.tok_embeddings(codes[:, :-1])], 1)
        b, t, c = x.shape
        rotations = self.rotations(side, c // self.heads)[:t]

        def rotate(v):
            pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * rotations).flatten(-2)

        for block in self.layers:
            q, k, v = block.attention.wqkv(block.attention_norm(x)).split(c, -1)
            q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))
            scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(c // self.heads)
            future = torch.ones(t, t, dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            x = x + block.attention.wo(mixed.transpose(1, 2).reshape(b, t, c))
            hidden, feed = block.ffn_norm(x), block.feed_forward
            x = x + feed.w2(F.silu(feed.w1(hidden)) * feed.w3(hidden))
        return self.output(self.norm(x))
