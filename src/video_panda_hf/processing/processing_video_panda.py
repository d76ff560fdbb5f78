"""Text, pictures and videos → the inputs of Video-Panda: `<video>` becomes the tokens that its video takes up."""

import inspect
import re
from collections.abc import Mapping
from functools import partial

import torch
from transformers import BatchFeature, ProcessingKwargs, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, Unpack
from transformers.video_utils import VideoInput

from .video_processing_video_panda import VideoPandaVideoProcessor


try:
    from video_panda_hf.processing import answers, lengths, literals, templates
except ImportError:  # this file came with a checkpoint, and the package is not installed
    answers = lengths = literals = templates = None  # type: ignore[assignment]

IMAGE_TOKEN = "<image>"  # in prompts only: a picture is a video of one frame, so the model's token is `<video>`
VIDEO_TOKEN = "<video>"
ROW_TOKEN = "<row>"

FLATTENED = "{%- set messages = flat.messages %}"  # ends what `chat_templates/flatten.jinja` puts before a template
BEFORE_ANSWER = re.compile(r"\A +|(?<=ASSISTANT:) ")
PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


class VideoPandaProcessor(ProcessorMixin):
    """
    Prepares text, pictures and videos for the model. It is called with `text=`, `images=` and `videos=`.

    One `<video>` in a text stands for one video. It is replaced by the placeholders of the video's tokens: for each of
    T frames of h × w tokens, one `<video>` for the frame's context token, then h rows of w `<video>` and one `<row>`.
    One `<image>` stands for one picture, a video of one frame. `<row>` is reserved and must not occur in a text.

    `return_mm_token_type_ids=True` adds `mm_token_type_ids`: 2 for `<video>` and `<row>`, 0 for text.

    Args:
        video_processor (`VideoPandaVideoProcessor`):
            Turns videos into pixels.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer, which has to know `<video>` and `<row>`.
        chat_template (`str`, *optional*):
            A Jinja template that writes a conversation as a prompt.
    """

    def __init__(self, video_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token, self.row_token = IMAGE_TOKEN, VIDEO_TOKEN, ROW_TOKEN
        self.video_token_id = token_id(tokenizer, VIDEO_TOKEN)
        self.row_token_id = token_id(tokenizer, ROW_TOKEN)
        self.video_token_ids = [self.video_token_id, self.row_token_id]
        self.after_video = space_after_video(tokenizer)
        super().__init__(video_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """As `ProcessorMixin`'s. Raises `ValueError` for prompts without `<row>`, a switch of earlier checkpoints."""
        if not processor_dict.get("use_row_tokens", True):
            raise ValueError("`use_row_tokens=False`: this model has all parts. One without is in examples/ablations.")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def from_text_pretrained(
        cls,
        tokenizer_or_path,
        image_size: int = 448,
        patch_size: int = 14,
        chat_template: str | None = None,
        gguf_file: str | None = None,
        **kwargs,
    ) -> "VideoPandaProcessor":
        """
        The processor of a new model around a causal LM.

        Its tokenizer has `<video>` and `<row>` as special tokens and pads on the left. Without a padding token of its
        own it pads with its end-of-sequence token; a training collator must then mask by `attention_mask`.

        Args:
            tokenizer_or_path (`str`, `Path` or `PreTrainedTokenizerBase`):
                Folder or Hub id of the LLM, or its tokenizer, which is copied.
            image_size (`int`, *optional*, defaults to 448):
                Side of the model's canvas in pixels.
            patch_size (`int`, *optional*, defaults to 14):
                Side of the model's patches in pixels.
            chat_template (`str`, *optional*):
                Defaults to the LLM's own, extended to take videos in the content of messages. An LLM without one gets
                `CHAT_TEMPLATE`.
            gguf_file (`str`, *optional*):
                A file of the LLM in GGUF that has its tokenizer.
            kwargs:
                Further settings of `VideoPandaVideoProcessor`.

        Raises:
            ValueError: if the tokenizer has neither a padding nor an end-of-sequence token.
        """
        need_package(templates, "A new processor")
        tokenizer, own_template = templates.for_videos(tokenizer_or_path, [VIDEO_TOKEN, ROW_TOKEN], gguf_file)
        video_processor = VideoPandaVideoProcessor(size={"longest_edge": image_size}, patch_size=patch_size, **kwargs)
        return cls(video_processor, tokenizer, chat_template or own_template)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As `ProcessorMixin`'s, without the `auto_map` that it leaves on the processor it has saved."""
        saved = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)
        return saved

    def __call__(
        self,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        images: ImageInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`, *optional*):
                One prompt or several, with one `<image>` or `<video>` for each of their pictures and videos.
            videos (*optional*):
                The videos in the order of their `<video>`, in any form that `VideoPandaVideoProcessor` takes.
            images (*optional*):
                The pictures in the order of their `<image>`: PIL images, arrays, tensors, or picture files
                (paths, URLs, base64, bytes, binary files).
            kwargs:
                Settings of the tokenizer (`padding`, …) and the video processor (`num_frames`, …).

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, and with pictures or videos `pixel_values_videos` and
            `video_grid_thw`, in the order of the prompts.

        Raises:
            ValueError: if there are not as many `<image>` as pictures and `<video>` as videos, or a text contains
                `<row>`.
        """
        if "images_kwargs" in kwargs:  # one processor prepares both
            kwargs["videos_kwargs"] = {**kwargs.pop("images_kwargs"), **kwargs.get("videos_kwargs", {})}
        has_literals = literals is not None and text is not None and literals.are_in(text)
        options = {**kwargs, **literals.WITH_OFFSETS} if has_literals else kwargs
        inputs = super().__call__(images=images, text=text, videos=videos, **options)
        if text is not None and has_literals:
            inputs = literals.as_text(inputs, text, self.tokenizer, kwargs)
        if lengths is not None:
            lengths.warn_if_too_long(inputs, self)
        return inputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Pictures and videos in one list, in the order of the prompts, where `<video>` then stands for each."""
        if audio is not None:
            raise ValueError("this model takes text, pictures and videos, no sound")
        pictures = self.video_processor.list_pictures(images)
        videos = self.video_processor.list_videos([] if videos is None else videos)
        _, text, _, _ = super().prepare_inputs_layout(text=text)
        if text is None and not pictures and not videos:
            raise ValueError(f"You need to provide at least one input to call {type(self).__name__}")
        if text is None:
            return None, None, type(pictures)([*pictures, *videos]), None
        if not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("`text` must be a string or a list of strings")
        if any(self.row_token in prompt for prompt in text):
            raise ValueError(f"{self.row_token} is reserved for the rows of a video's tokens: take it out of the text")
        markers = [marker for prompt in text for marker in re.findall(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}", prompt)]
        for token, given, name in ((IMAGE_TOKEN, pictures, "images"), (VIDEO_TOKEN, videos, "videos")):
            if markers.count(token) != len(given):
                raise ValueError(
                    f"The total number of {token} tokens in the prompts should be the same as the number of {name} "
                    f"passed. Found total {markers.count(token)} {token} tokens and {len(given)} {name}."
                )
        waiting = {IMAGE_TOKEN: iter(pictures), VIDEO_TOKEN: iter(videos)}
        videos = type(pictures)(next(waiting[marker]) for marker in markers)
        return None, [prompt.replace(IMAGE_TOKEN, VIDEO_TOKEN) for prompt in text], videos or None, None

    def validate_inputs(self, *args, **kwargs):
        """`prepare_inputs_layout` has done it."""

    def _process_videos(self, videos, return_metadata=None, timestamps=None, **kwargs):
        timestamps = self.video_processor.timestamps if timestamps is None else timestamps
        inputs = self.video_processor(videos, return_metadata=return_metadata or timestamps, **kwargs)
        metadata = inputs["video_metadata"] if return_metadata else inputs.pop("video_metadata", None)
        times = metadata if timestamps else [None] * len(inputs["video_grid_thw"])
        texts = [self.replace_video_token(inputs, i, metadata=times[i], **kwargs) for i in range(len(times))]
        return inputs, texts

    def placeholders_of_frame(self, rows: int, columns: int) -> list[str]:
        """Those of a frame of rows × columns tokens: context, then each row and `<row>` (paper eq. 15-17)."""
        return [self.video_token, *([self.video_token] * columns + [self.row_token]) * rows]

    def replace_video_token(self, video_inputs: dict, video_idx: int, metadata=None, **kwargs) -> str:
        """The placeholders of one video. With `metadata`, the time of each clip stands before it."""
        merge_size = kwargs.get("merge_size") or self.video_processor.merge_size
        t, h, w = (int(n) for n in video_inputs["video_grid_thw"][video_idx])
        frame = "".join(self.placeholders_of_frame(h // merge_size, w // merge_size))
        if metadata is None or t == 1:
            return frame * t + self.after_video
        if metadata.fps is None or metadata.frames_indices is None:
            raise ValueError(
                f"`timestamps` need the rate of video {video_idx}: give `video_metadata` with `fps` and "
                "`total_num_frames`, or a video file"
            )
        clip = kwargs.get("frames_per_clip") or self.video_processor.frames_per_clip
        times = [timestamp(index / metadata.fps) for index in metadata.frames_indices[::clip]]
        return "".join(time + frame * clip for time in times) + self.after_video

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """The tokens of pictures of (height, width) and of sampled videos of (frames, height, width), for engines."""
        settings = {**kwargs, **kwargs.get("videos_kwargs", {})}
        tokens, patches = self.video_processor.tokens_of_frame, self.video_processor.get_num_of_video_patches
        data = {}
        if image_sizes is not None:
            data["num_image_tokens"] = [tokens(h, w, **settings) for h, w in image_sizes]
            data["num_image_patches"] = [patches(1, h, w, settings) for h, w in image_sizes]
        if video_sizes is not None:
            data["num_video_tokens"] = [t * tokens(h, w, **settings) for t, h, w in video_sizes]
        return MultiModalData(**data)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        One conversation or several → the prompt, or with `tokenize=True, return_dict=True` the inputs of the model.

        The content of a message is a string or a list of `{"type": "text", "text": …}`, `{"type": "image", "image":
        …}` (also "path", "url", "base64") and `{"type": "video", "video": …}` (also "path", "url"). Beside a video may
        stand "start" and "end" in seconds (or "video_start", "video_end"), or "indices"; and "num_frames" (or
        "nframes"), or "fps" and "max_frames". `<video>`, `<image>` and `<row>` in the text of a message are text.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                The messages, or a list of conversations.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`):
                Adds `assistant_masks`: 1 for the tokens of the answers and their end token, even if the template
                writes that outside `{% generation %}`.
            processor_kwargs (`dict`, *optional*):
                Settings of the video processor and the tokenizer. They may be given by name as well.
            chat_template, tokenize, return_dict, kwargs:
                As in [`~transformers.ProcessorMixin.apply_chat_template`], and variables of the template.

        Returns:
            `str`, or with `tokenize=True, return_dict=True` a `BatchFeature` as of a call. As tensors, it has
            `pixel_values_videos` and `video_grid_thw` even of no videos: of 0 rows, which the model takes as none.

        Raises:
            ValueError: for `return_assistant_tokens_mask` with a template that has no `{% generation %}` and alters
                the answers.
        """
        kwargs.pop("load_audio_from_video", None)  # `transformers serve` asks for it always; this model hears nothing
        template = self._chat_template(chat_template)
        if literals is not None:
            conversation = literals.marked(conversation)
            kwargs |= {name: literals.marked(kwargs[name]) for name in ("tools", "documents") if name in kwargs}
        conversation = with_whole_parts(conversation) if tokenize else conversation
        settings = self._processor_settings(kwargs)
        processor_kwargs = {**settings, **(processor_kwargs or {})}
        if FLATTENED in template:  # an LLM's own template writes the special tokens itself
            processor_kwargs.setdefault("add_special_tokens", False)
        arguments = {"chat_template": template, "tokenize": tokenize, "return_dict": return_dict}
        make = partial(super().apply_chat_template, conversation, **arguments, **kwargs)
        if tokenize and return_dict and return_assistant_tokens_mask:
            need_package(answers, "A mask of answers")
            make = partial(answers.with_mask, make, conversation, template, self.tokenizer, kwargs=kwargs)
        inputs = make(processor_kwargs=processor_kwargs)
        return self.with_videos(inputs) if tokenize and return_dict else inputs

    def with_videos(self, inputs: BatchFeature) -> BatchFeature:
        """Adds no patches of no videos to tensors without any: a pipeline joins only inputs with the same keys."""
        if isinstance(inputs["input_ids"], torch.Tensor) and "video_grid_thw" not in inputs:
            inputs["pixel_values_videos"] = torch.empty(0, 3 * self.video_processor.patch_size**2)
            inputs["video_grid_thw"] = torch.empty(0, 3, dtype=torch.long)
        return inputs

    def post_process_image_text_to_text(self, generated_outputs, **kwargs):
        """The text of token ids, without the space before an answer, which pipelines would take for a part of it."""
        texts = super().post_process_image_text_to_text(generated_outputs, **kwargs)
        return BEFORE_ANSWER.sub("", texts) if isinstance(texts, str) else [BEFORE_ANSWER.sub("", t) for t in texts]

    def _chat_template(self, name_or_template: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if name_or_template is not None:
            return templates.get(name_or_template) or name_or_template
        if templates.get("default") is None:
            raise ValueError("this processor has no default chat template: give `chat_template`")
        return templates["default"]

    def _processor_settings(self, kwargs: dict) -> dict:
        """Takes the settings of video processor and tokenizer out of `kwargs`; what remains is the template's."""
        own = set(inspect.signature(ProcessorMixin.apply_chat_template).parameters)
        nested = self.valid_processor_kwargs.__annotations__
        names = {*nested, *nested["text_kwargs"].__annotations__, *self.video_processor.valid_kwargs.__annotations__}
        return {name: kwargs.pop(name) for name in (names - own) & set(kwargs)}


def need_package(module, what: str) -> None:
    if module is None:
        raise ImportError(f"{what} needs the package video-panda-hf: `pip install video-panda-hf`.")


def token_id(tokenizer, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer has no {token}: make the processor by VideoPandaProcessor.from_text_pretrained(tokenizer) "
            f"or add {VIDEO_TOKEN} and {ROW_TOKEN} with tokenizer.add_tokens([...], special_tokens=True)"
        )
    return found


def timestamp(seconds: float) -> str:
    """Minutes and seconds, rounded: 3661 → "61:01"."""
    return "{:02}:{:02}".format(*divmod(int(seconds + 0.5), 60))


def space_after_video(tokenizer) -> str:
    """A space if the tokenizer needs one to encode the text after a video like the start of a text, as in training.
    Llama's adds a space before a text, but not after a special token unless `legacy` is set."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    start, after, after_space = encode("\n"), encode(ROW_TOKEN + "\n")[1:], encode(ROW_TOKEN + " \n")[1:]
    return " " if after != start and after_space == start else ""


def with_whole_parts(conversation):
    """Writes pictures as `{"type": "image", "image": part}`, videos as `{"type": "video", "video": part}`, in one
    conversation or several: transformers hands over what is under that key, and `part` has all that was given."""
    if isinstance(conversation, (list, tuple)):
        return [with_whole_parts(item) for item in conversation]
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("content"), (list, tuple)):
        return conversation
    return {**conversation, "content": [whole_part(part) for part in conversation["content"]]}


def whole_part(part):
    kind = PARTS.get(part.get("type")) if isinstance(part, Mapping) else None
    if kind is None:
        return part
    given = {key: value for key, value in part.items() if key != "type" and value is not None}
    if "url" in part["type"]:  # as OpenAI's: {"type": "image_url", "image_url": {"url": …, "detail": …}}
        url = given[part["type"]]
        given = {"url": url["url"] if isinstance(url, Mapping) else url}
    return {"type": kind, kind: given} if given else {"type": kind}
