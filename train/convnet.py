"""A small residual network: trained first, it gives the ViTs their targets (as DeiT does), the wider one its stem."""

from __future__ import annotations

from torch import Tensor, nn

from .backbone import StemSpec, conv_stem


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (arXiv 1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H / stride, W / stride)."""
        return nn.functional.relu(self.body(x) + self.shortcut(x))


class ConvNet(nn.Module):
    """The stem of a ViT, residual blocks, mean over positions, linear classifier. (B, 3, S, S) -> (B, classes)."""

    def __init__(self, stem: StemSpec, blocks: tuple[tuple[int, int], ...], num_classes: int) -> None:
        super().__init__()
        self.stem = conv_stem(stem, batch_norm=True)
        channels, layers = stem[-1][0], []
        for out, stride in blocks:
            layers.append(Residual(channels, out, stride))
            channels = out
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits (B, C)."""
        return self.behind_stem(self.stem(x))

    def behind_stem(self, features: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gave for the images."""
        return self.head(self.blocks(features).mean(dim=(2, 3)))
