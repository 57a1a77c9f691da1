"""From an image file to the uint8 pixels every room works on: one decoder for training, calibration and the device.

numpy and Pillow only, so that a board needs nothing else and sees the pixels that training saw.
"""

from __future__ import annotations

import io
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError, choose

# A larger picture is refused before it is decoded: 50 MP as RGB are 150 MB, too much for a 4 GB board beside a model.
MAX_PIXELS = 40_000_000
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class UnreadableImage(InputError):
    """A file that cannot be decoded into RGB pixels."""


def open_rgb(source: Path | str | bytes) -> Image.Image:
    """Decode a file (or its bytes) into an upright RGB image.

    Defined results: EXIF rotation is applied; greyscale, palette and CMYK become RGB; 16-bit greyscale is scaled to
    8 bits; transparency is laid over white; of an animation the first frame is taken.

    Raises: UnreadableImage for a missing, empty, truncated, non-image or over-large file (MAX_PIXELS).
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image: Image.Image = Image.open(file)
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(
                f"{name}: the image is too large",
                got=f"{image.width} x {image.height} pixels",
                expected=f"at most {MAX_PIXELS // 1_000_000} megapixels",
                fix="scale it down first",
            )
        image.seek(0)
        image.load()
        image = ImageOps.exif_transpose(image) or image  # first: what follows makes a new image without metadata
        # Like ToTensor conventions elsewhere: only 16-bit greyscale needs a scale of its own, PIL clips it otherwise.
        if image.mode.startswith("I;16") or image.mode == "I":
            wide = np.asarray(image, dtype=np.float64)
            image = Image.fromarray(np.clip(wide / 257.0 + 0.5, 0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except UnreadableImage:
        raise
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        struct.error,
    ) as error:
        # Pillow reports broken files with all of these, depending on the decoder.
        text = str(error).replace(f" {file!r}", "") if isinstance(source, bytes) else str(error)  # an address in memory
        reason = text.splitlines()[0] if text else type(error).__name__
        raise UnreadableImage(
            f"{name}: not a readable image",
            got=reason,
            expected="JPEG, PNG, WebP, BMP, TIFF, GIF or PNM",
            fix="check the file",
        ) from error


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input of a backbone; travels with weights, runs and bundles."""

    size: int
    "side of the square input in pixels"
    resize: int
    "the shorter side is first scaled to this many pixels, then a centred square of `size` is cut"
    interpolation: str = "bicubic"
    "nearest, bilinear or bicubic (Pillow's, with antialiasing)"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    "per RGB channel, of pixels in [0, 1]; (0, 0, 0) with std (1, 1, 1) feeds raw [0, 1]"
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    "per RGB channel, of pixels in [0, 1]"

    def __post_init__(self) -> None:
        choose("interpolation", self.interpolation, _RESAMPLING)
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
        """As plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_json`; an unknown or missing key is an InputError."""
        try:
            mean, std = (tuple(float(v) for v in fields[k]) for k in ("mean", "std"))
            return cls(**{**fields, "mean": mean, "std": std})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "preprocessing is not understood", got=repr(fields), expected="size, resize, interpolation, mean, std"
            ) from error

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Scale and cut an RGB image: uint8 (size, size, 3)."""
        width, height = image.size
        scale = self.resize / min(width, height)
        if scale != 1.0:
            target = (max(self.size, round(width * scale)), max(self.size, round(height * scale)))
            image = image.resize(target, _RESAMPLING[self.interpolation])
            width, height = image.size
        if (width, height) != (self.size, self.size):
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image, dtype=np.uint8)

    def read(self, source: Path | str | bytes) -> np.ndarray:
        """`open_rgb`, then `pixels`: uint8 (size, size, 3)."""
        return self.pixels(open_rgb(source))
