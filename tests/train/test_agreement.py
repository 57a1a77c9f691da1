"""Two implementations, one number: training forward and optimiser steps against the published formulas, redone.

The second implementation is the plainest there is: one image, one head, one entry at a time, torch's autograd in double
precision, Adam by hand. It shares nothing with train/ but the numbers it starts from. The product's own code runs in
double precision too: Adam divides a gradient by its own size, which would make rounding of the smallest ones as large
as a step.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdl_edge.train.batches import Batch
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.devices import Devices
from cdl_edge.train.distill import DISTILLERS, DistillSpec
from cdl_edge.train.phase import Phase, TeacherOutputs
from cdl_edge.train.student import ModelSpec, PromptedViT

CLASSES, TASKS, TASK = 6, 3, 1
LOW, HIGH = 2, 4
"the classes of the second task"
ALPHA, TAU, RATE, STEPS = 0.3, 2.0, 0.01, 2
POOL_PER_TASK = 33
"CODA: 100 components over three tasks"


# -- the formulas -----------------------------------------------------------------------------------------------------


def layer_norm(row: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = row.sum() / len(row)
    variance = ((row - mean) ** 2).sum() / len(row)
    return (row - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())


def stack_of(rows: list[Tensor]) -> Tensor:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


class Formulas:
    """A frozen ViT, a learner and two heads as dicts of double tensors."""

    def __init__(self, frozen: dict[str, Tensor], learnt: dict[str, Tensor], learner: str, query: str) -> None:
        self.w, self.p, self.learner, self.asks = frozen, learnt, learner, query
        self.depth, self.heads, self.width = 6, 2, 16

    def embed(self, image: Tensor) -> list[Tensor]:
        """(3, 16, 16), normalised -> class token and four patches, positions added."""
        rows = [self.w["cls_token"][0, 0]]
        for top in (0, 8):
            for left in (0, 8):
                piece = image[:, top : top + 8, left : left + 8].reshape(-1)
                kernel = self.w["patch_embed.proj.weight"].reshape(self.width, -1)
                rows.append(kernel @ piece + self.w["patch_embed.proj.bias"])
        return [row + self.w["pos_embed"][0, i] for i, row in enumerate(rows)]

    def block(
        self,
        i: int,
        rows: list[Tensor],
        more_keys: list[Tensor],
        more_values: list[Tensor],
        cls: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in self.w.items() if k.startswith(f"blocks.{i}.")}
        size = self.width // self.heads
        queries, keys, values = [], [], []
        for row in rows:
            three = w["attn.qkv.weight"] @ layer_norm(row, w["norm1.weight"], w["norm1.bias"], 1e-6)
            three = three + w["attn.qkv.bias"]
            queries.append(three[: self.width])
            keys.append(three[self.width : 2 * self.width])
            values.append(three[2 * self.width :])
        if cls is not None:
            keys[0], values[0] = keys[0] + cls[0], values[0] + cls[1]
        keys, values = keys + more_keys, values + more_values
        out = []
        for row, query in zip(rows, queries, strict=True):
            mixed = []
            for h in range(self.heads):
                part = slice(h * size, (h + 1) * size)
                scores = [torch.exp((query[part] * key[part]).sum() / math.sqrt(size)) for key in keys]
                total = stack_of(scores)
                mixed.append(stack_of([s / total * value[part] for s, value in zip(scores, values, strict=True)]))
            row = row + w["attn.proj.weight"] @ torch.cat(mixed) + w["attn.proj.bias"]
            normed = layer_norm(row, w["norm2.weight"], w["norm2.bias"], 1e-6)
            inner = gelu(w["mlp.fc1.weight"] @ normed + w["mlp.fc1.bias"])
            out.append(row + w["mlp.fc2.weight"] @ inner + w["mlp.fc2.bias"])
        return out

    def last_norm(self, row: Tensor) -> Tensor:
        return layer_norm(row, self.w["norm.weight"], self.w["norm.bias"], 1e-6)

    def query(self, rows: list[Tensor]) -> Tensor:
        """Final class token of the bare backbone."""
        for i in range(self.depth):
            rows = self.block(i, rows, [], [])
        return self.last_norm(rows[0])

    def prompt(self, i: int, q: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Key rows, value rows and the key term of one image in block i, as in training."""
        if self.learner == "l2p" and i == 0:
            near = [cos(q, self.p["learner.key"][k]) for k in range(30)]
            best = sorted(range(30), key=lambda k: -near[k].item())[:5]
            keys = [self.p["learner.prompt"][k, r] for k in best for r in range(10)]
            values = [self.p["learner.prompt"][k, r] for k in best for r in range(10, 20)]
            return keys, values, stack_of([1 - near[k] for k in best]) / 5
        if self.learner == "dualprompt" and i in (0, 1):
            rows = self.p[f"learner.general.{i}"]
            return [rows[r] for r in range(3)], [rows[r] for r in range(3, 6)], None
        if self.learner == "dualprompt" and i in (2, 3, 4):
            rows = self.p[f"learner.expert.{i}"][TASK]  # the task's own entry, whichever key is nearest
            near = cos(q, self.p[f"learner.key.{i}"][TASK])
            return [rows[r] for r in range(10)], [rows[r] for r in range(10, 20)], 1 - near
        if self.learner == "coda" and i <= 4:
            rows = [torch.zeros(self.width, dtype=torch.float64) for _ in range(8)]
            for k in range(POOL_PER_TASK * (TASK + 1)):
                component, key, attention = (self.p[f"learner.{n}.{i}"][k] for n in ("prompt", "key", "attention"))
                if k < POOL_PER_TASK * TASK:  # earlier tasks' components take part and do not learn
                    component, key, attention = component.detach(), key.detach(), attention.detach()
                weight = cos(q * attention, key)
                rows = [row + weight * component[r] for r, row in enumerate(rows)]
            return rows[:4], rows[4:], None
        return [], [], None

    def head(self, name: str, row: Tensor) -> Tensor:
        weight = self.p[f"{name}.weight"]
        if self.learner == "apt":
            row = layer_norm(row, self.p[f"{name}.norm.weight"], self.p[f"{name}.norm.bias"], 1e-5)
            return torch.stack([(row * w).sum() / torch.sqrt((w * w).sum()) for w in weight])
        return weight @ row + self.p[f"{name}.bias"]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Logits of the head, of the KD head, and the key term of each block that has one."""
        rows = self.embed(image)
        full = None if self.asks != "two-pass" or self.learner == "apt" else self.query(rows).detach()
        has_kd = "kd.token" in self.p
        if has_kd:
            rows = [*rows, self.p["kd.token"][0, 0]]
        terms = []
        for i in range(self.depth):
            own = rows[0]
            if self.asks == "one-pass-patches":
                mean = stack_of(rows[1:5]) / 4
                spread = torch.sqrt(stack_of([(row - mean) ** 2 for row in rows[1:5]]) / 4 + 1e-6)
                one, zero = torch.ones(self.width).double(), torch.zeros(self.width).double()
                own = layer_norm(mean, one, zero, 1e-5) + layer_norm(spread, one, zero, 1e-5)
            keys, values, term = self.prompt(i, own if full is None else full)
            terms += [term] if term is not None else []
            if has_kd and i >= 1:
                keys = keys + [self.p["kd.rows"][i - 1, r] for r in range(3)]
                values = values + [self.p["kd.rows"][i - 1, r] for r in range(3, 6)]
            added = None
            if self.learner == "apt":
                added = (self.p["learner.prompt"][i, 0], self.p["learner.prompt"][i, 1])
            rows = self.block(i, rows, keys, values, added)
        kd = self.head("kd_head", self.last_norm(rows[-1])) if has_kd else None
        return self.head("head", self.last_norm(rows[0])), kd, terms


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Classes of other tasks at minus infinity."""
    masked = torch.stack([v if LOW <= c < HIGH else torch.tensor(-torch.inf).double() for c, v in enumerate(logits)])
    return torch.log(torch.exp(masked).sum()) - logits[label]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """tau^2 KL(teacher || student) over the current classes. teacher: their logits only."""
    p, q = (torch.exp(x / TAU) / torch.exp(x / TAU).sum() for x in (teacher, student[LOW:HIGH]))
    return TAU * TAU * (p * torch.log(p / q)).sum()


