"""Questions of each benchmark, in miniatures of its files with the oddities of the real ones, and your own files."""

import csv
import importlib.util
import json
import sys

import pytest

from helpers.evaluation import write_qa
from video_panda_hf.evaluation import TASKS, load_task
from video_panda_hf.evaluation.loaders import MVBENCH_FOLDERS, hub_tables


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def touch(folder, *names: str):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["msvd-qa", "msrvtt-qa", "tgif-qa"])
def test_open_ended_questions_get_their_answers_by_id(name, tmp_path):
    asked = [("vid1", "wer läuft?", 7), ("vid2", "what is it?", "8"), ("vid1", "and here?", 7)]
    write_qa(
        tmp_path / "QA", asked, [("a dog", 8), ("ein Mann 😀", "7"), (2, 7)]
    )  # in another order; 7 is there twice
    questions = load_task(name, tmp_path).questions
    assert [(q.id, q.video, q.question, q.answer) for q in questions] == [
        ("7", "vid1", "wer läuft?", "ein Mann 😀"),
        ("8", "vid2", "what is it?", "a dog"),
        ("7#2", "vid1", "and here?", "2"),
    ]


def test_a_question_without_an_answer_is_an_error_that_names_it(tmp_path):
    write_qa(tmp_path, [("v", "what?", 1), ("v", "who?", 2)], [("a", 1)])
    with pytest.raises(ValueError, match="1 questions have no answer: 2"):
        load_task("msvd-qa", tmp_path)
    write_qa(tmp_path, [("v", "what?", 1)], [("a", 1), ("b", 3)])
    with pytest.raises(ValueError, match="1 answers have no question: 3"):
        load_task("msvd-qa", tmp_path)
    write(tmp_path / "test_a.json", [{"answer": "a"}])
    with pytest.raises(ValueError, match="not in the format of msvd-qa: a row has no 'question_id'"):
        load_task("msvd-qa", tmp_path)


def test_activitynet_gets_question_marks_types_and_prefixes(tmp_path):
    asked = [("ab-C_1", "is it indoors", "v_ab-C_1_0"), ("x", "what colour is it?", 2)]
    write_qa(tmp_path, asked, [("yes", "v_ab-C_1_0", 3), ("red", 2, "4")])
    touch(tmp_path, "videos/v_ab-C_1.mkv", "videos/v_x.mp4")
    task = load_task("activitynet-qa", tmp_path)
    assert [(q.question, q.type) for q in task.questions] == [
        ("is it indoors?", "yes/no"),
        ("what colour is it?", "colour"),
    ]
    assert [task.videos.find(q.video) for q in task.questions] == [
        str(tmp_path / "videos/v_ab-C_1.mkv"),
        str(tmp_path / "videos/v_x.mp4"),
    ]


def test_video_chatgpt_keeps_both_questions_of_consistency(tmp_path):
    write(tmp_path / "generic_qa.json", [{"Q": "What?", "A": "A dog.", "video_name": "v_1"}])
    write(tmp_path / "temporal_qa.json", [{"Q": "When?", "A": "Later.", "video_name": "v_2"}])
    write(tmp_path / "consistency_qa.json", [{"Q1": "Who?", "Q2": "Which man?", "A": "Bob.", "video_name": "v_3"}])
    questions = load_task("video-chatgpt", tmp_path).questions
    assert [(q.id, q.type, q.prompts()) for q in questions] == [
        ("generic/0", "generic", ["What?"]),
        ("temporal/0", "temporal", ["When?"]),
        ("consistency/0", "consistency", ["Who?", "Which man?"]),
    ]
    (tmp_path / "temporal_qa.json").unlink()
    with pytest.raises(ValueError, match="no file temporal_qa"):
        load_task("video-chatgpt", tmp_path)


def test_mvbench_finds_videos_of_one_name_in_the_folder_of_the_task(tmp_path):
    row = {"video": "video_1.mp4", "question": "How many?", "candidates": ["2", "1", "3"], "answer": "1"}
    write(tmp_path / "json" / "action_count.json", [row])
    write(tmp_path / "json" / "moving_count.json", [row])
    part = {"video": "Q.mp4", "question": "What first?", "candidates": ["Ran.", "Sat."], "answer": "Sat."}
    write(
        tmp_path / "json" / "action_sequence.json",
        [{**part, "start": 1.5, "end": 4}, {**part, "start": 0, "end": 2.5}],
    )
    touch(
        tmp_path,
        "video/clevrer/video_validation/video_1.mp4",
        "video/perception/videos/video_1.mp4",
        "video/star/Q.mp4",
    )
    task = load_task("mvbench", tmp_path / "video", tmp_path / "json")
    found = {q.id: (q.answer, task.videos.find(q.video).removeprefix(f"{tmp_path}/video/")) for q in task.questions}
    assert found["action_count/0"] == ("1", "perception/videos/video_1.mp4")
    assert found["moving_count/0"] == ("1", "clevrer/video_validation/video_1.mp4")
    assert [(q.id, q.start, q.end) for q in task.questions if q.type == "action_sequence"] == [
        ("action_sequence/0", 1.5, 4.0),
        ("action_sequence/1", 0.0, 2.5),
    ]
    assert len(MVBENCH_FOLDERS) == 20 and task.mean_of_types
    write(tmp_path / "json" / "dancing.json", [row])
    with pytest.raises(ValueError, match="'dancing' is none of the tasks"):
        load_task("mvbench", tmp_path / "video", tmp_path / "json")


