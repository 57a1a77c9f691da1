"""Look up known weaknesses of what deploy/ installs: `make audit`, part of `make check`.

    python deploy/audit.py [LOCK ...]

Asks pip-audit, which asks PyPI. Exit code 1 when a locked version has a known weakness. Where the network, or an index
without advisories, gives no answer, it says so and ends with 0: that is no fault of what is checked.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def audit(lock: Path) -> tuple[dict[str, Any] | None, str]:
    """What pip-audit says of a lock file: its document, None where it has none, and its messages."""
    options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout)), done.stderr
    except ValueError:
        return None, done.stderr


def verdict(document: dict[str, Any] | None, messages: str) -> tuple[list[str], bool]:
    """Lines to print, and whether no weakness was found."""
    if document is None:
        return [f"not audited: {(messages.strip().splitlines() or ['pip-audit gives no answer'])[-1]}"], True
    packages = document["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    lines = [f"{len(audited)} of {len(packages)} packages audited"]
    lines += [f"  not audited: {package['name']}" for package in packages if "skip_reason" in package][:3]
    weak = [
        f"  {package['name']} {package['version']}: {found['id']}, mended: {' '.join(found['fix_versions']) or 'none'}"
        for package in audited
        for found in package["vulns"]
    ]
    return lines + weak, not weak


def main() -> int:
    """Returns: the exit code."""
    if importlib.util.find_spec("pip_audit") is None:  # not the network's fault
        print("pip-audit is not installed: pip install '.[dev]'")
        return 1
    good = True
    for lock in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.lock")):
        lines, fine = verdict(*audit(lock))
        print(f"{lock.name}: " + "\n".join(lines), flush=True)
        good = good and fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
