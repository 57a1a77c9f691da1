"""From an image to the tokens in front of the first block: class token, register tokens, patches, with positions."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

STEM_BATCH = 16
"""images that go through a convolutional stem at a time on a CPU: their feature maps stay in its caches.
EfficientNet-Lite0 at 128 pixels took 11 ms an image so, 28 in one batch of 128 in the usual layout (a busy core)"""


CONTRAST = 0.5
"""weight of where something is against what it is, in features of heads from statistics. Digits, frozen student: 96.0 %
at 0, 98.1 at 0.25, 98.9 at 0.5, 98.7 at 1; photographs, images for tuning: 66.2, 66.3, 66.0, 64.9. With ranpac, one
draw of its projection (LOG.md)"""


def registers(vit: VisionTransformer) -> int:
    """Register tokens (arXiv 2309.16588), which stand between the class token and the patches."""
    return int(vit.num_prefix_tokens) - 1


def patch_count(vit: VisionTransformer) -> int:
    """Number of patches that a ViT cuts an image into."""
    return int(vit.patch_embed.num_patches)


def token_count(vit: VisionTransformer) -> int:
    """Number of tokens of an image: class token, registers and patches."""
    return int(vit.num_prefix_tokens) + patch_count(vit)


def rows_in_front(vit: VisionTransformer) -> tuple[Tensor, Tensor | None]:
    """What no image changes: class and register tokens with their positions (1, 1 + R, D), positions of the patches.

    The latter are (1, P, D), or None for a ViT that has rotary ones only.
    """
    register = getattr(vit, "reg_token", None)
    rows = vit.cls_token if register is None else torch.cat([vit.cls_token, register], dim=1)
    if vit.pos_embed is None or vit.no_embed_class:
        return rows, vit.pos_embed
    count = rows.shape[1]
    return rows + vit.pos_embed[:, :count], vit.pos_embed[:, count:]


def embed(vit: VisionTransformer, x: Tensor) -> Tensor:
    """(B, 3, S, S) normalised images -> (B, 1 + R + P, D) tokens for the first block."""
    rows, positions = rows_in_front(vit)
    if x.is_cuda or not hasattr(vit.patch_embed, "backbone"):
        patches = vit.patch_embed(x)
    else:
        parts = [vit.patch_embed(part.contiguous(memory_format=torch.channels_last)) for part in x.split(STEM_BATCH)]
        patches = torch.cat(parts)
    if positions is not None:
        patches = patches + positions
    tokens: Tensor = vit.norm_pre(torch.cat([rows.expand(len(x), -1, -1), patches], dim=1))
    return tokens


def pooling(vit: VisionTransformer) -> Tensor:
    """float32 (4, P): what makes the last four of closed_form.feature_parts of the patches of an image.

    Their mean says what is seen; CONTRAST times the difference of lower and upper half, of right and left half, and of
    the two diagonals says where. P patches lie row by row; of an odd number the one in the middle is in neither half.
    """
    rows, columns = ((2.0 * torch.arange(n) - (n - 1)).sign() for n in vit.patch_embed.grid_size)
    vertical, horizontal = rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)
    signs = [CONTRAST * vertical, CONTRAST * horizontal, CONTRAST * vertical * horizontal]
    return torch.stack([torch.ones_like(vertical), *signs]).flatten(1) / vertical.numel()


def pooled(vit: VisionTransformer, patches: Tensor) -> Tensor:
    """(B, P, D) patches -> float32 (B, 4 D), see `pooling`."""
    return (pooling(vit).to(patches.device) @ patches.float()).flatten(1)


def without_registers(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, 1 + R + P, D) -> (B, 1 + P, D): what distillers compare and what one-pass queries are made of."""
    count = registers(vit)
    return torch.cat([tokens[:, :1], tokens[:, 1 + count :]], dim=1) if count else tokens
