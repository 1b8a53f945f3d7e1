"""Image files and request bodies: bounds, depth of pixels, orientation; and bytes of any content."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import struct
import types
import zlib
from typing import Any

import numpy as np
import optional
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resnet_fused.training import DataError, images
from resnet_fused.training.data import ImageFiles

optional.needs("PIL", "torchvision")
Image: Any = importlib.import_module("PIL.Image")


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SCANS = saved(Image.new("RGB", (16, 16)), "JPEG") + b"\xff\xda" * (images.MAX_SCANS + 1)
TOO_LARGE = {
    "many pixels": (declared(6000, 5000), "6000x5000 pixels; at most 25000000"),
    "a bomb": (declared(40000, 40000), "too large"),
    "many pixels in text": (b"P3 1000 1000 255\n1 2 3", "1000x1000 pixels; at most 400000"),
    "many scans": (SCANS, "more than 100 scans"),
}
REFUSED = {
    "a thin strip": (declared(12000, 1), "12000x1; a side may be at most 32 times"),
    "floating point": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "floating point"),
    "32-bit integers": (saved(Image.new("I", (4, 4), 9), "TIFF"), "unknown range"),
    "cut short": (saved(Image.effect_noise((64, 64), 50))[:-900], "cannot be read as an image"),
    "no image": (b"nothing of the kind", "need one of JPEG"),
    "a format that starts programs": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        "need one of",
    ),
}


@pytest.fixture
def undecoded(monkeypatch):
    """No pixel may be decoded."""

    def decoded(self):
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(importlib.import_module("PIL.ImageFile").ImageFile, "load", decoded)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "reason"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_refused_by_its_header(data, reason, undecoded):
    with pytest.raises(images.ImageTooLargeError, match=reason):
        images.decode(data)


def test_a_strip_is_refused_by_its_header(undecoded):
    with pytest.raises(images.ImageError, match="12000x1"):
        images.decode(declared(12000, 1))


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(data, reason, tmp_path):
    with pytest.raises(images.ImageError, match=reason):
        images.decode(data)
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"x.png: .*{reason}"):
        ImageFiles([(str(path), 0)], np.asarray)[0]


def test_bytes_are_bounded_and_pipes_do_not_block(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    os.mkfifo(path)
    with pytest.raises(images.ImageError, match="no regular file"):
        images.read(path)
    with pytest.raises(images.ImageError, match="no regular file"):
        images.read(type(path)("/dev/zero"))
    with pytest.raises(images.ImageError, match="No such file"):
        images.read(tmp_path / "none.png")
    data = saved(Image.new("L", (4, 4)))
    path.unlink()
    path.write_bytes(data)
    assert images.read(path).size == (4, 4)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    for read, source in ((images.read, path), (images.decode, data)):
        with pytest.raises(images.ImageError, match=r"MiB|bytes"):
            read(source)


def test_every_kind_of_pixel_becomes_8_bit_rgb():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    deep = np.array([[0, 65535], [256, 40000]], np.uint16)
    scaled = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)

    def flat(*colour: int) -> Any:
        return np.full((2, 2, 3), colour, np.uint8)

    for data, expected in (
        (saved(palette), flat(10, 200, 30)),
        (saved(palette, "GIF"), flat(10, 200, 30)),
        (saved(Image.new("1", (2, 2), 1)), flat(255, 255, 255)),
        (saved(Image.new("LA", (2, 2), (9, 0))), flat(9, 9, 9)),
        (saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), flat(255, 0, 0)),
        (saved(Image.fromarray(deep)), scaled),
        (saved(Image.fromarray(deep), "TIFF"), scaled),
        (b"P5 2 2 65535\n" + deep.byteswap().tobytes(), scaled),
    ):
        image = images.decode(data)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind, orientation):
    ops = importlib.import_module("PIL.ImageOps")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    turned = Image.fromarray(pixels)
    turned.getexif()[274] = orientation
    assert np.array_equal(np.asarray(images.decode(data)), np.asarray(ops.exif_transpose(turned)))


def test_orientation_outlives_the_scaling_of_16_bits():
    exif = Image.Exif()
    exif[274] = 6
    assert images.decode(saved(Image.fromarray(np.zeros((4, 6), np.uint16)), exif=exif)).size == (4, 6)


KINDS = (("L", "PNG"), ("RGB", "JPEG"), ("P", "GIF"), ("RGB", "BMP"), ("CMYK", "TIFF"), ("RGB", "WEBP"))
SEEDS = [
    *(saved(Image.effect_noise((9, 7), 60).convert(mode), kind) for mode, kind in KINDS),
    b"P2 3 2 255\n1 2 3 4 5 6",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image file with some bytes changed, and perhaps cut."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8)):
        data[at % len(data)] = value
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.filterwarnings("ignore")  # Pillow's own about metadata
@given(data=st.one_of(st.binary(max_size=300), damaged()))
def test_any_bytes_are_an_image_or_one_error(data):
    try:
        image = images.decode(data)
    except images.ImageError as error:
        assert str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= images.MAX_PIXELS


class Body:
    """A request with the body ``chunks``, which counts what was read of it."""

    def __init__(self, chunks: list[bytes], headers: dict[str, str] | None = None) -> None:
        self.chunks, self.headers, self.read = chunks, headers or {}, 0

    async def stream(self):
        for chunk in self.chunks:
            self.read += len(chunk)
            yield chunk
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def serving():
    optional.needs("ray", "starlette")
    return importlib.import_module("resnet_fused.recipes.ray_serve")


def refused(serving: Any, intake: Any, request: Body) -> tuple[int, str]:
    with pytest.raises(serving.Refused) as caught:
        asyncio.run(intake(request))
    assert intake.held == 0
    return caught.value.status, str(caught.value)


def test_bodies_are_bounded(serving, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    intake = serving.Intake(images.decode)
    endless = Body([b"x" * 40] * 1000)
    assert refused(serving, intake, endless) == (413, "the body has more than 100 bytes")
    assert endless.read == 120
    told = Body([b"x"], {"content-length": "101"})
    assert refused(serving, intake, told)[0] == 413 and told.read == 0
    assert refused(serving, intake, Body([], {"content-length": "9" * 5000}))[0] == 413
    monkeypatch.setattr(serving, "MAX_HELD", 50)
    assert refused(serving, intake, Body([b"x" * 40] * 2))[0] == 503


def test_images_that_are_refused_have_a_status(serving):
    intake = serving.Intake(images.decode)
    assert refused(serving, intake, Body([declared(6000, 5000)]))[0] == 413
    for data, reason in REFUSED.values():
        status, told = refused(serving, intake, Body([data[:9], data[9:]]))
        assert status == 400 and reason in told
    assert asyncio.run(intake(Body([SEEDS[0][:30], SEEDS[0][30:]]))).size == (9, 7)


def test_few_images_are_decoded_at_once(serving, monkeypatch):
    busy, most = [0], [0]

    def decode(data: bytes) -> bytes:
        return data

    async def in_thread(function: Any, *arguments: Any) -> Any:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        await asyncio.sleep(0)
        busy[0] -= 1
        return function(*arguments)

    monkeypatch.setattr(serving, "asyncio", types.SimpleNamespace(**{**vars(asyncio), "to_thread": in_thread}))

    async def all_at_once() -> list[Any]:
        intake = serving.Intake(decode)
        return await asyncio.gather(*(intake(Body([b"%d" % i])) for i in range(20)))

    assert asyncio.run(all_at_once()) == [b"%d" % i for i in range(20)]
    assert most[0] == serving.DECODERS


@pytest.mark.filterwarnings("ignore")
@given(
    chunks=st.lists(st.one_of(st.binary(max_size=99), damaged()), max_size=3),
    length=st.one_of(st.none(), st.text(max_size=30)),
)
@example(chunks=[], length="²")
def test_any_body_is_answered(serving, chunks, length):
    intake = serving.Intake(images.decode)
    try:
        asyncio.run(intake(Body(chunks, {} if length is None else {"content-length": length})))
    except serving.Refused as error:
        assert error.status in (400, 413) and json.dumps(str(error))
    assert intake.held == 0
