"""The command line: `video-panda ask`, `video-panda push` and `video-panda serve`."""

import argparse
import importlib.util
import sys

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.utils import logging

from .assets import SHIPPED_MODEL
from .hub import HTTP_ERRORS, push_folder
from .version import __version__


DESCRIPTION = "Video-Panda, the encoder-free video-language model."
ASK_EXAMPLE = """examples:
  video-panda ask clip.mp4 "Which way does it move?"
  video-panda ask photo.jpg "What colour is the shape?"
  video-panda ask clip.mp4 "What happens in the video?" --model path/to/checkpoint --num-frames 16
  video-panda ask https://example.com/clip.mp4 "Describe the video." --model user/checkpoint --device cuda
"""
PUSH_EXAMPLE = """examples:
  video-panda push runs/mine user/my-video-panda --private
  video-panda push converted user/my-video-panda --create-pr --license llama2

Log in first with `hf auth login`, or set HF_TOKEN."""
SERVE_EXAMPLE = """examples:
  video-panda serve path/to/checkpoint --port 8000
  video-panda serve user/checkpoint --device cuda --dtype bfloat16

Needs `pip install "transformers[serving]"`; `transformers serve --help` lists the options."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 2 after an error, with a message on standard error."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # a bad file, folder, id or option; the message names it
        print(f"video-panda: {error}", file=sys.stderr)
        return 2
    except HTTP_ERRORS as error:  # no answer at all: an error answer of the Hub is an `OSError`, see above
        print(f"video-panda: the Hugging Face Hub cannot be reached: {error}. Check the network.", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="video-panda", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"video-panda-hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ask_parser = commands.add_parser(
        "ask",
        help="ask a question about a video or a picture",
        description="Ask a question about a video or a picture; the answer streams to standard output.",
        epilog=ASK_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask_parser.set_defaults(run=ask)
    ask_parser.add_argument("clip", metavar="CLIP", help="a video or picture file, or an http(s) URL of one")
    ask_parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    ask_parser.add_argument(
        "--model",
        default=str(SHIPPED_MODEL),
        metavar="DIR_OR_ID",
        help="a checkpoint folder or Hub id (default: the small model of moving shapes that ships with the package)",
    )
    frames = ask_parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames", type=int, metavar="N", help="frames to look at: 1 or a multiple of 4 (default: the model's, 8)"
    )
    frames.add_argument("--fps", type=float, metavar="R", help="look at R frames a second instead")
    ask_parser.add_argument("--start", type=float, metavar="S", help="look at the clip from S seconds on")
    ask_parser.add_argument("--end", type=float, metavar="S", help="look at the clip up to S seconds")
    ask_parser.add_argument("--max-frames", type=int, metavar="N", help="with --fps: at most N frames")
    ask_parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    ask_parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    ask_parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="type of the weights (default: auto, the checkpoint's own)",
    )
    add_push(commands)
    add_serve(commands)
    return parser


def add_push(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a checkpoint to the Hugging Face Hub",
        description="Upload a folder with model and processor, or with a PEFT adapter, to the Hugging Face Hub. It is "
        "checked first, and appears in one commit or not at all. It gets a model card if it has none.",
        epilog=PUSH_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=push)
    parser.add_argument("folder", metavar="FOLDER", help="what save_pretrained or video-panda-convert wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name, created if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="if it is created, create it private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch, created if there is none (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", dest="commit_message", metavar="TEXT", help="the commit's message")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card (default: the base model's)")
    parser.add_argument(
        "--no-code",
        dest="include_code",
        action="store_false",
        help="leave out the model's code, with which it loads where this package is not installed",
    )
    parser.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")


def add_serve(commands) -> None:
    parser = commands.add_parser(
        "serve",
        usage="video-panda serve MODEL [OPTIONS]",
        help="answer questions over HTTP, as an OpenAI-compatible server",
        description="`transformers serve`, which knows Video-Panda this way, with the model's own number of frames.",
        epilog=SERVE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=serve)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or Hub id")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="those of `transformers serve`, after MODEL"
    )


def ask(options: argparse.Namespace) -> int:
    if options.max_frames is not None and options.fps is None:
        raise ValueError("--max-frames limits --fps: give both, or --num-frames alone.")
    device = usable_device(options.device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    processor = AutoProcessor.from_pretrained(options.model)
    clip = {"type": "video", "video": options.clip, "start": options.start, "end": options.end}
    content = [clip, {"type": "text", "text": options.question}]
    sampling = {"num_frames": options.num_frames, "fps": options.fps, "max_frames": options.max_frames}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={name: value for name, value in sampling.items() if value is not None},
    )
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype).to(device)
    streamer = AnswerStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs.to(model.device), max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer
    )
    return 0


def push(options: argparse.Namespace) -> int:
    arguments = {name: value for name, value in vars(options).items() if name != "run"}
    try:
        print(push_folder(**arguments))
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(f"{error} Log in first: `hf auth login`, or give a valid --token.") from error
    return 0


def serve(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError('a server needs more packages: pip install "transformers[serving]"')
    from transformers.cli.transformers import app

    # `transformers serve` samples 32 frames by default. `null` restores the model's own number.
    frames = ["--chat-template-kwargs", '{"num_frames": null}']
    app(["serve", *frames, options.model, *options.options], prog_name="video-panda")
    return 0


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is generated, without the space between prompt and answer."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(text if self.begun else text.lstrip(), stream_end)
        self.begun = self.begun or bool(text.strip())


def usable_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one. Raises `ValueError` if it is not available."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
