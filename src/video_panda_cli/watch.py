"""`video-panda watch`: the same question again and again, about a video that is coming in."""

import argparse
import collections
import contextlib
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
    processor, load_model = common.load_processor(options)
    from video_panda_hf import VideoPandaSession
    from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, read_live

    source = options.source
    if source == common.STANDARD_INPUT:
        # Not buffered: a thread that reads holds the buffer's lock, for which Python would wait at exit, in vain.
        source = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    how = {"limits": DecodeLimits(**(processor.video_processor.decode_limits or {}))}
    how["pixels"] = processor.video_processor.pixels
    due, answered, broken = options.every, 0.0, None
    with contextlib.closing(in_background(read_live(source, options.fps, wait=options.wait, **how))) as pictures:
        try:
            first = next(pictures)  # before the model is loaded, which may take long
        except VideoDecodeError as error:
            raise common.WorkFailed(error) from error
        session = VideoPandaSession(
            load_model(), processor, fps=options.fps, system=options.system, max_clips=options.max_clips
        )
        watched = Watched(session, options)
        try:
            for _, picture in itertools.chain([first], pictures):
                watched.add(picture)
                if watched.seconds >= due - SLACK:
                    answered = watched.seconds
                    due = options.every * (math.floor(answered / options.every + SLACK) + 1)
                    answer(watched, options)
        except VideoDecodeError as error:  # it had a beginning
            broken = error
    if watched.seconds > answered:
        answer(watched, options)
    if broken:
        common.complain(broken)
    return 0


class Watched:
    """
    The pictures of a stream in a session that stays within the language model's context.

    A session that drops old clips goes on counting positions. Before these leave the context, it begins anew with the
    newest clips.
    """

    def __init__(self, session, options: argparse.Namespace):
        self.session, self.fps, self.max_clips = session, options.fps, options.max_clips
        config = session.model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        question = session.inputs_for(options.question)["input_ids"].shape[1]
        self.room = context - question - options.max_new_tokens
        self.clip_size = config.vision_config.frames_per_clip
        self.newest: collections.deque = collections.deque(maxlen=options.max_clips * self.clip_size)
        self.pictures = 0

    @property
    def seconds(self) -> float:
        return self.pictures / self.fps

    def add(self, picture) -> None:
        if self.newest and self.newest[-1].shape != picture.shape:
            self.session.next_video()
            self.newest.clear()
        self.newest.append(picture)
        self.pictures += 1
        if self.session.add(picture, rate=self.fps):
            clips = self.session.num_clips
            position = self.session.num_tokens * clips / min(clips, self.max_clips)  # at most
            kept = min(clips // 2, self.max_clips, len(self.newest) // self.clip_size)
            if position * (clips + 1) / clips > self.room and kept:
                self.session.reset()
                self.session.add(list(self.newest)[-kept * self.clip_size :], rate=self.fps)


def answer(watched: Watched, options: argparse.Namespace) -> None:
    begun = time.monotonic()
    text = watched.session.ask(options.question, max_new_tokens=options.max_new_tokens, do_sample=False)
    if options.json:
        times = {"time": round(watched.seconds, 3), "seconds": round(time.monotonic() - begun, 3)}
        common.print_json(question=options.question, answer=text, **times)
    else:
        print(f"{clock(watched.seconds)} {text}", flush=True)


def clock(seconds: float) -> str:
    """m:ss, with tenths of a second if there are any: 0:05, 61:02.5."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:02.0f}" if rest == int(rest) else f"{int(minutes)}:{rest:04.1f}"


def in_background(items: Iterator) -> Iterator:
    """
    Yields `items`, which another thread takes. So a stream is read on while an answer is thought about.

    When it is closed, it closes `items` as well: no decoder outlives it, unless its thread still waits for the source.
    """
    taken: queue.Queue = queue.Queue(QUEUED)
    closed = threading.Event()

    def put(*entry) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                taken.put(entry, timeout=0.1)
                return True
        return False

    def take():
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put(item, None):
                        return
            put(None, None)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=take, daemon=True, name="video-panda watch")
    thread.start()
    try:
        while True:
            item, error = taken.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        closed.set()
        thread.join(timeout=2)
