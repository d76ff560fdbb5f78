"""Whatever a request says or names, it is read or refused, and nothing else happens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from video_panda_hf.serving import ServerSettings
from video_panda_hf.serving.errors import RequestError
from video_panda_hf.serving.media import Media, open_media
from video_panda_hf.serving.network import Download
from video_panda_hf.serving.requests import ChatRequest, read_request


SETTINGS = ServerSettings("panda")
FIELDS = sorted({*ChatRequest.model_fields, "n", "tools", "chat_template"})
WORDS = ["user", "text", "video_url", "image", "url", "type", "role", "content", "panda", "num_frames", "data:,", ""]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner),
    max_leaves=4,
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "video_url", "video"])}) | VALUES
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES | st.just("user"), "content": st.lists(PARTS) | VALUES}))
REQUESTS = st.fixed_dictionaries(
    {"model": st.just("panda") | VALUES, "messages": MESSAGES | VALUES},
    optional={name: VALUES for name in FIELDS if name not in ("model", "messages")},
)
QUICK = settings(derandomize=True, deadline=None, max_examples=40, database=None)


@QUICK
@given(REQUESTS | VALUES)
def test_any_json_is_read_or_refused(asked):
    try:
        found = read_request(json.dumps(asked).encode(), SETTINGS)
    except RequestError as error:
        assert error.status in (400, 404, 413) and error.message and json.dumps(error.body)
    else:
        assert found.model == "panda" and found.messages


@QUICK
@given(st.binary(max_size=40))
def test_any_bytes_are_refused(body):
    with pytest.raises(RequestError) as refused:
        read_request(body, SETTINGS)
    assert refused.value.status == 400


ADDRESSES = st.lists(
    st.sampled_from(
        ["http://", "file://", "data:", ";base64,", "/", "..", "clip.mp4", "a", "%2e", "@", "[::1]", ":80"]
    )
    | st.text(max_size=3),
    max_size=6,
).map("".join)


@QUICK
@given(ADDRESSES)
def test_any_address_is_opened_or_refused(tmp_path_factory, url):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "clip.mp4").write_bytes(b"clip")
    (folder.parent / "a").write_bytes(b"secret")
    try:
        found = open_media(url, ServerSettings("panda", allowed_local_media_path=str(folder)))
        if isinstance(found, Media):
            with found:
                assert found.read() == b"clip"
        elif isinstance(found, Download):
            found.run()
        else:
            assert isinstance(found, bytes) and url.lower().startswith("data:")
    except RequestError as error:
        assert error.status in (400, 403) and json.dumps(error.body)
