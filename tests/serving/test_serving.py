"""The server's answers: those of `generate`, in OpenAI's form, for one request and for many."""

import base64
import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpers.server import MODEL, request_of, serving, shipped, video, web_server
from video_panda_hf import SHIPPED_CLIPS
from video_panda_hf.decoding import decode_video
from video_panda_hf.serving import ServerSettings, create_app


CLIPS = {path.name.split("_")[0]: path for path in sorted(SHIPPED_CLIPS.glob("*.mp4"))}  # <colour>_….mp4
DESCRIBE, COLOUR = "Describe the video.", "What colour is the shape?"


@pytest.fixture(scope="module")
def server():
    with serving(allowed_local_media_path=str(SHIPPED_CLIPS)) as server:
        yield server


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


RED = data_url(CLIPS["red"].read_bytes())


def photo_url(tmp_path) -> str:
    frames, _ = decode_video(CLIPS["green"], indices=[0])
    Image.fromarray(frames[0]).save(tmp_path / "photo.png")
    return data_url((tmp_path / "photo.png").read_bytes(), "image/png")


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def inputs_of(messages: list, **settings):
    return shipped()[1].apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def expected(messages: list) -> tuple[str, int, int]:
    """The answer of `generate`, and the tokens of prompt and answer. Its videos are given in `messages` as files."""
    model, processor = shipped()
    inputs = inputs_of(messages)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:]
    return processor.decode(ids, skip_special_tokens=True).strip(), length, len(ids)


def conversations(tmp_path) -> dict[str, tuple[list, list]]:
    """Messages as a client writes them, and the same for the processor."""
    url, photo = photo_url(tmp_path), str(tmp_path / "photo.png")

    def clip(colour):
        return {"type": "video", "path": str(CLIPS[colour])}

    def text(words):
        return {"type": "text", "text": words}

    before = [{"role": "user", "content": [video("red_circle_left.mp4"), text(COLOUR)]}]
    before_here = [{"role": "user", "content": [clip("red"), text(COLOUR)]}]
    later = [{"role": "assistant", "content": "It is red."}, {"role": "user", "content": DESCRIBE}]
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    return {
        "text": ([{"role": "user", "content": "Hello?"}], [{"role": "user", "content": "Hello?"}]),
        "picture": (
            [{"role": "user", "content": [picture, text(COLOUR)]}],
            [{"role": "user", "content": [{"type": "image", "path": photo}, text(COLOUR)]}],
        ),
        "two videos": (
            [{"role": "user", "content": [video("blue_cross_upwards.mp4"), video(RED), text(DESCRIBE)]}],
            [{"role": "user", "content": [clip("blue"), clip("red"), text(DESCRIBE)]}],
        ),
        "a conversation": (before + later, before_here + later),
        "a system message": (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [video(RED), text(DESCRIBE)]}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [clip("red"), text(DESCRIBE)]}],
        ),
        "other words for parts": (
            [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": RED}, {"type": "image", "image": url}, text("?")],
                }
            ],
            [{"role": "user", "content": [clip("red"), {"type": "image", "path": photo}, text("?")]}],
        ),
        "special tokens are text": (
            [{"role": "user", "content": [video(RED), text("<video> <row> <image>?")]}],
            [{"role": "user", "content": [clip("red"), text("<video> <row> <image>?")]}],
        ),
    }


def test_answers_are_those_of_generate_streamed_or_not(server, tmp_path):
    for name, (messages, here) in conversations(tmp_path).items():
        words, prompt_tokens, tokens = expected(here)
        status, answer = server.post({"model": MODEL, "messages": messages, "max_tokens": 12})
        assert (status, text_of(answer)) == (200, words), name
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
        assert answer["usage"] == {**usage, "total_tokens": prompt_tokens + tokens}
        assert answer["object"] == "chat.completion" and answer["model"] == MODEL

        events = stream(server, messages=messages, stream_options={"include_usage": True}, max_tokens=12)
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]) == words
        assert events[-1]["usage"] == answer["usage"] and events[-1]["choices"] == []
        assert events[-2]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]


