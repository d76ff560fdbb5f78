"""Readers of an opened video: by seeking, from start to end, or with Pillow (WebP)."""

import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from typing import BinaryIO

import av
import numpy as np
import PIL.Image
from av.container import InputContainer
from av.video.stream import VideoStream

from .errors import (
    LENIENT,
    Budget,
    CorruptVideoError,
    NotAVideoError,
    VideoDecodeWarning,
    check_picture_size,
    errors_of,
)
from .groups import WORTH_A_SEEK, GroupDecoder, PacketDecoder, Run, decoding_threads, prepare_decoder
from .index import DEFAULT_RATE, cut_off, index_frames, longest_step
from .pixels import PictureConverter
from .sources import Look, demux, open_video, reopened


WORTH_A_DECODER = 64  # frames to decode per further decoder: with fewer, opening it costs more than it saves
_HELD_BACK = 32  # frames, the most that decoders hold back: references and one for each thread
KEPT_BYTES = 128 * 2**20  # of decoded frames in memory, for `LinearReader` or for parallel decoders


@contextmanager
def open_reader(readable: str | BinaryIO, look: Look, budget: Budget, all_times: bool) -> Iterator["FrameReader"]:
    """Opens what `open_source` yields with a suitable reader.

    With `all_times`, the reader knows the time of each frame. It may take longer to open.
    """
    budget.damage = look.damage
    with ExitStack() as closing:
        with errors_of(budget.video):
            if look.is_webp:
                reader = WebpReader(closing.enter_context(open_webp(readable, budget.video)), budget)
            else:
                container, stream = closing.enter_context(open_video(readable, budget))
                prepare_decoder(container, stream, budget, budget.strict, decoding_threads())
                index = index_frames(container, stream, budget, all_times)
                reader = None
                if index is not None:
                    with suppress(_SeekFailed):
                        decoder = GroupDecoder(container, stream, budget, budget.strict, index)
                        reader = SeekingReader(readable, decoder)
                if reader is None:
                    closing.close()
                    reader = LinearReader(readable, budget)
        closing.callback(reader.close)
        yield reader


class _SeekFailed(CorruptVideoError):
    """Seeking does not lead to the first frame."""


