"""The model as it was right after each task, kept small: what M2KD (arXiv 1904.01769) learns from.

Of a prompt learner a snapshot is everything that learns: prompts, keys, heads. Of a whole network it is a set of kept
weights: an owner map says for each weight after which task it was kept, and kept weights never change again. So
snapshot i is the weights kept up to task i and the pre-trained values elsewhere: k snapshots cost one network, one byte
a weight and k heads.

Ours, where the paper says nothing or PackNet (arXiv 1711.05769), whose masks they are, something else: a weight that is
not kept returns to its pre-trained value, which lies in the backbone's file anyway, not to 0, for a pre-trained network
without nine tenths of its weights has lost its features; its importance is therefore |weight - pre-trained value|; each
task may keep an equal share of every tensor, so the last one keeps all that is left.

`zero` is PackNet's: pruned weights are 0, their importance is |weight|, and only matrices are pruned. Biases, norms,
class token and positions stay as the first task leaves them. Ours there too: the equal shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .student import PromptedViT

NETWORK = "network."
"prefix of the whole network's weights in a student's state"
PRUNED = ("pretrained", "zero")
"what a weight that is not kept becomes"
NEVER_PRUNED = ("cls_token", "pos_embed")
"of `zero`: no matrices, whatever their shape"


class Snapshots:
    """Grows by one with each task; `to_state` and `load` for checkpoints."""

    def __init__(self, tasks: int, pruned: str = "pretrained") -> None:
        """pruned: of PRUNED."""
        self.tasks, self.zero = tasks, pruned == "zero"
        self.pruned = 0
        "tasks that the network has been pruned for: len(self), or one more while it retrains"
        self.owners: dict[str, Tensor] = {}
        "weight of the network -> its shape, 0: free, i + 1: first kept after task i; empty for a prompt learner"
        self.kept: list[dict[str, Tensor]] = []
        "of each snapshot: everything of the student's state but the network"

    def __len__(self) -> int:
        return len(self.kept)

    @torch.no_grad()
    def prune(self, student: PromptedViT) -> None:
        """Choose the weights of a whole network that the task keeps; the free ones are no longer what they learnt."""
        for name, weight, start in self._weights(student):
            dtype = torch.uint8 if self.tasks < 256 else torch.int16
            owner = self.owners.setdefault(name, torch.zeros_like(weight, dtype=dtype))
            if self.zero and (weight.ndim < 2 or name in NEVER_PRUNED):
                owner.fill_(1)
                continue
            self._keep(owner, (weight - start).abs())
            weight.copy_(torch.where(owner > 0, weight, start))
        self.pruned = len(self) + 1

    @torch.no_grad()
    def take(self, student: PromptedViT) -> None:
        """Right after a task: what it computes from now on is the snapshot. A whole network is pruned if it was not."""
        if self.pruned == len(self):
            self.prune(student)
        self.kept.append({k: v.clone() for k, v in student.state_dict().items() if not k.startswith(NETWORK)})

    def _keep(self, owner: Tensor, change: Tensor) -> None:
        """Give this task the free weights of one tensor that changed most, as far as its share goes."""
        task = len(self.kept)
        flat = change.masked_fill(owner > 0, 0.0).flatten()
        share = flat.numel() * (task + 1) // self.tasks - int((owner > 0).sum())
        # Stable: the choice among equal changes is the same in every process and after every resume.
        chosen = flat.argsort(descending=True, stable=True)[:share]
        chosen = chosen[flat[chosen] > 0]  # a weight that stayed as it was is nobody's
        owner.view(-1)[chosen] = task + 1

    def freeze(self, student: PromptedViT) -> None:
        """No gradient for kept weights: Adam, new for each task, then moves them by exactly 0.

        Behind pruning, until the snapshot is taken, it is the other way round: only what this task keeps learns.
        """
        mine = len(self) + 1 if self.pruned > len(self) else 0
        for name, weight, _ in self._weights(student):
            owner = self.owners.get(name)
            if owner is not None and weight.grad is not None:
                weight.grad.masked_fill_(owner != mine, 0.0)

    @torch.no_grad()
    def rebuild(self, index: int, student: PromptedViT) -> dict[str, Tensor]:
        """The student's state as it was after task `index`, for `torch.func.functional_call`."""
        state = dict(self.kept[index])
        for name, weight, start in self._weights(student):
            owner = self.owners[name]
            state[NETWORK + name] = torch.where((owner > 0) & (owner <= index + 1), weight, start)
        return state

    def sizes(self, student: PromptedViT, more: list[dict[str, Tensor]]) -> dict[str, object]:
        """Bytes of all snapshots, and of as many copies. more: what the caller keeps beside each."""
        count, network = len(self), sum(_size(w) for w in student.backbone.parameters())
        owners = sum(map(_size, self.owners.values()))
        learnt = sum(_size(v) for kept in (*self.kept, *more) for v in kept.values())
        return {
            "snapshots": count,
            "network_bytes": network,
            "owner_map_bytes": owners,
            "learnt_bytes": learnt,
            "total_bytes": network + owners + learnt,
            "full_copies_bytes": count * network + learnt,
            "networks": (network + owners + learnt) / network,
        }

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the snapshots."""
        return {"owners": self.owners, "kept": self.kept, "pruned": self.pruned}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what `to_state` gave."""
        self.owners = {k: v.to(device) for k, v in state["owners"].items()}
        self.kept = [{k: v.to(device) for k, v in kept.items()} for kept in state["kept"]]
        self.pruned = state.get("pruned", len(self.kept))  # checkpoints of before there was retraining have none

    def _weights(self, student: PromptedViT) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, weight, its value where it is pruned) of a network that learns; nothing of a frozen one."""
        if not student.learner.whole_network:
            return
        start = dict(student.pretrained.named_parameters())
        for name, weight in student.backbone.named_parameters():
            yield name, weight, torch.zeros_like(weight) if self.zero else start[name]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
