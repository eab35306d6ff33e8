"""One picture file -> pixels: the only place of the package that opens an untrusted picture.

The steps of `decode`, in order:
    check that it is a regular file of bounded size, with a bounded number of pixels;
    convert any colour mode to RGB, transparency on white, the first frame of several;
    turn the picture upright as its EXIF orientation says;
    crop to the largest centred part of that shape, or to the square asked for, so that nothing is
    stretched;
    resize to the shape asked for with Lanczos. A picture that has it keeps its exact pixels.

Metadata that Pillow cannot read (EXIF, colour profiles, text) does not make a picture unreadable:
the file is decoded without it.

Memory: a picture is converted in bands, so that it is held once as the file has it and once in RGB.
A picture of more than `LARGE` pixels is reduced on the way, and only a few are decoded at a time.

Axes: 3 channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from lineage.characters import plain
from lineage.files import NotRegularError, TooLargeError, check_regular, check_stand_in

warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's remarks on odd metadata

T = TypeVar("T")
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, in pixels of its file."""

MAX_BYTES = 200_000_000
"""Largest size of a picture file."""
MAX_WHOLE = 50_000_000
"""Largest number of pixels in a format of `_WHOLE`; of others, Pillow's limit holds."""
LARGE = 16_000_000
"""Number of pixels above which a picture is reduced while it is converted."""
BAND = 1_000_000
"""Number of pixels that are converted at once."""

