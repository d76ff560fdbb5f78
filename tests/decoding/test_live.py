"""`read_live`: a video that is still coming in, sampled by its timestamps."""

import functools
import http.server
import io
import os
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from helpers.live_streams import stream_of
from helpers.video_files import draw_number, read_number
from video_panda_hf import SHIPPED_CLIPS
from video_panda_hf.decoding import (
    CorruptVideoError,
    DecodeLimits,
    NotAVideoError,
    VideoDecodeError,
    VideoLimitError,
    VideoNetworkError,
    VideoNotFoundError,
    VideoUnreadableError,
    decode_video,
    read_live,
)
from video_panda_hf.processing import VideoPandaVideoProcessor


CLIP = SHIPPED_CLIPS / "red_circle_left.mp4"  # 22 frames, 8 a second
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def numbered(times: list[float], size=(64, 96), form="matroska") -> bytes:
    """A video whose frame n shows n % 64, from `times[n]` seconds on."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=25, width=size[1], height=size[0], pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw_number(number % 64, *size), format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def shown(video: bytes, fps: float) -> list[tuple[float, int | None]]:
    return [(round(seconds, 3), read_number(picture)) for seconds, picture in read_live(io.BytesIO(video), fps)]


@pytest.mark.parametrize("fps", [1.0, 3.0, 8.0, 0.1])
@pytest.mark.parametrize("form", ["mp4", "mpegts", "matroska"])
def test_its_pictures_are_those_of_the_processor(fps, form):
    video = CLIP.read_bytes() if form == "mp4" else stream_of(CLIP, form)
    processor = VideoPandaVideoProcessor(frames_per_clip=1)
    frames, _ = decode_video(CLIP, lambda metadata: processor.sample_frames(metadata, fps=fps))
    read = list(read_live(io.BytesIO(video), fps))
    assert [seconds for seconds, _ in read] == pytest.approx([number / fps for number in range(len(frames))])
    assert len(read) == len(frames) and all((a == b).all() for (_, a), b in zip(read, frames, strict=True))


def test_timestamps_decide_which_frame_is_shown():
    times = [0, 0.1, 0.9, 1.0, 3.4, 3.5, 3.6, 4.5]
    assert shown(numbered(times), 1.0) == [(0, 0), (1, 3), (2, 3), (3, 3)]
    assert shown(numbered([seconds + 7 for seconds in times]), 2.0)[:3] == [(0, 0), (0.5, 1), (1, 3)]


def test_timestamps_that_jump_are_a_new_clock():
    video = numbered([0, 1, 2, 1000, 1001, 1002, 1003])
    assert shown(video, 1.0) == [(seconds, seconds) for seconds in range(6)]  # the last one is not over


def test_a_picture_comes_once_its_time_is_over_not_at_the_end():
    data = numbered([number / 4 for number in range(400)], form="mpegts")

    class Pipe(io.RawIOBase):
        position = 0

        def readable(self):
            return True

        def read(self, size=-1):
            part = data[self.position : self.position + 100]
            self.position += len(part)
            return part

    pipe = Pipe()
    pictures = read_live(pipe, 1.0)
    assert next(pictures)[0] == 0 and pipe.position < len(data) / 2
    assert len(list(pictures)) == 99


def test_a_file_is_read_on_while_it_grows_and_ends_after_the_wait(tmp_path):
    data, file = stream_of(CLIP, "mpegts", repeat=3), tmp_path / "growing.ts"
    file.write_bytes(b"")

    def write():
        with open(file, "ab", buffering=0) as growing:
            for start in range(0, len(data), 4000):
                time.sleep(0.02)
                growing.write(data[start : start + 4000])

    writer = threading.Thread(target=write)
    writer.start()
    read = list(read_live(file, 4.0, wait=0.5))
    writer.join()
    assert [picture.tobytes() for _, picture in read] == [p.tobytes() for _, p in read_live(io.BytesIO(data), 4.0)]
    assert len(read) == 33
    begun = time.monotonic()
    assert len(list(read_live(file, 4.0, wait=0))) == 33 and time.monotonic() - begun < 0.5


def test_a_named_pipe_is_read_until_its_writer_closes_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[stream_of(CLIP, "matroska")])
    writer.start()
    begun = time.monotonic()
    assert len(list(read_live(pipe, 8.0, wait=60))) == 22 and time.monotonic() - begun < 30
    writer.join()


def test_a_stream_over_http_is_read_and_may_name_no_file(tmp_path):
    (tmp_path / "clip.ts").write_bytes(stream_of(CLIP))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist.format("clip.ts"))
    (tmp_path / "bad.m3u8").write_text(playlist.format(f"file://{tmp_path}/clip.ts"))
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("clip.ts", "list.m3u8"):
            assert len(list(read_live(f"{address}/{name}", 8.0))) == 22
        for name in ("bad.m3u8", "none.ts"):
            with pytest.raises(VideoDecodeError, match=f"{name}': "):
                list(read_live(f"{address}/{name}", 8.0))
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_an_mp4_whose_index_comes_last_is_read_by_seeking(tmp_path):
    padding = (2**20).to_bytes(4, "big") + b"free" + bytes(2**20 - 8)  # more than what is read ahead
    data = CLIP.read_bytes()
    assert data.find(b"mdat") < data.find(b"moov")
    file = tmp_path / "clip.mp4"
    file.write_bytes(data[: data.find(b"moov") - 4] + padding + data[data.find(b"moov") - 4 :])
    assert len(list(read_live(file, 8.0, wait=0))) == 22


@pytest.mark.parametrize(
    ("form", "options", "error"),
    [("mpegts", {}, None), ("matroska", {}, None), ("mp4", FRAGMENTS, CorruptVideoError)],
)
def test_what_is_there_of_a_stream_that_breaks_off_is_yielded(form, options, error):
    data = stream_of(CLIP, form, 3, options)
    read = []
    try:
        for item in read_live(io.BytesIO(data[: len(data) * 6 // 10]), 4.0):
            read.append(item)
    except VideoDecodeError as raised:
        assert type(raised) is error and "broke off or is damaged" in str(raised)
    else:
        assert error is None
    assert 12 <= len(read) <= 21


def test_a_change_of_size_changes_the_pictures():
    video = numbered([0, 1, 2], form="mpegts") + numbered([3, 4, 5, 6], (32, 48), form="mpegts")
    shapes = [picture.shape for _, picture in read_live(io.BytesIO(video), 1.0)]
    assert {shape[:2] for shape in shapes} == {(64, 96), (32, 48)} and len(shapes) >= 6


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile {}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ],
)
def test_a_file_cannot_have_others_opened(playlist, tmp_path):
    (tmp_path / "clip.ts").write_bytes(stream_of(CLIP))
    file = tmp_path / "list.ts"
    file.write_text(playlist.format(tmp_path / "clip.ts"))
    for source in (file, io.BytesIO(file.read_bytes())):
        with pytest.raises(NotAVideoError):
            list(read_live(source, 1.0, wait=0))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("none.ts", VideoNotFoundError, "'none.ts': no such file"),
        (".", VideoUnreadableError, "is a directory"),
        ("/dev/null", VideoUnreadableError, "/dev/null"),
        ("file:///etc/hostname", VideoNetworkError, "streams of kind 'file' are not read"),
        ("rtsp://me:secret@127.0.0.1:9/door", VideoNetworkError, "'rtsp://127.0.0.1:9/door': cannot be read"),
        (io.BytesIO(b"no video" * 999), NotAVideoError, "<BytesIO>: not a video"),
        (io.BytesIO(b""), NotAVideoError, "<BytesIO>: not a video"),
        (3, TypeError, "not int"),
    ],
)
def test_what_cannot_be_read_is_named_with_a_reason(source, error, message):
    with pytest.raises(error) as raised:
        list(read_live(source, 1.0, wait=0))
    assert message in str(raised.value) and "secret" not in str(raised.value)


def test_settings_that_cannot_be_are_errors_at_once():
    for settings in ({"fps": 0}, {"fps": 1, "wait": -1}, {"fps": 1, "pixels": "nice"}):
        with pytest.raises(ValueError, match=list(settings)[-1]):
            read_live(CLIP, **settings)
    with pytest.raises(VideoLimitError, match="max_side"):
        list(read_live(CLIP, 1.0, wait=0, limits=DecodeLimits(max_side=8)))
    assert isinstance(next(iter(read_live(CLIP, 1.0)))[1], np.ndarray)
