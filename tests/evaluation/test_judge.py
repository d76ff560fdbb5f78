"""Judges: what they are asked, what is read of their replies, and what happens when they misbehave."""

import email.utils
import json
import sys
import threading
import time

import pytest

import video_panda_hf.evaluation.judge  # noqa: F401  # the module, whose name is also its function's
from helpers import openai_stub
from helpers.evaluation import lines_of, write_lines, write_run
from helpers.judge_server import serving
from helpers.tiny_models import tiny_config
from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf.evaluation import ExactJudge, LocalJudge, OpenAIJudge, check_table, estimate, judge, report
from video_panda_hf.evaluation.judges import ChatJudge, Reply, seconds_of
from video_panda_hf.evaluation.replies import OUR_PROMPTS, Item, Prompts, is_same, read_reply


YES, NO = '{"correct": "yes", "score": 5}', '{"correct": "no", "score": 1}'


@pytest.fixture(autouse=True)
def package(monkeypatch):
    openai_stub.use(monkeypatch)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def judge_at(server, **options):
    return OpenAIJudge("judge", server.url, **{"first_wait": 0.01, "retries": 2, **options})


def run_of(folder, count: int = 6):
    return write_run(folder / "run", [{"prediction": f"p{n}", "video": f"v{n % 3}"} for n in range(count)])


def judgements(folder, name="openai-judge") -> dict[str, dict]:
    """By id. In the file they stand in the order in which they were ready."""
    lines = lines_of(folder / f"judgements-{name}.jsonl")
    return {line["id"]: line for line in sorted(lines, key=lambda line: line["id"])}


