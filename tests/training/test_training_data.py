"""`load_conversations`: what the data of video-language models looks like, read into one form, and what is refused."""

import json
import pickle

import pytest

from video_panda_hf.training import ConversationError, ConversationReport, data, load_conversations


datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    """Videos need not be videos here: nothing is decoded when data is read."""
    (tmp_path / "valley").mkdir()
    for name in ("a.mp4", "b.mp4", "valley/c.mp4", "p.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def plain(row, folder):
    """The messages of a row, short: a video as <its path in the folder>."""
    return [
        [
            part["text"] or f"<{(part['video'] or part['image']).removeprefix(str(folder) + '/')}>"
            for part in m["content"]
        ]
        for m in row["messages"]
    ]


GOOD = {"video": "a.mp4", "conversations": turns("<video>\nWhat?", "A ball.")}


# What is read


def test_json_conversations_of_every_common_shape(folder):
    rows = [
        {"id": 7, **GOOD},
        {
            "id": "end",
            "video": "valley/c.mp4",
            "conversations": turns("What?\n<video>", "A ball.", "Why?", "Wind."),
        },
        {"id": "two", "video": ["a.mp4", "b.mp4"], "conversations": turns("<video>\n<video>\nAlike?", "No.")},
        {"id": "between", "video": ["a.mp4", "b.mp4"], "conversations": turns("<video> Then? <video>", "No.")},
        {"id": "text", "conversations": turns("What is an <image> tag?", "HTML.")},
        {"id": "picture", "image": "p.png", "conversations": turns("<image>\nWhat?", "A dot.")},
        {"video": str(folder / "b.mp4"), "conversations": turns("<video>", "A ball.")},
    ]
    report = ConversationReport()
    dataset = load_conversations(write(folder / "data.json", rows), report=report)
    assert dataset["id"] == ["7", "end", "two", "between", "text", "picture", "6"]
    assert [plain(row, folder) for row in dataset] == [
        [["<a.mp4>", "What?"], ["A ball."]],
        [["<valley/c.mp4>", "What?"], ["A ball."], ["Why?"], ["Wind."]],  # as the released model saw it
        [["<a.mp4>", "<b.mp4>", "Alike?"], ["No."]],
        [["<a.mp4>", "Then?", "<b.mp4>"], ["No."]],
        [["What is an <image> tag?"], ["HTML."]],
        [["<p.png>", "What?"], ["A dot."]],
        [["<b.mp4>"], ["A ball."]],
    ]
    assert [message["role"] for message in dataset[1]["messages"]] == ["user", "assistant"] * 2
    assert (report.rows, report.kept, report.text_only, report.videos) == (7, 7, 1, 8)


def test_messages_keep_their_order_and_take_videos_from_parts_or_columns(folder):
    rows = [
        {"messages": messages([{"type": "text", "text": "What?"}, {"type": "video", "video": "a.mp4"}], "A ball.")},
        {"messages": messages([{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "Q"}], "A ball.")},
        {"messages": messages("<video>What?", "A ball."), "videos": ["a.mp4"]},
        {"messages": messages([{"type": "video"}, {"type": "text", "text": "What?"}], "A ball."), "video": "a.mp4"},
        {"messages": [{"role": "system", "content": "Be short."}, *messages("Hello?", "Hello.")]},
        {"messages": messages([{"type": "video", "url": "https://a.b/c.mp4", "start": 1, "end": 2.5}], "A ball.")},
    ]
    dataset = load_conversations(write(folder / "data.jsonl", rows))
    assert [plain(row, folder) for row in dataset] == [
        [["What?", "<a.mp4>"], ["A ball."]],
        [["<a.mp4>", "Q"], ["A ball."]],
        [["<a.mp4>", "What?"], ["A ball."]],
        [["<a.mp4>", "What?"], ["A ball."]],
        [["Be short."], ["Hello?"], ["Hello."]],
        [["<https://a.b/c.mp4>"], ["A ball."]],
    ]
    window = dataset[5]["messages"][0]["content"][0]
    assert (window["start"], window["end"], window["indices"]) == (1.0, 2.5, None)


def test_pictures_stay_pictures_and_settings_beside_videos_stay(folder):
    rows = [
        {"image": "p.png", "messages": messages("<image>What is a <row>?", "A dot.")},
        {"images": ["p.png"], "video": "a.mp4", "conversations": turns("<video><image>\nAlike?", "No.")},
        {"messages": messages([{"type": "image", "path": "p.png"}, {"type": "text", "text": "What?"}], "A dot.")},
        {"messages": messages([{"type": "video", "video": "a.mp4", "nframes": 16, "video_start": 1}], "A ball.")},
    ]
    dataset = load_conversations(write(folder / "data.jsonl", rows))
    parts = [[{k: v for k, v in p.items() if v is not None} for p in r["messages"][0]["content"]] for r in dataset]
    picture, clip = str(folder / "p.png"), str(folder / "a.mp4")
    assert parts[0] == [{"type": "image", "image": picture}, {"type": "text", "text": "What is a <row>?"}]
    assert parts[1][:2] == [{"type": "video", "video": clip}, {"type": "image", "image": picture}]
    assert parts[2][0] == parts[0][0]
    assert parts[3] == [{"type": "video", "video": clip, "num_frames": 16, "start": 1.0}]


def test_every_kind_of_source_gives_the_same_rows(folder):
    question = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
    rows = [{"id": "0", "video": None, "messages": messages(question, [{"type": "text", "text": "A ball."}])}] * 3
    expected = list(load_conversations(rows, folder))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "data.parquet")
    write(folder / "data.json", rows)
    write(folder / "data.jsonl", rows)
    write(folder / "lines.json", rows).write_text("\n".join(map(json.dumps, rows)))
    names = [folder / name for name in ("data.json", "data.jsonl", "lines.json", "data.parquet")]
    sources = [*names, table, table.to_iterable_dataset(), tuple(rows), names[:1]]
    for source in sources:
        for streaming in (False, True):
            dataset = load_conversations(source, folder, streaming=streaming)
            assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
            assert list(dataset) == expected, source
    both = load_conversations([folder / "data.json", folder / "data.jsonl"])
    assert len(both) == 6


