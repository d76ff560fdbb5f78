"""`explain`: one video and question → the maps, and pictures of them."""

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from . import pictures
from .ablation import answers_of
from .answers import METHODS, answer_maps, generate_ids
from .inputs import inputs_of, pixels_of, sampled_frames
from .vision import encode, parts_of


@dataclass
class Explanation:
    r"""
    What the model looked at in a video of T frames with H × W patches and h × w tokens each. A map lies on the whole
    frame: the canvas around it is taken out. GSTRA's of a picture are `None`.

    `fsra`, `gstra`, `lsd` and the shares do not depend on the question.

    Args:
        frames (`np.ndarray` of shape `(T, height, width, 3)`):
            The frames that the model got, as bytes, before they were resized.
        fsra (`torch.Tensor` of shape `(T, h, w)`):
            FSRA's attention, the mean of its heads. The sum of a frame is 1.
        gstra (`torch.Tensor` of shape `(T, H, W)`, *optional*):
            GSTRA's attention, the mean of its heads. The sum of a clip of 4 frames is 1.
        gstra_background (`torch.Tensor` of shape `(clips,)`, *optional*):
            The share of GSTRA's attention that lay on the canvas' background, and is not in `gstra`.
        lsd (`torch.Tensor` of shape `(T, h, w, 4)`):
            LSD's attention to the four patches of a window, row by row. Their sum is 1.
        alpha (`torch.Tensor` of shape `(D,)`):
            The weight of the frame (FSRA) in each channel of a context token; that of the clip (GSTRA) is 1 - alpha.
        frame_share_of_channels (`torch.Tensor` of shape `(T, D)`):
            How much of each channel of each frame's context token comes from the frame: |α·f| / (|α·f| + |(1-α)·g|).
        frame_share (`torch.Tensor` of shape `(T,)`):
            The same as one number, by the lengths of the two vectors.
        question (`str`, *optional*), text (`str`, *optional*):
            The question and the answer.
        tokens (`list[str]`, *optional*):
            The answer's tokens.
        answer (`torch.Tensor` of shape `(answer tokens, T, h, w)`, *optional*):
            Where each token of the answer comes from, by `method`. Its sum over the video is 1.
        temporal (`torch.Tensor` of shape `(T,)`, *optional*):
            The share of each frame in the answer, its context token and `<row>` included.
        context (`torch.Tensor` of shape `(T,)`, *optional*):
            The share of each frame's context token in the answer, as a part of `temporal`.
        method (`str`, *optional*):
            How `answer` was found: `"attention"` or `"gradient"`.
        ablation (`dict[str, str]`, *optional*):
            The answers with a part taken out, as [`answers_without`] returns them.
    """

    frames: np.ndarray
    fsra: torch.Tensor
    gstra: torch.Tensor | None
    gstra_background: torch.Tensor | None
    lsd: torch.Tensor
    alpha: torch.Tensor
    frame_share_of_channels: torch.Tensor
    frame_share: torch.Tensor
    question: str | None = None
    text: str | None = None
    tokens: list[str] = field(default_factory=list)
    answer: torch.Tensor | None = None
    temporal: torch.Tensor | None = None
    context: torch.Tensor | None = None
    method: str | None = None
    ablation: dict[str, str] | None = None

    def map(self, name: str, token: int | None = None) -> torch.Tensor:
        r"""
        A map to be drawn, (T, rows, columns).

        Args:
            name (`str`):
                `"fsra"`, `"gstra"`, `"lsd"` (its weights on the patches of each window) or `"answer"`.
            token (`int`, *optional*):
                A token of the answer. Defaults to the mean of all of them.

        Raises:
            ValueError: for a map that is not there.
        """
        if name not in pictures.CAPTIONS:
            raise ValueError(f"a map is one of {', '.join(pictures.CAPTIONS)}, not {name!r}")
        if (found := getattr(self, name)) is None:
            reason = "no question was asked" if name == "answer" else "the model, or a picture, has none"
            raise ValueError(f"there is no map {name!r}: {reason}")
        if name == "answer":
            return found.mean(0) if token is None else found[token]
        if name == "lsd":
            merge = round(found.shape[3] ** 0.5)
            cells = found.unflatten(3, (merge, merge)).permute(0, 1, 3, 2, 4)  # (T, h, merge, w, merge)
            return cells.flatten(3, 4).flatten(1, 2)
        return found

    @property
    def maps(self) -> list[str]:
        """The maps that are drawn by default."""
        return [name for name in ("fsra", "gstra", "answer") if getattr(self, name) is not None]

    def overlay(self, name: str | None = None, token: int | None = None, height: int = 168) -> list[Image.Image]:
        r"""
        The frames with a map on them. Its brightest place is the maximum over all frames.

        Args:
            name (`str`, *optional*), token (`int`, *optional*):
                As in [`~Explanation.map`]. Defaults to the answer's map, or FSRA's without a question.
            height (`int`, *optional*, defaults to 168):
                Height of the pictures.
        """
        return pictures.overlay(self.frames, self.map(name or self.maps[-1], token).numpy(), height)

    def save(self, file: str | os.PathLike, maps: list[str] | None = None, seconds_per_frame: float = 0.5) -> None:
        r"""
        Writes a picture of the maps beside the frames, with question and answer.

        Args:
            file (`str` or `Path`):
                A file that ends in `.gif` or `.mp4` (one frame after the other) or `.png` (all frames side by side).
            maps (`list[str]`, *optional*):
                The maps to draw. Defaults to those of FSRA, GSTRA and the answer, as far as there are such.
            seconds_per_frame (`float`, *optional*, defaults to 0.5):
                How long a frame is shown.

        Raises:
            ValueError: for a file of another kind or a map that is not there.
        """
        pictures.save(self, file, self.maps if maps is None else maps, seconds_per_frame)

    def sheet(self, maps: list[str] | None = None) -> Image.Image:
        """One picture with all frames side by side and a row for each map, as `save` writes it to a `.png`."""
        return pictures.sheet(self, self.maps if maps is None else maps)

    def show(self, maps: list[str] | None = None) -> None:
        """Shows all frames with the maps: in a notebook below the cell, else in a window."""
        pictures.show(self.sheet(maps))


