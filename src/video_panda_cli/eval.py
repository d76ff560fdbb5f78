"""`video-panda eval`: how good a model is, in three steps: predict, judge, report."""

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from . import options as common


TASKS = (  # those of `video_panda_hf.evaluation`
    *("msvd-qa", "msrvtt-qa", "tgif-qa", "activitynet-qa", "video-chatgpt"),
    *("mvbench", "video-mme", "next-qa", "tempcompass", "egoschema", "perception-test", "tvbench"),
)
EXAMPLES = """  video-panda eval predict --task msvd-qa --videos MSVD --model path/to/checkpoint --output runs/msvd
  video-panda eval judge runs/msvd --judge exact
  video-panda eval report runs/msvd"""
PREDICT_EXAMPLES = """\
  video-panda eval predict --task msvd-qa --videos MSVD --model my-checkpoint --output runs/msvd
  video-panda eval predict --task mvbench --videos MVBench/video --model user/checkpoint --output runs/mv
  video-panda eval predict --task my-questions.jsonl --videos my-videos --output runs/mine
  accelerate launch --multi_gpu -m video_panda_cli eval predict --task tgif-qa --videos TGIF --output runs/tgif"""
JUDGE_EXAMPLES = """  video-panda eval judge runs/msvd --judge exact
  video-panda eval judge runs/msvd --judge openai --model gpt-4o-mini --price 0.15 0.60 --estimate
  video-panda eval judge runs/msvd --judge openai --base-url http://localhost:8000/v1 --model Qwen/Qwen3-8B
  video-panda eval judge runs/msvd --judge local --model Qwen/Qwen3-1.7B --check-judge --limit 50"""
REPORT_EXAMPLES = """  video-panda eval report runs/msvd
  video-panda eval report runs/msvd runs/msvd-finetuned --judge openai-gpt-4o-mini --format markdown"""


def add_parser(commands) -> None:
    parser = common.new_command(
        commands,
        "eval",
        None,
        EXAMPLES,
        help="answer the questions of a benchmark, or your own, and report how many answers are right",
        description="How good a model is, in three steps. Each can be stopped, and goes on where it was.",
    )
    steps = parser.add_subparsers(title="steps", required=True, metavar="STEP")
    add_predict(steps)
    add_judge(steps)
    add_report(steps)


def add_predict(steps) -> None:
    parser = common.new_command(
        steps,
        "predict",
        predict,
        PREDICT_EXAMPLES,
        help="answer the questions",
        description="Answer the questions of a task. All questions of a video are answered from one session.",
    )
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME_OR_FILE",
        help=f"{', '.join(TASKS)}; or a .jsonl, .json, .csv or .parquet file of your own questions",
    )
    parser.add_argument("--videos", metavar="DIR", help="the folder of the videos (default: that of the questions)")
    parser.add_argument(
        "--questions",
        metavar="PATH",
        help="the benchmark's file or folder of questions (default: from the Hub, or in the folder of the videos)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder of the run, new or to be gone on with"
    )
    parser.add_argument("--limit", type=common.count, metavar="N", help="only N questions, drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --limit (default: 0)")
    parser.add_argument(
        "--choice",
        choices=["likelihood", "text", "generate"],
        default="likelihood",
        help="multiple choice by the likelihood of each option's letter, of its text, or by a generated letter "
        "(default: likelihood)",
    )
    parser.add_argument(
        "--batch-size", type=common.count, default=32, metavar="N", help="questions answered at a time (default: 32)"
    )
    parser.add_argument("--retry", action="store_true", help="try videos again that were missing or broken")
    common.add_frame_options(parser)
    common.add_model_options(parser, max_new_tokens=1024)
    parser.add_argument("--revision", metavar="REV", help="with a Hub id: branch, tag or commit")


def add_judge(steps) -> None:
    parser = common.new_command(
        steps,
        "judge",
        judge,
        JUDGE_EXAMPLES,
        help="judge the answers",
        description="Have the answers of a run judged. The key of an OpenAI-compatible endpoint is OPENAI_API_KEY.",
    )
    parser.add_argument("run_folder", metavar="DIR", help="the folder of the run")
    parser.add_argument("--judge", required=True, choices=["exact", "match", "openai", "local"], help="who judges")
    parser.add_argument(
        "--model", metavar="NAME", help="the endpoint's model, or folder or Hub id of a language model"
    )
    parser.add_argument("--base-url", metavar="URL", help="the endpoint (default: OpenAI's)")
    parser.add_argument("--judge-prompts", metavar="FILE", help="other prompts, in the format of our own")
    parser.add_argument("--max-calls", type=common.count, metavar="N", help="stop after N requests")
    parser.add_argument(
        "--concurrency", type=common.count, default=8, metavar="N", help="requests at a time (default: 8)"
    )
    parser.add_argument(
        "--timeout", type=common.positive, default=60.0, metavar="S", help="of a request (default: 60)"
    )
    parser.add_argument(
        "--request", type=json_object, metavar="JSON", help="other fields of a request; null leaves one of ours out"
    )
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="price of a million tokens, for the estimate"
    )
    parser.add_argument("--estimate", action="store_true", help="print calls, tokens and price, and stop")
    parser.add_argument(
        "--check-judge",
        action="store_true",
        help="let it judge right answers and shuffled ones, and print the outcome",
    )
    parser.add_argument("--limit", type=common.count, metavar="N", help="with --check-judge: only N questions")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --limit (default: 0)")
    common.add_device_options(parser)


