"""What is read off a Jetson, and what a missing package is named there; `doctor` tests the rest."""

from __future__ import annotations

import platform

import pytest

from cdl_edge import jetson


@pytest.mark.parametrize(("system", "there"), [("5.15.148-tegra", True), ("6.8.12-tegra", True), ("6.8.0-45", False)])
def test_a_jetson_is_known_by_its_kernel(monkeypatch, system, there):
    monkeypatch.setattr(platform, "release", lambda: system)
    assert jetson.on_jetson() is there


@pytest.mark.parametrize(
    ("line", "versions"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1", ">=12.6,<13"),
        ("# R39 (release), REVISION: 2.1, GCID: 1", ">=13,<14"),
        ("# R99 (release), REVISION: 1.0, GCID: 1", ">=12.6,<13"),
        ("", ">=12.6,<13"),  # in a container
    ],
)
def test_cuda_python_fits_the_jetpack(tmp_path, line, versions):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text(line)
    assert jetson.get_cuda_python(tmp_path) == f"pip install 'cuda-python{versions}'"


@pytest.mark.parametrize("form", ["< POWER_MODEL ID=2 NAME=MAXN >", "  <POWER_MODEL ID=2 NAME=MAXN>"])
def test_the_power_mode(tmp_path, form):
    for name, text in {"etc/nvpmodel.conf": f"# a comment\n{form}\n", "var/lib/nvpmodel/status": "pmode:0002"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert jetson.power_mode(tmp_path) == jetson.PowerMode(2, "MAXN", 2)
