"""A question about a video: what is asked of the model, and which option an answer names."""

import re
from dataclasses import dataclass


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """
    A question about a video.

    Args:
        id (`str`):
            Its name in the task.
        video (`str`):
            The name of the video, as in the file of the questions.
        question (`str`):
            The question.
        answer (`str`):
            The right answer. With options it is one of them.
        options (`tuple[str, ...]`, *optional*):
            The answers to choose from.
        second (`str`, *optional*):
            The same question in other words, where the consistency of two answers is judged.
        type (`str`, *optional*):
            Its kind, for figures of each.
        start (`float`, *optional*), end (`float`, *optional*):
            The part of the video, in seconds.
    """

    id: str
    video: str
    question: str
    answer: str
    options: tuple[str, ...] | None = None
    second: str | None = None
    type: str | None = None
    start: float | None = None
    end: float | None = None

    @property
    def labels(self) -> list[str]:
        """What names each option: its letter, or the word itself where the options are yes and no."""
        options = self.options or ()
        return list(options) if is_yes_no(options) else list(LETTERS[: len(options)])

    def prompts(self, with_options: bool = True) -> list[str]:
        """What the model is asked."""
        if self.options is None:
            return [self.question] if self.second is None else [self.question, self.second]
        if not with_options:
            return [self.question]
        if is_yes_no(self.options):
            return [f"{self.question}\nAnswer yes or no."]
        listed = "\n".join(f"({label}) {option}" for label, option in zip(self.labels, self.options, strict=True))
        return [f"{self.question}\n{listed}\nAnswer with the letter of the right option."]


def is_yes_no(options) -> bool:
    return sorted(option.lower() for option in options) == ["no", "yes"]


def chosen_option(text: str, options: tuple[str, ...]) -> int | None:
    """
    The option that an answer names. It never guesses.

    Accepted are a letter alone, at the start before `)`, `.` or `:`, or after "answer" or "option"; the words of an
    option alone; and for yes and no, the first word. "A man is walking" names no letter.

    Args:
        text (`str`):
            The answer.
        options (`tuple[str, ...]`):
            The options, of which the first has the letter A.

    Returns:
        `int` or `None`: the number of the option, from 0, or `None` if the answer names none or several.
    """
    text = text.strip()
    words = [plain(option) for option in options]
    if is_yes_no(options):
        said = re.findall(r"\w+", text.lower())
        is_clear = len({"yes", "no"} & set(said)) == 1 and said[0] in words
        return words.index(said[0]) if is_clear else None
    if words.count(plain(text)) == 1:
        return words.index(plain(text))
    letters = LETTERS[: len(options)]
    lettered = re.match(rf"\W*([{letters}])\b", text)
    if lettered and plain(text[lettered.end() :]) == words[letters.index(lettered[1])]:
        return letters.index(lettered[1])
    letter = f"[{letters}]"
    bracketed = rf"\(({letter})\)|\[({letter})\]|\*\*({letter})\*\*"
    patterns = (
        rf"^\W*({letter}|{letter.lower()})\W*$",
        rf"^(?:{bracketed}|({letter})[).:])(?!\w)",
        rf"\b(?:[Aa]nswer|ANSWER|[Oo]ption|OPTION)(?: is|:| is:)? *(?:{bracketed}|({letter})(?=\W*$|[).:,;]))",
    )
    named = [group for pattern in patterns for group in found(pattern, text)]
    # Any other letter makes it unclear. "A" and "I" are words, too.
    others = found(bracketed, text) + [other for other in found(rf"\b({letter})\b", text) if other not in "AI"]
    if named and len({group.upper() for group in named + others}) == 1:
        return letters.index(named[0].upper())
    return None


def found(pattern: str, text: str) -> list[str]:
    """What stands in any group of the pattern."""
    return [group for match in re.finditer(pattern, text) for group in match.groups() if group]


def plain(text: str) -> str:
    """Lower case, without punctuation at the ends and double spaces."""
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'()[]*").lower()
