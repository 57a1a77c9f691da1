"""Prompted students as training would leave them, on tiny random backbones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cdl_edge.images import Preprocessing
from cdl_edge.train.backbone import Architecture, fold_batch_norm
from cdl_edge.train.learners.l2p import L2P
from cdl_edge.train.student import PromptedViT

CLASSES, TASKS = 9, 3


@pytest.fixture
def preprocessing() -> Preprocessing:
    """Of the tiny backbones."""
    return Preprocessing(32, 32, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def backbone(kind: str) -> VisionTransformer:
    """plain: patch embedding and layer scale; stem: convolutions; padded: a first convolution that pads."""
    torch.manual_seed(0)
    if kind == "plain":
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=0, init_values=0.3
        )
    else:
        pad = int(kind == "padded")
        stem = ((8, 4, 2, pad), (16, 3, 2, 1), (24, 3, 2, 1))
        model = Architecture(32, 8, 32, 6, 2, 0, stem).build(batch_norm=True)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
        model.patch_embed.backbone = fold_batch_norm(model.eval().patch_embed.backbone)
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that losing one shows
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_student() -> Callable[..., PromptedViT]:
    """make_student(learner, kd=True, one_pass=False, learnt=2, kind="plain")."""

    def make(
        learner: str, kd: bool = True, one_pass: bool = False, learnt: int = 2, kind: str = "plain"
    ) -> PromptedViT:
        torch.manual_seed(1)
        student = PromptedViT(
            backbone(kind), learner, CLASSES, TASKS, seed=3, kd=(6, 6) if kd else None, alpha=0.3, one_pass=one_pass
        )
        for task in range(learnt):
            student.learner.begin_task(task)
            for parameter in student.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
            student.learner.end_task(task)
        if isinstance(student.learner, L2P):
            student.learner.used[torch.randperm(30)[:11]] = True
        return student.eval().requires_grad_(False)

    return make
