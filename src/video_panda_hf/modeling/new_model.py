"""A new model around a pretrained causal language model."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


FILE_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "gguf_file")


def model_around(cls, language_model: str, vision_config, video_token_id, row_token_id, **kwargs):
    """What `from_text_pretrained` of the model's class `cls` returns, see there."""
    if video_token_id is None or row_token_id is None:
        options = {name: kwargs[name] for name in FILE_OPTIONS if name in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(language_model, **options)
        tokenizer.add_tokens(["<video>", "<row>"], special_tokens=True)
        video_token_id, row_token_id = tokenizer.convert_tokens_to_ids(["<video>", "<row>"])

    text_model = AutoModelForCausalLM.from_pretrained(language_model, **kwargs)
    config = cls.config_class(
        vision_config=vision_config,
        text_config=text_model.config,
        video_token_id=video_token_id,
        row_token_id=row_token_id,
        dtype=text_model.dtype,
    )
    with torch.device("meta"):  # no memory for a second LM: the loaded one replaces it below
        model = cls(config)
    head, parts = text_model.get_output_embeddings(), model.model
    projector = type(parts.multi_modal_projector)(config)
    projector.apply(model._init_weights)
    parts.vision_tower = type(parts.vision_tower)(config.vision_config).to(head.weight.device, text_model.dtype)
    parts.multi_modal_projector = projector.to(head.weight.device, text_model.dtype)
    parts.language_model = text_model.base_model
    model.lm_head = head
    check_same_logits(text_model, model)
    if max(video_token_id, row_token_id) >= config.text_config.vocab_size:
        model.resize_token_embeddings(max(video_token_id, row_token_id) + 1)
    model.generation_config = text_model.generation_config
    return model.eval()


@torch.no_grad()
def check_same_logits(text_model: torch.nn.Module, model: torch.nn.Module) -> None:
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