class FrameReader:
    """Reads the frames of one video.

    Attributes:
        count: N, the number of frames.
        duration: seconds from the first frame's start to the last frame's end; `None` for pictures in a folder.
        times: (N,) float64, presentation times in seconds from the first frame; `None` if unknown.
        size: (height, width) of the frames as returned.
        is_picture: whether it is one picture, read by Pillow.
    """

    count: int
    duration: float | None
    times: np.ndarray | None
    size: tuple[int, int]
    is_picture = False

    def __init__(self, budget: Budget):
        self.budget, self.strict, self.video = budget, budget.strict, budget.video
        self.damage: str | None = None

    def _set_size(self, height: int, width: int) -> None:
        check_picture_size(self.video, height, width, self.budget.limits)
        self.size = height, width

    def _check_end(self, container: InputContainer, stream: VideoStream, end: float) -> None:
        """Checks whether the file is truncated. `end` is the end of its last frame, in seconds on the file's clock."""
        if missing := self.budget.damage or cut_off(container, stream, end):
            self.damage = missing
            if self.strict:
                raise CorruptVideoError(
                    f"{self.video}: is cut off: {missing}. {self.count} frames can be had: "
                    f"fetch the file again, or pass {LENIENT} to take those."
                )

    def close(self) -> None:
        """Frees what `open_reader` does not."""

    def read(self, numbers: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """The frames of these numbers, in this order, as (T, height, width, 3) uint8 RGB, in `out` if it is given."""
        frames = np.empty((len(numbers), *self.size, 3), dtype=np.uint8) if out is None else out
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(int(number), []).append(place)
        read: dict[int, int] = {}
        for number, frame in self._decode(sorted(places)):
            first, *others = places[number]
            frames[first] = frame
            frames[others] = frames[first]
            read[number] = first
        missing = sorted(places.keys() - read.keys())
        if missing:
            self._stand_in(frames, places, read, missing)
        elif (damage := self.damage or self.budget.damage) and not self.strict:
            warnings.warn(f"{self.video}: {damage}; frames may show it.", VideoDecodeWarning, stacklevel=3)
        return frames

    def _stand_in(self, frames: np.ndarray, places: dict, read: dict, missing: list[int]) -> None:
        """Replaces each missing frame by the nearest one that was read."""
        found = (
            f"{self.video}: {len(missing)} of the {len(places)} frames asked for cannot be decoded, "
            f"first frame {missing[0]} of {self.count}"
        )
        if self.strict or not read:
            raise CorruptVideoError(f"{found}. The file is damaged: repair it, or pass {LENIENT} to take the rest.")
        warnings.warn(f"{found}; the nearest frames stand in for them.", VideoDecodeWarning, stacklevel=4)
        for number in missing:
            nearest = min(read, key=lambda other: abs(other - number))
            frames[places[number]] = frames[read[nearest]]

    def _decode(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, RGB picture) for these ascending numbers in any order, as far as they can be decoded."""
        raise NotImplementedError


class SeekingReader(FrameReader):
    """Decodes only from the key frame before each wanted frame up to it, several such runs in parallel."""

    def __init__(self, readable: str | BinaryIO, decoder: GroupDecoder):
        super().__init__(decoder.budget)
        self.readable, self.decoder, self.index = readable, decoder, decoder.index
        self.stream = decoder.stream
        self.count = len(self.index)
        seconds = float(self.stream.time_base)
        self.duration = self.index.duration * seconds
        self.times = None if self.index.times is None else self.index.times * seconds
        if self.times is not None:
            end = float(self.index.pts.min() * self.stream.time_base) + self.duration
            self._check_end(decoder.container, self.stream, end)
        number, frame = self._find_first_frame()
        self.convert = PictureConverter.of(frame, self.stream.sample_aspect_ratio, decoder.budget.pixels)
        self._set_size(*self.convert.size)
        self.first_picture = number, self.convert(frame)
        self.decoder.new_codecs = True  # the display matrix is known now

    def _find_first_frame(self) -> tuple[int, av.VideoFrame]:
        """(number, frame) of the first frame. If not `strict`, of the first that can be decoded."""
        for numbers in [0], range(0 if self.strict else self.count):
            for number, frame in self.decoder.decode(numbers):
                return number, frame
        raise _SeekFailed(
            f"{self.video}: frame 0 of {self.count} cannot be decoded. The file is damaged: replace or repair it."
        )

    def _decode(self, numbers):
        if self.first_picture[0] in numbers:
            yield self.first_picture
        missing = {number for number in numbers if number != self.first_picture[0]}
        if (count := self._decoders_worth_having(missing)) > 1:
            for number, picture in self._decode_in_parallel(sorted(missing), count):
                missing.remove(number)
                yield number, picture
        for number, frame in self.decoder.decode(sorted(missing)):  # all frames, or those of damaged runs
            missing.remove(number)
            yield number, self.convert(frame)
        if missing and not self.decoder.damage:  # a seek fails, the packets may be sound
            linear = LinearReader(self.readable, self.budget)
            if linear.count == self.count:
                yield from linear._decode(sorted(missing))
            linear.close()
        self.damage = self.damage or self.decoder.damage

    def _decoders_worth_having(self, numbers: set[int]) -> int:
        """Number of parallel decoders that pay off for these frames. Each decodes its own runs in its own thread."""
        if reopened(self.readable) is None:
            return 1
        stretches, frames, previous = 0, 0, -WORTH_A_SEEK - 1
        for number in sorted(numbers):
            first = int(self.index.first_numbers[self.index.group(number)])
            if first > previous + WORTH_A_SEEK:
                stretches += 1
                previous = first - 1
            frames += number - previous
            previous = number
        height, width = self.size
        bytes_of_stretch = len(numbers) * height * width * 3 // max(1, stretches)  # held until the run is decoded
        return min(decoding_threads(), stretches, frames // WORTH_A_DECODER, KEPT_BYTES // max(1, bytes_of_stretch))

    def _decode_in_parallel(self, numbers: list[int], count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, picture) of all runs without damage.

        The caller decodes damaged runs with `self.decoder`, so that the result does not depend on thread order.
        """
        idle: SimpleQueue[GroupDecoder | None] = SimpleQueue()

        def pictures(run: Run) -> list[tuple[int, np.ndarray]]:
            decoder = idle.get()
            try:
                decoder = decoder or self._another_decoder(closing, decoding_threads() // count)
                convert = self.convert.another()
                return [(number, convert(frame)) for number, frame in decoder.decode_run(run)]
            except CorruptVideoError:
                return []
            finally:
                idle.put(decoder)

        for _ in range(count):
            idle.put(None)  # the first thread that takes it opens a decoder
        with ExitStack() as closing, ThreadPoolExecutor(count, thread_name_prefix="decode_video") as pool:
            try:
                futures = _submit_all(pool, pictures, self.decoder.runs(numbers))
                for done in as_completed(futures):
                    futures.remove(done)  # frees its pictures
                    yield from done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _another_decoder(self, closing: ExitStack, threads: int) -> GroupDecoder:
        readable = reopened(self.readable)
        assert readable is not None  # see `_decoders_worth_having`
        container, stream = closing.enter_context(open_video(readable, self.budget))
        prepare_decoder(container, stream, self.budget, True, threads)
        decoder = GroupDecoder(container, stream, self.budget, True, self.index)
        decoder.new_codecs = True
        return decoder


class LinearReader(FrameReader):
    """Decodes from start to end, once to count the frames, and again to read them if they are too many to keep.

    It opens the video again for each pass, because the search for an index may have moved the position. The pass that
    reads them goes on with the next call of `read`, as long as the frames come later in the video.
    """

    def __init__(self, readable: str | BinaryIO, budget: Budget):
        super().__init__(budget)
        self.readable = readable
        self.kept: list[av.VideoFrame] | None = []
        self.frames: Generator[tuple[int, av.VideoFrame], None, None] | None = None  # of the pass that reads
        self.next_number = 0  # of them
        with self._opened() as (container, stream):
            self._count_frames(container, stream)

    def _count_frames(self, container: InputContainer, stream: VideoStream) -> None:
        pts: list[int | None] = []
        dts: list[int | None] = []
        for frame in self._decode_all(container, stream):
            if not pts:
                self.convert = PictureConverter.of(frame, stream.sample_aspect_ratio, self.budget.pixels)
                self._set_size(*self.convert.size)
            pts.append(frame.pts)
            dts.append(frame.dts)
            self._keep(frame)
        if not pts:
            raise NotAVideoError(f"{self.video}: has a video stream ({stream.name}) but not one frame in it.")
        self.count = len(pts)
        rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
        longest = longest_step(container, stream)
        if (stamps := _rising(pts, longest) or _rising(dts, longest)) is None:
            self.times = np.arange(self.count) / rate
        elif self.count > 1 and stamps[-1] - stamps[0] == self.count - 1 and rate * stream.time_base < 0.5:
            # Of a raw stream: numbers of frames, not times.
            rate = float(stream.guessed_rate or rate)
            self.times = np.arange(self.count) / rate
        else:
            later = np.arange(1, self.count - len(stamps) + 1) / rate  # without a time of their own
            times = (np.array(stamps) - stamps[0]) * float(stream.time_base)
            self.times = np.append(times, times[-1] + later)
        self.duration = float(self.times[-1] + 1 / rate)
        start = (stream.start_time or 0) * float(stream.time_base)
        self._check_end(container, stream, start + self.duration)

    def _keep(self, frame: av.VideoFrame) -> None:
        if self.kept is not None:
            self.kept.append(frame)
            if len(self.kept) * sum(plane.buffer_size for plane in frame.planes) > KEPT_BYTES:
                self.kept = None

    def _decode(self, numbers):
        if self.kept is not None:
            yield from ((number, self.convert(self.kept[number])) for number in numbers)
            return
        if not numbers:
            return
        if self.frames is None or numbers[0] < self.next_number:
            self.close()
            self.frames = self._numbered_frames()
        wanted = set(numbers)
        for number, frame in self.frames:
            self.next_number = number + 1
            if number in wanted:
                yield number, self.convert(frame)
            if number >= numbers[-1]:
                break

    def _numbered_frames(self) -> Generator[tuple[int, av.VideoFrame], None, None]:
        with self._opened() as (container, stream):
            yield from enumerate(self._decode_all(container, stream))

    def close(self) -> None:
        """Ends the pass that reads."""
        if self.frames is not None:
            self.frames.close()
            self.frames = None

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with open_video(self.readable, self.budget) as (container, stream):
            prepare_decoder(container, stream, self.budget, self.strict, decoding_threads())
            yield container, stream

    def _decode_all(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        decoder = PacketDecoder(stream, self.budget, self.strict)
        for packet in itertools.chain(demux(container, stream, self.budget), [None]):
            yield from decoder.feed(packet)
        self.damage = self.damage or decoder.damage


def _rising(stamps: list[int | None], longest: float) -> list[int] | None:
    """The times, if they rise, by at most `longest` each.

    A decoder does not tell the times of the last frames, those that it held back.
    """
    held_back = stamps.index(None) if None in stamps else len(stamps)
    known = [stamp for stamp in stamps[:held_back] if stamp is not None]
    is_rising = all(0 < b - a <= longest for a, b in itertools.pairwise(known))
    return known if is_rising and len(known) > max(0, len(stamps) - _HELD_BACK) else None


class WebpReader(FrameReader):
    """Reads still and animated WebP with Pillow. FFmpeg reads only still ones."""

    def __init__(self, image: PIL.Image.Image, budget: Budget):
        super().__init__(budget)
        self.image = image
        self._set_size(image.height, image.width)
        self.count = getattr(image, "n_frames", 1)
        durations = np.array([self._picture(number).info.get("duration", 0) / 1000 for number in range(self.count)])
        self.duration = float(durations.sum()) or self.count / DEFAULT_RATE
        self.times = np.cumsum(durations) - durations

    def _decode(self, numbers):
        return ((number, np.asarray(self._picture(number).convert("RGB"))) for number in numbers)

    def _picture(self, number: int) -> PIL.Image.Image:
        self.budget.spend()
        try:
            self.image.seek(number)
            self.image.load()
        except (OSError, EOFError, ValueError) as error:
            raise CorruptVideoError(
                f"{self.video}: frame {number} of {self.count} cannot be decoded ({error}). Replace the file."
            ) from error
        return self.image


def _submit_all(pool: ThreadPoolExecutor, work: Callable, items: Iterable) -> set[Future]:
    """Submits `work` for the items, up to the first for which no thread can start. The caller must do the rest."""
    futures = set()
    for item in items:
        try:
            futures.add(pool.submit(work, item))
        except RuntimeError:
            break
    return futures


@contextmanager
def open_webp(readable: str | BinaryIO, video: str) -> Iterator[PIL.Image.Image]:
    """Opens what `open_source` yields with Pillow."""
    try:
        image = PIL.Image.open(readable.removeprefix("file:") if isinstance(readable, str) else readable)
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, EOFError, ValueError) as error:
        raise NotAVideoError(f"{video}: begins like WebP but cannot be opened ({error}). Replace the file.") from error
    with image:
        yield image
