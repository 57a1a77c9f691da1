"""Who decides which prompts a frame gets: the frame itself (exact), the caller (pinned), an earlier frame (sticky)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle, open_bundle
from ..errors import InputError, choose
from .confidence import WEIGHTS, Confidence
from .runner import Outputs, Runner, check_images
from .scene import SceneChange
from .select import selected

POLICIES = {
    "exact": "query and prompted pass on every frame",
    "pinned": "prompted pass only, with the selection of the task that the caller names, or with his own",
    "sticky": "video: the query runs when the scene changes and every so many frames; in between its answer is reused",
}
PATHS = {
    "query": "query and prompted pass of this very frame",
    "reused": "prompted pass with the selection of an earlier frame",
    "pinned": "prompted pass with the caller's selection",
    "single": "the only pass that this student has",
}


@dataclass(frozen=True)
class Step(Outputs):
    """What the student says about B frames, and by which way. What is derived is computed when it is read."""

    bundle: Bundle = field(repr=False)
    certainty: Confidence = field(repr=False)
    paths: tuple[str, ...]
    "B keys of PATHS"
    task: int | None = None
    "the task that the caller has pinned"

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """B times {"selected", "weights"}, see `runtime.select.selected`."""
        return selected(self.prompt_weights, self.bundle.selection, len(self.logits))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Calibrated probabilities of the classes, float64 (B, C)."""
        return self.certainty.probabilities(self.logits)

    @property
    def confidence(self) -> np.ndarray:
        """Calibrated probability of the first class, float64 (B,)."""
        return np.asarray(self.probabilities.max(axis=1))

    @cached_property
    def unknown(self) -> np.ndarray | None:
        """bool (B,): looks like none of the classes; None where the bundle has no threshold."""
        return self.certainty.unknown(self.logits)

    @cached_property
    def task_posterior(self) -> np.ndarray:
        """float64 (B, T). With pinned prompts the classes alone speak: whether they agree with the caller."""
        return self.certainty.posterior(self.logits, None if "pinned" in self.paths else self.prompt_weights)


