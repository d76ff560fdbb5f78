"""Frames come back exactly as numbered, whatever the codec, the container and the order they are asked in."""

import base64
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

import helpers.video_files
from helpers.video_files import VideoSpec, draw_number, paint, read_number
from video_panda_hf.decoding.errors import CorruptVideoError, VideoLimitError
from video_panda_hf.decoding.groups import GroupDecoder
from video_panda_hf.decoding.pixels import PictureConverter
from video_panda_hf.decoding.video import DecodeLimits, decode_video, decode_video_or_picture


FILES = Path(__file__).parent / "files"


def x264(**options) -> dict:
    return {"bf": "3", "b-pyramid": "normal", **options}


def x265(*params: str) -> dict:
    return {"x265-params": ":".join(("log-level=none", "pools=1", "keyint=12", *params))}


def uneven(number: int) -> int:
    """Milliseconds at which frame `number` of a video with a variable rate is shown."""
    return 40 * number + 7 * (number % 5) + 100 * (number // 10)


OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:scenecut=0"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4"}
FAST_VPX = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
BT2020_PQ = {"colorspace": 9, "color_trc": 16, "color_primaries": 9}

MATRIX = [
    # H.264: structures
    VideoSpec("b_frames.mp4", "libx264", options=x264()),
    VideoSpec("no_b_frames.mp4", "libx264", options=x264(bf="0")),
    VideoSpec("long_gop.mp4", "libx264", options=x264(), gop=250),
    VideoSpec("intra_only.mp4", "libx264", options=x264(bf="0"), gop=1),
    VideoSpec("gradual_refresh.mp4", "libx264", options=x264(bf="0") | {"intra-refresh": "1"}),
    VideoSpec("interlaced.mp4", "libx264", options=x264(flags="+ildct+ilme")),
    VideoSpec("open_gop.mp4", "libx264", options=x264() | OPEN_GOP),
    VideoSpec("open_gop.mkv", "libx264", options=x264() | OPEN_GOP),
    VideoSpec("open_gop.ts", "libx264", options=x264() | OPEN_GOP),
    # H.264: times
    VideoSpec("variable_rate.mp4", "libx264", options=x264(), ticks=1000, times=uneven),
    VideoSpec("variable_rate.mkv", "libx264", options=x264(), ticks=1000, times=uneven),
    VideoSpec("times_rounded_to_one.mkv", "libx264", options=x264(), ticks=2000),
    VideoSpec("late_start.mp4", "libx264", options=x264(), times=lambda n: n + 500),
    VideoSpec("late_start.mkv", "libx264", options=x264(), times=lambda n: n + 500),
    VideoSpec("late_start.ts", "libx264", options=x264(), times=lambda n: n + 500),
    VideoSpec(
        "edit_list.mp4",
        "libx264",
        options=x264(),
        times=lambda n: n - 17,
        first_shown=17,
        muxing={"avoid_negative_ts": "disabled"},
    ),
    # H.264: containers
    VideoSpec("fragmented.mp4", "libx264", options=x264(), muxing={"movflags": "frag_keyframe+empty_moov"}),
    VideoSpec("fast_start.mp4", "libx264", options=x264(), muxing={"movflags": "faststart"}),
    VideoSpec("h264.mov", "libx264", options=x264()),
    VideoSpec("h264.mkv", "libx264", options=x264()),
    VideoSpec("live.mkv", "libx264", options=x264(), muxing={"live": "1"}),
    VideoSpec("h264.ts", "libx264", options=x264()),
    VideoSpec("h264.flv", "libx264", options=x264()),
    VideoSpec("h264.avi", "libx264", options=x264()),
    VideoSpec("h264.nut", "libx264", options=x264()),
    VideoSpec("h264.mxf", "libx264", options=x264()),
    VideoSpec("raw.h264", "libx264", options=x264()),
    # H.264: pictures
    VideoSpec("rotated_90.mp4", "libx264", options=x264(), rotation=90),
    VideoSpec("rotated_180.mp4", "libx264", options=x264(), rotation=180),
    VideoSpec("rotated_270.mov", "libx264", options=x264(), rotation=270),
    VideoSpec("mirrored.mp4", "libx264", options=x264(), mirrored=True),
    VideoSpec("mirrored_rotated.mp4", "libx264", options=x264(), mirrored=True, rotation=90),
    VideoSpec("wide_pixels.mp4", "libx264", options=x264(), aspect=Fraction(4, 3)),
    VideoSpec("tall_pixels.mkv", "libx264", options=x264(), aspect=Fraction(1, 2)),
    VideoSpec("odd_size.mp4", "libx264", options=x264(), pix_fmt="yuv444p", width=95, height=63),
    VideoSpec("ten_bits.mp4", "libx264", options=x264(), pix_fmt="yuv420p10le"),
    VideoSpec("full_range.mp4", "libx264", options=x264(), colour={"color_range": 2}),
    VideoSpec("bt709.mp4", "libx264", options=x264(), colour={"colorspace": 1}),
    # HEVC
    VideoSpec("hevc.mp4", "libx265", options=x265("open-gop=0")),
    VideoSpec("hevc_open_gop.mp4", "libx265", options=x265("open-gop=1")),
    VideoSpec("hevc.mkv", "libx265", options=x265()),
    VideoSpec("hevc.ts", "libx265", options=x265("open-gop=1")),
    VideoSpec("raw.hevc", "libx265", options=x265()),
    VideoSpec("hevc_hdr.mp4", "libx265", options=x265(), pix_fmt="yuv420p10le", colour=BT2020_PQ),
    # VP8, VP9, AV1
    VideoSpec("vp8_hidden_frames.webm", "libvpx", options=ALT_REF),
    VideoSpec("vp8.mkv", "libvpx", options=FAST_VPX),
    VideoSpec("vp9_hidden_frames.webm", "libvpx-vp9", options=ALT_REF),
    VideoSpec("vp9.mp4", "libvpx-vp9", options=ALT_REF),
    VideoSpec("vp9.ivf", "libvpx-vp9", options=ALT_REF),
    VideoSpec("vp9_odd_size.webm", "libvpx-vp9", options=FAST_VPX, width=97, height=61),
    VideoSpec("vp9_rotated.mp4", "libvpx-vp9", options=ALT_REF, rotation=90, gop=48),
    VideoSpec("vp9_alpha.webm", "libvpx-vp9", options=FAST_VPX, pix_fmt="yuva420p"),
    VideoSpec("av1.mp4", "libsvtav1", options={"preset": "10"}),
    VideoSpec("av1.webm", "libsvtav1", options={"preset": "10"}),
    VideoSpec("av1.obu", "libsvtav1", options={"preset": "10"}),
    # MPEG
    VideoSpec("mpeg4.mp4", "mpeg4", b_frames=2),
    VideoSpec("mpeg4.avi", "mpeg4", b_frames=2),
    VideoSpec("mpeg4_no_b_frames.avi", "mpeg4", b_frames=0),
    VideoSpec("raw.m4v", "mpeg4", b_frames=2),
    VideoSpec("mpeg4_odd_size.mov", "mpeg4", width=95, height=63),
    VideoSpec("mpeg2.ts", "mpeg2video", b_frames=2),
    VideoSpec("mpeg2.mpg", "mpeg2video", container="vob", b_frames=2),
    VideoSpec("mpeg2.mov", "mpeg2video", b_frames=2),
    VideoSpec("mpeg2.mkv", "mpeg2video", b_frames=2),
    VideoSpec("mpeg2_interlaced.ts", "mpeg2video", b_frames=2, options={"flags": "+ildct+ilme"}),
    VideoSpec("mpeg1.mpg", "mpeg1video", b_frames=2),
    # Every frame a key frame
    VideoSpec("mjpeg.avi", "mjpeg", pix_fmt="yuvj420p"),
    VideoSpec("mjpeg.mov", "mjpeg", pix_fmt="yuvj420p"),
    VideoSpec("raw.mjpeg", "mjpeg", pix_fmt="yuvj420p"),
    VideoSpec("prores_alpha.mov", "prores_ks", pix_fmt="yuva444p10le"),
    VideoSpec("png_alpha.mov", "png", pix_fmt="rgba"),
    VideoSpec("uncompressed.avi", "rawvideo"),
    VideoSpec("huffyuv.avi", "huffyuv", pix_fmt="yuv422p"),
    # Pictures that move, and older codecs
    VideoSpec("gif.gif", "gif", pix_fmt="rgb8"),
    VideoSpec("apng.png", "apng", container="apng", pix_fmt="rgb24"),
    VideoSpec("webp.webp", "libwebp_anim", container="webp", pix_fmt="bgra"),
    VideoSpec("ffv1.mkv", "ffv1", pix_fmt="yuv444p"),
    VideoSpec("wmv.asf", "wmv2"),
    VideoSpec("sorenson.flv", "flv"),
    VideoSpec("h263.3gp", "h263", width=128, height=96, aspect=Fraction(12, 11)),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Writes a video of this module once, by name."""
    folder = tmp_path_factory.mktemp("videos")
    specs = {spec.name: spec for spec in (*MATRIX, *COLOURFUL, *FINER, ODD_HEIGHT, UNKNOWN_MATRIX)}

    def path_of(name: str) -> Path:
        path = folder / name
        return path if path.exists() else specs[name].write(folder)

    return path_of


def frames_from_start_to_end(path: Path) -> np.ndarray:
    """All frames by plain decoding, without an index or a seek."""
    with av.open(str(path)) as container:
        stream, convert = container.streams.video[0], None
        pictures = []
        for frame in container.decode(stream):
            convert = convert or PictureConverter.of(frame, stream.sample_aspect_ratio, "stored")
            pictures.append(convert(frame))
    return np.stack(pictures)


def test_the_matrix_is_as_large_as_promised():
    assert len({spec.name for spec in MATRIX}) == len(MATRIX) >= 40


@pytest.fixture
def decoders(monkeypatch):
    """Makes decode_video use three decoding threads. Returns the set of threads that decoded."""
    seen = set()
    decode_run = GroupDecoder.decode_run

    def noted(self, run):
        seen.add(threading.current_thread().name)
        return decode_run(self, run)

    monkeypatch.setattr("video_panda_hf.decoding.readers.WORTH_A_DECODER", 1)
    monkeypatch.setattr("video_panda_hf.decoding.readers.decoding_threads", lambda: 3)
    monkeypatch.setattr(GroupDecoder, "decode_run", noted)
    return seen


@pytest.mark.parametrize("spec", MATRIX, ids=lambda spec: spec.name)
def test_every_frame_comes_back_by_its_number(spec, made):
    check_numbers(spec, made)


@pytest.mark.parametrize("spec", MATRIX, ids=lambda spec: spec.name)
def test_every_frame_comes_back_from_several_decoders(spec, made, decoders):
    check_numbers(spec, made)
    if spec.name in ("b_frames.mp4", "open_gop.mkv", "hevc.ts", "vp9.webm"):
        assert any(name.startswith("decode_video") for name in decoders)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode_video")]


def check_numbers(spec, made):
    path = made(spec.name)
    everything, metadata = decode_video(path)
    assert [read_number(frame) for frame in everything] == spec.numbers
    assert metadata.total_num_frames == len(spec.numbers)
    if not spec.name.endswith(".webp"):  # which FFmpeg does not decode
        np.testing.assert_array_equal(everything, frames_from_start_to_end(path))

    random = np.random.default_rng(len(spec.name))
    requests = [random.integers(0, len(everything), 5) for _ in range(6)] + [[number] for number in (0, 13, 29, -1)]
    for wanted in requests:
        wanted = np.asarray(wanted) % len(everything)
        frames, metadata = decode_video(path, lambda _, wanted=wanted: wanted)
        np.testing.assert_array_equal(frames, everything[wanted])
        assert metadata.frames_indices == wanted.tolist()


@pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS")
@pytest.mark.parametrize("spec", MATRIX, ids=lambda spec: spec.name)
def test_a_worker_process_gives_the_same_frames_and_metadata(spec, made):
    wanted = np.array([0, 29, -1, 13, 13]) % len(spec.numbers)
    frames, metadata = decode_video(made(spec.name), indices=wanted)
    isolated, found = decode_video(made(spec.name), indices=wanted, isolate=True)
    np.testing.assert_array_equal(isolated, frames)
    assert found == metadata and metadata.frames_indices == wanted.tolist()


@pytest.mark.parametrize("spec", MATRIX, ids=lambda spec: spec.name)
def test_metadata_tells_the_upright_size_the_rate_and_the_duration(spec, made):
    for pixels in ("stored", "displayed"):
        check_metadata(spec, made(spec.name), pixels)


def check_metadata(spec, path, pixels):
    frames, metadata = decode_video(path, lambda _: [3], pixels=pixels)
    height, width = spec.height, spec.width
    if spec.aspect and pixels == "displayed":
        height, width = (
            (height, round(width * spec.aspect)) if spec.aspect > 1 else (round(height / spec.aspect), width)
        )
    if spec.rotation % 180:
        height, width = width, height
    assert frames.shape == (1, height, width, 3) and frames.dtype == np.uint8
    assert (metadata.height, metadata.width) == (height, width)
    assert metadata.video_backend == "pyav"
    first, last = (spec.times(number) / spec.ticks for number in (spec.first_shown, spec.frames - 1))
    assert metadata.duration == pytest.approx(last - first, abs=0.1)
    assert metadata.fps == pytest.approx(len(spec.numbers) / metadata.duration)


@pytest.mark.parametrize("name", ["b_frames.mp4", "h264.mkv", "mpeg4.avi", "gif.gif", "webp.webp"])
def test_any_kind_of_source_gives_the_same_frames(name, made):
    path = made(name)
    data = path.read_bytes()
    expected, _ = decode_video(path)
    with open(path, "rb") as opened:
        opened.seek(1000)
        in_url = f"data:video/{path.suffix[1:]};base64,{base64.b64encode(data).decode()}"
        sources = [str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), opened, in_url]
        for source in sources:
            frames, _ = decode_video(source)
            np.testing.assert_array_equal(frames, expected)
        assert opened.tell() == 1000


def test_a_path_that_looks_like_a_pattern_or_a_protocol_is_a_path(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:%03d.mp4", "a b?#ä.mp4"):
        Path(name).write_bytes(made("b_frames.mp4").read_bytes())
        assert decode_video(name)[1].total_num_frames == 48


def remux(source: Path, path: Path, change) -> Path:
    """The packets of `source` after `change(packets)`, which may give them other times, in another container."""
    with av.open(str(source)) as container, av.open(str(path), "w") as copy:
        stream = container.streams.video[0]
        to = copy.add_stream_from_template(stream)
        for packet in change([packet for packet in container.demux(stream) if packet.size]):
            packet.stream = to
            copy.mux(packet)
    return path


@pytest.mark.parametrize("name", ["in.mkv", "in.mov", "in.mp4"])
def test_an_index_that_ends_midway_does_not_cost_the_frames_before(name, made, tmp_path):
    """Xvid writes packets of a few bytes without a picture. Only decoding can find the frames then."""

    def with_an_empty_picture(packets):
        empty = av.Packet(b"\0\0\1\xb6\x50\0\0")  # a VOP that is not coded
        for number, packet in enumerate(packets):
            packet.pts = packet.dts if packet.pts is None else packet.pts
            if number == 20:
                empty.time_base, empty.pts, empty.dts = packet.time_base, packet.pts, packet.dts
            later = int(number >= 20)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
        return [*packets[:20], empty, *packets[20:]]

    path = remux(made("mpeg4_no_b_frames.avi"), tmp_path / name, with_an_empty_picture)
    expected = [read_number(frame) for frame in frames_from_start_to_end(path)]
    assert len(expected) >= 48
    for source in (path, path.read_bytes()):
        assert [read_number(frame) for frame in decode_video(source)[0]] == expected


@pytest.mark.parametrize("name", ["h264.ts", "h264.mkv"])
def test_a_time_that_occurs_twice_does_not_cost_the_frames(name, made, tmp_path):
    def one_time_twice(packets):
        packets[20].pts = packets[19].pts
        return packets

    path = remux(made(name), tmp_path / name, one_time_twice)
    expected = [read_number(frame) for frame in frames_from_start_to_end(path)]
    assert len(expected) == 48
    assert [read_number(frame) for frame in decode_video(path)[0]] == expected


@pytest.mark.parametrize("name", ["h264.ts", "hevc.ts", "mpeg2.ts", "h264.mkv"])
def test_the_same_recording_twice_in_a_row_has_the_frames_of_both(name, made):
    data = made(name).read_bytes()
    frames, metadata = decode_video(data + data)
    assert [read_number(frame) for frame in frames] == [*range(48), *range(48)]
    assert metadata.total_num_frames == 96


@pytest.mark.parametrize("apart", [3, 100, 90_000])
@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts"])
def test_a_recording_after_a_later_one_has_the_frames_of_both(name, apart, made, tmp_path):
    def later(packets):
        for packet in packets:
            packet.pts, packet.dts = packet.pts + apart * 90_000, packet.dts + apart * 90_000
        return packets

    data = remux(made(name), tmp_path / name, later).read_bytes() + made(name).read_bytes()
    frames, metadata = decode_video(data)
    assert [read_number(frame) for frame in frames] == [*range(48), *range(48)]
    assert metadata.total_num_frames == 96
    assert (metadata.duration, metadata.fps) == (96 / 25, 25)


def test_two_theora_files_in_a_row_have_the_frames_of_both():
    """The second one repeats the headers, which the decoder refuses as frames."""
    data = (FILES / "theora.ogv").read_bytes()
    frames, _ = decode_video(data + data)
    assert [read_number(frame) for frame in frames] == [*range(12), *range(12)]


@pytest.mark.parametrize("name", ["h264.asf", "one.flv"])
def test_where_a_seek_fails_the_file_is_read_from_its_start(name, tmp_path):
    count = 1 if name == "one.flv" else 30
    path = VideoSpec(name, "libx264", options=x264(), frames=count).write(tmp_path)
    frames, metadata = decode_video(path)
    assert [read_number(frame) for frame in frames] == list(range(count))
    assert metadata.fps == pytest.approx(25, abs=0.5)
    assert read_number(decode_video(path, indices=[count // 2])[0][0]) == count // 2


def test_a_seek_that_fails_midway_costs_no_frame(made, monkeypatch):
    monkeypatch.setattr(GroupDecoder, "decode_run", lambda self, run: iter(()) if run.start else decode_run(self, run))
    frames, _ = decode_video(made("b_frames.mp4"), indices=[40, 3])
    assert [read_number(frame) for frame in frames] == [40, 3]


@pytest.mark.parametrize("name", ["vc2.drc", "vc2.mkv", "vc2.ts"])
def test_vc2_has_its_rate_and_its_frames(name, tmp_path):
    path = VideoSpec(name, "vc2", options={"b": "100M"}, ticks=30, frames=20, width=320, height=192).write(tmp_path)
    frames, metadata = decode_video(path)
    assert [read_number(frame) for frame in frames] == list(range(20))
    assert metadata.fps == pytest.approx(30, abs=0.1) and metadata.duration == pytest.approx(20 / 30, abs=0.01)


def test_a_clock_that_overflows_is_no_damage(tmp_path):
    """The time stamps of MPEG-TS have 33 bits, and begin anew after 26.5 hours."""
    spec = VideoSpec("wrap.ts", "libx264", options=x264(), ticks=90_000, times=lambda n: 2**33 - 3600 * 40 + 3600 * n)
    frames, metadata = decode_video(spec.write(tmp_path))
    assert [read_number(frame) for frame in frames] == list(range(48))
    assert metadata.duration == pytest.approx(48 / 25, abs=0.1)


def test_an_avi_that_leaves_out_frames_has_their_times(tmp_path):
    sparse = [*range(20), *range(21, 100, 4)]
    spec = VideoSpec("sparse.avi", "libx264", options=x264(), frames=len(sparse), times=lambda n: sparse[n])
    frames, metadata = decode_video(spec.write(tmp_path))
    assert [read_number(frame) for frame in frames] == list(range(40))
    assert metadata.duration == pytest.approx(98 / 25, abs=0.3)


def test_a_longer_sound_is_no_damage_and_a_cut_asf_file_is(tmp_path):
    path = tmp_path / "sound.asf"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("wmv2", rate=25), container.add_stream("wmav2", rate=44100)
        video.width, video.height, video.pix_fmt, sound.bit_rate = 96, 64, "yuv420p", 128_000
        for number in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 88200), dtype=np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux([*video.encode(None), *sound.encode(silence), *sound.encode(None)])
    assert [read_number(frame) for frame in decode_video(path)[0]] == list(range(12))
    with pytest.raises(CorruptVideoError, match="cut off: it has"):
        decode_video(path.read_bytes()[:-3000])


def test_a_window_inside_one_frame_has_the_frame_on_the_screen(tmp_path):
    path = VideoSpec("slow.mp4", "libx264", frames=3, ticks=1, times=lambda n: 10 * n).write(tmp_path)
    frames, metadata = decode_video(path, start=12, end=15)
    assert [read_number(frame) for frame in frames] == [1]
    assert (metadata.total_num_frames, metadata.duration) == (1, 3.0)


def decode_run(decoder, run, original=GroupDecoder.decode_run):
    return original(decoder, run)


@pytest.mark.parametrize(
    "name", ["b_frames.mp4", "no_b_frames.mp4", "hevc.mp4", "vp9.mp4", "av1.mp4", "mpeg4.mp4", "mpeg2.mov", "h263.3gp"]
)
def test_frames_are_right_and_in_order_without_a_table_of_key_frames(name, made):
    """A container without it calls every packet a key frame."""
    data = made(name).read_bytes()
    assert data.count(b"stss") == 1
    for strict in (True, False):
        for wanted in (range(48), [30, 7, 41, 20]):
            frames, _ = decode_video(data.replace(b"stss", b"free"), lambda _, wanted=wanted: wanted, strict=strict)
            assert [read_number(frame) for frame in frames] == list(wanted)


@pytest.mark.parametrize("packets_lost", [0, 5])
@pytest.mark.parametrize("name", ["open_gop.ts", "hevc.ts", "mpeg2.ts", "hevc_open_gop.mp4", "mpeg2.mkv"])
def test_a_recording_cut_at_its_start_has_the_frames_a_player_shows(name, packets_lost, made, tmp_path):
    """The first 12 frames and some packets are cut off. Frames that refer to lost ones are not shown or counted."""
    path = tmp_path / name
    with av.open(str(made(name))) as container, av.open(str(path), "w") as recording:
        stream = container.streams.video[0]
        copy = recording.add_stream_from_template(stream)
        packets = [packet for packet in container.demux(stream) if packet.size]
        second_key = [place for place, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second_key + packets_lost :]:
            packet.stream = copy
            recording.mux(packet)
    shown = [read_number(frame) for frame in frames_from_start_to_end(path)]
    frames, _ = decode_video(path)
    assert [read_number(frame) for frame in frames] == shown
    frames, _ = decode_video(path, lambda _: [15, 0, 7])
    assert [read_number(frame) for frame in frames] == [shown[15], shown[0], shown[7]]


@pytest.mark.parametrize("name", ["mpeg4.avi", "raw.h264", "interlaced.mp4"])
def test_a_linear_pass_that_may_keep_nothing_decodes_twice(name, made, monkeypatch):
    expected, _ = decode_video(made(name))
    monkeypatch.setattr("video_panda_hf.decoding.readers.KEPT_BYTES", 0)
    for source in (made(name), made(name).read_bytes()):
        frames, _ = decode_video(source, lambda _: [30, 7, 30])
        np.testing.assert_array_equal(frames, expected[[30, 7, 30]])


@pytest.mark.parametrize("name", ["b_frames.mp4", "late_start.ts", "variable_rate.mkv", "edit_list.mp4", "mpeg4.avi"])
def test_a_window_counts_the_frames_shown_inside_it(name, made):
    spec = next(spec for spec in MATRIX if spec.name == name)
    start, end = 0.31, 1.05
    zero = spec.times(spec.first_shown)
    inside = [number for number in spec.numbers if start <= (spec.times(number) - zero) / spec.ticks < end]
    frames, metadata = decode_video(made(name), start=start, end=end)
    assert [read_number(frame) for frame in frames] == inside
    assert metadata.total_num_frames == len(inside)
    assert metadata.duration == pytest.approx(end - start, abs=0.15)
    assert metadata.frames_indices == list(range(len(inside)))


def test_a_window_must_hold_a_frame(made):
    path = made("b_frames.mp4")
    with pytest.raises(ValueError, match="start < end"):
        decode_video(path, start=1.0, end=1.0)
    with pytest.raises(ValueError, match=r"lasts 1\.920 s"):
        decode_video(path, start=10.0)


def test_the_sampler_is_asked_once_and_knows_everything_but_the_indices(made):
    seen = []

    def sampler(metadata):
        seen.append((metadata.total_num_frames, metadata.fps, metadata.duration, metadata.frames_indices))
        return torch.tensor([5, 2, 5])

    frames, metadata = decode_video(made("b_frames.mp4"), sampler)
    assert seen == [(48, 25.0, 1.92, None)]
    assert [read_number(frame) for frame in frames] == [5, 2, 5]
    assert metadata.timestamps == [0.2, 0.08, 0.2]


def test_several_decoders_read_paths_and_bytes_but_one_a_file_object(made, decoders):
    path = made("b_frames.mp4")
    expected, _ = decode_video(path, lambda _: [7, 20, 41])
    for source, several in ((path, True), (path.read_bytes(), True), (open(path, "rb"), False)):
        decoders.clear()
        frames, _ = decode_video(source, lambda _: [7, 20, 41])
        np.testing.assert_array_equal(frames, expected)
        assert any(name.startswith("decode_video") for name in decoders) == several


def test_one_run_or_runs_of_many_frames_are_left_to_one_decoder(made, decoders, monkeypatch):
    everything, _ = decode_video(made("b_frames.mp4"))
    assert len(everything) == 48 and not any(name.startswith("decode_video") for name in decoders)
    monkeypatch.setattr("video_panda_hf.decoding.readers.KEPT_BYTES", everything[0].nbytes)
    decode_video(made("b_frames.mp4"), lambda _: [7, 20, 41])
    assert not any(name.startswith("decode_video") for name in decoders)


def test_an_error_in_one_of_several_decoders_ends_all(made, decoders, monkeypatch):
    feed = GroupDecoder.feed

    def feed_until_time_is_up(self, packet):
        if threading.current_thread().name.startswith("decode_video"):
            self.budget.start -= 1000
        return feed(self, packet)

    monkeypatch.setattr(GroupDecoder, "feed", feed_until_time_is_up)
    with pytest.raises(VideoLimitError, match="max_seconds"):
        decode_video(made("b_frames.mp4"), lambda _: [7, 20, 41])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode_video")]


def test_where_no_thread_can_be_had_one_decoder_does_the_work(made, decoders, monkeypatch):
    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("video_panda_hf.decoding.readers.ThreadPoolExecutor.submit", no_thread)
    frames, _ = decode_video(made("b_frames.mp4"), lambda _: [7, 20, 41])
    assert [read_number(frame) for frame in frames] == [7, 20, 41]


def test_an_index_outside_the_video_is_named(made):
    for index in (48, -1):
        with pytest.raises(IndexError, match=f"frame {index} .* 0 to 47"):
            decode_video(made("b_frames.mp4"), lambda _, index=index: [index])


def test_only_the_groups_of_the_wanted_frames_are_read(tmp_path):
    """For an mp4, the packets of other groups of pictures are not read from the file."""

    class CountingFile(io.FileIO):
        bytes_read = 0

        def read(self, size=-1):
            data = super().read(size)
            self.bytes_read += len(data)
            return data

    path, random = tmp_path / "noise.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "4"})
        stream.width, stream.height, stream.codec_context.gop_size = 256, 256, 10
        for _ in range(100):
            noise = random.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    with CountingFile(path) as file:
        decode_video(file, lambda _: [0, 55])
        assert path.stat().st_size > 5e6 and file.bytes_read < 0.4 * path.stat().st_size


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix, red, blue", [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_colours_follow_the_matrix_and_range_that_the_file_names(matrix, red, blue, full_range, tmp_path):
    """`red` and `blue` are the weights of ITU-R BT.709, BT.601 and BT.2020 for luma."""
    colours = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210], [128, 128, 128]], dtype=np.uint8)
    picture = np.repeat(np.repeat(colours[None], 64, axis=0), 32, axis=1)
    r, g, b = np.moveaxis(picture / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    yuv = np.stack([black + luma * y, 128 + chroma * u, 128 + chroma * v]).round().astype(np.uint8)

    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(yuv, format="yuv444p")), *stream.encode(None)])
    frames, _ = decode_video(path)
    assert np.abs(frames[0].astype(int) - picture).max() <= 3


def colourful(name: str, codec: str = "libx264", **settings) -> VideoSpec:
    settings = {"width": 176, "height": 144, "options": {"preset": "ultrafast", "qp": "12"}, **settings}
    return VideoSpec(name, codec, frames=3, draw=paint, **settings)


HIGH_DEFINITION = {"width": 1280, "height": 720}
COLOURS = {
    "untagged": {},
    "bt709": {"colorspace": 1},
    "bt601": {"colorspace": 6},
    "bt2020": {"colorspace": 9},
    "full_range": {"color_range": 2},
    "full_range_bt709": {"colorspace": 1, "color_range": 2},
}
# 8-bit 4:2:0, progressive, in standard and high definition.
COLOURFUL = [
    *(colourful(f"sd_{name}.mp4", colour=colour) for name, colour in COLOURS.items()),
    *(colourful(f"hd_{name}.mp4", colour=colour, **HIGH_DEFINITION) for name, colour in COLOURS.items()),
    colourful("sd_wide_pixels.mp4", aspect=Fraction(11, 10)),
    colourful("sd_rotated_90.mp4", rotation=90),
    colourful("hd_rotated_270.mp4", rotation=270, **HIGH_DEFINITION),
    colourful("sd_odd_width.webm", "libvpx-vp9", options=FAST_VPX, width=175),
    colourful("sd_hevc.mp4", "libx265", options=x265()),
    colourful("sd_full_range_mjpeg.avi", "mjpeg", options={}, pix_fmt="yuvj420p"),
]
FINER = [
    colourful("4_2_2.mp4", pix_fmt="yuv422p"),
    colourful("4_4_4.mp4", pix_fmt="yuv444p"),
    colourful("ten_bits_4_2_0.mp4", pix_fmt="yuv420p10le"),
    colourful("ten_bits_4_2_2.mp4", pix_fmt="yuv422p10le"),
    colourful("ten_bits_4_4_4.mp4", pix_fmt="yuv444p10le", colour={"colorspace": 9}),
]
UNKNOWN_MATRIX = colourful("sd_ycgco.mp4", colour={"colorspace": 8})  # swscale, and so PyAV, cannot convert it by that
ODD_HEIGHT = colourful("odd_height.mov", "mpeg4", options={}, height=143)


@pytest.mark.parametrize("pixels", ["stored", "displayed"])
@pytest.mark.parametrize("name", ["sd_untagged", "sd_bt709", "hd_untagged", "hd_bt601", "hd_bt709"])
def test_the_matrix_is_the_files_or_else_bt601(name, pixels, made):
    """Or BT.709, for high definition as displayed. Expected is what the formula gives for chroma that is repeated."""
    is_601 = name in ("sd_untagged", "hd_bt601") or (name, pixels) == ("hd_untagged", "stored")
    name = f"{name}.mp4"
    red, blue = (0.299, 0.114) if is_601 else (0.2126, 0.0722)
    with av.open(str(made(name))) as container:
        frame = next(container.decode(video=0))
    planes = frame.to_ndarray(format="yuv420p").astype(float).ravel()
    y, u, v = np.split(planes, [frame.height * frame.width, frame.height * frame.width * 5 // 4])
    y = (y.reshape(frame.height, frame.width) - 16) / 219
    u, v = (
        ((plane.reshape(frame.height // 2, -1) - 128) / 224).repeat(2, axis=0).repeat(2, axis=1) for plane in (u, v)
    )
    r, b = y + (2 - 2 * red) * v, y + (2 - 2 * blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    expected = (np.stack([r, g, b], axis=-1) * 255).clip(0, 255)
    assert np.abs(decode_video(made(name), indices=[0], pixels=pixels)[0][0] - expected).max() <= 3


def test_pixels_are_stored_or_displayed(made):
    path = made("wide_pixels.mp4")
    assert decode_video(path)[0].shape[1:3] == (64, 96)
    assert decode_video(path, pixels="displayed")[0].shape[1:3] == (64, 128)
    for source in (path, path.with_name("absent.mp4")):
        with pytest.raises(ValueError, match='`pixels` is "stored" or "displayed", not \'square\''):
            decode_video(source, pixels="square")


def test_a_pictures_pixels_are_the_same_stored_or_displayed(tmp_path):
    Image.fromarray(paint(0, 20, 30)).save(tmp_path / "photo.png", dpi=(72, 144))
    stored, displayed = (
        decode_video_or_picture(tmp_path / "photo.png", pixels=pixels)[0] for pixels in ("stored", "displayed")
    )
    np.testing.assert_array_equal(stored, paint(0, 20, 30)[None])
    np.testing.assert_array_equal(displayed, stored)


def test_frames_are_chosen_by_indices_in_place_of_a_function(made):
    path = made("b_frames.mp4")
    for indices in ([5, 0, 5, 40], np.array([5, 0, 5, 40]), torch.tensor([5, 0, 5, 40]), (5, 0, 5, 40)):
        frames, metadata = decode_video(path, indices=indices)
        assert [read_number(frame) for frame in frames] == metadata.frames_indices == [5, 0, 5, 40]
    frames, _ = decode_video(path, indices=[0, 5], start=0.4)
    assert [read_number(frame) for frame in frames] == [10, 15]
    for wrong in (48, -1):
        with pytest.raises(ValueError, match=f"frame {wrong} was asked for, but the video has 48 frames, 0 to 47"):
            decode_video(path, indices=[0, wrong])
    with pytest.raises(ValueError, match="give one of them"):
        decode_video(path, lambda _: [0], indices=[0])
    with pytest.raises(TypeError, match="float"):
        decode_video(path, indices=[0.5])


# The decoder that the released weights were trained with, and torchcodec. What they give otherwise than we, and why.
LOSES_FRAMES = "a transport stream begins with its second group of pictures, and its last frame comes several times"
OTHER_SCALER = "there is no direct conversion, and the scaler of its FFmpeg 4.1 places the colours of a row otherwise"
NO_MIRRORS = "it knows rotations but no mirrors"
NOT_AS_DECORD = {
    "edit_list.mp4": "it counts the packets that are not shown, and gives the last frame again for each",
    "mirrored.mp4": NO_MIRRORS,
    "mirrored_rotated.mp4": NO_MIRRORS,
    **dict.fromkeys(["open_gop.ts", "late_start.ts", "h264.ts", "hevc.ts"], LOSES_FRAMES),
    **dict.fromkeys(["mpeg2.ts", "mpeg2_interlaced.ts"], LOSES_FRAMES),
    **dict.fromkeys(["mpeg4_odd_size.mov", "vp9_odd_size.webm", "odd_height.mov"], OTHER_SCALER),
    **dict.fromkeys(["ten_bits_4_2_0.mp4", "ten_bits_4_2_2.mp4"], OTHER_SCALER),
}
NOT_READ_BY_DECORD = {
    **dict.fromkeys(["av1.mp4", "av1.webm", "av1.obu"], "its FFmpeg has no decoder"),
    **dict.fromkeys(["raw.h264", "raw.hevc", "raw.mjpeg"], "no frame has a time"),
    **dict.fromkeys(["live.mkv", "vp9.ivf", "gif.gif", "apng.png"], "the file does not say how many frames it has"),
    "webp.webp": "FFmpeg does not read animated WebP",
}
# torchcodec is not pinned: another version may read more of these.
NOT_AS_TORCHCODEC = {
    "mirrored.mp4": NO_MIRRORS,
    "mirrored_rotated.mp4": NO_MIRRORS,
    **dict.fromkeys(["mpeg4_odd_size.mov", "odd_height.mov"], "it heeds where the file places the colours of a row"),
    **dict.fromkeys(["ten_bits_4_2_0.mp4", "ten_bits_4_2_2.mp4"], "as odd_height.mov"),
    "vp9_odd_size.webm": "it scales the colours of a row bicubically",
}


def frames_of_others(decoder: str, paths: list[Path], folder: Path) -> dict[str, np.ndarray]:
    """{name: frames} of the files that it reads."""
    script = Path(helpers.video_files.__file__).with_name("frames_of_others.py")
    done = subprocess.run([sys.executable, script, decoder, folder, *paths], capture_output=True, timeout=120)
    if done.returncode == 3:
        pytest.skip(f"{decoder} does not work here: {done.stderr.decode()[-200:]}")
    assert done.returncode == 0, done.stderr.decode()
    files = [folder / f"{path.name}.npy" for path in paths]
    return {file.stem: np.load(file) for file in files if file.exists()}


def unlike(frames: dict[str, np.ndarray], made) -> set[str]:
    return {name for name, theirs in frames.items() if not np.array_equal(decode_video(made(name))[0], theirs)}


def test_frames_are_those_of_decord_bit_for_bit(made, tmp_path):
    pytest.importorskip("decord")
    names = [spec.name for spec in (*MATRIX, *COLOURFUL, *FINER, ODD_HEIGHT, UNKNOWN_MATRIX)]
    frames = frames_of_others("decord", [made(name) for name in names], tmp_path)
    assert set(names) - set(frames) == set(NOT_READ_BY_DECORD)
    assert unlike(frames, made) == set(NOT_AS_DECORD)


def test_frames_are_those_of_torchcodec_bit_for_bit(made, tmp_path):
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    names = [spec.name for spec in (*MATRIX, *COLOURFUL, *FINER, ODD_HEIGHT, UNKNOWN_MATRIX)]
    frames = frames_of_others("torchcodec", [made(name) for name in names], tmp_path)
    assert len(frames) >= 80 and set(frames) >= {spec.name for spec in COLOURFUL}
    assert unlike(frames, made) <= set(NOT_AS_TORCHCODEC)


@pytest.mark.parametrize("spec", [*COLOURFUL, *FINER, ODD_HEIGHT], ids=lambda spec: spec.name)
def test_pixels_are_those_of_pyavs_own_conversion(spec, made):
    with av.open(str(made(spec.name))) as container:
        expected = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode()]
    np.testing.assert_array_equal(decode_video(made(spec.name))[0], expected)


@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("name", ["exif.avi", "exif.mov", "exif.mkv"])
def test_motion_jpeg_with_exif_is_upright(name, orientation, tmp_path):
    exif, pictures = Image.Exif(), []
    exif[ExifTags.Base.Orientation] = orientation
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(5):
            file = io.BytesIO()
            Image.fromarray(draw_number(number)).save(file, "JPEG", exif=exif)
            pictures.append(np.asarray(ImageOps.exif_transpose(Image.open(file))))
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            packet.time_base = Fraction(1, 25)
            container.mux(packet)
    frames, _ = decode_video(tmp_path / name)
    assert frames.shape == (5, *pictures[0].shape)
    assert np.abs(frames.astype(int) - pictures).mean() < 3


def test_limits_are_told_by_name(made):
    path = made("b_frames.mp4")
    for limits in (
        {"max_side": 95},
        {"max_pixels": 96 * 64 - 1},
        {"max_duration": 1.9},
        {"max_frames": 47},
        {"max_output_bytes": 48 * 96 * 64 * 3 - 1},
        {"max_source_bytes": 1000},
        {"max_seconds": 0.0},
    ):
        (name,) = limits
        with pytest.raises(ValueError, match=name if name != "max_pixels" else "."):
            decode_video(path, limits=DecodeLimits(**limits))
    assert len(decode_video(path, limits=DecodeLimits(*[None] * 8))[0]) == 48


class NumbersOfVideos(torch.utils.data.Dataset):
    """The numbers drawn in frames 7, 20 and 41 of each of some videos."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        frames, _ = decode_video(self.paths[item], lambda _: [7, 20, 41])
        return [read_number(frame) for frame in frames]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_data_loader_workers_decode(start_method, made):
    paths = [made(name) for name in ("b_frames.mp4", "h264.mkv", "vp9.mp4", "mpeg4.avi")]
    decode_video(paths[0])  # the parent has decoded before the fork
    loader = DataLoader(
        NumbersOfVideos(paths), batch_size=None, num_workers=2, multiprocessing_context=start_method, timeout=300
    )
    assert list(loader) == [[7, 20, 41]] * 4


def test_metadata_and_limits_can_be_pickled(made):
    _, metadata = decode_video(made("b_frames.mp4"))
    assert pickle.loads(pickle.dumps(metadata)) == metadata
    assert pickle.loads(pickle.dumps(DecodeLimits(max_side=10))) == DecodeLimits(max_side=10)


def test_a_good_file_gives_no_warning_in_lenient_mode(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("b_frames.mp4", "hevc.ts", "vp9.mp4", "gif.gif"):
            decode_video(made(name), strict=False)


def test_drawn_numbers_can_be_read():
    assert [read_number(draw_number(number)) for number in range(64)] == list(range(64))
    assert [read_number(draw_number(number)[::-1]) for number in range(64)] != list(range(64))
