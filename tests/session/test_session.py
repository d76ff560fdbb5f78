"""`VideoPandaSession` against one prompt with the whole video: the same tokens, logits and answers."""

import copy
import itertools
import re
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.tiny_models import model_with_processor
from helpers.tiny_tokenizers import chatml_tokenizer, llama_tokenizer
from helpers.video_files import VideoSpec
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL, VideoPandaSession
from video_panda_hf.processing import decode_video
from video_panda_hf.session.sampling import FrameSampler


QUESTION = "What is shown in this video?"
FRAMES, RATE = 60, 25


@pytest.fixture(scope="module", params=["llama", "qwen3", "smollm3", "shipped"])
def pair(request):
    """A model and its processor."""
    if request.param == "shipped":
        model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(SHIPPED_MODEL)
    tokenizer = llama_tokenizer(legacy=False) if request.param == "llama" else chatml_tokenizer()
    return model_with_processor(tokenizer, request.param)


@pytest.fixture(scope="module")
def llama():
    return model_with_processor(llama_tokenizer(legacy=False))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return VideoSpec("clip.mp4", "libx264", frames=FRAMES, ticks=RATE).write(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def frames(clip):
    return decode_video(clip, lambda metadata: range(metadata.total_num_frames))[0]


def content_of(*parts):
    """The content of a message: texts and dictionaries as they are, all else is a video."""
    content = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif not isinstance(part, dict):
            part = {"type": "video", "video": part}
        content.append(part)
    return content


def whole(processor, *parts, fps: float = 5.0, before: tuple = ()):
    """The inputs of one prompt with everything."""
    messages = [*before, {"role": "user", "content": content_of(*parts)}]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, fps=fps
    )


def assert_same(session, inputs, question=QUESTION):
    """The session's prompt and logits are those of `inputs`."""
    assert session.inputs_for(question)["input_ids"].tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected = session.model(**inputs).logits[0, -1]
    torch.testing.assert_close(session.logits(question), expected, rtol=0, atol=1e-4)


def generated(model, processor, inputs, **options):
    output = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)[0].strip()


# Exact


@pytest.mark.parametrize("fps", [1.0, 3.7, 25.0, 40.0])
def test_a_file_gives_the_prompt_of_the_processor(pair, clip, fps):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=fps)
    assert session.add(str(clip)) == session.num_clips == int(FRAMES / RATE * fps) // 4
    assert session.seconds == FRAMES / RATE
    assert_same(session, whole(processor, clip, QUESTION, fps=fps))


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, FRAMES), max_size=6),
    end=st.integers(1, FRAMES),
    fps=st.sampled_from([1.0, 2.0, 5.0, 7.3, 25.0]),
    asked=st.integers(0, 6),
)
def test_it_does_not_matter_how_a_video_is_cut_into_parts(llama, frames, cuts, end, fps, asked):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=fps)
    cuts = sorted({min(cut, end) for cut in cuts} - {0, end})
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, end])):
        session.add(frames[start:stop], rate=RATE)
        if number == asked:
            session.ask("And now?", max_new_tokens=2)
    count = max(1, int(end / RATE * fps + 1e-6))  # the rule of the processor for a file of so many frames
    chosen = [min(int(number * RATE / fps + 1e-6), end - 1) for number in range(count)]
    chosen += [chosen[-1]] * (-count % 4)
    messages = [{"role": "user", "content": content_of(frames[chosen], QUESTION)}]
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        do_sample_frames=False,
    )
    assert_same(session, inputs)


@settings(max_examples=10, deadline=None)
@given(seconds=st.lists(st.floats(0.01, 2.39), max_size=4), fps=st.sampled_from([2.0, 7.3]))
def test_parts_of_a_file_make_the_whole_file(llama, clip, seconds, fps):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=fps)
    for start, end in itertools.pairwise([0.0, *sorted(set(seconds)), None]):
        session.add(clip, start=start, end=end)
    assert session.seconds == pytest.approx(FRAMES / RATE)
    assert_same(session, whole(processor, clip, QUESTION, fps=fps))


