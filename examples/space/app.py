"""The demo as a Hugging Face Space. The variable `MODEL` of the Space names a checkpoint on the Hub."""

import os

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from video_panda_hf import SHIPPED_MODEL
from video_panda_hf.demo import build_demo


MODEL = os.environ.get("MODEL") or str(SHIPPED_MODEL)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto").to(device)
demo = build_demo(model, AutoProcessor.from_pretrained(MODEL), name=os.environ.get("MODEL"))

if __name__ == "__main__":
    demo.launch(ssr_mode=False, max_file_size="512mb")
