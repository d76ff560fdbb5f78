"""Video-Panda as a model of vLLM: its Transformers backend, and how prompts, pictures and videos become its inputs."""

from .tested import TESTED  # noqa: F401  # first: what follows may be missing in another release


# isort: split
import itertools

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from video_panda_hf.processing import FLATTENED, rgb_of

from .loader import VideoPandaLoader


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class VideoPandaInfo(BaseProcessingInfo):
    """What vLLM asks of a model before there are inputs."""

    def get_supported_mm_limits(self):
        return {"image": None, "video": None}

    def get_data_parser(self):
        return DataParser(video_needs_metadata=True)

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        return {"image": self.tokens_of(1), "video": self.tokens_of(self.most_frames(seq_len, mm_counts))}

    def tokens_of(self, num_frames: int) -> int:
        """The tokens of square frames, which take the most."""
        return self.get_hf_processor()._get_num_multimodal_tokens(video_sizes=[(num_frames, *self.largest_frame)])[
            "num_video_tokens"
        ][0]

    @property
    def largest_frame(self) -> tuple[int, int]:
        side = self.get_hf_processor().video_processor.size["longest_edge"]
        return side, side

    def most_frames(self, seq_len: int, mm_counts) -> int:
        """The frames of the longest video that a prompt of `seq_len` tokens has room for."""
        clip = self.get_hf_processor().video_processor.frames_per_clip
        clips = seq_len // max(1, mm_counts.get("video", 1)) // self.tokens_of(clip)
        return clips * clip or 1


class DataParser(MultiModalDataParser):
    """Frames without metadata may be given: they are sampled like any other video. Pictures become RGB as the
    processor does it: vLLM puts transparent ones on white."""

    def _parse_image_data(self, data):
        pictures = [data] if isinstance(data, Image.Image) else data
        if isinstance(pictures, list):
            pictures = [rgb_of(one) if isinstance(one, Image.Image) else one for one in pictures]
        return super()._parse_image_data(pictures)

    def _get_video_with_metadata(self, video):
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, {} if metadata is None else metadata


class VideoPandaDummyInputs(BaseDummyInputsBuilder[VideoPandaInfo]):
    """The largest inputs, with which vLLM measures the memory that it needs."""

    def get_dummy_text(self, mm_counts) -> str:
        processor = self.info.get_hf_processor()
        return processor.image_token * mm_counts.get("image", 0) + processor.video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        height, width = self.info.largest_frame
        frames = np.zeros((self.info.most_frames(seq_len, mm_counts), height, width, 3), np.uint8)
        return {
            "image": [Image.fromarray(frames[0])] * mm_counts.get("image", 0),
            "video": [(frames, {"do_sample_frames": False})] * mm_counts.get("video", 0),
        }


