"""Video-Panda: STAB's tokens, projected into the embedding space of any causal language model.

`VideoPandaForConditionalGeneration` is what answers questions. Its forward is features → scatter → language model.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
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
    r"""
    A causal LM's output (`loss`, `logits`, cache, `hidden_states`, `attentions`) and, beside it:

    video_hidden_states (`torch.FloatTensor` of shape `(tokens of all videos, text hidden size)`, *optional*):
        The projected tokens that stand at the placeholders.
    video_outputs (`BaseModelOutputWithPooling`, *optional*):
        The same as `pooler_output`: one tensor `(tokens, text hidden size)` per video.
    """

    video_hidden_states: torch.FloatTensor | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    image_outputs = VideoPandaModelOutputWithPast.image_outputs


# Listed once: `torch.compile(fullgraph=True)` cannot call `fields`.
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

    def __init__(self, config: VideoPandaConfig):
        super().__init__(config)
        self.vision_tower = VideoPandaVisionModel(config.vision_config)
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
        if encoded is None and pixel_values_videos is not None:
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

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoPandaConfig):
        super().__init__(config)
        self.model = VideoPandaModel(config)
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
                What `AutoModelForCausalLM.from_pretrained` takes: `dtype`, `device_map`, `revision`, `token`, …

        Raises:
            ValueError: if the LM's head is more than a linear map, which this model could not reproduce.
        """
        if video_token_id is None or row_token_id is None:
            hub_options = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, **{key: kwargs[key] for key in hub_options if key in kwargs}
            )
            tokenizer.add_tokens(["<video>", "<row>"], special_tokens=True)
            video_token_id, row_token_id = tokenizer.convert_tokens_to_ids(["<video>", "<row>"])

        text_model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = cls.config_class(
            vision_config=vision_config,
            text_config=text_model.config,
            video_token_id=video_token_id,
            row_token_id=row_token_id,
            dtype=text_model.dtype,
        )
        with torch.device("meta"):  # no memory for a second LM: the loaded one replaces it below
            model = cls(config)
        head = text_model.get_output_embeddings()
        projector = VideoPandaProjector(config)
        projector.apply(model._init_weights)
        model.model.vision_tower = VideoPandaVisionModel(config.vision_config).to(head.weight.device, text_model.dtype)
        model.model.multi_modal_projector = projector.to(head.weight.device, text_model.dtype)
        model.model.language_model = text_model.base_model
        model.lm_head = head
        check_same_logits(text_model, model)
        if max(video_token_id, row_token_id) >= config.text_config.vocab_size:
            model.resize_token_embeddings(max(video_token_id, row_token_id) + 1)
        model.generation_config = text_model.generation_config
        return model.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

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

        Example:

        ```python
        processor = AutoProcessor.from_pretrained("path/to/checkpoint")
        model = AutoModelForImageTextToText.from_pretrained("path/to/checkpoint")
        content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What happens in the video?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=64)
        print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        ```
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

        Raises:
            ValueError: for a `prefill_chunk_size` with videos, which would cut a video's tokens apart.
        """

        def setting(name):
            if name in kwargs:
                return kwargs[name]
            configured = [getattr(config, name, None) for config in (generation_config, self.generation_config)]
            return next((value for value in configured if value is not None), None)

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
                videos = [kwargs.pop(name, None) for name in ("pixel_values_videos", "video_grid_thw")]
                kwargs.pop("mm_encoder_outputs", None)
                features = (encoded or self.get_video_features(*videos, return_dict=True)).pooler_output
                input_ids = kwargs.get("input_ids") if inputs is None else inputs
                kwargs["input_features"] = self._by_prompt(features, input_ids, kwargs.get("inputs_embeds"))
        placeholders = PlaceholdersLogitsProcessor(
            [self.config.video_token_id, self.config.row_token_id], device=self.device
        )
        logits_processor = LogitsProcessorList([placeholders, *(logits_processor or [])])
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

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


def labels_after(labels: torch.Tensor) -> torch.Tensor:
    """The label for each position's logits, which is the next position's: (rows, tokens), -100 where there is none."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


@torch.no_grad()
def check_same_logits(text_model: nn.Module, model: VideoPandaForConditionalGeneration) -> None:
    """Raises `ValueError` if the model around a causal LM does not give the LM's own logits for a text prompt."""
    input_ids = torch.arange(4, device=text_model.get_input_embeddings().weight.device)[None]
    training, _ = text_model.training, text_model.eval()
    expected, got = text_model(input_ids).logits, model(input_ids).logits
    text_model.train(training)
    if not torch.allclose(expected.float(), got.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(text_model).__name__} does more than a linear LM head after its last hidden state (soft-capped or "
            "scaled logits, say), which Video-Panda's head would drop. Choose a causal LM with a plain LM head."
        )
