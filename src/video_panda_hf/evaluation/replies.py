"""What a judge is told, and how its reply is read: prompts from a file, verdicts from text."""

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path


OUR_PROMPTS = Path(__file__).parent / "prompts" / "default.json"
LONGEST_ANSWER = 4000  # characters. An answer that repeats itself for ever would not fit into a judge's context
PLACES = re.compile(r"\{(question2?|answer|prediction2?)\}")
BETWEEN = r"""["'`*\s]*"""
VERDICT = re.compile(rf"\b(?:correct|pred)\b{BETWEEN}[:=]{BETWEEN}(yes|no|true|false)\b", re.IGNORECASE)
SCORE = re.compile(rf"\bscore\b{BETWEEN}[:=]{BETWEEN}(-?\d+(?:\.\d+)?)(?![.\d]*\d)", re.IGNORECASE)
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Item:
    """An answer to be judged in one aspect, with all that a judge needs to know. `kind` is of a check of the judge."""

    id: str
    aspect: str
    question: str
    answer: str
    prediction: str
    question2: str | None = None
    prediction2: str | None = None
    kind: str | None = None

    @property
    def key(self) -> tuple:
        return self.id, self.aspect, self.kind

    @property
    def hash(self) -> str:
        """Of all that a judgement depends on but the judge."""
        return short_hash(asdict(self))


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Prompts:
    """
    The prompts of a judge, from a JSON file: for each aspect `{"system": …, "user": …}`, and `"again"`, which is added
    where an earlier reply could not be read.

    Args:
        file (`str` or `os.PathLike`, *optional*):
            The file. Defaults to our own prompts.

    Raises:
        ValueError: if the file has another form, or a prompt without a place for the answer.
    """

    def __init__(self, file: str | os.PathLike | None = None):
        self.are_ours = file is None
        self.file = OUR_PROMPTS if file is None else Path(file)
        try:
            self.texts = json.loads(self.file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{self.file} is not JSON ({error})") from None
        if not isinstance(self.texts, dict):
            raise ValueError(f"{self.file} is not a JSON object of aspects")
        for aspect, prompt in self.texts.items():
            if aspect == "again" and isinstance(prompt, str):
                continue
            if not isinstance(prompt, dict) or not isinstance(prompt.get("user"), str):
                raise ValueError(f'{self.file}: {aspect!r} is not {{"system": …, "user": …}}')
            if not {"prediction", "answer"} <= set(PLACES.findall(prompt["user"])):
                raise ValueError(f"{self.file}: {aspect!r} has no {{answer}} or no {{prediction}}")

    def check(self, aspects) -> None:
        if missing := sorted(set(aspects) - self.texts.keys()):
            raise ValueError(f"{self.file} has no prompt for {', '.join(missing)}")

    def messages(self, item: Item, again: bool = False) -> list[dict]:
        """What stands in an answer is put in as it is: braces in it mean nothing."""
        prompt, fields = self.texts[item.aspect], asdict(item)
        for name in ("prediction", "prediction2"):
            fields[name] = (fields[name] or "")[:LONGEST_ANSWER]
        text = PLACES.sub(lambda place: fields[place[1]] or "", prompt["user"])
        if again:
            text += "\n\n" + self.texts.get("again", "")
        system = [{"role": "system", "content": prompt["system"]}] if prompt.get("system") else []
        return [*system, {"role": "user", "content": text}]

    def hash(self, aspect: str, settings: dict) -> str:
        return short_hash([self.texts[aspect], self.texts.get("again"), LONGEST_ANSWER, settings])


def read_reply(text: str, aspect: str) -> dict | None:
    """
    `{"correct": bool, "score": float}` of a reply about accuracy, `{"score": float}` of one about another aspect, or
    `None` if it does not say so, or says two things. JSON, Python's dictionaries and prose with "score: 4" are read
    alike.
    """
    text = THOUGHTS.sub("", text)
    scores = {float(number) for number in SCORE.findall(text)}
    if len(scores) != 1 or not 0 <= min(scores) <= 5:
        return None
    read: dict = {"score": scores.pop()}
    if aspect == "accuracy":
        verdicts = {word.lower() in ("yes", "true") for word in VERDICT.findall(text)}
        if len(verdicts) != 1:
            return None
        read["correct"] = verdicts.pop()
    return read


def is_same(answer: str, prediction: str) -> tuple[bool, bool]:
    """Whether a prediction is the answer, and whether it is or has it, word for word, after `normalised`. Where the
    answer is yes or no, the first word counts."""
    right, said = normalised(answer), normalised(prediction)
    if right in (["yes"], ["no"]):
        return said == right, said[:1] == right
    has = any(said[start : start + len(right)] == right for start in range(len(said))) and bool(right)
    return said == right, said == right or has


def normalised(text: str) -> list[str]:
    """The words in lower case, without articles and punctuation, numbers up to ten as digits."""
    words = re.findall(r"\w+(?:['’.]\w+)*", unicodedata.normalize("NFKC", text).casefold())
    words = [word for word in words if word not in ("a", "an", "the")]
    return [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words]
