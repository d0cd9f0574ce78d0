"""Images that are named on a command line: addresses, the clipboard, HEIC."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refusal
from PIL import Image, ImageGrab

from mobilevlm.cli.image_input import given_images
from mobilevlm.errors import ImageError
from mobilevlm.image import open_image
from mobilevlm.runtime.server import download

CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that has the cat at any path but /none."""

    class Cat(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"" if self.path == "/none" else CAT.read_bytes()
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pixels(image: str) -> Any:
    return np.asarray(open_image(image))


def test_an_address_is_fetched_where_it_is_allowed(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match="nothing is fetched without --allow-urls"):
        given_images([f"{address}/cat.jpg"], allow_urls=False)
    with pytest.raises(ImageError, match="private network"):
        given_images([f"{address}/cat.jpg"], allow_urls=True)
    monkeypatch.setattr(download.download, "__defaults__", (lambda _: True, None))
    [found] = given_images([f"{address}/cat.jpg"], allow_urls=True)
    assert np.array_equal(pixels(found), pixels(str(CAT)))
    with pytest.raises(ImageError, match=r"--image: http.*/none: its server answers 404"):
        given_images([f"{address}/none"], allow_urls=True)
    monkeypatch.setattr(download, "MAX_BYTES", CAT.stat().st_size + 1)
    with pytest.raises(ImageError, match="more than"):
        given_images([f"{address}/1", f"{address}/2"], allow_urls=True)


def test_what_was_copied_is_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(CAT).convert("RGB")
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: image)
    [found] = given_images(["clipboard:"], allow_urls=False)
    assert np.array_equal(pixels(found), np.asarray(image))
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: [str(CAT)])
    assert given_images(["clipboard:"], allow_urls=False) == [str(CAT)]


def unreadable() -> None:
    raise NotImplementedError("wl-paste or xclip is required\nfor ImageGrab.grabclipboard()")


@pytest.mark.parametrize(
    ("grab", "told"),
    [
        (lambda: None, "no image is in it"),
        (lambda: ["a.png", "b.png"], "2 files are in it"),
        (unreadable, "cannot be read here (wl-paste or xclip is required for"),
    ],
)
def test_a_clipboard_without_an_image_is_told(
    grab: Any, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ImageGrab, "grabclipboard", grab)
    assert told in refusal(capsys, "run", "nano", "--image", "clipboard:", "-p", "Who?")


def test_a_heic_image_is_read() -> None:
    heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    content = io.BytesIO()
    heif.from_pillow(Image.open(CAT).convert("RGB")).save(content, quality=90)
    assert content.getvalue()[4:12] == b"ftypheic"
    found = np.asarray(open_image(content.getvalue())).astype(int)
    assert np.abs(found - pixels(str(CAT))).mean() < 8
