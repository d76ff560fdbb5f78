"""No test reaches for the network, and pytest's workers share the cores instead of fighting for them."""

import multiprocessing
import os

import pytest

from helpers.forks import TRAINING, Forks


os.environ["HF_HUB_OFFLINE"] = "1"
# Workers of the kind "forkserver" get all by pickle, as those of "spawn" do, but share one import of this.
multiprocessing.set_forkserver_preload(["video_panda_hf.training"])
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


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
