"""One scheme of 8 bits on one bundle: tried, smoothed where it falls short, and given its layers in float."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..artefacts.bundle import Bundle
from ..artefacts.layout import BACKBONE, PROMPTS
from ..log import LOG
from ..ranges import TensorRange
from .cpu_session import CpuSession
from .float_graph import FloatGraph, float_graph
from .floor import FEW, shortfall
from .measure import compare, measure
from .opset import opset_of
from .paired import Paired
from .quantize import Quantised, quantise
from .schemes import Scheme
from .search import Gate, Verdict, refusal, search, sensitivities
from .smooth import Smoothing

SENSITIVITY_IMAGES = 64


@dataclass(frozen=True)
class Known:
    """What an 8-bit graph is judged by."""

    pixels: np.ndarray
    "uint8 (N, S, S, 3)"
    expected: np.ndarray
    "logits (N, C) of fp32"
    labels: np.ndarray | None
    "class of each image, (N,); None: nobody knows"
    training: np.ndarray | None
    "uint8 (M, S, S, 3), for sensitivities; None: none at hand"
    tasks: Sequence[Sequence[int]]
    "classes of each"
    max_drop: float | None
    "points, see search.Gate; None: no gate"

    def verdict(self, answers: np.ndarray) -> Verdict | None:
        """What the gate says of logits (N, C); None: there is no gate."""
        if self.max_drop is None or self.labels is None:
            return None
        return Gate(self.max_drop).judge(self.expected, answers, self.labels, self.tasks)

    def wanting(self, answers: np.ndarray) -> str | None:
        """Why logits (N, C) fall short of the floor or the gate; None: they do not."""
        verdict = self.verdict(answers)
        if verdict is not None and verdict.failures:
            return "; ".join(verdict.failures)
        return shortfall(self.expected, answers, self.labels, self.tasks)

    def agreement(self, answers: np.ndarray) -> float:
        """Share of the images, in %, whose answer is the same as in fp32."""
        return 100.0 * float((answers.argmax(1) == self.expected.argmax(1)).mean())


@dataclass
class Trial:
    """One scheme of one bundle, to be tried with other layers in float."""

    bundle: Bundle
    ranges: dict[str, TensorRange]
    scheme: Scheme
    method: str
    smoothing: Smoothing | None
    folder: Path
    "for the constants: an engine reads them from files of one folder"
    opset: int | None = None
    "see quantize.quantise"
    chosen: dict[str, tuple[float, float]] = field(default_factory=dict)
    "tensor -> ends of its range: chosen once for all trials"

    def quantised(self, skip: Collection[str] = ()) -> Quantised:
        """Put all graphs of the bundle's base precision into 8 bits, but for the units in `skip`."""
        return quantise(
            self.graphs, self.ranges, self.scheme, self.method, self.smoothing, skip, self.chosen, self.opset
        )

    def session(self, skip: Collection[str] = ()) -> CpuSession:
        """A session of the student in 8 bits, with the units in `skip` in float."""
        made = self.quantised(skip)
        for name in (BACKBONE, PROMPTS):
            if not (self.folder / name).exists():
                (self.folder / name).write_bytes((self.bundle.path / name).read_bytes())
        for name, content in made.constants.items():
            (self.folder / name).write_bytes(content)
        return CpuSession(made.models["student"], self.folder, as_written=self.scheme.symmetric)

    @cached_property
    def graphs(self) -> dict[str, FloatGraph]:
        """The graphs of the base precision, by part."""
        base = ".fp16" if self.scheme.name == "int8-trt" and "student.fp16" in self.bundle.manifest.graphs else ""
        names = [n for n in ("student", "query", "prompted") if n + base in self.bundle.manifest.graphs]
        return {name: float_graph(self.bundle, name + base) for name in names}

    @cached_property
    def fp32(self) -> CpuSession:
        """A session of the bundle's own graph, in fp32."""
        return CpuSession(self.bundle.graph().read_bytes(), self.bundle.path)


