"""Commands of Python in forks of a process that has imported torch, which takes a process of its own many seconds.

    with Forks() as forks:
        done = forks.run(["-m", "video_panda_cli", "--help"])

is `subprocess.run([sys.executable, "-m", ...], capture_output=True, text=True)`: the fork has the environment, the
folder, the arguments, the output and the exit status that the command would have. Only what the imports themselves
print or read of the environment is not the command's own. So `Forks()` has imported nothing that reads `HF_...`;
`Forks(*TRAINING)` has, and takes such variables as they were when it started.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


TORCH = ("torch", "torch.distributed.run", "torch.distributed.tensor", "torch._dynamo", "torchvision")
TRAINING = (*TORCH, "accelerate.utils", "peft", "datasets", "video_panda_hf.training")


class Forks:
    """Runs one command after the other. A context, at whose end the process is gone."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules or TORCH
        self.server = self.command = self.ended = None  # two processes, and the exit status of the second

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_) -> None:
        if self.server is not None:
            self.end()
            try:
                self.server.communicate(timeout=30)  # which closes its input, so it ends
            except subprocess.TimeoutExpired:  # on a machine that is very busy
                self.server.kill()
                self.server.communicate()

    def start(self, command: list, env: dict | None = None, cwd=None, stdout=os.devnull, stderr=os.devnull) -> int:
        """The process id of a command, the arguments of `python`. It leads a group of processes."""
        if self.server is None:
            # glibc reserves addresses, not memory, for every thread: too many for tests that limit them
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.server = subprocess.Popen([sys.executable, __file__, *self.modules], env=environment, **pipes)
        self.end()
        request = [list(map(str, command)), dict(os.environ if env is None else env), str(cwd or Path.cwd())]
        self.server.stdin.write(json.dumps([*request, str(stdout), str(stderr)]).encode() + b"\n")
        self.server.stdin.flush()
        self.command, self.ended = self.answer(300), None
        assert self.command is not None, "the process that forks has not done its imports in 300 s"
        return self.command

    def status(self, timeout: float) -> int | None:
        """The exit status of the command that was started last, negative for a signal; `None` if it still runs."""
        if self.ended is None:
            self.ended = self.answer(timeout)
        return self.ended

    def end(self) -> None:
        """Asks the command to end if it runs, for it knows which processes it has started; then kills it."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            if self.command is not None and self.server.poll() is None and self.status(0) is None:
                os.killpg(self.command, sent)
                self.status(30)

    def run(self, command: list, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        """Runs a command to its end, and gives its status and output. `AssertionError` if it does not end in time."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdout", "stderr")}
            self.start(command, **options, **files)
            in_time = self.status(timeout) is not None
            self.end()
            output = {name: file.read_text(errors="replace") for name, file in files.items()}
        assert in_time, f"not ended after {timeout:g} s\n{output['stderr'][-3000:]}"
        return subprocess.CompletedProcess(command, self.ended, **output)

    def answer(self, timeout: float) -> int | None:
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            return None
        answer = self.server.stdout.readline()
        assert answer, "the process that forks has ended"
        return int(answer)


def serve() -> list:
    """Returns in each fork, with what it is to do. Writes its process id and at its end its exit status."""
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        with contextlib.suppress(ProcessLookupError):  # if it has ended
            os.setpgid(child, child)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(command: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """Does what `python *command` does."""
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        file = os.open(name, mode | (os.O_CREAT | os.O_APPEND if number else 0))
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    option = command[0] if command[0] in ("-c", "-m") else None
    sys.argv = command[1:] if option else command
    first = "" if option else str(Path(command[0]).resolve().parent)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *paths, *(path for path in sys.path if path not in paths)]
    if option == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        code, sys.argv = sys.argv[0], ["-c", *sys.argv[1:]]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose names are not meant for `import`
    for module in sys.argv[1:]:
        if find_spec(module.split(".")[0]) is not None:
            importlib.import_module(module)
    gc.freeze()  # so that a fork copies less
    become(*serve())
