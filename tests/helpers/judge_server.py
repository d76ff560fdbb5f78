"""A judge over loopback HTTP, OpenAI-compatible, that behaves as well or as badly as it is told."""

import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """
    `behave(question, number)` says what to do with the n-th request (from 0) about a question: a text to reply, or an
    `(action, value)`: ("status", (code, headers, body)), ("raw", bytes), ("stall", seconds), ("die", None) or
    ("message", dict).
    """

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.times = behave, [], []
        self.seen: Counter = Counter()
        self.model = "judge-2026-10-01"
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that went away is no error here."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = asked["messages"][-1]["content"]
        question = re.search(r"uestion: (.*)", user)[1] if "uestion: " in user else user
        with self.server.lock:
            number = self.server.seen[question]
            self.server.seen[question] += 1
            self.server.requests.append(asked)
            self.server.times.append(time.monotonic())
        behaviour = self.server.behave(question, number)
        if isinstance(behaviour, str):
            behaviour = ("message", {"role": "assistant", "content": behaviour})
        action, value = behaviour
        if action == "message":
            choices = [{"index": 0, "message": value, "finish_reason": "stop"}]
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            completion = {"id": "1", "object": "chat.completion", "created": 1, "model": self.server.model}
            self.send(200, {}, json.dumps({**completion, "choices": choices, "usage": usage}).encode())
        elif action == "status":
            status, headers, body = value
            self.send(status, headers, json.dumps(body).encode())
        elif action == "raw":
            self.send(200, {}, value)
        elif action == "stall":
            time.sleep(value)
        elif action == "die":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"id": "1", "choi')
            self.wfile.flush()
            self.connection.close()

    def send(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(behave):
    server = JudgeServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