def stream(server, **fields) -> list[dict]:
    body = json.dumps({"model": MODEL, "stream": True, **fields}).encode()
    status, headers, answer = server.send(
        "POST", "/v1/chat/completions", body, {"Content-Type": "application/json; charset=utf-8"}
    )
    assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    lines = answer.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]


def test_a_stream_comes_in_pieces_that_begin_with_the_role(server):
    events = stream(server, messages=request_of(video(RED), DESCRIBE)["messages"])
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and len(deltas) > 5
    assert deltas[1]["content"][0] != " " and not any("usage" in event for event in events)
    assert len({event["id"] for event in events}) == 1


def test_the_client_of_openai_can_ask_it():
    openai = pytest.importorskip("openai")
    with serving(api_key="sesame") as server:
        client = openai.OpenAI(base_url=f"http://localhost:{server.port}/v1", api_key="sesame", max_retries=0)
        asked = {"model": MODEL, "messages": request_of(video(RED), DESCRIBE)["messages"]}
        answer = client.chat.completions.create(**asked, temperature=0)
        assert answer.choices[0].message.content == "A red circle moves to the left."
        pieces = client.chat.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "A red circle moves to the left."
        again = [*asked["messages"], answer.choices[0].message.model_dump(), {"role": "user", "content": COLOUR}]
        assert "red" in client.chat.completions.create(model=MODEL, messages=again).choices[0].message.content
        assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.chat.completions.create(**{**asked, "model": "other"})
        with pytest.raises(openai.BadRequestError, match="n is not supported"):
            client.chat.completions.create(**asked, n=2)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_a_seed_gives_one_answer_and_sampling_gives_many(server):
    def sampled(seed, **fields):
        status, answer = server.ask("Hello?", max_tokens=4, seed=seed, **fields)
        assert status == 200
        return text_of(answer)

    first = [sampled(seed, temperature=2) for seed in range(3)]
    assert first == [sampled(seed, temperature=2.0) for seed in range(3)] and len(set(first)) > 1
    greedy = sampled(0, temperature=0)
    assert {sampled(seed, temperature=2, top_p=1e-6) for seed in range(2)} == {greedy}


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-40, 9e-6])
def test_the_coldest_answer_is_the_likeliest(temperature, server):
    """Scores that are divided by next to nothing are infinite, and no token can be drawn."""
    status, answer = server.ask("What is it?", max_tokens=3, temperature=temperature, seed=1)
    assert (status, text_of(answer)) == (200, text_of(server.ask("What is it?", max_tokens=3, temperature=0)[1]))


def test_an_answer_ends_at_a_stop_or_at_the_longest_length(server):
    whole = "A red circle moves to the left."
    for stop, words in ((" moves", "A red circle"), (["left", "circle"], "A red"), ("none", whole), (["A", "."], "")):
        status, answer = server.ask(video(RED), DESCRIBE, stop=stop)
        assert (status, text_of(answer)) == (200, words)
        assert answer["choices"][0]["finish_reason"] == "stop"
        events = stream(server, messages=request_of(video(RED), DESCRIBE)["messages"], stop=stop)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == words
    for name in ("max_tokens", "max_completion_tokens"):
        _, answer = server.ask(video(RED), DESCRIBE, **{name: 3})
        assert text_of(answer) == "A red circle" and answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


