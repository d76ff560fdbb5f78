"""Predictions: the answers of plain `generate`, a line for each question, once each, whatever happens."""

import os
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import video_panda_hf.evaluation.predict  # noqa: F401  # the module, whose name is also its function's
from helpers.evaluation import ASKED, CLIPS, clips_task, lines_of, without_times, write_lines
from helpers.processes import free_port
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL, VideoPandaSession
from video_panda_hf.decoding import decode_video
from video_panda_hf.evaluation import Question, chosen_option, fingerprint, load_task, predict


module = sys.modules["video_panda_hf.evaluation.predict"]
COLOURS = ["It is red.", "It is blue.", "It is green."]


@cache
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL), AutoProcessor.from_pretrained(SHIPPED_MODEL)


def generated(video, question: str, part: dict | None = None, system: str | None = None, **sampling) -> str:
    """The answer of plain `generate` to one question."""
    model, processor = shipped()
    content = [{"type": "video", "video": str(video), **(part or {})}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=sampling,
    )
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)[0].strip()


def run(task, folder, **options):
    return predict(task, *shipped(), folder, **{"max_new_tokens": 30, "progress": False, **options})


def answers(folder) -> dict[str, str]:
    return {line["id"]: line.get("answer", line.get("error")) for line in lines_of(folder / "predictions.jsonl")}


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 1}, {"num_frames": 4}, {"fps": 2.0, "max_frames": 12}, {"system": "Be brief."}],
    ids=str,
)
def test_each_answer_is_that_of_generate_for_the_question_alone(options, tmp_path):
    task = clips_task(tmp_path)
    assert run(task, tmp_path / "run", **options) == {"answered": 12}
    options.pop("batch_size", None)
    for question in task.questions:
        expected = generated(SHIPPED_CLIPS / f"{question.video}.mp4", question.question, **options)
        assert answers(tmp_path / "run")[question.id] == expected, question
    if not options:
        lines = lines_of(tmp_path / "run" / "predictions.jsonl")
        assert [line["answer"] for line in lines if line["question"] == ASKED[0]] == COLOURS
        assert lines[0]["frames"] == [0, 3, 6, 9, 12, 15, 18, 21]


def test_parts_folders_pictures_and_one_frame_gifs_too(tmp_path):
    frames, _ = decode_video(SHIPPED_CLIPS / "red_circle_left.mp4")
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "single.gif")
    (tmp_path / "frames").mkdir()
    for number, picture in enumerate(pictures[:12]):
        picture.save(tmp_path / "frames" / f"{number:03}.png")
    (tmp_path / "clip.mp4").write_bytes((SHIPPED_CLIPS / "red_circle_left.mp4").read_bytes())
    rows = [("clip", {"start": 0.5, "end": 2.0}), ("clip", {"start": 1.0}), ("single", {}), ("frames", {})]
    rows = [{"video": name, "question": q, "answer": "red", **part} for name, part in rows for q in ASKED[:3]]
    task = load_task(write_lines(tmp_path / "own.jsonl", rows))
    assert run(task, tmp_path / "run") == {"answered": 12}
    for question in task.questions:
        part = {key: value for key, value in (("start", question.start), ("end", question.end)) if value is not None}
        expected = generated(task.videos.find(question.video), question.question, part)
        assert answers(tmp_path / "run")[question.id] == expected, question


def test_a_part_of_a_folder_is_counted_at_three_frames_a_second(tmp_path):
    (tmp_path / "show").mkdir()
    for number in range(30):
        Image.fromarray(np.full((8, 8, 3), 8 * number, np.uint8)).save(tmp_path / "show" / f"{number:03}.png")
    question = Question("0", "show", "What?", "x", start=2.0, end=5.0)
    task = load_task(write_lines(tmp_path / "own.jsonl", [{"video": "show", "question": "?", "answer": "x"}]))
    sampling = {"num_frames": 8, "fps": None, "max_frames": None}
    frames, numbers = module.frames_of(shipped()[1], task.videos, question, sampling)
    assert numbers[0] == 6 and numbers[-1] == 13 and len(numbers) == 8
    assert frames[:, 0, 0, 0].tolist() == [8 * number for number in numbers]


