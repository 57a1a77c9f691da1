"""Turn a picture into the uint8 pixels that every package works on: one decoder for training, calibration, device.

numpy and Pillow only, so that a board needs nothing else and sees the pixels that training saw.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decoder import EXTENSIONS, Picture, UnreadableImage
from .errors import InputError, choose

__all__ = ["DECODER", "EXTENSIONS", "RESIZE_RULES", "Preprocessing", "UnreadableImage", "open_rgb"]

DECODER = 2
"""Newest decoder rule. A bundle is decoded by the rule that it was trained with.

1: the whole picture is decoded and turned, then scaled, then cut. Integers of more than 8 bits are taken as 16.
2: a JPEG is decoded at the smallest of the scales 1/1, 1/2, 1/4, 1/8 that is still at least TWICE the target, on both
   sides; only what is kept is scaled: first by averaging blocks, down to at least twice the target, then by the filter;
   the result is turned.
"""
TWICE = 2
"how much larger than its target a picture still is when the filter takes over"
RESIZE_RULES = ("cut", "pad", "squash")
ORDERS = ("rgb", "bgr")
MAX_ASPECT = 100
"rule 1: a longer picture is refused, for it is scaled before it is cut"
GREY = (128, 128, 128)
"what `pad` puts beside a picture"
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

Region = tuple[float, float, float, float]
"left, top, right, bottom, in pixels"


def open_rgb(source: Path | str | bytes) -> Image.Image:
    """Decode a file (or its bytes) by rule 1 into a whole, upright RGB image.

    Raises: UnreadableImage, see `decoder.Picture`.
    """
    with Picture(source) as picture:
        picture.load(copies=1)
        return picture.upright(picture.rgb(sixteen=True))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input of a backbone; travels with weights, runs and bundles."""

    size: int
    "side of the square input in pixels"
    resize: int
    "cut: the shorter side is first scaled to this many pixels, then a centred square of `size` is cut"
    interpolation: str = "bicubic"
    "nearest, bilinear or bicubic (Pillow's, with antialiasing)"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    "per RGB channel, of pixels in [0, 1]; (0, 0, 0) with std (1, 1, 1) feeds raw [0, 1]"
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    "per RGB channel, of pixels in [0, 1]"
    resize_rule: str = "cut"
    """cut: see `resize`, what lies outside of the square is lost; pad: the longer side is scaled to `size`, the rest of
    the square is grey; squash: both sides are scaled to `size`, the shape is lost"""
    decoder: int = DECODER
    "rule of decoding, see DECODER; 1 where nothing is said: what was made before there was another"

    def __post_init__(self) -> None:
        choose("interpolation", self.interpolation, _RESAMPLING)
        choose("resize rule", self.resize_rule, RESIZE_RULES)
        check_decoder(self.decoder)
        if self.size < 1 or self.resize < self.size:
            raise InputError(
                "preprocessing sizes do not fit",
                got=f"size {self.size}, resize {self.resize}",
                expected="1 <= size <= resize",
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                "mean and std do not fit",
                got=f"mean {self.mean}, std {self.std}",
                expected="three numbers each, std above 0",
            )

    def to_json(self) -> dict[str, Any]:
        """The rule as plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`; an unknown or missing key is an InputError. Without "decoder" it is rule 1."""
        try:
            mean, std = (tuple(float(v) for v in fields[k]) for k in ("mean", "std"))
            return cls(**{"decoder": 1, **fields, "mean": mean, "std": std})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "preprocessing is not understood",
                got=repr(fields),
                expected="size, resize, interpolation, mean, std, resize_rule, decoder",
            ) from error

    def read(self, source: Path | str | bytes | np.ndarray) -> np.ndarray:
        """A picture file, its bytes, or the pixels of a frame: uint8 (size, size, 3).

        Raises: UnreadableImage for a file that cannot be decoded, InputError for an array that is no RGB frame.
        """
        if isinstance(source, np.ndarray):
            return self.frame(source)
        if self.decoder == 1:
            return self._scaled_whole(open_rgb(source), "the image" if isinstance(source, bytes) else str(source))
        with Picture(source) as picture:
            scale = picture.shrink(self._jpeg_scale(*picture.size))
            picture.load()
            region, target = self._geometry(*picture.size)
            box, factor, inside = _steps(region, target, scale)
            return self._square(picture.upright(self._filtered(picture.rgb(box, factor), target, inside)))

    def frame(self, pixels: np.ndarray, order: str = "rgb") -> np.ndarray:
        """A camera's frame, uint8 (H, W, 3) of any size, to uint8 (size, size, 3): as a lossless file of it would give.

        order: of the channels, rgb or bgr (OpenCV's). Raises: InputError for another array.
        """
        choose("order of channels", order, ORDERS)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise InputError(
                "this array is no frame",
                got=f"{pixels.dtype} {pixels.shape}",
                expected="uint8 (height, width, 3)",
            )
        height, width = pixels.shape[:2]
        if self.decoder == 1:
            return self._scaled_whole(_image_of(pixels, (0, 0, width, height), order), "the frame")
        region, target = self._geometry(width, height)
        box, factor, inside = _steps(region, target, 1)
        image = _image_of(pixels, box, order)
        return self._square(self._filtered(image if factor == (1, 1) else image.reduce(factor), target, inside))

    def _geometry(self, width: int, height: int) -> tuple[Region, tuple[int, int]]:
        """What of a picture is kept, and the (width, height) that it is scaled to."""
        size = self.size
        if self.resize_rule == "squash":
            return (0, 0, width, height), (size, size)
        if self.resize_rule == "pad":
            longer = max(width, height)
            return (0, 0, width, height), (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
        side = min(width, height) * size / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        if side == size:  # nothing is scaled: whole pixels are cut
            left, top = left // 1, top // 1
        return (left, top, left + side, top + side), (size, size)

    def _jpeg_scale(self, width: int, height: int) -> int:
        (left, top, right, bottom), target = self._geometry(width, height)
        spare = min((right - left) / target[0], (bottom - top) / target[1]) / TWICE
        return max((s for s in (2, 4, 8) if s <= spare), default=1)

    def _filtered(self, image: Image.Image, target: tuple[int, int], inside: Region) -> Image.Image:
        # Across first, then down, each rounded to 8 bits: Pillow has done it so up to 12, from 13 on a tall picture is
        # scaled the other way round. What was trained with one version is to be seen the same by the other.
        filtered, (left, top, right, bottom) = _RESAMPLING[self.interpolation], inside
        image = image.resize((target[0], image.height), filtered, (left, 0, right, image.height))
        return image.resize(target, filtered, (0, top, target[0], bottom))

    def _square(self, image: Image.Image) -> np.ndarray:
        """uint8 (size, size, 3): an upright image in the middle of grey."""
        size = self.size
        if image.size == (size, size):
            return np.asarray(image)
        square = Image.new("RGB", (size, size), GREY)
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return np.asarray(square)

    def _scaled_whole(self, image: Image.Image, name: str) -> np.ndarray:
        """Rule 1: scale an upright RGB image, then cut."""
        size, (width, height) = self.size, image.size
        if self.resize_rule != "cut":
            region, target = self._geometry(width, height)
            return self._square(self._filtered(image, target, region))
        scale = self.resize / min(width, height)
        if scale != 1.0:
            target = (max(size, round(width * scale)), max(size, round(height * scale)))
            if max(target) > MAX_ASPECT * min(target):
                raise UnreadableImage(
                    f"{name}: the image is too long and thin to be scaled as a whole",
                    got=f"{width} x {height} pixels",
                    expected=f"at most {MAX_ASPECT} times as long as it is wide",
                    fix="cut it, or train again: newer bundles cut first",
                )
            image = self._filtered(image, target, (0, 0, width, height))
            width, height = image.size
        if (width, height) != (size, size):
            left, top = (width - size) // 2, (height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        return np.asarray(image, dtype=np.uint8)


def check_decoder(rule: object) -> None:
    """Raises: InputError unless `rule` is a decoder rule that this version knows."""
    if not isinstance(rule, int) or isinstance(rule, bool) or not 1 <= rule <= DECODER:
        raise InputError(
            "this decoder rule is not known", got=repr(rule), expected=f"1 to {DECODER}", fix="upgrade cdl-edge"
        )


def _steps(
    region: Region, target: tuple[int, int], scale: int
) -> tuple[tuple[int, int, int, int], tuple[int, int], Region]:
    """How a region is scaled to its target in a picture that was decoded at 1 / scale.

    Returns: whole pixels that hold the region; how many of them (across, down) are averaged into one; the region in
    what comes out of that.
    """
    left, top, right, bottom = (round(v / scale, 6) for v in region)  # a side is never a hair above its picture's
    box = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    across = max(1, int((right - left) / (TWICE * target[0])))
    down = max(1, int((bottom - top) / (TWICE * target[1])))
    inside = ((left - box[0]) / across, (top - box[1]) / down, (right - box[0]) / across, (bottom - box[1]) / down)
    return box, (across, down), inside


def _image_of(pixels: np.ndarray, box: tuple[int, int, int, int], order: str) -> Image.Image:
    """The pixels in a box of a frame, copied once."""
    left, top, right, bottom = box
    whole = np.ascontiguousarray(pixels)
    start, row = 3 * (top * whole.shape[1] + left), 3 * whole.shape[1]
    data = whole.reshape(-1)[start:]
    return Image.frombuffer("RGB", (right - left, bottom - top), data, "raw", order.upper(), row, 1)
