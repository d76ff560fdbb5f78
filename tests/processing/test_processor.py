"""What `VideoPandaProcessor` makes of text with videos: tokens, prompts, masks of the answers."""

import io
import pickle

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from helpers.tiny_tokenizers import CHATML_TEMPLATE, chatml_tokenizer, llama_tokenizer
from video_panda_hf import SHIPPED_MODEL, VideoPandaProcessor
from video_panda_hf.processing import CHAT_TEMPLATE


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CLIP = np.zeros((4, 28, 56, 3), np.uint8)  # 2 × 4 patches, 1 × 2 tokens
CLIP_TOKENS = 4 * ["<video>", "<video>", "<video>", "<row>"]  # per frame: context, two tokens, end of the row


def processor_of(tokenizer, **kwargs):
    return VideoPandaProcessor.from_text_pretrained(tokenizer, image_size=56, num_frames=4, **kwargs)


@pytest.fixture(scope="module")
def vicuna():
    return processor_of(llama_tokenizer())


@pytest.fixture(scope="module")
def chatml():
    return processor_of(chatml_tokenizer())


def user(text, *videos):
    return {
        "role": "user",
        "content": [*({"type": "video", "video": v} for v in videos), {"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": text}


def inputs_of(processor, conversation, **kwargs):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)


def tokens_of(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


# One <video> in the text, the tokens of its frames in the input


def test_a_video_becomes_per_frame_a_context_token_then_rows(chatml):
    inputs = chatml(text="a<video>b", videos=np.zeros((4, 56, 56, 3), np.uint8))
    frame = ["<video>"] + 2 * ["<video>", "<video>", "<row>"]
    assert tokens_of(chatml, inputs["input_ids"][0]) == ["a", *(4 * frame), "b"]
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]


def test_the_released_size_has_2184_tokens_for_a_square_video():
    processor = VideoPandaProcessor.from_text_pretrained(chatml_tokenizer())
    expanded = processor.replace_video_token({"video_grid_thw": [[8, 32, 32]]}, 0)
    assert expanded.count("<video>") + expanded.count("<row>") == 2184
    assert expanded.count("<row>") == 8 * 16


def test_engines_know_the_number_of_tokens_before_there_are_pixels(chatml):
    sizes = [(4, 30, 100), (8, 56, 56), (1, 77, 20)]
    videos = [np.zeros((*size, 3), np.uint8) for size in sizes]
    inputs = chatml(text="<video>" * 3, videos=videos, do_sample_frames=False)
    rows = [chatml.replace_video_token(inputs, i) for i in range(3)]
    counts = chatml._get_num_multimodal_tokens(image_sizes=[sizes[2][1:]], video_sizes=sizes)
    assert counts["num_video_tokens"] == [row.count("<video>") + row.count("<row>") for row in rows] == [16, 56, 5]
    assert counts["num_image_tokens"] == counts["num_video_tokens"][2:]
    assert counts["num_image_patches"] == [8]
    larger = chatml._get_num_multimodal_tokens(video_sizes=sizes[:1], size={"longest_edge": 112})
    assert larger["num_video_tokens"] == [4 * (1 + 2 * 5)] and larger["num_image_tokens"] is None


def test_several_videos_and_prompts_take_their_videos_in_order(chatml):
    texts = ["<video> then <video>", "no video", "a picture <video>"]
    picture = Image.new("RGB", (56, 28))
    inputs = chatml(text=texts, videos=[[CLIP, np.zeros((4, 56, 56, 3), np.uint8)], [], [picture]])
    rows = [ids.count(chatml.row_token_id) for ids in inputs["input_ids"]]
    assert rows == [4 * 1 + 4 * 2, 0, 1]
    assert inputs["video_grid_thw"].tolist() == [[4, 2, 4], [4, 4, 4], [1, 2, 4]]


def test_text_alone_is_only_tokenized(chatml):
    inputs = chatml(text="What is shown?")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert chatml(text=["What is shown?"], videos=[[]]) == inputs
    assert inputs["input_ids"][0] == chatml.tokenizer("What is shown?")["input_ids"]


def test_prompts_are_padded_on_the_left_or_where_the_user_says(chatml):
    texts = ["<video> What is shown in this video?", "newer"]
    left = chatml(text=texts, videos=CLIP, padding=True, return_tensors="pt")
    right = chatml(text=texts, videos=CLIP, padding=True, padding_side="right", return_tensors="pt")
    length = int(left["attention_mask"][1].sum())
    assert left["attention_mask"][1, -length:].all() and not left["attention_mask"][1, :-length].any()
    assert right["attention_mask"][1, :length].all() and not right["attention_mask"][1, length:].any()
    assert left["input_ids"][1, -length:].tolist() == right["input_ids"][1, :length].tolist()


def test_both_tokens_count_as_video_and_stay_out_of_decoded_text(chatml):
    inputs = chatml(text="see <video> here", videos=CLIP, return_mm_token_type_ids=True)
    types = [
        "row" if t == "<row>" else "video" if t == "<video>" else "" for t in tokens_of(chatml, inputs["input_ids"][0])
    ]
    assert inputs["mm_token_type_ids"][0] == [2 if t else 0 for t in types]
    assert chatml.decode(inputs["input_ids"][0], skip_special_tokens=True) == "see  here"


@pytest.mark.parametrize(
    ("text", "videos", "message"),
    [
        ("<video> and <video>", [CLIP], "Found total 2 <video> tokens and 1 videos"),
        (["<video>", "none"], [CLIP, CLIP], "Found total 1 <video> tokens and 2 videos"),
        ("<video>", None, "Found total 1 <video> tokens and 0 videos"),
        ("<video> <row>", [CLIP], "<row> is reserved"),
        (["fine", 3], None, "string or a list of strings"),
        (None, None, "at least one input"),
    ],
)
def test_text_and_videos_that_do_not_fit_are_an_error(chatml, text, videos, message):
    with pytest.raises(ValueError, match=message):
        chatml(text=text, videos=videos)


def test_audio_is_refused_rather_than_dropped(chatml):
    with pytest.raises(ValueError, match="no sound"):
        chatml.prepare_inputs_layout(text="a", audio=np.zeros(9))


def test_a_tokenizer_without_the_two_tokens_is_a_helpful_error(chatml):
    with pytest.raises(ValueError, match=r"no <video>: .*from_text_pretrained"):
        VideoPandaProcessor(chatml.video_processor, chatml_tokenizer())
    with pytest.raises(ValueError, match="no <video>"):
        VideoPandaProcessor(chatml.video_processor, llama_tokenizer())


def test_truncation_never_cuts_a_video_silently(chatml):
    with pytest.raises(ValueError, match="Mismatch in `video` token count"):
        chatml(text="a <video>", videos=CLIP, truncation=True, max_length=8)


# The prompt of the released model


def test_the_prompt_is_byte_for_byte_that_of_the_released_model(vicuna):
    messages = [user("What is shown?", CLIP)]
    prompt = f"{SYSTEM} USER: <video>\nWhat is shown? ASSISTANT:"
    assert vicuna.chat_template == CHAT_TEMPLATE
    assert vicuna.apply_chat_template(messages, add_generation_prompt=True) == prompt

    messages += [assistant("A red ball."), user("And then?"), assistant([{"type": "text", "text": "It moves."}])]
    conversation = f"{prompt} A red ball.</s>USER: And then? ASSISTANT: It moves.</s>"
    assert vicuna.apply_chat_template(messages) == conversation
    assert vicuna.apply_chat_template(messages, continue_final_message=True) == conversation.removesuffix("</s>")


def test_a_system_message_replaces_the_default_one(vicuna):
    messages = [{"role": "system", "content": "Be brief."}, user("Who?")]
    assert vicuna.apply_chat_template(messages, add_generation_prompt=True) == "Be brief. USER: Who? ASSISTANT:"


def test_a_video_stands_on_a_line_of_its_own_where_its_part_is(vicuna):
    video, text = {"type": "video"}, {"type": "text", "text": "Q"}
    for parts, expected in [
        ([text, video], "Q\n<video>"),
        ([video, video, text], "<video>\n<video>\nQ"),
        ([text, video, text], "Q\n<video>\nQ"),
        ([text, text], "QQ"),
    ]:
        assert vicuna.apply_chat_template([{"role": "user", "content": parts}]) == f"{SYSTEM} USER: {expected}"


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "audio"}]}]
)
def test_what_the_template_does_not_know_is_an_error(vicuna, message):
    with pytest.raises(Exception, match=r"tool|audio"):
        vicuna.apply_chat_template([message])


