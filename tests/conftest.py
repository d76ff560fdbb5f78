"""No test reaches for the network, and pytest's workers do not fight for the cores."""

import multiprocessing
import os

import pytest

from helpers.forks import TRAINING, Forks


os.environ["HF_HUB_OFFLINE"] = "1"
# Workers of the kind "forkserver" get all by pickle, as those of "spawn" do, but share one import of this.
multiprocessing.set_forkserver_preload(["video_panda_hf.training"])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from threads, and lose much on busy cores


@pytest.fixture(scope="session")
def forks():
    """Runs commands whose imports take long and are not what is tested."""
    yield from forks_of(*TRAINING)


@pytest.fixture(scope="session")
def bare_forks():
    """As `forks`, for commands that read other variables `HF_...`, or lack a package."""
    yield from forks_of()


def forks_of(*modules: str):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with Forks(*modules) as forks:
        yield forks
