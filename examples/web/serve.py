"""Serve this folder on this computer alone, so that the page may use several threads.

    python3 serve.py [PORT]

Any static server will do; threads take the two headers of SERVER_HEADERS.
"""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SERVER_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Handler(SimpleHTTPRequestHandler):
    """Static files with those headers; the browser asks whether they have changed."""

    def end_headers(self) -> None:
        for name, value in SERVER_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def main() -> None:
    """Serve until Ctrl+C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", nargs="?", type=int, default=8000, help="0: any that is free")
    port = parser.parse_args().port
    handler = partial(Handler, directory=Path(__file__).parent)
    try:
        found = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        parser.error(f"port {port}: {error}: choose another one")
    with found as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
