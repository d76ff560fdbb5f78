"""Streams of the shipped clips, as a camera or another program would send them."""

import io
from pathlib import Path

import av


def stream_of(clip: Path, form: str = "mpegts", repeat: int = 1, options: dict[str, str] | None = None) -> bytes:
    """The coded frames of a clip in another container, `repeat` times one after the other."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as output:
        shift, stream = 0, None
        for _ in range(repeat):
            with av.open(str(clip)) as source:
                (template,) = source.streams.video
                stream = stream or output.add_stream_from_template(template)
                for packet in source.demux(template):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        output.mux(packet)
                shift += template.duration
    return file.getvalue()
