"""Attacks by what a request names: files, addresses, redirects, names that resolve to elsewhere, slow servers."""

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import time

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpers.server import MODEL, serving, video, web_server
from video_panda_hf import SHIPPED_CLIPS
from video_panda_hf.serving import ServerSettings, media, network
from video_panda_hf.serving.errors import RequestError


CLIP = (SHIPPED_CLIPS / "red_circle_left.mp4").read_bytes()
ANSWER = "A red circle moves to the left."
PUBLIC = "93.184.215.14"
OPEN = {"allowed_media_domains": ("127.0.0.1",), "allow_private_networks": True}


def told(server, url, **part) -> tuple[int, str]:
    """The status, and the answer or the error's message."""
    status, answer = server.ask(video(url, **part), "Describe the video.")
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]["message"]


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder `videos` that may be read, beside one that may not."""
    base = tmp_path_factory.mktemp("files")
    (base / "videos" / "inner").mkdir(parents=True)
    (base / "private").mkdir()
    for path in ("videos/clip.mp4", "videos/inner/one clip.mp4", "private/clip.mp4"):
        (base / path).write_bytes(CLIP)
    (base / "videos-too").mkdir()
    (base / "videos-too" / "clip.mp4").write_bytes(CLIP)
    videos = base / "videos"
    (videos / "link_in.mp4").symlink_to("inner/one clip.mp4")
    (videos / "link_out.mp4").symlink_to(base / "private" / "clip.mp4")
    (videos / "folder_out").symlink_to(base / "private")
    (videos / "circle").symlink_to("circle")
    (videos / "zero").symlink_to("/dev/zero")
    (videos / "environ").symlink_to("/proc/self/environ")
    os.mkfifo(videos / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(videos / "socket"))
    return base


def test_files_of_the_folder_are_read(folder):
    with serving(allowed_local_media_path=str(folder / "videos")) as server:
        for name in (
            "clip.mp4",
            "inner/one clip.mp4",
            f"{folder}/videos/clip.mp4",
            f"file://{folder}/videos/inner/one%20clip.mp4",
            f"FILE://localhost{folder}/videos/clip.mp4",
            "link_in.mp4",
        ):
            assert told(server, name) == (200, ANSWER), name


FORBIDDEN = [
    "../private/clip.mp4",
    "inner/../../private/clip.mp4",
    "inner/../clip.mp4",  # not even on the way
    "{base}/private/clip.mp4",
    "{base}/videos/../private/clip.mp4",
    "{base}/videos-too/clip.mp4",
    "file://{base}/private/clip.mp4",
    "file://{base}/videos/%2e%2e/private/clip.mp4",
    "file://otherhost{base}/videos/clip.mp4",
    "file://{base}/videos/clip.mp4?x",
    "link_out.mp4",
    "folder_out/clip.mp4",
    "circle",
    "zero",
    "environ",
    "fifo",
    "socket",
    "inner",
    ".",
    "clip.mp4\0",
    "/etc/passwd",
    "file:///etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "~/clip.mp4/../..",
    "concat:clip.mp4|clip.mp4",
    "subfile,,start,0,end,0,,:clip.mp4",
    "ftp://127.0.0.1/clip.mp4",
    "rtsp://127.0.0.1/clip.mp4",
    "gopher://127.0.0.1:1/_",
    "crypto+file:///etc/passwd",
    "a/" * 1_000_000,
]


def test_other_files_are_not_whatever_they_are_called(folder):
    with serving(allowed_local_media_path=str(folder / "videos")) as server:
        begun = time.monotonic()
        for name in FORBIDDEN:
            status, message = told(server, name.format(base=folder))
            if name.startswith(("concat", "subfile")):  # names of files that are not there
                assert (status, message) == (400, f"{name!r}: no such file.")
            else:
                assert status == 403, (name, message)
                assert "is not a file in the folder" in message or "URLs of this kind" in message, name
        assert told(server, "gone.mp4") == (400, "'gone.mp4': no such file.")
        # What is outside gets one answer, whether it is there or not
        there, gone = (told(server, f"{folder}/private/{name}") for name in ("clip.mp4", "gone.mp4"))
        assert there[0] == gone[0] and there[1].replace("clip", "gone") == gone[1]
        assert time.monotonic() - begun < 10
        image = {"type": "image_url", "image_url": {"url": "/proc/self/environ"}}
        assert server.ask(image, "?")[0] == 403


def test_no_file_is_read_unless_a_folder_is_allowed(folder):
    with serving() as server:
        answers = {told(server, f"{folder}/{name}") for name in ("videos/clip.mp4", "videos/gone.mp4")}
        assert len(answers) == 1 and answers.pop()[0] == 403


def test_the_systems_own_files_are_none_even_below_the_root():
    settings = ServerSettings(MODEL, allowed_local_media_path="/")
    for name in ("/proc/self/environ", "/dev/zero", "/sys/kernel/mm/transparent_hugepage/enabled", "proc/version"):
        with pytest.raises(RequestError) as refused:
            media.open_media(name, settings)
        assert refused.value.status == 403
    for path in ("/proc/self", "/dev", __file__, "/no/such/folder"):
        with pytest.raises(ValueError, match="folder"):
            ServerSettings(MODEL, allowed_local_media_path=path)


def test_a_link_that_is_put_in_place_meanwhile_is_not_followed(folder, monkeypatch):
    settings = ServerSettings(MODEL, allowed_local_media_path=str(folder / "videos"))
    # As if file and folder had been links only after their real path was found
    monkeypatch.setattr(media.os.path, "realpath", os.path.abspath)
    for name in ("link_out.mp4", "folder_out/clip.mp4", "zero"):
        with pytest.raises(RequestError) as refused:
            media.open_media(name, settings)
        assert refused.value.status in (400, 403) and "cannot be read" not in refused.value.message
    # As if it had been a link only after it was looked at
    stat = os.stat
    monkeypatch.setattr(media.os, "stat", lambda path, *, dir_fd=None, follow_symlinks=True: stat(path, dir_fd=dir_fd))
    with pytest.raises(RequestError) as refused:
        media.open_media("link_out.mp4", settings)
    assert refused.value.status == 403
    with media.open_media("clip.mp4", settings) as file:
        assert file.read() == CLIP and file.name == "clip.mp4"


def test_a_file_has_a_limit_of_size(folder):
    with serving(allowed_local_media_path=str(folder / "videos"), max_media_bytes=1000) as server:
        assert told(server, "clip.mp4")[0] == 413
        status, message = told(server, f"data:video/mp4;base64,{base64.b64encode(CLIP).decode()}")
        assert status == 413 and "above this server's limit of 1000" in message


@pytest.mark.parametrize("url", ["data:video/mp4,abc", "data:video/mp4;base64", "data:video/mp4;base64,é", "data:,"])
def test_a_data_url_is_base64(url):
    with pytest.raises(RequestError, match="base64") as refused:
        media.open_media(url, ServerSettings(MODEL))
    assert refused.value.status == 400


# Addresses


def fetched(url: str, **settings) -> bytes:
    with media.open_media(url, ServerSettings(MODEL, **{"max_media_seconds": 5, **settings})).run() as file:
        return file.read()


def refusal(url: str, **settings) -> tuple[int, str]:
    with pytest.raises(RequestError) as refused:
        fetched(url, **settings)
    return refused.value.status, refused.value.message


def test_an_address_is_fetched_only_if_its_host_is_allowed():
    with web_server({"/clip.mp4": CLIP}) as web:
        with serving() as server:
            status, message = told(server, f"{web.url}/clip.mp4")
            assert status == 403 and "fetches nothing from '127.0.0.1'" in message
        for domains in ((), ("localhost",), ("127.0.0.1",), ("*",)):  # loopback is not opened by its name
            assert refusal(f"{web.url}/clip.mp4", allowed_media_domains=domains)[0] == 403
        assert web.requests == []
        with serving(**OPEN) as server:
            assert told(server, f"{web.url}/clip.mp4") == (200, ANSWER)
            assert told(server, f"{web.url.upper().replace('HTTP', 'hTTp')}/clip.mp4") == (200, ANSWER)
            assert told(server, web.url.replace("127.0.0.1", "localhost"))[0] == 403
            status, message = told(server, f"{web.url}/gone")
            assert status == 400 and "the server did not deliver the file (404 Not Found)" in message
        assert web.requests == ["/clip.mp4", "/clip.mp4", "/gone"]


def test_no_spelling_of_a_private_address_is_connected_to():
    with web_server({"/clip.mp4": CLIP}) as web:
        port = web.server_port
        for host in (
            "localhost",
            "LOCALHOST.",
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "0",
            "0.0.0.0",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "169.254.169.254",
            "10.0.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "[fe80::1]",
            "[fd00::1]",
            "224.0.0.1",
            "no-such-name.invalid",
        ):
            status, message = refusal(f"http://{host}:{port}/clip.mp4", allowed_media_domains=("*",))
            assert status == 403 and "public addresses only" in message, host
        for url in (
            f"http://user@127.0.0.1:{port}/",
            f"http://127.0.0.1:{port}\\@example.com/",
            f"http://127.0.0.1:{port} /",
            f"http://127.0.0.1:{port}/\r\nHost: x",
            "http:///clip.mp4",
            "http://[::1/clip.mp4",
            "http://127.0.0.1:99999/",
            "http://" + "a" * 300 + ".com/",
            "http://x/" + "a" * 9000,
        ):
            assert refusal(url, **OPEN, allowed_local_media_path=None)[0] in (400, 403), url
        assert web.requests == []


def test_public_addresses_are_told_from_others():
    for address in ("8.8.8.8", "1.1.1.1", PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert network.is_public(address), address
    for address in ("127.0.0.2", "172.16.0.1", "192.0.2.1", "198.18.0.1", "240.0.0.1", "fec0::1", "64:ff9b:1::7f00:1"):
        assert not network.is_public(address), address


class Names:
    """Names that resolve to what a test says, and public addresses that are a server of the test."""

    def __init__(self, monkeypatch, web):
        self.answers, self.asked, self.connected, self.web = {}, [], [], web
        self.resolve, self.connect = network.resolve, network.connect
        monkeypatch.setattr(network, "resolve", self.look_up)
        monkeypatch.setattr(network, "connect", self.connect_to)

    def look_up(self, host, port):
        self.asked.append(host)
        if host not in self.answers:
            return self.resolve(host, port)
        addresses = self.answers[host]
        if isinstance(addresses[0], list):  # one answer after another
            addresses = addresses.pop(0)
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, (a, port)) for a in addresses]

    def connect_to(self, family, address, seconds):
        self.connected.append(address[0])
        if address[0] != PUBLIC:
            return self.connect(family, address, seconds)
        return self.connect(socket.AF_INET, ("127.0.0.1", self.web.server_port), seconds)


ANYWHERE = {"allowed_media_domains": ("*",)}


def test_a_name_that_resolves_to_loopback_is_refused(monkeypatch):
    with web_server({"/clip.mp4": CLIP}) as web:
        names = Names(monkeypatch, web)
        names.answers |= {
            "public.test": [PUBLIC],
            "loopback.test": ["127.0.0.1"],
            "both.test": [PUBLIC, "127.0.0.1"],
            "mapped.test": ["::ffff:7f00:1"],
        }
        assert fetched(f"http://public.test:{web.server_port}/clip.mp4", **ANYWHERE) == CLIP
        web.requests.clear()
        for host in ("loopback.test", "both.test", "mapped.test"):
            for domains in (("*",), (host,)):
                url = f"http://{host}:{web.server_port}/clip.mp4"
                assert refusal(url, allowed_media_domains=domains)[0] == 403
        assert web.requests == [] and names.connected == [PUBLIC]


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch):
    with web_server({"/clip.mp4": CLIP}) as web:
        names = Names(monkeypatch, web)
        names.answers["rebinding.test"] = [[PUBLIC], ["127.0.0.1"]]
        url = f"http://rebinding.test:{web.server_port}/clip.mp4"
        assert fetched(url, **ANYWHERE) == CLIP
        assert names.asked == ["rebinding.test"] and names.connected == [PUBLIC]
        assert refusal(url, **ANYWHERE)[0] == 403 and names.connected == [PUBLIC]


def test_a_redirect_leads_only_where_a_request_may(monkeypatch):
    with web_server({"/clip.mp4": CLIP}) as web, web_server() as secret:
        names = Names(monkeypatch, web)
        names.answers |= {"public.test": [PUBLIC], "cdn.test": [PUBLIC], "inside.test": ["10.0.0.1"]}
        start = f"http://public.test:{web.server_port}"

        def to(target, status=302):
            web.files["/start"] = lambda handler: handler.reply(status, {"Location": target, "Content-Length": 0})
            return f"{start}/start"

        for status in (301, 302, 303, 307, 308):
            assert fetched(to("/clip.mp4", status), **ANYWHERE) == CLIP
        assert fetched(to(f"http://cdn.test:{web.server_port}/clip.mp4"), **ANYWHERE) == CLIP
        only = {"allowed_media_domains": ("public.test",)}
        status, message = refusal(to(f"http://cdn.test:{web.server_port}/clip.mp4"), **only)
        assert status == 403 and "'cdn.test'" in message
        for target in (
            secret.url,
            f"http://localhost:{secret.server_port}/",
            f"//127.0.0.1:{secret.server_port}/",
            "http://inside.test/",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            "ftp://public.test/clip.mp4",
            "data:video/mp4;base64,AAAA",
        ):
            assert refusal(to(target), **ANYWHERE)[0] == 403, target
        assert refusal(to("/start"), **ANYWHERE)[1].endswith("(more than 5 redirects).")
        assert refusal(to(""), **ANYWHERE)[0] == 400
        assert secret.requests == []


def test_the_proxy_of_the_environment_is_not_asked(monkeypatch):
    with web_server({"/clip.mp4": CLIP}) as web, web_server() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert fetched(f"{web.url}/clip.mp4", **OPEN) == CLIP and proxy.requests == []


def test_an_https_server_must_be_who_it_says(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=public.test"
    command += f" -addext subjectAltName=DNS:public.test -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with web_server({"/clip.mp4": CLIP}) as web:
        web.socket = context.wrap_socket(web.socket, server_side=True)
        names = Names(monkeypatch, web)
        names.answers |= {"public.test": [PUBLIC], "other.test": [PUBLIC]}
        assert "CERTIFICATE_VERIFY_FAILED" in refusal("https://public.test/clip.mp4", **ANYWHERE)[1]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched("https://public.test/clip.mp4", **ANYWHERE) == CLIP
        assert "CERTIFICATE_VERIFY_FAILED" in refusal("https://other.test/clip.mp4", **ANYWHERE)[1]
        assert web.requests == ["/clip.mp4"]


def drip(handler, pieces) -> None:
    for piece in pieces:
        handler.wfile.write(piece)
        time.sleep(0.02)


SLOW = {
    "silence": lambda handler: time.sleep(3),
    "headers byte by byte": lambda handler: drip(handler, [b"HTTP/1.1 200 OK\r\nX: ", *[b"x"] * 150]),
    "header after header": lambda handler: drip(handler, [b"HTTP/1.1 200 OK\r\n", *[b"X: x\r\n"] * 90]),
    "endless continue": lambda handler: drip(handler, [b"HTTP/1.1 100 Continue\r\n\r\n"] * 150),
    "body byte by byte": lambda handler: drip(
        handler, [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"x"] * 150]
    ),
    "chunks": lambda handler: drip(
        handler, [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 150]
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_server_costs_no_more_than_the_limit(name):
    with web_server({"/slow": SLOW[name]}) as web:
        begun = time.monotonic()
        status, message = refusal(f"{web.url}/slow", **OPEN, max_media_seconds=0.3)
        assert status == 400 and "took longer than 0.3 seconds" in message
        assert time.monotonic() - begun < 1.5


def test_a_download_is_complete_and_has_a_limit_of_size():
    sent = []

    def endless(handler):
        handler.reply(200, {})
        while len(sent) < 1000:
            handler.wfile.write(bytes(10_000))
            sent.append(1)

    with web_server({"/endless": endless}) as web:
        web.files["/declared"] = lambda handler: handler.reply(200, {"Content-Length": 10**12})
        web.files["/short"] = lambda handler: handler.reply(200, {"Content-Length": 1000}, b"x" * 600)
        web.files["/strange"] = lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")
        web.files["/empty"] = lambda handler: handler.reply(204, {})
        for path in ("/declared", "/endless"):
            status, message = refusal(f"{web.url}{path}", **OPEN, max_media_bytes=100_000)
            assert status == 413 and "above this server's limit of 100000" in message
        status, message = refusal(f"{web.url}/short", **OPEN)
        assert status == 400 and "closed the connection after 600 bytes" in message
        assert refusal(f"{web.url}/strange", **OPEN)[0] == refusal(f"{web.url}/empty", **OPEN)[0] == 400
        web.files["/clip.mp4"] = CLIP
        with serving(max_media_bytes=int(len(CLIP) * 2.5), **OPEN) as server:
            for count, status in ((2, 200), (3, 413)):
                asked = server.ask(*[video(f"{web.url}/clip.mp4")] * count, "Describe the video.", max_tokens=1)
                assert asked[0] == status
    assert len(sent) < 1000
    assert refusal(f"{web.url}/gone", **OPEN)[0] == 400  # nobody listens any more


# Files that name other files


def test_a_playlist_opens_neither_file_nor_address(folder):
    with web_server() as secret:
        names = ("file:///etc/passwd", f"{secret.url}/secret.ts", f"{folder}/private/clip.mp4")
        lists = {
            "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n" + "".join(f"#EXTINF:1,\n{name}\n" for name in names),
            "ffconcat": "ffconcat version 1.0\n" + "".join(f"file '{name}'\n" for name in names),
            "sdp": f"v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {secret.server_port} RTP/AVP 96\n",
            "dash": f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{secret.url}</BaseURL></MPD>',
            "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{secret.url}/x.png"/></svg>',
            "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        }
        files = {f"/{name}": text.encode() for name, text in lists.items()}
        with web_server(files) as web, serving(allowed_local_media_path=str(folder / "videos"), **OPEN) as server:
            for name, text in lists.items():
                (folder / "videos" / f"list.{name}").write_text(text)
                data = f"data:video/mp4;base64,{base64.b64encode(text.encode()).decode()}"
                for url in (data, f"list.{name}", f"{web.url}/{name}"):
                    status, message = told(server, url)
                    assert status == 400 and "root:" not in message, (name, url)
                    image = {"type": "image_url", "image_url": {"url": url}}
                    status, answer = server.ask(image, "?")
                    assert status == 400 and "root:" not in json.dumps(answer)
        assert secret.requests == []


def test_an_error_names_what_the_request_called_it(folder):
    (folder / "videos" / "text.mp4").write_text("no video")
    with web_server({"/text.mp4": b"no video"}) as web:
        with serving(allowed_local_media_path=str(folder / "videos"), **OPEN) as server:
            for name in ("text.mp4", f"{web.url}/text.mp4"):
                status, message = told(server, name)
                assert status == 400 and f"{name!r}>: not a video in a known format" in message
