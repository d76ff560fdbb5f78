"""`video-panda ask`: a question about clips and pictures."""

import argparse
import sys
import time

from . import options as common


EXAMPLES = """  video-panda ask clip.mp4 "Which way does it move?"
  video-panda ask photo.jpg "What colour is the shape?"
  video-panda ask before.mp4 after.mp4 "What has changed?" --model path/to/checkpoint --num-frames 16
  video-panda ask https://example.com/clip.mp4 "Describe the video." --model user/checkpoint --device cuda
  video-panda ask - "Describe the video." --json < clip.mp4"""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "ask",
        ask,
        EXAMPLES,
        help="ask a question about videos or pictures",
        description="Ask a question about videos or pictures; the answer streams to standard output.",
    )
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="CLIP",
        help="a video or picture file, an http(s) URL of one, or - for standard input",
    )
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    common.add_frame_options(parser)
    parser.add_argument("--start", type=float, metavar="S", help="look at a clip from S seconds on")
    parser.add_argument("--end", type=float, metavar="S", help="look at a clip up to S seconds")
    common.add_model_options(parser)


def ask(options: argparse.Namespace) -> int:
    common.check_max_frames(options)
    common.check_clips(options.clips)
    processor, load_model = common.load_processor(options)
    content = [
        {"type": "video", "video": read_clip(clip), "start": options.start, "end": options.end}
        for clip in options.clips
    ]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": options.question}]}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={name: value for name, value in common.sampling(options).items() if value is not None},
    )
    model = load_model()
    streamer = None if options.json else new_streamer(processor.tokenizer)
    begun = time.monotonic()
    output = model.generate(
        **inputs.to(model.device), max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer
    )
    if options.json:
        output = output[:, inputs["input_ids"].shape[1] :]
        answer = processor.batch_decode(output, skip_special_tokens=True)[0].strip()
        common.print_json(question=options.question, answer=answer, seconds=round(time.monotonic() - begun, 3))
    return 0


def read_clip(name: str) -> str | bytes:
    return sys.stdin.buffer.read() if name == common.STANDARD_INPUT else name


def new_streamer(tokenizer):
    """Prints an answer as it is generated, without the space between prompt and answer."""
    from transformers import TextStreamer

    class AnswerStreamer(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False):
            super().on_finalized_text(text if self.begun else text.lstrip(), stream_end)
            self.begun = self.begun or bool(text.strip())

    return AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
