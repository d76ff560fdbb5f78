"""The command line: `video-panda ask CLIP "QUESTION"`."""

import argparse
import sys

from .assets import SHIPPED_MODEL
from .version import __version__


DESCRIPTION = "Video-Panda, the encoder-free video-language model."
ASK_EXAMPLE = """examples:
  video-panda ask clip.mp4 "Which way does it move?"
  video-panda ask clip.mp4 "What happens in the video?" --model path/to/checkpoint --num-frames 16
  video-panda ask https://example.com/clip.mp4 "Describe the video." --model user/checkpoint --device cuda
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 2 with a message on standard error where it cannot."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # a bad file, folder, id or option: the message says which and what to do
        print(f"video-panda: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="video-panda", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"video-panda-hf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ask_parser = commands.add_parser(
        "ask",
        help="ask a question about a video",
        description="Ask a question about a video; the answer streams to standard output.",
        epilog=ASK_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask_parser.set_defaults(run=ask)
    ask_parser.add_argument("clip", metavar="CLIP", help="a video file, or an http(s) URL of one")
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
    ask_parser.add_argument("--max-frames", type=int, metavar="N", help="with --fps: at most N frames")
    ask_parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    ask_parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    ask_parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto, the checkpoint's own (default: auto)"
    )
    return parser


def ask(options: argparse.Namespace) -> int:
    if options.max_frames is not None and options.fps is None:
        raise ValueError("--max-frames limits --fps: give both, or --num-frames alone.")
    # Heavy imports wait until the options are known to be good, so that --help and typing errors answer at once.
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
    from transformers.utils import logging

    import video_panda_hf  # noqa: F401  registers the model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"

    processor = AutoProcessor.from_pretrained(options.model)
    content = [{"type": "video", "video": options.clip}, {"type": "text", "text": options.question}]
    sampling = {"num_frames": options.num_frames, "fps": options.fps, "max_frames": options.max_frames}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={name: value for name, value in sampling.items() if value is not None},
    )
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype).to(options.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs.to(model.device), max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
