"""New prompts into an engine that is there: seconds instead of a build, as long as no shape changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...artefacts.external import Record, external_records
from ...artefacts.layout import PROMPTS
from .engine_session import deserialise
from .product import logger

LEARNT = PROMPTS
"the file that holds all that learning changes (export.nodes.LEARNT)"


class RefitError(RuntimeError):
    """This engine cannot take the new constants: it has to be built again."""


def learnt_records(onnx: Path) -> list[Record]:
    """Where each learnt constant of a graph stands in prompts.bin."""
    return [record for record in external_records(onnx) if record.location == LEARNT]


def possible(changed: Sequence[str], learnt: Sequence[str], document: Mapping[str, Any]) -> str | None:
    """Why new constants need a new build; None when a refit does.

    Args:
        changed: what differs from the engine, as `sidecar.differences` names it. learnt: names of the learnt constants.
        document: the engine's sidecar.
    """
    if list(changed) != [LEARNT]:
        return ", ".join(changed) + " changed"
    refittable = document.get("refittable") or []
    if not refittable:
        return "prompts.bin changed, and the engine was built without refit"
    if fixed := sorted(set(learnt) - set(refittable)):
        return f"prompts.bin changed, and the engine cannot exchange {', '.join(fixed)}"
    return None


def refit(trt: ModuleType, plan: bytes, onnx: Path, engine_path: Path) -> bytes:
    """Exchange the learnt constants of a verified plan; returns the new plan.

    Raises: RefitError when TensorRT lacks one of them, wants others too, or refuses. InputError when prompts.bin is
        shorter than the graph says, or the plan cannot be loaded.
    """
    runtime, engine = deserialise(trt, plan, engine_path)
    refitter = trt.Refitter(engine, logger(trt))
    known = set(refitter.get_all_weights())
    records = learnt_records(onnx)
    if absent := sorted({record.name for record in records} - known):
        raise RefitError(f"the engine has no constant {', '.join(absent)}")
    # TensorRT reads them when it refits: they have to live until then.
    values = {record.name: np.ascontiguousarray(record.read(onnx.parent)) for record in records}
    for name, value in values.items():
        if not refitter.set_named_weights(name, trt.Weights(value)):
            raise RefitError(f"the engine refuses {name}: {'; '.join(logger(trt).take())}")
    if missing := refitter.get_missing_weights():
        raise RefitError(f"the engine wants {', '.join(missing)} as well")
    if not refitter.refit_cuda_engine():
        raise RefitError("; ".join(logger(trt).take()) or "TensorRT gives no reason")
    new = bytes(engine.serialize())
    del refitter, engine, runtime
    return new
