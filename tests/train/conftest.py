"""Tiny prompted ViTs, and a second implementation of their forward pass, written from the formulas alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdl_edge.train.backbone import Backbone, load_backbone
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.student import ModelSpec, PromptedViT

torch.set_num_threads(1)
CLASSES, TASKS = 6, 3


@pytest.fixture(scope="session")
def backbone(tiny_vit: Callable[..., str]) -> Backbone:
    """16 x 16 pixels, 4 patches, width 16, 6 blocks, 2 heads; frozen."""
    return load_backbone(tiny_vit())


@pytest.fixture
def make_model(backbone: Backbone) -> Callable[..., PromptedViT]:
    """make(learner, learnt=2, kd=True, one_pass=False, seed=0, ...): large prompts, all matter."""

    def make(
        learner: str, learnt: int = 2, kd: bool = True, one_pass: bool = False, seed: int = 0, **options: str
    ) -> PromptedViT:
        rows = (6, 6) if kd else None
        model = PromptedViT(
            backbone.model, ModelSpec(learner, CLASSES, TASKS, seed, kd=rows, one_pass=one_pass, **options)
        )
        generator = torch.Generator().manual_seed(seed)
        if model.kd is not None:
            for p in model.kd.parameters():
                p.data.normal_(generator=generator)
        for task in range(learnt):
            model.learner.begin_task(task)
            if learner == "apt":
                model.learner.prompt.data.normal_(generator=generator)
            if learner in ("l2p", "dualprompt"):
                for p in model.learner.parameters():
                    p.data.normal_(generator=generator)
            model.learner.end_task(task)
        if learner == "l2p" and learnt:
            model.learner.used[torch.randperm(30, generator=generator)[:12]] = True
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_config(short_training: dict[str, Any]) -> Callable[..., TrainConfig]:
    """make(out, **changes): a run of about a second that learns something; of L2P, since CODA costs twice as much."""

    def make(out: Path, **changes: Any) -> TrainConfig:
        options = {
            **short_training,
            "data": "digits",
            "learner": "l2p",
            "tasks": 2,
            "epochs": 2,
            "limit_per_class": 8,
            "batch_size": 16,
            "learning_rate": 0.02,
            "head": "learned",
        }
        return TrainConfig(out=str(out), **{**options, **changes})

    return make


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (5, 16, 16, 3), no two alike."""
    return np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def tokens(backbone: Backbone, make_model: Callable[..., PromptedViT], pixels: np.ndarray) -> Tensor:
    """(5, 5, 16) what the prompted blocks of any model start from."""
    from cdl_edge.train.augment import Normalise

    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    return make_model("apt").embed(normalise(pixels))


# -- the published formulas, one sample, one head, one row at a time, in double precision ----------------------


