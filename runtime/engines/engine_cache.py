"""The engine that a graph needs here and now: taken from BUNDLE/engines, refitted, or built."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from ...artefacts.bundle import Bundle, Signature
from ...artefacts.external import external_files, graph_digest
from ...artefacts.layout import ENGINES
from ...errors import GateError, InputError
from .. import selftest
from ..runner import Value
from ..secret import is_sealed
from . import achieved, sidecar
from .build import Options, build
from .engine_session import EngineSession
from .memory import Memory
from .product import Gpu, identity
from .refit import RefitError, learnt_records, possible, refit

FOLDER = ENGINES
"inside the bundle; its manifest lists its own files only, engines are each device's own"


@dataclass(frozen=True)
class EngineCache:
    """One graph of one bundle, on one GPU."""

    trt: ModuleType
    gpu: Gpu
    memory: Memory
    bundle: Bundle
    key: str
    "of the manifest's graphs, as student.fp16"
    graph: str
    "student, query or prompted"
    precision: str
    check: Callable[[dict[str, Value], dict[str, Value]], None]
    "ChosenGraph.check_signature"
    cuda_graph: bool = True

    @property
    def onnx(self) -> Path:
        """Path of the graph that the engine is built from."""
        return self.bundle.graph(self.key)

    @property
    def engine(self) -> Path:
        """Where the engine stands; one for each GPU, so that a bundle may be carried between boards."""
        return self.bundle.path / FOLDER / f"{self.key}.{self.gpu.slug}.engine"

    @property
    def signature(self) -> Signature:
        """Names, shapes and types of the graph's inputs and outputs."""
        return self.bundle.signature(self.key)

    def fetch(
        self, options: Options | None = None, rebuild: bool = False, may_build: bool = True
    ) -> tuple[EngineSession, dict[str, Any]]:
        """A session on an engine that has passed, and its sidecar.

        An engine is executable code: one that this user did not build on this device is not loaded but built again.

        Args:
            options: None takes an engine whatever it was built with, and builds with the same again.
            rebuild: whatever is there. may_build: False refuses instead of building or refitting (minutes on a board).

        Raises: InputError: an engine that was changed, one that is unfit while nothing may be built, a build that
            fails, a precision that was not achieved, answers that are not the student's.
        """
        document = None if rebuild else sidecar.read(self.engine)
        reason = "asked for" if rebuild else "there is none for this graph and GPU yet"
        if document is not None and not is_sealed(document):  # nothing in it is believed, its options neither
            document, reason = None, "the one that is there was not built by this user on this device"
        if document is None:
            if not may_build:
                raise InputError(f"{self.engine}: {reason}", expected="an engine", fix="cdl-edge build BUNDLE")
            return self._build(options or Options(), reason)
        wanted = vars(options) if options is not None else None
        found = list(
            sidecar.differences(document, identity(self.trt, self.gpu), graph_digest(self.onnx), self._hashes(), wanted)
        )
        if found and not may_build:
            raise sidecar.unfit(self.engine, found)
        if not found:
            plan = sidecar.verify_plan(self.engine, document)
            return self._session(plan), document
        changed = [what for what, _, _ in found]
        obstacle = possible(changed, [r.name for r in learnt_records(self.onnx)], document)
        if obstacle is None:
            try:
                return self._refit(document)
            except (RefitError, GateError) as error:
                obstacle = f"a refit failed: {' '.join(str(error).split())}"
        return self._build(options or Options(**document["options"]), obstacle)

    # -- making -------------------------------------------------------------------------------------------------------

    def _build(self, options: Options, reason: str, refit: bool = True) -> tuple[EngineSession, dict[str, Any]]:
        self._say(f"building a TensorRT engine for {self.gpu.name}, which takes minutes: {reason}")
        begin = time.perf_counter()
        feeds, expected = selftest.reference(self.bundle, self.graph)  # before the minutes: it may be missing
        learnt = [record.name for record in learnt_records(self.onnx)]
        version = f"{self.trt.__name__}-{self.trt.__version__}"
        cache = self.engine.parent / f"timing.{version}.{self.gpu.slug}.cache"
        self._make_folder()
        with self.memory:
            plan = build(self.trt, self.onnx, replace(options, refit=options.refit and refit), learnt, cache)
        session = self._session(plan.data)
        try:
            found = achieved.read(achieved.inspect(session.engine, self.trt))
            achieved.check(self.precision, found)
            passed = selftest.check(session.compute, feeds, expected, self.precision, self.engine)
        except GateError as error:
            session.close()
            if not plan.refittable:
                raise
            # A refittable engine can be wrong where the same engine without refit is right (TensorRT 11.3).
            return self._build(options, f"with refit, {' '.join(str(error).split())}", refit=False)
        except InputError:
            session.close()
            raise
        seconds = time.perf_counter() - begin
        document = self._write(
            plan.data,
            {
                "options": vars(options),
                "refittable": list(plan.refittable),
                "achieved": {"precision": self.precision, **found},
                "gate": passed,
                "build_seconds": round(seconds, 1),
                "refits": 0,
            },
        )
        self._say(f"built in {seconds:.0f} s, {len(plan.data) / 1e6:.1f} MB")
        return session, document

    def _refit(self, document: dict[str, Any]) -> tuple[EngineSession, dict[str, Any]]:
        plan = sidecar.verify_plan(self.engine, document)
        begin = time.perf_counter()
        feeds, expected = selftest.reference(self.bundle, self.graph)
        with self.memory:
            new = refit(self.trt, plan, self.onnx, self.engine)
        session = self._session(new)
        try:
            passed = selftest.check(session.compute, feeds, expected, self.precision, self.engine)
        except GateError:
            session.close()
            raise
        kept = {key: document[key] for key in ("options", "refittable", "achieved", "build_seconds")}
        document = self._write(new, {**kept, "gate": passed, "refits": document["refits"] + 1})
        self._say(f"new prompts put into the engine in {time.perf_counter() - begin:.1f} s")
        return session, document

    def _session(self, plan: bytes) -> EngineSession:
        return EngineSession(self.trt, plan, self.engine, self.signature, self.memory, self.check, self.cuda_graph)

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of the files of constants, from the manifest: opening the bundle has compared them with the disk."""
        listed = self.bundle.manifest.files
        return {name: listed[name].sha256 for name in sorted(external_files(self.onnx))}

    def _write(self, plan: bytes, known: dict[str, Any]) -> dict[str, Any]:
        about = {
            "key": self.key,
            "onnx": {"file": self.onnx.name, "sha256": self.bundle.manifest.files[self.onnx.name].sha256},
            "graph": graph_digest(self.onnx),
            "files": self._hashes(),
            "identity": identity(self.trt, self.gpu),
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        return sidecar.write(self.engine, plan, {**about, **known})

    def _make_folder(self) -> None:
        try:
            self.engine.parent.mkdir(exist_ok=True)
            reason = None if os.access(self.engine.parent, os.W_OK) else "no permission to write"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            raise InputError(
                f"{self.engine.parent}: engines cannot be written there",
                got=reason,
                expected="a folder that may be written",
                fix="copy the bundle to a disk that may be written",
            )

    def _say(self, line: str) -> None:
        print(f"{self.engine.name}: {line}", file=sys.stderr)
