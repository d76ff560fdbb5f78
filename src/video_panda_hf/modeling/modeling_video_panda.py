"""Video-Panda: STAB's tokens, projected into the embedding space of any causal language model.

`VideoPandaForConditionalGeneration` is what answers questions. Its forward is features → scatter → language model.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import (
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, torch_compilable_check

from .configuration_video_panda import VideoPandaConfig, VideoPandaVisionConfig
from .modeling_video_panda_vision import VideoPandaPreTrainedModel, VideoPandaVisionModel


# transformers renames fields of its outputs between releases: `past_key_values` became `cache` in 5.24. So the classes
# below inherit the installed release's fields, and the language model's cache passes through `**kwargs`.


@dataclass
class VideoPandaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    The language model's output and, beside it:

    video_hidden_states (`torch.FloatTensor` of shape `(tokens of all videos, text hidden size)`, *optional*):
        The projected tokens that stand at the placeholders.
    video_outputs (`BaseModelOutputWithPooling`, *optional*):
        The same as `pooler_output`: one tensor `(tokens, text hidden size)` per video.
    """

    video_hidden_states: torch.FloatTensor | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling | None:
        """Transformers' name for what pictures gave. Here a picture is a video of one frame."""
        return self.video_outputs


@dataclass
class VideoPandaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    A causal LM's output (`loss`, `logits`, cache, `hidden_states`, `attentions`) and, beside it, what
    [`VideoPandaModelOutputWithPast`] has.
    """

    video_hidden_states: torch.FloatTensor | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    image_outputs = VideoPandaModelOutputWithPast.image_outputs


# Listed once: `torch.compile(fullgraph=True)` cannot call `fields`.
VIDEOS = ("pixel_values_videos", "video_grid_thw")
MODEL_FIELDS = frozenset(field.name for field in fields(VideoPandaModelOutputWithPast))
CAUSAL_LM_FIELDS = frozenset(field.name for field in fields(VideoPandaCausalLMOutputWithPast))


class VideoPandaProjector(nn.Module):
    """STAB's width → the language model's: Linear, GELU, Linear."""

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        text_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, text_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(tokens)))


class VideoPandaModel(VideoPandaPreTrainedModel):
    """STAB, projector and language model without its head."""

    vision_class = VideoPandaVisionModel

    def __init__(self, config: VideoPandaConfig):
        super().__init__(config)
        self.vision_tower = self.vision_class(config.vision_config)
        self.multi_modal_projector = VideoPandaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if getattr(config, "quantization_config", None) is not None:
            # No quantiser touches these: all that the LLM sees goes through them, and they are 0.7 % of 7B. The list
            # is set only for a quantiser, because otherwise it keeps them in float32 when float16 is asked for.
            spared = ("vision_tower", "multi_modal_projector")
            self._keep_in_fp32_modules = [*spared, *(f"model.{name}" for name in spared)]
        self.post_init()

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        STAB and projector.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(patches, channels * patch_size**2)`):
                Packed patches of all videos, as the video processor returns them.
            video_grid_thw (`torch.LongTensor` of shape `(videos, 3)`):
                Frames, rows and columns of each video, in patches.

        Returns:
            STAB's output, `last_hidden_state` `(patches, vision hidden size)`, with `pooler_output`: one tensor
            `(tokens, text hidden size)` per video, 1 + h·(w + 1) tokens for each frame of h × w tokens.
        """
        outputs = self.vision_tower(pixel_values_videos, video_grid_thw, return_dict=True, **kwargs)
        # Every distinct token is projected once, also ROW, which ends many rows.
        tokens = self.multi_modal_projector(outputs.tokens)[outputs.token_order]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens.split(outputs.tokens_per_video),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(self, input_ids, inputs_embeds, video_features) -> torch.BoolTensor:
        """
        Where `<video>` and `<row>` stand, as a mask (batch, sequence, 1).

        Raises:
            ValueError: if they are not as many as the features.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        count = mask.sum()
        torch_compilable_check(
            count == video_features.shape[0],
            lambda: (
                f"Video features and placeholder tokens do not match: the prompt has {int(count)} `<video>` and "
                f"`<row>` tokens, the videos give {video_features.shape[0]} features. Build prompt and pixels with "
                "one call of the processor, and do not cut the prompt (truncation, chunked prefill) inside a video."
            ),
        )
        return mask[..., None]

    def find_placeholders(self, input_ids, inputs_embeds=None) -> torch.BoolTensor:
        """Where `<video>` and `<row>` stand, as a mask (batch, sequence); by the embeddings if there are no ids."""
        placeholders = (self.config.video_token_id, self.config.row_token_id)
        if input_ids is not None:
            return (input_ids == placeholders[0]) | (input_ids == placeholders[1])
        ids = torch.tensor(placeholders).to(inputs_embeds.device, non_blocking=True)
        return (inputs_embeds[..., None, :] == self.get_input_embeddings()(ids)).all(-1).any(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        input_features: torch.FloatTensor | None = None,
        **kwargs,
    ) -> VideoPandaModelOutputWithPast:
        r"""
        Args:
            pixel_values_videos, video_grid_thw:
                The videos, see [`~VideoPandaModel.get_video_features`].
            mm_encoder_outputs (`dict`, *optional*):
                `{"video": ...}`: what `get_video_features` returned, in place of the videos.
            input_features (`torch.FloatTensor` of shape `(batch, tokens, text hidden size)`, *optional*):
                The projected tokens of each prompt, padded at the end, in place of the videos. `generate` gives them
                where it repeats prompts.
            kwargs:
                What the language model takes: its cache (`cache`, before transformers 5.24 `past_key_values`),
                `use_cache`, `output_attentions`, …
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        encoded = (mm_encoder_outputs or {}).get("video")
        if encoded is None and pixel_values_videos is not None and len(pixel_values_videos):
            if video_grid_thw is None:
                raise ValueError("`pixel_values_videos` need `video_grid_thw`: frames, rows, columns of each video.")
            encoded = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)

        video_features = video_outputs = None
        if encoded is not None:
            video_outputs = BaseModelOutputWithPooling(pooler_output=tuple(encoded.pooler_output))
            video_features = torch.cat(list(encoded.pooler_output))
        elif input_features is not None:
            counts = self.find_placeholders(input_ids, inputs_embeds).sum(1, keepdim=True)  # (batch, 1)
            video_features = input_features[torch.arange(input_features.shape[1], device=counts.device) < counts]
        if video_features is not None:
            video_features = video_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, video_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, video_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return VideoPandaModelOutputWithPast(
            **{name: value for name, value in outputs.items() if name in MODEL_FIELDS},
            video_hidden_states=video_features,
            video_outputs=video_outputs,
        )


