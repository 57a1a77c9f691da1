"""Which of timm's ViTs can be prompted and exported, and how the others among its ViTs become plain ones.

Everything behind this file knows one kind of network: a `VisionTransformer` of `Block`s with one fused QKV layer and
an MLP of two layers, perhaps gated. What timm writes differently but computes alike (EVA, DINOv3, SwiGLU in two
layers) is rewritten here, once, when it is loaded. docs/backbones.md lists every ViT of timm with the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELUTanh, GluMlp, HybridEmbed, LayerNorm, Mlp, PatchEmbed, QuickGELU, SwiGLU
from timm.layers.format import Format
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from .attention import RotaryAttention, output_norm

ACTIVATIONS = (nn.GELU, GELUTanh, QuickGELU, nn.SiLU)
"what an MLP may have between its layers: the graph knows these"
NORMS = (nn.LayerNorm, LayerNorm)


def plain_vit(model: nn.Module) -> VisionTransformer:
    """The model as a plain ViT, its own parts moved into it. model: one that `refusal` has nothing against."""
    vit = _from_eva(model) if isinstance(model, Eva) else model
    assert isinstance(vit, VisionTransformer)
    for block in vit.blocks:
        block.mlp = _packed(block.mlp)
    if vit.dynamic_img_size:  # images of a run have one size: patches come as a list
        vit.dynamic_img_size = False
        vit.patch_embed.flatten, vit.patch_embed.output_fmt = True, Format.NCHW
        vit.patch_embed.strict_img_size = True
    return vit


def refusal(model: nn.Module) -> str | None:
    """Why a model is not supported, in words for people; None: it is supported."""
    if type(model) not in (VisionTransformer, Eva):
        return type(model).__name__
    assert isinstance(model, (VisionTransformer, Eva))
    embed, first = model.patch_embed, model.blocks[0]
    others = [b for b in model.blocks if type(b) not in (Block, EvaBlock)]
    if others:
        return f"a ViT of {type(others[0]).__name__}"
    found = [reason for block in model.blocks if (reason := _block_refusal(block))]
    if found:
        return found[0]
    if getattr(model, "cls_token", None) is None:
        return "a ViT without a class token"
    if model.num_prefix_tokens != 1 + _rows(getattr(model, "reg_token", None)):
        return "a ViT with a second class token, for distillation"
    if not isinstance(model.norm, NORMS):
        return "a ViT that normalises after pooling: its class token was not made to answer"
    if not isinstance(model.norm_pre, (nn.Identity, *NORMS)):
        return f"a ViT with {type(model.norm_pre).__name__}"
    if isinstance(embed, PatchEmbed) and not isinstance(embed.norm, nn.Identity):
        return "a ViT with a norm in its patch embedding"
    if type(embed) not in (PatchEmbed, HybridEmbed):
        return f"a ViT with {type(embed).__name__}"
    if embed.grid_size[0] != embed.grid_size[1]:
        return f"a ViT of {embed.grid_size[0]} x {embed.grid_size[1]} patches"
    if first.attn.qkv is not None and first.attn.qkv.out_features != 3 * int(model.embed_dim):
        return "a ViT whose heads together are not as wide as its tokens"
    rope = getattr(model, "rope", None)
    if rope is not None and not hasattr(rope, "get_embed"):
        return f"a ViT with {type(rope).__name__}"
    return None


def _block_refusal(block: nn.Module) -> str | None:
    attention: Any = block.attn
    mlp: Any = block.mlp
    kind = type(attention).__name__
    # EVA's two kinds of attention are known by name: timm has moved them between its modules.
    if type(attention) is not Attention and kind not in ("EvaAttention", "AttentionRope"):
        return f"a ViT with {kind}"
    if getattr(attention, "gate", None) is not None:
        return "a ViT with gated attention"
    if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
        return "a ViT with fewer key and value heads than query heads"
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"a ViT with {type(mlp).__name__}"
    if not isinstance(mlp.act, ACTIVATIONS):
        return f"a ViT with {type(mlp.act).__name__} in its MLP"
    if isinstance(mlp, GluMlp) and mlp.gate_last:
        return "a ViT with GluMlp that gates with its second half"
    norms = (block.norm1, block.norm2, attention.q_norm, attention.k_norm, output_norm(attention), mlp.norm)
    for norm in norms:
        if not isinstance(norm, (nn.Identity, *NORMS)):
            return f"a ViT with {type(norm).__name__}"
    return None


def _rows(tokens: Tensor | None) -> int:
    return 0 if tokens is None else int(tokens.shape[1])


# -- the same function, written as a plain ViT ------------------------------------------------------------------------


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _packed(mlp: nn.Module) -> nn.Module:
    """SwiGLU of two first layers with both in one; any other MLP as it is."""
    if not isinstance(mlp, SwiGLU):
        return mlp
    parts = (mlp.fc1_g, mlp.fc1_x)
    with torch.device("meta"):
        packed = GluMlp(mlp.fc2.in_features, 2 * mlp.fc2.in_features, mlp.fc2.out_features, gate_last=False)
    bias = torch.cat([p.bias for p in parts]) if mlp.fc1_g.bias is not None else None
    packed.fc1 = _linear(torch.cat([p.weight for p in parts]), bias)
    packed.act, packed.norm, packed.fc2 = mlp.act, mlp.norm, mlp.fc2
    return packed


def _from_eva(model: Eva) -> VisionTransformer:
    """EVA-02, DINOv3, RoPE-ViT, Perception Encoder: the same numbers."""
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            num_classes=0,
            embed_dim=model.embed_dim,
            depth=1,
            num_heads=model.blocks[0].attn.num_heads,
            no_embed_class=model.no_embed_class,
            reg_tokens=_rows(model.reg_token),
            weight_init="skip",
        )
    for name in ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "norm"):
        setattr(vit, name, getattr(model, name))
    vit.dynamic_img_size = model.dynamic_img_size
    vit.blocks = nn.Sequential(*(_block(b, t) for b, t in zip(model.blocks, _rotations(model), strict=True)))
    vit.pretrained_cfg = vit.default_cfg = model.pretrained_cfg
    return vit


def _rotations(model: Eva) -> list[tuple[Tensor, Tensor] | None]:
    """Sines and cosines (P, D) of each block, channels as the model has them; None without rotary positions."""
    depth = len(model.blocks)
    if model.rope is None:
        return [None] * depth
    table = model.rope.get_embed(shape=list(model.patch_embed.grid_size)).detach()

    def wide(rows: Tensor) -> Tensor:  # (P, d) for all heads alike, or (H, P, d)
        heads = model.blocks[0].attn.num_heads
        return rows.repeat(1, heads) if rows.ndim == 2 else rows.transpose(0, 1).flatten(1)

    if not model.rope_mixed:
        sin, cos = (wide(t) for t in table.chunk(2, dim=-1))
        return [(sin, cos)] * depth
    return [(wide(sin), wide(cos)) for sin, cos in (rows.chunk(2, dim=-1) for rows in table)]


def _block(old: nn.Module, rotation: tuple[Tensor, Tensor] | None) -> Block:
    source: Any = old
    with torch.device("meta"):
        block = Block(source.norm1.normalized_shape[0], source.attn.num_heads)
    block.norm1, block.norm2, block.mlp = source.norm1, source.norm2, source.mlp
    block.attn = _attention(source.attn, rotation)
    for name, gamma in (("ls1", source.gamma_1), ("ls2", source.gamma_2)):
        if gamma is not None:
            with torch.device("meta"):
                scale = LayerScale(len(gamma))
            scale.gamma = gamma
            setattr(block, name, scale)
    return block


def _attention(old: Any, rotation: tuple[Tensor, Tensor] | None) -> Attention:
    heads, size = old.num_heads, old.head_dim
    if old.qkv is not None:
        weights = list(old.qkv.weight.detach().chunk(3))
        biases = _biases(old, heads * size)
    else:
        layers = (old.q_proj, old.k_proj, old.v_proj)
        weights = [layer.weight.detach() for layer in layers]
        given = [layer.bias.detach() if layer.bias is not None else None for layer in layers]
        biases = [torch.zeros_like(w[:, 0]) if b is None else b for w, b in zip(weights, given, strict=True)]
        biases = biases if any(b is not None for b in given) else None
    norms = [old.q_norm, old.k_norm]
    options = {"num_heads": heads, "qkv_bias": biases is not None}
    new: Attention
    if rotation is None:
        with torch.device("meta"):
            new = Attention(heads * size, **options)
    else:
        sin, cos = rotation
        if not getattr(old, "rotate_half", False):
            # timm turns neighbours with each other: the same products when the channels of all heads change places.
            order = torch.arange(heads * size, device=sin.device).view(heads, size // 2, 2).transpose(1, 2).flatten()
            sin, cos = sin[:, order], cos[:, order]
            for i in (0, 1):
                weights[i] = weights[i][order]
                if biases is not None:
                    biases[i] = biases[i][order]
                if not isinstance(norms[i], nn.Identity):
                    norms[i] = _reordered(norms[i], order[:size])
        new = RotaryAttention(heads * size, prefix=old.num_prefix_tokens, sin=sin, cos=cos, **options)
    new.qkv = _linear(torch.cat(weights), torch.cat(biases) if biases is not None else None)
    new.q_norm, new.k_norm = norms
    new.norm, new.proj = old.norm, old.proj
    return new


def _biases(old: Any, width: int) -> list[Tensor] | None:
    """Of Q, K and V of a fused layer: its own, or EVA's, which has none for K."""
    if old.qkv.bias is not None:
        return list(old.qkv.bias.detach().chunk(3))
    if getattr(old, "q_bias", None) is None:
        return None
    return [old.q_bias.detach(), torch.zeros_like(old.q_bias.detach()), old.v_bias.detach()]


def _reordered(norm: nn.LayerNorm, order: Tensor) -> nn.LayerNorm:
    new = nn.LayerNorm(norm.normalized_shape, norm.eps, device="meta")
    new.weight, new.bias = nn.Parameter(norm.weight.detach()[order]), nn.Parameter(norm.bias.detach()[order])
    return new