# What is read of a reply


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (YES, (True, 5)),
        ("{'pred': 'no', 'score': 2}", (False, 2)),
        ('```json\n{"correct": "yes",\n "score": 4}\n```', (True, 4)),
        ("{'pred': 'yes', 'score': '4.8'}", (True, 4.8)),
        ('{"correct": true, "score": 3}', (True, 3)),
        ("{''pred': yes, ''score': 4}", (True, 4)),
        ("Correct: Yes\n**Score:** 4/5", (True, 4)),
        ('<think>maybe "correct": "no", "score": 0</think>{"correct": "yes", "score": 5}', (True, 5)),
        *[(text, None) for text in ("", "yes", "true", "Yes, that is right.", "{}", "4", '"4.8"', "null", "score: 4")],
        *[(text, None) for text in ('{"correct": "partly", "score": 3}', '{"correct": "yes", "score": 7}')],
        *[(text, None) for text in ('{"correct": "yes", "score": -1}', '{"correct": "yes", "score": "four"}')],
        *[(text, None) for text in (f"{YES} or {NO}", '{"correct": "yes"}', '{"correct": "yes", "score": null}')],
        ("I'm sorry, I can't help with that.", None),
        ("__import__('os').abort()", None),
    ],
)
def test_replies_are_read_or_known_to_be_unreadable(text, expected):
    read = read_reply(text, "accuracy")
    assert read == (None if expected is None else {"correct": expected[0], "score": expected[1]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{''score': 4}", 4),
        ('{"score": 4.5}', 4.5),
        ("Score: 3 out of 5", 3),
        ("4", None),
        ("score: 3, score: 4", None),
    ],
)
def test_other_aspects_have_a_score_only(text, expected):
    assert read_reply(text, "detail") == (None if expected is None else {"score": expected})


# The exact judge


@pytest.mark.parametrize(
    ("answer", "prediction", "match", "right"),
    [
        ("red", "Red.", True, True),
        ("a dog", "The dog", True, True),
        ("dog", "There is a dog here.", False, True),
        ("dog", "A cat, a dog or a horse.", False, True),  # what `match` is for
        ("dog", "There is a dogma here.", False, False),
        ("two", "2", True, True),
        ("2", "He has two cats", False, True),
        ("yes", "Yes, he does.", False, True),
        ("yes", "He says yes to no one", False, False),
        ("no", "There is no dog, yes", False, False),
        ("playing guitar", "He is playing the guitar.", False, True),
        ("ﬁne", "FINE", True, True),
        ("straße", "STRASSE", True, True),
        ("3.5", "It is 3.5 m", False, True),
        ("", "", True, True),
        ("", "something", False, False),
        ("red", "", False, False),
    ],
)
def test_exact_is_normalised_match_and_containment(answer, prediction, match, right):
    assert is_same(answer, prediction) == (match, right)


def test_match_wants_the_answer_without_further_words(tmp_path):
    predictions = ["Yes.", "Yes, it is.", "no"]
    folder = write_run(tmp_path / "run", [{"prediction": prediction} for prediction in predictions])
    for by, expected in ((ExactJudge(whole=True), [True, False, False]), (ExactJudge(), [True, True, False])):
        assert judge(folder, by).done == 3
        lines = judgements(folder, by.name).values()
        assert [line["correct"] for line in lines] == expected and {line["model"] for line in lines} == {by.name}
    shares = {name: report([folder], name).figures[0][0].value[0] for name in ("match", "exact")}
    assert shares == {"match": pytest.approx(1 / 3), "exact": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="several judges \\(exact, match\\): name one"):
        report([folder])


def test_the_exact_judge_needs_no_model_and_judges_all(tmp_path):
    folder = write_run(tmp_path / "run", [{"prediction": "Yes, it is."}, {"prediction": "no"}, {"error": "missing"}])
    done = judge(folder, ExactJudge())
    assert (done.done, done.left, done.calls) == (2, 0, 0)
    assert [line["correct"] for line in judgements(folder, "exact").values()] == [True, False]
    scores = write_run(tmp_path / "s", [{"prediction": "x", "type": "temporal"}], metric="scores")
    with pytest.raises(ValueError, match="the exact judge says right or wrong and gives no scores"):
        judge(scores, ExactJudge())
    choice = write_run(tmp_path / "c", [{"choice": 0, "options": ["yes", "no"]}], metric="choice")
    with pytest.raises(ValueError, match="is a multiple choice, which needs no judge"):
        judge(choice, ExactJudge())
    with pytest.raises(ValueError, match="has no run"):
        judge(tmp_path, ExactJudge())


# What it is asked


def test_a_request_is_deterministic_and_all_that_came_back_is_kept(tmp_path):
    folder = run_of(tmp_path, 1)
    with serving(lambda question, number: YES) as server:
        done = judge(folder, judge_at(server))
    (request,) = server.requests
    assert (request["model"], request["temperature"], request["seed"]) == ("judge", 0, 0)
    assert "q0?" in request["messages"][1]["content"] and "p0" in request["messages"][1]["content"]
    line = judgements(folder)["0"]
    assert (line["correct"], line["score"], line["model"], line["replies"]) == (True, 5, "judge-2026-10-01", [YES])
    assert len(line["prompt"]) == 16 and line["prompts"] == "ours" and line["date"].endswith("+00:00")
    assert line["tokens"] == [100, 10] and (done.calls, done.tokens) == (1, [100, 10])


def test_fields_of_the_request_can_be_changed_and_left_out(tmp_path):
    with serving(lambda question, number: YES) as server:
        judge(run_of(tmp_path, 1), judge_at(server, options={"seed": None, "top_p": 0.5}))
    assert "seed" not in server.requests[0] and server.requests[0]["top_p"] == 0.5


def test_each_aspect_of_the_five_scores_has_its_own_question(tmp_path):
    rows = [{"prediction": "x", "type": "generic"}, {"prediction": "y", "type": "temporal"}]
    rows.append({"prediction": "one", "second_prediction": "two", "second": "q again?", "type": "consistency"})
    folder = write_run(tmp_path / "run", rows, metric="scores")
    with serving(lambda question, number: '{"score": 4}') as server:
        assert judge(folder, judge_at(server)).done == 5
    found = {(line["id"], line["aspect"]) for line in lines_of(folder / "judgements-openai-judge.jsonl")}
    assert found == {("0", "correctness"), ("0", "detail"), ("0", "context"), ("1", "temporal"), ("2", "consistency")}
    (asked,) = [r["messages"][1]["content"] for r in server.requests if "q again?" in r["messages"][1]["content"]]
    assert "q2?" in asked and asked.index("Answer to the first: one") < asked.index("Answer to the second: two")


def test_braces_in_answers_mean_nothing_and_endless_ones_are_cut(tmp_path):
    rows = [{"prediction": "{answer} {score} {0} \\1", "answer": "a {prediction}"}, {"prediction": "na " * 90_000}]
    folder = write_run(tmp_path / "run", rows)
    with serving(lambda question, number: NO) as server:
        assert judge(folder, judge_at(server)).done == 2
    asked = sorted((request["messages"][1]["content"] for request in server.requests), key=len)
    assert "Correct answer: a {prediction}\n" in asked[0] and "grade: {answer} {score} {0} \\1\n" in asked[0]
    assert len(asked[1]) < 6_000 and judgements(folder)["1"]["cut"] is True and "cut" not in judgements(folder)["0"]


def test_other_prompts_are_taken_from_a_file(tmp_path):
    folder, file = run_of(tmp_path, 2), tmp_path / "mine.json"
    file.write_text(json.dumps({"accuracy": {"user": 'Q: {question}\nT: {answer}\nP: {prediction}\nM: {"x": 1}'}}))
    with serving(lambda question, number: YES) as server:
        judge(folder, judge_at(server))
        judge(folder, judge_at(server), prompts=file)
        assert len(server.requests) == 4 and judge(folder, judge_at(server), prompts=file).calls == 0
        assert judge(folder, judge_at(server)).calls == 0  # each prompt's judgements stay
    mine = [r["messages"] for r in server.requests if len(r["messages"]) == 1]
    assert mine[0][0]["content"].endswith('M: {"x": 1}') and len(mine) == 2
    prompts = {(line["prompts"], line["prompt"]) for line in lines_of(folder / "judgements-openai-judge.jsonl")}
    assert {name for name, _ in prompts} == {"ours", "mine.json"} and len(prompts) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"accuracy": "x"}', "'accuracy' is not"),
        ('{"accuracy": {"user": "Right? {answer}"}}', "has no {answer} or no {prediction}"),
        ('{"detail": {"user": "{answer} {prediction}"}}', "has no prompt for accuracy"),
    ],
)
def test_a_file_of_prompts_is_checked(text, message, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message), serving(lambda question, number: YES) as server:
        judge(run_of(tmp_path), judge_at(server), prompts=file)