def test_a_request_may_choose_frames_and_nothing_else(server):
    content = [{"type": "video", "path": str(CLIPS["red"])}, {"type": "text", "text": DESCRIBE}]

    def prompt_tokens(part_settings, **fields):
        status, answer = server.ask(video(RED, **part_settings), DESCRIBE, max_tokens=1, **fields)
        assert status == 200, answer
        return answer["usage"]["prompt_tokens"]

    for settings in ({"num_frames": 4}, {"num_frames": 16}, {"fps": 4}, {"fps": 8, "max_frames": 12}):
        length = inputs_of([{"role": "user", "content": content}], **settings)["input_ids"].shape[1]
        assert prompt_tokens(settings) == prompt_tokens({}, mm_processor_kwargs=settings) == length
    assert prompt_tokens({"num_frames": 4}, mm_processor_kwargs={"fps": 2, "max_frames": 8}) == prompt_tokens(
        {"num_frames": 4}
    )
    assert prompt_tokens({"fps": 8}, mm_processor_kwargs={"fps": 2, "max_frames": 12}) == length
    for settings, words in (({"num_frames": 3}, "multiple of 4"), ({"num_frames": 4, "fps": 1}, "mutually exclusive")):
        status, answer = server.ask(video(RED, **settings), DESCRIBE)
        assert status == 400 and words in answer["error"]["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 1},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"num_frames": 16}},
        {"decode_limits": {"max_seconds": 9e9}},
        {"generation_config": "{}"},
        {"mm_processor_kwargs": {"decode_limits": {"max_pixels": None}}},
        {"mm_processor_kwargs": {"size": {"longest_edge": 44800}}},
    ],
    ids=lambda field: json.dumps(field)[2:34],
)
def test_what_is_not_supported_is_a_400_that_names_it(field, server):
    status, answer = server.ask("Hello?", **field)
    ((name, value),) = field.items()
    path = f"{name}.{next(iter(value))}" if name == "mm_processor_kwargs" else name
    assert status == 400 and answer["error"]["code"] == "unsupported_parameter"
    assert answer["error"]["param"] == path and f"{path} is not supported" in answer["error"]["message"]


def test_a_setting_beside_a_video_that_is_not_of_frames_is_refused(server):
    for settings in ({"start": 1}, {"strict": False}, {"pixels": "displayed"}, {"limits": {}}, {"indices": [0]}):
        status, answer = server.ask(video(RED, **settings), DESCRIBE)
        assert status == 400 and "is not supported" in answer["error"]["message"]


def test_fields_that_ask_for_nothing_are_accepted(server):
    status, answer = server.ask(
        video(RED), DESCRIBE, n=1, tools=[], logprobs=False, user="ann", stop=None, stream=False, presence_penalty=0
    )
    assert (status, text_of(answer)) == (200, "A red circle moves to the left.")