def test_tvbench_reads_its_ten_tasks(tmp_path):
    row = {"video": "a.webm", "question": "Which way?", "candidates": ["Up.", "Down."], "answer": "Down."}
    write_lines(tmp_path / "moving_direction.jsonl", [row])
    (question,) = load_task("tvbench", tmp_path, tmp_path).questions
    assert (question.type, question.options, question.answer) == ("moving_direction", ("Up.", "Down."), "Down.")


def parquet(path, rows: list[dict]) -> None:
    Dataset = pytest.importorskip("datasets").Dataset
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(path))


VIDEO_MME = {"video_id": "001", "videoID": "fFjv93ACGo8", "question_id": "001-1", "duration": "short"}
VIDEO_MME |= {
    "question": "What is on top?",
    "options": ["A. Apples.", "B. Stars.", "C. Cats.", "D. Dogs."],
    "answer": "C",
}
NEXT_QA = {
    "video": 4010069381,
    "frame_count": 369,
    "question": "how does he move",
    "answer": 3,
    "qid": 6,
    "type": "CH",
}
NEXT_QA |= {"a0": "walk", "a1": "run", "a2": "by car", "a3": "with a stick", "a4": "1"}
TEMPCOMPASS = [
    {
        "video_id": "10",
        "question": "What is it doing?\nA. eating\nB. sleeping",
        "answer": "B. sleeping",
        "dim": "action",
    },
]
CAPTIONS = "Which caption fits?\nCaption A: Slow.\nCaption B: Fast."
EGOSCHEMA = {"question_idx": "77", "question": "Why?", "video_idx": "0074f737", "answer": "2"}
EGOSCHEMA |= {"option": ["A. x", "B. y", "C. z", "D. u", "E. v"]}
PERCEPTION = {"video_name": "video_8", "question": "Is it moving?", "question_id": "3", "answer_id": 1}
PERCEPTION |= {"options": ["Yes", "No", "I don't know"], "area": "physics"}


@pytest.mark.parametrize(
    ("name", "config", "rows", "expected"),
    [
        ("video-mme", "videomme", [VIDEO_MME], ("001-1", "fFjv93ACGo8", "Cats.", "short")),
        ("next-qa", "MC", [NEXT_QA], ("4010069381_6", "4010069381", "with a stick", "CH")),
        ("tempcompass", "multi-choice", TEMPCOMPASS, ("multi-choice/0", "10", "sleeping", "action")),
        ("egoschema", "Subset", [EGOSCHEMA], ("77", "0074f737", "z", None)),
        ("perception-test", "mc_question_val", [PERCEPTION], ("video_8_3", "video_8", "No", "physics")),
    ],
)
def test_parquet_folders_are_read_as_the_hub_has_them(name, config, rows, expected, tmp_path):
    parquet(tmp_path / config / "test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "other" / "test-00000-of-00001.parquet", [{"x": 1}])
    (question,) = load_task(name, tmp_path, tmp_path).questions
    assert (question.id, question.video, question.answer, question.type) == expected
    assert question.answer in question.options


def test_data_sets_are_read_by_their_id_on_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        rows = {"MC": [NEXT_QA], "multi-choice": TEMPCOMPASS}
        rows["yes_no"] = [{"video_id": "10", "question": "Is it fast?", "answer": "No.", "dim": "speed"}]
        rows["caption_matching"] = [
            {"video_id": 11, "question": CAPTIONS, "answer": "Caption A: Slow.", "dim": "speed"}
        ]
        return datasets.Dataset.from_list(rows[config])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (question,) = load_task("next-qa", tmp_path).questions
    assert question.options == ("walk", "run", "by car", "with a stick", "1") and question.answer == "with a stick"
    questions = load_task("tempcompass", tmp_path).questions
    assert [(q.question, q.options, q.answer) for q in questions] == [
        ("What is it doing?", ("eating", "sleeping"), "sleeping"),
        ("Is it fast?", ("yes", "no"), "no"),
        ("Which caption fits?", ("Slow.", "Fast."), "Slow."),
    ]
    assert asked[0] == ("lmms-eval/NExTQA", "MC", "test") and len(asked) == 4
    hubs = {name: (task.hub, task.split) for name, task in TASKS.items() if task.hub}
    assert hubs["mvbench"] == ("OpenGVLab/MVBench", "train") and len(hubs) == 7
    assert hubs["perception-test"] == ("lmms-eval/PerceptionTest_Val", "validation")


def test_without_datasets_a_hub_task_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"video-panda-hf\[eval\]"):
        hub_tables("a/b", (), "test")


