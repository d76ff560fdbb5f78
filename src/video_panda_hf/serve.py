"""`python -m video_panda_hf.serve MODEL …`: `transformers serve` that knows Video-Panda, with the same options.

Needs `pip install "transformers[serving]"`.
"""

import sys

from transformers.cli.transformers import app


def main(arguments: list[str]):
    # `transformers serve` takes 32 frames of a video unless told otherwise; `null` is what the model was trained with.
    app(["serve", "--chat-template-kwargs", '{"num_frames": null}', *arguments], prog_name="video_panda_hf.serve")


if __name__ == "__main__":
    main(sys.argv[1:])