def total_loss(formulas: Formulas, images: Tensor, labels: list[int], said: Tensor, distill: str) -> Tensor:
    """Means over the batch; the key terms' mean over blocks."""
    parts = []
    for image, label, teacher in zip(images, labels, said, strict=True):
        cls, kd, terms = formulas.forward(image)
        loss = cross_entropy(cls, label)
        if distill == "kdp":
            assert kd is not None
            loss = (1 - ALPHA) * loss + ALPHA * divergence(kd, teacher)
        parts.append(loss + (stack_of(terms) / len(terms) if terms else 0.0))
    return stack_of(parts) / len(parts)


def adam(value: Tensor, gradient: Tensor, memory: dict[str, Tensor], step: int) -> Tensor:
    """arXiv 1412.6980, algorithm 1, without weight decay."""
    memory["m"] = 0.9 * memory["m"] + (1 - 0.9) * gradient
    memory["v"] = 0.999 * memory["v"] + (1 - 0.999) * gradient**2
    m, v = memory["m"] / (1 - 0.9**step), memory["v"] / (1 - 0.999**step)
    return value - RATE * m / (torch.sqrt(v) + 1e-8)


# -- the comparison ---------------------------------------------------------------------------------------------------

CASES = [
    (learner, distill, query)
    for learner in ("l2p", "dualprompt", "coda", "apt")
    for distill in ("none", "kdp")
    for query in ("two-pass", "one-pass", "one-pass-patches")
    if learner != "apt" or query == "two-pass"  # APT asks nothing
]


