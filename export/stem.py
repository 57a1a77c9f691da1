"""From bytes to tokens: the image's normalisation lies in the first layer's weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import InputError
from ..images import Preprocessing
from .nodes import FROZEN, TYPES, Graph


class Stem:
    """The patch embedding or convolutional stem of a ViT, with class token and positions."""

    def __init__(self, g: Graph, vit: VisionTransformer, preprocessing: Preprocessing, fold: bool) -> None:
        """fold: the normalisation into the weights; otherwise it is done on the pixels."""
        self.g, self.vit, self.preprocessing, self.fold = g, vit, preprocessing, fold
        self.width, self.patches_count = int(vit.embed_dim), int(vit.pos_embed.shape[1]) - 1
        # Graphs of other precisions share the file of constants: what differs needs a name of its own.
        self.name = "stem.fp16" if g.precision == "fp16" and fold else "stem"

    def tokens(self) -> str:
        """uint8 (B, S, S, 3) -> (B, N, D) tokens with positions."""
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
        x = g.op("Add", x, g.weight("pos_embed", vit.pos_embed[:, 1:], FROZEN))
        first_row = g.rows("cls_token", vit.cls_token + vit.pos_embed[:, :1], x, FROZEN)
        return g.op("Concat", first_row, x, axis=1)

    def layers(self) -> list[Any]:
        """Convolutions and activations. Raises: InputError for a stem of another kind."""
        embed = self.vit.patch_embed
        if not hasattr(embed, "backbone"):
            return [embed.proj]
        if not isinstance(embed.backbone, nn.Sequential):
            raise InputError("the stem cannot be exported", got=type(embed.backbone).__name__, expected="Sequential")
        return [*embed.backbone, embed.proj]

    def numbers(self, x: str) -> str:
        """Bytes to numbers, where they still are bytes."""
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
        x = g.linear(f"{self.name}.0", x, weight.permute(0, 2, 3, 1).flatten(1), bias)
        return g.reshape(x, -1, rows * columns, self.width)

    def convolutions(self, pixels: str, layers: list[Any], scale: Tensor, shift: Tensor) -> str:
        """A convolutional stem: (B, N - 1, D)."""
        g, name = self.g, self.name
        x = g.op("Transpose", self.numbers(pixels), perm=[0, 3, 1, 2])
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU):
                x = g.op("Relu", x)
                continue
            if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or set(layer.dilation) != {1}:
                raise InputError("the stem cannot be exported", got=str(layer), expected="plain Conv2d and ReLU")
            weight, bias = normalised(layer, None, None)
            if i == 0 and any(layer.padding):
                # Padding is zero behind the normalisation: only what multiplies can move into this convolution.
                weight = weight * scale.view(1, 3, 1, 1)
                if torch.any(shift != 0):
                    x = g.op("Add", x, g.weight(f"{name}.padding", (shift / scale).view(1, 3, 1, 1), FROZEN))
            elif i == 0:
                weight, bias = normalised(layer, scale, shift)
            x = g.op(
                "Conv",
                x,
                g.weight(f"{name}.{i}.weight", weight, FROZEN),
                g.weight(f"{name}.{i}.bias", bias, FROZEN),
                kernel_shape=list(layer.kernel_size),
                strides=list(layer.stride),
                pads=[*layer.padding, *layer.padding],
            )
        return g.op("Transpose", g.reshape(x, -1, self.width, self.patches_count), perm=[0, 2, 1])


def normalised(layer: nn.Conv2d, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, with x * scale + shift (by channel) in front of them."""
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    if scale is None or shift is None:
        return weight, bias
    return weight * scale.view(1, 3, 1, 1), bias + torch.einsum("ocij,c->o", weight, shift)
