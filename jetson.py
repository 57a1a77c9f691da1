"""What a Jetson says about itself: JetPack, power mode, swap; every path below a root, so that tests can have a board.

Formats: /etc/nv_tegra_release ("# R36 (release), REVISION: 4.3, ..."), /var/lib/nvpmodel/status ("pmode:0002") and
/etc/nvpmodel.conf ("< POWER_MODEL ID=2 NAME=MAXN_SUPER >") as the Jetson Linux Developer Guide has them.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from .machine import read_line

JETPACKS = {34: 5, 35: 5, 36: 6, 38: 7, 39: 7}
"first number of the Jetson Linux release -> JetPack"
PYTHONS = {6: (3, 10), 7: (3, 12)}
"JetPack -> the Python of its Ubuntu, for which its TensorRT is built"
GET_TENSORRT = "sudo apt-get install -y tensorrt python3-libnvinfer"
"JetPack's TensorRT is no pip package: the extra `tensorrt` is empty on a Jetson"
ROOT = Path("/")


@dataclass(frozen=True)
class Release:
    """Jetson Linux, as flashed."""

    text: str
    "as R36.4.3"
    jetpack: int | None
    "6 or 7; 5 is too old for this package; None for a release that this code does not know"


@dataclass(frozen=True)
class PowerMode:
    """What nvpmodel has set."""

    number: int
    name: str | None
    "as 15W; None where /etc/nvpmodel.conf does not name it"
    fastest: int | None
    "the mode without a power budget (MAXN, MAXN_SUPER): not the highest number; None where the board has none"


@dataclass(frozen=True)
class Swap:
    """Where memory goes when it is full."""

    memory_bytes: int
    zram_bytes: int
    "compressed, in the same memory"
    disk_bytes: int
    "swap files and partitions"


def on_jetson() -> bool:
    """Whether this is a Jetson, asked as pyproject.toml asks: its TensorRT comes from apt, not from pip."""
    return "tegra" in platform.release()


def get_cuda_python(root: Path = ROOT) -> str:
    """The command that installs cuda-python for this Jetson's CUDA."""
    found = release(root)
    cuda_13 = found is not None and found.jetpack == 7
    return f"pip install 'cuda-python{'>=13,<14' if cuda_13 else '>=12.6,<13'}'"


def release(root: Path = ROOT) -> Release | None:
    """The release in /etc/nv_tegra_release; None on a machine that is no Jetson."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", read_line(str(root / "etc/nv_tegra_release")) or "")
    return Release(f"R{found[1]}.{found[2]}", JETPACKS.get(int(found[1]))) if found else None


def power_mode(root: Path = ROOT) -> PowerMode | None:
    """The power mode, read without nvpmodel, which wants root; None where none has been set."""
    found = re.match(r"pmode:(\d+)", read_line(str(root / "var/lib/nvpmodel/status")) or "")
    if not found:
        return None
    text = _text(root / "etc/nvpmodel.conf")
    pairs = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", text, re.MULTILINE)
    names = {int(number): name for number, name in pairs}
    free = [number for number, name in names.items() if name.startswith("MAXN")]
    super_ = [number for number in free if names[number] == "MAXN_SUPER"]
    return PowerMode(int(found[1]), names.get(int(found[1])), next(iter(super_ or free), None))


def swap(root: Path = ROOT) -> Swap | None:
    """Memory and swap as the kernel counts them; None where it does not say."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if not total:
        return None
    sizes = {"zram": 0, "disk": 0}
    for line in _text(root / "proc/swaps").splitlines()[1:]:
        name, _, kib = line.split()[:3]
        sizes["zram" if "zram" in name else "disk"] += int(kib) * 1024
    return Swap(int(total[1]) * 1024, sizes["zram"], sizes["disk"])


def apt_tensorrt(root: Path = ROOT) -> bool:
    """Whether apt's Python package of TensorRT (python3-libnvinfer) is there, seen by this interpreter or not."""
    return any((root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
