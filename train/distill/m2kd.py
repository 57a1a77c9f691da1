"""M2KD (arXiv 1904.01769): old classes are distilled from the model as it was when it had just learnt them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..snapshots import Snapshots
from ..student import PromptedViT, StudentOutput
from .base import DistillationBatch, Distiller, DistillSpec, divergence

AUXILIARY = 0.5
"lambda, the weight of the auxiliary level; the paper's value was not to be found: ours"


class M2KD(Distiller):
    """loss = level(head) + 0.5 level(auxiliary head), where with snapshots S_i of all earlier tasks i

    level(head) = (1 - a) CE(head; current classes) + a tau^2 sum_i KL(S_i || head; the classes of task i).

    With exemplars (spec.exemplars) images of earlier classes come with those of the task, and CE is over all classes
    seen so far. With retraining the last epochs of a task, behind pruning, change only the weights that it keeps.

    Ours: the paper's sum has no weights, this project's a and 1 - a stand before its two parts as in every other
    distiller; lambda; which exemplars (drawn by the seed); all that snapshots.py says. The auxiliary head is a Linear
    on the class token in the middle of the depth, normalised without parameters; each snapshot answers with the
    auxiliary head of its time. There is no large teacher. Snapshots are asked without gradient, one after the other, in
    the precision of training: a step of task k costs about 1 + k / 3 plain ones.
    """

    needs_teacher: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __init__(self, spec: DistillSpec) -> None:
        super().__init__(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.auxiliary = nn.Linear(spec.student_width, spec.classes)
        self.middle = max(0, spec.student_depth // 2 - 1)
        "the block whose class token the auxiliary head reads"
        self.snapshots = Snapshots(len(spec.class_ranges), spec.pruned)
        self.auxiliaries: list[dict[str, Tensor]] = []
        "weight and bias of the auxiliary head of each snapshot"
        self.sizes: dict[str, object] = {}

    def loss(self, batch: DistillationBatch) -> Tensor:
        """The loss that the class describes, a scalar."""
        alpha, tau = self.spec.alpha, self.spec.tau
        answers = (
            batch.student.cls_logits.float(),
            self.read(batch.student.hidden, dict(self.auxiliary.named_parameters())),
        )
        weights = (1.0, AUXILIARY)
        total = torch.zeros((), device=batch.labels.device)
        low, high = batch.class_range
        first = 0 if self.spec.exemplars else low
        for answer, weight in zip(answers, weights, strict=True):
            hard = F.cross_entropy(answer[:, first:high], batch.labels + low - first)
            total = total + weight * (1 - alpha) * hard
        for i in range(batch.task):
            columns = slice(*self.spec.class_ranges[i])
            for answer, old, weight in zip(answers, self.ask(i, batch), weights, strict=True):
                total = total + weight * alpha * divergence(answer[:, columns], old[:, columns], tau)
        return total

    def read(self, hidden: tuple[Tensor, ...], head: dict[str, Tensor]) -> Tensor:
        """Logits of an auxiliary head for one pass, float32 (B, C)."""
        token = hidden[self.middle][:, 0]
        return F.linear(F.layer_norm(token, token.shape[1:]), head["weight"], head["bias"]).float()

    @torch.no_grad()
    def ask(self, index: int, batch: DistillationBatch) -> tuple[Tensor, Tensor]:
        """What the snapshot of task `index` says to this step: head and auxiliary head, float32 (B, C) each."""
        state = self.snapshots.rebuild(index, batch.student_model)
        # The query is the frozen backbone's, so every snapshot has the same; a whole network has none.
        inputs = (batch.inputs, batch.query)
        output: StudentOutput = functional_call(batch.student_model, state, inputs, {"hidden": True})
        return output.cls_logits.float(), self.read(output.hidden, self.auxiliaries[index])

    def begin_retraining(self, task: int, student: PromptedViT) -> bool:
        """Prune: moments would move what must stay."""
        self.snapshots.prune(student)
        return True

    def before_step(self, student: PromptedViT) -> None:
        """Kept weights of a whole network stay as they are."""
        self.snapshots.freeze(student)

    def end_task(self, task: int, student: PromptedViT) -> None:
        """Keep a snapshot of the student as it is after the task."""
        self.snapshots.take(student)
        self.auxiliaries.append({k: v.clone() for k, v in self.auxiliary.state_dict().items()})
        self.sizes = self.snapshots.sizes(student, self.auxiliaries)

    def report(self) -> dict[str, object]:
        """What metrics.json says: the memory of the snapshots."""
        return self.sizes

    def get_extra_state(self) -> dict[str, Any]:
        """Snapshots belong into checkpoints."""
        return {"snapshots": self.snapshots.to_state(), "auxiliaries": self.auxiliaries, "sizes": self.sizes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the snapshots that `get_extra_state` gave."""
        device = self.auxiliary.weight.device
        self.snapshots.load(state["snapshots"], device)
        self.auxiliaries = [{k: v.to(device) for k, v in head.items()} for head in state["auxiliaries"]]
        self.sizes = state["sizes"]
