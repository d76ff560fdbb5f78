"""`python -m video_panda_hf.evaluation.lmms` prints the folder of our tasks, for lmms-eval's `--include_path`."""

from pathlib import Path


print(Path(__file__).parent / "tasks")