_WHOLE = ("WEBP", "AVIF", "JPEG2000")  # Pillow holds such a picture several times in memory
_LARGE_AT_ONCE = threading.Semaphore(2)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Turn that undoes each EXIF orientation."""


def decode(
    file: Path | bytes,
    size: int | tuple[int, int],
    box: Box | None = None,
    whole: bool = False,
) -> NDArray[np.uint8]:
    """The picture in a file, (3, H, W).

    Args:
        file: Path of the file, or its bytes.
        size: Side of the result in pixels, or its height and width.
        box: Square to take, in pixels of the file before it is turned upright; where it leaves the
            picture, it is moved inside or made smaller. None for the largest centred part.
        whole: If true, nothing is cropped: the picture lies on white.

    Raises:
        Exception: The file is no picture that can be read; `why_broken` gives the reason.
    """
    shape = (size, size) if isinstance(size, int) else size
    return _opened(file, lambda source: _pixels(source, shape, box, whole))


def shown_size(file: Path | bytes) -> tuple[int, int]:
    """Width and height of the picture in a file, turned upright. Raises as `decode`."""
    return _opened(file, _shown_size)


def _opened(file: Path | bytes, read: Callable[[Path | IO[bytes]], T]) -> T:
    """Result of `read` for a file, without its metadata where they are junk. Raises as `decode`."""
    if isinstance(file, Path):
        check_regular(file, MAX_BYTES)
    elif len(file) > MAX_BYTES:
        raise TooLargeError(errno.EFBIG, f"it has {len(file) / 1e6:,.0f} MB; make it smaller")
    try:
        return read(file if isinstance(file, Path) else io.BytesIO(file))
    except (Image.DecompressionBombError, MemoryError, TooLargeError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raw = file.read_bytes() if isinstance(file, Path) else file
        for bare in _without_metadata(raw):
            with contextlib.suppress(Exception):  # the first error tells more
                return read(io.BytesIO(bare))
        if isinstance(error, Image.UnidentifiedImageError):
            _check_foreign(raw)
        raise


def _shown_size(source: Path | IO[bytes]) -> tuple[int, int]:
    with Image.open(source) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def why_broken(error: Exception, file: Path | None) -> str:
    """Reason why a picture could not be decoded, in words for the user.

    Args:
        error: Error of `decode`.
        file: The picture's file; None if it is a part of a file.
    """
    if isinstance(error, PermissionError):
        return "the picture cannot be opened: permission denied"
    if isinstance(error, (NotRegularError, TooLargeError)):
        return f"the picture cannot be read: {error.strerror}"
    if isinstance(error, Image.DecompressionBombError):
        return f"the picture is too large: {_area(file)} (a decompression bomb?); make it smaller"
    if isinstance(error, MemoryError):
        return "the picture needs more memory than there is; make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        if _is_empty(file):
            return "the picture's file is empty; copy it again"
        return "no picture of a known format is in this file; copy or convert it again"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the picture cannot be read: {error.strerror}"
    return f"the picture is broken ({plain(error)}); copy it again"


_FOREIGN = {
    rb"....ftyp(heic|heix|hevc|mif1|msf1)": "an HEIC picture: convert it to PNG",
    rb"....ftyp(?!avi)": "a video: save a picture of it as PNG",
    rb"(\xef\xbb\xbf)?\s*(<\?xml.{,400}?)?<svg\b": "a drawing in SVG: convert it to PNG",
    rb"%PDF": "a PDF: convert it to PNG",
    rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf": "an archive: unpack it",
}
"""Patterns of the first bytes of files that users name like pictures; what they are."""


def _check_foreign(raw: bytes) -> None:
    """Raise `NotRegularError` for a file that is known to be no picture that is read."""
    for pattern, what in _FOREIGN.items():
        if re.match(pattern, raw, re.DOTALL):
            raise NotRegularError(errno.EINVAL, f"it is {what}")
    check_stand_in(raw)


def _is_empty(file: Path | None) -> bool:
    if file is None:
        return False
    try:
        return check_regular(file) == 0
    except OSError:
        return False


def _area(file: Path | None) -> str:
    """Width and height of a PNG, GIF or BMP; of another format, that they exceed the limit."""
    head = b""
    if file is not None:
        with file.open("rb") as opened:
            head = opened.read(26)
    layouts = {b"\x89PNG": (">II", 16), b"GIF8": ("<HH", 6), b"BM": ("<Ii", 18)}
    for magic, (layout, start) in layouts.items():
        if head.startswith(magic):
            width, height = (abs(side) for side in struct.unpack_from(layout, head, start))
            return f"it has {width:,} x {height:,} pixels"
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"it has more than {limit / 1e6:,.0f} million pixels"


def _pixels(
    source: Path | IO[bytes], shape: tuple[int, int], box: Box | None, whole: bool
) -> NDArray[np.uint8]:
    size, is_square = max(shape), shape[0] == shape[1]
    with Image.open(source) as image:
        if image.format == "EPS":  # a program; Pillow would run Ghostscript on it
            raise Image.UnidentifiedImageError("a PostScript file")
        if image.format in _WHOLE and image.width * image.height > MAX_WHOLE:
            reason = f"it has {image.width:,} x {image.height:,} pixels; make it smaller"
            raise TooLargeError(errno.EFBIG, reason)
        # A large JPEG is decoded at a fraction of its size, but at least twice the size needed.
        width, share = image.width, 1.0 if box is None else _share(image.size, box)
        image.draft("RGB", (math.ceil(2 * size / share), math.ceil(2 * size / share)))
        large = image.width * image.height > LARGE
        with _LARGE_AT_ONCE if large else contextlib.nullcontext():
            image.load()
            part = (0, 0, *image.size)
            if box is not None:
                part = _square(image.size, [side * image.width / width for side in box])
            elif large and is_square and not whole:
                part = _square(image.size, part)
            rgb = _in_bands(image, part, _factor(part, size) if large else 1)
        upright = _upright(image, rgb)
    if whole:
        fitted = ImageOps.pad(upright, shape[::-1], Image.Resampling.LANCZOS, color="white")
    else:
        fitted = ImageOps.fit(upright, shape[::-1], Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.uint8).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """`rgb`, turned as the EXIF orientation of `image` says."""
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # an EXIF block of junk raises errors of many kinds
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _share(size: tuple[int, int], box: Box) -> float:
    """Side of the square of a box as a share of the picture's shorter side."""
    left, _, right, _ = _square(size, box)
    return (right - left) / min(size)


def _square(size: tuple[int, int], box: Sequence[float]) -> tuple[int, int, int, int]:
    """The square about the middle of a box that lies inside a picture of this width and height."""
    left, top, right, bottom = box
    side = max(1, min(*size, round(max(right - left, bottom - top))))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    x, y = max(0, min(x, size[0] - side)), max(0, min(y, size[1] - side))
    return x, y, x + side, y + side


