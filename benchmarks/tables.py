"""The tables of docs/benchmarks.md, from benchmarks/results/*.json.

    python benchmarks/tables.py     # after a benchmark was run with `--json benchmarks/results/NAME.json`

The other benchmarks print the same tables. A result is a dictionary that says when and on what it was measured, with
the figures as they were measured; ratios and rounding are made here.
"""

import datetime
import json
import os
import platform
import re
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = REPOSITORY / "docs" / "benchmarks.md"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page, with the table of each benchmark between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, table in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not between.search(page):
            raise ValueError(f"{PAGE.name} has no place for the table of {name}")
        text = f"{table(result)}\n\nMeasured on {result['measured']['date']}, on {result['measured']['machine']}."
        page = between.sub(lambda marks, text=text: f"{marks[1]}\n{text}\n\n{marks[2]}", page)
    return page


def stab(result: dict) -> str:
    """`rows` have `name`, `gflop`, `time` (as a multiple of the first row's) and `token_tensors` (peak memory)."""
    lines = [["on " + result["setting"], "GFLOP", "time", "peak memory"]]
    for row in result["rows"]:
        memory = f"{row['token_tensors']:.1f} token tensors"
        lines.append([row["name"], f"{row['gflop']:,.1f}", f"{row['time']:.2f} ×", memory])
    return f"""{markdown(lines)}

1.00 × is {result["first_row_ms"]:.0f} ms. A token tensor, 8 × 32 × 32 × 1024 values, is
{result["token_tensor_mb"]:.1f} MB; STAB alone never holds more than {result["stab_token_tensors"]:.1f} of them beyond
its input. STAB has {result["stab_parameters"] / 1e6:.1f} M parameters, the projector
{result["projector_parameters"] / 1e6:.1f} M."""


def decoding(result: dict) -> str:
    """`rows` have `video`, seconds of ours, and how many times as long others take, or why they do not."""
    lines = [["video", *("`decode_video`", "`load_video(pyav)`", "decord", "torchcodec")]]
    lines[0] += ["to `pixel_values_videos`", "… after `load_video(pyav)`"]
    for row in result["rows"]:
        others = [times(row[name]) for name in ("load_video", "decord", "torchcodec")]
        processor = [f"{row['processor_seconds']:.2f} s", times(row["processor_after_load_video"])]
        lines.append([row["video"], f"{row['decode_video_seconds']:.2f} s", *others, *processor])
    alone, two = (result["videos_per_second"][workers] for workers in ("0", "2"))
    longer, isolated = result["half_hour_against_minute"], result["isolated"]
    return f"""{markdown(lines)}

30 minutes take {longer["time"]:.2f} times as long as one, and {longer["megabytes"]:.0f} MB more. A DataLoader gives
{alone:.1f} videos/s of the 10 s kind with no worker and {two:.1f} with two.

In a worker process (`isolate=True`) the 10 s kind takes {isolated["clock"]:.2f} times as long, and
{isolated["time"]:.2f} times the processor time (measured on {isolated["date"]}). The first video takes
{isolated["start_seconds"]:.1f} s more, to start the worker."""


def times(factor: float | str) -> str:
    return factor if isinstance(factor, str) else f"{factor:#.3g}".rstrip(".") + " ×"


def training(result: dict) -> str:
    """`rows` have `name`, `megabytes` (peak memory) and `time` (as a multiple of the first row's)."""
    lines = [["on " + result["setting"], "peak memory", "", "step time"]]
    for row in result["rows"]:
        share = row["megabytes"] / result["rows"][0]["megabytes"]
        lines.append([row["name"], f"{row['megabytes']:,.0f} MB", f"{share:.2f} ×", f"{row['time']:.2f} ×"])
    return f"{markdown(lines)}\n\n1.00 × of time is {result['first_row_seconds']:.1f} s."


def conversion(result: dict) -> str:
    """`rows` have `name`, `seconds`, `megabytes` (peak of all that is resident) and `own_megabytes`."""
    lines = [["process", "time", "peak memory", "of it, the process' own"]]
    for row in result["rows"]:
        memory = [f"{row[name]:,.0f} MB" for name in ("megabytes", "own_megabytes")]
        lines.append([row["name"], f"{row['seconds']:.0f} s", *memory])
    rate = result["gigabytes"] / result["rows"][1]["seconds"]
    return f"""{markdown(lines)}

The checkpoint has {result["gigabytes"]:.2f} GB in {result["files"]} files; its largest tensor has
{result["largest_megabytes"]:.0f} MB. It is converted at {rate:.2f} GB/s. Loading the result takes
{result["load_seconds"]:.0f} s; {result["prompt_tokens"]} tokens of prompt and {result["answer_tokens"]} of answer then
take {result["answer_seconds"]:.0f} s."""