@pytest.mark.parametrize("kind", ["pil", "tensor", "one by one", "bytes"])
def test_frames_may_come_in_any_form(llama, clip, frames, kind):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    if kind == "pil":
        session.add([Image.fromarray(frame) for frame in frames], rate=RATE)
    elif kind == "tensor":
        session.add(torch.from_numpy(frames).permute(0, 3, 1, 2), rate=RATE)
    elif kind == "bytes":
        session.add(clip.read_bytes())
    else:
        for frame in frames:
            session.add(Image.fromarray(frame), rate=RATE)
    assert_same(session, whole(processor, clip, QUESTION))


def test_videos_pictures_and_text_stand_in_the_order_of_their_adding(pair, clip, frames):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(clip, end=0.9)
    session.next_video()
    session.add(frames, rate=RATE)
    session.add_text("Now a picture:")
    session.add_picture(Image.fromarray(frames[7]))
    part = {"type": "video", "video": str(clip), "start": 0, "end": 0.9}
    picture = Image.fromarray(frames[7])
    assert_same(session, whole(processor, part, clip, "Now a picture:", picture, QUESTION))


def test_what_is_remembered_is_part_of_the_prompt(pair, clip, frames):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=5.0, system=None)
    session.add(frames[:30], rate=RATE)
    first = session.ask("What is it?", remember=True, max_new_tokens=4)
    before = [
        {"role": "user", "content": content_of(frames[[0, 5, 10, 15, 20, 25, 25, 25]], "What is it?")},
        {"role": "assistant", "content": first},
    ]

    def inputs_of(*parts):
        messages = [*before, {"role": "user", "content": content_of(*parts)}]
        return processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            do_sample_frames=False,
        )

    assert_same(session, inputs_of(QUESTION))
    second = session.ask("Why?", remember=True, max_new_tokens=4)
    before += [{"role": "user", "content": content_of("Why?")}, {"role": "assistant", "content": second}]
    assert_same(session, inputs_of(QUESTION))
    session.add(frames[30:], rate=RATE)
    assert_same(session, inputs_of(frames[[30, 35, 40, 45, 50, 55, 55, 55]], QUESTION))


def test_a_system_message_stands_before_the_video(clip):
    model, processor = model_with_processor(chatml_tokenizer())
    session = VideoPandaSession(model, processor, fps=5.0, system="Be brief.")
    session.add(clip)
    system = {"role": "system", "content": "Be brief."}
    assert_same(session, whole(processor, clip, QUESTION, before=(system,)))


def test_an_answer_is_that_of_generate(clip):
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    questions = ["Describe the video.", "What colour is the shape?", "Which shape is it?"]
    for path in sorted(SHIPPED_CLIPS.glob("*.mp4")):
        session = VideoPandaSession(model, processor, fps=8.0)
        session.add(path)
        expected = [
            generated(model, processor, whole(processor, path, question, fps=8.0), max_new_tokens=20)
            for question in questions
        ]
        assert [session.ask(question, max_new_tokens=20) for question in questions] == expected
        assert session.ask(questions, max_new_tokens=20) == expected
        assert "".join(session.stream(questions[0], max_new_tokens=20)) == expected[0]
        beams = generated(
            model, processor, whole(processor, path, questions[0], fps=8.0), max_new_tokens=20, num_beams=3
        )
        assert session.ask(questions[0], max_new_tokens=20, num_beams=3) == beams


def test_many_questions_are_answered_as_one_by_one(pair, clip):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=5.0)
    questions = ["What is shown?", "A red ball?", "Which string is the longest of all in this video?"]
    for _ in range(2):  # without a video, then with one
        assert session.ask(questions, max_new_tokens=6) == [session.ask(q, max_new_tokens=6) for q in questions]
        session.add(clip)
    assert session.ask([]) == []


ANSWERS = ["A", "It is a red ball.", "no", "42 of them, at least"]