MALFORMED = {
    "no JSON": b'{"model": "panda", "messages": [',
    "another type": b"[1]",
    "nothing": b"",
    "no UTF-8": b'{"model": "\xff\xfe\xfd"}',
    "half a character": b'{"model": "panda", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "nesting": b"[" * 100_000,
    "nesting in a field": b'{"model": "panda", "messages": ' + b'{"role":' * 100_000,
    "NaN": b'{"model": "panda", "messages": [{"role": "user", "content": "?"}], "temperature": NaN}',
    "a long number": b'{"model": "panda", "seed": ' + b"9" * 10_000 + b"}",
    "no messages": b'{"model": "panda", "messages": []}',
    "no content": b'{"model": "panda", "messages": [{"role": "user"}]}',
    "a role": b'{"model": "panda", "messages": [{"role": "root", "content": "?"}]}',
    "a kind": b'{"model": "panda", "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}',
    "a number": b'{"model": "panda", "messages": [{"role": "user", "content": 7}]}',
    "a video that is a list": b'{"model": "panda", "messages": [{"role": "user", "content": '
    b'[{"type": "video_url", "video_url": ["a", "b"]}]}]}',
    "a truth for a number": b'{"model": "panda", "max_tokens": true, "messages": [{"role": "user", "content": "?"}]}',
    "temperature": b'{"model": "panda", "temperature": 3, "messages": [{"role": "user", "content": "?"}]}',
    "many stops": b'{"model": "panda", "stop": ["1", "2", "3", "4", "5"], "messages": '
    b'[{"role": "user", "content": "?"}]}',
    "faults without number": b'{"model": "panda", "messages": [' + b"{}," * 400_000 + b"{}]}",
    "a long name": b'{"model": "panda", "' + b"x" * 10**6 + b'": 1, "messages": [{"role": "user", "content": "?"}]}',
    "fields without number": b'{"model": "panda", "messages": [{"role": "user", "content": "?"}], '
    b'"mm_processor_kwargs": {' + b",".join(b'"%d": 1' % number for number in range(100_000)) + b"}}",
    "half a character in a stop": b'{"model": "panda", "stop": "\\ud800", "messages": '
    b'[{"role": "user", "content": "?"}]}',
    "an empty stop": b'{"model": "panda", "stop": "", "messages": [{"role": "user", "content": "?"}]}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_a_400_in_the_form_of_openai(name, server):
    status, answer = server.post(MALFORMED[name])
    assert status == 400
    assert answer["error"].keys() == {"message", "type", "param", "code"} and answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and len(json.dumps(answer)) < 1000


def test_other_paths_models_and_kinds_of_content_are_refused(server):
    assert server.ask("?", model="other") == (
        404,
        {
            "error": {
                "message": "there is no model 'other' here, only 'panda'.",
                "type": "not_found_error",
                "param": "model",
                "code": "model_not_found",
            }
        },
    )
    for method, path, status in (
        ("POST", "/load_model", 404),
        ("POST", "/reset", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
    ):
        found, _, body = server.send(method, path)
        assert found == status and path in json.loads(body)["error"]["message"]
    # As a page of a stranger could send it without being asked
    assert server.post(request_of("?"), {"Content-Type": "text/plain"})[0] == 415
    status, _, body = server.send("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(body)["data"]] == [MODEL]


# Limits


def test_counts_and_lengths_have_limits(server):
    assert server.engine.settings.max_media == 8
    status, answer = server.ask(*[video(RED)] * 9)
    assert status == 413 and "videos and pictures: 9, above this server's limit of 8" in answer["error"]["message"]
    for settings in ({"num_frames": 132}, {"fps": 30, "max_frames": 132}):
        status, answer = server.ask(video(RED, **settings), DESCRIBE)
        assert status == 413 and "132, above this server's limit of 128" in answer["error"]["message"]
    assert server.ask(video(RED, num_frames=64), video(RED, num_frames=68))[0] == 413
    status, answer = server.ask("?", max_tokens=1025)
    assert status == 400 and answer["error"]["param"] == "max_tokens"
    assert server.ask("x" * 1_000_001)[0] == 413
    assert server.post(b'{"model": [' + b"0," * 1_000_001 + b"0]}")[0] == 413
    parts = [{"type": "text", "text": ""}] * 1000
    status, answer = server.post({"model": "panda", "messages": [{"role": "user", "content": parts}] * 11})
    assert status == 413 and "parts of the messages: 11000, above" in answer["error"]["message"]
    status, answer = server.ask("word " * 20_000)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_videos_sampled_by_rate_share_the_frames_of_a_request():
    def frames(limit, *settings):
        with serving(max_frames=limit) as server:
            status, answer = server.ask(*[video(RED, **given) for given in settings], DESCRIBE, max_tokens=1)
        assert status == 200, answer
        return answer["usage"]["prompt_tokens"]

    # 22 frames in 2.75 s
    assert frames(28, {"fps": 8}, {"num_frames": 16}) == frames(28, {"num_frames": 12}, {"num_frames": 16})
    assert frames(16, {"fps": 8}, {"fps": 8}) == frames(16, {"num_frames": 8}, {"num_frames": 8})


def test_a_large_request_is_refused_before_it_is_read(server):
    size = 500 * 10**6
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + b'{"model": "data:video/mp4;base64,')
        answer = sock.recv(4096)
        while b"limit" not in answer:
            answer += sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413") and b"500000000, above this server's limit of 67108864" in answer
    assert server.wait_until(lambda: not server.engine.jobs)


def test_a_request_without_a_declared_size_is_cut_off_at_the_limit():
    with serving(max_request_bytes=10_000) as server:
        taken, connection = [], server.connect()

        def endless():
            while len(taken) < 5000:
                taken.append(1)
                yield b"[" * 1000

        connection.request(
            "POST", "/v1/chat/completions", endless(), {"Content-Type": "application/json"}, encode_chunked=True
        )
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask("Hello?" * 10, max_tokens=1)[0] == 200
        assert server.post(request_of("x" * 10_000))[0] == 413


def test_a_request_with_two_lengths_is_refused_and_what_follows_not_read(server):
    """A proxy may see one request where the server sees two. Room for bodies is counted by the declared length."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    hidden = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for lengths in (
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(f"{head}{lengths}\r\n\r\n0\r\n\r\n{hidden}".encode())
            answer = b""
            while part := sock.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 400") and b"not both" in answer
        assert answer.count(b"HTTP/1.1") == 1 and b"owned_by" not in answer


def test_bodies_that_are_read_at_once_have_a_limit():
    with serving(max_request_bytes=1000) as server:
        begun = []
        for _ in range(4):
            sock = socket.create_connection(("127.0.0.1", server.port))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 900\r\n\r\n".encode())
            begun.append(sock)
        time.sleep(0.1)
        status, answer = server.ask("?" * 800)
        assert (status, answer["error"]["code"]) == (503, "busy")
        for sock in begun:
            sock.close()
        assert server.wait_until(lambda: server.ask("?" * 800, max_tokens=1)[0] == 200)


def test_more_requests_than_fit_are_told_to_try_again():
    with web_server({"/slow": lambda handler: time.sleep(1)}) as web:
        open_settings = {"allowed_media_domains": ("127.0.0.1",), "allow_private_networks": True}
        with serving(max_requests=1, max_media_seconds=5, **open_settings) as server:
            waiting = server.begin(video(f"{web.url}/slow"), "?")
            assert server.wait_until(lambda: web.requests == ["/slow"])
            status, headers, body = server.send(
                "POST", "/v1/chat/completions", json.dumps(request_of("?")).encode(), JSON
            )
            assert (status, headers["Retry-After"]) == (503, "2") and json.loads(body)["error"]["code"] == "busy"
            assert server.send("GET", "/health")[0] == 200
            waiting.close()


JSON = {"Content-Type": "application/json"}


# Who may ask


def test_a_key_is_asked_for_everywhere_but_at_health():
    with serving(api_key="sésame") as server:
        key = "Bearer sésame".encode().decode("latin-1")
        for given in ("", "Bearer", "Bearer sesame", "Bearer sésame2", "Basic sésame", "sésame"):
            given = given.encode().decode("latin-1")
            status, headers, body = server.send("GET", "/v1/models", headers={"Authorization": given})
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["type"] == "authentication_error"
            assert server.post(request_of("?"), {"Authorization": given})[0] == 401
        assert server.send("GET", "/v1/models", headers={"Authorization": key})[0] == 200
        assert server.post(request_of("?", max_tokens=1), {"Authorization": key})[0] == 200
        assert server.send("GET", "/health")[0] == 200


def test_a_foreign_host_is_refused(server):
    for host, status in {
        "localhost": 200,
        f"localhost:{server.port}": 200,
        "127.0.0.1:1": 200,
        "[::1]:80": 200,
        "evil.example": 403,
        "localhost.evil.example": 403,
        "evil.example:8000": 403,
        "127.0.0.1.evil.example": 403,
        "192.168.0.1": 403,
        "": 403,
    }.items():
        assert server.send("GET", "/health", headers={"Host": host})[0] == status, host
    with serving(allowed_hosts=("Panda.example",)) as other:
        assert other.send("GET", "/health", headers={"Host": "panda.example:443"})[0] == 200
        assert other.send("GET", "/health", headers={"Host": "evil.example"})[0] == 403


def test_pages_of_others_may_ask_only_where_they_are_allowed(server):
    asking = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = server.send("OPTIONS", "/v1/chat/completions", headers=asking)
    assert status == 405 and "Access-Control-Allow-Origin" not in headers
    _, headers, _ = server.send("GET", "/v1/models", headers={"Origin": "https://page.example"})
    assert "Access-Control-Allow-Origin" not in headers
    with serving(allowed_origins=("https://page.example",), api_key="k") as other:
        status, headers, _ = other.send("OPTIONS", "/v1/chat/completions", headers=asking)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://page.example")
        status, headers, _ = other.send(
            "OPTIONS", "/v1/chat/completions", headers={**asking, "Origin": "https://evil.example"}
        )
        assert "Access-Control-Allow-Origin" not in headers


# Many at once, and clients that go away


def test_twenty_requests_at_once_get_each_their_own_answer(server):
    colours = [("red", "green", "blue")[number % 3] for number in range(20)]

    def ask(colour):
        source = data_url(CLIPS[colour].read_bytes()) if colour == "blue" else CLIPS[colour]
        return server.ask(video(source), COLOUR)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, colours))
    assert [(status, text_of(answer)) for status, answer in answers] == [
        (200, f"It is {colour}.") for colour in colours
    ]
    assert server.wait_until(lambda: not server.engine.jobs)


def test_generation_ends_when_the_client_goes_away(server, monkeypatch):
    model, _ = shipped()
    monkeypatch.setattr(model.generation_config, "min_new_tokens", 900)  # seconds of work
    tokens = []
    generate = server.engine.generate
    monkeypatch.setattr(server.engine, "generate", lambda *given: tokens.append(generate(*given)) or tokens[-1])
    for stream_it in (True, False):
        sock = server.begin("Hello?", stream=stream_it, max_tokens=1000)
        if stream_it:
            assert b"200" in sock.recv(1000)
        assert server.wait_until(lambda: any(job.running for job in server.engine.jobs))
        time.sleep(0.1)
        sock.close()
        assert server.wait_until(lambda: not server.engine.jobs, 2)
        assert tokens.pop().completion_tokens < 900
    monkeypatch.undo()
    assert server.ask(video(RED), DESCRIBE)[0] == 200


def test_a_client_that_goes_away_leaves_no_traceback(server, caplog):
    for number in range(12):
        sock = server.begin(video(RED), DESCRIBE, stream=number % 2 == 0)
        server.wait_until(lambda: server.engine.jobs, 0.2)
        sock.close()
    assert server.wait_until(lambda: not server.engine.jobs)
    gc.collect()  # what nobody asked for is told then
    assert server.ask("?", max_tokens=1)[0] == 200 and not caplog.records


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_connection_without_a_request_is_closed(sent, monkeypatch):
    from video_panda_hf.serving import app

    monkeypatch.setattr(app, "HEAD_SECONDS", 0.2)
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(sent)
        answer = sock.makefile("rb").read()  # until the server closes it
        assert answer.count(b"HTTP/1.1 200 OK") == sent.count(b"\r\n\r\n")


def test_a_client_that_goes_away_while_it_sends_leaves_nothing(server):
    for sent in (b"", b'{"model": "pan', b'{"model": "panda"'):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + sent)
    assert server.wait_until(lambda: server.send("GET", "/health")[0] == 200 and not server.engine.jobs)


def test_slow_addresses_stop_neither_health_nor_other_requests():
    done = threading.Event()
    with web_server({"/slow": lambda handler: done.wait(20)}) as web:
        open_settings = {"allowed_media_domains": ("127.0.0.1",), "allow_private_networks": True}
        with serving(max_media_seconds=20, **open_settings) as server:
            waiting = [server.begin(video(f"{web.url}/slow"), video(f"{web.url}/slow"), "?") for _ in range(12)]
            assert server.wait_until(lambda: len(web.requests) == 24)
            begun = time.monotonic()
            assert server.send("GET", "/health")[0] == 200
            assert time.monotonic() - begun < 1
            status, answer = server.ask(video(RED), DESCRIBE)
            assert (status, text_of(answer)) == (200, "A red circle moves to the left.")
            assert time.monotonic() - begun < 10
            for sock in waiting:
                sock.close()
            assert server.wait_until(lambda: not server.engine.jobs, 3)  # their downloads have ended too
            done.set()


def test_the_end_of_the_server_ends_answers_that_would_take_long(monkeypatch, caplog):
    from video_panda_hf.serving import app

    model, _ = shipped()
    monkeypatch.setattr(model.generation_config, "min_new_tokens", 900)
    monkeypatch.setattr(app, "SHUTDOWN_SECONDS", 0.2)
    with serving() as server:
        begun = [server.begin("Hello?", max_tokens=1000, stream=stream_it) for stream_it in (True, False, False)]
        assert server.wait_until(lambda: len(server.engine.jobs) == 3)
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 2 and not server.engine.jobs and not caplog.records
    for sock in begun:
        answer = sock.makefile("rb").read()
        assert b"the request was stopped" in answer
        assert answer.startswith(b"HTTP/1.1 503" if sock is not begun[0] else b"HTTP/1.1 200")
        sock.close()


def test_the_end_of_the_server_does_not_wait_for_a_video(monkeypatch, caplog):
    """What decodes cannot be told to end."""
    from video_panda_hf.serving import app

    monkeypatch.setattr(app, "SHUTDOWN_SECONDS", 0.2)
    decoding, done = threading.Semaphore(0), threading.Event()
    with serving() as server:
        monkeypatch.setattr(server.engine, "prepare", lambda *_: decoding.release() or done.wait(60))
        begun = [server.begin("Hello?", stream=number == 0) for number in range(4)]  # two of them wait for a thread
        for _ in range(2):
            decoding.acquire()
        assert server.wait_until(lambda: len(server.engine.jobs) == 4)
    done.set()
    for sock in begun:
        answer = sock.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503") and b"the request was stopped" in answer
        sock.close()
    gc.collect()
    assert not server.engine.jobs and not caplog.records


# Faults


def test_a_fault_of_a_decoder_is_a_400_and_one_of_ours_a_500(server, monkeypatch, caplog):
    from video_panda_hf import decoding

    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(decoding, "decode_video_or_picture", fails)
    status, answer = server.ask(video(RED), DESCRIBE)
    assert status == 400 and "cannot be read (ZeroDivisionError)" in answer["error"]["message"]
    monkeypatch.undo()
    monkeypatch.setattr(server.engine, "generate", fails)
    status, answer = server.ask(video(RED), DESCRIBE)
    assert (status, answer["error"]["type"]) == (500, "server_error") and "Zero" not in answer["error"]["message"]
    body = json.dumps(request_of("?", stream=True)).encode()
    assert b"the server failed" in server.send("POST", "/v1/chat/completions", body, JSON)[2]
    assert "ZeroDivisionError" in caplog.text
    assert server.wait_until(lambda: not server.engine.jobs)


def test_a_large_picture_or_a_broken_file_is_told_by_the_decoder(server, tmp_path):
    Image.fromarray(np.zeros((4097, 2400), np.uint8)).save(tmp_path / "large.png")
    large = data_url((tmp_path / "large.png").read_bytes(), "image/png")
    status, answer = server.ask({"type": "image_url", "image_url": {"url": large}}, "?")
    assert (status, answer["error"]["code"]) == (413, "too_large") and "number of pixels" in answer["error"]["message"]
    for content, words in (
        (b"no video at all", "not a video in a known format"),
        (b"", "is empty"),
        (CLIPS["red"].read_bytes()[:2000], "cut off"),
    ):
        status, answer = server.ask(video(data_url(content)), "?")
        assert (status, answer["error"]["code"]) == (400, "unreadable_media"), content[:20]
        assert words in answer["error"]["message"]


def test_decoding_that_takes_too_long_is_above_a_limit():
    with serving(max_media_seconds=1e-4) as server:
        status, answer = server.ask(video(RED), "?")
    assert status == 413 and "the work in seconds" in answer["error"]["message"]


def test_a_processor_without_a_template_is_told_at_the_start():
    model, processor = shipped()
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            create_app(model, processor, ServerSettings(MODEL))
    finally:
        processor.chat_template = template


def test_a_checkpoint_that_samples_by_rate_keeps_to_the_limit(monkeypatch):
    video_processor = shipped()[1].video_processor
    monkeypatch.setattr(video_processor, "num_frames", None)
    monkeypatch.setattr(video_processor, "fps", 8)
    content = [{"type": "video", "path": str(CLIPS["red"])}, {"type": "text", "text": DESCRIBE}]
    for limit, most, frames in ((16, None, 16), (64, None, 24), (64, 12, 12)):
        monkeypatch.setattr(video_processor, "max_frames", most)
        wanted = inputs_of([{"role": "user", "content": content}], num_frames=frames)["input_ids"].shape[1]
        with serving(max_frames=limit) as server:
            for settings in ({}, {"max_frames": frames}):
                status, answer = server.ask(video(RED, **settings), DESCRIBE, max_tokens=1)
                assert (status, answer.get("usage", answer)["prompt_tokens"]) == (200, wanted)
