"""What every backend shares: its outputs, its face, and the check of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .bundle import Bundle


@dataclass(frozen=True)
class Outputs:
    """What the student says about B images."""

    logits: np.ndarray
    "float32 (B, C), classes in the order of Bundle.classes"
    prompt_weights: np.ndarray | None
    "float32 (B, L, K): L prompted blocks, K learnt entries; None when the learner has no prompt selection"


class Runner(Protocol):
    """A loaded graph; made by `cdl_edge.runtime.load`, used in a `with` block."""

    bundle: Bundle
    load_ms: float
    "time to create the session, the check of the bundle's hashes left out"

    def run(self, images: np.ndarray) -> Outputs:
        """Compute uint8 (B, S, S, 3). Raises: InputError for another shape or dtype."""

    def infer(self, images: np.ndarray) -> np.ndarray:
        """`run`, the logits only: float32 (B, C)."""

    def describe(self) -> dict[str, Any]:
        """{"backend", "providers" (as resolved), "threads", "version"}."""

    def close(self) -> None:
        """Free the session; a second call does nothing."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_images(images: np.ndarray, size: int) -> None:
    """Raises: InputError unless `images` is uint8 (B, size, size, 3)."""
    got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
        raise InputError(
            "images of the wrong shape or type",
            got=got,
            expected=f"uint8 (B, {size}, {size}, 3), RGB, not normalised",
            fix="use bundle.preprocessing.read(path) and np.stack",
        )


def in_batches(compute: Callable[[np.ndarray], list[np.ndarray]], images: np.ndarray, batch: int) -> list[np.ndarray]:
    """Feed a graph of fixed batch size: cut (B, ...) into pieces of `batch`, the last filled with zeros, and join."""
    pieces: list[list[np.ndarray]] = []
    for start in range(0, len(images), batch):
        piece = images[start : start + batch]
        real = len(piece)
        if real < batch:
            piece = np.concatenate([piece, np.zeros((batch - real, *piece.shape[1:]), piece.dtype)])
        pieces.append([output[:real] for output in compute(piece)])
    return [np.concatenate(column) for column in zip(*pieces, strict=True)]
