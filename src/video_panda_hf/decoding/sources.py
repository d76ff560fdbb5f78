"""Opens an untrusted video: a path, a URL, bytes or a file object."""

import base64
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, TypeGuard

import av
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from .errors import (
    LENIENT,
    Budget,
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    UnsupportedCodecError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
    check_limit,
    errors_of,
)
from .http import HttpFile


VideoSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | list[str | os.PathLike]

# FFmpeg also reads playlists, scripts and devices, which can refer to other files and servers. They are left out.
CONTAINER_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,rm,mxf,nut,ivf,gif,apng,webp,webp_anim,webp_pipe,"
    "h264,hevc,vvc,av1,obu,m4v,"
    "mpegvideo,mjpeg,mpjpeg,h263,h261,vc1,dv,dirac,avs,avs2,avs3,wtv,swf,yuv4mpegpipe,gxf,3dostr,roq,smk,bink,amv,"
    "png_pipe,jpeg_pipe,bmp_pipe,"
    "wav,mp3,flac,aac"  # sound only: the error can then name the format
)
_TS_SYNC_BYTES = (0, 188), (4, 192), (0, 204)  # MPEG-TS variants: (offset of the sync byte "G", packet length)
_THEORA_HEADER = 0x80  # set in the first byte of a packet that is none of a frame
_ASF, _ASF_PROPERTIES = bytes.fromhex("3026b2758e66cf11"), bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"pnot", b"uuid"}
# The number of packets in a table where all have one size, and in a fragment's table without their sizes.
_SAMPLE_TABLE = re.compile(rb"stsz\0...(?!\0\0\0\0)....(....)|trun\0[\0\1]..(....)", re.DOTALL)
_PACKETS_OF_ANY_FILE = 4 * 10**6
_BOXES_WITH_TABLES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz", b"moof", b"traf", b"trun"}
_LARGEST_TABLES = 2**26  # bytes of those that are compressed
_TAIL = 64  # bytes at the end of a file to check; some writers pad
_READ_SIZE = 2**18  # bytes that one read of a Python file object asks for
# Accept titles and tags that are not UTF-8. PyAV does so by default since version 19.
_METADATA_OPTIONS = {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}


def describe(source: VideoSource) -> str:
    """A short name of the source for messages."""
    if is_data_url(source):
        return f"<video in a URL of {len(source)} characters>"
    if isinstance(source, list):
        return f"<video of {len(source)} picture files>"
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<video of {memoryview(source).nbytes} bytes>"
    name = getattr(source, "name", None)
    return f"<{type(source).__name__} {name!r}>" if isinstance(name, str) else f"<{type(source).__name__}>"


def is_url(source: VideoSource) -> TypeGuard[str]:
    return isinstance(source, str) and "://" in source


def is_data_url(source: VideoSource) -> TypeGuard[str]:
    """Whether it is a data URL, "data:video/mp4;base64,…" (RFC 2397). Chat clients send files this way."""
    return isinstance(source, str) and source.startswith("data:") and "," in source


@contextmanager
def open_source(source: VideoSource, budget: Budget) -> Iterator[str | BinaryIO]:
    """Yields the input of `av.open`: "file:PATH", or a seekable file object at its start.

    A given file object is read from its start. Its position is restored afterwards.

    Raises:
        VideoDecodeError: if the source cannot be read. The subclass tells why.
        TypeError: if `source` is not a `VideoSource`.
    """
    video, limits = budget.video, budget.limits
    if is_data_url(source):
        source = _data_of(source, video, limits)
    if is_url(source):
        scheme = source.split("://", 1)[0].lower()
        if scheme not in ("http", "https"):
            raise VideoNetworkError(f"{video}: URLs of kind {scheme!r} are not read, only http and https.")
        with HttpFile(source, budget) as file:
            yield file  # type: ignore[misc]  # a RawIOBase will do
            if file.failure is not None:
                raise file.failure
    elif isinstance(source, (str, os.PathLike)):
        with errors_of(video):
            _check_size(_file_size(source, video), video, limits)
        yield f"file:{os.fspath(source)}"  # otherwise FFmpeg could read a part of the path as a protocol
    elif isinstance(source, (bytes, bytearray, memoryview)):
        _check_size(memoryview(source).nbytes, video, limits)
        with io.BytesIO(source) as file:
            yield file
    elif hasattr(source, "read") and not isinstance(source, (io.TextIOBase, list)):
        with _rewound(source, video) as size:
            _check_size(size, video, limits)
            yield source
    else:
        raise TypeError(f"a video is a path, an http(s) URL, bytes or a binary file, not {type(source).__name__}")


