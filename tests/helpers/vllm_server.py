"""vLLM's OpenAI-compatible server with the shipped model, on a free port of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.processes import free_port
from helpers.vllm_engine import SETTINGS
from video_panda_hf import SHIPPED_MODEL


START_SECONDS = 1200  # as on a busy machine


@contextmanager
def vllm_server(log: Path, *options: str):
    """The function that posts a request to it. It gives the status and what was answered."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(SHIPPED_MODEL)]
    command += ["--served-model-name", "shipped", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    address = f"http://127.0.0.1:{port}"

    def post(**body) -> tuple[int, dict]:
        body = {"model": "shipped", "temperature": 0, "max_tokens": 16, **body}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    with open(log, "w") as output:
        environment = {**os.environ, **SETTINGS, "VLLM_LOGGING_LEVEL": "WARNING"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up(address):
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
            yield post
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # its engine is a process of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