@pytest.mark.parametrize("legacy", [True, False])
def test_the_text_around_a_video_is_tokenized_as_in_training(legacy):
    """Before the video Llama's tokenizer gives "▁" for the space, after it one of its own before the new line (the ids
    29871 and 29871, 13 of the full vocabulary); the prompt starts with one BOS."""
    processor = processor_of(llama_tokenizer(legacy))
    tokens = tokens_of(
        processor, inputs_of(processor, [user("What?", CLIP)], add_generation_prompt=True)["input_ids"][0]
    )
    start = tokens.index("<video>")
    assert tokens[:3] == ["<s>", "▁", "A"] and tokens.count("<s>") == 1
    assert tokens[start - 6 : start] == ["U", "S", "E", "R", ":", "▁"]
    assert tokens[start : start + 16] == CLIP_TOKENS
    assert tokens[start + 16 : start + 20] == ["▁", "\n", "W", "h"]


# Chat templates of other LLMs

# The traits of Qwen3's: lists of tools, thoughts taken out of answers, a look back over the messages.
TOOLS_TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + content }}
        {%- for call in message.tool_calls or [] %}{{- '\\n' ~ (call | tojson) }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, TOOLS_TEMPLATE])
def test_an_llm_keeps_its_own_template_and_takes_videos(template):
    tokenizer = chatml_tokenizer(template)
    processor = processor_of(tokenizer)
    tools = [{"type": "function", "function": {"name": "zoom", "description": "looks closer", "parameters": {}}}]
    messages = [{"role": "system", "content": "Be brief."}, user("What?", CLIP), assistant("A ball."), user("Where?")]
    plain = [{**m, "content": "<video>\nWhat?"} if i == 1 else m for i, m in enumerate(messages)]
    plain[3] = {"role": "user", "content": "Where?"}
    for kwargs in [{}, {"add_generation_prompt": True}, {"tools": tools}]:
        expected = tokenizer.apply_chat_template(plain, tokenize=False, **kwargs)
        assert processor.apply_chat_template(messages, **kwargs) == expected
    inputs = inputs_of(processor, messages, add_generation_prompt=True)
    assert tokens_of(processor, inputs["input_ids"][0]).count("<row>") == 4


