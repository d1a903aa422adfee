"""What a user may give as an image: the right picture, or an ImageError that says what to do."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.bounds import bounded
from PIL import Image, ImageFile, TiffImagePlugin

from mmneurons.data import images
from mmneurons.data.images import check_image, check_scaled, open_image, open_stored
from mmneurons.errors import ImageError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}, "JPEG2000": {}}
ALL_FORMATS = [*LOSSLESS, "GIF", "JPEG", "AVIF"]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG by hand: Pillow cannot write every header that a file may have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def refused(source) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)
    return caught.value


def pixels(source) -> np.ndarray:
    picture = open_image(source).image
    assert picture.mode == "RGB"
    return np.asarray(picture)


# Files that are images


@pytest.mark.parametrize(("kind", "options"), LOSSLESS.items())
def test_a_plain_file_comes_back_pixel_for_pixel(tmp_path, kind, options):
    path = put(tmp_path / "cat", encoded(Image.fromarray(NOISE), kind, **options))
    opened = open_image(path)
    assert np.array_equal(np.asarray(opened.image), NOISE)
    assert (opened.image.mode, opened.name, opened.notes) == ("RGB", path, ())


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_one_pixel_is_an_image(tmp_path, kind):
    assert open_image(put(tmp_path / "dot", encoded(Image.new("RGB", (1, 1)), kind))).image.size == (1, 1)


def test_a_path_object_and_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path / "cat.png", encoded(Image.fromarray(NOISE), "PNG"))
    assert np.array_equal(pixels(tmp_path / "cat.png"), NOISE)
    assert open_image("~/cat.png").name == "~/cat.png"


def test_the_file_is_closed_whatever_happens(tmp_path, monkeypatch):
    good = encoded(Image.fromarray(NOISE), "PNG")
    files = {"good": good, "half": good[: len(good) // 2], "none": b"text", "huge": png(12_000, 12_000, 8, 2, b"")}
    paths = [put(tmp_path / name, data) for name, data in files.items()]
    handles, really_open = [], Path.open

    def open_and_keep(self, *args):
        handles.append(really_open(self, *args))
        return handles[-1]

    monkeypatch.setattr(Path, "open", open_and_keep)
    open_image(paths[0])
    for path in paths[1:]:
        refused(path)
    assert [handle.closed for handle in handles] == [True] * len(files)


# EXIF rotation. EXIF 2.32, tag 274: which side of the scene row 0 and column 0 of the file hold.

AS_STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}
MARKED = np.kron(np.array([[RED, GREEN, BLUE], [WHITE, BLACK, BLACK]]), np.ones((16, 16, 1))).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[orientation](MARKED)))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif, **(options | LOSSLESS.get(kind, {})))
    opened = open_image(put(tmp_path / "photo", data)).image
    for picture in (opened, open_image(opened).image, open_image(Image.open(io.BytesIO(data))).image):
        assert picture.size == (48, 32)
        assert np.abs(np.asarray(picture).astype(int) - MARKED).max() < 10


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_exif_data_does_not_cost_the_picture(tmp_path, kind):
    data = encoded(Image.fromarray(NOISE), kind, exif=b"Exif\0\0no such thing", **LOSSLESS[kind])
    opened = open_image(put(tmp_path / "photo", data))
    assert np.array_equal(np.asarray(opened.image), NOISE)
    assert opened.notes == ("EXIF data unreadable: not rotated",)


# Colour: 16 bits, floats, CMYK, transparency

GREY16 = np.array([[0, 128, 129, 257, 300, 32768, 65406, 65407, 65535]], dtype=np.uint16)
GREY8 = np.array([[0, 0, 1, 1, 1, 128, 254, 255, 255]])  # nearest v / 257, by hand: 128.5 / 257 is one half


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("PNG", Image.fromarray(GREY16)),
        ("TIFF", Image.fromarray(GREY16)),
        ("TIFF", Image.fromarray(GREY16.astype(">u2"))),
        ("TIFF", Image.fromarray(GREY16.astype(np.int32))),
        ("PPM", Image.fromarray(GREY16)),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-32-bit", "pgm"],
)
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind, image):
    path = put(tmp_path / "scan", encoded(image, kind))
    for source in (path, image):
        assert np.array_equal(pixels(source), np.stack([GREY8] * 3, axis=-1))
        assert open_image(source).notes == ("16-bit grey, values 0 to 65535: divided by 257",)


def test_16_bit_tiff_whose_zero_is_white(tmp_path):
    data = encoded(Image.fromarray(GREY16), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(put(tmp_path / "scan.tif", data))[..., 0], 255 - GREY8)


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    data = png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 1000, 1001), transparent=struct.pack(">H", 1000))
    path = put(tmp_path / "scan.png", data)
    assert pixels(path)[0, :, 0].tolist() == [0, 255, 4]
    assert open_image(path).notes[-1] == "transparent: shown on white"


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_32_bit_grey_without_a_known_white_is_refused(values):
    assert f"from {values[0]} to {values[1]}" in refused(Image.fromarray(np.array([values], dtype=np.int32))).seen


def test_float_images_hold_0_to_1(tmp_path):
    path = put(tmp_path / "depth.tif", encoded(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "TIFF"))
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]
    path = put(tmp_path / "depth.tif", encoded(Image.fromarray(np.array([[0, 200]], dtype=np.float32)), "TIFF"))
    assert "/ 255" in refused(path).fix


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    opened = open_image(put(tmp_path / "print.jpg", encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(np.array(opened.image.getpixel((4, 4))) - RED).max() < 6
    assert opened.notes == ("CMYK: converted without its colour profile",)


def with_palette(transparent: int | bytes) -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([*GREEN, *RED])
    image.info["transparency"] = transparent
    return image


def converted(mode: str, *way: tuple[str, object]) -> Image.Image:
    image = Image.new(way[0][0], (1, 1), way[0][1])  # pyright: ignore[reportArgumentType]
    for step in [each for each, _ in way[1:]] + [mode]:
        image = image.convert(step)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("L", (1, 1), 7), (7, 7, 7)),
        (Image.new("P", (1, 1)), BLACK),
        (Image.new("HSV", (1, 1), (0, 255, 255)), RED),
        (Image.new("RGBX", (1, 1), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("RGBA", (1, 1), (9, 8, 7, 255)), (9, 8, 7)),
        (Image.new("LA", (1, 1), (9, 255)), (9, 9, 9)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_opaque_modes(image, expected):
    opened = open_image(image)
    assert (opened.image.getpixel((0, 0)), opened.notes) == (expected, ())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (1, 1), (0, 51)), (204, 204, 204)),
        (converted("La", ("LA", (0, 51))), (204, 204, 204)),
        (converted("RGBa", ("RGBA", (255, 0, 0, 51))), (255, 204, 204)),
        (with_palette(1), WHITE),
        (with_palette(b"\xff\x33"), (255, 204, 204)),
    ],
    ids=["RGBA-clear", "RGBA", "LA", "La", "RGBa", "P-index", "P-table"],
)
def test_transparency_is_shown_on_white(image, expected):
    opened = open_image(image)
    assert (opened.image.getpixel((0, 0)), opened.notes) == (expected, ("transparent: shown on white",))


def test_transparency_in_files(tmp_path):
    key = png(2, 1, 8, 2, bytes([0, *RED, *BLUE]), transparent=struct.pack(">3H", *RED))
    assert pixels(put(tmp_path / "key.png", key)).tolist() == [[[*WHITE], [*BLUE]]]
    table = encoded(with_palette(b"\xff\x33"), "PNG", transparency=b"\xff\x33")
    assert pixels(put(tmp_path / "table.png", table)).tolist() == [[[255, 204, 204]]]


# Several frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_used_and_noted(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind, {}))
    opened = open_image(put(tmp_path / "film", data))
    what = "several pictures in one file" if kind in ("TIFF", "MPO") else "animated"
    assert opened.notes == (f"{what}: the first is used",)
    assert np.abs(np.asarray(opened.image).astype(int) - RED).max() < 6  # MPO is JPEG


# PIL images and arrays


def test_a_pil_image_is_left_as_it_was():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    film = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    film.seek(1)
    film.putpixel((3, 3), (1, 2, 3))  # a change that decoding the frame again would lose
    before, info = film.tobytes(), dict(film.info)
    opened = open_image(film)
    assert (opened.name, opened.notes, opened.image.getpixel((0, 0))) == ("<PIL image>", (), GREEN)
    assert (film.tell(), film.tobytes(), film.info) == (1, before, info)
    opened.image.putpixel((0, 0), BLUE)
    assert film.tobytes() == before


def test_a_pil_image_that_cannot_be_used():
    assert "0 x 5" in refused(Image.new("RGB", (0, 5))).seen
    data = encoded(Image.fromarray(NOISE), "PNG")
    assert "truncated" in refused(Image.open(io.BytesIO(data[: len(data) // 2]))).seen
    closed = Image.new("RGB", (1, 1))
    closed.close()
    assert "closed" in refused(closed).seen


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (NOISE, NOISE),
        (NOISE[::-1, ::2], NOISE[::-1, ::2]),
        (NOISE[..., 0], NOISE[..., :1].repeat(3, axis=2)),
        (np.dstack([NOISE, np.full((24, 32), 255, np.uint8)]), NOISE),
        (np.array([[[255, 0, 0, 51]]], np.uint8), [[[255, 204, 204]]]),
        (NOISE / 255, NOISE),
        ((NOISE / 255).astype(np.float32), NOISE),
        (np.array([[[1, 0, 0, 0.2]]]), [[[255, 204, 204]]]),
        (np.array([[0.5]], np.float16), [[[128] * 3]]),
    ],
    ids=["rgb", "strided", "grey", "rgba", "half-clear", "float64", "float32", "float-rgba", "float16"],
)
def test_arrays(array, expected):
    before = array.copy()
    opened = open_image(array)
    assert np.array_equal(np.asarray(opened.image), expected)
    assert opened.name == "<array>"
    opened.image.paste("white", (0, 0, *opened.image.size))
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "seen", "fix"),
    [
        (np.zeros((3, 24, 32), np.uint8), "(3, 24, 32)", "transpose(1, 2, 0)"),
        (np.zeros((1, 24, 32, 3), np.uint8), "(1, 24, 32, 3)", "height x width"),
        (np.zeros((24, 32, 1), np.uint8), "(24, 32, 1)", "height x width"),
        (np.zeros((), np.uint8), "()", "height x width"),
        (np.zeros((2, 2), bool), "bool", "* 255"),
        (np.zeros((2, 2), np.uint16), "uint16", "// 257"),
        (np.zeros((2, 2), np.int64), "int64", "uint8"),
        (np.zeros((2, 2), complex), "complex128", "uint8"),
        (np.full((2, 2), None), "object", "uint8"),
        (np.array([[0.0, 200.0]]), "from 0 to 200", "/ 255"),
        (np.array([[-2.1, 2.6]]), "from -2.1 to 2.6", "normalisation"),
        (np.array([[0.5, np.nan]]), "nan", "normalisation"),
        (np.zeros((0, 5, 3), np.uint8), "5 x 0", ""),
        (np.zeros((0, 5, 3)), "5 x 0", ""),
    ],
)
def test_arrays_that_are_not_one_picture(array, seen, fix):
    error = refused(array)
    assert seen in error.seen
    assert fix in error.fix


@pytest.mark.parametrize("source", [None, 3, b"\x89PNG", [[0]], io.BytesIO()])
def test_other_objects_are_refused_by_type(source):
    assert type(source).__name__ in refused(source).seen


# Paths that lead to no image


def test_a_missing_file_names_its_neighbours(tmp_path):
    put(tmp_path / "Kitten_01.PNG", b"")
    error = refused(str(tmp_path / "KITEN_01.png"))
    assert "There is no file" in error.what
    assert "'Kitten_01.PNG'" in error.seen
    assert str(tmp_path / "Kitten_01.PNG") in error.fix
    assert "none" in refused(str(tmp_path / "zebra")).seen
    assert "no folder" in refused(str(tmp_path / "nowhere" / "cat.png")).seen


def test_a_folder_says_what_is_in_it(tmp_path):
    for name in ("a.JPG", "b.JPG", "c.png", "notes.txt"):
        put(tmp_path / name, b"")
    error = refused(tmp_path)
    assert "is a folder" in error.what
    assert "2 .JPG, 1 .png" in error.seen
    assert error.fix.endswith(f"mmneurons find {tmp_path}/*.JPG")
    (tmp_path / "empty").mkdir()
    assert "none" in refused(tmp_path / "empty").seen


@pytest.mark.parametrize(
    "source",
    [
        "http://a.org/cat.png",
        "HTTPS://a.org/cat.png",
        "s3://bucket/cat.png",
        "file:///cat.png",
        "data:image/png;base64," + "A" * 9000,
        Path("http://a.org/cat.png"),
    ],
)
def test_an_address_is_not_fetched(source):
    error = refused(source)
    assert "is an address" in error.what
    assert "Download it" in error.fix
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "path of the image is empty"),
        ("a\0b", "no file|cannot be opened"),
        ("x" * 9000, "no file|cannot be opened"),
    ],
)
def test_impossible_paths(name, what):
    with pytest.raises(ImageError, match=what) as caught:
        open_image(name)
    assert len(str(caught.value)) < 700


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe" in refused(tmp_path / "pipe.png").what


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = put(tmp_path / "cat.png", encoded(Image.fromarray(NOISE), "PNG"))

    def forbidden(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # chmod does not stop root
    assert refused(path).fix == f"chmod u+r {path}"


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "0 bytes"),
        (b"a cat on a mat\n", "text: 'a cat on a mat'"),
        ("ein Käfer".encode(), "text: 'ein Käfer'"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"%PDF-1.7", "a document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b"PK\x03\x04...", "an archive"),
        (b"\0\0\0\nftypheic\0\0\0\0", "a HEIC photograph"),
        (b"\x80\x04\x95\0\0", "data that begins 80 04 95"),
        (b"\xfe\xed\xfa\xce", "data that begins fe ed fa ce"),
        (b"\x89PNG\r\n\x1a\n", "the start of an image"),
    ],
)
def test_a_file_that_is_no_image_is_told_by_its_first_bytes(tmp_path, data, seen):
    error = refused(put(tmp_path / "cat.png", data))
    assert seen in error.seen
    assert error.fix


def test_postscript_is_never_run(tmp_path):
    assert "a document" in refused(put(tmp_path / "cat.eps", encoded(Image.fromarray(NOISE), "EPS"))).seen


# Damaged files and files too large


@pytest.mark.parametrize("pads_truncated", [False, True])
@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_a_truncated_file_is_refused(tmp_path, monkeypatch, kind, kept, pads_truncated):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", pads_truncated)  # as training scripts set it
    data = encoded(Image.fromarray(NOISE), kind)
    error = refused(put(tmp_path / "half", data[: int(len(data) * kept)]))
    assert "cannot be" in error.what
    assert ImageFile.LOAD_TRUNCATED_IMAGES is pads_truncated


def test_the_reason_of_the_decoder_is_kept(tmp_path):
    data = encoded(Image.fromarray(NOISE), "JPEG")
    error = refused(put(tmp_path / "half.jpg", data[:-100]))
    assert "truncated" in error.seen
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize(("side", "seen"), [(20_000, "400000000 pixels"), (12_000, "12000 x 12000")])
def test_a_bomb_is_refused_from_its_header(tmp_path, side, seen):
    limit = Image.MAX_IMAGE_PIXELS
    error = refused(put(tmp_path / "bomb.png", png(side, side, 8, 2, b"")))  # no pixels: decoding would say truncated
    assert "too large" in error.what
    assert seen in error.seen
    assert "60,000,000" in error.fix
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_the_same_for_every_source_and_inclusive(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # Pillow warns between 61 and 120 pixels
    for height, fits in ((9, True), (10, False)):
        array = np.zeros((height, 11, 3), np.uint8)
        for source in (
            array,
            array / 255,
            Image.fromarray(array),
            put(tmp_path / "a", encoded(Image.fromarray(array), "PNG")),
        ):
            assert open_image(source).image.size == (11, 9) if fits else "11 x 10" in refused(source).seen


def test_a_format_that_takes_more_memory_has_a_lower_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for kind, side in (("PNG", 10), ("WEBP", 7)):
        assert open_image(put(tmp_path / "a", encoded(Image.new("RGB", (side, side)), kind))).image.width == side
    assert "at most 50 pixels" in refused(put(tmp_path / "a", encoded(Image.new("RGB", (8, 8)), "WEBP"))).fix


def test_the_bytes_of_a_file_are_bounded(tmp_path, monkeypatch):
    assert open_image(put(tmp_path / "a.ppm", b"P3 1 1 255 1 2 3")).image.getpixel((0, 0)) == (1, 2, 3)
    monkeypatch.setattr(images, "_MAX_PLAIN", 15)
    assert "16 bytes" in refused(tmp_path / "a.ppm").seen
    data = encoded(Image.fromarray(NOISE), "PPM")
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    assert "bytes" in refused(put(tmp_path / "a.ppm", data)).seen


def test_pages_are_not_counted(tmp_path, monkeypatch):
    def counted(self):
        raise AssertionError("every page is read to count them")

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(counted))
    pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    path = put(tmp_path / "pages.tif", encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert open_image(path).image.getpixel((0, 0)) == RED


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    photo = encoded(Image.new("RGB", (2000, 1500), RED), "JPEG", progressive=True)
    assert open_image(put(tmp_path / "a.jpg", photo)).image.size == (2000, 1500)
    last = photo.rindex(b"\xff\xda")
    bomb = put(tmp_path / "bomb.jpg", photo[:last] + photo[last:-2] * 1000 + photo[-2:])
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with Image.open(bomb) as image:
        for source in (bomb, image):
            assert "scans" in refused(source).seen


@pytest.mark.parametrize("orientation", [1, 6])
def test_transparency_is_the_same_strip_by_strip(tmp_path, monkeypatch, orientation):
    rgba = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = put(tmp_path / "a.png", encoded(rgba, "PNG", exif=exif))
    whole = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    monkeypatch.setattr(images, "_STRIP", 70)  # strips of three rows
    assert np.array_equal(pixels(path), np.rot90(whole, -1) if orientation == 6 else whole)


def test_the_header_alone_is_checked(tmp_path):
    data = encoded(Image.fromarray(NOISE), "PNG")
    check_image(put(tmp_path / "half", data[: len(data) // 2]))  # damaged further on: told when it is opened
    for bad in (b"", b"text", png(12_000, 12_000, 8, 2, b"")):
        with pytest.raises(ImageError):
            check_image(put(tmp_path / "bad", bad))


def test_stored_values_are_not_touched(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_stored(put(tmp_path / "a.png", encoded(Image.fromarray(GREY16), "PNG", exif=exif)))
    assert np.array_equal(np.asarray(image), GREY16.T)
    with pytest.raises(ImageError, match="several pictures"):
        open_stored(put(tmp_path / "a.gif", SEEDS[-3]))


# A processor that scales the shorter side has no bound on the longer one


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ({"shortest_edge": 112}, False),
        ({"shortest_edge": 112, "longest_edge": 1024}, True),
        ({"height": 336, "width": 336}, True),
        (SimpleNamespace(shortest_edge=112, longest_edge=None), False),  # transformers 5 has a class of its own
        (None, True),
    ],
)
def test_a_picture_that_would_be_scaled_without_bound_is_refused(size, fits):
    processor = SimpleNamespace(size=size, do_resize=True)
    check_scaled([(640, 480), (4000, 1)], processor)  # 112 x 448,000 pixels, the most that pass are 60 million
    if fits:
        check_scaled([(60_000, 1)], processor)
    else:
        with pytest.raises(ImageError, match="60000 x 1 pixels") as caught:
            check_scaled([(640, 480), (60_000, 1)], processor)
        assert "6720000 x 112" in caught.value.seen
        check_scaled([(60_000, 1)], SimpleNamespace(size=size, do_resize=False))


def test_a_model_does_not_scale_a_line_of_pixels(vlm):
    with pytest.raises(ImageError, match="too long and thin"):
        vlm.caption(Image.new("RGB", (1, 60_000)))


def test_suffixes_are_those_of_pillow():
    Image.init()
    assert set(images.SUFFIXES) == {s for s, kind in Image.registered_extensions().items() if kind in images._FORMATS}


def test_two_threads_do_not_swap_their_warning_filters(monkeypatch):
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def slowly(picture, *rest):
        if first_is_in.is_set():
            second_is_in.set()
            first_is_out.wait(5)
        else:
            first_is_in.set()
            second_is_in.wait(0.2)  # runs out where the second waits for its turn
        return really_check(picture, *rest)

    really_check = images._check_size
    monkeypatch.setattr(images, "_check_size", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_image, NOISE)
        first_is_in.wait(5)
        second = pool.submit(open_image, NOISE)
        first.result()
        first_is_out.set()
        second.result()
    assert list(warnings.filters) == before


SEEDS = [encoded(Image.fromarray(NOISE[:6, :7]), kind) for kind in ALL_FORMATS]
SEEDS += [
    encoded(Image.fromarray(NOISE[:6, :7]), "GIF", save_all=True, append_images=[Image.fromarray(NOISE[6:12, :7])])
]
SEEDS += [encoded(Image.fromarray(GREY16), "PNG"), encoded(with_palette(b"\xff\x33"), "PNG", transparency=b"\xff\x33")]


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = value
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "image"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300) | damaged())
def test_no_bytes_raise_anything_but_an_image_error(scratch, data):
    path = put(scratch, data)
    try:
        with bounded():
            opened = open_image(path)
            opened.image.tobytes()
    except ImageError as error:
        assert error.fix  # noqa: PT017
    else:
        assert opened.image.mode == "RGB"