def test_likelihoods_of_answers_are_those_of_whole_prompts(pair, clip, frames):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(str(clip))
    session.add_text("Look.")
    found = session.log_likelihoods(QUESTION, ANSWERS)
    for answer, row in zip(ANSWERS, found, strict=True):
        inputs = whole(processor, clip, "Look.", QUESTION)
        start = inputs["input_ids"].shape[1]
        messages = [{"role": "user", "content": content_of(clip, "Look.", QUESTION)}]
        messages.append({"role": "assistant", "content": answer})
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", fps=5.0)
        ids = inputs["input_ids"][0, start : start + len(row)]
        assert answer in processor.tokenizer.decode(ids)  # some templates put more before it
        assert inputs["input_ids"][0, start + len(row)] == processor.tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(**inputs).logits[0, start - 1 : start - 1 + len(row)]
        expected = logits.log_softmax(-1)[torch.arange(len(row)), ids]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-3)


def test_the_question_runs_once_for_all_answers_and_leaves_no_trace(llama, clip, monkeypatch):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(str(clip))
    before, shapes, forward = session.num_tokens, [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: shapes.append(k["input_ids"].shape) or forward(*a, **k))
    found = session.log_likelihoods(QUESTION, ANSWERS)
    assert [rows for rows, _ in shapes] == [1, len(ANSWERS)]
    assert shapes[0][1] < len(QUESTION) + 30 and shapes[1][1] == 1 + max(map(len, found))
    assert session.num_tokens == before and session.log_likelihoods(QUESTION, []) == []


def test_a_template_that_begins_with_the_question_is_refused(llama):
    model, processor = llama
    late = "{% for m in messages %}{{ m.content[1].text }}{{ '<video>' if m.content[0].type == 'video' }}{% endfor %}"
    processor = copy.copy(processor)
    processor.chat_template = late
    with pytest.raises(ValueError, match="puts the question before the video"):
        VideoPandaSession(model, processor)


# Cheap


def test_the_cache_is_what_it_was_after_many_questions(llama, clip):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(clip)
    keys = [layer.keys.clone() for layer in session._cache.layers]
    tokens, memory = session.num_tokens, session.memory_bytes
    for number in range(100):
        session.ask(f"Is it {number}?", max_new_tokens=2)
    session.ask(["Is it?"] * 5, max_new_tokens=2)
    for _ in session.stream("Is it?", max_new_tokens=20):
        break  # the rest is not generated
    assert session.num_tokens == tokens
    assert all(torch.equal(layer.keys, before) for layer, before in zip(session._cache.layers, keys, strict=True))
    assert session.memory_bytes <= 2 * memory


def test_a_clip_is_encoded_once_and_a_question_needs_no_encoding(llama, clip, monkeypatch):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    encoded = []
    encode = type(model).get_video_features
    monkeypatch.setattr(
        type(model), "get_video_features", lambda *a, **k: encoded.append(a[2][0, 0].item()) or encode(*a, **k)
    )
    session.add(clip)
    assert sum(encoded) == 12
    session.ask(QUESTION, max_new_tokens=2)
    session.ask(["A?", "B?"], max_new_tokens=2)
    assert sum(encoded) == 12
    session.add(clip, end=0.2)  # one frame more: a question completes the clip, for itself only
    session.ask(QUESTION, max_new_tokens=2)
    assert sum(encoded) == 16


def test_what_is_added_runs_through_the_model_alone(llama, frames, monkeypatch):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=RATE)
    lengths = []
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *args, forward=model.model.language_model.forward, **kwargs: (
            lengths.append(kwargs["inputs_embeds"].shape[1]) or forward(*args, **kwargs)
        ),
    )
    for start in range(0, 40, 4):
        session.add(frames[start : start + 4], rate=RATE)
    assert len(set(lengths[1:])) == 1 and lengths[1] == 4 * len(session._videos[0].frame_ids)


# With the time before each clip


