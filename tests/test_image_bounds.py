"""Images of any content: an 8-bit upright picture, or one clear error, within bounds on memory and work."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import optional
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused.training import image_folder, images
from resnet_fused.training.data import _samples
from resnet_fused.training.images import ImageError, ImageTooLargeError, decode

optional.needs("PIL", "numpy")
Image, ImageOps = importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageOps")
np, hostile_images = importlib.import_module("numpy"), importlib.import_module("hostile_images")
blank, encoded = hostile_images.blank, hostile_images.encoded


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """Patches of colours, so that a turn or a wrong scale shows."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8)))


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


HOSTILE = {
    "a line": "ImageError: the image is 1x12000",
    "169 million pixels": "ImageTooLargeError: the image has 13000x13000 pixels",
    "the largest that is taken": "an image of 6000x4000",
    "as large, with 16 bits": "an image of 6000x4000",
    "as large, as a progressive JPEG": "an image of 6000x4000",
    "as large as CMYK may be": "an image of 5700x4000",
    "as large as WebP may be": "an image of 4300x4000",
    "as large, turned": "an image of 4000x6000",
    "too large for WebP": "ImageTooLargeError: the image has",
    "scans without end": "ImageTooLargeError: the JPEG has more than 25 scans",
    "EXIF entries that overlap": "an image of 64x64",
    "segments without end": "ImageTooLargeError: the JPEG has more than 10000 segments",
    "fill bytes": "ImageError: cannot be read as an image",
    "chunks without end": "ImageTooLargeError: the image has parts",
    "comments without end": "ImageTooLargeError: the image has parts",
    "numbers as text": "ImageTooLargeError",
}


def test_no_file_takes_more_than_its_share():
    """A picture or a reason, each within 300 MB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(images.__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", hostile_images.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == list(hostile_images.IMAGES)
    for line in lines:
        name = line["name"]
        assert "came" in line, f"{name}: the process died"
        assert line["came"].startswith(HOSTILE.get(name, ("Image", "an image"))), line
        assert line["peak"] < 300, line


def test_links_in_a_circle_end(tmp_path):
    """Each link doubles the ways to every image, for as long as a path may be."""
    torchvision_folder = optional.torchvision().datasets.folder
    for name in ("a", "b"):
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        for i in range(3):
            (tmp_path / "data" / name / ("deep" if i % 2 else "") / f"{i}.PNG").write_bytes(blank(8, 8, "PNG"))
    (tmp_path / "data" / "b" / "notes.txt").write_text("no image")
    expected = torchvision_folder.make_dataset(str(tmp_path / "data"), extensions=(".png",))
    data = image_folder(tmp_path / "data", 8, 0)
    assert _samples(tmp_path / "data")[1] == expected
    for i in range(3):
        (tmp_path / "data" / "a" / "deep" / f"up{i}").symlink_to("..")
    again = image_folder(tmp_path / "data", 8, 0)
    assert (again.train.samples, again.val.samples, again.digest) == (data.train.samples, data.val.samples, data.digest)


def test_bounds_are_checked_before_anything_is_decoded(monkeypatch):
    """So that the cost of a refusal does not grow with what a file claims."""

    def decoded(*arguments: object) -> None:
        raise AssertionError("pixels were decoded")

    files = {
        "6000x6000 pixels; at most 25000000": blank(6000, 6000, "PNG", "1"),
        "4400x4000 pixels; at most 17": blank(4400, 4000, "WEBP"),
        "5000x4700 pixels; at most 2324": blank(5000, 4700, "JPEG", "CMYK"),
    }
    monkeypatch.setattr(Image.core, "new", decoded)
    for told, data in files.items():
        with pytest.raises(ImageTooLargeError, match=told):
            decode(data)


def test_a_body_counts_as_memory():
    image = blank(4300, 4000, "WEBP", "RGBA", lossless=True)
    assert decode(image).size == (4300, 4000)
    with pytest.raises(ImageTooLargeError, match="at most 16"):
        decode(image + bytes(20_000_000))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=["JPEG", "PNG", "WebP", "TIFF", "TIFF, LZW"],
)
def test_images_are_upright(kind, options, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(picture(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (values(decode(data)) == values(expected)).all()


def test_odd_exif_data_changes_nothing():
    plain = values(decode(encoded(picture(), "PNG")))
    for exif in (
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0",
    ):
        assert (values(decode(encoded(picture(), "PNG", exif=b"Exif\0\0" + exif))) == plain).all()


GREY = np.asarray(picture().convert("L")).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_8(kind):
    wide = Image.fromarray((GREY * 256 + 200).astype(np.uint16))
    assert (values(decode(encoded(wide, kind))) == GREY[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "PA", "YCbCr"])
def test_other_kinds_of_pixels_become_rgb(mode):
    kind = "PNG" if mode in ("1", "L", "LA", "P", "RGBA") else "TIFF"
    data = encoded(picture().convert(mode), kind)
    assert (values(decode(data)) == values(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_an_animation_gives_its_first_frame():
    first, second = picture(), ImageOps.invert(picture())
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        alone = decode(encoded(first, kind, **options))
        both = decode(encoded(first, kind, save_all=True, append_images=[second], **options))
        assert (values(both) == values(alone)).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_a_truncated_image_is_refused(kind):
    data = encoded(picture(400, 240), kind)
    for length in (0, 1, 2, 10, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError, match="cannot be read as an image"):
            decode(data[:length])


SEEDS = [
    *(encoded(picture(), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")),
    encoded(picture(), "JPEG", progressive=True),
    encoded(picture(), "TIFF", compression="tiff_adobe_deflate"),
    encoded(Image.fromarray((GREY * 257).astype(np.uint16)), "TIFF"),
    encoded(picture(), "GIF", save_all=True, append_images=[ImageOps.invert(picture())]),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Bytes with a known beginning, or an image with some of its bytes replaced, removed or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 8))):
        at, length = draw(st.integers(0, min(200, len(data)))), draw(st.integers(0, 12))
        data[at : at + length] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[at : at + 2 * length]))))
    return bytes(data)


@given(st.one_of(st.binary(max_size=300), damaged()))
def test_bytes_of_any_kind_give_a_picture_or_the_reason(data):
    try:
        image = decode(data)
    except ImageError as error:
        assert str(error)
        return
    assert image.mode == "RGB" and image.width * image.height <= images.MAX_PIXELS
    assert max(image.size) <= images.MAX_ASPECT * min(image.size)
