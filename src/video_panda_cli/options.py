"""What the commands share: options, quick checks of what was named, and loading a checkpoint."""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path


FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
MODEL_TYPES = ["video_panda"]  # examples/ablations adds that of the variants
STANDARD_INPUT = "-"


class WorkFailed(Exception):
    """What the user asked for was right, but the work failed. The message says why."""


def complain(message) -> None:
    print(f"video-panda: {message}", file=sys.stderr, flush=True)


# Options


def new_command(commands, name: str, run: Callable, examples: str, **kwargs) -> argparse.ArgumentParser:
    """Adds a command that `run` runs. Its help ends with examples."""
    parser = commands.add_parser(
        name, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a checkpoint folder or Hub id (default: the small model of moving shapes that ships with the package)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: the chat template's, if any)")
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        default=max_new_tokens,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="write one line of JSON for each answer")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="type of the weights (default: auto, the checkpoint's own)",
    )


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames",
        type=int,
        metavar="N",
        help="frames to look at in a clip: 1 or a multiple of 4 (default: the model's, 8)",
    )
    frames.add_argument("--fps", type=positive, metavar="R", help="look at R frames a second instead")
    parser.add_argument("--max-frames", type=int, metavar="N", help="with --fps: at most N frames")


def sampling(options: argparse.Namespace) -> dict:
    """What `add_frame_options` read, by the names that the processor has for it."""
    return {"num_frames": options.num_frames, "fps": options.fps, "max_frames": options.max_frames}


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


# Quick checks, before anything slow is imported


def check_max_frames(options: argparse.Namespace) -> None:
    if options.max_frames is not None and options.fps is None:
        raise ValueError("--max-frames limits --fps: give both, or --num-frames alone.")


def check_clips(names: list[str]) -> None:
    """Raises an error for a file that is not there, and if standard input is to be read twice."""
    if names.count(STANDARD_INPUT) > 1:
        raise ValueError("- is standard input, which can be read only once.")
    for name in names:
        check_file(name)


def check_file(name: str) -> None:
    if name == STANDARD_INPUT:
        if sys.stdin.isatty():
            raise ValueError("standard input is a terminal: `video-panda … - < clip.mp4` reads a file from it.")
    elif "://" not in name and not name.startswith("data:") and not os.path.exists(name):
        raise FileNotFoundError(f"{name}: no such file.")


def check_folder(name: str) -> None:
    if not os.path.isdir(name):
        raise FileNotFoundError(f"no such folder: {name}")


def check_model(name: str | None) -> None:
    """Raises an error for a folder that is not there, or is no checkpoint of Video-Panda."""
    if name is None:
        return
    folder = Path(name)
    if is_path(name):
        check_folder(name)
    else:
        return  # a Hub id
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} has no config.json: give a folder that save_pretrained (or video-panda-convert) wrote."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the JSON of a configuration ({error}).") from error
    check_model_type(name, model_type)


def check_model_type(name: str, model_type) -> None:
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name} is no Video-Panda checkpoint: its config.json is of the type {model_type!r}. "
            "One of the reference release is to be converted first: video-panda convert."
        )


def is_path(name: str) -> bool:
    """Whether a name can only be a path. A Hub id is `name` or `user/name`."""
    is_shaped_like_one = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return is_shaped_like_one or os.path.exists(name)


# Work


@contextmanager
def importing():
    """Here Ctrl-C ends the process at once and quietly. An exception may get lost or changed inside an import."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def leave(*_):
        os.write(2, b"\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def load_processor(options: argparse.Namespace):
    """The processor of `--model`, which is checked, and the function that loads the model."""
    check_model(options.model)
    with importing():
        from video_panda_hf import SHIPPED_MODEL  # first, because it hides what others log while they are imported

        # isort: split
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

    device = usable_device(options.device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    name = options.model or str(SHIPPED_MODEL)
    which = {"revision": options.revision} if getattr(options, "revision", None) else {}
    if not os.path.isdir(name):
        with suppress(OSError):  # an adapter, or nothing at all: then the processor's error says so
            check_model_type(name, AutoConfig.from_pretrained(name, **which).model_type)
    processor = AutoProcessor.from_pretrained(name, **which)

    def load_model():
        return AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype, **which).to(device)

    return processor, load_model


def usable_device(name: str | None):
    """The device of this name; by default a GPU if there is one. Raises `ValueError` if it is not available."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def print_json(**fields) -> None:
    print(json.dumps(fields), flush=True)
