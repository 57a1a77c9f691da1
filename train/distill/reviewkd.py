"""ReviewKD (arXiv 2104.09044): student blocks, reviewed from the last to the first, imitate the teacher's blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationBatch, DistillSpec, regrid
from .kd import KD

WEIGHT = 0.2
"of the hierarchical context loss (CDL paper)"


def partner(block: int, student_depth: int, teacher_depth: int) -> int:
    """The teacher block that ends at the same share of the depth: for 12 and 24 blocks, 0 -> 1, 11 -> 23."""
    return max(0, round((block + 1) * teacher_depth / student_depth) - 1)


class Fusion(nn.Module):
    """Attention-based fusion: a block's tokens and what came back from the deeper ones, each with a learnt gate."""

    def __init__(self, width: int, out: int, first: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.gates = None if first else nn.Linear(2 * width, 2)
        self.leave = nn.Linear(width, out)

    def forward(self, tokens: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, D), (B, N, D) or None -> imitation (B, N, out) and what goes on to the next block (B, N, D)."""
        x = self.enter(tokens)
        if self.gates is not None and deeper is not None:
            own, other = torch.sigmoid(self.gates(torch.cat([x, deeper], dim=2))).split(1, dim=2)
            x = x * own + deeper * other
        return self.leave(x), x


class CompatFusion(nn.Module):
    """The fusion of the CDL authors' code: LayerNorms, and no gate of a token, but a factor for each of its channels.

    The factor of either part is LayerNorm(Linear(part)), one module for both.
    """

    def __init__(self, width: int, out: int, first: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.factors = None if first else nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.mixed = None if first else nn.LayerNorm(width)
        self.leave = nn.Linear(width, out)

    def forward(self, tokens: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse the tokens of a block with those of deeper ones; shapes as of Fusion."""
        x = self.enter(tokens)
        if self.factors is not None and self.mixed is not None and deeper is not None:
            x = self.mixed(x * self.factors(x) + deeper * self.factors(deeper))
        return self.leave(x), x


class ReviewKD(KD):
    """KD + 0.2 * HCL, the mean over the student's blocks.

    The fusion and HCL are the ReviewKD paper's. On tokens its 1 x 1 convolutions are Linears; every block of a ViT has
    one grid, so nothing is scaled up on the way back. Ours: teachers of another depth are met at the same share of
    their depth, of another grid resampled.

    spec.compat: what the CDL authors made of it. CompatFusion; no pyramid, only the squared error of the tokens; a
    deeper teacher is met at its last blocks.
    """

    needs_hidden: ClassVar[bool] = True

    def __init__(self, spec: DistillSpec) -> None:
        super().__init__(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            depth, kind = spec.student_depth, CompatFusion if spec.compat else Fusion
            self.fusions = nn.ModuleList(
                kind(spec.student_width, spec.teacher_width, first=i == depth - 1) for i in range(depth)
            )

    def loss(self, batch: DistillationBatch) -> Tensor:
        """KD's loss and the hierarchical context loss."""
        depth = self.spec.student_depth
        deeper: Tensor | None = None
        total = torch.zeros((), device=batch.labels.device)
        for i in reversed(range(depth)):
            given, deeper = self.fusions[i](batch.student.hidden[i], deeper)
            wanted = regrid(batch.teacher_hidden[self.partner(i)].float(), self.spec.student_grid)
            total = total + (F.mse_loss if self.spec.compat else hierarchical)(given.float(), wanted)
        return super().loss(batch) + self.spec.features * WEIGHT * total / depth

    def partner(self, block: int) -> int:
        """The teacher's block that a block of the student imitates."""
        own, other = self.spec.student_depth, self.spec.teacher_depth
        # The authors know no teacher of fewer blocks.
        return other - own + block if self.spec.compat and other >= own else partner(block, own, other)


def hierarchical(given: Tensor, wanted: Tensor) -> Tensor:
    """HCL: squared error of the tokens, and of the patch grid averaged to 4, 2 and 1 cells a side.

    (B, 1 + P, D) both. Weights 1, 1/2, 1/4, 1/8, divided by their sum; levels not smaller than the grid fall away.
    """
    loss, weight, total = F.mse_loss(given, wanted), 1.0, 1.0
    grid = round((given.shape[1] - 1) ** 0.5)
    difference = (given - wanted)[:, 1:].transpose(1, 2).reshape(len(given), -1, grid, grid)
    for cells in (4, 2, 1):
        if cells >= grid:
            continue
        weight /= 2
        # Averaging is linear: the difference of the averages is the average of the difference.
        loss = loss + weight * F.adaptive_avg_pool2d(difference, cells).pow(2).mean()
        total += weight
    return loss / total