def add_report(steps) -> None:
    parser = common.new_command(
        steps,
        "report",
        report,
        REPORT_EXAMPLES,
        help="print the figures",
        description="Print the figures of one or several runs of a task, side by side.",
    )
    parser.add_argument("run_folders", nargs="+", metavar="DIR", help="folders of runs")
    parser.add_argument("--judge", metavar="NAME", help="whose judgements: exact, match, openai-MODEL or local-MODEL")
    parser.add_argument("--format", choices=["text", "markdown", "json"], default="text", help="(default: text)")


def json_object(text: str) -> dict:
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a JSON object")


# The steps


def predict(options: argparse.Namespace) -> int:
    common.check_max_frames(options)
    if options.task not in TASKS and not os.path.isfile(options.task):
        raise FileNotFoundError(f"{options.task} is no task and no file. Tasks: {', '.join(TASKS)}.")
    for path in (options.videos, options.questions):
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(f"no such file or folder: {path}")
    common.check_model(options.model)
    with common.importing():
        from video_panda_hf import SHIPPED_MODEL, evaluation
    task = evaluation.load_task(options.task, options.videos, options.questions)
    rank = int(os.environ.get("RANK", 0))
    if options.device is None and "LOCAL_RANK" in os.environ:  # of `accelerate launch`
        import torch

        options.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    processor, load_model = common.load_processor(options)
    folder = options.model or str(SHIPPED_MODEL)
    revision = evaluation.fingerprint(folder) if os.path.isdir(folder) else commit_of(folder, options.revision)
    counts = evaluation.predict(
        task,
        load_model(),
        processor,
        options.output,
        name=options.model or SHIPPED_MODEL.name,
        revision=revision,
        **common.sampling(options),
        choice=options.choice,
        max_new_tokens=options.max_new_tokens,
        system=options.system,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        retry=options.retry,
        progress=None if rank == 0 else False,
    )
    told = {state: counts[state] for state in ("answered", "missing", "broken")}
    if rank == 0:
        if options.json:
            common.print_json(output=options.output, questions=len(task.sample(options.limit, options.seed)), **told)
        in_words = ", ".join(f"{count} {state}" for state, count in told.items())
        print(f"{in_words}; {Path(options.output)}", file=sys.stderr)
    return 0


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a Hub id that was loaded, as the cache knows it."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def judge(options: argparse.Namespace) -> int:
    folder, prompts = options.run_folder, options.judge_prompts
    common.check_folder(folder)
    if prompts is not None:
        common.check_file(prompts)
    if options.judge in ("openai", "local") and not options.model:
        raise ValueError(f"--judge {options.judge} needs --model, the name of the model that judges.")
    if options.limit is not None and not options.check_judge:
        raise ValueError("--limit is for --check-judge; `predict --limit` asks a sample.")
    with common.importing():
        from video_panda_hf import evaluation
    by = judge_of(options, evaluation)
    which = {"check": options.check_judge, "limit": options.limit, "seed": options.seed}
    if by.needs_prompts:
        print(estimate_in_words(evaluation.estimate(folder, by, prompts, **which), options.price), file=sys.stderr)
    if options.estimate:
        return 0
    done = evaluation.judge(folder, by, prompts=prompts, max_calls=options.max_calls, **which)
    spent = f"; {done.calls:,} calls, {done.tokens[0]:,} tokens in and {done.tokens[1]:,} out" if done.calls else ""
    print(f"{done.done} judged, {done.unparsed} of them unparsed, {done.left} left{spent}", file=sys.stderr)
    if options.check_judge:
        which.pop("check")
        for row in evaluation.check_table(folder, by, prompts, **which):
            told = {name: "–" if value is None else value for name, value in row.items()}
            told["correct"] = told["correct"] if row["correct"] is None else f"{100 * row['correct']:.1f} %"
            told["score"] = told["score"] if row["score"] is None else f"{row['score']:.2f}"
            print(", ".join(f"{name} {value}" for name, value in told.items()))
    if done.problem and done.left:
        raise common.WorkFailed(f"{done.left} answers are not judged: {done.problem}. The same command goes on.")
    return 0


def judge_of(options: argparse.Namespace, evaluation):
    if options.judge in ("exact", "match"):
        return evaluation.ExactJudge(whole=options.judge == "match")
    if options.judge == "openai":
        return evaluation.OpenAIJudge(
            options.model,
            options.base_url,
            concurrency=options.concurrency,
            timeout=options.timeout,
            options=options.request,
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = common.usable_device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(device)
    return evaluation.LocalJudge(model, tokenizer, options.model)


def estimate_in_words(needed: dict[str, int], price: list[float] | None) -> str:
    text = f"about {needed['calls']:,} calls, {needed['in']:,} tokens in and {needed['out']:,} out"
    if price is None:
        return text
    return f"{text}, {(needed['in'] * price[0] + needed['out'] * price[1]) / 1e6:,.2f} by --price"


def report(options: argparse.Namespace) -> int:
    for folder in options.run_folders:
        common.check_folder(folder)
    with common.importing():
        from video_panda_hf import evaluation
    found = evaluation.report(options.run_folders, options.judge)
    print(getattr(found, options.format)())
    return 0
