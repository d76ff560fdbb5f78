"""`video-panda chat`: a conversation about videos in the terminal."""

import argparse
import os
import signal
import sys
import time
from contextlib import closing, contextmanager, suppress

from . import options as common


EXAMPLES = """  video-panda chat clip.mp4
  video-panda chat lecture.mp4 --fps 0.5 --model path/to/checkpoint --system "Answer in one sentence."
  printf 'Which shape is it?\\nAnd its colour?\\n' | video-panda chat clip.mp4 --json"""
HELP = """/add FILE   look at another video or picture
/clear      forget the videos and the conversation
/help       this list
/quit       end (so does the end of input; Ctrl-C stops an answer)
All else is a question."""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "chat",
        chat,
        EXAMPLES,
        help="talk about videos in the terminal",
        description="A conversation about videos and pictures. Each line of standard input is a question; the answers "
        "stream to standard output, and all else goes to standard error. Commands:\n\n" + HELP,
    )
    parser.add_argument("clips", nargs="*", metavar="CLIP", help="a video or picture file, or an http(s) URL of one")
    common.add_frame_options(parser)
    parser.add_argument(
        "--max-clips",
        type=common.count,
        metavar="N",
        help="keep only the newest N clips of 4 frames in mind; answers are then approximate (default: all)",
    )
    common.add_model_options(parser)


def chat(options: argparse.Namespace) -> int:
    common.check_max_frames(options)
    if common.STANDARD_INPUT in options.clips:
        raise ValueError("standard input has the questions; name the clips as files.")
    common.check_clips(options.clips)
    processor, load_model = common.load_processor(options)
    from video_panda_hf import VideoPandaSession

    session = VideoPandaSession(
        load_model(), processor, fps=options.fps or 1.0, system=options.system, max_clips=options.max_clips
    )
    for clip in options.clips:
        add(session, clip, options)
    if sys.stdin.isatty():
        print("Ask, or /help.", file=sys.stderr)
    failed = False
    for line in lines():
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                break
            elif command == "/help":
                print(HELP, file=sys.stderr)
            elif command == "/clear":
                session.reset()
            elif command == "/add":
                add_another(session, rest.strip(), options)
            elif command.startswith("/"):
                raise ValueError(f"{command} is no command: /help lists them.")
            else:
                answer(session, line, options)
        except (OSError, ValueError) as error:  # the conversation goes on
            if isinstance(error, BrokenPipeError):
                raise
            common.complain(error)
            failed = not sys.stdin.isatty()
    return common.FAILED if failed else 0


def lines():
    """The lines that the user types, or that standard input has. Empty ones are left out."""
    typed = sys.stdin.isatty()
    edited = typed and sys.stdout.isatty()
    if edited:
        with suppress(ImportError):  # on Windows, where the console does it
            import readline  # noqa: F401  # lines can be edited, and called back
    while True:
        if typed and not edited:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = (input("> ") if edited else input()).strip()
        except EOFError:
            if edited:
                print(file=sys.stderr)
            return
        if line:
            yield line


def add_another(session, name: str, options: argparse.Namespace) -> None:
    if not name:
        raise ValueError("/add FILE: which file?")
    common.check_file(name)
    add(session, name, options)
    print(f"added {name}", file=sys.stderr)


def add(session, clip: str, options: argparse.Namespace) -> None:
    """Adds a video or a picture as `video-panda ask` looks at it."""
    from video_panda_hf.session import add_chosen_frames

    session.next_video()
    if is_picture(clip):
        session.add_picture(clip)
        return
    video_processor = session.processor.video_processor
    if options.num_frames is None and options.max_frames is None and options.fps is not None:
        session.add(clip)  # however long it is, few of its frames are in memory at a time
        return
    sampling = common.sampling(options)
    frames, _ = video_processor.fetch_videos(clip, lambda video: video_processor.sample_frames(video, **sampling))
    add_chosen_frames(session, frames)


def is_picture(clip: str) -> bool:
    from video_panda_hf.decoding import VideoDecodeError, decode_picture

    try:
        decode_picture(clip)
    except VideoDecodeError:
        return False
    return True


def answer(session, question: str, options: argparse.Namespace) -> None:
    """Prints the answer. Ctrl-C stops it, and what there is of it is part of the conversation."""
    begun, pieces = time.monotonic(), []
    generation = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    with stopped_by_ctrl_c() as was_stopped, closing(session.stream(question, remember=True, **generation)) as stream:
        for text in stream:
            pieces.append(text)
            if not options.json:
                print(text, end="", flush=True)
    stopped = was_stopped()
    if options.json:
        text, seconds = "".join(pieces).strip(), round(time.monotonic() - begun, 3)
        common.print_json(question=question, answer=text, seconds=seconds, stopped=stopped)
    else:
        print(flush=True)
    if stopped:
        print("(stopped)", file=sys.stderr)


@contextmanager
def stopped_by_ctrl_c():
    """The first Ctrl-C ends the block, a second one the program. Gives a function that says if there was one."""
    count = 0

    def stop(*_):
        nonlocal count
        count += 1
        if count > 1:
            os._exit(common.INTERRUPTED)
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: count > 0
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, former)
