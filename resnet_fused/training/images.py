"""The one place where image files are opened: 8-bit RGB, upright, within bounds on memory and work; or the reason.

What a file claims is checked before anything is decoded. Pillow is imported on first use.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

from resnet_fused import files

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MEMORY = 280_000_000  # bytes that one image may take while it is decoded, its file included
ASPECT = 32  # the longer side over the shorter: transforms scale the shorter one up to the model's size

# Bytes per pixel at the peak: Pillow's four, and four for a turned copy or what the decoder keeps (measured).
_PER_PIXEL = {"WEBP": 16, "JPEG": 10}
_PER_PIXEL_OF_MODE = {"CMYK": 12, "I": 12}
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"}
_MODES_16 = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # "I" of a PNG or a PPM, which have no more bits
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_REASONS = {"F": "floating-point numbers, whose range is not known", "I": "32-bit integers, whose range is not known"}
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

# Bounds on work that the number of pixels does not bound.
_PASSES = 500_000_000  # pixels times scans of a JPEG: an empty scan of 24 million pixels takes 36 ms
_DECODED_IN_PYTHON = {"ppm", "ppm_plain", "bmp_rle"}
_PYTHON_PIXELS, _PYTHON_BYTES = 500_000, 2_000_000
_COMPRESSIONS = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"),
    *("tiff_ccitt", "group3", "group4", "jpeg"),
)
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262
_TILE_WIDTH, _TILE_LENGTH, _STRIP_BYTES, _TILE_BYTES = 322, 323, 279, 325


class ImageError(ValueError):
    """This is no image that can be taken; the message says why."""


class ImageTooLarge(ImageError):
    """It would take more memory or time than one image may."""


def open_image(source: bytes | str | os.PathLike[str]) -> Any:
    """The first frame of an image as a PIL image of mode RGB, turned as its EXIF data says.

    16-bit grey is scaled to 8 bits; transparency is dropped, as torchvision's loader does.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        ImageError: it cannot be read as an image of one of ``FORMATS``, is truncated, or its pixels have no known
            range.
        ImageTooLarge: it needs more than ``MEMORY`` to be decoded, or its sides differ by more than ``ASPECT``.
        OSError: the file cannot be opened.
    """
    try:
        data = source if isinstance(source, bytes) else files.read(source, MEMORY)
    except files.FileError as error:
        raise ImageError(f"cannot be read as an image: it {error}") from error
    try:
        data, exif = _without_metadata(data) if data[:3] == b"\xff\xd8\xff" else (data, b"")
        return _opened(data, exif)
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        kind = type(error).__name__
        if kind == "DecompressionBombError":
            raise ImageTooLarge(f"has too many pixels: {error}") from error
        reason = f"it is none of {', '.join(FORMATS)}" if kind == "UnidentifiedImageError" else str(error) or kind
        raise ImageError(f"cannot be read as an image: {reason}") from error


def _opened(data: bytes, exif: bytes) -> Any:
    from PIL import Image

    file = _Metered(data)
    image: Any = Image.open(file, formats=FORMATS)
    _check(image, data)
    file.begin_pixels()
    image.load()
    turn = _TURNS.get(_orientation(exif or _exif(image)))  # a TIFF is upright already
    if image.mode in _MODES_16:
        image = _eight_bits(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _check(image: Any, data: bytes) -> None:
    """Refuse, by what the header says, what would take too much or has no meaning in 8 bits."""
    width, height = image.size
    pixels, kind = width * height, image.format
    if pixels == 0:
        raise ImageError(f"cannot be read as an image: it has {width}×{height} pixels")
    if image.mode not in _MODES | _MODES_16 or (image.mode == "I" and kind not in ("PNG", "PPM")):
        reason = _REASONS.get(image.mode, f"pixels of the kind {image.mode}")
        raise ImageError(f"holds {reason}; need 8 bits per channel, or 16 bits of grey")
    each = _PER_PIXEL_OF_MODE.get(image.mode) or _PER_PIXEL.get(kind, 8)
    need = pixels * each + len(data)
    if need > MEMORY:
        most = max(0, MEMORY - len(data)) / each / 1e6
        raise ImageTooLarge(
            f"has {pixels / 1e6:.1f} million pixels ({width}×{height}); need at most {most:.1f} million"
        )
    if max(width, height) > ASPECT * min(width, height):
        raise ImageTooLarge(f"has {width}×{height} pixels; need a longer side of at most {ASPECT} times the shorter")
    if kind == "JPEG" or (kind == "TIFF" and image.info.get("compression") == "jpeg"):
        scans = data.count(b"\xff\xda")
        if scans * pixels > _PASSES:
            raise ImageTooLarge(f"has {scans} scans of {width}×{height} pixels; need at most {_PASSES // pixels}")
    decoders = {str(tile[0]) for tile in image.tile}
    if decoders & _DECODED_IN_PYTHON and (pixels > _PYTHON_PIXELS or len(data) > _PYTHON_BYTES):
        raise ImageTooLarge(
            f"is a {kind} of a kind that is decoded slowly, with {width}×{height} pixels in {len(data) / 1e6:.1f} MB; "
            f"need at most {_PYTHON_PIXELS / 1e6} million in {_PYTHON_BYTES / 1e6} MB"
        )
    if kind == "TIFF":
        _check_tiff(image, data)


def _check_tiff(image: Any, data: bytes) -> None:
    tags = image.tag_v2
    compression = image.info.get("compression", "raw")
    if compression not in _COMPRESSIONS:
        raise ImageError(f"is a TIFF compressed by {compression}; need one of {', '.join(_COMPRESSIONS)}")
    area = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    if area > max(1 << 20, 2 * image.width * image.height):
        raise ImageTooLarge(f"is a TIFF of {image.width}×{image.height} pixels in tiles of {area / 1e6:.1f} million")
    stored = sum(int(n) for tag in (_STRIP_BYTES, _TILE_BYTES) for n in _numbers(tags.get(tag, ())))
    if stored > len(data):
        raise ImageError("cannot be read as an image: it is a truncated TIFF, or its parts overlap")
    if image.mode in _MODES_16 and (_numbers(tags.get(_BITS, 16)) != (16,) or tags.get(_PHOTOMETRIC) != 1):
        raise ImageError("is a TIFF of grey in neither 8 nor 16 bits, or with white as zero; need 0 as black")


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _eight_bits(image: Any) -> Any:
    """16-bit grey as 8 bits: 65535 becomes 255, rounded to the nearest."""
    import numpy as np
    from PIL import Image

    table = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
    values = np.asarray(image)
    return Image.fromarray(table[values if image.mode != "I" else values.clip(0, 65535)])


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
            raise ImageTooLarge("has parts besides its pixels that are too large, too many, or overlap")
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
    raise ImageTooLarge("is a JPEG of more than 10000 segments")


def _exif(image: Any) -> bytes:
    raw = image.info.get("exif", b"")
    if not raw and isinstance(profile := image.info.get("Raw profile type exif"), str):  # ImageMagick's, in hexadecimal
        try:
            raw = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            raw = b""
    return raw.removeprefix(b"Exif\0\0") if isinstance(raw, bytes) else b""


def _orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 where nothing or nonsense is said. Only this one tag is looked at."""
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