def test_the_authors_own_files_of_multiple_choice_are_read(tmp_path):
    with open(tmp_path / "test.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, NEXT_QA)
        writer.writeheader()
        writer.writerow(NEXT_QA)
    (tmp_path / "val.csv").write_text((tmp_path / "test.csv").read_text())
    (question,) = load_task("next-qa", tmp_path, tmp_path).questions  # not those of val.csv
    assert (question.id, question.answer) == ("4010069381_6", "with a stick")

    folder = tmp_path / "tempcompass"
    write(folder / "multi-choice.json", {"10": {"action": [{**TEMPCOMPASS[0], "answer": "A. eating"}]}})
    (question,) = load_task("tempcompass", tmp_path, folder).questions
    assert (question.video, question.type, question.answer) == ("10", "action", "eating")

    folder = tmp_path / "egoschema"
    asked = {"q_uid": "u1", "question": "Why?", **{f"option {i}": f"because {i}" for i in range(5)}}
    write(folder / "questions.json", [asked, {**asked, "q_uid": "u2"}])
    write(folder / "subset_answers.json", {"u2": 4})
    (question,) = load_task("egoschema", tmp_path, folder).questions
    assert (question.id, question.answer) == ("u2", "because 4")

    folder = tmp_path / "perception"
    row = {"id": 0, "question": "Is it?", "options": ["a", "b", "c"], "answer_id": 2, "area": "memory"}
    write(folder / "mc_question_valid.json", {"video_8": {"mc_question": [row, {**row, "id": 1, "answer_id": 0}]}})
    questions = load_task("perception-test", tmp_path, folder).questions
    assert [(q.id, q.answer) for q in questions] == [("video_8_0", "c"), ("video_8_1", "a")]


def test_videos_are_found_by_what_benchmarks_call_them(tmp_path):
    touch(tmp_path, "a.b.mp4", "1164/32.mp4", "d/clip.webm", "d/clip.mp4", "one/same.avi", "two/same.avi", "X.GIF")
    touch(tmp_path, "frames/s01_clip_0/00001.jpg", "frames/s01_clip_0/00002.jpg", "data_moved/deep/x/y.mp4")
    videos = load_task_videos(tmp_path)
    found = {
        "a.b": "a.b.mp4",
        "a.b.mp4": "a.b.mp4",
        "32": "1164/32.mp4",
        "clip": "d/clip.mp4",
        "clip.webm": "d/clip.mp4",  # of another kind than it says; the more usual one first
        "d/clip.webm": "d/clip.webm",
        "one/same": "one/same.avi",
        "X": "X.GIF",
        "s01_clip_0": "frames/s01_clip_0",
        "data/x/y": "data_moved/deep/x/y.mp4",
        "elsewhere/32.mp4": "1164/32.mp4",
    }
    assert {name: videos.find(name).removeprefix(f"{tmp_path}/") for name in found} == found
    assert videos.find("https://example.com/a.mp4") == "https://example.com/a.mp4"
    for absent in ("gone", "gone.mp4", "b", ""):
        with pytest.raises(FileNotFoundError, match="no video"):
            videos.find(absent)
    with pytest.raises(ValueError, match=r"several videos are same: one/same.avi, two/same.avi"):
        videos.find("same")


def load_task_videos(folder):
    file = write_lines(folder / "own.jsonl", [{"video": "a", "question": "?", "answer": "b"}])
    return load_task(file).videos


def test_your_own_questions_are_lines_json_csv_or_parquet(tmp_path):
    rows = [
        {"video": "ä.mp4", "question": "What?", "answer": "red", "type": "colour", "start": 1.0, "end": 2.5},
        {"video": "b.mp4", "question": "Who?", "answer": "me", "type": None, "start": None, "end": None},
    ]
    write_lines(tmp_path / "own.jsonl", rows)
    write(tmp_path / "list.json", rows)
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    names = ["own.jsonl", "list.json", "table.csv"]
    if importlib.util.find_spec("datasets"):
        parquet(tmp_path / "rows.parquet", rows)
        names.append("rows.parquet")
    for name in names:
        task = load_task(tmp_path / name)
        assert (task.name, task.metric) == (name.split(".")[0], "accuracy")
        assert [(q.id, q.video, q.answer, q.type, q.start, q.end) for q in task.questions] == [
            ("0", "ä.mp4", "red", "colour", 1.0, 2.5),
            ("1", "b.mp4", "me", None, None, None),
        ]


def test_an_answer_may_be_an_option_its_letter_or_its_number(tmp_path):
    given = [("red", ["red", "blue"], "red"), ("B", ["red", "blue"], "blue"), (1, ["red", "blue"], "blue")]
    given += [
        ("(a)", ["red", "blue"], "red"),
        ("2", ["1", "2", "3"], "2"),
        (2, ["1", "2", "3"], "3"),
        (2, [1, 2], "2"),
    ]
    rows = [{"video": "a", "question": "?", "answer": answer, "options": options} for answer, options, _ in given]
    task = load_task(write_lines(tmp_path / "own.jsonl", rows))
    assert task.metric == "choice" and [q.answer for q in task.questions] == [right for *_, right in given]
    for bad, message in (
        ({"answer": "green", "options": ["red", "blue"]}, "the answer 'green' is none of the options"),
        ({"answer": "red", "options": ["red", "red"]}, "2 to 26 different texts"),
        ({"answer": 5, "options": ["red", "blue"]}, "the answer 5 is none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(write_lines(tmp_path / "own.jsonl", [{"video": "a", "question": "?", **bad}]))


def test_rows_of_training_are_questions_too(tmp_path):
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    more = [{"from": "human", "value": "Where?\n<video>"}, {"from": "gpt", "value": "Outside."}]
    content = [{"type": "video", "video": "c.mp4"}, {"type": "text", "text": "Who?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Bob."}]
    rows = [{"id": "x", "video": "b.mp4", "conversations": turns + more}, {"messages": messages}]
    task = load_task(write_lines(tmp_path / "own.jsonl", rows))
    assert [(q.id, q.video, q.question, q.answer) for q in task.questions] == [
        ("x/0", "b.mp4", "What?", "A cat."),
        ("x/1", "b.mp4", "Where?", "Outside."),
        ("1", "c.mp4", "Who?", "Bob."),
    ]
    for bad in ([*turns, more[1]], [{"from": "system", "value": "Be brief."}, *turns]):
        with pytest.raises(ValueError, match="row 1: a turn by"):
            load_task(write_lines(tmp_path / "own.jsonl", [{"video": "b.mp4", "conversations": bad}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a", "question": "?"}', "row 1: there is no 'answer'"),
        ('{"video": "a", "question": "?", "answer": "b"}\n{"video"', "line 2 is not JSON"),
        ('{"video": 3, "question": "?", "answer": "b"}', "row 1: video and question are texts"),
        ("[1]", "row 1: a row is a dictionary"),
        ("", "no question"),
    ],
)
def test_a_bad_row_is_named(text, message, tmp_path):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "own.json")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="is no task: there are msvd-qa, msrvtt-qa"):
        load_task("msvd")
    with pytest.raises(FileNotFoundError, match="no such file of questions"):
        load_task(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_task("msvd-qa", tmp_path / "gone")
    with pytest.raises(ValueError, match="msvd-qa: give `videos` or `questions`"):
        load_task("msvd-qa")
    with pytest.raises(ValueError, match="has no question of mvbench"):
        load_task("mvbench", tmp_path, tmp_path)


def test_a_sample_is_the_same_for_a_seed_and_keeps_the_order(tmp_path):
    rows = [{"video": "a", "question": f"{n}?", "answer": "b"} for n in range(50)]
    task = load_task(write_lines(tmp_path / "own.jsonl", rows))
    numbers = [int(q.id) for q in task.sample(10, seed=1)]
    assert numbers == sorted(numbers) == [int(q.id) for q in task.sample(10, seed=1)] and len(set(numbers)) == 10
    assert numbers != [int(q.id) for q in task.sample(10, seed=2)]
    assert task.sample(None, 0) == task.sample(90, 0) == task.questions


def test_the_counts_and_figures_of_the_paper():
    counts = {name: task.counts for name, task in TASKS.items() if task.counts}
    assert counts["msvd-qa"] == (13_157, 504) and counts["activitynet-qa"] == (8_000, 800)
    assert TASKS["tgif-qa"].paper == {"accuracy": 42.9, "score": 3.2}
    assert TASKS["video-chatgpt"].paper["context"] == 3.01 and TASKS["mvbench"].paper is None
