"""Downloads a file that a request names, from hosts and addresses that are allowed only."""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
from contextlib import suppress

from .errors import RequestError, refused, too_large
from .settings import ServerSettings


MOST_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
LONGEST_URL = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
NAT64, LOCAL_NAT64 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")
SAFE = "/%:@!$&'()*+,;=~-._?[]"  # characters of a path and query that stay as they are


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet. The IPv4 address inside an IPv6 one must be public too."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local or found in LOCAL_NAT64:
            return False
    return found.is_global and not (
        found.is_multicast or found.is_reserved or found.is_private or found.is_unspecified
    )


def resolve(host: str, port: int) -> list[tuple]:
    """(family, socket address) of each address of a host. Looked up once: connect to these, not to the name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def connect(family: int, address: tuple, seconds: float) -> socket.socket:
    """A connection to one address."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


class Download:
    """
    The download of one file.

    * A host must be in `allowed_media_domains`, and so must the host of each redirect.
    * All addresses of a host are checked. The connection goes to a checked address; the name is not looked up again.
    * The whole download, headers included, takes at most `max_media_seconds`.
    * The downloads of a request, which `together` has, take at most `max_media_bytes`.
    * No proxy of the environment is used: it would look up the name itself.

    `stop()` ends it from another thread.
    """

    def __init__(self, url: str, settings: ServerSettings):
        self.url, self.settings = url, settings
        self.end = 0.0
        self.is_over = False
        self.socket: socket.socket | None = None
        self.size = 0
        self.together = [self]

    def stop(self) -> None:
        self.is_over = True
        if (sock := self.socket) is not None:
            with suppress(OSError):  # of the plain socket, also below TLS: a read of another thread then ends
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def run(self) -> io.FileIO:
        """The file at its start, without a name on the disk.

        Raises:
            RequestError: 403 for what is not allowed, 413 for too large a file, 400 if the server does not deliver.
        """
        self.end = time.monotonic() + self.settings.max_media_seconds
        watch = threading.Timer(self.settings.max_media_seconds, self.stop)
        watch.daemon = True
        watch.start()
        try:
            return self._follow()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            if self.is_over or isinstance(error, TimeoutError):
                reason = f"it took longer than {self.settings.max_media_seconds:g} seconds"
            raise RequestError(400, f"{self.url!r}: the server did not deliver the file ({reason}).") from error
        finally:
            watch.cancel()
            self._close()

    def _follow(self) -> io.FileIO:
        url = self.url
        for _ in range(MOST_REDIRECTS + 1):
            response = self._ask(url)
            if response.status not in REDIRECTS:
                if response.status != http.HTTPStatus.OK:
                    raise ValueError(f"{response.status} {response.reason}")
                return self._receive(response)
            target = response.getheader("Location")
            if not target:
                raise ValueError("a redirect to nowhere")
            url = urllib.parse.urljoin(url, target)
            self._close()
        raise ValueError(f"more than {MOST_REDIRECTS} redirects")

    def _ask(self, url: str) -> http.client.HTTPResponse:
        scheme, host, port, path = self._checked(url)
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = DEFAULT_PORTS[scheme]
        connection.auto_open = 0  # it uses the checked socket or none
        connection.sock = self._connected(scheme, host, port)
        connection.request("GET", path, headers={"Accept": "*/*", "User-Agent": "video-panda"})
        return connection.getresponse()

    def _checked(self, url: str) -> tuple[str, str, int, str]:
        """(scheme, host, port, path with query) of a URL whose host is allowed."""
        if len(url) > LONGEST_URL or re.search(r"[\x00-\x20\x7f\\]", url):
            raise RequestError(400, f"{url[:200]!r}: is not a URL.")
        try:
            parts = urllib.parse.urlsplit(url)
            scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
            port = parts.port or DEFAULT_PORTS.get(scheme, 0)
            host = host if ":" in host else host.encode("idna").decode()
        except (ValueError, UnicodeError) as error:
            raise RequestError(400, f"{url!r}: is not a URL ({error}).") from error
        if scheme not in DEFAULT_PORTS:
            raise refused(f"{url!r}: URLs of kind {scheme!r} are not read, only http, https and data.")
        if not host or parts.username is not None or parts.password is not None:
            raise RequestError(400, f"{url!r}: a URL has a host, and no user or password.")
        allowed = {name.lower().rstrip(".") for name in self.settings.allowed_media_domains}
        if not allowed & {host.lower(), "*"}:
            raise refused(
                f"{url!r}: this server fetches nothing from {host!r} (its operator allows hosts by "
                "--allowed-media-domains). Send the file as a data URL."
            )
        path = urllib.parse.quote(parts.path or "/", safe=SAFE)
        return scheme, host, port, path + (f"?{urllib.parse.quote(parts.query, safe=SAFE)}" if parts.query else "")

    def _connected(self, scheme: str, host: str, port: int) -> socket.socket:
        not_public = refused(f"{host!r} is not the name of a host with public addresses only.")
        try:
            addresses = resolve(host, port)
        except (OSError, UnicodeError) as error:
            if self.settings.allow_private_networks:
                raise
            raise not_public from error  # the same answer, so that nobody learns which names there are
        if not self.settings.allow_private_networks and not all(is_public(address[0]) for _, address in addresses):
            raise not_public
        for number, (family, address) in enumerate(addresses, 1):
            try:
                self._keep(connect(family, address, self._seconds_left()))
                break
            except OSError:
                if number == len(addresses) or self.is_over:
                    raise
        if scheme == "https":
            context = ssl.create_default_context()
            self._keep(context.wrap_socket(self.socket, server_hostname=host, do_handshake_on_connect=False))
            self.socket.do_handshake()
        return self.socket

    def _keep(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(self._seconds_left())
        if self.is_over:  # `stop` may have come before there was something to stop
            raise TimeoutError

    def _seconds_left(self) -> float:
        return max(0.001, self.end - time.monotonic())

    def _receive(self, response: http.client.HTTPResponse) -> io.FileIO:
        limit, declared = self.settings.max_media_bytes, response.length
        if declared is not None and declared > limit:
            raise too_large(f"{self.url!r}: its size in bytes", declared, limit)
        file = tempfile.TemporaryFile(buffering=0)
        try:
            while part := response.read1(2**18):
                self.size += len(part)
                if (size := sum(download.size for download in self.together)) > limit:
                    raise too_large("the size in bytes of what was fetched is at least", size, limit)
                file.write(part)
                if self.is_over:
                    raise TimeoutError
            if self.is_over or (declared is not None and self.size < declared):
                raise ValueError(f"it closed the connection after {self.size} bytes")
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def _close(self) -> None:
        sock, self.socket = self.socket, None
        if sock is not None:
            sock.close()
