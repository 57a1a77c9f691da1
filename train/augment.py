"""Augmentations of a whole batch of decoded images at once: a few tensor operations, no worker processes.

All take and give float (B, 3, S, S); every random number comes from the generator given, so a resumed run repeats them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import Preprocessing


class Normalise:
    """uint8 (B, S, S, 3) -> float (B, 3, S, S), minus mean, over std."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        mean, std = (
            torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (preprocessing.mean, preprocessing.std)
        )
        self._scale, self._shift = 1 / std, -mean / std

    def __call__(self, pixels: np.ndarray | Tensor) -> Tensor:
        return self.floats(torch.as_tensor(pixels).to(self._scale.device).permute(0, 3, 1, 2).float())

    def floats(self, x: Tensor) -> Tensor:
        """float (B, 3, S, S) in 0..255, to the same."""
        return x * self._scale + self._shift


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def random_boxes(n: int, generator: torch.Generator, scale: tuple[float, float], flip: bool = True) -> Tensor:
    """(n, 2, 3) affine maps: a random box (area share in `scale`, aspect 3/4 to 4/3) of each, half of them mirrored."""
    area = _uniform(n, *scale, generator)
    aspect = torch.exp(_uniform(n, math.log(3 / 4), math.log(4 / 3), generator))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # affine_grid works in [-1, 1]: the box's half-sizes are width and height, its centre has the rest to move in.
    centre_x = _uniform(n, -1, 1, generator) * (1 - width)
    centre_y = _uniform(n, -1, 1, generator) * (1 - height)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    zero = torch.zeros(n)
    return torch.stack([torch.stack([width * mirror, zero, centre_x], 1), torch.stack([zero, height, centre_y], 1)], 1)


def cut_out(x: Tensor, boxes: Tensor, size: int | None = None) -> Tensor:
    """(B, 3, S, S) and the boxes of `random_boxes` -> (B, 3, size, size); None: S."""
    target = size or x.shape[2]
    grid = F.affine_grid(boxes.to(x.device), [len(x), 3, target, target], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_resized_crop_flip(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float], size: int | None = None, flip: bool = True
) -> Tensor:
    """Cut a random box of each image, float (B, 3, S, S), resample it to `size` pixels, mirror some if `flip`."""
    return cut_out(x, random_boxes(len(x), generator, scale, flip), size)


def colour_jitter(x: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Brightness, contrast and saturation of normalised images, each by a factor or shift up to `strength`."""
    n = x.shape[0]
    shift, contrast, saturation = (
        _uniform(n, -strength, strength, generator).view(n, 1, 1, 1).to(x.device) for _ in range(3)
    )
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + contrast) + mean + shift
    grey = x.mean(dim=1, keepdim=True)
    return (x - grey) * (1 + saturation) + grey


def mix(x: Tensor, targets: Tensor, generator: torch.Generator, mixup_alpha: float) -> tuple[Tensor, Tensor]:
    """CutMix (arXiv 1905.04899) or mixup (arXiv 1710.09412), one of them for the whole batch, by a coin.

    targets: float (B, classes), mixed with the same share.
    """
    other = torch.randperm(x.shape[0], generator=generator).to(x.device)
    coin, u = torch.rand(2, generator=generator).tolist()
    if coin < 0.5:
        side = x.shape[-1]
        cut = max(1, round(side * math.sqrt(1 - u)))
        top, left = (int(v) for v in (torch.rand(2, generator=generator) * (side - cut + 1)).tolist())
        x = x.clone()
        x[:, :, top : top + cut, left : left + cut] = x[other][:, :, top : top + cut, left : left + cut]
        share = 1 - cut * cut / (side * side)
    else:
        # Not quite Beta(a, a), whose Gamma draws would need torch's global generator: symmetric, as peaked at 0 and 1.
        v = u ** (1 / mixup_alpha)
        share = v / (v + (1 - u) ** (1 / mixup_alpha)) if 0 < u < 1 else 0.5
        x = x * share + x[other] * (1 - share)
    return x, targets * share + targets[other] * (1 - share)