def test_a_video_is_decoded_and_encoded_once_for_all_its_questions(tmp_path, monkeypatch):
    decoded, encoded, model = [], [], shipped()[0]
    frames_of, features = module.frames_of, model.get_video_features
    monkeypatch.setattr(module, "frames_of", lambda *a: decoded.append(a[2].video) or frames_of(*a))
    monkeypatch.setattr(model, "get_video_features", lambda *a, **k: encoded.append(1) or features(*a, **k))
    run(clips_task(tmp_path), tmp_path / "run", batch_size=2)
    assert decoded == list(CLIPS) and len(encoded) == 3


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path, monkeypatch):
    ask, sizes = VideoPandaSession.ask, []

    def asked(self, questions, **options):
        sizes.append(len(questions))
        if len(questions) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return ask(self, questions, **options)

    monkeypatch.setattr(VideoPandaSession, "ask", asked)
    limit, task = 1, clips_task(tmp_path)
    assert run(task, tmp_path / "run") == {"answered": 12} and sizes[:7] == [4, 2, 1, 1, 2, 1, 1]
    assert [line["answer"] for line in lines_of(tmp_path / "run" / "predictions.jsonl")][::4] == COLOURS
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        run(task, tmp_path / "other")


def test_missing_and_broken_videos_are_lines_and_the_run_goes_on(tmp_path):
    for name in CLIPS:
        (tmp_path / f"{name}.mp4").write_bytes((SHIPPED_CLIPS / f"{name}.mp4").read_bytes())
    (tmp_path / "torn.mp4").write_bytes((SHIPPED_CLIPS / "red_circle_left.mp4").read_bytes()[:1500])
    (tmp_path / "empty.mp4").write_bytes(b"")
    rows = [{"video": v, "question": q, "answer": "x"} for v in ("gone", "torn", *CLIPS, "empty") for q in ASKED[:2]]
    rows.append({"video": "red_circle_left", "question": ASKED[0], "answer": "x", "start": 90, "end": 99})
    task = load_task(write_lines(tmp_path / "own.jsonl", rows))
    assert run(task, tmp_path / "run") == {"missing": 2, "broken": 5, "answered": 6}
    lines = {line["id"]: line for line in lines_of(tmp_path / "run" / "predictions.jsonl")}
    assert len(lines) == 13 and lines["0"]["error"] == "missing" and "no video gone" in lines["1"]["message"]
    assert lines["2"]["error"] == "broken" and "torn.mp4" in lines["2"]["message"]
    assert "shows no frame in [90" in lines["12"]["message"] and lines["4"]["answer"] == COLOURS[0]

    (tmp_path / "gone.mp4").write_bytes((SHIPPED_CLIPS / "green_square_right.mp4").read_bytes())
    assert run(task, tmp_path / "run") == {"missing": 2, "broken": 5, "answered": 6}
    task = load_task(tmp_path / "own.jsonl")
    assert run(task, tmp_path / "run", retry=True) == {"broken": 5, "answered": 8}
    assert module.read_predictions(tmp_path / "run")["0"]["answer"] == COLOURS[2]


def test_both_questions_of_consistency_are_answered_each_by_its_own(tmp_path):
    question = {"question": ASKED[0], "second": ASKED[1], "type": "consistency", "answer": "x"}
    questions = [Question(str(n), video, **question) for n, video in enumerate(CLIPS)]
    task = replace(clips_task(tmp_path), name="video-chatgpt", metric="scores", questions=questions)
    run(task, tmp_path / "run")
    lines = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert [line["answer"] for line in lines] == COLOURS
    assert [line["second_answer"] for line in lines] == ["It is a circle.", "It is a cross.", "It is a square."]


