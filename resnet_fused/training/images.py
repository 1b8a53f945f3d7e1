"""Image files and request bodies, opened in one way: within bounds, upright, in 8-bit RGB.

Whatever the bytes are, reading them ends in an image or in an ImageError, for at most ``MAX_BYTES`` read and
``MAX_PIXELS`` decoded, within ``MAX_MEMORY``. Sizes are taken from the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fused import files

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # others start programs, or decode without bounds
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
MAX_BYTES = 64 * 2**20
MAX_MEMORY = 280 * 10**6  # bytes at the peak of decoding, the file's own included
MAX_PIXELS = 25 * 10**6  # a camera's 6000x4000, 100 MB when decoded
MAX_PIXELS_SLOW = 4 * 10**5  # in the formats that Pillow decodes in Python
MAX_ASPECT = 32  # a transform scales the short side to its size, so the long side can become this many times that
MAX_SCANS = 100  # of a progressive JPEG, each of which passes over the whole image
MAX_PASSED = 5 * 10**8  # pixels times scans: an empty scan of 24 million takes 36 ms

# Bytes per pixel at the peak, measured: Pillow's four, and as many for a turned copy, or more that the decoder keeps.
_BYTES, _BYTES_OF_FORMAT, _BYTES_OF_MODE = 8, {"WEBP": 16, "JPEG": 10}, {"CMYK": 12, "I": 12}
_TILE_WIDTH, _TILE_HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 322, 323, 258, 262, 274  # tags of TIFF and EXIF
_STRIP_BYTES, _TILE_BYTES = 279, 325
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


class ImageError(ValueError):
    """The bytes are no image that can be used; the message says why."""


class ImageTooLargeError(ImageError):
    """The image has too many bytes or pixels."""


def read(path: Path) -> Image.Image:
    """The image in a file: see :func:`decode`.

    Raises:
        ImageError: the file cannot be read, is no regular file, or :func:`decode` refuses its bytes.
    """
    try:
        data = files.read(path, MAX_BYTES)
    except files.FileError as error:
        raise ImageError(f"cannot be read as an image: it {error}") from error
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    return decode(data)


def decode(data: bytes) -> Image.Image:
    """The image that ``data`` holds, in mode RGB, turned as its EXIF orientation says. Of several frames, the first.

    Palettes, grey, CMYK and 1 bit become RGB as Pillow does it; of 16 bits the upper 8 are taken, transparency is
    dropped. Floating point and 32-bit integers are refused, because nothing says what is white.

    Raises:
        ImageTooLargeError: more than ``MAX_BYTES``, ``MAX_MEMORY``, ``MAX_PIXELS`` (``MAX_PIXELS_SLOW`` for run-length
            BMP and for PPM in text or with an unusual maximum), ``MAX_SCANS`` or ``MAX_PASSED``; or metadata in parts
            that are countless, large, or overlap.
        ImageError: no format of ``FORMATS``, broken or cut short, a side more than ``MAX_ASPECT`` times the other, or
            pixels of a kind that is refused.
    """
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise ImageTooLargeError(f"the image has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        data, exif = _without_metadata(data) if data[:3] == b"\xff\xd8\xff" else (data, b"")
        file = _Metered(data)
        image: Image.Image = Image.open(file, formats=FORMATS)
        _check(image, data)
        file.begin_pixels()
        image.load()
        turn = _TURNS.get(_orientation(exif or _exif(image)))  # a TIFF is upright already
        image = _eight_bits(image)
        return image if turn is None else image.transpose(Image.Transpose[turn])
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot be read as an image: need one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"cannot be read as an image: {error or type(error).__name__}") from error


def _check(image: Image.Image, data: bytes) -> None:
    """Refuse what would cost too much, by the header alone."""
    from PIL import Image

    width, height = image.size
    tags: Any = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_HEIGHT, 1)
    codecs = {codec for codec, *_ in getattr(image, "tile", ())}
    each = _BYTES_OF_MODE.get(image.mode) or _BYTES_OF_FORMAT.get(image.format or "", _BYTES)
    limit = MAX_PIXELS_SLOW if codecs & Image.DECODERS.keys() else MAX_PIXELS
    limit = min(limit, max(0, MAX_MEMORY - len(data)) // each)
    if max(width * height, tile) > limit:
        raise ImageTooLargeError(f"the image has {width}x{height} pixels; at most {limit} are decoded: scale it down")
    if codecs & Image.DECODERS.keys() and len(data) > 8 * MAX_PIXELS_SLOW:
        raise ImageTooLargeError(f"the image has {len(data)} bytes in a slow encoding: save it anew")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the image is {width}x{height}; a side may be at most {MAX_ASPECT} times the other: cut it")
    if image.format == "JPEG" or image.info.get("compression") == "jpeg":
        most = min(MAX_SCANS, MAX_PASSED // max(1, width * height))
        if data.count(b"\xff\xda") > most:
            raise ImageTooLargeError(f"the JPEG has more than {most} scans: save it anew")
    stored = (tags.get(tag, ()) for tag in (_STRIP_BYTES, _TILE_BYTES))
    if sum(int(n) for numbers in stored for n in (numbers if isinstance(numbers, tuple) else (numbers,))) > len(data):
        raise ImageError("cannot be read as an image: the TIFF is truncated, or its parts overlap")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image
    tags: Any = getattr(image, "tag_v2", {})
    sixteen = tags.get(_BITS, (16,)) == (16,) and tags.get(_PHOTOMETRIC, 1) == 1 and image.format in ("TIFF", "PNG")
    if (image.mode.startswith("I;16") and sixteen) or (image.mode == "I" and image.format in ("PPM", "PNG")):
        values = np.asarray(image)  # of each the upper 8 bits, which Pillow takes of colours in 16 bits
        values = (values.clip(0, 65535) if image.mode == "I" else values) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        kind = "floating point" if image.mode == "F" else "integers of an unknown range"
        raise ImageError(f"the pixels are {kind}: save the image with 8 or 16 bits per channel")
    premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    return (image.convert(premultiplied) if premultiplied else image).convert("RGB")


class _Metered(io.BytesIO):
    """A file in memory that ends the reading of one whose parts overlap, or are large or countless.

    Before the pixels there are few bytes: a TIFF's tags become objects of many times their size. A PNG's pixels may lie
    in chunks of 8 KB, each of which takes four reads; a GIF's blocks are read one by one before its first frame alone.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)
        self.bytes_left = 4 << 20 if data[:2] in (b"II", b"MM") else 16 << 20
        if data[:4] == b"RIFF":
            self.bytes_left += self.size
        self.reads_left = 4_000 if data[:3] == b"GIF" else 20_000

    def begin_pixels(self) -> None:
        self.bytes_left += self.size + self.size // 2
        self.reads_left += self.size // 1024

    def read(self, size: int | None = -1) -> bytes:
        got = super().read(size)
        self.bytes_left -= len(got)
        self.reads_left -= 1
        if self.bytes_left < 0 or self.reads_left < 0:
            raise ImageTooLargeError("the image has parts besides its pixels that are too large, too many, or overlap")
        return got


