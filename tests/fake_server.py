"""A local HTTP server in a thread that answers as it is told, or fails in one of the ways servers fail."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """status, body (JSON, or bytes as they are), headers. fault: reset, hang, drip or cut: how the connection fails."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""


@dataclass
class Asked:
    """A request as the server saw it."""

    path: str
    body: Any
    headers: dict[str, str]
    number: int


class FakeServer:
    """answer: what each request gets. asked: the requests so far."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.answer, self.asked, self.over, self.lock = answer, list[Asked](), threading.Event(), threading.Lock()
        self.most = self.now = 0  # requests under way at once
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.handle(self, None)

            def do_POST(self) -> None:
                fake.handle(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self.lock:
            asked = Asked(handler.path, body, {k.lower(): v for k, v in handler.headers.items()}, len(self.asked))
            self.asked.append(asked)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self.write(handler, self.answer(asked))
        except OSError:
            pass
        finally:
            with self.lock:
                self.now -= 1

    def write(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if answer.fault == "hang":
            self.over.wait(30)
        if answer.fault in ("hang", "reset"):
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return handler.connection.close()
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(raw) + (10 if answer.fault == "cut" else 0)))
        handler.end_headers()
        if answer.fault == "drip":
            for byte in raw:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if self.over.wait(0.05):
                    break
        else:
            handler.wfile.write(raw)
        if answer.fault:
            handler.close_connection = True
        return None

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[FakeServer]:
    server = FakeServer(answer)
    try:
        yield server
    finally:
        server.close()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def chat(content: Any, *, model: str = "judge-1", finish: str = "stop", **message: Any) -> Answer:
    """A chat completion with this content."""
    said = {"role": "assistant", "content": content, **message}
    return Answer({"model": model, "choices": [{"index": 0, "message": said, "finish_reason": finish}]})
