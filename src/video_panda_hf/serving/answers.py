"""Tokens → the text of an answer, while they come."""

import threading
from collections.abc import Callable


class AnswerText:
    """
    A streamer for `generate`. What it has sent never changes: it is always a beginning of the whole answer.

    Args:
        decode (`Callable`):
            Tokens → text.
        stops (`list[str]`):
            Texts at which the answer ends. They are not part of it.
        send (`Callable`):
            Gets each new piece of text.
        done (`threading.Event`):
            Is set at a stop.
    """

    def __init__(self, decode: Callable, stops: list[str], send: Callable[[str], None], done: threading.Event):
        self.decode, self.stops, self.send, self.done = decode, stops, send, done
        self.ids: list[int] = []
        self.text, self.sent, self.stopped = "", 0, False
        self.is_prompt = True

    def put(self, ids) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += ids.flatten().tolist()
        self._update(is_whole=False)

    def end(self) -> None:
        self._update(is_whole=True)

    def _update(self, is_whole: bool) -> None:
        if self.stopped:
            return
        self.text = self.decode(self.ids, skip_special_tokens=True).lstrip()
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            self.done.set()
        if is_whole or self.stopped:
            self.text = certain = self.text.rstrip()
        else:  # the last characters may belong to a stop, or change with the next token
            longest = max((len(stop) for stop in self.stops), default=1) - 1
            certain = self.text[: len(self.text) - longest].rstrip("\ufffd").rstrip()
        if len(certain) > self.sent:
            self.send(certain[self.sent :])
            self.sent = len(certain)
