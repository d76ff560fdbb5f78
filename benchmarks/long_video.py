"""Memory and time of long videos: `encode_videos` compared with the whole video at once.

    python benchmarks/long_video.py [--frames 64 256] [--json FILE]

Each measurement is a process of its own. The videos have 1280 × 720 pixels and one frame a second; STAB has the
released size and random weights. The memory is the peak of what is resident, less that of the model with one clip.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from session import new_model
from tables import finish
from video_panda_hf.session import encode_videos


CONTEXT = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs=2, default=[64, 256], metavar="N", help="of two videos")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # way, video, frames: for the processes
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in arguments.frames:
            video = write_video(Path(folder) / f"{frames}.mp4", frames)
            for way in ("whole", "pieces"):
                command = [sys.executable, __file__, "--one", way, str(video), str(frames)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"way": way, "frames": frames, **json.loads(output.splitlines()[-1])})
    threads = torch.get_num_threads()
    finish("long_video", {"setting": f"cpu, float32, {threads} threads", "rows": rows}, arguments.json)


def measure(way: str, video: str, frames: str) -> dict:
    """Seconds, and megabytes beyond those of one clip."""
    torch.manual_seed(0)
    model, processor = new_model(448, CONTEXT)

    def encoded(count: int):
        content = [{"type": "video", "path": video}, {"type": "text", "text": "w1"}]
        messages = [{"role": "user", "content": content}]
        if way == "pieces":
            return encode_videos(model, processor, messages, num_frames=count)
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", num_frames=count
        )
        with torch.inference_mode():
            return model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    encoded(4)
    before = peak_megabytes()
    start = time.perf_counter()
    encoded(int(frames))
    return {"seconds": time.perf_counter() - start, "megabytes": peak_megabytes() - before}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def write_video(path: Path, frames: int) -> Path:
    picture = np.zeros((720, 1280, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(frames):
            picture[:] = number % 256
            picture[:, number % 1200 :][:, :80] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    main()
