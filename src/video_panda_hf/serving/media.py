"""What a request may name: data URLs; files of one folder and hosts that the server's operator allows.

No name that came with a request goes to the decoder: it gets bytes or an open file.
"""

import base64
import errno
import io
import os
import stat
import urllib.parse

from .errors import RequestError, refused, too_large
from .network import Download
from .settings import NO_FILES, ServerSettings


LONGEST_PATH = 4096


class Media(io.BufferedReader):
    """An open file. Its `name` is what the request called it."""

    def __init__(self, file: io.FileIO, name: str):
        file.name = name
        super().__init__(file, 2**16)


def open_media(url: str, settings: ServerSettings) -> bytes | Media | Download:
    """
    Opens what a request names.

    Args:
        url (`str`):
            A data URL, an http(s) URL, a file URL or a path.
        settings (`ServerSettings`):
            What is allowed.

    Returns:
        `bytes`, `Media` or `Download`: A download has not begun; `run` it in a thread.

    Raises:
        RequestError: 403 for what is not allowed, 413 for too large a file, 400 for what cannot be read.
    """
    if url[:5].lower() == "data:":
        return data_of(url, settings)
    if url[:8].lower().startswith(("http://", "https://")):
        return Download(url, settings)
    if "://" not in url:
        return open_local(url, settings)
    parts = urllib.parse.urlsplit(url) if url[:7].lower() == "file://" else None
    if parts is None or parts.netloc.lower() not in ("", "localhost") or parts.query or parts.fragment:
        raise refused(f"{url[:200]!r}: URLs of this kind are not read, only http, https and data.")
    return open_local(urllib.parse.unquote(parts.path), settings)


def data_of(url: str, settings: ServerSettings) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(400, "a file in a URL must be base64: data:video/mp4;base64,…")
    if (size := len(data) * 3 // 4) > settings.max_media_bytes:
        raise too_large("a data URL's size in bytes", size, settings.max_media_bytes)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise RequestError(400, f"the data URL of {len(url)} characters is not valid base64 ({error}).") from error


def open_local(path: str, settings: ServerSettings) -> Media:
    """A regular file of the allowed folder, opened so that nobody can put another one in its place meanwhile."""
    if settings.allowed_local_media_path is None:
        raise refused("this server reads no local files (its operator allows a folder by --allowed-local-media-path).")
    outside = refused(f"{path[:200]!r} is not a file in the folder that this server's operator allows.")
    if not 0 < len(path) <= LONGEST_PATH or "\0" in path or ".." in path.split("/"):
        raise outside
    root = os.path.realpath(settings.allowed_local_media_path)
    try:
        real = os.path.realpath(os.path.join(settings.allowed_local_media_path, path))
        if os.path.commonpath([root, real]) != root or real.split(os.sep)[1] in NO_FILES:
            raise outside
        file = open_below(root, os.path.relpath(real, root).split(os.sep))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(400, f"{path!r}: no such file.") from error
    except PermissionError as error:
        raise RequestError(400, f"{path!r}: may not be read.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise RequestError(400, f"{path!r}: cannot be read ({error.strerror}).") from error
        raise outside from error
    if file is None:
        raise outside
    if (size := os.fstat(file.fileno()).st_size) > settings.max_media_bytes:
        file.close()
        raise too_large(f"{path!r}: its size in bytes", size, settings.max_media_bytes)
    return Media(file, path)


def open_below(root: str, parts: list[str]) -> io.FileIO | None:
    """Opens a file by its way down from a folder, without following links; `None` if it is not a regular file."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            return None  # a pipe, a device, a folder: even to open one may have effects
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        return None
    return io.FileIO(file, "rb")
