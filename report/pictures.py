"""The wall of validation pictures: looked for in the data source again, made small, put into the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ..artefacts.run_record import PICTURE_KINDS, PICTURES_EACH, ExamplePicture, Metrics
from ..data import Dataset, held_out_early, load_dataset
from ..errors import InputError
from ..images import RESIZE_RULES, Preprocessing, UnreadableImage
from ..splits import Split

SIDE = 144
"pixels of a picture in the page, unless it is too heavy"
WEIGHT = 400_000
"bytes of the page that all pictures may take"
TITLES = {
    "wrong": ("The surest mistakes", "at most two of one class and one answer"),
    "unsure": ("Right, and least sure", "the right answers with the smallest probability"),
    "drawn": ("Drawn at random", "from all the others, by the seed of the run"),
}
NOTE = (
    "Validation pictures, cut to squares. Below each what the student answered after the last task, with its "
    "probability; where that is wrong, what the picture shows, with the probability of that."
)


def pictures_section(metrics: Metrics, wanted: bool = True) -> dict[str, Any]:
    """{"note", "side", "groups": [{"title", "what", "pictures"}]}; without groups the note says why there are none."""
    nothing = {"side": SIDE, "groups": []}
    chosen = metrics.student.pictures
    if not wanted:
        return {**nothing, "note": "Left out, as asked for: --no-pictures."}
    if chosen is None:
        return {**nothing, "note": "Not shown: the version that trained this run kept no list of them."}
    try:
        dataset = _source(metrics)
    except InputError as error:
        reason = str(error).splitlines()[0]
        return {**nothing, "note": f"Not shown: the data source cannot be read here ({reason})."}
    shown, lost = [], 0
    for kind in PICTURE_KINDS:
        entries = []
        for picture in [p for p in chosen if p.kind == kind][:PICTURES_EACH]:
            entry = _entry(picture, metrics, dataset)
            lost += entry is None
            entries += [entry] if entry is not None else []
        if entries:
            title, what = TITLES[kind]
            shown.append({"title": title, "what": what, "pictures": entries})
    missing = f" {lost} of them {'is' if lost == 1 else 'are'} no longer in the data source." if lost else ""
    if not shown:
        return {**nothing, "note": "Not shown: none of them is in the data source any more."}
    return {"side": SIDE, "groups": shown, "note": NOTE + missing}


def _source(metrics: Metrics) -> Dataset:
    """The data source of a run, as it is now. Raises: InputError."""
    source = (metrics.data or {}).get("source")
    if not isinstance(source, str):
        raise InputError("the run does not say where it was")
    return load_dataset(source, learning=False, early=held_out_early(metrics.document))


def _entry(picture: ExamplePicture, metrics: Metrics, dataset: Dataset) -> dict[str, Any] | None:
    """What the page shows of one picture; None where the source has it no longer."""
    names = metrics.classes
    item = _find(picture, names[picture.true], dataset)
    if item is None:
        return None
    rule = metrics.config.get("resize_rule")
    square = Preprocessing(SIDE, SIDE, resize_rule=rule if rule in RESIZE_RULES else "cut")
    try:
        pixels = square.read(item)
    except UnreadableImage:
        return None
    return {
        "src": "data:image/jpeg;base64,"
        + base64.b64encode(small_jpeg(pixels, WEIGHT * 3 // 4 // (len(PICTURE_KINDS) * PICTURES_EACH))).decode(),
        "right": picture.true == picture.answer,
        "true": names[picture.true],
        "answer": names[picture.answer],
        "probability": _percent(picture.probability),
        "of_true": _percent(picture.probability_of_true),
    }


def _percent(share: float) -> str:
    """ "97 %", "0.3 %", with a space that does not break; never "100 %" for less."""
    value = 100 * share
    text = f"{value:.0f}" if 1 <= value < 99.5 or value == 100 else f"{value:.1f}" if value < 1 else "over 99"
    return f"{text}\N{NO-BREAK SPACE}%"


def _find(picture: ExamplePicture, name: str, dataset: Dataset) -> Any:
    """The image with that hash among the validation images of a class, a path or pixels; None where there is none.

    It is where it was, unless images were added or removed or cannot be read.
    """
    if name not in dataset.classes:
        return None
    split = dataset.val.of_classes([dataset.classes.index(name)])
    first = min(picture.place, max(0, len(split) - 1))
    for index in sorted(range(len(split)), key=lambda i: abs(i - first)):
        if _digest(split, index) == picture.sha256:
            return split.items[index]
    return None


def _digest(split: Split, index: int) -> str | None:
    try:
        return split.digest(index)
    except OSError:
        return None


def small_jpeg(pixels: np.ndarray, most: int) -> bytes:
    """A JPEG of uint8 (S, S, 3) pixels with at most so many bytes: first of lower quality, then smaller."""
    image, data = Image.fromarray(pixels), b""
    for side in (image.width, 96, 64, 32):
        for quality in (80, 60, 40):
            stream = io.BytesIO()
            image.resize((side, side)).save(stream, "JPEG", quality=quality, optimize=True)
            data = stream.getvalue()
            if len(data) <= most:
                return data
    return data
