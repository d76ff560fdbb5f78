"""`video-panda serve`: an OpenAI-compatible server."""

import argparse
import importlib.util
import os
import socket

from . import options as common


EXAMPLES = """  video-panda serve path/to/checkpoint --port 8000
  video-panda serve user/checkpoint --device cuda --allowed-local-media-path /videos
  VIDEO_PANDA_API_KEY=… video-panda serve user/checkpoint --host 0.0.0.0 --allowed-host panda.example.com

Needs `pip install "video-panda-hf[serve]"`. A request may bring its videos as data URLs; files and addresses
are closed unless they are opened here."""
KEY_VARIABLE = "VIDEO_PANDA_API_KEY"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
LOG_LEVELS = ["critical", "error", "warning", "info", "debug"]
# Options whose values are those of `ServerSettings`, by the same names
LIMITS = {
    "max-requests": (32, "requests that are answered or wait at a time; more get status 503"),
    "max-request-bytes": (64 * 2**20, "size of a request, data URLs included"),
    "max-media": (8, "videos and pictures of a request"),
    "max-media-bytes": (256 * 2**20, "size of one video or picture, and of all that are fetched for a request"),
    "max-media-seconds": (30.0, "seconds to fetch a request's videos, and then to decode them"),
    "max-pixels": (4096 * 2304, "pixels of a frame"),
    "max-frames": (128, "frames of all videos of a request that the model sees"),
    "max-new-tokens": (1024, "tokens of an answer"),
    "decoding-threads": (2, "requests whose videos are decoded at a time"),
}


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "serve",
        serve,
        EXAMPLES,
        usage="video-panda serve MODEL [OPTIONS]",
        help="answer questions over HTTP, as an OpenAI-compatible server",
        description="An OpenAI-compatible server, with /v1/chat/completions, /v1/models and /health.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="the port; 0 is a free one (default: %(default)s)")
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's name in requests (default: MODEL)")
    common.add_device_options(parser)
    who = parser.add_argument_group("who may ask")
    who.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"ask for this key; safer as {KEY_VARIABLE} in the environment (default: none)",
    )
    add_names(who, "--allowed-host", "NAME", "names in the Host header, besides localhost and the address itself")
    add_names(who, "--allowed-origin", "ORIGIN", "web pages whose scripts may ask, such as https://example.com")
    who.add_argument(
        "--enable-cors",
        dest="allowed_origin",
        action="append_const",
        const="*",
        help="the same as --allowed-origin '*': every web page",
    )
    media = parser.add_argument_group("what a request may name, besides data URLs")
    media.add_argument("--allowed-local-media-path", metavar="DIR", help="files in this folder")
    add_names(media, "--allowed-media-domains", "HOST", "URLs on these hosts; * is every public address")
    media.add_argument(
        "--allow-private-networks",
        action="store_true",
        help="also where these hosts have loopback, private or link-local addresses",
    )
    limits = parser.add_argument_group("limits")
    for name, (default, text) in LIMITS.items():
        kind = common.positive if isinstance(default, float) else common.count
        limits.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="(default: %(default)s)")


def add_names(group, option: str, name: str, text: str) -> None:
    group.add_argument(option, nargs="+", action="extend", default=[], metavar=name, help=text)


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port")
    return number


def serve(options: argparse.Namespace) -> int:
    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn")):
        raise ValueError('a server needs more packages: pip install "video-panda-hf[serve]"')
    options.device = None if options.device == "auto" else options.device
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    with listening_at(options.host, options.port) as sock:
        processor, load_model = common.load_processor(options)
        with common.importing():
            from video_panda_hf.serving import ServerSettings, create_app, run

        settings = ServerSettings(
            model_name=options.served_model_name or options.model,
            api_key=key,
            allowed_hosts=(*options.allowed_host, options.host),
            allowed_origins=tuple(options.allowed_origin),
            allowed_local_media_path=options.allowed_local_media_path,
            allowed_media_domains=tuple(options.allowed_media_domains),
            allow_private_networks=options.allow_private_networks,
            **{name: getattr(options, name) for name in (limit.replace("-", "_") for limit in LIMITS)},
        )
        app = create_app(load_model(), processor, settings)
        host = f"[{options.host}]" if ":" in options.host else options.host
        common.complain(f"{settings.model_name} is at http://{host}:{sock.getsockname()[1]}/v1. Ctrl-C ends it.")
        if key is None and options.host not in LOOPBACK:
            common.complain(f"anybody who reaches {options.host} may ask: set {KEY_VARIABLE}.")
        run(app, sock, options.log_level)
    return 0


def listening_at(host: str, number: int) -> socket.socket:
    """A socket that is bound, so that a port that is taken is told before the model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}.") from error
    try:
        if os.name == "posix":  # elsewhere it would take the port of another program
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ValueError(f"--host {host} --port {number}: {error.strerror}.") from error
    return sock