def ways(query):
    return {"one_pass": query != "two-pass", "query_of": "patches" if query == "one-pass-patches" else "class"}


@pytest.fixture
def student(backbone):
    """student(learner, distill, query): in its second task, every number that learns random and large."""

    def make(learner, distill, query):
        frozen = copy.deepcopy(backbone.model).double()
        kd = (6, 6) if distill == "kdp" else None
        model = PromptedViT(frozen, ModelSpec(learner, CLASSES, TASKS, 0, kd=kd, alpha=ALPHA, **ways(query)))
        for task in range(TASK + 1):
            model.learner.begin_task(task)
        model.double()
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).double()
            if learner == "coda" and name.startswith("learner."):
                used = POOL_PER_TASK * (TASK + 1)  # the others are not there yet
                p.data[:used] = 0.5 * noise[:used]
            elif not name.endswith("norm.weight"):
                p.data.copy_(0.5 * noise)
        return model

    return make


@pytest.fixture
def scene(backbone):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 16, 16, generator=generator).double()
    return images, [2, 3], torch.randn(2, 2, generator=generator).double()


def numbers(module):
    return {k: v.detach().clone().double() for k, v in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "distill", "query"), CASES)
def test_forward_and_steps_agree(student, scene, monkeypatch, learner, distill, query):
    monkeypatch.setattr(Tensor, "float", lambda self: self)  # losses are cast to float32: stay in double here
    model = student(learner, distill, query)
    images, labels, said = scene
    start = numbers(model)
    assert all(v.dtype == torch.float64 for v in model.parameters())

    # The product: a phase as the loop makes it.
    config = TrainConfig("digits", "x", learner=learner, distill=distill, query=query, learning_rate=RATE, alpha=ALPHA)
    spec = DistillSpec(ALPHA, TAU, 16, 6, 2, 24, 6, 2, CLASSES, ((0, 2), (2, 4), (4, 6)), 0)
    models = {"student": model}
    phase = Phase(
        config, Devices("cpu", "fp32"), models, "student", TASK, (LOW, HIGH), False, DISTILLERS[distill](spec)
    )
    tokens = model.prepare(images)
    asked = model.query(tokens) if model.two_pass else None
    batch = Batch(np.arange(2), torch.tensor(labels), {"student": tokens}, {"student": asked})
    with torch.no_grad():
        output = model(tokens, asked, training=True)

    # The formulas, from the same numbers.
    frozen = numbers(model.backbone)
    learnt = {k: v.clone().requires_grad_() for k, v in start.items() if k in dict(model.named_parameters())}
    formulas = Formulas(frozen, learnt, learner, query)
    with torch.no_grad():
        for i, image in enumerate(images):
            cls, kd, terms = formulas.forward(image)
            assert (output.cls_logits[i] - cls).abs().max() <= 1e-9
            assert (kd is None) == (output.kd_logits is None) == (distill == "none")
            if kd is not None:
                assert (output.kd_logits[i] - kd).abs().max() <= 1e-9
            assert len(terms) == {"l2p": 1, "dualprompt": 3}.get(learner, 0)

    memories = {k: {"m": torch.zeros_like(v), "v": torch.zeros_like(v)} for k, v in learnt.items()}
    for step in range(1, STEPS + 1):
        loss = phase._loss(batch, TeacherOutputs(said))
        phase.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        phase.optimiser.step()

        expected = total_loss(formulas, images, labels, said, distill)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        gradients = torch.autograd.grad(expected, list(learnt.values()), allow_unused=True)
        for (name, value), gradient in zip(learnt.items(), gradients, strict=True):
            if gradient is not None:
                value.data = adam(value.data, gradient, memories[name], step)
        for name, value in numbers(model).items():
            if name in learnt:
                assert (value - learnt[name]).abs().max() <= 1e-5, f"{name} after step {step}"

    for name, value in learnt.items():  # otherwise the agreement says little
        assert (start[name] - value).abs().max() > RATE / 10, name


@pytest.mark.quick("l2p-kdp-two-pass")
@pytest.mark.parametrize(("learner", "distill", "query"), CASES)
def test_float32_gives_the_same_logits_in_training(student, backbone, scene, learner, distill, query):
    # As it is trained: single precision, the forward pass of a step.
    model = student(learner, distill, query)
    images, _, _ = scene
    formulas = Formulas(numbers(model.backbone), numbers(model), learner, query)
    single = PromptedViT(
        backbone.model,
        ModelSpec(
            learner,
            CLASSES,
            TASKS,
            0,
            kd=(6, 6) if distill == "kdp" else None,
            alpha=ALPHA,
            **ways(query),
        ),
    )
    single.load_state_dict(model.state_dict())
    with torch.no_grad():
        output = single(single.prepare(images.float()), training=True)
        for i, image in enumerate(images):
            cls, kd, _ = formulas.forward(image)
            assert (output.cls_logits[i].double() - cls).abs().max() <= 1e-5
            if kd is not None:
                assert (output.kd_logits[i].double() - kd).abs().max() <= 1e-5
