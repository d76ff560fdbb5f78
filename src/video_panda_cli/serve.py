"""`video-panda serve`: an OpenAI-compatible server."""

import argparse
import importlib.util

from . import options as common


EXAMPLES = """  video-panda serve path/to/checkpoint --port 8000
  video-panda serve user/checkpoint --device cuda --dtype bfloat16

Needs `pip install "transformers[serving]"`; `transformers serve --help` lists the options."""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "serve",
        serve,
        EXAMPLES,
        usage="video-panda serve MODEL [OPTIONS]",
        help="answer questions over HTTP, as an OpenAI-compatible server",
        description="`transformers serve`, which knows Video-Panda this way, with the model's own number of frames.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or Hub id")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="those of `transformers serve`, after MODEL"
    )


def serve(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError('a server needs more packages: pip install "transformers[serving]"')
    common.check_model(options.model)
    with common.importing():
        import video_panda_hf  # noqa: F401  # first, because it hides what others log while they are imported

        # isort: split
        from transformers.cli.transformers import app

    # `transformers serve` samples 32 frames by default. `null` restores the model's own number.
    frames = ["--chat-template-kwargs", '{"num_frames": null}']
    app(["serve", *frames, options.model, *options.options], prog_name="video-panda")
    return 0