def session(result: dict) -> str:
    """Seconds of many questions and of a first token, and `growth`: time and memory of a clip early and late."""
    whole = result["generate_seconds"]
    lines = [[f"{result['questions']} questions, on {result['setting']}", "time", "speed-up"]]
    for name, key in (
        ("`generate` for each", "generate_seconds"),
        ("a session, one after the other", "session_seconds"),
        ("a session, all at once", "together_seconds"),
    ):
        lines.append([name, f"{result[key]:.1f} s", f"{whole / result[key]:.1f} ×"])
    first = result["first_token_generate_seconds"], result["first_token_session_seconds"]
    lines.append(["first token by `generate`", f"{first[0]:.2f} s", "1.0 ×"])
    lines.append(["first token by a session that has the video", f"{first[1]:.2f} s", f"{first[0] / first[1]:.1f} ×"])
    heading = ["a clip, early", "late", "slope of 100 clips", "memory, early", "late", "slope of a clip", "tokens"]
    growing = [[f"{result['clips']} clips", *heading]]
    for row in result["growth"]:
        name = f"`max_clips={row['max_clips']}`"
        milliseconds = [f"{row[key]:.0f} ms" for key in ("early_ms", "late_ms", "ms_per_100_clips")]
        memory = [f"{row[key]:.0f} MB" for key in ("early_megabytes", "late_megabytes")]
        memory.append(f"{row['megabytes_per_clip']:.2f} MB")
        growing.append([name, *milliseconds, *memory, f"{row['tokens']:,}"])
    return f"{markdown(lines)}\n\n{markdown(growing)}"


def evaluation(result: dict) -> str:
    """Seconds of all questions about all videos, in three ways."""
    asked = result["videos"] * result["questions"]
    head = f"{result['questions']} questions about each of {result['videos']} videos, on {result['setting']}"
    lines = [[head, "questions a minute", "speed-up"]]
    for name, key in (
        ("`generate` for each", "generate_seconds"),
        ("`predict`, one question after the other", "one_by_one_seconds"),
        ("`predict`, all of a video together (the default)", "predict_seconds"),
    ):
        speed_up = result["generate_seconds"] / result[key]
        lines.append([name, f"{60 * asked / result[key]:,.0f}", f"{speed_up:.1f} ×"])
    return markdown(lines)


def long_video(result: dict) -> str:
    """`rows` have `way`, `frames`, `seconds`, and `megabytes` beyond those of one clip."""
    names = {"whole": "processor and `get_video_features`", "pieces": "`encode_videos`"}
    lines = [["on " + result["setting"], "frames", "memory", "time"]]
    for row in result["rows"]:
        lines.append([names[row["way"]], str(row["frames"]), f"{row['megabytes']:,.0f} MB", f"{row['seconds']:.0f} s"])
    return markdown(lines)


def serving(result: dict) -> str:
    """`servers` have for each number of clients requests a second and the median time to the first token."""
    lines = [[f"on {result['setting']}", "clients", "requests a second", "", "first token", ""]]
    for clients in ("1", "4", "16"):
        first = next(iter(result["servers"].values()))[clients]
        for name, found in result["servers"].items():
            row = [f"{found[clients][key]:.2f}" for key in ("requests_per_second", "first_token_seconds")]
            ratios = [f"{found[clients][key] / first[key]:.2f} ×" for key in first]
            lines.append([f"`{name}`", clients, row[0], ratios[0], f"{row[1]} s", ratios[1]])
    return markdown(lines)


TABLES = {"stab": stab, "decoding": decoding, "training": training, "conversion": conversion, "session": session}
TABLES |= {"evaluation": evaluation, "long_video": long_video, "serving": serving}


def markdown(lines: list[list[str]]) -> str:
    """A table of a heading and rows, numbers on the right."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def measured() -> dict[str, str]:
    """Date and machine of a result that is being measured."""
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {"date": datetime.date.today().isoformat(), "machine": machine}


def finish(name: str, result: dict, file: Path | None) -> None:
    """Prints the table of a benchmark's result, and writes the result to `file` if there is one."""
    print(f"\n{TABLES[name](result)}")
    if file is not None:
        file.write_text(json.dumps({"measured": measured(), **result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