@pytest.mark.parametrize("fps", [1.7, 5.0])
def test_with_timestamps_the_prompt_is_still_the_processors(pair, clip, frames, fps):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=fps, timestamps=True)
    session.add(clip)
    session.next_video()
    for start in range(0, FRAMES, 7):
        session.add(frames[start : start + 7], rate=RATE)
    session.add_picture(Image.fromarray(frames[7]))
    messages = [{"role": "user", "content": content_of(clip, clip, Image.fromarray(frames[7]), QUESTION)}]
    settings = {"fps": fps, "timestamps": True}
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **settings
    )
    assert_same(session, inputs)


def test_dropped_clips_take_their_times_with_them(llama, frames):
    model, processor = llama
    bounded, free = (VideoPandaSession(model, processor, fps=RATE, max_clips=n, timestamps=True) for n in (2, None))
    for session in (bounded, free):
        for start in range(0, 60, 6):
            session.add(frames[start : start + 6], rate=RATE)
    text = processor.decode(bounded.inputs_for(QUESTION)["input_ids"][0])
    assert "".join(re.findall(r"[\d:]{5}|<row>(?!<)", text)).replace("<row>", "") == "00:0000:0200:02"
    kept = np.isin(free._cached.positions, bounded._cached.positions)
    assert free._cached.ids[kept].tolist() == bounded._cached.ids.tolist()
    assert kept.sum() < len(free._cached)


def test_a_session_follows_a_processor_that_writes_times(llama, clip, tmp_path):
    model, processor = llama
    processor = copy.deepcopy(processor)
    processor.video_processor.timestamps = True
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(clip, end=1.3)
    session.save(tmp_path / "session")
    session = VideoPandaSession.load(tmp_path / "session", model, processor)
    session.add(clip, start=1.3)
    assert_same(session, whole(processor, clip, QUESTION))
    assert "00:02" in processor.decode(session.inputs_for(QUESTION)["input_ids"][0])


# Bounded


def test_old_clips_are_dropped_and_the_others_keep_their_positions(llama, frames):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=RATE, max_clips=2)
    for start in range(0, 40, 4):
        session.add(frames[start : start + 4], rate=RATE)
    assert session.num_clips == 10
    everything = VideoPandaSession(model, processor, fps=RATE)
    everything.add(frames[:40], rate=RATE)
    clip_tokens = 4 * len(session._videos[0].frame_ids)
    prefix = everything.num_tokens - 10 * clip_tokens
    assert session.num_tokens == prefix + 2 * clip_tokens
    positions = everything._cached.positions
    expected = np.concatenate([positions[:prefix], positions[prefix + 8 * clip_tokens :]])
    assert session._cached.positions.tolist() == expected.tolist()
    # A first layer's keys depend on the token and its position alone.
    first, whole_first = session._cache.layers[0].keys, everything._cache.layers[0].keys
    kept = torch.cat([whole_first[:, :, :prefix], whole_first[:, :, prefix + 8 * clip_tokens :]], dim=2)
    torch.testing.assert_close(first, kept, rtol=0, atol=1e-5)
    assert session.ask(QUESTION, max_new_tokens=4) == session.ask([QUESTION, "A?"], max_new_tokens=4)[0]
    ids = session.inputs_for(QUESTION)["input_ids"]
    assert (ids == processor.row_token_id).sum() == 2 * (
        session._videos[0].frame_ids == processor.row_token_id
    ).sum() * 4


def test_memory_stays_the_same_however_long_the_video(llama, frames):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=RATE, max_clips=3)
    memory = []
    for _ in range(30):
        session.add(frames[:8], rate=RATE)
        memory.append(session.memory_bytes)
    assert len(set(memory[5:])) == 1


def test_without_a_need_to_drop_max_clips_changes_nothing(llama, clip):
    model, processor = llama
    bounded, free = (VideoPandaSession(model, processor, fps=5.0, max_clips=n) for n in (3, None))
    bounded.add(clip), free.add(clip)
    assert torch.equal(bounded.logits(QUESTION), free.logits(QUESTION))


