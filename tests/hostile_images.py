"""Small files that claim, or take, much.

As a program it opens each in a process of its own, and prints a line of JSON: its name, what came of it, the seconds
that took and the peak of memory in MB.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable

from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def blank(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    return encoded(Image.new(mode, (width, height)), kind, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, before: bytes = b"", bits: int = 8, colours: int = 2) -> bytes:
    """A black PNG, made without its pixels ever being in memory."""
    row = 1 + width * {0: 1, 2: 3, 6: 4}[colours] * bits // 8
    press, parts = zlib.compressobj(9), []
    for _ in range(height):
        parts.append(press.compress(bytes(row)))
    body = b"".join(parts) + press.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def scans() -> bytes:
    """A progressive JPEG whose last scan, which changes nothing, comes 2000 times more."""
    whole = blank(5000, 4000, "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + 2000 * last + whole[-2:]


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    whole = blank(64, 64, "JPEG")
    parts = [bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments]
    return whole[:2] + b"".join(parts) + whole[2:]


def directory(entries: int, each: int, start: int) -> bytes:
    """A TIFF directory whose entries all have the same ``each`` bytes from ``start``."""
    lines = (struct.pack("<HHII", 40000 + i, 7, each, start) for i in range(entries))
    return struct.pack("<H", entries) + b"".join(lines) + bytes(4)


def exif_entries() -> bytes:
    body = b"II*\0" + struct.pack("<I", 8) + directory(5000, 60_000, 8)
    return with_segments(*[(0xE1, b"Exif\0\0" + part) for part in (body, *[bytes(65_000)] * 20)])


def tiff(*tags: tuple[int, int, int, int], size: int = 64, after: bytes = b"", width: int = 64) -> bytes:
    own = {256: (4, 1, width), 257: (4, 1, size), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    own |= {273: (4, 1, 8), 278: (4, 1, size), 279: (4, 1, 64)}
    own |= {tag: (kind, count, value) for tag, kind, count, value in tags}
    lines = [struct.pack("<HHII", tag, *own[tag]) for tag in sorted(own)]
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(lines)) + b"".join(lines) + bytes(4) + after


def tiff_entries() -> bytes:
    return tiff(*[(40000 + i, 7, 1_000_000, 8) for i in range(2000)], after=bytes(1_000_000))


def tiff_tiles() -> bytes:
    body = zlib.compress(bytes(400_000_000))
    at = 8 + 2 + 12 * 12 + 4
    tags = [(322, 4, 1, 20_000), (323, 4, 1, 20_000), (324, 4, 1, at), (325, 4, 1, len(body)), (259, 3, 1, 8)]
    return tiff(*tags, after=body)


def gif_comments() -> bytes:
    whole = blank(8, 8, "GIF", "P")
    at = 13 + 3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 0x80 else 13
    return whole[:at] + b"\x21\xfe" + 100_000 * (b"\xff" + bytes(255)) + b"\0" + whole[at:]


def webp_canvas() -> bytes:
    whole = bytearray(blank(16, 16, "WEBP", lossless=True))
    at = whole.index(b"VP8L") + 9
    bits = int.from_bytes(whole[at : at + 4], "little") >> 28 << 28 | 12_999 << 14 | 12_999
    whole[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(whole)


def bmp_runs() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 256, 0)
    body = b"\x01\x00" * 3_000_000
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + body


IMAGES: dict[str, Callable[[], bytes]] = {
    "a line": lambda: png(1, 12_000),
    "a long strip": lambda: png(12_000, 10),
    "169 million pixels": lambda: png(13_000, 13_000, colours=0),
    "2 thousand million pixels": lambda: chunk_of_header(50_000, 50_000),
    "the largest that is taken": lambda: png(6000, 4000),
    "as large, with 16 bits": lambda: png(6000, 4000, bits=16, colours=0),
    "as large, as a progressive JPEG": lambda: blank(6000, 4000, "JPEG", progressive=True, subsampling=0),
    "as large as CMYK may be": lambda: blank(5700, 4000, "JPEG", "CMYK", progressive=True, subsampling=0),
    "as large as WebP may be": lambda: blank(4300, 4000, "WEBP", "RGBA", lossless=True),
    "as large, turned": lambda: turned(6000, 4000),
    "too large for WebP": webp_canvas,
    "scans without end": scans,
    "EXIF entries that overlap": exif_entries,
    "segments without end": lambda: with_segments(*[(0xFE, b"")] * 1_000_000),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "chunks without end": lambda: png(8, 8, before=1_000_000 * chunk(b"teSt", b"")),
    "text of 1 GB": lambda: png(8, 8, before=20 * chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    "TIFF entries that overlap": tiff_entries,
    "a tile of 400 million pixels": tiff_tiles,
    "strips that overlap": lambda: tiff(
        (279, 4, 20_000, 300), (273, 4, 20_000, 300), size=20_000, width=999, after=b"\1" * 90_000
    ),
    "numbers as text": lambda: b"P3 4000 4000 255\n" + b"1 " * 10_000_000,
    "an odd maximum": lambda: b"P6 4000 2000 100\n" + bytes(24_000_000),
    "runs of one pixel": bmp_runs,
    "comments without end": gif_comments,
    "a large canvas": lambda: blank(8, 8, "GIF", "P").replace(struct.pack("<HH", 8, 8), b"\xff\xff\xff\xff", 1),
}


def chunk_of_header(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return blank(width, height, "JPEG", exif=exif)


def in_a_child(run: Callable[[], bytes]) -> bytes | None:
    """What ``run`` gives in a process of its own; None where that dies."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "wb") as pipe:
            pipe.write(run())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    return None if os.waitpid(child, 0)[1] else answer


def opened(data: bytes) -> bytes:
    from resnet_fused.training.images import ImageError, decode

    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        came = "an image of {}x{}".format(*decode(data).size)
    except ImageError as error:
        came = f"{type(error).__name__}: {error}"
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return json.dumps({"came": came, "seconds": time.perf_counter() - begun, "peak": peak}).encode()


def main() -> None:
    import resnet_fused.training.images  # noqa: F401, once for all

    for name, make in IMAGES.items():
        data = in_a_child(make)
        answer = None if data is None else in_a_child(lambda data=data: opened(data))
        print(json.dumps({"name": name, **json.loads(answer or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
