"""Images from strangers: what is read, what is refused in one line, and in how much memory."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features
from PIL.TiffImagePlugin import TiffImageFile

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, ImageWarning
from mobilevlm.image import Room, RoomFor, open_image, read_pixels
from mobilevlm.input_spec import FixedImage

SPECS = [
    FixedImage(56, 56, aspect, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for aspect in ("pad", "crop", "resize")
]


def noise(width: int = 40, height: int = 30) -> Image.Image:
    values = np.linspace(0, 190, width * height * 3).reshape(height, width, 3)
    values = values + np.random.default_rng(0).integers(0, 64, values.shape)
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def left(size: float) -> RoomFor:
    """Memory of this size, whatever is needed."""
    return lambda needed: Room(size, "a test")


def message_of(source: Any, room: RoomFor | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        read_pixels(source, SPECS[0], room)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 500, text
    return text


# Formats


@pytest.fixture
def gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Ghostscript that leaves a trace when it is started."""
    trace, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return trace


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6" + b"\0" * 26])
def test_postscript_starts_no_program_whatever_its_name(
    start: bytes, gs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(start + b"%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    assert "photo.jpg: PostScript is not a raster image: convert it" in message_of(path)
    assert not gs.exists()


@pytest.mark.parametrize("kind", ["PDF", "EPS", "PCX", "SPIDER", "IM", "MSP", "ICNS", "XBM"])
def test_only_formats_of_the_list_are_opened(kind: str) -> None:
    image = noise().convert("F" if kind == "SPIDER" else "1" if kind in ("MSP", "XBM") else "RGB")
    content = encoded(image.resize((128, 128)), kind)
    if kind == "PCX":
        assert read_pixels(content, SPECS[0]).shape == (56, 56, 3)
    else:
        assert "image" in message_of(content)


def test_a_git_lfs_pointer_is_not_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476\n")
    told = message_of(path)
    assert "photo.jpg: a Git LFS pointer" in told and "PNG" not in told


def test_heic_is_named_with_the_package_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + b"\0" * 200)
    assert "IMG_1.HEIC: a HEIC image" in (told := message_of(path))
    assert "pip install pillow-heif" in told


def test_a_decoder_that_raises_anything_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(noise(), "BMP")
    Image.init()
    factory, accept = Image.OPEN["BMP"]
    for error in (
        AttributeError("a\nb"),
        RuntimeError(),
        KeyError(1),
        MemoryError(),
        RecursionError("x"),
    ):

        def broken(*given: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setitem(Image.OPEN, "BMP", (broken, accept))
        assert "damaged BMP image" in message_of(content)

        def late(*given: Any, error: Exception = error) -> Any:
            image = factory(*given)
            monkeypatch.setattr(image, "load", lambda: broken(error=error))
            return image

        monkeypatch.setitem(Image.OPEN, "BMP", (late, accept))
        assert "damaged BMP image" in message_of(content)


# EXIF


OddTag = tuple[int, int, int, bytes]
"""Tag, form, count and value of an entry."""


def odd_exif(order: str, odd: OddTag, orientation: int) -> bytes:
    """EXIF with an orientation and one more tag."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little" if order == "II" else "big")

    short = number(orientation, 2) + b"\0\0"
    entries = [(0x0112, 3, 1, short), odd]
    body = b"".join(number(a, 2) + number(b, 2) + number(c, 4) + d for a, b, c, d in entries)
    head = order.encode() + number(42, 2) + number(8, 4)
    return b"Exif\0\0" + head + number(2, 2) + body + number(0, 4) + b"\0" * 64


ODD: list[OddTag] = [
    (0x0128, 2, 4, b"abc\0"), (0x011A, 7, 4, b"\1\2\3\4"), (0x0131, 3, 2, b"\1\0\2\0"),
    (0x8769, 2, 4, b"xyz\0"), (0x8825, 4, 1, b"\xff\xff\xff\xff"), (0x0132, 12, 1, b"\0\0\0\0"),
    (0x927C, 99, 9, b"\0\0\0\0"), (0x0100, 5, 2**31, b"\0\0\0\0"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{odd[0]:#x}-{odd[1]}-{odd[2]}")
def test_orientation_is_heeded_beside_an_odd_tag(odd: OddTag, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    for order in ("II", "MM"):
        exif = odd_exif(order, odd, orientation=6)
        image = noise()
        plain = np.asarray(open_image(encoded(image, kind, **options)))
        if kind == "TIFF":
            tags = {0x0112: 6, 0x0131: "odd", 0x8769: 7}
            content = encoded(image, kind, tiffinfo=tags)
        else:
            content = encoded(image, kind, exif=exif, **options)
        assert np.array_equal(np.asarray(open_image(content)), np.rot90(plain, -1))


def test_damaged_exif_is_named_and_the_image_read() -> None:
    content = encoded(noise(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 9)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_pixels(content, SPECS[0])
    ours = [str(item.message) for item in told if item.category is ImageWarning]
    assert all("damaged EXIF" in text for text in ours)


# Wide numbers


@pytest.mark.parametrize(
    ("values", "full"),
    [
        (np.linspace(0, 1, 1200, dtype=np.float32), 1),
        (np.linspace(0, 255, 1200, dtype=np.float32), 255),
        (np.linspace(0, 65535, 1200, dtype=np.float32), 65535),
        (np.linspace(0, 3e6, 1200, dtype=np.float32), 3e6),
        (np.linspace(0, 255, 1200).astype(np.int32), 255),
        (np.linspace(0, 60000, 1200).astype(np.int32), 65535),
        (np.linspace(0, 2**31 - 1, 1200).astype(np.int32), 2**31 - 1),
    ],
    ids=lambda value: f"{value.dtype} {value.max():.0f}" if isinstance(value, np.ndarray) else "",
)
def test_wide_numbers_are_scaled_by_their_range(values: NDArray[Any], full: float) -> None:
    wide = values.reshape(30, 40)
    pixels = np.asarray(open_image(encoded(Image.fromarray(wide), "TIFF")))
    assert np.abs(pixels[..., 1] - wide * (255.0 / full)).max() <= 1


def test_unsigned_numbers_of_32_bits_are_scaled_by_their_range() -> None:
    wide = np.linspace(0, 2**32 - 1, 1200).astype(np.uint32).reshape(30, 40)
    signed = encoded(Image.fromarray(wide.view(np.int32)), "TIFF")
    entry = b"\x53\1\3\0\1\0\0\0"  # the tag that says whether numbers have a sign
    content = signed.replace(entry + b"\2", entry + b"\1")
    with Image.open(io.BytesIO(content)) as image:
        assert isinstance(image, TiffImageFile)
        assert image.mode == "I" and image.tag_v2[339] == (1,)
    pixels = np.asarray(open_image(content))
    assert np.abs(pixels[..., 0] - wide * (255.0 / (2**32 - 1))).max() <= 1


@pytest.mark.parametrize("odd", [-1.0, float("nan"), float("inf")])
def test_numbers_without_a_scale_are_refused(odd: float) -> None:
    values = np.full((30, 40), 0.5, np.float32)
    values[3, 4] = odd
    assert "scale them to 0 … 255 first" in message_of(encoded(Image.fromarray(values), "TIFF"))


# JPEG without its end


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_a_jpeg_without_its_end_mark_is_read_with_a_warning(
    options: dict[str, Any], tmp_path: Path
) -> None:
    content = encoded(noise(200, 130), "JPEG", quality=95, **options)
    path = tmp_path / "cut.jpg"
    for rest in (b"", b"\0" * 5):
        path.write_bytes(content[:-2] + rest)
        with pytest.warns(ImageWarning, match=r"cut\.jpg: a JPEG without its end mark"):
            found = read_pixels(path, SPECS[0])
        assert np.array_equal(found, read_pixels(content, SPECS[0]))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
def test_a_jpeg_that_lacks_pixels_is_refused(share: float, options: dict[str, Any]) -> None:
    content = encoded(noise(200, 130), "JPEG", quality=95, **options)
    assert "damaged JPEG image" in message_of(content[: int(share * len(content))])


# Size and memory


def png_of(width: int, height: int, mode: str = "RGB") -> bytes:
    """A PNG of one colour, written in bands."""
    kind, channels = {"RGB": (2, 3), "RGBA": (6, 4), "L": (0, 1)}[mode]

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + name + body + check

    packer, row = zlib.compressobj(1), b"\0" + b"\x64" * (width * channels)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, kind, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def test_our_limit_of_pixels_holds_whatever_pillows_is(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "20000 × 20000 is more than 89478485 pixels" in message_of(bytes(content))
    lazy = Image.open(io.BytesIO(content))
    assert "20000 × 20000" in message_of(lazy)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "more than 1000 pixels" in message_of(encoded(noise(), "PNG"))


@pytest.mark.parametrize("kind", ["VP8X", "VP8L"])
def test_a_webp_canvas_is_checked_before_it_is_allocated(kind: str) -> None:
    bits = (16383 | 16383 << 14).to_bytes(4, "little")
    body = b"\0" * 4 + (16382).to_bytes(3, "little") * 2 if kind == "VP8X" else b"\x2f" + bits
    content = b"RIFF\xff\0\0\0WEBP" + kind.encode() + b"\x0a\0\0\0" + body + b"\0" * 20
    assert "pixels" in message_of(content)


def test_an_icon_whose_png_is_larger_than_it_says_is_refused_by_its_need() -> None:
    inner = png_of(3000, 3000)
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inner).to_bytes(4, "little") + b"\x16\0\0\0"
    content = b"\0\0\1\0\1\0" + entry + inner
    assert "are left (a test)" in message_of(content, left(20e6))


MEASURE = """
import sys, warnings
from pathlib import Path
from PIL import Image
Image.init()
from mobilevlm.errors import ImageWarning
from mobilevlm.image import Room, read_pixels, open_image
from mobilevlm.input_spec import FixedImage
from mobilevlm.console.terminal import shown
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
spec = FixedImage(56, 56, sys.argv[2], (0.5,) * 3, (0.5,) * 3)
warnings.simplefilter("ignore", ImageWarning)
read_pixels(Path(sys.argv[3]), spec)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
read_pixels(Path(sys.argv[1]), spec, lambda needed: Room(float(sys.argv[4]), "a test"))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "aspect", "room"),
    [
        ("rgb.png", "pad", 24e6), ("rgba.png", "crop", 24e6), ("grey.png", "crop", 6e6),
        ("turned.png", "pad", 24e6), ("deep.tif", "resize", 60e6), ("photo.jpg", "crop", 6e6),
        ("photo.webp", "pad", 121e6), ("photo.avif", "crop", 109e6),
    ],
)  # fmt: skip
def test_an_image_takes_no_more_than_its_room(
    name: str, room: float, aspect: str, tmp_path: Path
) -> None:
    kind = name.rpartition(".")[2]
    if kind in ("webp", "avif") and not features.check(kind):
        pytest.skip(f"this Pillow reads no {kind}")
    small, path = tmp_path / f"small.{kind}", tmp_path / name
    noise().save(small)
    size, exif = (3000, 2000), Image.Exif()
    room += 4 * 56 * 3000  # rows of the resized image
    if name in ("rgb.png", "rgba.png", "grey.png"):
        path.write_bytes(png_of(*size, {"rgb": "RGB", "rgba": "RGBA", "grey": "L"}[path.stem]))
    elif name == "turned.png":
        exif[0x0112] = 6
        Image.new("RGB", size, "red").save(path, exif=exif, compress_level=1)
    elif name == "deep.tif":
        Image.fromarray(np.full(size[::-1], 7000, np.uint16)).save(path)
    else:
        options: dict[str, dict[str, Any]] = {"webp": {"method": 0}, "avif": {"speed": 10}}
        Image.new("RGB", size, "red").save(path, **options.get(kind, {}))
    command = [sys.executable, "-c", MEASURE, str(path), aspect, str(small), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < room + 16e6  # strips and buffers of decoders


def test_a_jpeg_beyond_its_room_is_read_smaller_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    noise(1600, 1200).save(path, quality=95)
    with pytest.warns(ImageWarning, match=r"photo\.jpg: 1600 × 1200 .* \(a test\): read at 1/4"):
        found = read_pixels(path, SPECS[1], left(0.9e6))
    whole = read_pixels(path, SPECS[1])
    assert np.abs(found.astype(int) - whole).mean() < 3
    assert "are left (a test): scale it down" in message_of(path, left(0.1e6))


# Ways to give an image


def test_every_way_to_give_an_image_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "an image, é%20.png"
    noise().save(path)
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    moved = io.BytesIO(content)
    moved.seek(17)

    class Stream(io.RawIOBase):
        """Cannot seek, and gives a few bytes at a time."""

        rest = io.BytesIO(content)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            part = self.rest.read(min(len(buffer), 100))
            buffer[: len(part)] = part
            return len(part)

    with path.open("rb") as file:
        forms: list[Any] = [
            str(path), path, path.as_uri(), path.as_uri().replace("file://", "file://localhost"),
            content, bytearray(content), memoryview(content), io.BytesIO(content), moved, file,
            Stream(), io.BufferedReader(Stream()), f"data:image/png;base64,{text}",
            f"DATA:;base64,{text.rstrip('=')}", "data:image/png;base64," + "\n".join(text),
            "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
            Image.open(path), np.asarray(Image.open(path)),
        ]  # fmt: skip
        Stream.rest.seek(0)
        for number, form in enumerate(forms):
            if isinstance(form, io.BufferedReader) and form is not file:
                Stream.rest.seek(0)
            found = np.asarray(open_image(form))
            assert np.array_equal(found, np.asarray(noise())), number


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://example.com/cat.png", "not fetched from the network"),
        ("HTTP://example.com/cat.png", "not fetched from the network"),
        ("ftp://example.com/cat.png", "expected a path, a file:/// URI or a data: URI"),
        ("file://elsewhere/cat.png", "expected a path, a file:/// URI"),
        ("data:image/png;base64", "without content"),
        ("data:image/png;base64,%%%", "damaged base64"),
        ("data:image/png;base64,iVBORw0KGgo=", "damaged PNG"),
        ("\0", "no such image file"),
        ("x" * 5000, "x…"),
        (io.StringIO("text"), "open it in binary mode"),
        (7, "found int"),
        (None, "found NoneType"),
        (b"", "not an image"),
    ],
    ids=lambda value: re.sub(r" at 0x\w*", "", str(value))[:30],
)
def test_what_is_no_image_is_one_line(given: Any, told: str) -> None:
    assert told in message_of(given)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "not a regular file" in message_of(pipe)
    assert "not a regular file" in message_of("/dev/zero")


def test_what_a_person_typed_is_cut_after_200_characters() -> None:
    assert shown("a" * 200) == "a" * 200
    assert shown("a" * 5000) == "a" * 200 + "…"
    assert shown("a\nb\x1b[31m") == "a b\ufffd[31m"
    assert message_of("data:image/png;base64," + "!" * 100_000).count("!") < 100


def test_no_filter_of_warnings_is_changed_while_an_image_is_opened() -> None:
    seen = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            seen.append(list(warnings.filters))
            return super().read(size)

    before = list(warnings.filters)
    read_pixels(Watched(encoded(noise(), "PNG")), SPECS[0])
    assert seen and all(filters == before for filters in seen)
