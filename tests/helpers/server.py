"""`video-panda serve` in a thread of the test, and a web server over loopback that logs who comes."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf import SHIPPED_MODEL


MODEL = "panda"


@cache
def shipped():
    """The shipped model and its processor, loaded once."""
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL), AutoProcessor.from_pretrained(SHIPPED_MODEL)


class Asked:
    """A running server, and ways to ask it."""

    def __init__(self, engine, port: int):
        self.engine, self.port = engine, port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, headers, body) of an answer."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, body: dict | bytes, headers: dict | None = None) -> tuple[int, dict]:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        status, _, answer = self.send("POST", "/v1/chat/completions", body, headers)
        return status, json.loads(answer)

    def ask(self, *content, **fields) -> tuple[int, dict]:
        """Asks with one message of the user, of texts and parts."""
        return self.post(request_of(*content, **fields))

    def begin(self, *content, **fields) -> socket.socket:
        """Sends a request and does not wait for its answer."""
        body = json.dumps(request_of(*content, **fields)).encode()
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        return connection.sock

    def wait_until(self, holds, seconds: float = 5) -> bool:
        end = time.monotonic() + seconds
        while not (held := holds()) and time.monotonic() < end:
            time.sleep(0.01)
        return held


def request_of(*content, **fields) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], **fields}


def video(url, **settings) -> dict:
    return {"type": "video_url", "video_url": {"url": str(url)}, **settings}


@contextmanager
def serving(**settings):
    """A server with these settings on a free port."""
    from video_panda_hf.serving import ServerSettings, create_app
    from video_panda_hf.serving.app import new_server

    app = create_app(*shipped(), ServerSettings(MODEL, **settings))
    server = new_server(app)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Asked(app.state.engine, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)


class WebServer(ThreadingHTTPServer):
    """`files` has for each path what is sent: bytes, or a function that gets the handler. `requests` lists paths."""

    daemon_threads = True

    def __init__(self, files: dict):
        super().__init__(("127.0.0.1", 0), WebHandler)
        self.files, self.requests = files, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that went away is no error here."""


class WebHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        answer = self.server.files.get(self.path)
        if callable(answer):
            answer(self)
        elif answer is None:
            self.send_error(404)
        else:
            self.reply(200, {"Content-Length": len(answer)}, answer)

    def reply(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def web_server(files: dict | None = None):
    server = WebServer({} if files is None else files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
