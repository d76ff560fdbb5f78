"""A video on a web server as a file object. It fetches only the bytes that are read."""

import functools
import http.client
import io
import os
import re
import socket
import time
import urllib.request

from .errors import Budget, VideoDecodeError, VideoNetworkError, check_limit


_WORTH_A_REQUEST = 2**20  # bytes: to skip this many or more, a new request is cheaper than reading on
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)", re.IGNORECASE)


class HttpFile(io.RawIOBase):
    """A file behind an http(s) URL, read by ranges. If the server has no ranges, the whole file is read into memory.

    `failure` is the first error, if any. Every later read raises it again. Check it at the end: FFmpeg may treat a
    failed read as the end of the file.

    Raises:
        VideoNetworkError: if the server refuses, is too slow, closes the connection early, or the URL is not http(s).
        VideoLimitError: if the file, or the number of bytes read, exceeds `DecodeLimits.max_url_bytes`.
    """

    def __init__(self, url: str, budget: Budget):
        self.url, self.budget = url, budget
        self.position = 0
        self.response: http.client.HTTPResponse | None = None
        self.whole: io.BytesIO | None = None
        self.failure: VideoNetworkError | None = None
        response = self._request()
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            self.size = self._size_of_range()
            self._check_size()
        else:
            declared = response.length  # None without a Content-Length
            self.size = declared or 0
            self._check_size()
            self.whole = io.BytesIO(self._read_all())
            self.size = self.whole.seek(0, os.SEEK_END)
            self.position = 0
            if declared is not None and self.size < declared:
                raise self._error(f"it closed the connection after {self.size:,} of {declared:,} bytes")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        target = max(0, base + offset)
        if self.response is not None and 0 < target - self.position < _WORTH_A_REQUEST:
            self.read(target - self.position)
        if target != self.position:
            self._hang_up()
        self.position = target
        return target

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        if self.whole is not None:
            self.whole.seek(self.position)
            data = self.whole.read(size)
            self.position += len(data)
            return data
        if self.failure is not None:
            raise self.failure
        if self.position >= self.size:
            return b""
        if self.response is None:
            response = self._request()
            if response.status != http.HTTPStatus.PARTIAL_CONTENT or self._size_of_range() != self.size:
                raise self._error("it answered for another part of the file, or the file has changed")
        data = self._receive(min(size, self.size - self.position) if size >= 0 else self.size - self.position)
        if not data and size != 0:
            raise self._error(f"it closed the connection after {self.position:,} of {self.size:,} bytes")
        return data

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _size_of_range(self) -> int:
        """The size of the whole file, from an answer whose range begins at `position`."""
        assert self.response is not None
        found = _CONTENT_RANGE.fullmatch(self.response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != self.position:
            raise self._error(f"it answered with Content-Range: {self.response.headers.get('Content-Range')}")
        return int(found[2])

    def _read_all(self) -> bytes:
        parts = []
        while part := self._receive(2**20):
            parts.append(part)
        self._hang_up()
        return b"".join(parts)

    def _receive(self, size: int) -> bytes:
        assert self.response is not None
        try:
            data = self.response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            self.budget.spend()  # raises VideoLimitError, which http.client may have replaced
            raise self._error(error) from error
        self.position += len(data)
        self.budget.spend(len(data))
        return data

    def _request(self) -> http.client.HTTPResponse:
        try:
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-"})
            response = _opener(self.budget).open(request, timeout=_patience(self.budget))
        except VideoDecodeError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._error(error) from error
        self.response = response
        return response

    def _hang_up(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def _check_size(self) -> None:
        limit = self.budget.limits.max_url_bytes
        try:
            check_limit(self.budget.video, "its size in bytes", self.size, limit, "max_url_bytes")
        except ValueError:
            self._hang_up()
            raise

    def _error(self, reason: Exception | str) -> VideoNetworkError:
        self._hang_up()
        self.failure = VideoNetworkError(
            f"{self.budget.video}: the server did not deliver the video ({reason}). "
            "Check the URL, raise `DecodeLimits.url_timeout`, or download the video first."
        )
        return self.failure


class _TimedReader(io.RawIOBase):
    """Reads from a socket. The time limits hold for every single read, even of a few bytes."""

    def __init__(self, sock: socket.socket, budget: Budget):
        self.socket, self.budget = sock, budget
        self.raw = sock.makefile("rb", buffering=0)
        self.headers_end: float | None = time.monotonic() + budget.limits.url_timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self.budget.spend()
        patience = _patience(self.budget)
        if self.headers_end is not None:
            patience = min(patience, self.headers_end - time.monotonic())
            if patience <= 0:
                raise TimeoutError("timed out")
        self.socket.settimeout(patience)
        try:
            return self.raw.readinto(buffer)
        except TimeoutError:
            self.budget.spend()
            raise

    def close(self) -> None:
        self.raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args, budget: Budget, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.reader = _TimedReader(sock, budget)
        self.fp = io.BufferedReader(self.reader)

    def begin(self) -> None:
        super().begin()
        self.reader.headers_end = None


class _TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, budget: Budget):
        urllib.request.HTTPSHandler.__init__(self)
        self.response_class = functools.partial(_TimedResponse, budget=budget)

    def do_open(self, http_class, req, **http_conn_args):
        def connect(*args, **kwargs):
            connection = http_class(*args, **kwargs)
            connection.response_class = self.response_class
            return connection

        return super().do_open(connect, req, **http_conn_args)


def _patience(budget: Budget) -> float:
    """Seconds to wait for the server's next bytes. Never 0: that makes a socket non-blocking."""
    return max(0.001, min(budget.limits.url_timeout, budget.seconds_left()))


def _opener(budget: Budget) -> urllib.request.OpenerDirector:
    """urllib's opener within `budget`, and without ftp, file and data URLs: a server could redirect to them."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_TimedHandler(budget))
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
