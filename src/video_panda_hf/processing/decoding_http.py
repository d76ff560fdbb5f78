"""A video on a web server as a file object that fetches only what is read."""

import http.client
import io
import os
import urllib.request

from .decoding_errors import Budget, VideoNetworkError, check_limit


_WORTH_A_REQUEST = 2**20  # bytes to be skipped for a new request to be cheaper than reading on


class HttpFile(io.RawIOBase):
    """A file behind an http(s) URL, read by ranges. A server that sends no ranges is read into memory as a whole.

    Raises:
        VideoNetworkError: if the server refuses, is too slow, or the URL is not http(s).
        VideoLimitError: if the file, or what is read of it, is larger than `DecodeLimits.max_url_bytes`.
    """

    def __init__(self, url: str, budget: Budget):
        self.url, self.budget = url, budget
        self.position = 0
        self.response: http.client.HTTPResponse | None = None
        self.whole: io.BytesIO | None = None
        self._request()
        if self.response.status != http.HTTPStatus.PARTIAL_CONTENT:
            self.size = int(self.response.headers.get("Content-Length") or 0)
            self._check_size()
            self.whole = io.BytesIO(self._read_all())
            self.size = self.whole.seek(0, os.SEEK_END)
            self.position = 0
        else:
            self.size = int(self.response.headers.get("Content-Range", "").rpartition("/")[2])
            self._check_size()

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
        if self.position >= self.size:
            return b""
        if self.response is None:
            self._request()
        return self._receive(min(size, self.size - self.position) if size >= 0 else self.size - self.position)

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _read_all(self) -> bytes:
        parts = []
        while part := self._receive(2**20):
            parts.append(part)
        self._hang_up()
        return b"".join(parts)

    def _receive(self, size: int) -> bytes:
        try:
            data = self.response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise VideoNetworkError(self._message(error)) from error
        self.position += len(data)
        self.budget.spend(len(data))
        return data

    def _request(self) -> None:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-"})
        try:
            self.response = _opener().open(request, timeout=self.budget.limits.url_timeout)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise VideoNetworkError(self._message(error)) from error

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

    def _message(self, error: Exception) -> str:
        return (
            f"{self.budget.video}: the server did not deliver the video ({error}). "
            "Check the URL, raise `DecodeLimits.url_timeout`, or download the video first."
        )


def _opener() -> urllib.request.OpenerDirector:
    """Like urllib's own, but without ftp, file and data, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
