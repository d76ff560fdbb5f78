"""vLLM's answers are those of `generate`. Runs in an environment with vLLM: `nox -s vllm`."""

import base64
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import vllm_engine
from helpers.tiny_models import model_with_processor
from helpers.tiny_tokenizers import chatml_tokenizer, llama_tokenizer
from helpers.video_files import VideoSpec, paint
from helpers.vllm_server import vllm_server
from video_panda_hf import SHIPPED_CLIPS, SHIPPED_MODEL
from video_panda_hf.decoding import decode_video


if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm", allow_module_level=True)

DESCRIBE, COLOUR = "Describe the video.", "What colour is the shape?"
CLIPS = {path.name.split("_")[0]: path for path in sorted(SHIPPED_CLIPS.glob("*.mp4"))}


@cache
def shipped():
    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    return processor, AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL).eval()


def frames_of(colour: str, count: int | None = None) -> np.ndarray:
    frames, _ = decode_video(CLIPS[colour])
    return frames if count is None else np.resize(frames, (count, *frames.shape[1:]))


def picture_of(colour: str) -> Image.Image:
    return Image.fromarray(frames_of(colour)[3])


def transparent(picture: Image.Image) -> Image.Image:
    """The same colours, of which a viewer shows nothing."""
    picture = picture.copy()
    picture.putalpha(0)
    return picture


def content(*parts) -> list[dict]:
    """The names of parts that are media, and texts."""
    return [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]


def prompt_of(*parts) -> str:
    messages = [{"role": "user", "content": content(*parts)}]
    return shipped()[0].apply_chat_template(messages, add_generation_prompt=True)


def generated(model=None, **inputs) -> dict:
    """What `generate` answers to what the processor makes of `inputs`."""
    processor, shipped_model = shipped()
    made = processor(return_tensors="pt", **inputs)
    options = {"max_new_tokens": vllm_engine.MOST_NEW_TOKENS, "do_sample": False}
    found = (model or shipped_model).generate(**made, **options, output_scores=True, return_dict_in_generate=True)
    prompt = made["input_ids"][0].tolist()
    answer = found.sequences[0, len(prompt) :].tolist()
    scores = [torch.log_softmax(step[0], -1)[token].item() for step, token in zip(found.scores, answer, strict=True)]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    return {"prompt": prompt, "answer": answer, "logprobs": scores, "text": text}


