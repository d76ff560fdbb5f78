"""`python -m video_panda_hf.cli` is `video-panda`. Its code is in `video_panda_cli`, which is imported faster."""

import sys

from video_panda_cli import build_parser, main


__all__ = ["build_parser", "main"]


if __name__ == "__main__":
    sys.exit(main())
