"""Which prompts an image selected, read from the graph's prompt_weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError, choose


def selected(prompt_weights: np.ndarray | None, selection: Mapping[str, Any], images: int = 1) -> list[dict[str, Any]]:
    """Prompts that each of B images took: {"selected": [entry, ...], "weights": [float, ...]}, of equal length.

    - "top-k" (L2P, DualPrompt): cosines of query and keys; the k largest of each block, largest first, block after
      block. Equal weights: the lower entry first.
    - "weighted" (CODA): signed weights of all components; the k components whose mean |weight| over the blocks is
      largest, with their mean signed weight.
    - "none" (APT, finetune): both lists are empty.

    Args:
        prompt_weights: float (B, L, K), or None when the graph has no such output.
        selection: the manifest's {"kind", "k", "blocks"}.
        images: B, used only when there are no weights to take it from.

    Raises: InputError for an unknown kind, weights that are absent or not (B, L, K), or k outside of 1 to K.
    """
    kind = choose("selection", str(selection.get("kind")), ("top-k", "weighted", "none"))
    if kind == "none":
        count = images if prompt_weights is None else len(prompt_weights)
        return [{"selected": [], "weights": []} for _ in range(count)]
    if prompt_weights is None or prompt_weights.ndim != 3:
        raise InputError(
            f"selection {kind!r} needs prompt weights",
            got="none" if prompt_weights is None else f"shape {prompt_weights.shape}",
            expected="(B, L, K)",
            fix="export the bundle again",
        )
    k, entries = selection.get("k"), prompt_weights.shape[2]
    if not isinstance(k, int) or not 1 <= k <= entries:
        raise InputError(
            "selection k is out of range", got=k, expected=f"1 to {entries}", fix="export the bundle again"
        )
    if kind == "top-k":
        order = np.argsort(-prompt_weights, axis=2, kind="stable")[:, :, :k]  # (B, L, k)
        values = np.take_along_axis(prompt_weights, order, axis=2)
    else:
        order = np.argsort(-np.abs(prompt_weights).mean(axis=1), axis=1, kind="stable")[:, :k]  # (B, k)
        values = np.take_along_axis(prompt_weights.mean(axis=1), order, axis=1)
    batch = len(prompt_weights)
    order, values = order.reshape(batch, -1), values.reshape(batch, -1)
    return [{"selected": order[i].tolist(), "weights": values[i].astype(float).tolist()} for i in range(batch)]
