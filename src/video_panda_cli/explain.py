"""`video-panda explain`: a picture of what the model looked at."""

import argparse
import os
import time
from pathlib import Path

from . import ask
from . import options as common


EXAMPLES = """  video-panda explain clip.mp4 "Which way does it move?" -o explanation.gif
  video-panda explain clip.mp4 "What moves first?" -o explanation.png --without --method attention
  video-panda explain clip.mp4 -o summaries.mp4 --num-frames 16"""
SUFFIXES = (".gif", ".mp4", ".png")
MAPS = ("fsra", "gstra", "lsd", "answer")
METHODS = ("attention", "gradient")


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "explain",
        explain,
        EXAMPLES,
        help="draw what the model looked at in a video",
        description="Draw what the model looked at in a video or picture, and where its answer comes from. The answer "
        "goes to standard output. The maps of FSRA and GSTRA do not depend on the question.",
    )
    parser.add_argument("clip", metavar="CLIP", help="a video or picture file, an http(s) URL of one, or -")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="the question (default: no map of an answer)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="what to write: a .gif, .mp4, or .png of all frames"
    )
    parser.add_argument("--maps", type=names, metavar="NAMES", help="maps to draw (default: fsra,gstra,answer)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="gradient",
        help="how to find where an answer comes from (default: %(default)s)",
    )
    parser.add_argument(
        "--without",
        action="store_true",
        help="answer also without FSRA, without GSTRA and without both in the context tokens",
    )
    common.add_frame_options(parser)
    parser.add_argument("--start", type=float, metavar="S", help="look at the clip from S seconds on")
    parser.add_argument("--end", type=float, metavar="S", help="look at the clip up to S seconds")
    common.add_model_options(parser)


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in MAPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(MAPS)}")
    return chosen


def explain(options: argparse.Namespace) -> int:
    common.check_max_frames(options)
    common.check_file(options.clip)
    check_output(options.output)
    if options.question is None and (options.without or "answer" in (options.maps or [])):
        raise ValueError("--without and the map `answer` are about an answer: give a QUESTION.")
    processor, load_model = common.load_processor(options)
    from video_panda_hf.explain import explain

    begun = time.monotonic()
    explanation = explain(
        load_model(),
        processor,
        {"video": ask.read_clip(options.clip), "start": options.start, "end": options.end},
        options.question,
        method=options.method,
        ablation=options.without,
        system=options.system,
        num_frames=options.num_frames,
        fps=options.fps,
        max_frames=options.max_frames,
        max_new_tokens=options.max_new_tokens,
    )
    explanation.save(options.output, options.maps)
    report(explanation, options, round(time.monotonic() - begun, 3))
    return 0


def check_output(name: str) -> None:
    if Path(name).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output {name}: an explanation is written as {', '.join(SUFFIXES)}.")
    if not os.path.isdir(Path(name).parent):
        raise FileNotFoundError(f"--output {name}: no such folder.")


def report(explanation, options: argparse.Namespace, seconds: float) -> None:
    if options.json:
        fields = {"question": explanation.question, "answer": explanation.text, "seconds": seconds}
        for name in ("temporal", "frame_share"):
            if (shares := getattr(explanation, name)) is not None:
                fields[name] = [round(share, 4) for share in shares.tolist()]
        if explanation.ablation:
            fields["without"] = {part: text for part, text in explanation.ablation.items() if part != "full"}
        common.print_json(**fields, output=options.output)
    elif explanation.ablation:
        for part, text in explanation.ablation.items():
            print(text if part == "full" else f"without {part if part == 'both' else part.upper()}: {text}")
    elif explanation.text is not None:
        print(explanation.text)
