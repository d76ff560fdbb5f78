"""
The command line, `video-panda`.

It is a package of its own because importing `video_panda_hf` takes seconds, for torch and transformers. Its modules
import the standard library only, and `video_panda_hf` once a command has checked its arguments and begins to work.
"""

import argparse
import os
import runpy
import sys
from contextlib import suppress
from importlib.util import find_spec

from . import ask, chat, convert, demo, eval, explain, push, serve, watch
from .options import FAILED, INTERRUPTED, WRONG_USE, WorkFailed, complain


DESCRIPTION = "Video-Panda, the encoder-free video-language model."
COMMANDS = (ask, chat, watch, explain, eval, demo, serve, push, convert)

__all__ = ["build_parser", "main"]


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command `video-panda`.

    Args:
        arguments (`list[str]`, *optional*):
            Arguments of the command. Defaults to those of the process.

    Returns:
        `int`: the exit status: 0, 1 if the work failed, 2 for wrong use or bad input, 130 after Ctrl-C. Messages go
        to standard error.
    """
    options = build_parser().parse_args(arguments)
    run = vars(options).pop("run")
    try:
        return run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # nobody reads the answers any more, as after `| head`
        with suppress(OSError):  # else Python complains of it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (WorkFailed, MemoryError) as error:
        complain(error)
        return FAILED
    except (OSError, ValueError) as error:  # a bad file, folder, id or option; the message names it
        complain(error)
        return WRONG_USE
    except Exception as error:
        hub = sys.modules.get("video_panda_hf.hub")
        if hub is None or not isinstance(error, hub.HTTP_ERRORS):
            raise
        # No answer at all: an error answer of the Hub is an `OSError`, see above.
        complain(f"the Hugging Face Hub cannot be reached: {error}. Check the network.")
        return WRONG_USE


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it returns has `run`, the command's function."""
    parser = argparse.ArgumentParser(prog="video-panda", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"video-panda-hf {version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def version() -> str:
    """The version of `video_panda_hf`, without importing it."""
    (folder,) = find_spec("video_panda_hf").submodule_search_locations
    return runpy.run_path(os.path.join(folder, "version.py"))["__version__"]