def explain(
    model,
    processor,
    video,
    question: str | None = None,
    *,
    method: str = "gradient",
    ablation: bool = False,
    system: str | None = None,
    rate: float | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 256,
) -> Explanation:
    r"""
    Shows what the model looked at in a video, and where its answer comes from.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model. It is used in evaluation mode.
        processor (`VideoPandaProcessor`):
            Its processor.
        video:
            One video or picture: a file as the processor takes it (path, URL, bytes, file object, or a dictionary with
            "video", "start" and "end"), or frames in memory: a picture, an array, a tensor, or a list of them.
        question (`str`, *optional*):
            The question. Without one there is no map of an answer.
        method (`str`, *optional*, defaults to `"gradient"`):
            Where an answer comes from: `"gradient"` is gradient × input of the video's tokens, `"attention"` the
            language model's attention to them.
        ablation (`bool`, *optional*, defaults to `False`):
            Whether to answer also with the parts of the context tokens taken out.
        system (`str`, *optional*):
            A system message.
        rate (`float`, *optional*):
            Frames a second of frames in memory.
        num_frames (`int`, *optional*), fps (`float`, *optional*), max_frames (`int`, *optional*):
            Which frames to take, as in the processor.
        max_new_tokens (`int`, *optional*, defaults to 256):
            Longest answer, in tokens.

    Returns:
        [`Explanation`].

    Raises:
        ValueError: for an unknown method, or a video that the processor does not take.

    Example:

    ```python
    explanation = explain(model, processor, "clip.mp4", "Which way does it move?")
    explanation.save("explanation.gif")
    print(explanation.text, explanation.temporal)
    ```
    """
    if method not in METHODS:
        raise ValueError(f"`method` is one of {', '.join(METHODS)}, not {method!r}")
    if ablation and question is None:
        raise ValueError("`ablation` compares answers: give a `question`")
    sampling = {"num_frames": num_frames, "fps": fps, "max_frames": max_frames}
    frames, metadata = sampled_frames(processor, video, rate, sampling)
    inputs = inputs_of(processor, frames, metadata, question, system)
    was_training = model.training
    model = parts_of(model.eval())[0]
    try:
        encoded, maps = encode(model, inputs)
        if question is not None:
            ids = generate_ids(model, inputs, encoded, processor.tokenizer, max_new_tokens)
            maps |= answer_maps(model, inputs, encoded, ids, method)
            maps |= {"question": question, "method": method, "tokens": [processor.decode([i]) for i in ids.tolist()]}
            maps["text"] = processor.decode(ids, skip_special_tokens=True).strip()
        if ablation:
            maps["ablation"] = answers_of(model, processor, inputs, max_new_tokens)
    finally:
        model.train(was_training)
    return Explanation(pixels_of(frames), **maps)