def cases() -> dict:
    """For each case a prompt, what the processor gets with it, and what vLLM gets."""
    red, blue, picture = frames_of("red"), frames_of("blue"), picture_of("green")
    long = frames_of("green", 48)
    asked = prompt_of("video", DESCRIBE)
    found = {
        f"{count} frames": (asked, {"videos": [frames]}, {"video": frames})
        for count in (1, 8, 50)
        for frames in [frames_of("red", count)]
    }
    found["48 frames, all taken"] = (
        asked,
        {"videos": [long], "do_sample_frames": False},
        {"video": (long, {"do_sample_frames": False, "total_num_frames": 48})},
    )
    found["a picture"] = (prompt_of("image", COLOUR), {"images": [picture]}, {"image": picture})
    found["a transparent picture"] = (
        prompt_of("image", COLOUR),
        {"images": [transparent(picture)]},
        {"image": transparent(picture)},
    )
    found["two videos"] = (
        prompt_of("video", "and", "video", COLOUR),
        {"videos": [red, blue]},
        {"video": [red, blue]},
    )
    found["pictures around a video"] = (
        prompt_of("image", "video", "image", COLOUR),
        {"images": [picture, picture_of("red")], "videos": [blue]},
        {"image": [picture, picture_of("red")], "video": [blue]},
    )
    found["text only"] = (prompt_of(DESCRIBE), {}, None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_vllm_gives_the_very_tokens_and_probabilities_of_generate(mode, tmp_path):
    file = VideoSpec("long.mp4", "mpeg4", frames=300, draw=paint).write(tmp_path)
    expected = {name: generated(text=prompt, **given) for name, (prompt, given, _) in cases().items()}
    expected["a file of 300 frames"] = generated(text=prompt_of("video", DESCRIBE), videos=[str(file)])
    requests = [
        {"prompt": prompt, "multi_modal_data": data} if data else {"prompt": prompt}
        for prompt, _, data in cases().values()
    ]
    part = {"type": "video_url", "video_url": {"url": file.as_uri()}}
    requests.append([{"role": "user", "content": [part, *content(DESCRIBE)]}])
    placeholders = shipped()[0].video_token_ids
    given = {"model": str(SHIPPED_MODEL), "requests": requests, "bias": dict.fromkeys(placeholders, 100.0)}
    (tmp_path / "requests.pkl").write_bytes(pickle.dumps(given))

    command = [sys.executable, vllm_engine.__file__, str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == len(expected) == 10
    for (name, wanted), answer in zip(expected.items(), answers, strict=True):
        assert answer["prompt"] == wanted["prompt"], name
        assert answer["answer"] == wanted["answer"], name
        assert not set(answer["answer"]) & set(placeholders), name  # although the bias is towards them
        assert answer["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4), name


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a LoRA adapter on the language model, and what `generate` answers with it."""
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_MODEL)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    adapted = peft.get_peft_model(model, settings).eval()
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder, generated(adapted, text=prompt_of("video", DESCRIBE), videos=[str(CLIPS["red"])])


@pytest.fixture(scope="module")
def post(adapter, tmp_path_factory):
    options = ["--allowed-local-media-path", str(SHIPPED_CLIPS), "--limit-mm-per-prompt", '{"image": 2, "video": 2}']
    options += ["--trust-request-mm-kwargs", "--enable-lora", "--lora-modules", f"tuned={adapter[0]}"]
    with vllm_server(tmp_path_factory.mktemp("server") / "log", *options) as server:
        yield server


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(*parts, **settings) -> dict:
    return {"messages": [{"role": "user", "content": [*parts]}], "skip_special_tokens": True, **settings}


def check(answer: tuple[int, dict], wanted: dict) -> None:
    status, body = answer
    assert status == 200, body
    assert body["choices"][0]["message"]["content"] == wanted["text"]
    assert body["usage"]["prompt_tokens"] == len(wanted["prompt"])


def refusal(answer: tuple[int, dict]) -> str:
    status, body = answer
    assert status == 400, body
    return body["error"]["message"]


@pytest.mark.slow
def test_the_server_answers_about_videos_and_pictures_as_generate_does(post):
    about_red = generated(text=prompt_of("video", DESCRIBE), videos=[str(CLIPS["red"])])
    question = content(DESCRIBE)
    for url in (CLIPS["red"].as_uri(), data_url(CLIPS["red"].read_bytes(), "video/mp4")):
        check(post(**asked(video(url), *question)), about_red)
    wanted = generated(text=prompt_of("video", "video", COLOUR), videos=[str(CLIPS["red"]), str(CLIPS["blue"])])
    both = [video(CLIPS[colour].as_uri()) for colour in ("red", "blue")]
    check(post(**asked(*both, *content(COLOUR))), wanted)

    wanted = generated(text=prompt_of("image", COLOUR), images=[picture_of("blue")])
    for picture in (picture_of("blue"), transparent(picture_of("blue"))):
        file = io.BytesIO()
        picture.save(file, "PNG")
        part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "image/png")}}
        check(post(**asked(part, *content(COLOUR))), wanted)


@pytest.mark.slow
def test_a_request_may_choose_its_frames_and_the_next_is_as_before(post):
    clip, prompt = CLIPS["red"], prompt_of("video", DESCRIBE)
    for sampling in ({}, {"num_frames": 4}, {"fps": 4.0}, {"fps": 8.0, "max_frames": 4}, {}):
        settings = {"media_io_kwargs": {"video": sampling}} if sampling else {}
        wanted = generated(text=prompt, videos=[{"video": str(clip), **sampling}])
        check(post(**asked(video(clip.as_uri()), *content(DESCRIBE), **settings)), wanted)


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_with_its_reason(post):
    clip, outside = video(CLIPS["red"].as_uri()), video((SHIPPED_MODEL / "config.json").as_uri())
    assert "--allowed-local-media-path" in refusal(post(**asked(outside, *content(DESCRIBE))))
    sampling = {"media_io_kwargs": {"video": {"num_frames": 5}}}
    assert "a multiple of 4" in refusal(post(**asked(clip, *content(DESCRIBE), **sampling)))
    sampling = {"media_io_kwargs": {"video": {"frames": 4}}}
    assert "there are num_frames, fps and max_frames" in refusal(post(**asked(clip, *content(DESCRIBE), **sampling)))
    sampling = {"media_io_kwargs": {"video": {"max_frames": 4}}}
    assert "goes with `fps`" in refusal(post(**asked(clip, *content(DESCRIBE), **sampling)))
    sampling = {"media_io_kwargs": {"video": {"model": "another"}}}
    assert "set by the server" in refusal(post(**asked(clip, *content(DESCRIBE), **sampling)))
    for text in ("What is <video>?", "What is <image>?"):
        assert "are places of pictures" in refusal(post(**asked(clip, *content(text))))
    assert "is reserved" in refusal(post(**asked(clip, *content("What is <row>?"))))
    no_video = video(data_url(b"no video", "video/mp4"))
    assert "not a video in a known format" in refusal(post(**asked(no_video, *content(DESCRIBE))))


@pytest.mark.slow
def test_an_adapter_on_the_language_model_is_served_by_its_name(post, adapter):
    base = generated(text=prompt_of("video", DESCRIBE), videos=[str(CLIPS["red"])])
    request = asked(video(CLIPS["red"].as_uri()), *content(DESCRIBE))
    assert adapter[1]["text"] != base["text"]
    check(post(**request, model="tuned"), adapter[1])
    check(post(**request), base)


def processor_of_vllm(folder):
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=str(folder), dtype="float32"))


TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "llama": lambda: llama_tokenizer(legacy=False),
    "llama, legacy": lambda: llama_tokenizer(legacy=True),
}


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompts_are_those_of_the_processor_for_every_tokenizer(kind, timestamps, tmp_path):
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    model, processor = model_with_processor(TOKENIZERS[kind]())
    processor.video_processor.timestamps = timestamps
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    of_vllm = processor_of_vllm(tmp_path)

    frames = np.random.default_rng(0).integers(0, 256, (9, 20, 30, 3), dtype=np.uint8)
    picture, metadata = Image.fromarray(frames[0]), {"fps": 2.0, "total_num_frames": 9}
    messages = [
        {"role": "user", "content": content("image", "and", "video", "image", "What?")},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": content("video", "now?")},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    data = {"image": [picture] * 2, "video": [(frames, {**metadata, "do_sample_frames": True})] * 2}
    inputs = {"images": [picture] * 2, "videos": [frames] * 2, "video_metadata": [metadata] * 2}
    expected = processor(text=text, add_special_tokens=kind != "chatml", **inputs)["input_ids"][0]
    for with_start in (False, True):  # vLLM leaves it out of chats, and has it in plain prompts
        ids = processor.tokenizer.encode(text, add_special_tokens=with_start)
        given = ProcessorInputs(prompt=ids, mm_data_items=of_vllm.info.parse_mm_data(data))
        made = of_vllm.apply(given, TimingContext(enabled=False))
        assert list(made["prompt_token_ids"]) == expected
        counts = [place.is_embed.sum().item() for place in made["mm_placeholders"]["video"]]
        assert counts == [sum(expected.count(token) for token in processor.video_token_ids) // 2 - 16] * 2


def test_files_are_sampled_and_limited_as_the_processor_does_it():
    from video_panda_hf.serving.vllm.loader import VideoPandaLoader

    processor = AutoProcessor.from_pretrained(SHIPPED_MODEL, decode_limits={"max_frames": 16})
    options = {"image": {"image_mode": "RGB"}, "video": {"num_frames": 4}}
    VideoPandaLoader.use("mine", processor.video_processor, options)
    assert options["video"] == {"video_backend": "video_panda", "num_frames": 4, "model": "mine"}
    assert options["image"] == {"image_mode": "RGB"}
    VideoPandaLoader.use("mine", processor.video_processor, options := {})
    assert options["image"] == {"image_mode": None}
    assert options["video"].pop("video_backend") == "video_panda"

    data = CLIPS["red"].read_bytes()
    for settings in ({}, {"num_frames": 12}, {"fps": 4.0}, {"fps": 8.0, "max_frames": 4}):
        given = {**options["video"], "num_frames": 32 if "fps" in settings else -1, **settings}
        frames, metadata = VideoPandaLoader.load_bytes(data, **given)
        wanted = processor.video_processor([data], return_metadata=True, **settings)["video_metadata"][0]
        assert metadata["frames_indices"] == list(wanted.frames_indices) and len(frames) == len(wanted.frames_indices)
        assert not metadata["do_sample_frames"]
    for settings, problem in (
        ({"num_frames": 32}, "max_frames"),  # of `decode_limits`
        ({"num_frames": 16, "fps": 2}, "mutually exclusive"),
        ({"max_frames": 4}, "goes with `fps`"),
        ({"model": "another"}, "set by the server"),
        ({"frames": 4}, "there are num_frames, fps and max_frames"),
    ):
        with pytest.raises(ValueError, match=problem):
            VideoPandaLoader.load_bytes(data, **{**options["video"], **settings})


@pytest.mark.slow
def test_vllm_names_the_releases_that_were_tested():
    code = """
import vllm
vllm.__version__ = "0.99.0"
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
ModelRegistry.models["VideoPandaForConditionalGeneration"].load_model_cls()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "not 0.99.0" in done.stderr.strip().splitlines()[-1]


def test_the_largest_video_that_fits_is_what_vllm_reserves_memory_for():
    tokens = processor_of_vllm(SHIPPED_MODEL).info.get_mm_max_tokens_per_item(1024, {"image": 1, "video": 1})
    frame = 1 + 4 * (4 + 1)
    assert tokens == {"image": frame, "video": 1024 // (4 * frame) * 4 * frame}
