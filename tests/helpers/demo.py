"""The demo, served on this machine for a test, and a note of every address that the process connects to."""

import socket
from contextlib import contextmanager

from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf import SHIPPED_MODEL


@contextmanager
def served(**options):
    """Gives the address of a demo of the shipped model."""
    from video_panda_hf.demo import build_demo

    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
    page = build_demo(model, processor, name="the small model of moving shapes", **options)
    settings = {"quiet": True, "share": False, "ssr_mode": False, "prevent_thread_lock": True}
    try:
        try:
            _, address, _ = page.launch(**settings)
        except ValueError:  # on a busy machine, Gradio gives up waiting for its own first answer
            page.close(verbose=False)
            _, address, _ = page.launch(**settings)
        yield address
    finally:
        page.close(verbose=False)


@contextmanager
def noted_connections():
    """Gives a list of the hosts that this process connects to within the block."""
    hosts, connect = [], socket.socket.connect

    def noting(self, address):
        if isinstance(address, tuple):
            hosts.append(address[0])
        return connect(self, address)

    socket.socket.connect = noting
    try:
        yield hosts
    finally:
        socket.socket.connect = connect
