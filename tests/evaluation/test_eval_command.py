"""`video-panda eval`: the three steps from the command line, on the shipped model and its clips."""

import json

import pytest
from transformers import AutoModelForCausalLM

from helpers import openai_stub
from helpers.evaluation import ASKED, CLIPS, clips_task, lines_of, write_lines
from helpers.judge_server import serving
from helpers.tiny_models import tiny_config
from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_cli.eval import TASKS as NAMES
from video_panda_cli.eval import commit_of
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.cli import main
from video_panda_hf.evaluation import TASKS, fingerprint


@pytest.fixture
def folder(tmp_path):
    clips_task(tmp_path, ASKED[:2], extra=("gone",))
    return tmp_path


def predict(folder, *arguments: str, output: str = "run", task: str = "clips.jsonl") -> int:
    command = ["eval", "predict", "--task", str(folder / task), "--videos", str(SHIPPED_CLIPS)]
    return main([*command, "--output", str(folder / output), *arguments])


def test_predict_judge_report(folder, capsys):
    assert predict(folder, "--max-new-tokens", "20") == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "6 answered, 2 missing, 0 broken; " in printed.err
    assert predict(folder, "--max-new-tokens", "20", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"output": str(folder / "run"), "questions": 8, "answered": 6, "missing": 2, "broken": 0}
    line = lines_of(folder / "run" / "predictions.jsonl")[0]
    assert (line["model"], line["revision"]) == ("moving-shapes", fingerprint(SHIPPED_MODEL))

    assert main(["eval", "judge", str(folder / "run"), "--judge", "exact"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "6 judged, 0 of them unparsed, 0 left\n" in printed.err
    assert main(["eval", "report", str(folder / "run")]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["missing", "2"] in printed and ["accuracy,", "all", "37.5"] in [words[:3] for words in printed]
    assert main(["eval", "report", str(folder / "run"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"][0][1]["value"][0] == 0.5
    assert main(["eval", "report", str(folder / "run"), str(folder / "run"), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.startswith("| clips, judge exact | moving-shapes (run) | moving-shapes (run) |\n")


def test_a_multiple_choice_goes_without_a_judge(tmp_path, capsys):
    options = [f"It is {colour}." for colour in CLIPS.values()]
    rows = [{"video": v, "question": ASKED[0], "answer": f"It is {c}.", "options": options} for v, c in CLIPS.items()]
    write_lines(tmp_path / "options.jsonl", rows)
    assert predict(tmp_path, "--choice", "text", "--num-frames", "4", task="options.jsonl") == 0
    assert main(["eval", "report", str(tmp_path / "run")]) == 0
    assert "100.0 [100.0, 100.0]" in capsys.readouterr().out


def test_a_judge_behind_an_endpoint_with_an_estimate_and_a_price(folder, monkeypatch, capsys):
    openai_stub.use(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    predict(folder, "--max-new-tokens", "20", "--limit", "4", "--seed", "1")
    with serving(lambda question, number: '{"correct": "yes", "score": 4}') as server:
        command = ["eval", "judge", str(folder / "run"), "--judge", "openai", "--model", "j", "--base-url", server.url]
        capsys.readouterr()
        assert main([*command, "--price", "1000", "2000", "--estimate"]) == 0 and server.requests == []
        estimate = capsys.readouterr().err
        answered = len([line for line in lines_of(folder / "run" / "predictions.jsonl") if "answer" in line])
        assert f"about {answered} calls, " in estimate and " by --price" in estimate
        numbers = [int(word.replace(",", "")) for word in estimate.split() if word.replace(",", "").isdigit()]
        _, tokens_in, tokens_out = numbers
        assert f"{(tokens_in * 1000 + tokens_out * 2000) / 1e6:.2f} by --price" in estimate
        assert main([*command, "--max-calls", "1", "--concurrency", "1"]) == 0
        told = capsys.readouterr().err
        assert f"1 judged, 0 of them unparsed, {answered - 1} left; 1 calls, 100 tokens in" in told
        assert 0 <= told.index(f"about {answered} calls, ") < told.index("1 judged")  # before it starts
        assert main(command) == 0 and len(server.requests) == answered
        prompts = folder / "mine.json"
        prompts.write_text(json.dumps({"accuracy": {"user": "{question} {answer} or {prediction}, my words"}}))
        assert main([*command, "--judge-prompts", str(prompts)]) == 0 and len(server.requests) == 2 * answered
        assert all(request["messages"][0]["content"].endswith("my words") for request in server.requests[answered:])
        capsys.readouterr()
        assert main([*command, "--check-judge", "--limit", "2"]) == 0
        printed = capsys.readouterr().out.splitlines()
    expected = "judged 2, unparsed 0, correct 100.0 %, score 4.00"
    assert printed == [f"aspect accuracy, answers {kind}, {expected}" for kind in ("right", "shuffled")]
    assert main(["eval", "report", str(folder / "run"), "--judge", "openai-j"]) == 0
    assert "a sample: 4 questions" in capsys.readouterr().out


@pytest.mark.slow
def test_a_local_judge_is_loaded_from_its_folder(folder, capsys):
    tokenizer = chatml_tokenizer()
    model = AutoModelForCausalLM.from_config(tiny_config().text_config)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "lm")
    predict(folder, "--max-new-tokens", "20")
    command = ["eval", "judge", str(folder / "run"), "--judge", "local", "--model", str(folder / "lm")]
    assert main([*command, "--max-calls", "9"]) == 0
    assert "2 judged, 2 of them unparsed, 4 left; 9 calls, " in capsys.readouterr().err  # it knows nothing


def test_the_revision_of_a_hub_id_is_the_commit_in_the_cache(monkeypatch):
    asked = {"ann/panda": "/cache/models--ann--panda/snapshots/0123abc/config.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: asked.get(name))
    assert commit_of("ann/panda", "main") == "0123abc" and commit_of("bob/panda", "v2") == "v2"


def test_a_judge_that_fails_is_said_and_the_exit_status_is_1(folder, monkeypatch, capsys):
    openai_stub.use(monkeypatch)
    predict(folder, "--max-new-tokens", "20")
    with serving(lambda question, number: ("status", (404, {}, {"error": {"message": "no such model"}}))) as server:
        command = ["eval", "judge", str(folder / "run"), "--judge", "openai", "--model", "j", "--base-url", server.url]
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "6 answers are not judged: 404: " in error and "The same command goes on." in error
    assert "Traceback" not in error and "sk-" not in error


def test_wrong_use_is_a_line_and_status_2(folder, capsys):
    predict(folder, "--max-new-tokens", "20")
    for arguments, message in (
        (["predict", "--task", str(folder / "clips.jsonl"), "--videos", str(SHIPPED_CLIPS)], "other settings"),
        (
            ["judge", str(folder / "run"), "--judge", "exact", "--judge-prompts", "gone.json"],
            "gone.json: no such file",
        ),
        (["report", str(folder)], "has no run"),
    ):
        arguments = [*arguments, "--output", str(folder / "run")] if arguments[0] == "predict" else arguments
        capsys.readouterr()
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_command_knows_the_tasks():
    assert tuple(TASKS) == NAMES