def test_our_prompts_ask_for_accuracy_and_the_five_scores():
    prompts, item = Prompts(), Item("0", "x", "Q1", "right", "said", "Q2", "said too")
    assert set(prompts.texts) == {"accuracy", "correctness", "detail", "context", "temporal", "consistency", "again"}
    for aspect in set(prompts.texts) - {"again"}:
        system, user = prompts.messages(Item(**{**vars(item), "aspect": aspect}))
        assert system["role"] == "system" and "Q1" in user["content"] and "said" in user["content"]
        assert ("Q2" in user["content"] and "said too" in user["content"]) == (aspect == "consistency")
        assert '"score"' in user["content"] and ('"correct"' in user["content"]) == (aspect == "accuracy")
        assert prompts.hash(aspect, {}) != prompts.hash(aspect, {"seed": 1})
    assert prompts.file == OUR_PROMPTS and prompts.are_ours


# Misbehaviour


UNREADABLE = {
    "refuses": "I'm sorry, but I can't judge that.",
    "prose": "The answer seems broadly right to me.",
    "true": "true",
    "a number in quotes": '"4.8"',
    "empty": "",
    "null": ("message", {"role": "assistant", "content": None}),
    "refuses in its field": ("message", {"role": "assistant", "content": None, "refusal": "No."}),
    "filters": ("status", (400, {}, {"error": {"message": "filtered", "code": "content_filter", "type": "x"}})),
}
PASSING = {
    "too many": ("status", (429, {"Retry-After": "0.05"}, {"error": {"message": "slow down"}})),
    "server error": ("status", (500, {}, {"error": {"message": "oops"}})),
    "dies in the middle": ("die", None),
    "stalls": ("stall", 60.0),
    "not JSON": ("raw", b"<html>"),
    "no choices": ("raw", b'{"id": "1", "object": "chat.completion", "choices": []}'),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_asked_three_times_more_then_unparsed(name, tmp_path):
    folder = run_of(tmp_path)
    with serving(lambda question, number: UNREADABLE[name] if question == "q2?" else YES) as server:
        done = judge(folder, judge_at(server))
    assert (done.done, done.unparsed, done.left, done.problem) == (6, 1, 0, None)
    assert server.seen["q2?"] == 4 and sum(server.seen.values()) == 9
    line = judgements(folder)["2"]
    assert line["unparsed"] is True and "correct" not in line and "score" not in line and len(line["replies"]) == 4
    again = [r["messages"][1]["content"] for r in server.requests if "q2?" in r["messages"][1]["content"]]
    assert ["could not be read" in text for text in again] == [False, True, True, True]
    found = report([folder])
    assert found.counts[0]["unparsed"] == 1
    all_of_them, judged = found.figures[0][:2]
    assert all_of_them.value[0] == pytest.approx(5 / 6) and judged.value[0] == 1.0


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_judge_that_comes_to_its_senses_is_heard(name, tmp_path):
    folder = run_of(tmp_path, 2)
    with serving(lambda question, number: UNREADABLE[name] if number < 2 else NO) as server:
        assert judge(folder, judge_at(server)).unparsed == 0
    assert [line["correct"] for line in judgements(folder).values()] == [False, False]
    assert all(len(line["replies"]) == 3 for line in judgements(folder).values())


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_failure_is_tried_again_and_changes_no_figure(name, tmp_path):
    folder = run_of(tmp_path)
    with serving(
        lambda question, number: PASSING[name] if number == 0 and question in ("q1?", "q4?") else YES
    ) as server:
        done = judge(folder, judge_at(server, timeout=2.0 if name == "stalls" else 60.0))
    assert (done.done, done.unparsed, done.left, done.problem, done.calls) == (6, 0, 0, None, 8)
    assert all(line["replies"] == [YES] for line in judgements(folder).values())


def waits(folder, server, monkeypatch, **options) -> list[float]:
    """How long a judge waits before each retry, in seconds; it does not really."""
    found, by = [], judge_at(server, **options)
    monkeypatch.setattr(by.stopped, "wait", found.append)
    assert judge(folder, by).done == 1
    return found


def test_retry_after_is_waited_for_in_seconds_or_to_a_date(tmp_path, monkeypatch):
    later = ("status", (429, {"Retry-After": "70.5"}, {"error": {"message": "slow down"}}))
    with serving(lambda question, number: later if number == 0 else YES) as server:
        assert waits(run_of(tmp_path, 1), server, monkeypatch) == [70.5]
    assert 3000 < seconds_of(email.utils.formatdate(time.time() + 3600, usegmt=True)) <= 3600
    assert [seconds_of(text) for text in ("3", "-1", "soon", None)] == [3.0, 0.0, None, None]


def test_each_retry_waits_longer_than_the_one_before(tmp_path, monkeypatch):
    busy = ("status", (503, {}, {"error": {"message": "busy"}}))
    with serving(lambda question, number: busy if number < 3 else YES) as server:
        first, second, third = waits(run_of(tmp_path, 1), server, monkeypatch, retries=3, first_wait=10.0)
    assert 7.5 <= first <= 12.5 < 15 <= second <= 25 < 30 <= third <= 50


def test_it_is_asked_as_many_questions_at_a_time_as_allowed(tmp_path):
    running, most, lock = 0, 0, threading.Lock()

    def behave(question, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return YES

    with serving(behave) as server:
        judge(run_of(tmp_path, 12), judge_at(server, concurrency=3))
    assert most == 3


def test_what_a_dead_judge_leaves_is_finished_by_the_next_run(tmp_path):
    folder = run_of(tmp_path)
    dead = {"q1?", "q3?"}
    with serving(lambda question, number: ("die", None) if question in dead else YES) as server:
        done = judge(folder, judge_at(server))
        assert (done.done, done.left, done.calls) == (4, 2, 10) and "no reply after 3 requests" in done.problem
        assert set(judgements(folder)) == {"0", "2", "4", "5"} and report([folder]).counts[0]["not judged"] == 2
        dead.clear()
        server.requests.clear()
        done = judge(folder, judge_at(server))
        assert (done.done, done.left, done.problem, len(server.requests)) == (6, 0, None, 2)


def test_a_judge_that_is_gone_ends_the_run_soon(tmp_path):
    folder = run_of(tmp_path, 200)
    with serving(lambda question, number: YES) as server:
        gone = judge_at(server, concurrency=2, retries=1)
    done = judge(folder, gone)
    assert done.done == 0 and done.left == 200 and done.calls < 30


def test_a_wrong_key_ends_the_run_at_once(tmp_path):
    refused = ("status", (401, {}, {"error": {"message": "no such key", "code": "invalid_api_key"}}))
    with serving(lambda question, number: refused) as server:
        done = judge(run_of(tmp_path, 200), judge_at(server, concurrency=1))
    assert done.left == 200 and done.problem.startswith("401: ") and "no such key" in done.problem and done.calls < 5


def test_max_calls_bounds_the_requests_repeated_ones_included(tmp_path):
    folder = run_of(tmp_path, 20)
    with serving(lambda question, number: "what?" if number == 0 else YES) as server:
        done = judge(folder, judge_at(server), max_calls=7)
        assert len(server.requests) == done.calls == 7 and done.problem is None and done.left == 20 - done.done > 0
        judge(folder, judge_at(server))
    assert len(judgements(folder)) == 20 and len(lines_of(folder / "judgements-openai-judge.jsonl")) == 20


def test_judgements_of_other_answers_are_stale_and_made_anew(tmp_path):
    folder = run_of(tmp_path, 3)
    with serving(lambda question, number: YES) as server:
        judge(folder, judge_at(server))
        write_lines(
            folder / "predictions.jsonl", [{"id": str(n), "answer": f"p{n}" if n else "new"} for n in range(3)]
        )
        found = report([folder])
        assert found.counts[0]["not judged"] == 1 and found.figures[0][0].value[0] == pytest.approx(2 / 3)
        assert "1 judgements are of answers that are not there any more" in found.notes[0]
        server.requests.clear()
        assert judge(folder, judge_at(server)).done == 3 and len(server.requests) == 1
    assert report([folder]).counts[0]["not judged"] == 0


def test_a_judge_that_changes_under_its_name_is_told(tmp_path):
    folder = run_of(tmp_path, 4)
    with serving(lambda question, number: YES) as server:
        judge(folder, judge_at(server), max_calls=2)
        server.model = "judge-2027"
        judge(folder, judge_at(server))
    (note,) = [note for note in report([folder]).notes if "several models" in note]
    assert "judge-2026-10-01, judge-2027" in note


def test_the_estimate_counts_what_is_left(tmp_path):
    folder = run_of(tmp_path, 4)
    with serving(lambda question, number: YES) as server:
        needed = estimate(folder, judge_at(server))
        length = sum(len(m["content"]) for m in Prompts().messages(Item("0", "accuracy", "q0?", "yes", "p0")))
        assert needed == {"calls": 4, "in": length, "out": 80}
        judge(folder, judge_at(server), max_calls=3)
        assert estimate(folder, judge_at(server))["calls"] == 1


def test_a_check_shows_what_a_judge_makes_of_right_and_shuffled_answers(tmp_path):
    rows = [{"prediction": "x", "answer": f"thing {n}", "video": f"v{n}"} for n in range(8)]
    folder = write_run(tmp_path / "run", rows)
    assert judge(folder, ExactJudge(), check=True).done == 16
    right, shuffled = check_table(folder, ExactJudge())
    assert (right["answers"], right["judged"], right["correct"]) == ("right", 8, 1.0)
    assert (shuffled["answers"], shuffled["judged"], shuffled["correct"]) == ("shuffled", 8, 0.0)
    with serving(lambda question, number: YES) as server:  # a judge that likes everything
        assert judge(folder, judge_at(server), check=True, limit=3).done == 6
        table = check_table(folder, judge_at(server), limit=3)
    assert [(row["judged"], row["correct"], row["score"], row["unparsed"]) for row in table] == [(3, 1.0, 5.0, 0)] * 2
    assert not list(folder.glob("judgements-*")), "a check is no judgement of the run"


def test_without_the_package_or_a_key_it_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        OpenAIJudge("gpt-4o-mini")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"video-panda-hf\[eval\]"):
        OpenAIJudge("gpt-4o-mini", "http://localhost/v1")


# A local judge


def test_a_local_model_judges_greedily_and_its_replies_are_kept(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = chatml_tokenizer()
    model = AutoModelForCausalLM.from_config(tiny_config().text_config)
    model.resize_token_embeddings(len(tokenizer))
    folder = run_of(tmp_path, 2)
    done = judge(folder, LocalJudge(model, tokenizer, "tiny/judge", max_new_tokens=4))
    assert (done.done, done.unparsed, done.calls) == (2, 2, 8)  # it knows nothing
    line = judgements(folder, "local-tiny-judge")["0"]
    assert line["model"] == "tiny/judge" and len(line["replies"]) == 4 and line["replies"][1] == line["replies"][2]
    said = []
    local = LocalJudge(model, tokenizer, "other", max_new_tokens=4)
    local.reply = lambda messages: said.append(messages) or Reply(YES, "other", (5, 5))
    assert judge(folder, local).unparsed == 0 and len(said) == 2


def test_a_subclass_is_a_judge_too(tmp_path):
    class Mine(ChatJudge):
        def reply(self, messages):
            self.count_call()
            return Reply(YES if "p1" in messages[-1]["content"] else NO, "mine")

    folder = run_of(tmp_path, 4)
    assert judge(folder, Mine("mine", {}, concurrency=3)).done == 4
    assert [line["correct"] for _, line in sorted(judgements(folder, "mine").items())] == [False, True, False, False]
