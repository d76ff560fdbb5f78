"""Requests a second and time to the first token of servers, with 1, 4 and 16 clients.

    python benchmarks/serving.py [--server video-panda] [--server vllm] [--vllm-python PYTHON] [--json FILE]

Starts `video-panda serve MODEL --port PORT` and then vLLM's server, with the shipped model in float32, and asks both
over `/v1/chat/completions`: 20 questions about each of the three clips that ship, as data URLs, answered greedily and
streamed, for each number of clients. vLLM may be in an environment of its own, with this package. With `--json`, a
server that was not started keeps its figures in FILE.
"""

import argparse
import base64
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from evaluation import ASKED, NAMES
from tables import finish
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL


CLIENTS = (1, 4, 16)
COMMANDS = {
    "video-panda": ["-m", "video_panda_hf.cli", "serve", str(SHIPPED_MODEL), "--device", "cpu"],
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model", str(SHIPPED_MODEL), "--dtype", "float32"],
}
START_SECONDS = 540


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", choices=COMMANDS, help="which to measure; both by default")
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PYTHON", help="of the environment of vLLM")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    earlier = arguments.json is not None and arguments.json.exists() and json.loads(arguments.json.read_text())
    servers = earlier["servers"] if earlier else {}
    for name in arguments.server or COMMANDS:
        python = arguments.vllm_python if name == "vllm" else sys.executable
        with started([python, *COMMANDS[name]]) as address:
            servers[name] = measure(address, arguments.tokens)
    result = {"setting": f"cpu, float32, {os.cpu_count()} cores", "tokens": arguments.tokens, "servers": servers}
    finish("serving", result, arguments.json)


@contextmanager
def started(command: list[str]):
    """A server on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def measure(address: str, tokens: int) -> dict:
    """For each number of clients, requests a second and the median of the seconds to the first token."""
    clips = sorted(SHIPPED_CLIPS.glob("*.mp4"))
    for clip in clips:  # warm-up
        ask(address, request_about(clip, "What is shown?", tokens))
    found = {}
    for clients in CLIENTS:
        # No question twice, for vLLM keeps what it has computed of a prompt.
        asked = [f"{question.format(name)} {clients}" for name, question in itertools.product(NAMES, ASKED)]
        requests = [request_about(clip, question, tokens) for question in asked for clip in clips]
        waiting, firsts = iter(requests), []
        lock = threading.Lock()

        def work(waiting=waiting, firsts=firsts, lock=lock):
            while True:
                with lock:
                    request = next(waiting, None)
                if request is None:
                    return
                firsts.append(ask(address, request))

        threads = [threading.Thread(target=work) for _ in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        if len(firsts) < len(requests):
            raise RuntimeError(f"{len(requests) - len(firsts)} of {len(requests)} requests failed")
        found[str(clients)] = {
            "requests_per_second": len(requests) / seconds,
            "first_token_seconds": statistics.median(firsts),
        }
    return found


def request_about(clip: Path, question: str, tokens: int) -> bytes:
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": str(SHIPPED_MODEL), "messages": messages, "temperature": 0, "max_tokens": tokens, "stream": True}
    return json.dumps(body).encode()


def ask(address: str, body: bytes) -> float:
    """Seconds until the first text of the answer, which is read to its end."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, headers)
    start, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {") and first is None:
                choices = json.loads(line[len(b"data: ") :]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - start
    if first is None:
        raise RuntimeError("an answer without text")
    return first


if __name__ == "__main__":
    main()