class VideoPandaMultiModalProcessor(BaseMultiModalProcessor[VideoPandaInfo]):
    """
    Pictures, videos and tokens of a prompt → the model's inputs.

    `<video>` stands for a video. `<image>` is no token of its own, so `<row>` takes its place.
    """

    def __init__(self, info, dummy_inputs, **kwargs):
        super().__init__(info, dummy_inputs, **kwargs)
        media_io_kwargs = info.ctx.get_mm_config().media_io_kwargs
        VideoPandaLoader.use(info.model_id, info.get_hf_processor().video_processor, media_io_kwargs)

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        settings = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        inputs = BatchFeature()
        for modality, items in mm_items.items():
            made = [self._prepare(modality, item, settings) for item in items.get_all()]
            if made:
                inputs[PIXELS[modality]] = torch.cat([item["pixel_values_videos"] for item in made])
                inputs[f"{modality}_grid_thw"] = torch.cat([item["video_grid_thw"] for item in made])
                # In a prompt, a line break or a space is before them. It matters where times are written.
                texts = [item["text_replacement_offsets"][0][0]["replacement"] for item in made]
                ids = [self._ids_after("\n", text) for text in texts]
                inputs[f"{modality}_ids"] = torch.tensor(list(itertools.chain.from_iterable(ids)))
                inputs[f"{modality}_lengths"] = torch.tensor([len(one) for one in ids])
        return inputs

    def _prepare(self, modality: str, item, settings) -> BatchFeature:
        """The processor's inputs of one picture or video. Frames that were sampled before are taken as they are."""
        processor = self.info.get_hf_processor()
        given = {"return_tensors": "pt", "return_text_replacement_offsets": True, **settings}
        if modality == "image":
            return processor(text=processor.image_token, images=[item], **given)
        frames, metadata = item
        metadata = dict(metadata)
        if "do_sample_frames" in metadata:
            given["do_sample_frames"] = metadata.pop("do_sample_frames")
        if metadata:
            given["video_metadata"] = [metadata]
        return processor(text=processor.video_token, videos=[frames], **given)

    def _ids_of(self, text: str) -> list[int]:
        return self.info.get_tokenizer().encode(text, add_special_tokens=False)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = {}
        for modality, pixels in PIXELS.items():
            if pixels in hf_inputs:
                grids = f"{modality}_grid_thw"
                fields[pixels] = MultiModalFieldConfig.flat_from_sizes(modality, hf_inputs[grids].prod(-1))
                fields[grids] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
                lengths = hf_inputs.pop(f"{modality}_lengths")
                fields[f"{modality}_ids"] = MultiModalFieldConfig.flat_from_sizes(modality, lengths, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        embedded = self.info.get_hf_processor().video_token_ids
        updates = []
        for modality, items in out_mm_kwargs.items():
            ids = [item.pop(f"{modality}_ids").data.tolist() for item in items]  # the model takes no such input
            details = [PromptUpdateDetails.select_token_ids(one, embedded) for one in ids]
            updates.append(PromptReplacement(modality, self._marker_of(modality), details.__getitem__))
        return updates

    def _marker_of(self, modality: str) -> list[int]:
        video, row = self.info.get_hf_processor().video_token_ids
        return [row if modality == "image" else video]

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        token_ids = self._with_markers_of_pictures(self._with_start(token_ids))
        for modality in PIXELS:
            found, given = token_ids.count(*self._marker_of(modality)), len(mm_prompt_updates.get(modality, ()))
            if found != given:
                raise ValueError(
                    f"the prompt has {found} <{modality}>, but there are {given} of them. "
                    "Served by vLLM, <image> and <video> in the text of a message are places of pictures and videos."
                )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)

    def _with_start(self, token_ids: list[int]) -> list[int]:
        """vLLM lets chat templates write the token that starts a text. The paper's leaves it to the tokenizer."""
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        text = tokenizer.encode("<", add_special_tokens=False)
        start = tokenizer.encode("<")[: -len(text)]
        is_written = FLATTENED in str(processor.chat_template) or token_ids[: len(start)] == start
        return token_ids if is_written else start + token_ids

    def _with_markers_of_pictures(self, token_ids: list[int]) -> list[int]:
        """`<image>` becomes `<row>`, which is one token and cannot be in a prompt otherwise."""
        tokenizer, processor = self.info.get_tokenizer(), self.info.get_hf_processor()
        if processor.row_token_id in token_ids:
            raise ValueError(f"{processor.row_token} is reserved for the rows of a video's tokens")
        special, parts = tokenizer.added_tokens_decoder, []
        for is_special, run in itertools.groupby(token_ids, special.__contains__):
            part, marker = list(run), processor.row_token if parts else ""
            if not is_special and processor.image_token in (text := tokenizer.decode(part)):
                # What a tokenizer makes of a text depends on whether a special token is before it.
                texts = [t for t in (text, f" {text}", text.lstrip()) if self._ids_after(marker, t) == part]
                if not texts:
                    raise ValueError("<image> cannot be found: this tokenizer does not read what it has written")
                part = self._ids_after(marker, texts[0].replace(processor.image_token, processor.row_token))
            parts += part
        return parts

    def _ids_after(self, before: str, text: str) -> list[int]:
        """The tokens of a text that goes on after another."""
        return self._ids_of(before + text)[len(self._ids_of(before)) :]


@MULTIMODAL_REGISTRY.register_processor(
    VideoPandaMultiModalProcessor, info=VideoPandaInfo, dummy_inputs=VideoPandaDummyInputs
)
class VideoPandaForConditionalGeneration(TransformersMultiModalForCausalLM):
    """STAB and projector as they are, the language model with vLLM's layers and cache."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<{modality}>"

    def embed_multimodal(self, **kwargs):
        """The tokens of each picture or video, as they stand at `<video>` and `<row>`."""
        found = [m for m in PIXELS if kwargs.get(PIXELS[m]) is not None]
        return [
            tokens
            for modality in found
            for tokens in self.model.get_video_features(
                kwargs[PIXELS[modality]], kwargs[f"{modality}_grid_thw"]
            ).pooler_output
        ]

    def compute_logits(self, hidden_states):
        """Without `<video>` and `<row>`, which are never generated: vLLM reads no `suppress_tokens`."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:  # as on all but one of several GPUs
            logits[..., self.config.video_token_id] = float("-inf")
            logits[..., self.config.row_token_id] = float("-inf")
        return logits
