"""The releases of vLLM that the plugin was tested with."""

from packaging.specifiers import SpecifierSet


TESTED = SpecifierSet(">=0.32,<0.33")


def check_version(version: str) -> None:
    """
    Raises:
        ImportError: for a release of vLLM that this package was not tested with.
    """
    if not TESTED.contains(version, prereleases=True):
        raise ImportError(
            f"video-panda-hf serves Video-Panda by vLLM {TESTED}, not {version}: "
            f"`pip install 'vllm{TESTED}'`, or a newer video-panda-hf"
        )