def test_a_prompt_beyond_the_language_models_context_warns(llama, frames):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=RATE)
    with pytest.warns(UserWarning, match="position 2.* was made for 2048"):
        for _ in range(20):
            session.add(frames[:8], rate=RATE)


# Copies and files


def test_a_fork_goes_its_own_way(llama, clip, frames):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(frames[:23], rate=RATE)
    fork = session.fork()
    before = session.logits(QUESTION)
    fork.add(frames[23:], rate=RATE)
    assert_same(fork, whole(processor, clip, QUESTION))
    fork.ask(QUESTION, remember=True, max_new_tokens=2)
    assert torch.equal(session.logits(QUESTION), before)
    session.add(frames[23:], rate=RATE)
    assert_same(session, whole(processor, clip, QUESTION))


def test_a_saved_session_goes_on_where_it_was(pair, clip, frames, tmp_path):
    model, processor = pair
    session = VideoPandaSession(model, processor, fps=5.0, max_clips=4)
    session.add(frames[:23], rate=RATE)
    session.ask("What is it?", remember=True, max_new_tokens=3)
    session.add(frames[:23], rate=RATE)
    session.save(tmp_path / "watched.safetensors")
    loaded = VideoPandaSession.load(tmp_path / "watched.safetensors", model, processor)
    for name in ("fps", "max_clips", "system", "seconds", "num_clips", "num_tokens"):
        assert getattr(loaded, name) == getattr(session, name)
    for now in (session, loaded):
        now.add(frames[23:], rate=RATE)
    assert torch.equal(loaded.logits(QUESTION), session.logits(QUESTION))
    assert [path.name for path in tmp_path.iterdir()] == ["watched.safetensors"]


def test_a_file_of_another_model_or_kind_is_refused(llama, clip, tmp_path):
    model, processor = llama
    session = VideoPandaSession(model, processor)
    session.add(clip)
    session.save(tmp_path / "watched.safetensors")
    other = model_with_processor(chatml_tokenizer())
    with pytest.raises(ValueError, match=r"watched.safetensors is the session of another model"):
        VideoPandaSession.load(tmp_path / "watched.safetensors", *other)
    with pytest.raises(ValueError, match=r"is not a file that VideoPandaSession.save wrote"):
        VideoPandaSession.load(SHIPPED_MODEL / "model.safetensors", model, processor)
    (tmp_path / "text").write_text("none")
    with pytest.raises(ValueError, match=r"is not a file that VideoPandaSession.save wrote"):
        VideoPandaSession.load(tmp_path / "text", model, processor)


def test_reset_forgets_everything(llama, clip):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    before = session.logits(QUESTION)
    session.add(clip)
    session.ask(QUESTION, remember=True, max_new_tokens=2)
    session.reset()
    assert (session.seconds, session.num_clips, session.num_tokens, session.memory_bytes) == (0, 0, 0, 0)
    assert torch.equal(session.logits(QUESTION), before)


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, clip, frames: s.add(frames), "need their `rate`"),
        (lambda s, clip, frames: s.add(frames, rate=0), "`rate` is a number of frames a second above 0, not 0"),
        (lambda s, clip, frames: s.add(frames, rate=25, start=1), "`start` and `end` choose a part of a file"),
        (lambda s, clip, frames: s.add([], rate=25), "no frame to add"),
        (lambda s, clip, frames: s.add(clip, rate=25), "a file has its own"),
        (lambda s, clip, frames: s.add(clip, start=3), "clip.mp4 has 2.4 seconds, so 3 to 2.4 is no part"),
        (lambda s, clip, frames: (s.add(frames, rate=25), s.add(frames[:, :16], rate=25)), "call `next_video"),
        (lambda s, clip, frames: s.add("nowhere.mp4"), "nowhere.mp4"),
        (lambda s, clip, frames: s.ask("?", cache_implementation="static"), "cache_implementation: a session sets"),
        (lambda s, clip, frames: s.ask("?", num_return_sequences=2), "num_return_sequences: a session sets"),
        (lambda s, clip, frames: s.ask(["?"], remember=True), "one question at a time"),
        (lambda s, clip, frames: list(s.stream("?", use_cache=False)), "use_cache: a session sets"),
        (lambda s, clip, frames: VideoPandaSession(s.model, s.processor, fps=0), "`fps` is a number"),
        (lambda s, clip, frames: VideoPandaSession(s.model, s.processor, max_clips=0), "`max_clips` is a number"),
    ],
)
def test_wrong_use_is_a_clear_error(llama, clip, frames, call, message):
    with pytest.raises(ValueError, match=message):
        call(VideoPandaSession(*llama), clip, frames)