@contextmanager
def as_file(readable: str | BinaryIO) -> Iterator[BinaryIO]:
    """Yields what `open_source` yields as a file object at its start. Use it before `open_video`."""
    if isinstance(readable, str):
        with open(readable.removeprefix("file:"), "rb") as file:
            yield file
    else:
        readable.seek(0)
        yield readable
        readable.seek(0)


@dataclass
class Look:
    """What the first and last bytes of a source show."""

    head: bytes
    damage: str | None
    """Describes a truncation that the last bytes show; only for formats whose headers do not show it."""

    @property
    def is_webp(self) -> bool:
        return self.head[:4] == b"RIFF" and self.head[8:12] == b"WEBP"


def look_at(readable: str | BinaryIO, video: str) -> Look:
    """Reads the first bytes of what `open_source` yields and, for some formats, the last ones.

    Raises:
        CorruptVideoError: if an mp4 or mov file lists far more packets than it can hold.
    """
    with as_file(readable) as file:
        head = file.read(2**10)
        _check_sample_tables(file, head, video)
        return Look(head, _breaks_off(head, file))


def _check_sample_tables(file: BinaryIO, head: bytes, video: str) -> None:
    """FFmpeg takes memory for each packet that an mp4 file lists, and a few bytes can list many of one size."""
    if isinstance(file, HttpFile) and head[4:8] not in _MP4_BOXES:  # FFmpeg takes a file for mp4 by any of its boxes
        return
    size, place, count = file.seek(0, os.SEEK_END), 0, 0
    while 0 <= place <= size - 16:
        file.seek(place)
        box = file.read(16)
        length, kind = int.from_bytes(box[:4], "big"), box[4:8]
        length = int.from_bytes(box[8:], "big") if length == 1 else length or size - place
        if length < 8:
            return
        if kind in _BOXES_WITH_TABLES:
            tables = box + file.read(max(0, min(length, size - place) - 16))
            tables += _inflated(tables, video)
            found = _SAMPLE_TABLE.findall(tables)
            count += sum(int.from_bytes(of_track or of_fragment, "big") for of_track, of_fragment in found)
            if count > max(16 * size, _PACKETS_OF_ANY_FILE):
                raise CorruptVideoError(f"{video}: lists {count} packets, more than its {size} bytes can hold.")
            if isinstance(file, HttpFile):  # each fragment would be a request
                return
        place += length


def _inflated(tables: bytes, video: str) -> bytes:
    """The tables of a QuickTime file that compresses them. Raises `CorruptVideoError` where they are a bomb."""
    if (place := tables.find(b"cmvd")) < 0:
        return b""
    inflater, found = zlib.decompressobj(), b""
    with suppress(zlib.error):
        found = inflater.decompress(tables[place + 8 :], _LARGEST_TABLES)
    if inflater.unconsumed_tail or b"cmvd" in tables[place + 4 :] or b"cmvd" in found:
        raise CorruptVideoError(f"{video}: its tables are compressed to a fraction, or twice. Replace the file.")
    return found


