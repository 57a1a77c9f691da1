"""From bytes to tokens: the image's normalisation lies in the first layer's weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import InputError
from ..images import Preprocessing
from ..train.tokens import patch_count, rows_in_front
from ..train.trunk import ResidualLayers, same_padding
from .nodes import FROZEN, TYPES, Graph, Reads


class Stem:
    """The patch embedding or convolutional stem of a ViT, with class token, registers and positions."""

    def __init__(self, g: Graph, vit: VisionTransformer, preprocessing: Preprocessing, fold: bool) -> None:
        """fold: the normalisation into the weights; otherwise it is done on the pixels."""
        self.g, self.vit, self.preprocessing, self.fold = g, vit, preprocessing, fold
        self.width, self.patches_count = int(vit.embed_dim), patch_count(vit)
        # Graphs of other precisions share the file of constants: what differs needs a name of its own.
        self.name = "stem.fp16" if g.precision == "fp16" and fold else "stem"

    def tokens(self) -> str:
        """uint8 (B, S, S, 3) -> (B, N, D) tokens with positions: class token, registers, patches."""
        g, vit = self.g, self.vit
        layers = self.layers()
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.preprocessing.mean, self.preprocessing.std))
        scale, shift, pixels = 1 / (255 * std), -mean / std, "images"
        if not self.fold:
            pixels = g.op("Mul", self.numbers(pixels), g.weight("input.scale", scale, FROZEN))
            pixels = g.op("Add", pixels, g.weight("input.shift", shift, FROZEN))
            scale, shift = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        elif g.precision == "fp16":
            # Weights times 1 / (255 std) would leave fp16's normal range: a power of two stays with the pixels.
            pixels = g.op("Mul", self.numbers(pixels), g.weight("input.power", torch.tensor(2.0**-8), ""))
            scale = scale * 2**8
        elif not g.profile.byte_layout:
            pixels = self.numbers(pixels)
        first = layers[0]
        plain = len(layers) == 1 and isinstance(first, nn.Conv2d) and first.stride == first.kernel_size
        if plain and not any(first.padding):
            x = self.patches(pixels, first, scale, shift)
        else:
            x = self.convolutions(pixels, layers, scale, shift)
        rows, positions = rows_in_front(vit)
        if positions is not None:
            x = g.op("Add", x, g.weight("pos_embed", positions, FROZEN))
        x = g.op("Concat", g.rows("cls_token", rows, x, FROZEN), x, axis=1)
        return x if isinstance(vit.norm_pre, nn.Identity) else g.compute(g.norm("norm_pre", x, vit.norm_pre))

    def layers(self) -> list[Any]:
        """Convolutions and activations. Raises: InputError for a stem of another kind."""
        embed = self.vit.patch_embed
        if not hasattr(embed, "backbone"):
            return [embed.proj]
        if not isinstance(embed.backbone, nn.Sequential):
            raise InputError("the stem cannot be exported", got=type(embed.backbone).__name__, expected="Sequential")
        return [*embed.backbone, embed.proj]

    def numbers(self, x: str) -> str:
        """Cast pixels from bytes to numbers, where they still are bytes."""
        return self.g.op("Cast", x, to=TYPES[self.g.precision]) if x == "images" else x

    def patches(self, pixels: str, layer: nn.Conv2d, scale: Tensor, shift: Tensor) -> str:
        """A plain patch embedding as one Gemm over patches, unfolded while still bytes if possible: (B, N - 1, D)."""
        g, (high, wide) = self.g, layer.kernel_size
        rows, columns = (self.preprocessing.size // s for s in (high, wide))
        x = g.op("Transpose", g.reshape(pixels, -1, rows, high, columns, wide * 3), perm=[0, 1, 3, 2, 4])
        x = g.reshape(x, -1, high * wide * 3)
        if pixels == "images":
            x = g.op("Cast", x, to=TYPES[g.precision])
        weight, bias = normalised(layer, scale, shift)
        reads = Reads("stem", pixels=True) if pixels == "images" else None
        x = g.linear(f"{self.name}.0", x, weight.permute(0, 2, 3, 1).flatten(1), bias, reads)
        return g.reshape(x, -1, rows * columns, self.width)

    def convolutions(self, pixels: str, layers: list[Any], scale: Tensor, shift: Tensor) -> str:
        """Patch tokens (B, N - 1, D) of a convolutional stem."""
        g = self.g
        x = g.op("Transpose", self.numbers(pixels), perm=[0, 3, 1, 2])
        x, _ = self.sequence(self.name, x, self.preprocessing.size, layers, (scale, shift))
        return g.op("Transpose", g.reshape(x, -1, self.width, self.patches_count), perm=[0, 2, 1])

    def sequence(
        self, name: str, x: str, size: int, layers: list[Any], pixels: tuple[Tensor, Tensor] | None = None
    ) -> tuple[str, int]:
        """Layers one behind the other, and the side of what comes out. size: of what goes in.

        pixels: scale and shift of the normalisation, where the first convolution reads pixels.
        """
        g = self.g
        for i, layer in enumerate(layers):
            if isinstance(layer, ResidualLayers):
                inner, size = self.sequence(f"{name}.{i}", x, size, list(layer))
                x = g.op("Add", x, inner)
            elif isinstance(layer, nn.ReLU6):
                x = g.op("Clip", x, *(g.weight(f"clip.{v}", np.array(float(v)), "") for v in (0, 6)))
            elif isinstance(layer, nn.ReLU):
                x = g.op("Relu", x)
            elif isinstance(layer, nn.Conv2d) and set(layer.dilation) == {1}:
                x, size = self.convolution(f"{name}.{i}", x, size, layer, pixels if i == 0 else None)
            else:
                raise InputError(
                    "the stem cannot be exported", got=str(layer), expected="Conv2d, ReLU, ReLU6 and residual sums"
                )
        return x, size

    def convolution(
        self, name: str, x: str, size: int, layer: nn.Conv2d, pixels: tuple[Tensor, Tensor] | None
    ) -> tuple[str, int]:
        """One convolution; see `sequence`."""
        g = self.g
        before, behind = same_padding(layer, size)
        weight, bias = normalised(layer, None, None)
        if pixels is not None:
            scale, shift = pixels
            if before or behind:
                # Padding is zero behind the normalisation: only what multiplies can move into this convolution.
                weight = weight * scale.view(1, 3, 1, 1)
                if torch.any(shift != 0):
                    x = g.op("Add", x, g.weight(f"{self.name}.padding", (shift / scale).view(1, 3, 1, 1), FROZEN))
            else:
                weight, bias = normalised(layer, scale, shift)
        out = g.op(
            "Conv",
            x,
            g.weight(f"{name}.weight", weight, FROZEN),
            g.weight(f"{name}.bias", bias, FROZEN),
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[before, before, behind, behind],
            group=layer.groups,
        )
        return out, (size + before + behind - layer.kernel_size[0]) // layer.stride[0] + 1


def normalised(layer: nn.Conv2d, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, with x * scale + shift (by channel) in front of them."""
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    if scale is None or shift is None:
        return weight, bias
    return weight * scale.view(1, 3, 1, 1), bias + torch.einsum("ocij,c->o", weight, shift)