def test_an_llms_own_template_decides_about_the_first_token():
    tokenizer = llama_tokenizer()
    for template, count in [("{{ messages[0]['content'] }}", 0), ("{{ bos_token + messages[0]['content'] }}", 1)]:
        tokenizer.chat_template = template
        processor = processor_of(tokenizer)
        ids = inputs_of(processor, [user("Hi")])["input_ids"][0]
        assert ids.count(tokenizer.bos_token_id) == count


def test_named_templates_all_take_videos():
    tokenizer = chatml_tokenizer({"default": CHATML_TEMPLATE, "short": "{{ messages[0]['content'] }}"})
    processor = processor_of(tokenizer)
    assert processor.apply_chat_template([user("Q", CLIP)], chat_template="short") == "<video>\nQ"
    assert "<|im_start|>user\n<video>\nQ" in processor.apply_chat_template([user("Q", CLIP)])


def test_videos_in_messages_are_of_every_kind(chatml, tmp_path):
    frames = [Image.fromarray(frame) for frame in CLIP]
    for n, frame in enumerate(frames):
        frame.save(tmp_path / f"{n}.png")
    gif = io.BytesIO()
    frames[0].save(
        gif, "GIF", save_all=True, append_images=[Image.new("RGB", (56, 28), c) for c in ("red", "green", "blue")]
    )
    (tmp_path / "clip.gif").write_bytes(gif.getvalue())
    kinds = [CLIP, torch.from_numpy(CLIP), frames, [str(tmp_path / f"{n}.png") for n in range(4)], gif.getvalue(), gif]
    kinds += [str(tmp_path / "clip.gif"), tmp_path / "clip.gif"]
    parts = [{"type": "video", "video": kind} for kind in kinds] + [
        {"type": "video", "path": str(tmp_path / "clip.gif")}
    ]
    messages = [[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}] for part in parts]
    inputs = inputs_of(chatml, messages)
    assert inputs["video_grid_thw"].tolist() == [[4, 2, 4]] * len(parts)
    first = inputs["input_ids"][0]
    assert all(ids == first for ids in inputs["input_ids"])