def _breaks_off(head: bytes, file: BinaryIO) -> str | None:
    if head.startswith((b"GIF87a", b"GIF89a")):
        file.seek(-min(_TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return None if file.read().rstrip(b"\0").endswith(b";") else "it lacks the mark that ends a GIF"
    if head.startswith(_ASF) and (place := head.find(_ASF_PROPERTIES)) >= 0:
        size, declared = file.seek(0, os.SEEK_END), int.from_bytes(head[place + 40 : place + 48], "little")
        return f"it has {size} of {declared} bytes" if size < declared else None
    for first, length in _TS_SYNC_BYTES:
        if head[first::length][:3] == b"GGG" and (rest := file.seek(0, os.SEEK_END) % length):
            return f"its last packet has {rest} of {length} bytes"
    return None


def reopened(readable: str | BinaryIO) -> str | BinaryIO | None:
    """A second, independent handle to what `open_source` yields, at its start; `None` if there can be only one."""
    if isinstance(readable, str):
        return readable
    return io.BytesIO(readable.getvalue()) if isinstance(readable, io.BytesIO) else None


@contextmanager
def open_video(
    readable: str | BinaryIO,
    budget: Budget,
    formats: str = CONTAINER_FORMATS,
    protocols: str = "file",
    options: dict[str, str] | None = None,
    **how,
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens what `open_source` yields, and yields its container and its first video stream.

    `formats` and `protocols` are what FFmpeg may read, `options` its other options, `how` is for `av.open`.

    Raises:
        VideoDecodeError: if it is not a video, or FFmpeg has no decoder for it.
    """
    options = {"format_whitelist": formats, "protocol_whitelist": protocols, **(options or {})}
    if budget.limits.max_pixels is not None:
        options["max_pixels"] = str(budget.limits.max_pixels)
    with ExitStack() as closing:
        with errors_of(budget.video):
            if not isinstance(readable, str) and readable.seekable():
                readable.seek(0)
            container = av.open(readable, options=options, buffer_size=_READ_SIZE, **_METADATA_OPTIONS, **how)
            closing.enter_context(container)
            stream = _video_stream(budget.video, container)
        yield container, stream


def demux(container: InputContainer, stream: VideoStream, budget: Budget) -> Iterator[av.Packet]:
    """Yields the packets of `stream` that are not empty, within `budget`.

    Raises:
        CorruptVideoError: if the container is damaged, not only a frame in it. If `budget` is not strict, the packets
            end there instead.
    """
    is_theora = stream is not None and stream.codec_context.name == "theora"
    try:
        for packet in container.demux(stream):
            budget.spend()
            if packet.size and not (is_theora and memoryview(packet)[0] & _THEORA_HEADER):
                yield packet
    except IndexError:  # at the end of the file, PyAV fails for a stream that appeared midway
        return
    except av.error.InvalidDataError as error:
        budget.damage = "its container is damaged"
        if budget.strict:
            raise CorruptVideoError(
                f"{budget.video}: {budget.damage}. Repair the file, or pass {LENIENT} to take what is before it."
            ) from error


@contextmanager
def _rewound(file: BinaryIO, video: str) -> Iterator[int]:
    """Rewinds `file`, yields its size in bytes, and restores its position afterwards."""
    try:
        if not file.seekable():
            raise VideoUnreadableError(f"{video}: the file object cannot seek. Read it and pass the bytes.")
        position, size = file.tell(), file.seek(0, os.SEEK_END)
        file.seek(0)
    except (AttributeError, OSError, ValueError) as error:
        if isinstance(error, VideoUnreadableError):
            raise
        raise VideoUnreadableError(f"{video}: the file object cannot be read ({error}).") from error
    try:
        yield size
    finally:
        if not file.closed:
            file.seek(position)


def _data_of(url: str, video: str, limits: DecodeLimits) -> bytes:
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise VideoUnreadableError(f"{video}: a video in a URL must be base64: data:video/mp4;base64,…")
    _check_size(len(data) * 3 // 4, video, limits)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:  # includes characters that are not ASCII
        raise VideoUnreadableError(f"{video}: is not valid base64 ({error}).") from error


def _file_size(path: str | os.PathLike, video: str) -> int:
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL character in the path
        raise VideoNotFoundError(f"{video}: is not a path ({error}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoUnreadableError(f"{video}: is a directory. Pass the path of one video file.")
    if not stat.S_ISREG(status.st_mode):
        raise VideoUnreadableError(f"{video}: is a pipe or a device, not a regular file. Read it and pass the bytes.")
    return status.st_size


def _check_size(size: int, video: str, limits: DecodeLimits) -> None:
    if size == 0:
        raise NotAVideoError(f"{video}: is empty (0 bytes). Check that it was written or downloaded completely.")
    check_limit(video, "its size in bytes", size, limits.max_source_bytes, "max_source_bytes")


def _video_stream(video: str, container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover picture. All other streams are discarded."""
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