_NO_FILL = re.compile(rb"[^\xff]")


def _without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG's bytes without what does not change its pixels, and its EXIF data: thumbnails, profiles and comments,
    which Pillow would read into objects of any size."""
    kept, exif = [data[:2]], b""
    for marker, start, end in _segments(data):
        payload = data[start:end]
        if marker == 0xE1 and payload[4:10] == b"Exif\0\0":
            exif += payload[10:]
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # JFIF and Adobe's stay
            kept.append(payload)
    return b"".join(kept), exif


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment of a JPEG; the last, its scans, reaches to the end of the file."""
    at = 2
    for _ in range(10_000):
        at = data.find(0xFF, at)
        found = _NO_FILL.search(data, at) if at >= 0 else None
        if found is None:
            return
        marker, start, at = found[0][0], found.start() - 1, found.end()
        if marker == 0xDA:
            yield marker, start, len(data)
            return
        if not (0xD0 <= marker <= 0xD9 or marker <= 0x01):  # those stand alone, or are no markers
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
            yield marker, start, at
    raise ImageTooLargeError("the JPEG has more than 10000 segments: save it anew")


def _exif(image: Any) -> bytes:
    raw = image.info.get("exif", b"")
    if not raw and isinstance(profile := image.info.get("Raw profile type exif"), str):  # ImageMagick's, in hexadecimal
        try:
            raw = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            raw = b""
    return raw.removeprefix(b"Exif\0\0") if isinstance(raw, bytes) else b""


def _orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 where the tag is missing or invalid. Only this one tag is looked at."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for i in range(count):
            tag, kind, n, value = struct.unpack_from(f"{order}HHIH", exif, first + 2 + 12 * i)
            if (tag, kind, n) == (_ORIENTATION, 3, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:  # cut short
        pass
    return 1