def test_a_message_may_ask_for_a_part_of_a_video(chatml, tmp_path):
    colours = [Image.new("RGB", (56, 28), colour) for colour in ("red", "green", "blue", "white")]
    colours[0].save(tmp_path / "clip.gif", save_all=True, append_images=colours[1:], duration=500)
    part = {"type": "video", "path": str(tmp_path / "clip.gif")}
    message = {"role": "user", "content": [{**part, "start": 1.0, "end": 1.5}, {"type": "text", "text": "What?"}]}
    inputs = inputs_of(chatml, [message], num_frames=1, return_tensors="pt")
    blue = inputs_of(chatml, [user("What?", np.array(colours[2])[None])], num_frames=1, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], blue["pixel_values_videos"])
    assert message["content"][0] == {**part, "start": 1.0, "end": 1.5}


def test_settings_may_be_given_by_name_or_in_processor_kwargs(chatml):
    message = [user("What?", np.zeros((30, 28, 28, 3), np.uint8))]
    given = {"add_special_tokens": False, "num_frames": 8}
    for inputs in [inputs_of(chatml, message, num_frames=8), inputs_of(chatml, message, processor_kwargs=given)]:
        assert inputs["video_grid_thw"][0, 0] == 8
    assert given == {"add_special_tokens": False, "num_frames": 8}


# Masks of the answers


def answers_in(processor, inputs, index=0):
    ids, mask = inputs["input_ids"][index], inputs["assistant_masks"][index]
    return processor.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


ANSWERED = [user("What is shown?", CLIP), assistant("A red ball."), user("And?", CLIP), assistant("It moves.")]


def test_the_mask_marks_the_answers_and_their_end_after_videos(vicuna, chatml):
    assert (
        answers_in(vicuna, inputs_of(vicuna, ANSWERED, return_assistant_tokens_mask=True))
        == "A red ball.</s> It moves.</s>"
    )
    inputs = inputs_of(chatml, ANSWERED, return_assistant_tokens_mask=True)
    assert answers_in(chatml, inputs) == "A red ball.<|im_end|>It moves.<|im_end|>"


def test_no_template_of_ours_marks_what_a_system_or_user_says(vicuna, chatml):
    shipped = AutoProcessor.from_pretrained(SHIPPED_MODEL)
    system = {"role": "system", "content": "Be brief."}
    for processor in (vicuna, chatml, shipped):
        inputs = inputs_of(processor, [system, *ANSWERED], return_assistant_tokens_mask=True)
        end = processor.tokenizer.eos_token
        answers = answers_in(processor, inputs).replace(end, f"{end} ").split()
        assert answers == f"A red ball.{end} It moves.{end}".split()
        prompt = processor.apply_chat_template([system, *ANSWERED])
        assert prompt.count("Be brief.") == 1 and prompt.index("Be brief.") < prompt.index("What is shown?")


