"""Queries, keys and values of a block as they meet in its attention: normalised and turned where the ViT does so."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class RotaryAttention(Attention):
    """timm's attention with rotary positions (RoPE, arXiv 2104.09864) on the patches' queries and keys.

    Channels of a head are in two halves: channel i is turned with channel i + d / 2. Class, register and KD tokens
    have no place in the image and are not turned, nor are the rows that prompts add.
    """

    rope_sin: Tensor
    "(P, D) sines for P patches, of all heads; the first half of a head has its minus sign already"
    rope_cos: Tensor
    "(P, D) cosines"

    def __init__(self, *arguments: Any, prefix: int, sin: Tensor, cos: Tensor, **options: Any) -> None:
        """prefix: tokens in front of the patches. sin, cos: (P, D), without any sign put in."""
        super().__init__(*arguments, **options)
        self.prefix = prefix
        signs = torch.ones(2, 1, dtype=sin.dtype, device=sin.device)
        signs[0] = -1
        signed = sin.reshape(len(sin), self.num_heads, 2, -1) * signs
        self.register_buffer("rope_sin", signed.reshape(sin.shape), persistent=False)
        self.register_buffer("rope_cos", cos, persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        """(B, N, D) queries or keys -> the same, the patches among them turned."""
        end = self.prefix + len(self.rope_cos)
        patches = x[:, self.prefix : end]
        swapped = patches.unflatten(-1, (self.num_heads, 2, -1)).flip(-2).flatten(2)
        turned = (patches * self.rope_cos + swapped * self.rope_sin).to(x.dtype)
        return torch.cat([x[:, : self.prefix], turned, x[:, end:]], dim=1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), as timm's; masks are not for images. Raises: ValueError for a mask."""
        if attn_mask is not None or is_causal:
            raise ValueError("rotary attention takes no mask")
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in queries_keys_values(self, x))
        mixed = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        out: Tensor = self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))
        return out


def queries_keys_values(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D) behind a block's first norm -> (B, N, D) each, ready for the products with each other."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, -1)).unbind(-2)
    return ready(attention, attention.q_norm, q), ready(attention, attention.k_norm, k), v


def ready(attention: Attention, norm: nn.Module, x: Tensor) -> Tensor:
    """Queries or keys (B, N, D) behind their norm and turned, where there is either."""
    x = head_normed(attention, norm, x)
    return attention.turn(x) if isinstance(attention, RotaryAttention) else x


def head_normed(attention: Attention, norm: nn.Module, x: Tensor) -> Tensor:
    """(B, N, D), each head's channels normalised where the ViT does so."""
    if isinstance(norm, nn.Identity):
        return x
    return norm(x.unflatten(-1, (attention.num_heads, -1))).flatten(2).to(x.dtype)


def output_norm(attention: Attention) -> nn.Module:
    """The norm between attention and its projection; Identity in most ViTs."""
    found = getattr(attention, "norm", None)
    return found if isinstance(found, nn.Module) else nn.Identity()