def test_a_progress_bar_counts_the_videos_and_can_be_left_out(tmp_path, capsys):
    run(clips_task(tmp_path, ASKED[:1]), tmp_path / "a", progress=True)
    assert "videos: 100%" in (printed := capsys.readouterr().err) and "3/3" in printed
    for number, progress in enumerate((False, None)):  # None: on a terminal only
        run(clips_task(tmp_path, ASKED[:1]), tmp_path / f"b{number}", progress=progress)
    assert "videos" not in capsys.readouterr().err


def test_lines_have_model_revision_frames_and_time(tmp_path):
    task = clips_task(tmp_path, ASKED[:1])
    run(task, tmp_path / "run", name="mine", revision="abc")
    line = lines_of(tmp_path / "run" / "predictions.jsonl")[0]
    assert (line["task"], line["id"], line["model"], line["revision"]) == ("clips", "0", "mine", "abc")
    assert line["seconds"] > 0 and line["date"].endswith("+00:00") and len(line["frames"]) == 8


def test_a_run_goes_on_where_it_was_and_writes_no_line_twice(tmp_path):
    task, file = clips_task(tmp_path, extra=("gone",)), tmp_path / "run" / "predictions.jsonl"
    run(task, tmp_path / "whole", batch_size=3)
    run(task, tmp_path / "run", batch_size=3)
    whole, last = file.read_bytes(), file.read_bytes().splitlines(keepends=True)[5]
    start = whole.index(last)
    for cut in (0, start, start + 1, start + len(last) // 2, start + len(last) - 1, len(whole) - 1):
        file.write_bytes(whole[:cut])
        run(task, tmp_path / "run", batch_size=3)
        assert without_times(lines_of(file)) == without_times(lines_of(tmp_path / "whole" / "predictions.jsonl"))


def test_two_processes_give_the_file_of_one(tmp_path):
    task = clips_task(tmp_path, extra=("gone",))
    run(task, tmp_path / "one")
    assert run(task, tmp_path / "two", process=(1, 2)) == {"answered": 4, "missing": 4}
    assert (tmp_path / "two" / "predictions-1-of-2.jsonl").exists()
    assert run(task, tmp_path / "two", process=(0, 2)) == {"answered": 12, "missing": 4}
    names = {file.name for file in (tmp_path / "two").iterdir()}
    assert names == {"run.jsonl", "questions.jsonl", "predictions.jsonl"}
    one, two = (without_times(lines_of(tmp_path / name / "predictions.jsonl")) for name in ("one", "two"))
    assert one == two


def test_a_run_may_go_on_with_another_number_of_processes(tmp_path):
    task = clips_task(tmp_path)
    run(task, tmp_path / "run", process=(2, 3))
    assert run(task, tmp_path / "run", process=(0, 1)) == {"answered": 12}
    ids = [line["id"] for line in lines_of(tmp_path / "run" / "predictions.jsonl")]
    assert ids == [question.id for question in task.questions]


@pytest.mark.slow
def test_accelerate_launch_splits_the_videos(forks, tmp_path):
    task = clips_task(tmp_path)
    run(task, tmp_path / "one")
    (tmp_path / "command.py").write_text("from video_panda_cli import main\n\nassert main() == 0\n")
    # `--cpu` would start one process; without a GPU, `--multi_gpu` starts them on the CPU.
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command += [f"--log_dir={tmp_path / 'logs'}", "--tee=3", tmp_path / "command.py", "eval", "predict"]
    command += ["--task", tmp_path / "clips.jsonl", "--videos", SHIPPED_CLIPS, "--output", tmp_path / "two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # without imports
    done = forks.run([*command, "--max-new-tokens", "30"], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "logs").rglob("stderr.log"))) == 2
    one, two = (lines_of(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [line["answer"] for line in one] == [line["answer"] for line in two]
    assert [line["id"] for line in one] == [line["id"] for line in two]
    assert not list((tmp_path / "two").glob("predictions-*"))


def test_a_folder_takes_one_run_only(tmp_path):
    task = clips_task(tmp_path, ASKED[:1])
    run(task, tmp_path / "run", name="a")
    for options, message in (
        ({"name": "b"}, "run with other settings \\(model: 'a', now 'b'\\)"),
        ({"name": "a", "num_frames": 4}, "num_frames: None, now 4"),
        ({"name": "a", "limit": 2}, "limit: None, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(task, tmp_path / "run", **options)
    other = clips_task(tmp_path, ASKED[1:2])
    with pytest.raises(ValueError, match="other questions"):
        run(other, tmp_path / "run", name="a")
    with module.LineWriter(tmp_path / "run" / "predictions.jsonl"):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            run(task, tmp_path / "run", name="a")


def test_wrong_settings_are_refused_before_the_first_video(tmp_path):
    task = clips_task(tmp_path, ASKED[:1])
    for options, message in (
        ({"num_frames": 3}, "a video has 1 frame or a multiple of 4"),
        ({"num_frames": 4, "fps": 1.0}, "mutually exclusive"),
        ({"max_frames": 4}, "`max_frames` limits `fps`"),
        ({"choice": "guess"}, "`choice` is one of likelihood, text, generate"),
        ({"batch_size": 0}, "`batch_size` is at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(task, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_sample_is_asked_and_said_to_be_one(tmp_path):
    task = clips_task(tmp_path)
    assert run(task, tmp_path / "run", limit=5, seed=3) == {"answered": 5}
    assert [line["id"] for line in lines_of(tmp_path / "run" / "questions.jsonl")] == [q.id for q in task.sample(5, 3)]


def test_a_model_in_training_is_so_again_afterwards(tmp_path):
    model, processor = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL), shipped()[1]
    model.train()
    predict(clips_task(tmp_path, ASKED[:1]), model, processor, tmp_path / "run", max_new_tokens=8, progress=False)
    assert model.training and answers(tmp_path / "run")["0"] == COLOURS[0]


def test_the_fingerprint_of_a_checkpoint_changes_with_its_weights(tmp_path):
    for file in SHIPPED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(SHIPPED_MODEL)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(tmp_path) != fingerprint(SHIPPED_MODEL)


# Multiple choice


def options_task(folder, options=COLOURS):
    rows = [
        {"video": video, "question": ASKED[0], "answer": f"It is {colour}.", "options": options}
        for video, colour in CLIPS.items()
    ]
    return load_task(write_lines(folder / "options.jsonl", rows), SHIPPED_CLIPS)


def log_likelihoods(video: str, question: str, answers: list[str]) -> list[list[float]]:
    """Of each token of each answer, from a forward pass of the whole prompt with it."""
    model, processor = shipped()
    found = []
    for answer in answers:
        content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        before = processor.apply_chat_template(
            messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        start, ids = len(before["input_ids"][0]), inputs["input_ids"][0]
        with torch.no_grad():
            logits = model(**inputs).logits[0].log_softmax(-1)
        found.append([float(logits[place - 1, ids[place]]) for place in range(start, len(ids) - 1)])  # without </s>
    return found


@pytest.mark.parametrize("choice", ["likelihood", "text"])
def test_likelihoods_are_those_of_whole_prompts(choice, tmp_path):
    task = options_task(tmp_path)
    run(task, tmp_path / "run", choice=choice)
    for line, question in zip(lines_of(tmp_path / "run" / "predictions.jsonl"), task.questions, strict=True):
        (prompt,) = question.prompts(with_options=choice == "likelihood")
        named = ["A", "B", "C"] if choice == "likelihood" else COLOURS
        tokens = log_likelihoods(str(SHIPPED_CLIPS / f"{question.video}.mp4"), prompt, named)
        expected = [sum(row) if choice == "likelihood" else sum(row) / len(row) for row in tokens]
        assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert line["choice"] == int(np.argmax(expected)) and line["answer"] == named[line["choice"]]
        if choice == "text":
            assert question.options[line["choice"]] == question.answer


def test_likelihoods_that_are_no_numbers_choose_nothing(tmp_path, monkeypatch):
    nan = [torch.tensor([0.0]), torch.tensor([float("nan")]), torch.tensor([-1.0])]
    monkeypatch.setattr(VideoPandaSession, "log_likelihoods", lambda *_: nan)
    run(options_task(tmp_path), tmp_path / "run")
    assert [line["choice"] for line in lines_of(tmp_path / "run" / "predictions.jsonl")] == [None] * 3


def test_all_options_come_from_one_prefill(tmp_path, monkeypatch):
    model = shipped()[0]
    rows, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k))
    run(options_task(tmp_path), tmp_path / "run")
    assert rows == 3 * [1, 1, 3]  # for each video: itself, the question, its three options


def test_a_generated_letter_is_parsed_and_else_counted(tmp_path, monkeypatch):
    task = options_task(tmp_path)
    said = iter(["(B)", "A shape of some colour", "It is green."])
    monkeypatch.setattr(VideoPandaSession, "ask", lambda self, prompts, **_: [next(said) for _ in prompts])
    run(task, tmp_path / "run", choice="generate")
    lines = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert [line["choice"] for line in lines] == [1, None, 2] and lines[1]["answer"] == "A shape of some colour"


def test_options_are_listed_in_the_prompt_and_yes_or_no_is_not():
    question = Question("0", "v", "Which one?", "b", ("a", "b"))
    assert question.prompts() == ["Which one?\n(A) a\n(B) b\nAnswer with the letter of the right option."]
    assert question.prompts(with_options=False) == ["Which one?"] and question.labels == ["A", "B"]
    question = Question("0", "v", "Is it?", "yes", ("yes", "no"))
    assert question.prompts() == ["Is it?\nAnswer yes or no."] and question.labels == ["yes", "no"]


ANIMALS = ("a dog", "a cat", "A man is walking", "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(text, 1) for text in ("B", "b", " (B) ", "B.", "B)", "**B**", "(B) a cat", "B. a cat", "B: a cat", "[B]")],
        *[(text, 1) for text in ("The answer is (B).", "Answer: B", "answer is: B", "Option B", "a cat", "A CAT.")],
        *[(text, 1) for text in ("The answer is B, because it purrs.", "(B) is right: (B)")],
        ("A man is walking", 2),
        ("A", 0),
        ("A man is running", None),
        ("", None),
        ("B. a cat", 1),
        ("B. a cat, or C", None),
        *[(text, None) for text in ("The answer is a dog or a cat", "(A) or (B)", "A. No, B.", "It is not (B)")],
        *[(text, None) for text in ("I cannot say.", "E", "(F)", "A.m.", "Both", "The answer is not B", "a big dog")],
        *[(text, None) for text in ("Answer: A or B", "B. But (A) may be right", "A dog, B", "option", "AB")],
    ],
)
def test_the_parser_never_guesses(text, expected):
    assert chosen_option(text, ANIMALS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", 0), ("no.", 1), ("No, he sits.", 1), ("Yes and no", None), ("The man: yes", None), ("Maybe", None)],
)
def test_yes_or_no_is_the_first_word(text, expected):
    assert chosen_option(text, ("yes", "no")) == expected


def test_files_of_lines_survive_what_servers_and_editors_do(tmp_path):
    from video_panda_hf.evaluation.lines import LineWriter, read_lines

    file = tmp_path / "new" / "lines.jsonl"
    with LineWriter(file) as writer:
        writer.write({"text": "half a pair \ud83d, a line\u2028separator, é"})
    with LineWriter(file) as writer:
        writer.write({"n": 2})
    assert read_lines(file) == [{"text": "half a pair \ud83d, a line\u2028separator, é"}, {"n": 2}]
    file.write_bytes(file.read_bytes() + b"no json\n")
    with pytest.raises(ValueError, match=r"lines.jsonl, line 3 is not JSON"):
        read_lines(file)
    assert read_lines(tmp_path / "gone.jsonl") == []
