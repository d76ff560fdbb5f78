"""`video-panda push`: a checkpoint to the Hugging Face Hub."""

import argparse
import os

from . import options as common


EXAMPLES = """  video-panda push runs/mine user/my-video-panda --private
  video-panda push converted user/my-video-panda --create-pr --license llama2

Log in first with `hf auth login`, or set HF_TOKEN."""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "push",
        push,
        EXAMPLES,
        help="upload a checkpoint to the Hugging Face Hub",
        description="Upload a folder with model and processor, or with a PEFT adapter, to the Hugging Face Hub. It is "
        "checked first, and appears in one commit or not at all. It gets a model card if it has none.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="what save_pretrained or video-panda convert wrote")
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


def push(options: argparse.Namespace) -> int:
    if not os.path.isdir(options.folder):
        raise FileNotFoundError(f"{options.folder} is not a folder.")
    common.check_model(options.folder)
    with common.importing():
        from huggingface_hub.errors import HfHubHTTPError

        from video_panda_hf.hub import push_folder

    try:
        print(push_folder(**vars(options)))
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(f"{error} Log in first: `hf auth login`, or give a valid --token.") from error
    return 0