def test_a_folder_of_files_is_read_as_the_hub_would(folder):
    hub = folder / "hub"
    hub.mkdir()
    write(hub / "train.jsonl", [{"messages": messages("Hello?", "Hello.")}])
    assert len(load_conversations(hub, folder)) == 1


def test_a_stream_reads_no_more_than_it_gives(folder, monkeypatch):
    good, bad = json.dumps(GOOD), "{ broken"
    path = folder / "data.jsonl"
    path.write_text("\n".join([good, good, bad, good]), encoding="utf-8")
    rows = iter(load_conversations(path, streaming=True))
    assert [next(rows)["id"], next(rows)["id"]] == ["0", "1"]
    with pytest.raises(ConversationError, match=r"row 2: data.jsonl, line 3 is not JSON"):
        next(rows)
    warnings = []
    monkeypatch.setattr(data.logger, "warning", warnings.append)
    kept = load_conversations(path, streaming=True, on_error="skip")
    assert [row["id"] for row in kept] == ["0", "1", "3"] == [row["id"] for row in kept]
    assert len(warnings) == 2 and warnings[0].startswith("skipped row 2: data.jsonl, line 3 is not JSON")


def test_files_are_the_shards_of_a_stream(folder):
    files = [write(folder / f"{i}.jsonl", [GOOD]) for i in range(2)]
    stream = load_conversations(files, streaming=True)
    assert stream.num_shards == 2
    assert len(list(pickle.loads(pickle.dumps(stream)))) == 2


# What is refused

