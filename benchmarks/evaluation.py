"""Questions a minute that `predict` answers, with a session for each video, against one `generate` for each question.

    python benchmarks/evaluation.py [--questions 20] [--tokens 20] [--json FILE]

In one process: the shipped model, the three clips that ship, and 20 questions about each. Both ways read the files,
take 8 frames and answer greedily; loading the model counts for neither. All answers must be the same.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tables import finish
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.evaluation import load_task, predict


ASKED = ("What colour is the {}?", "Which shape is the {}?", "Describe the {}.", "Which way does the {} move?")
NAMES = ("shape", "thing", "object", "figure", "form")
RUNS = 5  # the fastest counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, metavar="N", help="about each video, at most 20")
    parser.add_argument("--tokens", type=int, default=20, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    finish("evaluation", measure(arguments.questions, arguments.tokens), arguments.json)


def measure(count: int, tokens: int) -> dict:
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
    asked = [question.format(name) for name in NAMES for question in ASKED][:count]
    clips = sorted(SHIPPED_CLIPS.glob("*.mp4"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.jsonl")
        rows = [{"video": clip.name, "question": question, "answer": "?"} for clip in clips for question in asked]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = load_task(file, SHIPPED_CLIPS)

        def predicted(batch_size: int, run: list[int]) -> list[str]:
            run[0] += 1
            output = Path(folder, f"run-{run[0]}")
            predict(task, model, processor, output, max_new_tokens=tokens, batch_size=batch_size, progress=False)
            lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["answer"] for line in lines]

        def generated() -> list[str]:
            paths = [(task.videos.find(question.video), question.question) for question in task.questions]
            return [answer(model, processor, path, question, tokens) for path, question in paths]

        answer(model, processor, str(clips[0]), asked[0], tokens)  # warm-up
        runs = [0]
        alone_seconds, alone = fastest(generated)
        one_seconds, one = fastest(lambda: predicted(1, runs))
        batch_seconds, batch = fastest(lambda: predicted(32, runs))
    assert alone == one == batch
    return {
        "setting": f"cpu, float32, {torch.get_num_threads()} threads",
        "videos": len(clips),
        "questions": len(asked),
        "generate_seconds": alone_seconds,
        "one_by_one_seconds": one_seconds,
        "predict_seconds": batch_seconds,
    }


def answer(model, processor, video: str, question: str, tokens: int) -> str:
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def fastest(function):
    """Seconds of the fastest of some runs, and the result of the last."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


if __name__ == "__main__":
    main()