def _factor(part: tuple[int, int, int, int], size: int) -> int:
    """Whole number by which a part can be reduced, to at least four times `size`."""
    left, top, right, bottom = part
    return max(1, min(right - left, bottom - top) // (4 * size))


def _in_bands(image: Image.Image, box: tuple[int, int, int, int], factor: int = 1) -> Image.Image:
    """The pixels in `box` in RGB, reduced by a whole factor; what is left over is cut off."""
    if factor == 1 and image.mode == "RGB" and "transparency" not in image.info:
        return image if box == (0, 0, *image.size) else image.crop(box)
    left, top, right, bottom = box
    left, right = _divisible(left, right, factor)
    top, bottom = _divisible(top, bottom, factor)
    canvas = Image.new("RGB", ((right - left) // factor, (bottom - top) // factor))
    rows = max(1, BAND // ((right - left) * factor)) * factor
    for first in range(top, bottom, rows):
        band = image.crop((left, first, right, min(first + rows, bottom)))
        canvas.paste(_rgb(band).reduce(factor), (0, (first - top) // factor))
    return canvas


def _divisible(first: int, last: int, factor: int) -> tuple[int, int]:
    """The middle of a range whose length the factor divides."""
    over = (last - first) % factor
    return first + over // 2, last - (over - over // 2)


def _rgb(image: Image.Image) -> Image.Image:
    """A picture of any colour mode in RGB; transparent pixels become white."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        image = Image.fromarray(grey)
    elif isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits; Pillow kept the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# --- files without their metadata -----------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


def _without_metadata(raw: bytes) -> Iterator[bytes]:
    """A PNG, JPEG or WebP file with only the parts that its pixels need.

    Of a PNG, then, without the transparency too, which may be junk.
    """
    if raw.startswith(_PNG):
        yield _PNG + b"".join(_png_chunks(raw, (*_PNG_PIXELS, b"tRNS")))
        yield _PNG + b"".join(_png_chunks(raw, _PNG_PIXELS))
    elif raw.startswith(b"\xff\xd8"):
        yield b"\xff\xd8" + b"".join(_jpeg_segments(raw))
    elif raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        body = b"WEBP" + b"".join(_webp_chunks(raw))
        yield b"RIFF" + len(body).to_bytes(4, "little") + body


def _png_chunks(raw: bytes, names: Sequence[bytes]) -> Iterator[bytes]:
    """Chunks of these names, and the orientation where its checksum is right."""
    start = len(_PNG)
    while start + 12 <= len(raw):
        length = int.from_bytes(raw[start : start + 4], "big")
        name, end = raw[start + 4 : start + 8], start + 12 + length
        chunk = raw[start:end]
        if name in names or (name == b"eXIf" and _is_sound(chunk)):
            yield chunk
        start = end


def _is_sound(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _jpeg_segments(raw: bytes) -> Iterator[bytes]:
    """Segments of the pixels: all but comments and the applications' own, save Adobe's colours."""
    start = 2
    while raw[start : start + 1] == b"\xff":
        marker = raw[start + 1 : start + 2]
        end = start + 2 + int.from_bytes(raw[start + 2 : start + 4], "big")
        if marker == b"\xda" or end > len(raw):  # the pixels, which end the list of segments
            break
        is_adobe = marker == b"\xee" and end - start >= 16  # a shorter one is junk
        is_metadata = b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"
        if is_adobe or not is_metadata:
            yield raw[start:end]
        start = max(end, start + 4)
    yield raw[start:]


def _webp_chunks(raw: bytes) -> Iterator[bytes]:
    """Whole chunks without the colour profile, EXIF and XMP, and without the flags for them."""
    start = 12
    while start + 8 <= len(raw):
        name, length = raw[start : start + 4], int.from_bytes(raw[start + 4 : start + 8], "little")
        end = start + 8 + length + length % 2
        if name == b"VP8X":
            yield raw[start : start + 8] + bytes((raw[start + 8] & ~0x2C,)) + raw[start + 9 : end]
        elif name not in (b"ICCP", b"EXIF", b"XMP ") and end <= len(raw):
            yield raw[start:end]
        start = end
