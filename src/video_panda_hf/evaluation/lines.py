"""Files of JSON lines that processes append to, and that survive it if one is killed in the middle of a line."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SECONDS_UNTIL_SYNC = 5.0  # what a crash of the machine may cost; a killed process loses no whole line


class LineWriter:
    """
    Appends lines to a file. A torn last line, of a process that was killed, is cut off first.

    Args:
        path (`Path`):
            The file. It and its folder are created if needed.

    Raises:
        BlockingIOError: if another process writes to the file.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b", buffering=0)
        if fcntl is not None:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.close()
                raise BlockingIOError(f"{path}: another process is writing to this file") from None
            except OSError:  # a file system without locks
                pass
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)
        self.synced = time.monotonic()

    def write(self, line: dict) -> None:
        self.file.write(encoded(line))
        if time.monotonic() - self.synced > SECONDS_UNTIL_SYNC:
            self.sync()

    def sync(self) -> None:
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, *_) -> None:
        self.sync()
        self.file.close()


def encoded(line: dict) -> bytes:
    # A half of a surrogate pair, which a server may send, is no UTF-8. Its escape is valid JSON.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def read_lines(path: Path) -> list[dict]:
    """
    The lines of a file, without a torn last one. A file that is not there has none.

    Raises:
        ValueError: for a line that is not a JSON object; it names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number} is not JSON") from None
        if not isinstance(found[-1], dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
    return found


def write_whole(path: Path, lines: Iterable[dict]) -> None:
    """Writes a file of lines that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        file.writelines(map(encoded, lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
