"""A pretrained EfficientNet-Lite trunk as the frozen convolutional stem of a ViT, with its BatchNorms folded.

The trunk is everything in front of the network's last 1 x 1 convolution, at a stride of 32. Architecture: Google's
EfficientNet-Lite (EfficientNet, arXiv 1905.11946, without squeeze-and-excitation, ReLU6 instead of swish), as timm
builds it; the padding is TensorFlow's "same", which depends on the size of the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..errors import InputError, choose

TRUNKS = {"efficientnet_lite0": 320, "efficientnet_lite2": 352}
"name -> channels of its output"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"pixels are expected from -1 to 1"

CONVERT = """convert the .pth once: python -c "import torch, safetensors.torch as s; d = torch.load('FILE.pth', \
weights_only=True); s.save_file({f'{i:04d}': v for i, v in enumerate(d.values()) if v.ndim}, 'FILE.safetensors')\""""


class ResidualLayers(nn.Sequential):
    """x + f(x) of the layers f inside."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x + super().forward(x)


def build_trunk(name: str) -> nn.Sequential:
    """The trunk with random weights: convolutions with biases, ReLU6, ResidualLayers.

    (B, 3, S, S) -> (B, C, S/32, S/32), rounded up. name: key of TRUNKS.
    """
    return _fold(_network(name))


def load_trunk(name: str, path: Path) -> tuple[nn.Sequential, nn.Module]:
    """The trunk with the weights of a published checkpoint, and the whole network as timm has it, in eval mode.

    path: a state dict of the network as .safetensors. Its tensors may have other names than timm's as long as their
    order and shapes are the same; a file converted from efficientnet-lite-pytorch's has numbers for names.

    Raises: InputError for a file that does not fit.
    """
    network = _network(name)
    state = _read(path)
    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = [v for k, v in sorted(state.items()) if not k.endswith("num_batches_tracked")]
    if set(own) <= set(state):  # timm's own names
        given = [state[k] for k in own]
    shapes = [tuple(v.shape) for v in own.values()]
    if [tuple(v.shape) for v in given] != shapes:
        raise InputError(
            f"{path}: not a checkpoint of {name}",
            got=f"{len(given)} tensors of other shapes",
            expected=f"the {len(shapes)} tensors of {name}, in the order of the layers",
        )
    network.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    network.eval().requires_grad_(False)
    return _fold(network), network


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file", expected="the published weights of the trunk as .safetensors")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        # A pickle is a program: whoever trusts it converts it once.
        raise InputError(
            f"{path}: not a safetensors file",
            got=" ".join(str(error).split()),
            expected="the published weights of the trunk as .safetensors, in the order of their layers",
            fix=CONVERT,
        ) from error


def _network(name: str) -> Any:
    choose("trunk", name, TRUNKS)
    return timm.create_model(f"tf_{name}", pretrained=False).eval()


def _fold(network: Any) -> nn.Sequential:
    """Convolutions and activations of timm's EfficientNet in the order of their use, BatchNorms folded."""
    layers: list[nn.Module] = [*_conv(network.conv_stem, network.bn1)]
    for stage in network.blocks:
        for block in stage:
            inner: list[nn.Module] = []
            for conv, norm in (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")):
                if hasattr(block, "conv_pwl"):
                    inner += _conv(getattr(block, conv), getattr(block, norm))
            if not hasattr(block, "conv_pwl"):  # the first stage has no expansion
                inner = [*_conv(block.conv_dw, block.bn1), *_conv(block.conv_pw, block.bn2)]
            layers += [ResidualLayers(*inner)] if block.has_skip else inner
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _conv(conv: nn.Conv2d, norm: Any) -> list[nn.Module]:
    """One convolution with the BatchNorm behind it folded in, and its activation if it has one."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    same = isinstance(conv, Conv2dSame)
    folded = (Conv2dSame if same else nn.Conv2d)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        0 if same else conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=True,
    )
    with torch.no_grad():
        folded.weight.copy_(conv.weight * scale[:, None, None, None])
        assert folded.bias is not None
        folded.bias.copy_(norm.bias - norm.running_mean * scale)
    active = not isinstance(norm.act, nn.Identity)
    if active and not isinstance(norm.act, nn.ReLU6):
        raise InputError("this trunk is not supported", got=type(norm.act).__name__, expected="ReLU6")
    return [folded, nn.ReLU6()] if active else [folded]


def same_padding(layer: nn.Conv2d, size: int) -> tuple[int, int]:
    """Number of zeros that the layer adds before and after a side of `size` pixels."""
    if not isinstance(layer, Conv2dSame):
        pad = layer.padding[0]
        return int(pad), int(pad)
    kernel, stride, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
