"""Every kind of picture has one defined result, every broken file one kind of error."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cdl_edge.decoder import Picture
from cdl_edge.errors import InputError
from cdl_edge.images import Preprocessing, UnreadableImage, open_rgb


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(height=4, width=6, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(orientation):
    pixels = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_rgb(encoded(Image.fromarray(pixels), exif=exif))
    assert np.array_equal(np.asarray(image), UPRIGHT[orientation](pixels))


def test_exif_rotation_of_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif)).size == (10, 30)


def test_exif_rotation_of_16_bit_greyscale():
    grey = noise(channels=1).astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_rgb(encoded(Image.fromarray(grey), exif=exif))
    assert np.array_equal(np.asarray(image)[..., 0], UPRIGHT[6](grey) // 257)


def test_greyscale_becomes_three_equal_channels():
    grey = noise(channels=1)
    assert np.array_equal(np.asarray(open_rgb(encoded(Image.fromarray(grey)))), np.repeat(grey[..., None], 3, 2))


def test_one_bit_becomes_black_and_white():
    image = open_rgb(encoded(Image.fromarray(np.array([[True, False]]))))
    assert np.asarray(image).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_scaled_not_clipped(kind):
    wide = np.array([[0, 257 * 100, 257 * 100 + 129, 32768, 65535]], dtype=np.uint16)
    image = open_rgb(encoded(Image.fromarray(wide), kind))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 101, 128, 255]


def test_cmyk_becomes_rgb():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    image = open_rgb(encoded(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]


def test_cmyk_jpeg_is_not_inverted():
    image = open_rgb(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))
    assert np.abs(np.asarray(image).astype(int) - [0, 255, 255]).max() <= 4


def test_transparency_is_laid_over_white():
    pixels = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    row = np.asarray(open_rgb(encoded(Image.fromarray(pixels))))[0]
    assert row[:2].tolist() == [[9, 8, 7], [255, 255, 255]]
    assert np.abs(row[2].astype(int) - 127).max() <= 1


def test_grey_with_alpha_is_laid_over_white():
    row = np.asarray(open_rgb(encoded(Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA"))))[0]
    assert row.tolist() == [[10] * 3, [255] * 3]


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    assert np.asarray(open_rgb(encoded(image)))[0].tolist() == [[200, 0, 0], [0, 0, 200]]
    assert np.asarray(open_rgb(encoded(image, transparency=0)))[0].tolist() == [[255, 255, 255], [0, 0, 200]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    red, blue = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (5, 4), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_rgb(encoded(red, kind, save_all=True, append_images=[blue], duration=50, **options))
    assert image.size == (5, 4)
    assert np.asarray(image)[1, 1].tolist() == [255, 0, 0]


def test_a_path_and_its_bytes_give_the_same_pixels(tmp_path, photo):
    path = photo(tmp_path / "a.jpg", 1, (31, 17))
    one, two, three = open_rgb(path), open_rgb(str(path)), open_rgb(path.read_bytes())
    assert np.array_equal(one, two) and np.array_equal(one, three)


def refused(source, *words):
    with pytest.raises(UnreadableImage) as info:
        Preprocessing(16, 20).read(source)
    text = str(info.value)
    with pytest.raises(UnreadableImage):
        open_rgb(source)
    for word in words:
        assert word in text, text
    return text


def test_a_truncated_jpeg_is_refused_by_name(tmp_path, photo):
    path = photo(tmp_path / "half.jpg", 1, (200, 200))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "half.jpg", "truncated")


def test_files_that_are_no_image(tmp_path):
    (tmp_path / "text.jpg").write_text("this is a letter to my aunt\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "empty.png"):
        refused(tmp_path / name, name, "not a readable image")
    refused(tmp_path / "missing.png", "missing.png: no such file")
    refused(tmp_path, "a folder", "one picture")
    assert "Errno" not in refused(tmp_path / "a\0b.png", "cannot be opened") + refused(tmp_path / "missing.png")
    for content in (b"", b"\xff\xd8\xff\xe0", b"this is a letter to my aunt"):
        text = refused(content, "the image: not a readable image", "cannot identify image file")
        assert "BytesIO" not in text and "0x" not in text


def test_an_unreadable_image_is_an_input_error():
    assert issubclass(UnreadableImage, InputError)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_damage_never_raises_anything_else(kind):
    # A single damaged file among thousands must be skipped by name, whatever Pillow raises for it.
    rng = np.random.default_rng(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    whole = encoded(Image.fromarray(noise(24, 32)), kind, **options)
    refusals = 0
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        else:
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(0, len(damaged) if trial % 2 else min(len(damaged), 200))] = rng.integers(0, 256)
        try:
            assert Preprocessing(16, 20).read(bytes(damaged)).shape == (16, 16, 3)
        except UnreadableImage:
            refusals += 1
    assert refusals > 20


@pytest.mark.parametrize(
    "error", [OverflowError, TypeError, KeyError, EOFError, SyntaxError, RuntimeError, MemoryError, AttributeError]
)
def test_whatever_a_decoder_raises_is_one_kind_of_error(monkeypatch, error):
    def load(self):
        raise error("decoder")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    refused(encoded(Image.new("RGB", (3, 3))), "decoder")


# -- preprocessing ----------------------------------------------------------------------------------------------------


def test_preprocessing_survives_json():
    made = Preprocessing(48, 56, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    again = Preprocessing.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and isinstance(again.mean, tuple)


@pytest.mark.parametrize(
    "change",
    [
        {"size": None},
        {"size": "64"},
        {"mean": ["x", 0, 0]},
        {"mean": [0.5]},
        {"std": [0.5, 0.5, 0.0]},
        {"colour": 1},
        {"interpolation": "lanczos"},
        {"resize": 10},
        {"size": 0},
        {"resize_rule": "stretch"},
        {"decoder": 3},
        {"decoder": "2"},
    ],
)
def test_preprocessing_that_is_not_understood(change):
    good = Preprocessing(48, 56).to_json()
    with pytest.raises(InputError):
        Preprocessing.from_json({**good, **change})
    for key in good:
        if key in ("size", "resize", "mean", "std"):
            with pytest.raises(InputError):
                Preprocessing.from_json({k: v for k, v in good.items() if k != key})


def test_an_image_of_the_right_size_is_not_touched():
    pixels = noise(16, 16)
    assert np.array_equal(Preprocessing(16, 16).frame(pixels), pixels)


def test_without_scaling_the_centre_is_cut():
    pixels = noise(20, 31)
    got = Preprocessing(16, 16).frame(pixels[:16])
    assert np.array_equal(got, pixels[:16, 7:23])
    got = Preprocessing(16, 20, decoder=1).frame(pixels)
    assert np.array_equal(got, pixels[2:18, 7:23])


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 100)])
def test_the_shorter_side_is_scaled_and_a_centred_square_cut(width, height):
    image = Image.fromarray(noise(height, width))
    got = Preprocessing(20, 25, "bilinear", decoder=1).frame(np.asarray(image))
    scaled = np.asarray(image.resize((width // 2, height // 2), Image.Resampling.BILINEAR))
    top, left = (height // 2 - 20) // 2, (width // 2 - 20) // 2
    assert np.array_equal(got, scaled[top : top + 20, left : left + 20])


def test_a_shape_is_not_squeezed():
    # A circle stays a circle: as many dark pixels along the row as along the column.
    y, x = np.mgrid[:120, :240]
    disc = np.where((x - 120) ** 2 + (y - 60) ** 2 < 40**2, 0, 255).astype(np.uint8)
    got = Preprocessing(48, 48).frame(np.repeat(disc[..., None], 3, 2))[..., 0] < 128
    assert abs(int(got[24].sum()) - int(got[:, 24].sum())) <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_every_shape_gives_the_square(interpolation):
    made = Preprocessing(7, 9, interpolation)
    for width, height in [(1, 1), (1, 50), (50, 1), (7, 7), (9, 9), (8, 300), (333, 101), (10, 9)]:
        pixels = made.read(np.full((height, width, 3), (10, 20, 30), np.uint8))
        assert pixels.shape == (7, 7, 3) and pixels.dtype == np.uint8
        assert (pixels == [10, 20, 30]).all()


@pytest.mark.parametrize("decoder", [1, 2])
def test_a_file_its_bytes_and_its_pixels_give_the_same(tmp_path, photo, decoder):
    path = photo(tmp_path / "a.png", 3, (143, 130))
    made = Preprocessing(16, 20, decoder=decoder)
    assert np.array_equal(made.read(path), made.frame(np.asarray(open_rgb(path))))
    assert np.array_equal(made.read(path), made.read(path.read_bytes()))


def test_the_extension_does_not_matter(tmp_path, photo):
    path = photo(tmp_path / "a.png", 3)
    shutil.copy(path, tmp_path / "a.jpg")
    assert np.array_equal(open_rgb(path), open_rgb(tmp_path / "a.jpg"))


# -- decoder rules ----------------------------------------------------------------------------------------------------


def smooth(width, height):
    """A picture of slow waves: what is kept of it does not depend on single pixels."""
    y, x = np.mgrid[0:height, 0:width] / min(width, height)
    waves = np.stack([np.sin(5 * x + 2 * y), np.cos(3 * y - x), np.sin(4 * (x + y))], 2)
    return Image.fromarray((127 + 100 * waves).astype(np.uint8))


def test_what_was_made_before_keeps_rule_1():
    old = {"size": 16, "resize": 20, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert Preprocessing.from_json(old) == Preprocessing(16, 20, decoder=1)
    assert Preprocessing(16, 20).to_json()["decoder"] == 2


@pytest.mark.parametrize("size", [(640, 480), (301, 400), (97, 33)])
def test_rule_1_is_the_whole_picture_scaled_then_cut(size):
    image = Image.fromarray(noise(size[1], size[0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(image, "JPEG", exif=exif)
    upright = Image.open(io.BytesIO(file)).transpose(Image.Transpose.ROTATE_270)
    scale = 40 / min(size)
    scaled = upright.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(Preprocessing(32, 40, decoder=1).read(file), expected)


@pytest.mark.parametrize(
    ("side", "scale"), [(63, 1), (64, 1), (127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (1000, 8)]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_decoded_at_the_smallest_scale_of_twice_the_target(side, scale, options, monkeypatch):
    file, scales, whole = encoded(smooth(side + 40, side), "JPEG", quality=95, **options), [], Picture.load
    made = Preprocessing(32, 32)

    def load(self, copies=0):
        scales.append(self._shrunk)
        return whole(self, copies)

    monkeypatch.setattr(Picture, "load", load)
    pixels = made.read(file)
    assert scales == [scale]
    exact = made.frame(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    assert np.abs(pixels.astype(int) - exact).mean() < 1.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("rule", ["cut", "pad", "squash"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_rule_2_turns_what_exif_says(orientation, kind, rule):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(300, 200)
    made = Preprocessing(32, 36, resize_rule=rule)
    turned = made.read(encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    expected = made.frame(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(image))))
    assert np.abs(turned.astype(int) - expected).mean() < 1.5
    assert np.abs(turned.astype(int) - expected).max() < 16


@pytest.mark.parametrize("side", [40, 80, 200, 500])
def test_both_rules_see_the_same_picture(side):
    for kind in ("JPEG", "PNG", "WEBP"):
        file = encoded(smooth(side, side), kind, quality=95)
        one, two = (Preprocessing(32, 32, decoder=rule).read(file).astype(int) for rule in (1, 2))
        assert np.abs(one - two).mean() < 1.5, kind


@pytest.mark.parametrize("decoder", [1, 2])
@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_pad_keeps_the_sides_and_the_shape(size, decoder):
    image = Image.new("RGB", size, (200, 100, 50))
    pixels = Preprocessing(30, 40, resize_rule="pad", decoder=decoder).read(encoded(image))
    pixels = pixels if size[0] > size[1] else pixels.swapaxes(0, 1)
    assert (pixels[10:20] == (200, 100, 50)).all()
    assert (pixels[:10] == 128).all() and (pixels[20:] == 128).all()


@pytest.mark.parametrize("decoder", [1, 2])
def test_squash_keeps_the_sides_and_not_the_shape(decoder):
    image = np.zeros((100, 400, 3), np.uint8)
    image[:, 0:100] = 255
    pixels = Preprocessing(40, 44, "bilinear", resize_rule="squash", decoder=decoder).read(
        encoded(Image.fromarray(image))
    )
    assert (pixels[:, :9] == 255).all() and (pixels[:, 11:] == 0).all()
    cut = Preprocessing(40, 44, "bilinear", decoder=decoder).read(encoded(Image.fromarray(image)))
    assert (cut == 0).all()


@pytest.mark.parametrize("decoder", [1, 2])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_tall_picture_is_scaled_across_first_whatever_pillow_does(interpolation, decoder):
    """Pillow 13 scales tall pictures down first: a grey level more or less in one pixel of seven."""
    image = Image.fromarray(noise(59, 30))
    how = Image.Resampling[interpolation.upper()]
    wanted = image.resize((20, 59), how).resize((20, 20), how)
    prepared = Preprocessing(20, 20, interpolation, resize_rule="squash", decoder=decoder)
    assert np.array_equal(prepared.frame(np.asarray(image)), np.asarray(wanted))
    assert np.array_equal(prepared.read(encoded(image)), np.asarray(wanted))


@pytest.mark.parametrize("decoder", [1, 2])
@pytest.mark.parametrize("rule", ["cut", "pad", "squash"])
def test_a_frame_may_be_bgr_or_a_view(decoder, rule):
    made = Preprocessing(16, 18, resize_rule=rule, decoder=decoder)
    frame = noise(97, 151)
    expected = made.read(encoded(Image.fromarray(frame)))
    assert np.array_equal(made.frame(frame), expected)
    assert np.array_equal(made.read(frame), expected)
    assert np.array_equal(made.frame(np.ascontiguousarray(frame[..., ::-1]), "bgr"), expected)
    assert np.array_equal(made.frame(frame[:, :, ::-1], "bgr"), expected)


@pytest.mark.parametrize(
    "frame",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_an_array_that_is_no_frame(frame):
    with pytest.raises(InputError, match="no frame"):
        Preprocessing(16, 18).frame(frame)
    with pytest.raises(InputError, match="order of channels"):
        Preprocessing(16, 18).frame(noise(), "gbr")
