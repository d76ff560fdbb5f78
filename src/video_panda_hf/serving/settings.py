"""What a server allows. Nothing in a request changes it."""

import os
from dataclasses import dataclass
from typing import Any

from video_panda_hf.decoding import CAN_ISOLATE, DecodeLimits


NO_FILES = {"dev", "proc", "sys"}  # folders of / in which a file is not what it seems


@dataclass(frozen=True)
class ServerSettings:
    """
    What a server allows.

    Args:
        model_name (`str`):
            The name of the model in requests and answers.
        api_key (`str`, *optional*):
            What a request must have as `Authorization: Bearer …`. By default nothing is needed.
        allowed_hosts (`tuple[str, ...]`, *optional*):
            Names in the `Host` header besides localhost and the address at which a request arrives. `"*"` is any.
        allowed_origins (`tuple[str, ...]`, *optional*):
            Origins of web pages whose scripts may call the server. None by default.
        allowed_local_media_path (`str`, *optional*):
            The folder whose files a request may name. None by default.
        allowed_media_domains (`tuple[str, ...]`, *optional*):
            Hosts that a URL in a request may name; `"*"` is any. None by default.
        allow_private_networks (`bool`, *optional*, defaults to `False`):
            Whether these hosts may have loopback, private, link-local or reserved addresses.
        max_requests (`int`, *optional*, defaults to 32):
            Requests that are answered or wait at a time. More get status 503.
        max_request_bytes (`int`, *optional*, defaults to 64 MiB):
            Size of a request, data URLs included.
        max_media (`int`, *optional*, defaults to 8):
            Videos and pictures of a request.
        max_media_bytes (`int`, *optional*, defaults to 256 MiB):
            Size of one video or picture, and of all that are fetched for a request.
        max_media_seconds (`float`, *optional*, defaults to 30.0):
            Time to fetch the videos and pictures of a request, and then to decode them.
        max_pixels (`int`, *optional*, defaults to 4096 · 2304):
            Pixels of a frame.
        max_frames (`int`, *optional*, defaults to 128):
            Frames of all videos and pictures of a request that the model sees.
        max_new_tokens (`int`, *optional*, defaults to 1024):
            Tokens of an answer, also where a request does not say how many.
        decoding_threads (`int`, *optional*, defaults to 2):
            Requests whose videos are decoded at a time.

    Raises:
        ValueError: if `allowed_local_media_path` is not a folder, or is one of the system's own.
    """

    model_name: str
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None
    allowed_media_domains: tuple[str, ...] = ()
    allow_private_networks: bool = False
    max_requests: int = 32
    max_request_bytes: int = 64 * 2**20
    max_media: int = 8
    max_media_bytes: int = 256 * 2**20
    max_media_seconds: float = 30.0
    max_pixels: int = 4096 * 2304
    max_frames: int = 128
    max_new_tokens: int = 1024
    decoding_threads: int = 2

    def __post_init__(self):
        if (folder := self.allowed_local_media_path) is None:
            return
        if os.open not in os.supports_dir_fd:
            raise ValueError("this system cannot open a file safely below a folder: use data URLs")
        if not os.path.isdir(folder):
            raise ValueError(f"{folder!r} is not a folder, and local media must be in one")
        if os.path.realpath(folder).split(os.sep)[1] in NO_FILES:
            raise ValueError(f"{folder!r} is a folder of the system and holds no media")

    def processor_settings(self, media: int) -> dict[str, Any]:
        """How the processor decodes a request's videos and pictures, which are `media`. Nothing else says so."""
        limits = DecodeLimits(
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            max_output_bytes=2**30,
            max_source_bytes=self.max_media_bytes,
            max_seconds=self.max_media_seconds / max(1, media),
            isolate=CAN_ISOLATE,
        )
        return {"decode_limits": limits}
