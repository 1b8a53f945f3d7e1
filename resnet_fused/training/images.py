"""Image files and request bodies, opened for everybody in one way: within bounds, upright, in 8-bit RGB.

Whatever the bytes are, reading them ends in an image or in an ImageError, for at most ``MAX_BYTES`` read and
``MAX_PIXELS`` decoded. Sizes are taken from the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fused import files

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Transpose

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # others start programs, or decode without bounds
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 25 * 10**6  # a camera's 6000x4000, 100 MB when decoded
MAX_PIXELS_SLOW = 4 * 10**5  # in the formats that Pillow decodes in Python
MAX_ASPECT = 32  # a transform scales the short side to its size, so the long side can become this many times that
MAX_SCANS = 100  # of a progressive JPEG, each of which passes over the whole image

_TILE_WIDTH, _TILE_HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 322, 323, 258, 262, 274  # tags of TIFF and EXIF


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
        ImageTooLargeError: more than ``MAX_BYTES``, ``MAX_PIXELS`` (``MAX_PIXELS_SLOW`` for run-length BMP and for
            PPM in text or with an unusual maximum) or ``MAX_SCANS``.
        ImageError: no format of ``FORMATS``, broken or cut short, a side more than ``MAX_ASPECT`` times the other, or
            pixels of a kind that is refused.
    """
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise ImageTooLargeError(f"the image has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, data)
            image.load()
            turn = _turn(image)
            rgb = _eight_bits(image)
            return rgb if turn is None else rgb.transpose(turn)
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
    limit = MAX_PIXELS_SLOW if codecs & Image.DECODERS.keys() else MAX_PIXELS
    if max(width * height, tile) > limit:
        raise ImageTooLargeError(f"the image has {width}x{height} pixels; at most {limit} are decoded: scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the image is {width}x{height}; a side may be at most {MAX_ASPECT} times the other: cut it")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageTooLargeError(f"the JPEG has more than {MAX_SCANS} scans: save it anew")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image
    tags: Any = getattr(image, "tag_v2", {})
    sixteen = tags.get(_BITS, (16,)) == (16,) and tags.get(_PHOTOMETRIC, 1) == 1 and image.format in ("TIFF", "PNG")
    if (image.mode.startswith("I;16") and sixteen) or (image.mode == "I" and image.format in ("PPM", "PNG")):
        grey = np.asarray(image).astype(np.int32) >> 8  # what Pillow takes of each colour in 16 bits
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        kind = "floating point" if image.mode == "F" else "integers of an unknown range"
        raise ImageError(f"the pixels are {kind}: save the image with 8 or 16 bits per channel")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Transpose | None:
    """How the image must be turned to stand upright."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about an image that is whole otherwise
        return None
