"""Accuracy of a prompted ViT in torch, fp32, over decoded images."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from .batches import Images

CHUNK = 128


@torch.no_grad()
def logits_of(images: Images, name: str, classes: int | None = None) -> np.ndarray:
    """Combined logits of every image, float32 (N, C), cut to the first `classes`."""
    images.keep([name, "student"] if name != "student" else ["student"], nullcontext, CHUNK)
    model = images.sides[name].model
    parts = []
    for start in range(0, len(images), CHUNK):
        index = np.arange(start, min(start + CHUNK, len(images)))
        batch = images.batch(index, [name], nullcontext)
        parts.append(model.combine(model(batch.tokens[name], batch.query))[:, :classes].float().cpu().numpy())
    return np.concatenate(parts)


def accuracy(images: Images, name: str, seen: int) -> float:
    """In %, predicting among the first `seen` classes."""
    return 100.0 * float((logits_of(images, name, seen).argmax(1) == images.labels).mean())
