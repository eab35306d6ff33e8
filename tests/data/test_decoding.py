"""One picture file -> pixels: files that are odd, hostile or large."""

from __future__ import annotations

import errno
import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from lineage.data import decoding
from lineage.data.decoding import decode, shown_size, why_broken
from lineage.files import TooLargeError


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    size: tuple[int, int], depth: int, colour: int, line: bytes, *chunks: bytes, after: bytes = b""
) -> bytes:
    """A PNG file with `line` as each of its lines, and `chunks` before and `after` the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + line) * size[1]))
    ends = after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + ends


RED = bytes((200, 30, 30)) * 8
RED_PNG = png((8, 8), 8, 2, RED)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def reason(file: Path, size: int = 8) -> str:
    """Why a file cannot be decoded."""
    try:
        decode(file, size)
    except Exception as error:
        return why_broken(error, file)
    raise AssertionError(f"{file} was decoded")


JUNK = {
    "exif": chunk(b"eXIf", b"junk" * 10),
    "exif with a wrong checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08")[:-1] + b"?",
    "a large profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2_000_000))),
    "half a profile": chunk(b"iCCP", b"x\0"),
    "large text": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))),
    "text packed in an unknown way": chunk(b"zTXt", b"k\0\7xxx"),
    "text with a wrong checksum": chunk(b"tEXt", b"k\0text")[:-1] + b"?",
    "half a gamma": chunk(b"gAMA", b"\0"),
    "half a transparent colour": chunk(b"tRNS", b"\0"),
    "a transparent colour with a wrong checksum": chunk(b"tRNS", bytes(6))[:-1] + b"?",
    "half an animation": chunk(b"acTL", b"\0"),
    "a frame outside": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 99, 99, 0, 0, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("name", JUNK)
def test_metadata_of_junk_does_not_make_a_picture_unreadable(tmp_path: Path, name: str) -> None:
    for number, raw in enumerate(
        (png((8, 8), 8, 2, RED, JUNK[name]), png((8, 8), 8, 2, RED, after=JUNK[name]))
    ):
        file = tmp_path / f"{number}.png"
        file.write_bytes(raw)
        assert decode(file, 8)[:, 4, 4].tolist() == [200, 30, 30]
        assert shown_size(file) == (8, 8)


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "junk", [b"JFIF\0", b"Adobe\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"ICC_PROFILE\0\1"]
)
def test_segments_of_junk_do_not_make_a_jpeg_unreadable(
    tmp_path: Path, marker: int, junk: bytes
) -> None:
    segment = bytes((0xFF, marker)) + struct.pack(">H", len(junk) + 2) + junk
    (tmp_path / "a.jpg").write_bytes(jpeg()[:2] + segment + jpeg()[2:])
    (tmp_path / "b.jpg").write_bytes(jpeg())
    assert (decode(tmp_path / "a.jpg", 8) == decode(tmp_path / "b.jpg", 8)).all()


@pytest.mark.parametrize("name", [b"EXIF", b"XMP ", b"ICCP"])
def test_chunks_of_junk_do_not_make_a_webp_unreadable(tmp_path: Path, name: bytes) -> None:
    file = tmp_path / "a.webp"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, icc_profile=bytes(64), exif=bytes(64))
    expected, raw = decode(file, 8), file.read_bytes()
    size = len(raw) + 12 - 8  # the chunk says that it is longer than the file
    file.write_bytes(b"RIFF" + struct.pack("<I", size) + raw[8:] + name + b"\0\0\1\0junk")
    assert (decode(file, 8) == expected).all()


def test_the_orientation_is_kept_when_other_metadata_is_junk(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the left
    turned = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    line = bytes((255, 0, 0)) * 4 + bytes((0, 0, 255)) * 4  # red on the left
    (tmp_path / "a.png").write_bytes(png((8, 8), 8, 2, line, turned, JUNK["a large profile"]))
    upright = decode(tmp_path / "a.png", 8)
    assert upright[:, 0, 4].tolist() == [255, 0, 0] and upright[:, 7, 4].tolist() == [0, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_torn_picture_is_not_taken(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(file)
    raw = file.read_bytes()
    for share in (0.02, 0.5, 0.9):
        file.write_bytes(raw[: int(len(raw) * share)])
        assert "picture" in reason(file)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_16_bits_with_a_transparent_colour_are_as_8_bits(
    tmp_path: Path, colour: int, channels: int
) -> None:
    shallow = b"".join(bytes((value,)) * channels for value in (0x12, 0x80) * 4)
    deep = b"".join(bytes((value, 0x34)) * channels for value in (0x12, 0x80) * 4)
    for name, depth, line, clear in (("a", 8, shallow, b"\0\x12"), ("b", 16, deep, b"\x12\x34")):
        raw = png((8, 8), depth, colour, line, chunk(b"tRNS", clear * channels))
        (tmp_path / f"{name}.png").write_bytes(raw)
    pictures = [decode(tmp_path / name, 8) for name in ("a.png", "b.png")]
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0][:, 0, :2].tolist() == [[255, 128]] * 3


def test_only_regular_files_of_bounded_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(decoding.MAX_BYTES + 1_000_000)  # a hole: it takes no space
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket has at most about 100 letters
        server.bind("socket.png")
        os.chdir(here)
    expected = {
        "pipe": "it is a pipe, not a file",
        "zero": "it is a device, not a file",
        "folder": "it is a folder, not a file",
        "socket": "it is a socket, not a file",
        "large": "its 201 MB are more than the 200 MB allowed",
        "gone": "No such file",
    }
    for name, words in expected.items():
        assert words in reason(tmp_path / f"{name}.png")


@pytest.mark.parametrize(
    ("suffix", "start", "layout"), [("png", 16, ">II"), ("gif", 6, "<HH"), ("bmp", 18, "<ii")]
)
def test_a_bomb_is_named_with_its_size(
    tmp_path: Path, suffix: str, start: int, layout: str
) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.new("RGB", (8, 8)).save(file)
    raw = bytearray(file.read_bytes())
    struct.pack_into(layout, raw, start, 60_000, 50_000)
    if suffix == "png":
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    file.write_bytes(raw)
    words = reason(file)
    assert "too large: it has 60,000 x 50,000 pixels" in words and "bomb" in words


def test_a_bmp_of_negative_width_is_a_wide_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    raw = bytearray((tmp_path / "a.bmp").read_bytes())
    struct.pack_into("<i", raw, 18, -8)
    (tmp_path / "a.bmp").write_bytes(raw)
    assert "it has 4,294,967,288 x 8 pixels" in reason(tmp_path / "a.bmp")


def test_a_bomb_of_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "too large: it has more than" in reason(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error"),
        (OSError("broken data stream"), "is broken (broken data stream)"),
        (MemoryError(), "more memory than there is"),
        (TooLargeError(errno.EFBIG, "it is too big"), "it is too big"),
        (ValueError("a\x1b[31m"), r"is broken (a\x1b[31m)"),
        (Image.UnidentifiedImageError("x"), "no picture of a known format"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_a_reason(error: Exception, words: str) -> None:
    assert words in why_broken(error, Path("no/such.png"))


def test_a_format_that_is_held_several_times_in_memory_has_a_lower_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.webp", "a.png"):
        Image.new("RGB", (32, 24)).save(tmp_path / name)
    monkeypatch.setattr(decoding, "MAX_WHOLE", 32 * 24 - 1)
    assert "it has 32 x 24 pixels" in reason(tmp_path / "a.webp")
    assert decode(tmp_path / "a.png", 8).shape == (3, 8, 8)


def test_a_program_in_postscript_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    )
    assert "no picture of a known format" in reason(tmp_path / "a.png")


def odd_pictures(folder: Path) -> list[Path]:
    """Pictures of many modes, 61 x 50, with a ramp from left to right."""
    ramp = np.tile(np.linspace(0, 255, 61).astype(np.uint8), (50, 1))
    grey = Image.fromarray(ramp)
    palette = grey.quantize(200)
    rgba = Image.merge("RGBA", [grey, grey, Image.new("L", grey.size, 9), grey])
    deep = Image.fromarray(ramp.astype(np.uint16) * 256 + 7)
    saved = {"L": grey, "P": palette, "RGBA": rgba, "I16": deep, "1": grey.convert("1")}
    for name, image in saved.items():
        image.save(folder / f"{name}.png")
    palette.save(folder / "clear.png", transparency=3)
    grey.convert("CMYK").save(folder / "CMYK.jpg", quality=95)
    return sorted(folder.iterdir())


def test_bands_do_not_change_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = odd_pictures(tmp_path)
    expected = [decode(file, 16) for file in files]
    monkeypatch.setattr(decoding, "BAND", 61 * 7)
    for file, pixels in zip(files, expected, strict=True):
        assert (decode(file, 16) == pixels).all(), file.name


def test_a_large_picture_is_converted_in_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file for file in odd_pictures(tmp_path) if file.stem != "1"]
    expected = [decode(file, 4) for file in files]
    parts, rgb = [], decoding._rgb
    sizes, fit = [], ImageOps.fit

    def spy_size(image: Image.Image, *rest: Any) -> Image.Image:
        sizes.append(image.width)
        return fit(image, *rest)

    def spy(image: Image.Image) -> Image.Image:
        parts.append(image.width * image.height)
        return rgb(image)

    monkeypatch.setattr(decoding, "_rgb", spy)
    monkeypatch.setattr(ImageOps, "fit", spy_size)
    monkeypatch.setattr(decoding, "LARGE", 1000)
    monkeypatch.setattr(decoding, "BAND", 61 * 4)
    for file, pixels in zip(files, expected, strict=True):
        # The square is up to three columns narrower; the ramp rises by 4.2 a column.
        assert np.abs(decode(file, 4).astype(int) - pixels).max() <= 3 * 4.2, file.name
    assert len(parts) > 10 * len(files) and max(parts) <= 61 * 4
    assert max(sizes) == 16  # reduced to a third on the way
