"""What deploy/ installs: locked by hash, within the package's own ranges, and looked up for known weaknesses."""

from __future__ import annotations

import importlib.util
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def locked(root):
    """locked(file) -> [(Requirement with ==, how many hashes it has)]."""

    def read(name):
        text = (root / "deploy" / name).read_text("utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return [(Requirement(line.split(" --hash")[0]), line.count("--hash=sha256:")) for line in lines]

    return read


@pytest.mark.parametrize("name", ["requirements.lock", "cuda12.lock", "cuda13.lock"])
def test_every_locked_package_has_one_version_and_hashes(locked, name):
    for requirement, hashes in locked(name):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes >= 1, requirement


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_the_lock_gives_what_is_asked_for(root, locked, python):
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    here |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
    pinned = {}
    for requirement, _ in locked("requirements.lock"):
        if requirement.marker is None or requirement.marker.evaluate(here):
            assert requirement.name not in pinned, f"two versions of {requirement.name}"
            pinned[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    lines = (root / "deploy" / "requirements.txt").read_text("utf-8").splitlines()
    for wanted in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if wanted.marker is None or wanted.marker.evaluate(here):
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.jetson", "README.md"])
def test_nothing_is_installed_past_the_lock(root, name):
    for line in re.findall(r"pip install [^&\\\n]*", (root / "deploy" / name).read_text("utf-8")):
        assert "--require-hashes" in line or "--no-deps" in line, line


@pytest.fixture(scope="module")
def audit(root):
    """deploy/audit.py as a module."""
    spec = importlib.util.spec_from_file_location("audit", root / "deploy" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_known_weakness_fails_the_audit(audit):
    weak = {"name": "a", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
    sound = {"name": "b", "version": "2.0", "vulns": []}
    unknown = {"name": "c", "skip_reason": "not found"}
    lines, fine = audit.verdict({"dependencies": [weak, sound, unknown]}, "")
    assert not fine and lines[0] == "2 of 3 packages audited"
    assert "a 1.0: CVE-1, mended: 1.1" in "".join(lines) and "not audited: c" in "".join(lines)
    assert audit.verdict({"dependencies": [sound]}, "")[1]


def test_without_a_network_it_says_so(audit):
    lines, fine = audit.verdict(None, "WARNING: x\nERROR: connection refused\n")
    assert fine and lines == ["not audited: ERROR: connection refused"]
