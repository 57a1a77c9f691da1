"""Open picture files safely: listed formats only, memory bounded before anything is decoded, any depth to 8-bit RGB.

numpy and Pillow only; HEIC needs the extra `heic`.
"""

from __future__ import annotations

import importlib
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import InputError

MAX_BYTES = 512 << 20
"""Memory that decoding one picture may need; a picture that needs more is refused by its header. 512 MiB hold any JPEG
that is decoded at a smaller scale, 48 megapixels of HEIC, 130 of PNG, and still fit a 4 GB board beside a model."""
MAX_SIDE = 1_000_000
"pixels of a side; decoders hold whole rows, and Pillow a pointer to each"
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm"}
    | {".jp2", ".avif", ".heic", ".heif"}
)
"of files that are pictures, in lower case"
EXPECTED = "JPEG, PNG, WebP, BMP, TIFF, GIF, PNM, JPEG 2000, AVIF or HEIC"
_PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "GIF": "GifImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}
"""Pillow's name of each format that is opened, and its module. Not EPS: Pillow would start Ghostscript for it. Not
Image.open: it refuses by pixels, whatever the memory that is needed."""
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_OVERHEAD = {"WEBP": 12, "AVIF": 10, "HEIF": 8}
"bytes a pixel that a decoder needs beside the picture itself, measured with Pillow 13, November 2026"
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"bytes a pixel of a picture in Pillow's memory, by mode; 4 for all others"
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"modes of greyscale with more than 8 bits"
_MAX_SCANS = 64
"of a JPEG; encoders write about ten. Each goes over the whole picture, so a small file could keep a decoder for hours"
_BAND_PIXELS = 1 << 18
"converted at a time, so that conversions need no second whole picture"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"EXIF orientation -> what makes the picture upright"

Box = tuple[int, int, int, int]
"left, top, right, bottom, in pixels"


class UnreadableImage(InputError):
    """A file that cannot be decoded into RGB pixels."""


