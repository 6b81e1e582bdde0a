# SPDX-License-Identifier: Apache-2.0
"""A web server on 127.0.0.1 over one folder, with or without range requests, that remembers what it was asked."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


class FileServer:
    """Serves the files of ``folder`` at ``url``. ``requests`` holds (file name, Range header or "") of each GET."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.requests: list[tuple[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/mirror"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].removeprefix("/mirror/")
        wanted = request.headers.get("Range", "")
        self.requests.append((name, wanted))
        path = self.folder / name
        content = path.read_bytes() if path.is_file() else b""
        status, part, extra = (200 if path.is_file() else 404), content, None
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if match and self.ranges and status == 200:
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            status, part, extra = 206, content[first : last + 1], f"bytes {first}-{last}/{len(content)}"
        request.send_response(status)
        request.send_header("Content-Length", str(len(part)))
        if extra:
            request.send_header("Content-Range", extra)
        request.end_headers()
        request.wfile.write(part)

    @property
    def names(self) -> list[str]:
        """The files asked for, in order."""
        return [name for name, _ in self.requests]

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
