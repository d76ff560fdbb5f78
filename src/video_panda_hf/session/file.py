"""A session as one file: its cache, its conversation, and the frames that wait for the next clip."""

import json
import os
from fractions import Fraction

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache import cache_of
from .prompt import Prompt, Video
from .sampling import FrameSampler


KEY = "video_panda_session"  # of the file's metadata
VERSION = 1


def write_session(session, path: str | os.PathLike) -> None:
    """Writes a session. An interrupted call leaves an older file of this name as it was."""
    tensors = {
        "ids": torch.from_numpy(session._cached.ids),
        "positions": torch.from_numpy(session._cached.positions),
    }
    for index, layer in enumerate(session._cache.layers):
        tensors[f"layers.{index}.keys"] = layer.keys.cpu().contiguous()
        tensors[f"layers.{index}.values"] = layer.values.cpu().contiguous()
    videos = []
    for index, video in enumerate(session._videos):
        for number, frame in enumerate(video.kept_frames):
            tensors[f"videos.{index}.frames.{number}"] = torch.from_numpy(frame)
        state = {name: getattr(video, name) for name in ("shape", "clip_size", "clips", "dropped", "ended")}
        state |= {"frame_ids": video.frame_ids.tolist(), "waiting": len(video.waiting)}
        state["stamps"] = [stamp.tolist() for stamp in video.stamps]
        if video.sampler is not None:
            state |= {"seconds": video.sampler.seconds.as_integer_ratio(), "taken": video.sampler.taken}
        videos.append(state)
    state = {
        "version": VERSION,
        "model": signature(session.model),
        "settings": {name: getattr(session, name) for name in ("fps", "system", "max_clips", "timestamps")},
        "messages": session._messages,
        "content": session._content,
        "videos": videos,
    }
    unfinished = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        save_file(tensors, unfinished, metadata={KEY: json.dumps(state)})
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def read_session(cls: type, path: str | os.PathLike, model, processor):
    """The session of this class in a file. Raises `ValueError` if it is none, or one of another model."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is not a file that VideoPandaSession.save wrote") from error
    if state["version"] != VERSION or state["model"] != signature(model):
        raise ValueError(f"{path} is the session of another model: {state['model']}, not {signature(model)}")

    session = cls(model, processor, **state["settings"])
    session._messages, session._content = state["messages"], state["content"]
    session._cached = Prompt(tensors["ids"].numpy(), tensors["positions"].numpy())
    layers = count(tensors, "layers.") // 2
    session._cache = cache_of((tensors[f"layers.{n}.keys"], tensors[f"layers.{n}.values"]) for n in range(layers))
    session._videos = [video_of(saved, index, tensors, session.fps) for index, saved in enumerate(state["videos"])]
    return session


def video_of(saved: dict, index: int, tensors: dict, fps: float) -> Video:
    prefix = f"videos.{index}.frames."
    frames = [tensors[f"{prefix}{number}"].numpy() for number in range(count(tensors, prefix))]
    waiting, unfinished = frames[: saved["waiting"]], frames[saved["waiting"] :]
    sampler = None
    if "seconds" in saved:
        sampler = FrameSampler(Fraction(fps), Fraction(*saved["seconds"]), saved["taken"], unfinished)
    counts = {name: saved[name] for name in ("clip_size", "clips", "dropped", "ended")}
    stamps = [np.array(stamp) for stamp in saved.get("stamps", [])]
    shape, frame_ids = tuple(saved["shape"]), np.array(saved["frame_ids"])
    return Video(sampler, shape, frame_ids, waiting=waiting, stamps=stamps, **counts)


def count(tensors: dict, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in tensors)


def signature(model) -> dict:
    """What has to be alike for a model to use the cache of another."""
    config = model.config.get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {**{name: getattr(config, name) for name in names}, "dtype": str(model.dtype)}
