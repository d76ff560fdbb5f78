"""What a request may say: OpenAI's chat completions, with videos."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import RequestError, too_large
from .settings import ServerSettings


MOST_VALUES = 1_000_000  # in a request's JSON; each takes far more memory than its text
LONGEST_TEXT = 1_000_000  # characters of all messages together
MOST_FIELDS = 64  # of one object, which has fewer; each unknown one would be a fault of its own
MOST_PARTS = 10_000  # of all messages together; a template takes its time for each
# Fields that clients send although they ask for nothing: accepted with these values only.
NEUTRAL: dict[str, list] = {
    "n": [1],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logprobs": [False],
    "store": [False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "logit_bias": [{}],
    "metadata": [{}],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
}


class Strict(BaseModel):
    """No unknown fields, no conversions; a field that is null is one that is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "it has more fields than there are.")
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class FrameSettings(Strict):
    """All that a request may say of how its videos are read."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None

    @property
    def frames(self) -> dict[str, float]:
        given = {"num_frames": self.num_frames, "fps": self.fps, "max_frames": self.max_frames}
        return {name: value for name, value in given.items() if value is not None}


class Address(Strict):
    url: Annotated[str, Field(min_length=1)]
    detail: str | None = None  # of OpenAI's image_url; all pictures have one size here


class TextPart(Strict):
    type: Literal["text"]
    text: str


class MediaPart(Strict):
    """A picture or video. What it names is in the field that is called like its type."""

    @property
    def url(self) -> str:
        given = getattr(self, self.type)
        return given if isinstance(given, str) else given.url


class ImageUrlPart(MediaPart):
    type: Literal["image_url"]
    image_url: Address | str


class ImagePart(MediaPart):
    type: Literal["image"]
    image: str


class VideoUrlPart(MediaPart, FrameSettings):
    type: Literal["video_url"]
    video_url: Address | str


class VideoPart(MediaPart, FrameSettings):
    type: Literal["video"]
    video: str


Part = Annotated[TextPart | ImageUrlPart | ImagePart | VideoUrlPart | VideoPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), Field(max_length=1000)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def with_parts(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("content"), str):
            return {**given, "content": [{"type": "text", "text": given["content"]}]}
        return given


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none


class ChatRequest(Strict):
    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    mm_processor_kwargs: FrameSettings = FrameSettings()
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if not any(value == v for v in NEUTRAL.get(key, ()))}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def media(self) -> list:
        return [part for message in self.messages for part in message.content if part.type != "text"]


def read_request(body: bytes, settings: ServerSettings) -> ChatRequest:
    """
    Reads and checks the body of a request.

    Raises:
        RequestError: 400 for what is not JSON or not supported, 404 for another model, 413 above a limit.
    """
    if (values := sum(map(body.count, (b",", b"[", b"{")))) > MOST_VALUES:
        raise too_large("the number of values in the request", values, MOST_VALUES)
    try:
        given = json.loads(body, parse_constant=no_number)
        asked = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise described(error) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not valid JSON ({error}).", code="invalid_json") from error
    if asked.model != settings.model_name:
        message = f"there is no model {asked.model[:200]!r} here, only {settings.model_name!r}."
        raise RequestError(404, message, "model", "model_not_found")
    if asked.max_completion_tokens is not None:
        asked.max_tokens = asked.max_completion_tokens
    if (wanted := asked.max_tokens or 0) > settings.max_new_tokens:
        message = f"max_tokens is {wanted}, and this server's longest answer has {settings.max_new_tokens} tokens."
        raise RequestError(400, message, "max_tokens")
    if len(asked.stops) > 4 or not all(0 < len(stop) <= 1000 for stop in asked.stops):
        raise RequestError(400, "stop is one text or up to four, none of them empty.", "stop")
    if asked.stream_options is not None and not asked.stream:
        raise RequestError(400, "stream_options are for stream=true.", "stream_options")
    if (count := len(asked.media)) > settings.max_media:
        raise too_large("the number of videos and pictures", count, settings.max_media, "messages")
    if (count := sum(len(message.content) for message in asked.messages)) > MOST_PARTS:
        raise too_large("the number of parts of the messages", count, MOST_PARTS, "messages")
    texts = [part.text for message in asked.messages for part in message.content if part.type == "text"]
    if (length := sum(map(len, texts))) > LONGEST_TEXT:
        raise too_large("the number of characters in the messages", length, LONGEST_TEXT, "messages")
    try:
        "".join([*texts, *asked.stops]).encode()
    except UnicodeEncodeError as error:
        raise RequestError(400, "a text has half a character, a surrogate without its other half.") from error
    return asked


def no_number(name: str):
    raise ValueError(f"{name} is not a number of JSON")


def described(error: ValidationError) -> RequestError:
    """The first fault, with the name of its field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"]))[:200] or None
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"{param} is not supported by this server.", param, "unsupported_parameter")
    return RequestError(400, f"{param or 'the request'}: {first['msg'][:500]}.", param)