def test_pictures_in_place_of_a_video_are_an_error_that_says_what_to_do(llama, frames, tmp_path):
    for number in range(8):
        Image.fromarray(frames[number]).save(tmp_path / f"{number}.png")
    session = VideoPandaSession(*llama)
    with pytest.raises(ValueError, match=r"0\.png is a picture: use `add_picture`"):
        session.add(tmp_path / "0.png")
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds pictures, which have no rate: `decode_video`"):
        session.add(tmp_path)
    session.add(decode_video(tmp_path)[0], rate=4)
    assert session.seconds == 2


def test_what_came_before_an_error_stays(llama, clip, frames, monkeypatch):
    model, processor = llama
    session = VideoPandaSession(model, processor, fps=5.0)
    session.add(frames[:40], rate=RATE)
    before = session.logits(QUESTION)
    forward = model.model.language_model.layers[1].forward

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    for call in (
        lambda: session.ask(QUESTION, max_new_tokens=2),
        lambda: session.ask(["A?", QUESTION], max_new_tokens=2),
        lambda: list(session.stream(QUESTION, max_new_tokens=2)),
        lambda: session.add(frames[40:], rate=RATE),
    ):
        monkeypatch.setattr(model.model.language_model.layers[1], "forward", fail)
        with pytest.raises(MemoryError):
            call()
        monkeypatch.setattr(model.model.language_model.layers[1], "forward", forward)
        if session.seconds == 1.6:
            assert torch.equal(session.logits(QUESTION), before)
    # The frames of the failed call are there, and are encoded with what comes next.
    session.add(clip, end=0.2)
    assert session.num_clips == 3 and session.num_tokens == session._cache.layers[1].get_seq_length()


def test_a_session_that_streams_refuses_other_calls(llama, clip):
    session = VideoPandaSession(*llama, fps=5.0)
    session.add(clip)
    pieces = session.stream(QUESTION, max_new_tokens=30)
    next(pieces)
    with pytest.raises(RuntimeError, match="the session is busy"):
        session.ask("?")
    with pytest.raises(RuntimeError, match="the session is busy"):
        session.add(clip)
    pieces.close()
    assert "VideoPandaSession" not in {thread.name for thread in threading.enumerate()}
    session.add(clip)


def test_the_sampler_takes_the_frame_that_is_shown_at_each_time():
    sampler = FrameSampler(Fraction(2))
    assert sampler.due(Fraction(1), Fraction(10)) == [0, 5]
    assert sampler.take(["0.0", "0.5"], Fraction(1)) == ["0.0", "0.5"]
    assert sampler.due(Fraction(7, 10), Fraction(10)) == [0, 5]
    assert sampler.take(["1.0", "1.5"], Fraction(7, 10)) == ["1.0"] and sampler.unfinished == ["1.5"]
    assert sampler.due(Fraction(2, 10), Fraction(10)) == [] and sampler.take([], Fraction(2, 10)) == []
    assert sampler.take([], Fraction(1, 10)) == ["1.5"] and sampler.taken == 4
    assert sampler.due(Fraction(1), Fraction(10), start=Fraction(3)) == [30, 35]