class VideoPandaForConditionalGeneration(VideoPandaPreTrainedModel, GenerationMixin):
    """Video-Panda with its LM head: videos and a prompt in, an answer out."""

    model_class = VideoPandaModel
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoPandaConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_text_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        vision_config: VideoPandaVisionConfig | dict | None = None,
        video_token_id: int | None = None,
        row_token_id: int | None = None,
        **kwargs,
    ) -> "VideoPandaForConditionalGeneration":
        r"""
        Starts a new model: a pretrained causal LM, a fresh STAB and projector. The processor that goes with it comes
        from `VideoPandaProcessor.from_text_pretrained` with the same name.

        Args:
            pretrained_model_name_or_path (`str`):
                Folder or Hub id of any causal LM.
            vision_config (`VideoPandaVisionConfig` or `dict`, *optional*):
                STAB's sizes. Defaults to the released model's.
            video_token_id, row_token_id (`int`, *optional*):
                Ids of `<video>` and `<row>`. Defaults to the next two of the LM's tokenizer, as in the processor.
            kwargs:
                What `AutoModelForCausalLM.from_pretrained` takes: `dtype`, `device_map`, `revision`, `gguf_file`, …

        Raises:
            ValueError: if the LM's head is more than a linear map, which this model could not reproduce.
        """
        try:
            from video_panda_hf.modeling.new_model import model_around
        except ImportError as error:  # this file came with a checkpoint, and the package is not installed
            raise ImportError("A new model needs the package video-panda-hf: `pip install video-panda-hf`.") from error
        return model_around(cls, pretrained_model_name_or_path, vision_config, video_token_id, row_token_id, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw, **kwargs):
        """STAB and projector, see [`~VideoPandaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        input_features: torch.FloatTensor | None = None,
        **kwargs,
    ) -> VideoPandaCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                The tokens to learn, -100 where there is nothing to learn.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Where to compute logits: the last so many positions (0: all), a tensor of positions, or a mask `(batch,
                sequence)`, which gives logits `(kept, vocabulary)` and, of the labels, those that follow a kept
                position. In training, logits take most of the memory, and a long video before a short answer has far
                more positions than labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            mm_encoder_outputs=mm_encoder_outputs,
            input_features=input_features,
            return_dict=True,
            **kwargs,
        )
        hidden_states, loss = outputs.last_hidden_state, None
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            logits = self.lm_head(hidden_states[logits_to_keep])  # (kept, vocabulary)
            if labels is not None:
                kwargs["shift_labels"] = labels_after(labels)[logits_to_keep.to(labels.device)]
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        shared = {name: value for name, value in outputs.items() if name in CAUSAL_LM_FIELDS}
        return VideoPandaCausalLMOutputWithPast(loss=loss, logits=logits, **shared)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ):
        r"""
        `GenerationMixin.generate`, for prompts with videos.

        `<video>` and `<row>` stand for pixels and are never generated, whatever the settings.

        Args:
            inputs, generation_config, logits_processor, kwargs:
                As in [`~transformers.GenerationMixin.generate`], and the inputs that the processor returns.

        With a cache, `input_ids` are the whole conversation; its videos whose tokens are in the cache are left out.

        Raises:
            ValueError: for a prompt longer than the language model's context, and for a `prefill_chunk_size` with
                videos, which would cut a video's tokens apart.
        """

        def setting(name):
            if name in kwargs:
                return kwargs[name]
            configured = [getattr(config, name, None) for config in (generation_config, self.generation_config)]
            return next((value for value in configured if value is not None), None)

        if kwargs.get("pixel_values_videos") is not None and not len(kwargs["pixel_values_videos"]):
            kwargs = {name: value for name, value in kwargs.items() if name not in VIDEOS}
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        self.check_length(input_ids, kwargs.get("attention_mask"), kwargs.get("video_grid_thw"))
        cache = kwargs.get("cache") if kwargs.get("past_key_values") is None else kwargs["past_key_values"]
        cached = 0 if cache is None else cache.get_seq_length()
        if cached and input_ids is not None and kwargs.get("pixel_values_videos") is not None:
            self._leave_out_cached_videos(input_ids, cached, kwargs)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        if encoded is not None or kwargs.get("pixel_values_videos") is not None:
            if (chunk_size := setting("prefill_chunk_size")) is not None:
                raise ValueError(
                    f"prefill_chunk_size = {chunk_size}: a prompt with videos goes in whole, because transformers "
                    "does not count `<row>` among their tokens. Leave it at None."
                )
            if encoded is not None or max(setting("num_beams") or 1, setting("num_return_sequences") or 1) > 1:
                # transformers repeats the rows of every tensor for beams, but packed patches have no row per prompt.
                # And 5.16 hands `mm_encoder_outputs` over again at every step.
                videos = [kwargs.pop(name, None) for name in VIDEOS]
                kwargs.pop("mm_encoder_outputs", None)
                features = (encoded or self.get_video_features(*videos, return_dict=True)).pooler_output
                new_ids = None if input_ids is None else input_ids[:, cached:]
                kwargs["input_features"] = self._by_prompt(features, new_ids, kwargs.get("inputs_embeds"))
        placeholders = PlaceholdersLogitsProcessor(
            [self.config.video_token_id, self.config.row_token_id], device=self.device
        )
        logits_processor = LogitsProcessorList([placeholders, *(logits_processor or [])])
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def check_length(self, input_ids, attention_mask, video_grid_thw) -> None:
        """Raises `ValueError` for a prompt that is longer than the language model's context."""
        context = context_length(self.config.get_text_config())
        if input_ids is None or context is None or input_ids.shape[1] <= context:
            return
        length = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).max())
        if length > context:
            advice, of_videos = "Shorten it.", int(self.model.find_placeholders(input_ids).sum())
            if of_videos and video_grid_thw is not None and len(input_ids) == 1:
                frames = int(video_grid_thw[:, 0].sum())
                fitting = max(0, frames * (context - length + of_videos) // of_videos)
                fitting -= fitting % self.config.vision_config.frames_per_clip
                advice = f"It has {frames} frames of video; about {fitting} would fit."
            raise ValueError(f"the prompt has {length} tokens, and the language model's context {context}. {advice}")

    def _leave_out_cached_videos(self, input_ids, cached: int, kwargs: dict) -> None:
        """Takes the videos whose tokens are among the first `cached` of a prompt out of `kwargs`."""
        pixels, grids = kwargs["pixel_values_videos"], kwargs["video_grid_thw"].cpu()
        lengths = self.model.vision_tower.lay_out(pixels, grids).tokens_per_video
        positions = self.model.find_placeholders(input_ids).nonzero()[:, 1].cpu()
        if sum(lengths) != len(positions):
            return  # the caller has left them out
        parts = positions.split(lengths)
        if cut := [i for i, part in enumerate(parts) if part.min() < cached <= part.max()]:
            raise ValueError(f"the cache of {cached} tokens ends in the middle of video {cut[0]}: crop it before that")
        is_new = torch.stack([part.min() >= cached for part in parts])
        del kwargs["pixel_values_videos"], kwargs["video_grid_thw"]
        if is_new.any():
            rows = is_new.repeat_interleave(grids.prod(1)).to(pixels.device)
            kwargs |= {"pixel_values_videos": pixels[rows], "video_grid_thw": grids[is_new]}

    def _by_prompt(self, features, input_ids, inputs_embeds) -> torch.Tensor:
        """`features` of each video → those of each prompt, padded at the end: (batch, tokens, text hidden size)."""
        features = torch.cat(list(features))
        counts = self.model.get_placeholder_mask(input_ids, inputs_embeds, features).sum((1, 2))
        return nn.utils.rnn.pad_sequence(features.split(counts.tolist()), batch_first=True)


class PlaceholdersLogitsProcessor(SuppressTokensLogitsProcessor):
    """
    Keeps `<video>` and `<row>` from being generated.

    It is a subclass because transformers keeps only one of two processors of the same class, and a user may pass a
    `SuppressTokensLogitsProcessor`.
    """


def context_length(config) -> int | None:
    """The number of tokens that a language model is made for, as its rotary embedding may have been stretched."""
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    stretched = [
        (kind.get("original_max_position_embeddings") or longest or 0) * (kind.get("factor") or 1) for kind in kinds
    ]
    return longest and int(max([longest, *stretched]))


def labels_after(labels: torch.Tensor) -> torch.Tensor:
    """The label for each position's logits, which is the next position's: (rows, tokens), -100 where there is none."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
