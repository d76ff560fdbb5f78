"""Commands that start processes of their own, such as `accelerate launch`: run to the end, and ended if they hang."""

import socket
import subprocess
import tempfile


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_to_the_end(command: list, timeout: float = 300, **options) -> None:
    """
    Fails with the end of what the command wrote, if it fails or does not end in time.

    Its output goes to a file: processes that outlive it would keep a pipe open, and whoever reads it waiting. It is
    asked to end before it is killed, for it knows which processes it has started.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, **options)
        try:
            problem = f"exit status {status}" if (status := process.wait(timeout)) else None
        except subprocess.TimeoutExpired:
            problem = f"not ended after {timeout:g} s"
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        assert problem is None, f"{problem}\n{output.read().decode(errors='replace')[-3000:]}"
