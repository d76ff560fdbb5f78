"""`video-panda watch`: the same question again and again, about a video that is coming in."""

import argparse
import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator

from . import options as common


EXAMPLES = """  video-panda watch recording.ts "What is happening?" --every 5
  ffmpeg -i … -f mpegts - | video-panda watch - "Is anybody there?" --json
  video-panda watch rtsp://camera.local/stream "Is the door open?" --fps 0.5 --every 30 --model path/to/checkpoint
  video-panda watch /dev/video0 "How many people are there?\""""
QUEUED = 16  # pictures that may wait for the model; then a file or a pipe waits too
SLACK = 1e-6  # seconds; times are floats


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "watch",
        watch,
        EXAMPLES,
        help="ask a question about a video while it comes in",
        description="Watch a video while it comes in, and ask a question about it again and again. Time and answer "
        "are printed as soon as they are there. At the end of the video the question is asked once more.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file that may still grow, a pipe, - for standard input, an rtsp or http address, or a camera: its "
        "device, as /dev/video0, or avfoundation:NAME or dshow:NAME",
    )
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument(
        "--every", type=common.positive, default=5.0, metavar="S", help="seconds of video between two (default: 5)"
    )
    parser.add_argument(
        "--fps", type=common.positive, default=1.0, metavar="R", help="look at R frames a second (default: 1)"
    )
    parser.add_argument(
        "--max-clips",
        type=common.count,
        default=8,
        metavar="N",
        help="keep only the newest N clips of 4 frames in mind (default: 8)",
    )
    parser.add_argument(
        "--wait", type=seconds, default=5.0, metavar="S", help="wait so long for a file to grow (default: 5)"
    )
    common.add_model_options(parser)


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number


def watch(options: argparse.Namespace) -> int:
    if not options.source.startswith(("v4l2:", "avfoundation:", "dshow:")):
        common.check_file(options.source)
    common.check_model(options.model)
    processor, load_model = common.load_processor(options)
    from video_panda_hf import VideoPandaSession
    from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, read_live

    source = options.source
    if source == common.STANDARD_INPUT:
        # Not buffered: a thread that reads holds the buffer's lock, for which Python would wait at exit, in vain.
        source = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    how = {"limits": DecodeLimits(**(processor.video_processor.decode_limits or {}))}
    how["pixels"] = processor.video_processor.pixels
    pictures = in_background(read_live(source, options.fps, wait=options.wait, **how))
    try:
        first = next(pictures)  # before the model is loaded, which may take long
    except VideoDecodeError as error:
        raise common.WorkFailed(error) from error
    session = VideoPandaSession(
        load_model(), processor, fps=options.fps, system=options.system, max_clips=options.max_clips
    )
    due, answered, shape = options.every, 0.0, first[1].shape
    try:
        for _, picture in itertools.chain([first], pictures):
            if picture.shape != shape:
                session.next_video()
                shape = picture.shape
            session.add(picture, rate=options.fps)
            if session.seconds >= due - SLACK:
                answered = session.seconds
                due = options.every * (math.floor(answered / options.every + SLACK) + 1)
                answer(session, options)
        broken = None
    except VideoDecodeError as error:  # it had a beginning
        broken = error
    if session.seconds > answered:
        answer(session, options)
    if broken:
        common.complain(broken)
    return 0


def answer(session, options: argparse.Namespace) -> None:
    begun, now = time.monotonic(), session.seconds
    text = session.ask(options.question, max_new_tokens=options.max_new_tokens, do_sample=False)
    if options.json:
        took = round(time.monotonic() - begun, 3)
        common.print_json(time=round(now, 3), question=options.question, answer=text, seconds=took)
    else:
        print(f"{clock(now)} {text}", flush=True)


def clock(seconds: float) -> str:
    """m:ss, with tenths of a second if there are any: 0:05, 61:02.5."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:02.0f}" if rest == int(rest) else f"{int(minutes)}:{rest:04.1f}"


def in_background(items: Iterator) -> Iterator:
    """Yields `items`, which another thread takes. So a stream is read on while an answer is thought about."""
    taken: queue.Queue = queue.Queue(QUEUED)

    def take():
        try:
            for item in items:
                taken.put((item, None))
            taken.put((None, None))
        except BaseException as error:
            taken.put((None, error))

    threading.Thread(target=take, daemon=True, name="video-panda watch").start()
    while True:
        item, error = taken.get()
        if error is not None:
            raise error
        if item is None:
            return
        yield item
