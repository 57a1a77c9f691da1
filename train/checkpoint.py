"""State that survives a kill: nested dicts of tensors and plain values in one safetensors file, without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..files import atomic_file
from ..log import LOG

_TENSOR = "__tensor__"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, strings, None and bools atomically, with a checksum."""
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
    # One entry of metadata: safetensors writes several in any order, and the same state must give the same bytes.
    signed = json.dumps({"tree": tree, "sha256": _checksum(tree, tensors)})
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"state": signed})


def load_state(path: Path) -> dict[str, Any]:
    """The inverse of `save_state` (tuples come back as lists).

    Raises: InputError when the file is not one of ours, or its checksum differs. Files of early versions have none.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            metadata = json.loads(metadata["state"]) if "state" in metadata else metadata  # before 2026-11-27: two
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        tree = json.loads(metadata["tree"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a checkpoint of this project", got=str(error), fix="delete it and start again"
        ) from error
    expected = metadata.get("sha256")
    if expected is not None and expected != (got := _checksum(metadata["tree"], tensors)):
        raise InputError(
            f"{path}: damaged since it was written",
            got=f"sha256 {got}",
            expected=f"sha256 {expected}",
            fix="bring back a copy; without one delete it and start again",
        )

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


def before(path: Path) -> Path:
    """Path at which the checkpoint that came before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def keep_before(path: Path) -> None:
    """Called in front of `save_state(path, ...)`: what is there now stays under its other name."""
    if not path.exists():
        return
    before(path).unlink(missing_ok=True)
    try:
        os.link(path, before(path))  # not renamed: at every moment the checkpoint has its name
    except OSError:  # a file system without links
        shutil.copyfile(path, before(path))


def load_kept(path: Path) -> dict[str, Any]:
    """`load_state`; of a damaged file the one before it, which then takes its place.

    Raises: InputError where neither can be read.
    """
    try:
        return load_state(path)
    except InputError:
        if not before(path).exists():
            raise
        state = load_state(before(path))
        os.replace(before(path), path)
        LOG.warning(f"{path}: damaged; going on from the checkpoint before it")
        return state


def remove_kept(path: Path) -> None:
    """Remove a checkpoint and the one before."""
    for each in (path, before(path)):
        each.unlink(missing_ok=True)


def _checksum(tree: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over everything that `load_state` gives back."""
    digest = hashlib.sha256(tree.encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
