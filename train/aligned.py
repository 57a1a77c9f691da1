"""Classifier alignment: a linear head learnt on features drawn from the Gaussian of every class.

Sources: SLCA (Zhang et al., "Slow learner with classifier alignment", ICCV 2023), HiDe-Prompt (Wang et al., NeurIPS
2023). They keep a covariance a class; here all classes share one, as the statistics do.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..class_statistics import ClassStatistics
from ..heads import LinearMap, moderate, shrinkage, slda

DRAWN = 128
"features of each class in an epoch"
EPOCHS = 12
BATCH = 256
RATE = 1e-2
"Adam's peak, half a cosine"


@torch.enable_grad()
def align(statistics: ClassStatistics, seed: int) -> LinearMap:
    """Start from the head of linear discriminant analysis, then cross entropy on drawn features, balanced."""
    start, scatter = slda(statistics), statistics.scatter()
    share = max(shrinkage(scatter, statistics.images), 1e-4)
    level = max(float(np.trace(scatter)) / len(scatter), 1e-12)
    # Coordinates in which the shared covariance is the identity: all directions learn at one rate.
    root = np.linalg.cholesky((1 - share) * scatter + share * level * np.eye(len(scatter)))
    means = torch.from_numpy(np.linalg.solve(root, statistics.means.T).T).float()
    weight = torch.from_numpy(start.weight @ root).float().requires_grad_()
    bias = torch.from_numpy(start.bias).float().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    count, steps = len(means), 0
    total = EPOCHS * -(-count * DRAWN // BATCH)
    for _ in range(EPOCHS):
        labels = torch.arange(count).repeat_interleave(DRAWN)[torch.randperm(count * DRAWN, generator=generator)]
        for y in labels.split(BATCH):
            for group in optimiser.param_groups:
                group["lr"] = 0.5 * RATE * (1 + np.cos(np.pi * steps / total))
            x = means[y] + torch.randn((len(y), means.shape[1]), generator=generator)
            loss = F.cross_entropy(x @ weight.t() + bias, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
    found = np.linalg.solve(root.T, weight.detach().double().numpy().T).T
    return LinearMap(*moderate(found, bias.detach().double().numpy(), statistics.means), share)
