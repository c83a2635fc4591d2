"""A small PixArt in PyTorch under the official code's names, from the papers' description: with
PixArt-Σ's options, which diffusers lacks.

Its state dict is what an official .pth holds, so a file that it loads with strict=True has every
tensor that the official model asks for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pixart_jax.models.configs import TransformerConfig


def linear_stack(*widths: int) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(*widths[:2]), nn.SiLU(), nn.Linear(*widths[1:]))


def sinusoid(values: torch.Tensor) -> torch.Tensor:
    angles = values[..., None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


def positions(rows: int, columns: int, width: int, base: float, scale: float) -> torch.Tensor:
    """[rows · columns, width]: the column's sines and cosines, then the row's."""

    def axis(count):
        angles = (torch.arange(count).double() * base / count / scale)[:, None] / 10000 ** (
            torch.arange(width // 4).double() / (width // 4)
        )
        return torch.cat([angles.sin(), angles.cos()], 1)

    x, y = axis(columns)[None].expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([x, y], -1).reshape(rows * columns, width).float()


class ScalarEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = linear_stack(256, width, width)

    def forward(self, values):
        return self.mlp(sinusoid(values))


class Mlp(nn.Module):
    def __init__(self, into: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(into, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig, compressed: bool):
        super().__init__()
        d, r = config.width, config.kv_compression
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        if compressed:
            self.sr, self.norm = nn.Conv2d(d, d, r, r, groups=d), nn.LayerNorm(d)

    def forward(self, x, grid):
        b, n, d = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if hasattr(self, "sr"):
            images = (a.transpose(1, 2).reshape(b, d, *grid) for a in (k, v))
            k, v = (self.norm(self.sr(a).flatten(2).transpose(1, 2)) for a in images)
        q, k, v = (a.reshape(b, a.shape[1], self.heads, -1).transpose(1, 2) for a in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, self.heads = config.width, config.heads
        self.q_linear, self.kv_linear = nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x, text, mask):
        q, k, v = (
            a.reshape(*a.shape[:2], self.heads, -1).transpose(1, 2)
            for a in (self.q_linear(x), *self.kv_linear(text).chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, compressed: bool):
        super().__init__()
        d = config.width
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d**0.5)
        self.attn, self.cross_attn = SelfAttention(config, compressed), CrossAttention(config)
        self.mlp = Mlp(d, config.mlp_width, d)

    def forward(self, x, text, mask, modulation, grid):
        modulation = (self.scale_shift_table + modulation).chunk(6, 1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a * self.attn(modulated(x, shift_a, scale_a), grid)
        x = x + self.cross_attn(x, text, mask)
        return x + gate_m * self.mlp(modulated(x, shift_m, scale_m))


class OfficialPixArt(nn.Module):
    """The model of a config; every parameter at PyTorch's own init, to be drawn anew by the
    test."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, d, side = config, config.width, config.sample_size // config.patch_size
        table = positions(side, side, d, config.base, config.position_scale)
        self.register_buffer("pos_embed", table[None])
        self.x_embedder, self.y_embedder, self.final_layer = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(config.in_channels, d, *[config.patch_size] * 2)
        self.t_embedder = ScalarEmbedder(d)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if config.size_conditions:
            self.csize_embedder, self.ar_embedder = ScalarEmbedder(d // 3), ScalarEmbedder(d // 3)
        self.y_embedder.y_proj = Mlp(config.caption_width, d, d)
        null = torch.randn(config.text_tokens, config.caption_width) / config.caption_width**0.5
        self.y_embedder.register_buffer("y_embedding", null)
        compressed = (i in config.kv_compression_layers for i in range(config.depth))
        self.blocks = nn.ModuleList(Block(config, here) for here in compressed)
        self.final_layer.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.final_layer.scale_shift_table = nn.Parameter(torch.randn(2, d) / d**0.5)

    def forward(self, latents, timesteps, text, mask, size=None, ratio=None):
        """[b, c, h, w], [b], [b, l, c], bool [b, l], [b, 2], [b] → [b, out, h, w]."""
        c = self.config
        x = self.x_embedder.proj(latents)
        b, d, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2) + positions(rows, columns, d, c.base, c.position_scale)
        t = self.t_embedder(timesteps)
        if c.size_conditions:
            t = t + torch.cat([self.csize_embedder(size).flatten(1), self.ar_embedder(ratio)], 1)
        modulation, text = self.t_block(t).reshape(b, 6, d), self.y_embedder.y_proj(text)
        for block in self.blocks:
            x = block(x, text, mask, modulation, (rows, columns))
        shift, scale = (self.final_layer.scale_shift_table + t[:, None]).chunk(2, 1)
        x, p = self.final_layer.linear(modulated(x, shift, scale)), c.patch_size
        x = x.reshape(b, rows, columns, p, p, c.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, c.out_channels, rows * p, columns * p)


def run_official(
    model: nn.Module, latents, timesteps, text_states, text_lengths, size=None, aspect_ratio=None
) -> np.ndarray:
    """The same arguments as ours, channels last; [b, h, w, out]."""
    mask = torch.arange(text_states.shape[1]) < torch.tensor(text_lengths)[:, None]
    told = () if size is None else (torch.tensor(size), torch.tensor(aspect_ratio))
    x, text = torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(text_states)
    with torch.no_grad():
        out = model(x, torch.tensor(timesteps), text, mask, *told)
    return out.permute(0, 2, 3, 1).numpy()
