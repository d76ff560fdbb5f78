"""`video-panda demo`: the model in a browser."""

import argparse
import importlib.util
import sys
import threading

from . import options as common


EXAMPLES = """  video-panda demo
  video-panda demo path/to/checkpoint --device cuda --dtype bfloat16
  video-panda demo user/checkpoint --host 0.0.0.0 --port 7860

Needs `pip install "video-panda-hf[demo]"`."""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "demo",
        demo,
        EXAMPLES,
        help="ask questions about clips in a browser",
        description="Serve a page to upload or record clips, ask about them, and see what the model looked at. It "
        "works without a network. Ctrl-C ends it.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint folder or Hub id (default: the small model of moving shapes that ships with the package)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="0.0.0.0 lets others in (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860 on)")
    parser.add_argument(
        "--max-new-tokens",
        type=common.count,
        default=256,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    common.add_device_options(parser)


def demo(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the demo needs more packages: pip install "video-panda-hf[demo]"')
    processor, load_model = common.load_processor(options)
    from video_panda_hf.demo import build_demo

    name = options.model or "the small model of moving shapes"
    page = build_demo(load_model(), processor, name=name, max_new_tokens=options.max_new_tokens)
    quiet = {"quiet": True, "share": False, "ssr_mode": False, "prevent_thread_lock": True}
    _, address, _ = page.launch(server_name=options.host, server_port=options.port, max_file_size="512mb", **quiet)
    print(f"Video-Panda at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0
