"""The pictures of README and of this documentation, in docs/pictures.

    python docs/make_pictures.py

`answer.gif` shows a clip that ships with the package beside the answer that the shipped model gives now.
`explain.gif` is what `video-panda explain` makes of another clip. `architecture.svg` shows the model.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main as video_panda
from video_panda_hf.decoding import decode_video


PICTURES = Path(__file__).resolve().parent / "pictures"
CLIP = SHIPPED_CLIPS / "red_circle_left.mp4"
QUESTION = "Describe the video."
EXPLAINED = ["explain", str(SHIPPED_CLIPS / "green_square_right.mp4"), "What shape is it?", "-o"]

# of answer.gif, in pixels
CLIP_WIDTH, WIDTH, MARGIN, LINE, FONT = 168, 520, 16, 26, 18
LAST_FRAME_SHOWN = 16  # times as long as the others
INK, PALE, ANSWER = "#1f2328", "#59636e", "#0a5c36"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "architecture.svg").write_text(architecture(), encoding="utf-8")
    save_gif(PICTURES / "answer.gif", ask(QUESTION))
    video_panda([*EXPLAINED, str(PICTURES / "explain.gif")])


# The model answers


def ask(question: str) -> str:
    model = pipeline("image-text-to-text", model=str(SHIPPED_MODEL))
    content = [{"type": "video", "path": str(CLIP)}, {"type": "text", "text": question}]
    answers = model(text=[{"role": "user", "content": content}], max_new_tokens=20, return_full_text=False)
    return answers[0]["generated_text"]


def save_gif(file: Path, answer: str) -> None:
    """The clip beside the question, then the answer, which is the file's comment as well."""
    frames, metadata = decode_video(CLIP)
    font = ImageFont.load_default(size=FONT)
    pictures = [with_text(frame, font, "") for frame in frames]
    pictures.append(with_text(frames[-1], font, answer))
    shown = [round(1000 / metadata.fps)] * len(frames) + [LAST_FRAME_SHOWN * round(1000 / metadata.fps)]
    palette = pictures[-1].quantize(64)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    options = {"save_all": True, "append_images": pictures[1:], "duration": shown, "loop": 0, "optimize": True}
    pictures[0].save(file, comment=answer, **options)


def with_text(frame, font, answer: str) -> Image.Image:
    clip = Image.fromarray(frame)
    clip = clip.resize((CLIP_WIDTH, CLIP_WIDTH * clip.height // clip.width), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (WIDTH, clip.height), "white")
    picture.paste(clip)
    draw, left = ImageDraw.Draw(picture), CLIP_WIDTH + MARGIN
    lines = [("You", PALE), (QUESTION, INK), ("", INK), ("Video-Panda, 1.7 M parameters", PALE), (answer, ANSWER)]
    top = (clip.height - len(lines) * LINE) / 2
    for number, (line, colour) in enumerate(lines):
        draw.text((left, top + number * LINE), line, colour, font)
    return picture


# The model


def architecture() -> str:
    """Boxes from left to right, with what goes on inside STAB below."""
    boxes = [
        # left, top, width, height, colour, lines of text
        (10, 70, 110, 74, "#f6f8fa", ["video", "8 frames"]),
        (150, 70, 130, 74, "#f6f8fa", ["patches", "14 × 14 pixels"]),
        (310, 50, 340, 114, "#dafbe1", []),
        (680, 70, 110, 74, "#dafbe1", ["projector", "21.0 M"]),
        (820, 70, 150, 74, "#ddf4ff", ["language model", "any causal LM"]),
        (1000, 70, 80, 74, "#f6f8fa", ["text"]),
        # inside STAB
        (322, 86, 86, 66, "#ffffff", ["LSTE, DPE", "neighbours", "in time"]),
        (416, 86, 76, 66, "#ffffff", ["GSTRA", "summary", "of 4 frames"]),
        (500, 86, 66, 66, "#ffffff", ["LSD", "4 patches", "→ 1 token"]),
        (574, 86, 66, 66, "#ffffff", ["FSRA", "summary", "of 1 frame"]),
    ]
    row = [("1", "#b6e3ff"), ("2", "#b6e3ff"), ("3", "#b6e3ff"), ("row", "#e8d5ff")]
    tokens = [("context", "#ffd8b5"), *row, *row]
    parts = []
    for left, top, width, height, colour, lines in boxes:
        parts.append(rectangle(left, top, width, height, colour))
        small = width < 100
        step = 17 if small else 22
        first = top + height / 2 - step * (len(lines) - 1) / 2 + 5
        for number, line in enumerate(lines):
            size = (12 if small else 16) if number == 0 else (11 if small else 13)
            parts.append(text(left + width / 2, first + number * step, line, size, bold=number == 0))
    parts.append(text(480, 74, "STAB, 24.1 M", 16, bold=True))
    for left, right in [(120, 150), (280, 310), (650, 680), (790, 820), (970, 1000)]:
        parts.append(
            f'<path d="M{left + 3} 107H{right - 4}" stroke="#1f2328" stroke-width="2" marker-end="url(#tip)"/>'
        )
    parts.append(
        text(10, 28, "Video-Panda: no vision encoder, 45.1 M parameters before the language model", 17, "start", True)
    )

    parts.append('<path d="M480 164V206" stroke="#59636e" stroke-width="1.5" stroke-dasharray="4 3"/>')
    parts.append(text(150, 234, "one frame, as", 13, "end"))
    parts.append(text(150, 251, "tokens", 13, "end"))
    left = 164
    for name, colour in tokens:
        width = 78 if name == "context" else 52
        parts.append(rectangle(left, 220, width, 36, colour))
        parts.append(text(left + width / 2, 243, name, 13))
        left += width + 6
    parts.append(text(left + 4, 243, "…", 16, "start"))
    notes = (
        "context: fusion of GSTRA and FSRA.  1, 2, 3: windows of LSD, row by row.  row: a learned token ends each row."
    )
    parts.append(text(164, 282, notes, 13, "start"))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1090 300" role="img" font-family="sans-serif">
<title>Video-Panda: a video's patches go through STAB and a projector into a language model</title>
<defs><marker id="tip" markerWidth="6" markerHeight="6" refX="4" refY="3" orient="auto">
<path d="M0 0L6 3L0 6z"/></marker></defs>
<rect width="1090" height="300" fill="#ffffff"/>
{chr(10).join(parts)}
</svg>
"""


def rectangle(left: float, top: float, width: float, height: float, colour: str) -> str:
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="6" fill="{colour}" stroke="#59636e"/>'


def text(x: float, y: float, line: str, size: int, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place}{weight} fill="{INK}">{escape(line)}</text>'


if __name__ == "__main__":
    main()
