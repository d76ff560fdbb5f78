"""What the judge uses of the package `openai`, where that is not installed. `use()` puts it in its place."""

import importlib.util
import json
import sys
import types
import urllib.error
import urllib.request
from http.client import HTTPException


class APIError(Exception):
    code = type = None

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


class APIStatusError(APIError):
    def __init__(self, status: int, body: str, headers):
        super().__init__(body)
        self.status_code, self.response = status, types.SimpleNamespace(headers=headers)
        try:
            error = json.loads(body)["error"]
            self.code, self.type, self.message = error.get("code"), error.get("type"), error["message"]
        except (ValueError, KeyError, TypeError):
            pass


class OpenAI:
    def __init__(self, api_key: str, base_url: str, max_retries: int, timeout: float):
        self.base_url, self.timeout, self.key = base_url, timeout, api_key
        self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=self.create))

    def create(self, model: str, messages: list, extra_body: dict):
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions",
            json.dumps({"model": model, "messages": messages, **extra_body}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read(), object_hook=lambda fields: types.SimpleNamespace(**fields))
        except urllib.error.HTTPError as error:
            raise APIStatusError(error.code, error.read().decode(), error.headers) from error
        except (OSError, HTTPException) as error:
            raise APIError(str(error)) from error


def use(monkeypatch) -> None:
    if importlib.util.find_spec("openai") is None:
        monkeypatch.setitem(sys.modules, "openai", sys.modules[__name__])
