"""The test mixins that transformers applies to its own models, for use on ours.

They are not installed with the `transformers` wheel, but its source distribution holds most of them. Run

    python tests/transformers_suite.py

once per installed version of transformers: it fetches the sdist and puts its tests into
`.transformers-tests/<version>/` (ignored by git), next to stand-ins for the few modules that the sdist lacks. A test
module then writes

    ProcessorTesterMixin = import_suite("test_processing_common").ProcessorTesterMixin

and is skipped, with the command to run, where the folder is missing. A full checkout of transformers has more (the
generation and export mixins, which are empty classes here): set `TRANSFORMERS_CHECKOUT` to its root to test with them.
Only these are taken from it, everything else from the sdist: a checkout is seldom of the installed version. One of
5.16.0.dev0 (August 2026) works with 5.23 and 5.24, which still know the cache's old name, `past_key_values`.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


REPOSITORY = Path(__file__).resolve().parent.parent
SUITE = REPOSITORY / ".transformers-tests" / transformers.__version__

# What the mixins import and the sdist lacks: an empty class for a test mixin, media made here and not fetched.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": """
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "regression",
}
""",
    "utils/fetch_hub_objects_for_ci.py": '''
"""Local media in place of the Hub's: an .mp4 is 11 frames of noise at 30 fps, a picture is grey."""

from pathlib import Path

MEDIA = Path(__file__).parent / "media"


def url_to_local_path(url, return_url_if_not_found=True):
    path = MEDIA / url.rsplit("/", 1)[-1]
    if not path.exists():
        MEDIA.mkdir(exist_ok=True)
        if path.suffix == ".mp4":
            write_video(path)
        elif path.suffix in (".png", ".jpg"):
            from PIL import Image

            Image.new("RGB", (320, 240), "grey").save(path)
    return str(path)


def write_video(path, num_frames=11, fps=30, width=320, height=240):
    import av
    import numpy as np

    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(num_frames):
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
''',
}


# Packages of `tests` that the sdist lacks and a checkout has.
FROM_CHECKOUT = ("exporters", "generation")


def import_suite(name):
    """The module `tests.<name>` of transformers' test suite, e.g. `test_modeling_common`."""
    if not (SUITE / "tests" / f"{name}.py").exists():
        import pytest

        pytest.skip(
            f"transformers' {name} is not here; run: {sys.executable} {Path(__file__).relative_to(REPOSITORY)}",
            allow_module_level=True,
        )
    if str(SUITE) not in sys.path:
        sys.path.insert(0, str(SUITE))
        if "TRANSFORMERS_CHECKOUT" in os.environ:
            tests = Path(os.environ["TRANSFORMERS_CHECKOUT"]).resolve() / "tests"
            for name_of_package in FROM_CHECKOUT:
                importlib.import_module(f"tests.{name_of_package}").__path__[:] = [str(tests / name_of_package)]
    return importlib.import_module(f"tests.{name}")


def fetch_suite():
    """Fill `SUITE` from the sdist of the installed transformers; nothing is done if it is there already."""
    if SUITE.exists():
        return
    with tempfile.TemporaryDirectory() as download:
        requirement = f"transformers=={transformers.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", download]
        subprocess.run([*pip, requirement], check=True)
        (archive,) = Path(download).glob("transformers-*.tar.gz")

        unfinished = Path(tempfile.mkdtemp(dir=download))
        with tarfile.open(archive) as sdist:
            for member in sdist:
                inside = Path(*Path(member.name).parts[1:])  # without the folder transformers-<version>
                if member.isfile() and inside.parts[0] == "tests" and inside.suffix == ".py":
                    (unfinished / inside).parent.mkdir(parents=True, exist_ok=True)
                    (unfinished / inside).write_bytes(sdist.extractfile(member).read())
        for path, text in STAND_INS.items():
            if not (unfinished / path).exists():
                (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / path).write_text(text.lstrip())

        SUITE.parent.mkdir(exist_ok=True)
        shutil.move(unfinished, SUITE)


if __name__ == "__main__":
    fetch_suite()
    print(SUITE)
