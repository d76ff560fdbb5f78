"""`video-panda convert`, also `video-panda-convert`: a checkpoint of the reference release for `from_pretrained`."""

import argparse
import sys

from . import options as common


DESCRIPTION = (
    "Convert a checkpoint of the reference release (or EVE-7B, where training starts) into a folder with model and "
    "processor, for `from_pretrained`."
)
EXAMPLES = "  {} checkpoints/Video-Panda-7B converted --tokenizer lmsys/vicuna-7b-v1.5 --dtype bfloat16"


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "convert",
        convert,
        EXAMPLES.format("video-panda convert"),
        help="convert a checkpoint of the reference release",
        description=DESCRIPTION,
    )
    add_arguments(parser)


def new_parser() -> argparse.ArgumentParser:
    """The parser of `video-panda-convert`."""
    parser = argparse.ArgumentParser(
        prog="video-panda-convert",
        description=DESCRIPTION,
        epilog=f"example:\n{EXAMPLES.format('video-panda-convert')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder with config.json and *.bin or *.safetensors")
    parser.add_argument("target", metavar="TARGET", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="the LLM's tokenizer (default: the one in SOURCE)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="type of the weights (default: as in SOURCE)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: %(default)s)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the canvas (default: as in SOURCE, 32 patches, or EVE's)",
    )
    parser.add_argument(
        "--keep-distillation-head",
        action="store_true",
        help="also write distillation_head.safetensors, to go on training with it",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--push-to", metavar="REPO_ID", help="also upload TARGET to the Hub, where it is kept as well")
    parser.add_argument("--private", action="store_true", help="with --push-to: make a new repository a private one")


def main(arguments: list[str] | None = None) -> None:
    """
    Runs the command `video-panda-convert`. `--help` and wrong use are answered before torch is imported.

    Args:
        arguments (`list[str]`, *optional*):
            Arguments of the command. Defaults to those of the process.

    Raises:
        SystemExit: If the conversion or the upload fails, with the message.
    """
    options = new_parser().parse_args(arguments)
    with common.importing():
        from video_panda_hf.conversion import UploadError, convert_and_push

    try:
        convert_and_push(**vars(options))
    except KeyboardInterrupt:
        sys.exit(common.INTERRUPTED)
    except (OSError, ValueError, UploadError) as error:
        sys.exit(f"video-panda-convert: {error}")


def convert(options: argparse.Namespace) -> int:
    common.check_folder(options.source)
    with common.importing():
        from video_panda_hf.conversion import UploadError, convert_and_push

    try:
        convert_and_push(**vars(options))
    except UploadError as error:
        raise common.WorkFailed(error) from error
    return 0
