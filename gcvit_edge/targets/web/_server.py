"""The server of one page on 127.0.0.1, and what the two say to each other.

The page (`page.js`) gets `model.onnx`, its commands as server-sent events from `commands`, and the images from `images/N`. It posts
logits to `logits` (float32, little endian) and everything else as JSON to `answer`:

    (once the runtime is loaded)     {"version": "1.30.0"}
    ["load", {}]                     {"load_ms": 310.2}
    ["infer", {"count", "shape"}]    the logits of each image 0, 1, ...; shape is (C, H, W)
    ["time", {"runs", "shape"}]      {"ms": [48.1, ...]}: image 0, so many times

and {"error": MESSAGE} instead when something fails.
"""

import json
import queue
import secrets
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GONE = "the page is gone: the browser, or the process of its tab, has ended"

_HEADERS = {  # the first three: without them a page has no shared memory, and so no threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_MAX_POST_BYTES = 16_000_000  # logits of four million classes
_PING_SECONDS = 1  # between comments on an idle connection, by which one notices that the page is gone


class PageServer(ThreadingHTTPServer):
    """Serves files by name below an address that cannot be guessed, to the one page that runs there.

    answers: what the page posted, JSON as a dict and logits as bytes. images: (N, C, H, W) float32, little endian.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.token = secrets.token_urlsafe(16)
        self.commands: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.answers: queue.Queue[dict[str, Any] | bytes] = queue.Queue()
        self.images: NDArray[np.float32] | None = None
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where `page.html` is."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/page.html"

    def close(self) -> None:
        """Ends every connection."""
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    @property
    def _page(self) -> PageServer:
        return cast(PageServer, self.server)

    def do_GET(self) -> None:  # the name that http.server looks for
        name = self._name()
        images = self._page.images
        kind, _, number = name.partition("/")
        if name == "commands":
            self._stream_commands()
        elif name in self._page.files:
            path = self._page.files[name]
            self._send(path.read_bytes(), _TYPES.get(Path(name).suffix, "application/octet-stream"))
        elif kind == "images" and number.isdigit() and images is not None and int(number) < len(images):
            self._send(images[int(number)].tobytes(), "application/octet-stream")
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        name = self._name()  # first: of who does not know the address, nothing more is read
        if name not in ("answer", "logits"):
            self.send_error(404)
            return
        size = int(self.headers["Content-Length"])
        if not 0 <= size <= _MAX_POST_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(size)
        self._page.answers.put(json.loads(body) if name == "answer" else body)
        self._send(b"", "text/plain")

    def _name(self) -> str:
        """What is asked for, "" without the token."""
        token, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        return name if secrets.compare_digest(token, self._page.token) else ""

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for header, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream_commands(self) -> None:
        self.send_response(200)
        for header, value in {**_HEADERS, "Content-Type": "text/event-stream"}.items():
            self.send_header(header, value)
        self.end_headers()
        while not self._page.closed.is_set():
            try:
                event = f"data: {json.dumps(self._page.commands.get(timeout=_PING_SECONDS))}\n\n"
            except queue.Empty:
                event = ": idle\n\n"
            try:
                self.wfile.write(event.encode())
            except OSError:
                self._page.answers.put({"error": GONE})
                return

    def log_message(self, format: str, *values: object) -> None:
        """Nothing: standard error is for people."""
