"""State that survives a kill: nested dicts of tensors and plain values in one safetensors file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..files import atomic_file

_TENSOR = "__tensor__"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, strings, None and bools atomically."""
    tensors: dict[str, torch.Tensor] = {}

    def flatten(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            key = f"{len(tensors)}.{key}"  # numbered: {"a.b": x} and {"a": {"b": y}} have one path
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: key}
        if isinstance(value, dict):
            # JSON has string keys only; optimiser states have integer ones: keep pairs.
            return {"__dict__": [[k, flatten(v, f"{key}.{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return [flatten(v, f"{key}.{i}") for i, v in enumerate(value)]
        return value

    tree = json.dumps(flatten(state, "state"))
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"tree": tree})


def load_state(path: Path) -> dict[str, Any]:
    """The inverse of `save_state` (tuples come back as lists). Raises: InputError when the file is not one of ours."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not a checkpoint of this project", got=str(error), fix="delete it and start again"
        ) from error

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            return {k: restore(v) for k, v in value["__dict__"]}
        if isinstance(value, list):
            return [restore(v) for v in value]
        return value

    restored = restore(tree)
    assert isinstance(restored, dict)
    return restored
