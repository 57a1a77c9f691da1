"""Where a run computes: device, precision, and the processes that share a step (Hugging Face Accelerate, torchrun)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


@dataclass(frozen=True)
class Share:
    """Which part of every step is this process's."""

    rank: int = 0
    "of this process, 0-based"
    processes: int = 1
    "that share a step"

    def of(self, count: int) -> tuple[slice, float]:
        """The rows of a step of `count` images, and their weight in its mean.

        A process without a row takes the first with weight 0: it must take part in the sum of gradients.
        """
        low, high = (count * r // self.processes for r in (self.rank, self.rank + 1))
        return (slice(low, high), (high - low) / count) if high > low else (slice(0, 1), 0.0)


class Devices:
    """One process, or one of several started by torchrun: each step's loss is the mean over all of its images.

    Every process holds all models and draws the same random numbers; gradients are summed, each process's mean loss
    weighted with its share of the step. So nothing but the order of float additions depends on their number.
    """

    def __init__(self, devices: str, precision: str) -> None:
        """devices: auto | cpu | cuda; precision: auto | fp32 | bf16. Raises: InputError without a usable device."""
        if devices == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "no CUDA device is usable", got=f"torch {torch.__version__}", fix="use --devices cpu or auto"
            )
        cuda = devices != "cpu" and torch.cuda.is_available()
        self._accelerator: Any = None
        self.share = Share()
        self.device = torch.device("cuda" if cuda else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._join(cuda)
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device))

    def _join(self, cuda: bool) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise InputError(
                "several processes need Hugging Face Accelerate",
                got=str(error),
                fix="pip install accelerate",
            ) from error
        self._accelerator = Accelerator(cpu=not cuda)
        self.device = self._accelerator.device
        self.share = Share(self._accelerator.process_index, self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.share.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which the forward pass runs in the precision of training."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes; each of them gets the same sum."""
        if self._accelerator is None:
            return value
        result: Tensor = self._accelerator.reduce(value.to(self.device), reduction="sum")
        return result

    def any(self, flags: Tensor) -> Tensor:
        """For bool (...): whether any process has True there; the same shape."""
        return flags if self._accelerator is None else self.sum(flags.float()).to(flags.device) > 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in one message: what learns is small."""
        if self._accelerator is None:
            return
        # A parameter may have no gradient here and one in another process: all take part, in one order.
        wanted = [p for p in parameters if p.requires_grad]
        missing = torch.stack([torch.tensor(float(p.grad is not None)) for p in wanted])
        used = self.sum(missing)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in wanted])
        total, offset = self.sum(flat), 0
        for parameter, count in zip(wanted, used.tolist(), strict=True):
            part = total[offset : offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
            offset += parameter.numel()
            parameter.grad = part.clone() if count else None

    def on_main(self, action: Callable[[], None]) -> None:
        """Done by one process, seen by all. Raises: what it raises there, InputError in the others."""
        done = 0.0
        try:
            if self.is_main:
                action()
            done = 1.0
        finally:  # the others must not wait for a process that has given up
            total = float(self.sum(torch.tensor(done)))
        if total < self.share.processes:
            raise InputError("the first process has stopped", fix="see its message")

    def close(self) -> None:
        """Leave the group of processes."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "AVX512" in capabilities and bool(probe and probe())