class Picture:
    """A picture file whose header has been read; `load` decodes it. To be used in a `with`.

    Defined results: greyscale, palette and CMYK become RGB; more than 8 bits are scaled to 8 (see `full_scale`);
    transparency is laid over white; of an animation the first frame is taken; colour profiles are not applied.

    Every method raises UnreadableImage for a missing, empty, truncated or damaged file, one of another format, and one
    that would need more than MAX_BYTES.
    """

    def __init__(self, source: Path | str | bytes) -> None:
        self.name = "the image" if isinstance(source, bytes) else str(source)
        self._shrunk = 1
        self._stream: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else self._opened(source)
        try:
            with self._reading():
                self._bytes = self._stream.seek(0, io.SEEK_END)
                self._image, self.format = self._identified()
                # Of what is decoded to 8 bits by dropping the lower half of 16.
                self._halved = any(";16" in str(tile[3]) for tile in getattr(self._image, "tile", []))
                self._full = self._image.size
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Picture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored, before `shrink`; final once the picture is loaded."""
        return self._full

    def shrink(self, scale: int) -> int:
        """Let a JPEG be decoded at 1 / scale of its size, scale being 1, 2, 4 or 8; every side is rounded up.

        Returns: the scale that holds: 1 for every other format.
        """
        if scale > 1 and self.format == "JPEG":
            with self._reading():
                width, height = self._full
                self._image.draft(None, (width // scale, height // scale))
                self._shrunk = scale if self._image.size != self._full else 1
        return self._shrunk

    def load(self, copies: int = 0) -> None:
        """Decode. copies: whole RGB copies that the caller is going to make, for the limit of memory."""
        with self._reading():
            need = self._need() + copies * 4 * math.prod(self._image.size)
            if need > MAX_BYTES or max(self._full) > MAX_SIDE:
                raise UnreadableImage(
                    f"{self.name}: the image is too large",
                    got=f"{self._full[0]} x {self._full[1]} pixels of {self.format}, {need / 1e6:,.0f} MB to decode",
                    expected=f"at most {MAX_BYTES / 1e6:,.0f} MB, and {MAX_SIDE:,} pixels a side",
                    fix="scale it down first, or save it as JPEG",
                )
            self._image.seek(0)
            self._image.load()
            if self._shrunk == 1:
                self._full = self._image.size  # older Pillow turns a TIFF while it loads
            self._turn = _TURNS.get(self._image.getexif().get(0x0112, 1))

    def upright(self, image: Image.Image) -> Image.Image:
        """Turn pixels of this picture as its EXIF orientation says."""
        return image if self._turn is None else image.transpose(self._turn)

    def rgb(self, box: Box | None = None, factor: tuple[int, int] = (1, 1), sixteen: bool = False) -> Image.Image:
        """The pixels in `box` as 8-bit RGB, each block of `factor` (across, down) averaged into one.

        box: in the loaded picture's pixels, None: all of them. sixteen: integers are taken as 16 bits, whatever their
        values (decoder rule 1). Memory: the result and a little.
        """
        with self._reading():
            image = self._image
            whole = (0, 0, *image.size)
            left, top, right, bottom = box = box or whole
            scale = self._scale(sixteen)
            if image.mode == "RGB" and "transparency" not in image.info:
                if factor != (1, 1):
                    return image.reduce(factor, box)
                return image if box == whole else image.crop(box)
            across, down = factor
            width = right - left
            rows = down * max(1, _BAND_PIXELS // (width * down))
            result = Image.new("RGB", (-(-width // across), -(-(bottom - top) // down)))
            for row in range(top, bottom, rows):
                band = _eight_bits(image.crop((left, row, right, min(row + rows, bottom))), scale)
                result.paste(band.reduce(factor), (0, (row - top) // down))
            return result

    # -- inside -------------------------------------------------------------------------------------------------------

    def _opened(self, path: Path | str) -> IO[bytes]:
        """The file, before anything is read of it."""
        try:
            return open(path, "rb")
        except FileNotFoundError as error:
            raise UnreadableImage(f"{self.name}: no such file", fix="check the path") from error
        except IsADirectoryError as error:
            raise UnreadableImage(f"{self.name}: a folder", expected="one picture") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            got = getattr(error, "strerror", None) or str(error)
            raise UnreadableImage(f"{self.name}: cannot be opened", got=got, fix="check the file") from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever a decoder raises in the block says that the picture is not readable."""
        try:
            yield
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow and its libraries report broken files with all kinds
            text = str(error)
            raise UnreadableImage(
                f"{self.name}: not a readable image",
                got=text.splitlines()[0] if text else type(error).__name__,
                expected=EXPECTED,
                fix="check the file",
            ) from error

    def _identified(self) -> tuple[Any, str]:
        """Pillow's image, and the name of its format."""
        stream = self._stream
        stream.seek(0)
        prefix = stream.read(16)
        reason = "cannot identify image file"
        for name, module in _PLUGINS.items():
            try:
                importlib.import_module(f"PIL.{module}")
            except ImportError:  # Pillow has AVIF from 11.3 on
                continue
            factory, accept = Image.OPEN[name]
            accepted = accept(prefix) if accept else True
            if isinstance(accepted, str):
                reason = accepted
            elif accepted:
                stream.seek(0)
                try:
                    return factory(stream, ""), name
                except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as Image.open: the next may know
                    reason = f"cannot identify image file: {error}" if str(error) else reason
        if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
            stream.seek(0)
            return self._heif(stream), "HEIF"
        if prefix[4:12] == b"ftypavif":
            reason = "AVIF, which this Pillow cannot read (pip install --upgrade pillow)"
        raise UnidentifiedImageError(reason)

    def _heif(self, stream: IO[bytes]) -> Any:
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            raise UnreadableImage(
                f"{self.name}: HEIC needs an extra",
                got=str(error),
                fix="pip install 'cdl-edge[heic]' (or pip install pillow-heif), or save the picture as JPEG",
            ) from error
        return HeifImageFile(stream, "")

    def _need(self) -> int:
        """Bytes that decoding takes at its peak, of what the header says."""
        width, height = self._image.size
        pixels, bands = width * height, len(self._image.getbands())
        need = pixels * (_STORED.get(self._image.mode, 4) + _OVERHEAD.get(self.format, 0))
        need += 8 * width + 16 * height  # two rows in the decoder, pointers to all rows
        if self.format == "JPEG":
            return need + self._coefficients()
        if self.format == "JPEG2000":
            need += pixels * (1 + 5 * bands)
        if self.format == "TIFF":
            need += _tile_bytes(self._image)
        return need + (0 if self.format in ("PNG", "BMP", "PPM", "GIF") else self._bytes)

    def _coefficients(self) -> int:
        """Bytes of the whole picture's coefficients, which libjpeg keeps, at any scale, between a JPEG's scans."""
        components = [(int(across), int(down)) for _, across, down, _ in self._image.layer]
        progressive = "progressive" in self._image.info
        if not progressive and _first_scan(self._stream) == len(components):
            return 0
        self._stream.seek(0)
        scans = self._stream.read().count(b"\xff\xda")
        if scans > _MAX_SCANS:
            raise UnreadableImage(
                f"{self.name}: the JPEG has too many scans", got=scans, expected=f"at most {_MAX_SCANS}"
            )
        densest = max(a for a, _ in components) * max(d for _, d in components)
        return 2 * math.prod(self._full) * sum(a * d for a, d in components) // densest

    def _scale(self, sixteen: bool) -> float | None:
        """What is white in greyscale of more than 8 bits; None for all other pictures."""
        image = self._image
        if image.mode not in _DEEP:
            if self._halved and not sixteen:
                brightest = max(high for _, high in image.getextrema()[:3])
                if 0 < brightest < 16:
                    raise UnreadableImage(
                        f"{self.name}: colours of 12 bits or fewer in 16",
                        got=f"no value above {brightest * 256 + 255} of 65535",
                        expected="values that use all 16 bits",
                        fix="multiply them (by 16 for 12 bits), or save the picture with 8 bits",
                    )
            return None
        unsigned = image.mode == "I" and self.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 1
        low, high = math.inf, -math.inf
        rows = max(1, _BAND_PIXELS // image.width)
        for row in range(0, image.height, rows):
            values = np.asarray(image.crop((0, row, image.width, min(row + rows, image.height))))
            if unsigned:
                values = values.view(np.uint32)
            if not np.isfinite(values).all():
                raise _no_scale(self.name, "values that are no numbers")
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        if low < 0:
            raise _no_scale(self.name, f"values down to {low:g}")
        if sixteen and image.mode != "F" and high <= 65535:
            return 65535.0
        white = full_scale(high, image.mode == "F")
        if white is None:
            raise _no_scale(self.name, f"values up to {high:g}")
        return white


def prepare() -> None:
    """Load the decoders of all formats now, and not with the first picture of each."""
    for module in (*(f"PIL.{name}" for name in _PLUGINS.values()), "pillow_heif"):
        with suppress(ImportError):
            importlib.import_module(module)


def full_scale(brightest: float, floats: bool) -> float | None:
    """What is white in a greyscale picture of more than 8 bits, of its brightest value; None where it cannot be told.

    1 for floats up to 1; otherwise the smallest 2^n - 1 that holds the brightest value, n even, from 8 to 32: 12 bits
    in 16 are 12 bits. Floats between 1 and 16 may be either.
    """
    if floats and brightest <= 1:
        return 1.0
    if (floats and brightest < 16) or brightest >= 1 << 32:
        return None
    bits = max(8, math.ceil(brightest).bit_length())
    return float((1 << (bits + bits % 2)) - 1)


def _no_scale(name: str, got: str) -> UnreadableImage:
    return UnreadableImage(
        f"{name}: greyscale without a known scale",
        got=got,
        expected="whole numbers from 0, or floats from 0 to 1 (or to 255, 1023, 4095, 16383, 65535 ...)",
        fix="save the picture with 8 bits a channel",
    )


def _eight_bits(band: Image.Image, white: float | None) -> Image.Image:
    """RGB of 8 bits, transparency over white. white: see `full_scale`, None for 8 bits."""
    if white is not None:
        values = np.asarray(band)
        if white >= 1 << 31:
            values = values.view(np.uint32) if values.dtype == np.int32 else values
        scaled = values.astype(np.float64) * (255.0 / white) + 0.5
        band = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    elif band.mode in ("RGBA", "LA", "PA") or "transparency" in band.info:
        rgba = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return band.convert("RGB")


def _first_scan(stream: IO[bytes]) -> int:
    """Colour components in the first scan of a JPEG; 0 where there is none."""
    stream.seek(2)
    while True:
        marker = stream.read(1)
        while marker == b"\xff":
            marker = stream.read(1)
        length = int.from_bytes(stream.read(2), "big")
        if len(marker) == 0 or length < 2:
            return 0
        if marker == b"\xda":
            return int.from_bytes(stream.read(1), "big")
        stream.seek(length - 2, io.SEEK_CUR)


def _tile_bytes(image: Any) -> int:
    """Bytes of the largest tile or strip of a TIFF: what the header says, which need not fit the picture."""
    tags, (width, height) = image.tag_v2, image.size
    bits = sum(tags.get(258, (1,))) if len(tags.get(258, (1,))) > 1 else tags.get(258, (1,))[0] * tags.get(277, 1)
    if 322 in tags:
        pixels = int(tags[322]) * int(tags.get(323, 1))
    else:
        pixels = width * min(height, int(tags.get(278, height)))
    return pixels * bits // 8
