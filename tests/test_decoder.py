"""What is opened, what it may cost, and how every depth becomes 8 bits."""

import builtins
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.EpsImagePlugin
import pytest
from PIL import Image, features

import cdl_edge
import cdl_edge.decoder as module
from cdl_edge.decoder import EXTENSIONS, Picture, UnreadableImage, full_scale
from cdl_edge.images import Preprocessing

MADE = Preprocessing(16, 20)
OLD = Preprocessing(16, 20, decoder=1)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width, height, rows=3):
    """An RGB PNG of any size, black, whose data end after some rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = zlib.compress(bytes((3 * width + 1) * min(rows, height)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refused(source, *words, made=MADE):
    with pytest.raises(UnreadableImage) as info:
        made.read(source)
    for word in words:
        assert word in str(info.value), str(info.value)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_ghostscript_is_never_started(monkeypatch):
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    eps = encoded(Image.new("RGB", (20, 20)), "EPS")
    for made in (MADE, OLD):
        refused(eps, "cannot identify image file", "JPEG, PNG", made=made)
    assert started == []


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "IM", "MSP", "SPIDER"])
def test_a_format_that_is_not_listed_is_refused(kind):
    image = Image.new("1", (32, 32)) if kind == "MSP" else Image.new("F" if kind == "SPIDER" else "RGB", (32, 32))
    refused(encoded(image, kind), "not a readable image")


def test_nothing_else_opens_pictures():
    root = Path(cdl_edge.__file__).parent
    rooms = ["*.py", *(f"{room}/**/*.py" for room in ("calibrate", "export", "report", "runtime", "sweep", "train"))]
    sources = [path for pattern in rooms for path in root.glob(pattern)]
    assert len(sources) > 80
    assert [p.name for p in sources if "Image.open(" in p.read_text()] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_listed_formats_are_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for made in (MADE, OLD):
        pixels = made.read(encoded(Image.new("RGB", (50, 40), (200, 100, 50)), kind))
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 12  # GIF's palette


def test_extensions_of_all_that_is_read():
    assert {".jfif", ".heic", ".avif", ".jpe", ".jp2", ".jpg"} <= EXTENSIONS


def test_files_of_a_folder_do_not_vanish(image_folder, tmp_path):
    from cdl_edge.data import load_dataset

    root = image_folder(tmp_path, train={"cat": 2}, val={"cat": 1})
    content = encoded(Image.new("RGB", (9, 9)), "JPEG")
    for suffix in (".jfif", ".JPE", ".jp2", ".avif", ".heic"):
        (root / "train" / "cat" / f"more{suffix}").write_bytes(content)
    assert len(load_dataset(f"folder:{root}").train) == 7


def test_heic_without_its_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def none(name, *rest, **named):
        if name == "pillow_heif":
            raise ImportError("No module named 'pillow_heif'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", none)
    refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "cdl-edge[heic]", "HEIC")


def test_heic_is_read_and_registers_nothing():
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 64), (200, 100, 50))).save(stream)
    for made in (MADE, OLD):
        assert np.abs(made.read(stream.getvalue()).astype(int) - (200, 100, 50)).max() <= 6
    assert "HEIF" not in Image.OPEN
    refused(stream.getvalue()[:300], "not a readable image")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_an_unreadable_image():
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "AVIF")
    for made in (MADE, OLD):
        for start in (300, len(whole) // 2):
            refused(whole[:start] + bytes(40) + whole[start + 40 : -60], "not a readable image", made=made)


def test_a_decoder_that_fails_in_any_way_is_an_unreadable_image(monkeypatch):
    def load(self):
        raise RuntimeError("Failed to decode")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for made in (MADE, OLD):
        refused(encoded(Image.new("RGB", (30, 30))), "Failed to decode", made=made)


def test_files_are_closed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(30, 30, 30))
    with Picture(path) as picture:
        stream = picture._stream
        picture.load()
    assert stream.closed


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60_000, 60_000), (40_000_000, 1), (1, 40_000_000), (3_000_000, 1)])
def test_what_needs_too_much_memory_is_refused_by_its_header(size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    for made in (MADE, OLD):
        refused(png(*size, rows=0), "too large", f"{size[0]} x {size[1]} pixels", made=made)


@pytest.mark.parametrize(("width", "height"), [(60_000, 1), (200_000, 1), (1, 60_000), (60_000, 3)])
def test_a_thin_picture_is_cut_before_it_is_scaled(width, height, monkeypatch):
    asked = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a: asked.append((self.size, a[0])) or real(self, *a))
    assert MADE.read(png(width, height, height)).shape == (16, 16, 3)
    assert max(s for pair in asked for size in pair for s in size) <= 16
    asked.clear()
    refused(png(width, height, height), "too long and thin", made=OLD)
    assert asked == []


@pytest.mark.parametrize("size", [(12_032, 9_024), (16_320, 12_240)])
def test_a_large_jpeg_needs_little_memory(size, monkeypatch, recwarn):
    # 108 and 200 megapixels: only the header is a JPEG of that size here.
    small = bytearray(encoded(Image.new("RGB", (64, 48)), "JPEG"))
    at = small.index(b"\xff\xc0") + 5
    small[at : at + 4] = struct.pack(">HH", size[1], size[0])
    needs = []
    real = Picture._need
    monkeypatch.setattr(Picture, "_need", lambda self: needs.append(real(self)) or needs[-1])
    assert MADE.read(bytes(small)).shape == (16, 16, 3)
    assert needs[0] < 20e6
    assert not recwarn.list
    refused(bytes(small), "too large", "pixels of JPEG", made=OLD)


@pytest.mark.parametrize("kind", ["progressive", "in parts"])
def test_coefficients_of_several_scans_count(kind):
    whole = bytearray(encoded(Image.new("RGB", (64, 48)), "JPEG", progressive=kind == "progressive"))
    at = whole.index(b"\xff\xc2" if kind == "progressive" else b"\xff\xc0") + 5
    whole[at : at + 4] = struct.pack(">HH", 20_000, 30_000)  # 4:2:0: 3 bytes a pixel between the scans
    if kind == "in parts":
        scan = whole.index(b"\xff\xda")
        whole[scan : scan + 14] = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    refused(bytes(whole), "too large", "30000 x 20000")


def test_a_jpeg_of_endless_scans_is_refused():
    whole = encoded(Image.new("RGB", (64, 48)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    refused(whole[:-2] + whole[last:-2] * 100 + whole[-2:], "too many scans")


@pytest.mark.parametrize("tag", [{322: 60_000, 323: 60_000}, {278: 60_000, 256: 50_000, 257: 50_000}])
def test_a_tiff_that_lies_is_refused(tag):
    picture = encoded(Image.new("RGB", (10, 10)), "TIFF", compression="tiff_deflate")
    order, count = "<", struct.unpack_from("<H", picture, struct.unpack_from("<I", picture, 4)[0])[0]
    start = struct.unpack_from("<I", picture, 4)[0] + 2
    entries = {}
    for i in range(count):
        key, kind, number, value = struct.unpack_from(f"{order}HHI4s", picture, start + 12 * i)
        entries[key] = (kind, number, value)
    entries |= {key: (4, 1, struct.pack("<I", value)) for key, value in tag.items()}
    if 322 in tag:  # tiles in the place of strips
        for new, old in ((324, 273), (325, 279)):
            entries[new] = entries.pop(old)
        entries.pop(278, None)
    directory = struct.pack("<H", len(entries))
    for key in sorted(entries):
        directory += struct.pack("<HHI4s", key, *entries[key])
    moved = picture + b"\0" * (len(picture) % 2)
    liar = moved[:4] + struct.pack("<I", len(moved)) + moved[8:] + directory + bytes(4)
    refused(liar, "too large", "TIFF")


def test_an_animation_of_many_frames_costs_its_first(monkeypatch):
    frame = encoded(Image.new("P", (40, 30), 1), "GIF")
    start = frame.index(b"\x2c\0\0\0\0", 13)
    film = frame[:start] + frame[start:-1] * 30_000 + b";"
    seeks = []
    real = PIL.GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        PIL.GifImagePlugin.GifImageFile, "_seek", lambda self, *a, **k: seeks.append(a) or real(self, *a, **k)
    )
    assert MADE.read(film).shape == (16, 16, 3)
    assert len(seeks) <= 1


# -- depth ------------------------------------------------------------------------------------------------------------


def values_of(made, array, kind="TIFF"):
    """The centre row of a picture whose rows are all `array`, which has as many values as the input has columns."""
    image = Image.fromarray(np.repeat(np.asarray(array)[None], len(array), 0))
    return made.read(encoded(image, kind))[0, :, 0].tolist()


EXACT = Preprocessing(8, 8)
STEPS = np.array([0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1])
GREY = (STEPS * 255 + 0.5).astype(int).tolist()


@pytest.mark.parametrize(
    ("white", "kind"),
    [
        (1.0, np.float32),
        (255, np.float32),
        (65535, np.float32),
        (4095, np.uint16),
        (16383, np.uint16),
        (65535, np.uint16),
        (2**24 - 1, np.int32),
        (2**30 - 1, np.int32),
    ],
)
def test_every_depth_has_a_scale(white, kind):
    got = np.array(values_of(EXACT, (STEPS * white).astype(kind)))
    assert np.abs(got - GREY).max() <= 1


def test_unsigned_32_bits():
    values = (STEPS * (2**32 - 1)).astype(np.uint32)
    signed = encoded(Image.fromarray(np.repeat(values[None].view(np.int32), 8, 0)), "TIFF")
    entry = struct.pack("<HHI", 339, 3, 1)  # SampleFormat
    assert entry + b"\2" in signed
    picture = signed.replace(entry + b"\2", entry + b"\1")
    assert np.abs(EXACT.read(picture)[0, :, 0].astype(int) - GREY).max() <= 1


def test_12_bits_in_a_png_of_16():
    assert np.abs(np.array(values_of(EXACT, (STEPS * 4095).astype(np.uint16), "PNG")) - GREY).max() <= 1
    old = Preprocessing(8, 8, decoder=1)  # as it was learnt: nearly black
    assert max(values_of(old, (STEPS * 4095).astype(np.uint16), "PNG")) == 16


@pytest.mark.parametrize("bad", [-0.5, np.nan, np.inf, 1.5])
def test_greyscale_without_a_scale_is_refused(bad):
    values = np.linspace(0, 1, 8, dtype=np.float32)
    values[3] = bad
    for made in (EXACT, Preprocessing(8, 8, decoder=1)):
        refused(encoded(Image.fromarray(np.repeat(values[None], 8, 0)), "TIFF"), "without a known scale", made=made)


def test_colours_of_12_bits_in_16_are_refused():
    # Pillow drops the lower eight bits of such colours: what is left is nearly black.
    def picture(factor):
        rows = b"".join(b"\0" + (np.arange(24) * factor).astype(">u2").tobytes() for _ in range(8))

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    refused(picture(170), "12 bits or fewer in 16")
    assert EXACT.read(picture(2700)).max() > 200


@pytest.mark.parametrize(
    ("brightest", "floats", "white"),
    [
        (0, False, 255),
        (255, False, 255),
        (256, False, 1023),
        (4095, False, 4095),
        (65535, False, 65535),
        (65536, False, 2**18 - 1),
        (2**32 - 1, False, 2**32 - 1),
        (2**32, False, None),
        (1.0, True, 1),
        (1.01, True, None),
        (254.5, True, 255),
        (65534.9, True, 65535),
        (1e30, True, None),
    ],
)
def test_full_scale(brightest, floats, white):
    assert full_scale(brightest, floats) == white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1"])
def test_bands_join_without_a_seam(mode, monkeypatch):
    image = Image.linear_gradient("L").resize((60, 90)).rotate(20).convert(mode)
    with Picture(encoded(image, "TIFF" if mode == "CMYK" else "PNG")) as picture:
        picture.load()
        whole = picture.rgb((3, 2, 55, 89), (2, 3))
        monkeypatch.setattr(module, "_BAND_PIXELS", 1)
        parts = picture.rgb((3, 2, 55, 89), (2, 3))
    assert parts.size == (26, 29)
    assert np.array_equal(whole, parts)