def choose_smoothing(
    trials: Callable[[float | None], list[Trial]],
    strengths: Sequence[float | None],
    known: Known,
) -> tuple[float | None, list[tuple[Trial, np.ndarray]]]:
    """The first strength with which no scheme falls short, else the one with the highest agreement of the worst one.

    Args:
        trials: strength -> one Trial a scheme. All schemes share it: they share the file of weights.
        strengths: in the order in which they are tried; None: no smoothing.

    Returns: the strength, and its trials with their logits (N, C) on the known images.
    """
    best: tuple[float, float | None, list[tuple[Trial, np.ndarray]]] | None = None
    for strength in strengths:
        tried = []
        for trial in trials(strength):
            LOG.info(f"{trial.scheme.name}: answers to {len(known.pixels)} images{_smoothed(strength)}")
            tried.append((trial, trial.session().logits(known.pixels)))
        reasons = [(t.scheme.name, reason) for t, a in tried if (reason := known.wanting(a)) is not None]
        worst = min(known.agreement(answers) for _, answers in tried)
        if best is None or not reasons or worst > best[0]:
            best = worst, strength, tried
        if not reasons:
            break
        for name, reason in reasons:
            LOG.info(f"{name}{_smoothed(strength)}: {reason}")
    assert best is not None
    return best[1], best[2]


def _smoothed(strength: float | None) -> str:
    return "" if strength is None else f", smoothed by {strength:g}"


def settle(trial: Trial, answers: np.ndarray, known: Known, searching: bool) -> tuple[Quantised, dict[str, Any]]:
    """The final graphs of a scheme and its part of the manifest: layers go back to float while the gate fails.

    Args:
        answers: logits (N, C) with every layer in 8 bits. searching: False: refuse instead of a search.

    Raises: GateError.
    """
    skip: list[str] = []
    ranking: dict[str, float] | None = None
    verdict = known.verdict(answers)
    if verdict is not None and verdict.failures:
        assert known.max_drop is not None
        units = trial.quantised().units
        some = known.training if known.training is not None and len(known.training) else known.pixels
        some = some[:: max(1, len(some) // SENSITIVITY_IMAGES)][:SENSITIVITY_IMAGES]
        LOG.info(f"{trial.scheme.name}: {'; '.join(verdict.failures)}: looking for layers to leave in float")
        ranking = sensitivities(_counted(trial, some, len(units)), units, trial.fp32.logits(some))
        if not searching:
            raise refusal(trial.scheme.name, known.max_drop, verdict.failures, ranking)
        tried: dict[int, np.ndarray] = {}

        def failing(units: Collection[str]) -> list[str]:
            LOG.info(f"{trial.scheme.name}: {len(units)} layers in float")
            tried[len(units)] = trial.session(units).logits(known.pixels)
            found = known.verdict(tried[len(units)])
            return found.failures if found is not None else []

        skip = search(failing, list(ranking))
        answers = tried[len(skip)]
        verdict = known.verdict(answers)
    quantised = trial.quantised(skip)
    reason = shortfall(known.expected, answers, known.labels, known.tasks)
    document: dict[str, Any] = {
        "runtimes": trial.scheme.runtimes,
        "opset": opset_of(onnx.load_model_from_string(quantised.models["student"])),
        "layers_int8": len(quantised.units),
        "layers_float": skip,
        "sensitivity": ranking,
        "images": len(known.pixels),
        "agreement": known.agreement(answers),
        "max_abs_error": float(np.abs(answers - known.expected).max()),
        "shortfall": reason,
        "gate": None if verdict is None else {"verdict": verdict.name, "unsure": verdict.unsure},
        "before": None,
        "after": None,
    }
    if known.labels is not None:
        before, after = (measure(x, known.labels, known.tasks) for x in (known.expected, answers))
        right = [x.argmax(1) == known.labels for x in (known.expected, answers)]
        document |= {"before": before.to_json(), "after": after.to_json(), **compare(before, after)}
        document["paired"] = Paired.of(*right).to_json()
    _warn(trial.scheme.name, document)
    return quantised, document


def _warn(name: str, document: dict[str, Any]) -> None:
    """What a reader of the figures has to know beside them."""
    if document["shortfall"] is not None:
        LOG.warning(f"{name}: {document['shortfall']}: it is written, and not recommended")
    elif document["images"] < FEW:
        LOG.warning(f"{name}: the answers of {document['images']} images are compared; give more with --data")
    for line in (document["gate"] or {}).get("unsure", ()):
        LOG.warning(f"{name}: not decided: {line}")


def _counted(trial: Trial, pixels: np.ndarray, units: int) -> Callable[[Collection[str]], np.ndarray]:
    """The answers of a trial to some images, said as they come."""
    count = 0

    def answers(skip: Collection[str]) -> np.ndarray:
        nonlocal count
        count += 1
        if count == 1 or count % 10 == 0 or count == units:
            LOG.info(f"{trial.scheme.name}: sensitivity of layer {count} of {units}")
        return trial.session(skip).logits(pixels)

    return answers