def layer_norm(row: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean = sum(row) / len(row)
    variance = sum((v - mean) ** 2 for v in row) / len(row)
    return (row - mean) / math.sqrt(variance + eps) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def tree(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


class Naive:
    """A prompted ViT from its numbers."""

    def __init__(self, model: PromptedViT, backbone: Backbone, learner: str) -> None:
        self.w, self.l = tree(backbone.model), tree(model.learner)
        self.kd = tree(model.kd) if model.kd is not None else None
        self.head, self.kd_head = tree(model.head), tree(model.kd_head) if model.kd_head is not None else None
        self.alpha, self.learner = model.alpha, learner
        self.own = model.query_of if model.one_pass else ""
        self.preprocessing = backbone.preprocessing
        self.depth, self.heads = len(backbone.model.blocks), backbone.model.blocks[0].attn.num_heads

    def embed(self, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (S, S, 3) -> [class token, patch tokens...], positions added."""
        x = (pixels / 255.0 - np.array(self.preprocessing.mean)) / np.array(self.preprocessing.std)
        kernel, bias = self.w["patch_embed.proj.weight"], self.w["patch_embed.proj.bias"]
        patch = kernel.shape[-1]
        rows = [self.w["cls_token"][0, 0]]
        for top in range(0, x.shape[0], patch):
            for left in range(0, x.shape[1], patch):
                piece = x[top : top + patch, left : left + patch].transpose(2, 0, 1)
                rows.append(np.array([(k * piece).sum() for k in kernel]) + bias)
        return [row + position for row, position in zip(rows, self.w["pos_embed"][0], strict=True)]

    def block(
        self,
        i: int,
        rows: list[np.ndarray],
        more_keys: list[np.ndarray],
        more_values: list[np.ndarray],
        cls: tuple[np.ndarray, np.ndarray] | None,
    ) -> list[np.ndarray]:
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in self.w.items() if k.startswith(f"blocks.{i}.")}
        width = len(rows[0])
        size = width // self.heads
        q, k, v = [], [], []
        for row in rows:
            normed = layer_norm(row, w["norm1.weight"], w["norm1.bias"], 1e-6)
            qkv = w["attn.qkv.weight"] @ normed + w["attn.qkv.bias"]
            q.append(qkv[:width])
            k.append(qkv[width : 2 * width])
            v.append(qkv[2 * width :])
        if cls is not None:
            k[0], v[0] = k[0] + cls[0], v[0] + cls[1]
        k, v = k + more_keys, v + more_values
        out = []
        for n, row in enumerate(rows):
            mixed = np.zeros(width)
            for h in range(self.heads):
                part = slice(h * size, (h + 1) * size)
                scores = np.array([q[n][part] @ key[part] / math.sqrt(size) for key in k])
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                mixed[part] = sum(s * value[part] for s, value in zip(shares, v, strict=True))
            row = row + w["attn.proj.weight"] @ mixed + w["attn.proj.bias"]
            normed = layer_norm(row, w["norm2.weight"], w["norm2.bias"], 1e-6)
            hidden = gelu(w["mlp.fc1.weight"] @ normed + w["mlp.fc1.bias"])
            out.append(row + w["mlp.fc2.weight"] @ hidden + w["mlp.fc2.bias"])
        return out

    def norm(self, row: np.ndarray) -> np.ndarray:
        return layer_norm(row, self.w["norm.weight"], self.w["norm.bias"], 1e-6)

    def query(self, rows: list[np.ndarray]) -> np.ndarray:
        for i in range(self.depth):
            rows = self.block(i, rows, [], [], None)
        return self.norm(rows[0])

    def prompt(self, i: int, q: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows that the learner adds to the keys and the values of block i at inference."""
        learnt = int(self.l["tasks_learnt"])
        if self.learner == "l2p" and i == 0:
            pool, keys = self.l["prompt"], self.l["key"]
            order = sorted((k for k in range(30) if self.l["used"][k]), key=lambda k: -cosine(q, keys[k]))
            chosen = [pool[k] for k in order[:5]]
            return [r for p in chosen for r in p[:10]], [r for p in chosen for r in p[10:]]
        if self.learner == "dualprompt" and i in (0, 1):
            rows = self.l[f"general.{i}"]
            return list(rows[:3]), list(rows[3:])
        if self.learner == "dualprompt" and i in (2, 3, 4):
            keys = self.l[f"key.{i}"]
            best = max(range(learnt), key=lambda t: cosine(q, keys[t]))
            rows = self.l[f"expert.{i}"][best]
            return list(rows[:10]), list(rows[10:])
        if self.learner == "coda" and i in range(5):
            components = (100 // TASKS) * learnt
            rows = np.zeros((8, self.l[f"prompt.{i}"].shape[2]))
            for m in range(components):
                weight = cosine(q * self.l[f"attention.{i}"][m], self.l[f"key.{i}"][m])
                rows += weight * self.l[f"prompt.{i}"][m]
            return list(rows[:4]), list(rows[4:])
        return [], []

    def classify(self, head: dict[str, np.ndarray], row: np.ndarray) -> np.ndarray:
        if "norm.weight" in head:
            row = layer_norm(row, head["norm.weight"], head["norm.bias"], 1e-5)
            return np.array([row @ w / math.sqrt((w * w).sum()) for w in head["weight"]])
        return head["weight"] @ row + head["bias"]

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (S, S, 3) -> (C,)."""
        rows = self.embed(pixels)
        query = self.query(rows)
        if self.kd is not None:
            rows = [*rows, self.kd["token"][0, 0]]
        for i in range(self.depth):
            own = {"": query, "class": rows[0]}.get(self.own)
            if own is None:
                patches = rows[1:-1] if self.kd is not None else rows[1:]
                mean = sum(patches) / len(patches)
                spread = np.sqrt(sum((p - mean) ** 2 for p in patches) / len(patches) + 1e-6)
                own = sum(layer_norm(x, np.ones(len(x)), np.zeros(len(x)), 1e-5) for x in (mean, spread))
            keys, values = self.prompt(i, own)
            if self.kd is not None and i >= 1:
                keys, values = keys + list(self.kd["rows"][i - 1][:3]), values + list(self.kd["rows"][i - 1][3:])
            cls = (self.l["merged"][i][0], self.l["merged"][i][1]) if self.learner == "apt" else None
            rows = self.block(i, rows, keys, values, cls)
        answer = self.classify(self.head, self.norm(rows[0]))
        if self.kd_head is None:
            return answer
        return (1 - self.alpha) * answer + self.alpha * self.classify(self.kd_head, self.norm(rows[-1]))


@pytest.fixture(scope="session")
def naive() -> Callable[..., Any]:
    """`Naive(model, backbone, learner)`."""
    return Naive