@pytest.mark.parametrize("conversation", [[("banana", "?")], [("user", "?"), ("system", "!")], [("Assistant", "!")]])
def test_a_role_that_a_template_of_ours_does_not_know_is_an_error(vicuna, conversation):
    messages = [{"role": role, "content": text} for role, text in conversation]
    for processor in (vicuna, AutoProcessor.from_pretrained(SHIPPED_MODEL)):
        with pytest.raises(TemplateError, match=f"role {conversation[-1][0]}: "):
            processor.apply_chat_template(messages)


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_chat_of_text_alone_has_the_keys_of_one_with_videos(chatml, with_mask):
    options = {"return_assistant_tokens_mask": with_mask, "return_tensors": "pt"}
    text, video = (inputs_of(chatml, [user("Q", *clips), assistant("Short.")], **options) for clips in ((), (CLIP,)))
    assert text.keys() == video.keys()
    for key in ("pixel_values_videos", "video_grid_thw"):
        assert text[key].shape == (0, video[key].shape[1]) and text[key].dtype == video[key].dtype


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_mask_holds_in_padded_batches(chatml, padding_side):
    batch = [ANSWERED, [user("Q"), assistant("Short.")], [user("Nothing answered", CLIP)]]
    inputs = inputs_of(
        chatml, batch, return_assistant_tokens_mask=True, return_tensors="pt", padding=True, padding_side=padding_side
    )
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    answers = [answers_in(chatml, inputs, i) for i in range(3)]
    assert answers == ["A red ball.<|im_end|>It moves.<|im_end|>", "Short.<|im_end|>", ""]


def test_answers_are_found_in_templates_that_shape_their_surroundings():
    processor = processor_of(chatml_tokenizer(TOOLS_TEMPLATE))
    inputs = inputs_of(processor, ANSWERED, return_assistant_tokens_mask=True)
    assert answers_in(processor, inputs) == "A red ball.<|im_end|>It moves.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (TOOLS_TEMPLATE, "<think>\nhm\n</think>\n\nA ball."),  # the template takes the thought out
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", "A ball."),  # no token ends an answer
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_an_error(template, answer):
    processor = processor_of(chatml_tokenizer(template))
    with pytest.raises(ValueError, match="mark them in the template"):
        inputs_of(processor, [user("Q", CLIP), assistant(answer)], return_assistant_tokens_mask=True)


# Building, saving, sending


def test_building_leaves_the_given_tokenizer_alone_and_adds_special_tokens():
    tokenizer = llama_tokenizer()
    size = len(tokenizer)
    processor = processor_of(tokenizer)
    assert len(tokenizer) == size and tokenizer.pad_token is None
    assert (processor.video_token_id, processor.row_token_id) == (size, size + 1)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == "</s>"
    assert tokens_of(processor, processor.tokenizer("a <video><row> b", add_special_tokens=False)["input_ids"]) == [
        *("▁", "a", "▁"),
        *("<video>", "<row>"),
        *("▁", "▁", "b"),
    ]


def test_the_tokenizer_of_a_gguf_file_is_read_from_it(monkeypatch):
    asked = []

    def from_pretrained(*args, **kwargs):
        asked.append((args, kwargs))
        return chatml_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    processor_of("folder", gguf_file="model.gguf")
    assert asked == [(("folder",), {"gguf_file": "model.gguf"})]


@pytest.mark.parametrize("make", [llama_tokenizer, chatml_tokenizer])
def test_a_saved_processor_is_the_same_processor(tmp_path, make):
    make().save_pretrained(tmp_path / "llm")
    processor = VideoPandaProcessor.from_text_pretrained(
        tmp_path / "llm", image_size=56, num_frames=4, frames_per_clip=2
    )
    processor.save_pretrained(tmp_path / "saved")
    expected = inputs_of(processor, ANSWERED, return_assistant_tokens_mask=True)
    copies = [AutoProcessor.from_pretrained(tmp_path / "saved"), pickle.loads(pickle.dumps(processor))]
    for other in copies:
        assert type(other) is VideoPandaProcessor
        assert other.tokenizer.padding_side == "left"
        assert other.to_dict() == processor.to_dict()
        assert other.chat_template == processor.chat_template
        inputs = inputs_of(other, ANSWERED, return_assistant_tokens_mask=True)
        assert inputs["input_ids"] == expected["input_ids"]
        assert inputs["assistant_masks"] == expected["assistant_masks"]
        torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(processor.tokenizer)
