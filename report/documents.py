"""Whether a run, a bundle and a profile belong on one page: one that mixes two runs would mislead."""

from __future__ import annotations

from ..artefacts.bundle import Bundle
from ..artefacts.profile_record import ProfileRecord
from ..artefacts.run_record import Metrics
from ..errors import InputError, command_line


def check_pair(metrics: Metrics, bundle: Bundle) -> None:
    """Classes, tasks and the student's matrix must agree. Raises: InputError."""
    student = (bundle.manifest.training or {}).get("student")
    same = bundle.classes == metrics.classes and bundle.tasks == metrics.tasks
    if same and isinstance(student, dict) and "matrix" in student:
        same = student["matrix"] == [list(row) for row in metrics.student.matrix]
    if not same:
        raise InputError(
            f"{bundle.path}: was not exported from this run",
            got="other classes, other tasks or another accuracy matrix",
            expected="the run that the bundle was exported from",
            fix="leave the run out: the bundle keeps its own training record",
        )


def check_measured(profile: ProfileRecord, bundle: Bundle | None) -> None:
    """Latency of another graph must not stand under this one's name. Raises: InputError."""
    digest, version = profile.context.get("graph_sha256"), profile.context.get("manifest_sha256")
    if bundle is None:
        if version is not None or digest is not None:  # a run alone does not say which bundles were made from it
            raise InputError(
                "a profile without the bundle that it was measured on",
                got=f"a run and a profile of bundle {profile.document.get('bundle') or version or digest!s:.64}",
                expected="the bundle too",
                fix="give it: cdl-edge report RUN BUNDLE --profile FILE --out PAGE",
            )
        return
    # Two bundles of one architecture have the same graph: what they have learnt lies in other files.
    if version is not None and version != bundle.manifest.manifest_sha256:
        raise InputError(
            f"{bundle.path}: the profile was measured on another bundle",
            got=f"version {version!s:.16}",
            expected=f"version {bundle.manifest.version}",
            fix=f"measure this one: {command_line('profile', bundle.path)} --json",
        )
    if digest is not None and digest not in {entry.sha256 for entry in bundle.manifest.files.values()}:
        raise InputError(
            f"{bundle.path}: the profile was measured on another graph",
            got=f"sha256 {digest!s:.64}",
            expected="the hash of a graph of this bundle",
            fix=f"measure this one: {command_line('profile', bundle.path)} --json",
        )