BAD = {
    "malformed": [
        ["not", "a", "row"],
        {"id": 1},
        {"messages": []},
        {"messages": ["Hello?"]},
        {"messages": messages(7, "A ball.")},
        {"messages": messages([{"type": "audio"}], "A ball.")},
        {"messages": messages([{"type": "text"}], "A ball.")},
        {"messages": messages([{"type": "video", "video": {"bytes": 1}}], "A ball.")},
        {"messages": messages([{"type": "video", "video": "a.mp4", "n_frames": 8}], "A ball.")},
        {"messages": messages([{"type": "image", "image": "p.png", "start": 1}], "A dot.")},
        {"conversations": [{"from": "tool", "value": "What?"}]},
        {"video": "a.mp4", "conversations": turns("What?", "<video>")},
    ],
    "without an assistant's turn": [
        {"conversations": turns("What?")},
        {"messages": messages("What?", " ")},
    ],
    "with more or fewer <video> than videos": [
        {"conversations": turns("<video>\nWhat?", "A ball.")},
        {"video": "a.mp4", "conversations": turns("What?", "A ball.")},
        {"video": ["a.mp4", "b.mp4"], "conversations": turns("<video>\nWhat?", "A ball.")},
        {"messages": messages([{"type": "video"}], "A ball.")},
    ],
    "with a missing file": [
        {"video": "none.mp4", "conversations": turns("<video>\nWhat?", "A ball.")},
        {"image": "none.png", "conversations": turns("<image>\nWhat?", "A ball.")},
    ],
}


@pytest.mark.parametrize(("problem", "row"), [(problem, row) for problem, rows in BAD.items() for row in rows])
def test_each_bad_row_is_counted_under_what_is_wrong_with_it(folder, problem, row):
    report = ConversationReport()
    dataset = load_conversations([GOOD, row], folder, on_error="skip", report=report)
    assert dataset["id"] == ["0"]
    assert report.problems == {problem: 1}


def test_by_default_one_error_names_the_first_bad_rows_and_counts_all(folder):
    rows = [GOOD, *({"id": f"v{i}", **GOOD, "video": "none.mp4"} for i in range(7)), {"conversations": turns("What?")}]
    with pytest.raises(ConversationError) as error:
        load_conversations(write(folder / "data.json", rows))
    summary, *named = str(error.value).splitlines()
    assert summary == (
        "9 rows, 1 good (1 videos, 0 rows without any), 8 bad: 7 with a missing file, 1 without an assistant's turn"
    )
    assert len(named) == 5
    assert named[0] == f"row 1 (id v0): {folder / 'none.mp4'}: no such file"


def test_skipped_rows_are_logged_line_by_line(folder):
    log = folder / "skipped.jsonl"
    load_conversations([{"id": "v", **GOOD, "video": "none.mp4"}, GOOD], folder, on_error="skip", skip_log=log)
    [line] = map(json.loads, log.read_text().splitlines())
    assert line["row"] == "row 0 (id v)" and line["problem"] == "with a missing file" and "none.mp4" in line["error"]


def test_a_folder_of_pictures_is_the_video_of_a_row(folder):
    (folder / "frames").mkdir()
    dataset = load_conversations([{"video": "frames", "conversations": turns("<video>\nWhat?", "A ball.")}], folder)
    assert dataset[0]["messages"][0]["content"][0]["video"] == str(folder / "frames")


def test_nothing_left_is_an_error(folder):
    with pytest.raises(ConversationError, match="no conversation to train on: 1 rows, 0 good"):
        load_conversations([{"id": 1}], on_error="skip")


def test_files_are_not_looked_for_if_not_wanted_nor_behind_urls(folder):
    row = {**GOOD, "video": "none.mp4"}
    assert len(load_conversations([row], folder, check_files=False)) == 1
    assert len(load_conversations([{**GOOD, "video": "https://example.com/a.mp4"}], folder)) == 1


def test_wrong_arguments_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of conversations"):
        load_conversations(tmp_path / "nothing.json")
    (tmp_path / "cut.json").write_text('[{"id": 1}, {"id"', encoding="utf-8-sig")
    with pytest.raises(ConversationError, match=r"cut.json begins like a JSON list and is none \(.*column 18"):
        load_conversations(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="'ignore'"):
        load_conversations([], on_error="ignore")
