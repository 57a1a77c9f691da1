"""The page: complete, self-contained, safe with hostile names, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.errors import InputError
from cdl_edge.report.model_page import write_report


@pytest.mark.slow
def test_full_page(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    save_bundle: Callable[..., Path],
    read_page: Callable[[Path], Any],
) -> None:
    run, bundle = save_run(tmp_path / "run", metrics), save_bundle(tmp_path / "bundle", metrics)
    out = write_report(tmp_path / "page" / "report.html", run, bundle, profile)
    page = read_page(out)
    assert page.sections == {"pictures", "accuracy", "latency", "export", "card"}
    for name in ("student", "teacher"):
        for row in metrics[name]["matrix"]:
            for value in row:
                assert value is None or f">{value:.1f}</td>" in page.html
    for expected in (
        "insects & more",
        "CODA-Prompt + KDP",
        "1 h 2 min",
        "2 MB",
        "3.1 × 10⁻⁶",
        "1.0 × 10⁻⁴",
        "98.44 %",
        "within tolerance",
        "1,234",
        "a flag of tomorrow",
        "A processor",
        "250 MB",
        "mean drop in points",
        "seed (7)",
        "task 2 with 79.9 %",
        "Apache-2.0",
        *(entry["sha256"] for entry in json.loads((bundle / "manifest.json").read_text())["files"].values()),
    ):
        assert expected in page.text, expected
    assert list(out.parent.iterdir()) == [out]
    again = out.read_bytes()
    assert write_report(out, run, bundle, profile).read_bytes() == again


def test_self_contained(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    read_page: Callable[[Path], Any],
) -> None:
    out = write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile=profile)
    page = read_page(out)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|url\(|@import|@font-face", page.html)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    targets = {a.get("id") for _, a in page.tags}
    assert all((a["href"] or "")[1:] in targets for tag, a in page.tags if tag == "a")


def test_charts_are_labelled(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    read_page: Callable[[Path], Any],
) -> None:
    page = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile=profile))
    charts = [a for tag, a in page.tags if tag == "svg"]
    assert len(charts) == 3
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert "Student, after task 3: 83.82 %" in page.text
    assert page.html.count('class="mark"') == 3
    assert "1 of 500 calls took longer" in page.text


def test_names_are_escaped(
    tmp_path: Path,
    metrics: dict[str, Any],
    save_run: Callable[..., Path],
    save_bundle: Callable[..., Path],
    read_page: Callable[[Path], Any],
    hostile: str,
) -> None:
    metrics["config"]["data"] = f"folder:/x/{hostile}"
    bundle = save_bundle(tmp_path / "bundle", metrics, name=hostile)
    page = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), bundle))
    assert "<script" not in page.html
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # title, heading, class, skipped image
    assert not any("onload" in attrs for _, attrs in page.tags)


@pytest.mark.slow
def test_only_a_page_of_ours_is_replaced(
    tmp_path: Path, metrics: dict[str, Any], save_run: Callable[..., Path]
) -> None:
    run, out = save_run(tmp_path / "run", metrics), tmp_path / "photo.jpg"
    out.write_bytes(b"years of work")
    with pytest.raises(InputError, match="is there already, and is not just a report of ours"):
        write_report(out, run)
    assert out.read_bytes() == b"years of work"
    page = write_report(tmp_path / "r.html", run)
    first = page.read_bytes()
    assert write_report(page, run).read_bytes() == first


def test_lone_surrogates_of_file_names_are_replaced(
    tmp_path: Path, metrics: dict[str, Any], save_run: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    metrics["classes"][0] = "b\udcffe"
    assert "b?e" in read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))).text


@pytest.mark.slow
def test_failed_write_leaves_the_old_page(
    tmp_path: Path, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch, save_run: Callable[..., Path]
) -> None:
    out = tmp_path / "page" / "r.html"
    write_report(out, save_run(tmp_path / "run", metrics))
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space"):
        write_report(out, tmp_path / "run")
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == before


def test_a_wide_table_becomes_paragraphs_on_a_phone(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    save_bundle: Callable[..., Path],
) -> None:
    run, bundle = save_run(tmp_path / "run", metrics), save_bundle(tmp_path / "bundle", metrics)
    html = write_report(tmp_path / "r.html", run, bundle, profile).read_text()
    tables = re.findall(r"<table(?: class=\"([^\"]*)\")?[^>]*>(.*?)</table>", html, re.DOTALL)
    assert len(tables) >= 8
    for kind, text in tables:
        columns = text.partition("</thead>")[0].count("<th ")
        narrow = columns <= 4 and 'class="mono"' not in text
        assert narrow or set(kind.split()) & {"stack", "heat", "confusion"}, text[:300]
        if "stack" in kind:  # its head is hidden there: values say what they are
            assert "data-label" in text, text[:300]
