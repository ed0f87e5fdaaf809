"""A package index on this machine, in front of a real one, that counts what is downloaded."""

from __future__ import annotations

import html
import re
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple

ENOUGH_WAITING_CONNECTIONS = 1024
UPSTREAM_SECONDS = 60.0
HREF = re.compile(r'href="([^"]*)"')
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Answer(NamedTuple):
    """What the real index answered."""

    status: int
    kind: str
    body: bytes


class CountingIndex:
    """Serves the simple API of the index UPSTREAM (its URL, without package) inside ``with``.

    What upstream answered is kept in memory, so that it is asked once for each page and file
    however often a client asks; all of the client's requests are counted.
    """

    def __init__(self, upstream: str, certificates: str | None = None) -> None:
        """CERTIFICATES is a file of certificates to trust, if not the system's."""
        self.downloads: Counter[str] = Counter()
        """How often each file was asked for as a whole, by name."""
        self.ranges: Counter[str] = Counter()
        """How often a part of each file was asked for; uv reads a wheel's metadata so."""
        self._upstream = upstream.rstrip("/")
        self._trust = ssl.create_default_context(cafile=certificates)
        self._origins: dict[str, str] = {}
        self._answers: dict[str, Answer] = {}
        self._fetching: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"
        """What the client is to use as its index."""

    def __enter__(self) -> CountingIndex:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def forget_counts(self) -> None:
        """Count from nothing again."""
        with self._lock:
            self.downloads.clear()
            self.ranges.clear()

    def count(self, file: str, part: bool) -> None:
        """Count a request for the whole or a PART of FILE."""
        with self._lock:
            (self.ranges if part else self.downloads)[file] += 1

    def page(self, package: str) -> Answer:
        """The list of PACKAGE's files, each at this server's address instead of its own."""
        url = f"{self._upstream}/{package}/"
        answer = self._fetched(url)
        if answer.status != HTTPStatus.OK:
            return answer
        text = HREF.sub(lambda match: f'href="{self._moved(url, match[1])}"', answer.body.decode())
        return Answer(answer.status, "text/html", text.encode())

    def _moved(self, page: str, href: str) -> str:
        origin, mark, digest = urllib.parse.urljoin(page, html.unescape(href)).partition("#")
        name = origin.rpartition("/")[2]
        self._origins[urllib.parse.unquote(name)] = origin
        return html.escape(f"/files/{name}{mark}{digest}")

    def file(self, name: str) -> Answer:
        """A file that some page has listed, or the metadata beside it (PEP 658)."""
        wheel = name[: -len(".metadata")] if name.endswith(".metadata") else name
        origin = self._origins.get(wheel)
        if origin is None:
            return Answer(HTTPStatus.NOT_FOUND, "text/plain", b"no page has listed it")
        return self._fetched(origin + name[len(wheel) :])

    def _fetched(self, url: str) -> Answer:
        with self._lock:
            fetching = self._fetching.setdefault(url, threading.Lock())
        with fetching:  # those who ask for the same wait for one answer
            if url not in self._answers:
                self._answers[url] = self._ask(url)
            return self._answers[url]

    def _ask(self, url: str) -> Answer:
        request = urllib.request.Request(url, headers={"Accept": "text/html, */*;q=0.1", "User-Agent": "tests"})
        try:
            with urllib.request.urlopen(request, timeout=UPSTREAM_SECONDS, context=self._trust) as answer:
                return Answer(answer.status, answer.headers.get_content_type(), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, "text/plain", error.read())


class _Server(ThreadingHTTPServer):
    request_queue_size = ENOUGH_WAITING_CONNECTIONS
    daemon_threads = True
    block_on_close = False  # a client may keep its connection for longer than the test lasts

    def __init__(self, index: CountingIndex) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.index = index

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed or cancels is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    server: _Server

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def _serve(self, with_body: bool) -> None:
        folder, _, name = urllib.parse.unquote(self.path).strip("/").partition("/")
        if folder == "files":
            part = self._range()
            if with_body:
                self.server.index.count(name, part=part is not None)
            self._send(self.server.index.file(name), part, with_body, "max-age=31536000, immutable")
        elif folder == "simple" and name:
            self._send(self.server.index.page(name), None, with_body, "max-age=600")
        else:
            self._send(Answer(HTTPStatus.NOT_FOUND, "text/plain", b""), None, with_body, "no-store")

    def _range(self) -> tuple[str, str] | None:
        """First and last byte of the part that is asked for; the last alone counts from the end."""
        match = RANGE.fullmatch(self.headers.get("Range", ""))
        return (match[1], match[2]) if match else None

    def _send(self, answer: Answer, part: tuple[str, str] | None, with_body: bool, caching: str) -> None:
        status, body = answer.status, answer.body
        size = len(body)
        start, end = 0, size
        if part is not None and status == HTTPStatus.OK:
            first, last = part
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            status = HTTPStatus.PARTIAL_CONTENT
        self.send_response(status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Cache-Control", caching)
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if with_body:
            self.wfile.write(memoryview(body)[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the counts say it."""
