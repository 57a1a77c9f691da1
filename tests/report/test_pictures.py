"""The wall of validation pictures: which are shown, how heavy they are, and what is said where there are none."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cdl_edge.artefacts.run_record import PICTURE_KINDS, PICTURES_EACH, Metrics
from cdl_edge.errors import InputError
from cdl_edge.report.model_page import write_report
from cdl_edge.report.pictures import WEIGHT, _percent, pictures_section, small_jpeg


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def entry(kind: str, true: int, answer: int, place: int, path: Path) -> dict[str, Any]:
    share = 0.97 if true == answer else 0.025
    return {
        "kind": kind,
        "true": true,
        "answer": answer,
        "probability": 0.97,
        "probability_of_true": share,
        "place": place,
        "sha256": digest(path),
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of three validation pictures each, one colour a picture; the training part is there too."""
    root = tmp_path / "photos"
    for part in ("train", "val"):
        for c, name in enumerate(("bee", "wasp")):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                colour = (80 * c + 40, 80 * i + 20, 200 if part == "val" else 0)
                Image.new("RGB", (60, 40), colour).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def shown(metrics: dict[str, Any], photos: Path) -> dict[str, Any]:
    """A run that was trained on them, and has chosen three."""
    metrics["data"] = {"given": f"folder:{photos}", "source": f"folder:{photos}"}
    metrics["student"]["pictures"] = [
        entry("wrong", 0, 1, 2, photos / "val" / "bee" / "2.png"),
        entry("unsure", 1, 1, 0, photos / "val" / "wasp" / "0.png"),
        entry("drawn", 1, 1, 1, photos / "val" / "wasp" / "1.png"),
    ]
    return metrics


def wall_of(metrics: dict[str, Any]) -> dict[str, Any]:
    return pictures_section(Metrics.of(metrics, "metrics.json"))


def colour(src: str) -> tuple[int, ...]:
    pixels = Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))
    return tuple(int(v) for v in np.asarray(pixels).reshape(-1, 3).mean(axis=0).round())


def test_pictures_are_in_the_page_with_their_probabilities(
    tmp_path: Path, shown: dict[str, Any], save_run: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    run = save_run(tmp_path / "run", shown)
    page = read_page(write_report(tmp_path / "r.html", run))
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 3 and all(str(a["src"]).startswith("data:image/jpeg;base64,") for a in images)
    assert "wasp 97\N{NO-BREAK SPACE}%" in page.html.replace("<b>", "").replace("</b>", "")
    assert "wrong, shows bee: 2\N{NO-BREAK SPACE}%" in page.html
    for found, expected in zip(images, ((40, 180, 200), (120, 20, 200), (120, 100, 200)), strict=True):
        assert np.abs(np.subtract(colour(str(found["src"])), expected)).max() <= 3
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    order = ["surest mistakes", "least sure", "Drawn at random", "Accuracy, task by task"]
    assert [page.text.index(text) for text in order] == sorted(page.text.index(text) for text in order)
    # For privacy: not one picture.
    page = read_page(write_report(tmp_path / "r.html", run, pictures=False))
    assert "img" not in {tag for tag, _ in page.tags} and "data:image" not in page.html
    assert "--no-pictures" in page.text


def test_a_picture_that_moved_is_found_by_its_hash(shown: dict[str, Any], photos: Path) -> None:
    before = wall_of(shown)
    for name in ("0a.png", "00.png"):  # both stand before the one that was chosen
        Image.new("RGB", (60, 40), (1, 2, 3)).save(photos / "val" / "bee" / name)
    after = wall_of(shown)
    assert after["groups"][0]["pictures"][0]["src"] == before["groups"][0]["pictures"][0]["src"]


def test_a_picture_that_is_gone_or_another_is_not_shown(shown: dict[str, Any], photos: Path) -> None:
    Image.new("RGB", (60, 40), (1, 2, 3)).save(photos / "val" / "bee" / "2.png")
    (photos / "val" / "wasp" / "0.png").unlink()
    wall = wall_of(shown)
    assert [g["title"] for g in wall["groups"]] == ["Drawn at random"]
    assert "2 of them are no longer in the data source" in wall["note"]


def test_one_line_says_why_there_is_none(shown: dict[str, Any], photos: Path) -> None:
    elsewhere = photos.rename(photos.with_name("elsewhere"))
    wall = wall_of(shown)
    assert wall["groups"] == [] and "no such folder" in wall["note"] and "\n" not in wall["note"]
    shown["data"]["source"] = f"folder:{elsewhere}"
    assert len(wall_of(shown)["groups"]) == 3
    shown["classes"][:2] = ["gnat", "louse"]
    assert wall_of(shown)["groups"] == [] and "any more" in wall_of(shown)["note"]
    del shown["student"]["pictures"]
    assert "kept no list" in wall_of(shown)["note"]


def test_a_page_has_a_bounded_weight() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (144, 144, 3), dtype=np.uint8)
    count = len(PICTURE_KINDS) * PICTURES_EACH
    most = WEIGHT * 3 // 4 // count
    data = small_jpeg(noise, most)
    assert count * len(base64.b64encode(data)) <= WEIGHT and Image.open(io.BytesIO(data)).width >= 32
    flat = small_jpeg(np.full((144, 144, 3), 90, np.uint8), most)
    assert Image.open(io.BytesIO(flat)).size == (144, 144)


def test_a_long_list_does_not_make_a_heavy_page(shown: dict[str, Any]) -> None:
    shown["student"]["pictures"] *= 20
    assert [len(g["pictures"]) for g in wall_of(shown)["groups"]] == [PICTURES_EACH] * 3


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100"), (0.9996, "over 99"), (0.972, "97"), (0.0149, "1"), (0.003, "0.3"), (0.0, "0.0")]
)
def test_percent(share: float, text: str) -> None:
    assert _percent(share) == f"{text}\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"true": 6}, r"student\.pictures\[0\]"),
        ({"answer": -1}, r"student\.pictures\[0\]"),
        ({"kind": "nice"}, r"student\.pictures\[0\]\.kind"),
        ({"probability": 1.5}, r"student\.pictures\[0\]\.probability"),
        ({"sha256": 3}, r"student\.pictures\[0\]\.sha256"),
    ],
)
def test_a_malformed_list_is_refused(shown: dict[str, Any], change: dict[str, Any], word: str) -> None:
    shown["student"]["pictures"][0].update(change)
    with pytest.raises(InputError, match=word):
        Metrics.of(shown, "metrics.json")
