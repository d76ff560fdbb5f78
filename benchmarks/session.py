"""Many questions about one video, and a video that grows: a session compared with whole prompts.

    python benchmarks/session.py [--questions 20] [--clips 500] [--tokens 8] [--json FILE]

In one process, with random weights: STAB at the released size, a Llama of 4 layers, 1,024 wide, and a video of 8
frames of 448 × 448 pixels (2,184 tokens).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tables import finish
from video_panda_hf import VideoPandaConfig, VideoPandaForConditionalGeneration, VideoPandaProcessor, VideoPandaSession


SIDE = 448
SMALL_SIDE = 56  # for the many clips, so that the language model's share is what is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, metavar="N")
    parser.add_argument("--clips", type=int, default=500, metavar="N")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens of an answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    result = {"setting": f"cpu, float32, {threads} threads", "questions": arguments.questions}
    result |= questions(arguments.questions, arguments.tokens)
    result |= {"clips": arguments.clips, "growth": growth(arguments.clips)}
    finish("session", result, arguments.json)


def new_model(side: int, context: int):
    """A model with random weights, and its processor, whose tokenizer takes words for tokens."""
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(1000))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    processor = VideoPandaProcessor.from_text_pretrained(tokenizer, image_size=side)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=context,
        eos_token_id=None,
        pad_token_id=0,
    )
    video_token_id, row_token_id = processor.video_token_ids
    config = VideoPandaConfig(
        vision_config={"image_size": side},
        text_config=text,
        video_token_id=video_token_id,
        row_token_id=row_token_id,
    )
    return VideoPandaForConditionalGeneration(config).eval(), processor


def questions(count: int, tokens: int) -> dict:
    """Seconds of `count` answers, and of the first token of one."""
    model, processor = new_model(SIDE, 4096)
    frames = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    asked = [f"w{number} w{number + 1} w{number + 2}" for number in range(count)]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def whole(question, **settings):
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            do_sample_frames=False,
        )
        output = model.generate(**inputs, **{**options, **settings})
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    def watched():
        session = VideoPandaSession(model, processor, fps=1.0)
        session.add(frames, rate=1.0)
        return session

    def one_by_one(session):
        return [session.ask(question, **options) for question in asked]

    whole("w0", max_new_tokens=1, min_new_tokens=1)  # warm-up
    alone_seconds, alone = timed(lambda: [whole(question) for question in asked])
    session_seconds, answers = timed(lambda: one_by_one(watched()))
    together_seconds, together = timed(lambda: watched().ask(asked, **options))
    assert answers == alone == together
    session = watched()
    first = {"max_new_tokens": 1, "min_new_tokens": 1}
    first_alone = min(timed(lambda: whole("w5", **first))[0] for _ in range(3))
    first_session = min(timed(lambda: session.ask("w5", **first))[0] for _ in range(3))
    return {
        "tokens": session.num_tokens,
        "generate_seconds": alone_seconds,
        "session_seconds": session_seconds,
        "together_seconds": together_seconds,
        "first_token_generate_seconds": first_alone,
        "first_token_session_seconds": first_session,
    }


def growth(clips: int) -> list[dict]:
    """Milliseconds for a clip and megabytes, early and late in a long video, without and with `max_clips`; and their
    slopes after the first tenth, where `max_clips` is reached."""
    model, processor = new_model(SMALL_SIDE, 1 << 20)
    frames = np.random.default_rng(0).integers(0, 256, (4, SMALL_SIDE, SMALL_SIDE, 3), dtype=np.uint8)
    rows = []
    for max_clips in (None, 32):
        session = VideoPandaSession(model, processor, fps=1.0, max_clips=max_clips)
        seconds, megabytes = [], []
        for _ in range(clips):
            seconds.append(timed(lambda session=session: session.add(frames, rate=1.0))[0])
            megabytes.append(session.memory_bytes / 1e6)
        tenth = clips // 10
        blocks = np.arange(tenth, clips - 9, 10)  # medians of 10 clips, because other work disturbs single ones
        medians = [float(np.median(seconds[start : start + 10])) for start in blocks]
        rows.append(
            {
                "max_clips": max_clips,
                "early_ms": 1e3 * float(np.median(seconds[tenth : 2 * tenth])),
                "late_ms": 1e3 * float(np.median(seconds[-tenth:])),
                "early_megabytes": megabytes[2 * tenth],
                "late_megabytes": megabytes[-1],
                "ms_per_100_clips": 1e5 * float(np.polyfit(blocks, medians, 1)[0]),
                "megabytes_per_clip": (megabytes[-1] - megabytes[tenth]) / (clips - 1 - tenth),
                "tokens": session.num_tokens,
            }
        )
    return rows


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
