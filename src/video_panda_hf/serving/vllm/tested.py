"""The releases of vLLM that the plugin was tested with. With another one, importing this is an `ImportError`."""

import vllm
from packaging.specifiers import SpecifierSet


TESTED = ">=0.32,<0.34"

if not SpecifierSet(TESTED).contains(vllm.__version__, prereleases=True):
    raise ImportError(
        f"video-panda-hf serves Video-Panda by vLLM {TESTED}, not {vllm.__version__}: "
        f"`pip install 'vllm{TESTED}'`, or a newer video-panda-hf"
    )