class Selector:
    """One stream of frames under one policy; made by `open_policy`, used in a `with` block.

    Thread-safe: steps are taken one after the other, in the order in which they come. Streams that are to share memory
    get Selectors of their own over the same runners, where the backend takes calls at the same time. A student of one
    pass (one-pass queries, no query at all) has nothing to decide: every policy is `exact` for it, and `describe` says
    so.

    Args:
        policy: key of POLICIES. runners: "student", "query", "prompted": those that the policy needs.
        scene: for sticky.

    Raises: InputError for an unknown policy.
    """

    def __init__(
        self, bundle: Bundle, runners: Mapping[str, Runner], policy: str = "exact", scene: SceneChange | None = None
    ) -> None:
        self.bundle, self.asked = bundle, choose("policy", policy, POLICIES)
        self.policy = policy if "prompted" in runners else "exact"
        "what really runs"
        self.certainty = Confidence.of(bundle)
        side = bundle.preprocessing.size
        self._frame = (side, side, 3)
        self.scene = scene or SceneChange(side)
        self._runners = dict(runners)
        self._lock = Lock()
        self._selection: dict[str, np.ndarray] | None = None
        "input of the prompted graph -> (1, L, K): what is pinned, or what the last query gave"
        self._task: int | None = None
        self.counts = dict.fromkeys(PATHS, 0)
        "frames by path"

    def pin(self, task: int | None = None, weights: np.ndarray | Mapping[str, np.ndarray] | None = None) -> None:
        """Use these prompts from now on: of a task (from 0), or float32 (L, K), by input name where there are several.

        A student of one pass notes the task and computes as ever.

        Raises: InputError for both or neither, a task that is not there, or weights of another shape or type.
        """
        if (task is None) == (weights is None):
            raise InputError("pin a task or weights", got="both" if weights is not None else "neither")
        if task is not None:
            if "prompted" not in self._runners and 0 <= task < len(self.bundle.tasks):
                given: Mapping[str, np.ndarray] = {}
            else:
                given = self.certainty.selection(task)
        else:
            given = weights if isinstance(weights, Mapping) else {WEIGHTS: np.asarray(weights)}
        wanted = self._wanted()
        if weights is not None and not wanted:
            raise InputError("this student takes no prompts from outside", fix="name a task, or leave the pin out")
        if set(given) != set(wanted):
            raise InputError("weights by other names", got=sorted(given), expected=sorted(wanted))
        for name, value in given.items():
            if value.dtype != np.float32 or value.shape != wanted[name] or not np.isfinite(value).all():
                got = f"{value.dtype} {value.shape}"
                raise InputError(f"pinned {name}", got=got, expected=f"finite float32 {wanted[name]}")
        with self._lock:
            self._selection = {name: value[None].copy() for name, value in given.items()}
            self._task = task

    def step(self, images: np.ndarray) -> Step:
        """The next frame(s) of the stream, uint8 (B, S, S, 3).

        Raises: InputError for another shape or type, or `pinned` without a pin.
        """
        with self._lock:
            if self.policy == "pinned":
                return self._pinned(images)
            if self.policy == "sticky":
                return self._sticky(images)
            path = "query" if self.bundle.two_pass else "single"
            outputs = self._runners["student"].run(images)
            return self._done(outputs.logits, outputs.prompt_weights, (path,) * len(images))

    def forget(self) -> None:
        """The stream is cut: the next frame is a first one. What is pinned stays."""
        with self._lock:
            self.scene.forget()

    def describe(self) -> dict[str, Any]:
        """{"policy" (as it runs), "asked", "reason" where they differ, "frames" (by path), "backend", ...}."""
        reason = None if self.policy == self.asked else "a student of one pass: nothing to select ahead of it"
        with self._lock:
            frames = {path: count for path, count in self.counts.items() if count}
        runner = next(iter(self._runners.values()))
        return {**runner.describe(), "policy": self.policy, "asked": self.asked, "reason": reason, "frames": frames}

    def close(self) -> None:
        """Free the runners; a second call does nothing."""
        for runner in self._runners.values():
            runner.close()

    def __enter__(self) -> Selector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """Inputs of the prompted graph beside the images: name -> (L, K)."""
        if "prompted" not in self._runners:
            return {}
        signature = self._runners["prompted"].signature
        return {name: shape[1:] for name, shape in signature.inputs.items() if name != signature.images}

    def _done(self, logits: np.ndarray, weights: np.ndarray | None, paths: tuple[str, ...]) -> Step:
        for path in paths:
            self.counts[path] += 1
        return Step(logits, weights, self.bundle, self.certainty, paths, self._task)

    def _pinned(self, images: np.ndarray) -> Step:
        if self._selection is None:
            raise InputError("no prompts are pinned", fix="call pin(task) or pin(weights=...) before the first step")
        return self._reuse(images, self._selection, "pinned")

    def _reuse(self, images: np.ndarray, selection: dict[str, np.ndarray], path: str) -> Step:
        """The prompted pass with one selection (1, L, K) for all frames."""
        count = len(images)
        if count != 1:
            selection = {name: np.repeat(value, count, axis=0) for name, value in selection.items()}
        logits = self._runners["prompted"].run(images, **selection).logits
        return self._done(logits, selection[WEIGHTS], (path,) * count)

    def _sticky(self, images: np.ndarray) -> Step:
        """All frames that query go through the graph in one call, all others in a second one."""
        prompted, count = self._runners["prompted"], len(images)
        if getattr(images, "shape", ())[1:] != self._frame:
            check_images(images, self._frame[0])
        try:
            fresh = [self.scene(frame) for frame in images]
            if self._selection is not None and True not in fresh:  # nearly every step of a camera
                return self._reuse(images, self._selection, "reused")
            asks = np.array(fresh, bool)
            logits = np.zeros((count, len(self.bundle.classes)), np.float32)
            logits[asks], answers = self._query(images[asks])
            # Row 0: what the stream brought along, row i: what the i-th query of this step gave.
            known = {n: np.concatenate([(self._selection or answers)[n][:1], a]) for n, a in answers.items()}
            row = np.cumsum(asks)
            if not asks.all():
                given = {name: value[row[~asks]] for name, value in known.items()}
                logits[~asks] = prompted.run(images[~asks], **given).logits
        except BaseException:
            self.scene.forget()  # the frame whose selection was to be reused has given none
            raise
        if count:
            self._selection = {name: value[-1:].copy() for name, value in known.items()}
        return self._done(logits, known[WEIGHTS][row], tuple("query" if f else "reused" for f in fresh))

    def _query(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and the selection for the frames that follow.

        The fused graph has one stem for both passes and gives the weights on top: it costs less than query and
        prompted graph. It does not give the mapped weights of cdl-prompt; then the two graphs run.
        """
        if "student" in self._runners:
            runner = self._runners["student"]
            outputs = runner.compute({runner.signature.images: images})
            return outputs["logits"], {name: outputs[name] for name in self._wanted()}
        query = self._runners["query"]
        answers = query.compute({query.signature.images: images})
        return self._runners["prompted"].run(images, **answers).logits, answers


def needed(bundle: Bundle, policy: str) -> tuple[str, ...]:
    """The graphs that a policy runs. Raises: InputError for an unknown policy, or a bundle without its passes apart."""
    choose("policy", policy, POLICIES)
    if policy == "exact" or not bundle.two_pass:
        return ("student",)
    if "prompted" not in bundle.manifest.graphs:
        raise InputError(
            f"{bundle.path}: no graph for the prompted pass alone",
            got=", ".join(bundle.manifest.graphs),
            expected="prompted",
            fix="export the bundle again, or use --policy exact",
        )
    if policy == "pinned":
        return ("prompted",)
    inputs, outputs = bundle.signature("prompted").inputs, bundle.signature().outputs
    return ("student" if set(inputs) - set(outputs) == {bundle.signature().images} else "query", "prompted")


def open_policy(
    bundle: Bundle | Path | str,
    policy: str = "exact",
    backend: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    verify: bool = True,
    *,
    task: int | None = None,
    weights: np.ndarray | Mapping[str, np.ndarray] | None = None,
    scene: SceneChange | None = None,
) -> Selector:
    """Open a bundle for a stream of frames.

        with open_policy("bundle", "sticky") as stream:
            step = stream.step(frame[None])  # uint8 (1, S, S, 3)

    `sticky` loads two graphs, each with its own copy of the weights in memory (as engines do); `pinned` loads one.

    Args:
        policy: key of POLICIES. backend, threads, precision, verify: see `cdl_edge.runtime.load`.
        task, weights: what to pin; see Selector.pin. scene: when to query again; see SceneChange.

    Raises: InputError, as load and Selector; also for `pinned` with nothing to pin.
    """
    from .loader import load

    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify)
    names = needed(opened, policy)
    pinning = task is not None or weights is not None
    if pinning and policy != "pinned":
        raise InputError("nothing is pinned here", got=f"policy {policy!r}", expected="policy 'pinned'")
    with ExitStack() as stack:
        runners = {name: stack.enter_context(load(opened, backend, threads, name, False, precision)) for name in names}
        selector = Selector(opened, runners, policy, scene)
        if pinning:
            selector.pin(task, weights)
        elif selector.policy == "pinned":
            raise InputError("pinned to what?", got="neither a task nor weights", fix="name a task, or give weights")
        stack.pop_all()
    return selector
