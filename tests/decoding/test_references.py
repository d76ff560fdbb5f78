"""Files that name other files or addresses: the decoder opens neither."""

import os
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import pytest

from helpers.video_files import VideoSpec, draw_number, read_number
from video_panda_hf.decoding import DecodeLimits, VideoDecodeError, decode_image, decode_picture, decode_video
from video_panda_hf.decoding.video import decode_video_or_picture
from video_panda_hf.processing import VideoPandaVideoProcessor


@pytest.fixture
def asked():
    """(address of a server, the paths that were asked of it)."""
    paths = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


def playlists(address: str, clip: Path) -> dict[str, str]:
    found = {}
    for number, target in enumerate((f"{address}/clip.ts", str(clip), f"file:{clip}", f"concat:{clip}")):
        sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{target}\n"
        mpd = (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT1S">'
            f'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>{target}</BaseURL>'
            "</Representation></AdaptationSet></Period></MPD>"
        )
        found |= {
            f"{number}.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
            f"{number}.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
            f"{number}.sdp": sdp + "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            f"{number}.mpd": mpd,
            f"{number}.asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
            f"{number}.ram": f"{target}\n",
            f"{number}.svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{target}"/></svg>',
        }
    return found


def with_reference(data: bytes, kind: bytes, target: str) -> bytes:
    """A mov file whose samples are said to be in another file: an alias (as of QuickTime) or a URL."""
    begin = data.index(b"dref") - 4
    size = int.from_bytes(data[begin : begin + 4], "big")
    if kind == b"url ":
        entry = bytes(4) + target.encode() + b"\0"
    else:
        name = target.encode()

        body = (
            bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12) + bytes([8]) + b"clip.mp4".ljust(63, b"\0")
        )
        body += bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
        body += struct.pack(">HH", 2, len(name)) + name + bytes(len(name) % 2)
        body += struct.pack(">HH", 18, len(name)) + name + bytes(len(name) % 2) + b"\xff\xff\0\0"
        entry = bytes(4) + body
    entry = struct.pack(">I4s", 8 + len(entry), kind) + entry
    dref = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    edited, more = data[:begin] + dref + data[begin + size :], len(dref) - size
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = edited.index(box) - 4
        length = int.from_bytes(edited[place : place + 4], "big") + more
        edited = edited[:place] + length.to_bytes(4, "big") + edited[place + 4 :]
    return edited


READERS = {
    "decode_video": decode_video,
    "isolated": lambda source: decode_video(source, limits=DecodeLimits(isolate=os.name == "posix")),
    "or picture": decode_video_or_picture,
    "picture": decode_picture,
    "image": decode_image,
    "processor": lambda source: VideoPandaVideoProcessor()([str(source) if isinstance(source, Path) else source]),
}


@pytest.mark.parametrize("reader", READERS)
def test_playlists_are_refused_and_nothing_is_asked_for(reader, asked, tmp_path):
    address, paths = asked
    clip = VideoSpec("clip.mp4", "libx264", frames=12).write(tmp_path)
    for name, text in playlists(address, clip).items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.mp4").write_text(text)
        for source in (tmp_path / name, tmp_path / f"{name}.mp4", text.encode()):
            with pytest.raises(VideoDecodeError):
                READERS[reader](source)
    for pattern in ("%03d.png", "*.png", f"concat:{clip}|{clip}", f"subfile,,start,0,end,0,,:{clip}", f"file:{clip}"):
        with pytest.raises(VideoDecodeError):
            READERS[reader](str(tmp_path / pattern) if pattern.endswith("png") else pattern)
    assert paths == []


@pytest.mark.parametrize("kind", [b"url ", b"alis"])
def test_a_mov_file_whose_samples_are_elsewhere_gets_none_of_them(kind, asked, tmp_path, monkeypatch):
    """The samples of another video, at the same places, would be this file's frames."""
    address, paths = asked
    monkeypatch.chdir(tmp_path)
    VideoSpec("clip.mp4", "libx264", frames=12, gop=1).write(tmp_path)
    own = VideoSpec("own.mov", "libx264", frames=12, gop=1, muxing={"use_editlist": "0"}).write(tmp_path).read_bytes()
    begin = own.index(b"mdat") + 4
    emptied = own[:begin] + bytes(own.index(b"moov") - 4 - begin) + own[own.index(b"moov") - 4 :]
    for target in (f"{address}/clip.mp4", "clip.mp4", str(tmp_path / "clip.mp4"), f"file://{tmp_path}/clip.mp4"):
        Path("reference.mov").write_bytes(with_reference(emptied, kind, target))
        for source in ("reference.mov", Path("reference.mov").read_bytes()):
            for strict in (True, False):
                with pytest.raises(VideoDecodeError):
                    decode_video(source, strict=strict)
        Path("reference.mov").write_bytes(with_reference(own, kind, target))
        if kind == b"url ":  # FFmpeg takes it for the file itself
            assert [read_number(frame) for frame in decode_video("reference.mov")[0]] == list(range(12))
        else:
            with pytest.raises(VideoDecodeError, match="not one frame"):
                decode_video("reference.mov")
    assert paths == []


def test_the_alias_would_be_followed_by_ffmpeg_if_it_were_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    VideoSpec(
        "clip.mov", "mjpeg", pix_fmt="yuvj420p", frames=12, draw=lambda n, h, w: draw_number(n + 20, h, w)
    ).write(tmp_path)
    own = VideoSpec("own.mov", "mjpeg", pix_fmt="yuvj420p", frames=12).write(tmp_path).read_bytes()
    Path("reference.mov").write_bytes(with_reference(own, b"alis", "clip.mov"))
    with av.open("reference.mov", options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert container.decode(video=0).__next__().width == 96
    with pytest.raises(VideoDecodeError, match="not one frame"):
        decode_video("reference.mov")
