"""Opens a video from a path, a URL, bytes or a file object, and trusts none of them."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from .decoding_errors import (
    DecodeLimits,
    NotAVideoError,
    UnsupportedCodecError,
    VideoLimitError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
    check_limit,
    errors_of,
)


VideoSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# FFmpeg also reads playlists, scripts and devices, which name other files and servers; a video needs none.
CONTAINER_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,rm,mxf,nut,ivf,gif,apng,webp,webp_anim,webp_pipe,"
    "h264,hevc,vvc,av1,obu,m4v,"
    "mpegvideo,mjpeg,mpjpeg,h263,h261,vc1,dv,dirac,avs,avs2,avs3,wtv,swf,yuv4mpegpipe,gxf,3dostr,roq,smk,bink,amv,"
    "png_pipe,jpeg_pipe,bmp_pipe"
)
_READ_SIZE = 2**18  # bytes that one read of a Python file object asks for


def describe(source: VideoSource) -> str:
    """A short name of the source for messages."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<video of {memoryview(source).nbytes} bytes>"
    name = getattr(source, "name", None)
    return f"<{type(source).__name__} {name!r}>" if isinstance(name, str) else f"<{type(source).__name__}>"


def is_url(source: VideoSource) -> bool:
    return isinstance(source, str) and "://" in source


@contextmanager
def open_video(source: VideoSource, limits: DecodeLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens `source` and yields its container and first video stream; closes what it opened and no more.

    A file object is read from its start whatever its position, which is put back afterwards.

    Raises:
        VideoDecodeError: of the kind that names what is wrong with the source.
        TypeError: if `source` is none of the kinds above.
    """
    video = describe(source)
    with ExitStack() as closing:
        with errors_of(video, is_url(source)):
            readable = closing.enter_context(_as_readable(source, limits))
            container = closing.enter_context(_open(readable, limits))
            stream = _video_stream(video, container)
        yield container, stream


@contextmanager
def _as_readable(source: VideoSource, limits: DecodeLimits) -> Iterator[str | BinaryIO]:
    """What `av.open` shall read: a URL (of a file, too) or a seekable file object positioned at its start."""
    video = describe(source)
    if is_url(source):
        scheme = source.split("://", 1)[0].lower()
        if scheme not in ("http", "https"):
            raise VideoNetworkError(f"{video}: URLs of kind {scheme!r} are not read, only http and https.")
        yield source
    elif isinstance(source, (str, os.PathLike)):
        _check_size(_file_size(source, video), video, limits)
        yield f"file:{os.fspath(source)}"  # so that FFmpeg takes no part of the path for a protocol or a pattern
    elif isinstance(source, (bytes, bytearray, memoryview)):
        _check_size(memoryview(source).nbytes, video, limits)
        with io.BytesIO(source) as file:
            yield file
    elif hasattr(source, "read"):
        if not (hasattr(source, "seekable") and source.seekable()):
            raise VideoUnreadableError(f"{video}: the file object cannot seek. Read it and pass the bytes.")
        position = source.tell()
        try:
            _check_size(source.seek(0, os.SEEK_END), video, limits)
            source.seek(0)
            yield source
        finally:
            if not getattr(source, "closed", False):
                source.seek(position)
    else:
        raise TypeError(f"a video is a path, an http(s) URL, bytes or a binary file, not {type(source).__name__}")


def _file_size(path: str | os.PathLike, video: str) -> int:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise VideoNotFoundError(f"{video}: no such file. Check the path.") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoUnreadableError(f"{video}: is a directory. Pass the path of one video file.")
    if not stat.S_ISREG(status.st_mode):
        raise VideoUnreadableError(f"{video}: is a pipe or a device, not a regular file. Read it and pass the bytes.")
    return status.st_size


def _check_size(size: int, video: str, limits: DecodeLimits) -> None:
    if size == 0:
        raise NotAVideoError(f"{video}: is empty (0 bytes). Check that it was written or downloaded completely.")
    check_limit(video, "its size in bytes", size, limits.max_source_bytes, "max_source_bytes")


def _open(readable: str | BinaryIO, limits: DecodeLimits) -> InputContainer:
    options = {"format_whitelist": CONTAINER_FORMATS}
    if limits.max_pixels is not None:
        options["max_pixels"] = str(limits.max_pixels)
    if not isinstance(readable, str):
        return av.open(readable, options=options, metadata_errors="replace", buffer_size=_READ_SIZE)
    if readable.startswith("file:"):
        return av.open(readable, options=options | {"protocol_whitelist": "file"}, metadata_errors="replace")
    options |= {"protocol_whitelist": "http,https,tcp,tls", "rw_timeout": str(int(limits.url_timeout * 1e6))}
    container = av.open(readable, options=options, metadata_errors="replace", timeout=limits.url_timeout)
    try:
        check_limit(repr(readable), "its size in bytes", container.size, limits.max_url_bytes, "max_url_bytes")
    except VideoLimitError:
        container.close()
        raise
    return container


def _video_stream(video: str, container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover picture; all others are left undecoded and unread."""
    found = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not found:
        kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
        raise NotAVideoError(f"{video}: has no video stream ({container.format.name} with {kinds}). Pass a video.")
    if found[0].codec_context is None:
        raise UnsupportedCodecError(
            f"{video}: FFmpeg has no decoder for its video stream. Convert it, for example to H.264 in mp4."
        )
    for stream in container.streams:
        if stream.index != found[0].index:
            stream.discard = Discard.all
    return found[0]
