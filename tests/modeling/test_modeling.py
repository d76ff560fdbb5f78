"""What the model promises beyond transformers' own tests: company, generation, loading, starting from an LLM."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
)

from helpers.tiny_models import (
    CACHE_NAME,
    PATCH_DIM,
    ROW,
    TEXT_CONFIGS,
    VIDEO,
    model_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from helpers.tiny_tokenizers import chatml_tokenizer
from video_panda_hf import (
    VideoPandaConfig,
    VideoPandaForConditionalGeneration,
    VideoPandaModel,
    VideoPandaVisionConfig,
    VideoPandaVisionModel,
)
from video_panda_hf.modeling.layout_video_panda import VideoLayout, lay_out
from video_panda_hf.modeling.modeling_video_panda import context_length


needs_newer_torch = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 cannot compile the language models of transformers either"
)
COMPANY = [[(8, 8, 8)], [(4, 4, 8), (1, 6, 4)], [], [(1, 8, 2)], [(16, 2, 6)]]


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("text", TEXT_CONFIGS)
@torch.no_grad()
def test_one_answer_whatever_the_company(text, pad_to_square):
    model = tiny_model(text, pad_to_square=pad_to_square)
    together = tiny_batch(COMPANY)
    features = model.get_video_features(together["pixel_values_videos"], together["video_grid_thw"]).pooler_output
    logits = model(**together).logits
    answers = model.generate(**together, max_new_tokens=6, do_sample=False)[:, together["input_ids"].shape[1] :]

    features = list(features)
    for row, prompt in enumerate(COMPANY):
        alone = tiny_batch([prompt])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(model(**alone).logits[0], logits[row, -length:], atol=1e-4, rtol=0)
        answer = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, length:]
        assert answer.tolist() == answers[row, : len(answer)].tolist()
        if prompt:
            of_prompt = model.get_video_features(alone["pixel_values_videos"], alone["video_grid_thw"]).pooler_output
            for expected in of_prompt:
                torch.testing.assert_close(features.pop(0), expected, atol=1e-4, rtol=0)
    assert not features


@torch.no_grad()
def test_clips_do_not_see_each_other():
    """Changing the second clip of a video leaves the tokens of the first one as they were."""
    model, batch = tiny_model(), tiny_batch([[(8, 4, 4)]])
    pixels, grid = batch["pixel_values_videos"], batch["video_grid_thw"]
    before = model.get_video_features(pixels, grid).pooler_output[0].chunk(2)
    pixels = torch.cat([pixels[:64], torch.randn(64, PATCH_DIM)])
    after = model.get_video_features(pixels, grid).pooler_output[0].chunk(2)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@torch.no_grad()
def test_the_order_of_frames_matters_inside_a_clip():
    model, batch = tiny_model(), tiny_batch([[(4, 4, 4)]])
    pixels, grid = batch["pixel_values_videos"], batch["video_grid_thw"]
    forwards = model.get_video_features(pixels, grid).pooler_output[0].view(4, -1, 32)
    backwards = model.get_video_features(pixels.view(4, 16, -1).flip(0).flatten(0, 1), grid).pooler_output[0]
    assert not torch.allclose(forwards.flip(0), backwards.view(4, -1, 32), atol=1e-2)


@torch.no_grad()
def test_a_frame_begins_with_its_context_and_all_rows_end_with_one_token():
    model, batch = tiny_model(), tiny_batch([[(4, 4, 6)]])
    outputs = model.model.vision_tower(batch["pixel_values_videos"], batch["video_grid_thw"])
    tokens = outputs.pooler_output[0].view(4, 1 + 2 * (3 + 1), 24)
    row = model.model.vision_tower.row_embedding
    for position in range(1, 9):
        assert torch.equal(tokens[:, position], row.expand(4, -1)) == (position in (4, 8))


def test_videos_first_seen_in_inference_mode_can_be_trained_on():
    """Layouts of grids are kept: they must not remember the mode or the default device they were made under."""
    model, batch = tiny_model(), tiny_batch([[(4, 6, 2)], [(12, 2, 8)]])
    with torch.inference_mode():
        model(**batch)
    model(**batch, labels=batch["input_ids"]).loss.backward()

    lay_out.cache_clear()
    with torch.device("meta"):
        layout = VideoLayout.of(batch["pixel_values_videos"], batch["video_grid_thw"], model.config.vision_config)
    assert layout.windows.device.type == "cpu"


def test_it_runs_in_training_and_every_weight_learns():
    model = tiny_model().train()
    batch = tiny_batch([[(4, 4, 8), (1, 4, 4)], [(8, 4, 4)]])
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


def test_with_logits_only_where_labels_are_the_loss_is_the_same():
    model = tiny_model()
    batch = tiny_batch([[(4, 4, 8), (1, 4, 4)], [(8, 4, 4)]])
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.9, -100)
    learned = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    everywhere, some = model(**batch, labels=labels), model(**batch, labels=labels, logits_to_keep=learned)
    torch.testing.assert_close(some.logits, everywhere.logits[learned])
    torch.testing.assert_close(some.loss, everywhere.loss)
    averaged = model(**batch, labels=labels, logits_to_keep=learned, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(averaged, some.loss * learned.sum() / 7)


def test_what_a_mixture_of_experts_returns_besides_is_left_out():
    """Router logits here. Asked for or not, it sees videos, learns and answers."""
    model, batch = tiny_model("mixtral"), tiny_batch([[(4, 4, 8)], []])
    states = model.model.language_model(batch["input_ids"])
    assert len(states.router_logits) == 2  # or else this tests nothing
    output = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert "router_logits" not in output and output.logits.isfinite().all()
    output.loss.backward()
    routers = [weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(weight.grad.any() for weight in routers)
    answers = [
        model.generate(**batch, max_new_tokens=4, do_sample=False, **how)
        for how in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


class TestGeneration:
    @pytest.mark.parametrize(
        "how",
        [
            {"do_sample": False},
            {"do_sample": True, "top_k": 1},
            {"do_sample": True, "top_p": 0.5, "num_return_sequences": 3},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": False, "cache_implementation": "static"},
            {"prompt_lookup_num_tokens": 2, "do_sample": False},
            {"generation_config": GenerationConfig(do_sample=False, suppress_tokens=None, pad_token_id=2)},
        ],
        ids=str,
    )
    def test_placeholders_are_never_generated(self, how):
        """Also where the model is all for them: its head is made to give them the highest score by far."""
        model = tiny_model()
        head = model.lm_head.forward
        model.lm_head.forward = lambda states: head(states).index_fill(-1, torch.tensor([VIDEO, ROW]), 1e3)
        rows = 1 if "prompt_lookup_num_tokens" in how else 2
        batch = tiny_batch([[(4, 4, 8)], []][:rows])
        torch.manual_seed(0)
        answers = model.generate(**batch, max_new_tokens=8, **how)[:, batch["input_ids"].shape[1] :]
        assert answers.numel() and not torch.isin(answers, torch.tensor([VIDEO, ROW])).any()

    @torch.no_grad()
    @pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
    def test_embedded_prompts_are_continued_like_their_tokens(self, how):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)], []])
        ids = batch.pop("input_ids")
        expected = model.generate(input_ids=ids, **batch, max_new_tokens=5, do_sample=False, **how)[:, ids.shape[1] :]
        embedded = model.get_input_embeddings()(ids)
        answers = model.generate(inputs_embeds=embedded, **batch, max_new_tokens=5, do_sample=False, **how)
        assert torch.equal(answers, expected)

    def test_a_prompt_with_videos_is_not_cut_into_chunks(self):
        for chunk in (1, 64):
            with pytest.raises(ValueError, match=f"prefill_chunk_size = {chunk}"):
                tiny_model().generate(**tiny_batch([[(4, 4, 8)]]), max_new_tokens=2, prefill_chunk_size=chunk)
        model = tiny_model()
        model.generation_config.prefill_chunk_size = 64  # which a given configuration leaves as it is
        with pytest.raises(ValueError, match="prefill_chunk_size = 64"):
            model.generate(**tiny_batch([[(4, 4, 8)]]), generation_config=GenerationConfig(max_new_tokens=2))
        text = tiny_batch([[]])
        answers = [
            tiny_model().generate(**text, max_new_tokens=4, do_sample=False, prefill_chunk_size=n) for n in (None, 1)
        ]
        assert torch.equal(*answers)

    @torch.no_grad()
    def test_cache_and_no_cache_agree(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)], [(1, 4, 4)]])
        answers = [
            model.generate(**batch, max_new_tokens=6, do_sample=False, **options)
            for options in ({}, {"use_cache": False}, {"cache_implementation": "static"})
        ]
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])

    @torch.no_grad()
    def test_beams_and_return_sequences_keep_each_prompt_with_its_own_videos(self):
        """Prompts with two, no and one video: beams of a batch are those of each prompt alone."""
        model = tiny_model()
        prompts = [[(4, 4, 8), (1, 6, 4)], [], [(4, 2, 6)]]
        how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
        together = tiny_batch(prompts)
        answers = model.generate(**together, **how)[:, together["input_ids"].shape[1] :].view(3, 2, -1)
        for row, prompt in enumerate(prompts):
            alone = tiny_batch([prompt])
            expected = model.generate(**alone, **how)[:, alone["input_ids"].shape[1] :]
            assert answers[row, :, : expected.shape[1]].tolist() == expected.tolist()

    @torch.no_grad()
    def test_videos_are_encoded_once_for_all_beams(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        calls = []
        model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        model.generate(**batch, max_new_tokens=4, num_beams=4)
        assert len(calls) == 1

    @torch.no_grad()
    def test_a_second_turn_continues_from_the_cache(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        continued = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_NAME: first[CACHE_NAME]},
            max_new_tokens=4,
            do_sample=False,
        )
        batch = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(continued, model.generate(**batch, max_new_tokens=4, do_sample=False))

    @torch.no_grad()
    @pytest.mark.parametrize("second", [[], [(4, 2, 6)], [(1, 6, 4), (4, 4, 8)]], ids=["text", "video", "two"])
    def test_the_whole_conversation_continues_from_the_cache(self, second):
        """Videos whose tokens are in the cache may stay among the inputs: they are not encoded again."""
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8), (1, 6, 4)]])
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = tiny_batch([second])
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        whole = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if second:
            for name in ("pixel_values_videos", "video_grid_thw"):
                whole[name] = torch.cat([batch[name], more[name]])
        expected = model.generate(**whole, max_new_tokens=4, do_sample=False)
        encoded = []
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: encoded.extend(args[1].tolist()))
        continued = model.generate(**whole, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=4, do_sample=False)
        assert torch.equal(continued, expected)
        assert encoded == [list(grid) for grid in second]

    def test_a_cache_that_ends_inside_a_video_is_an_error(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = first[CACHE_NAME]
        cache.crop(10 - cache.get_seq_length())
        with pytest.raises(ValueError, match="the cache of 10 tokens ends in the middle of video 0"):
            model.generate(**batch, **{CACHE_NAME: cache}, max_new_tokens=2)

    def test_a_prompt_beyond_the_context_names_the_frames_that_fit(self):
        config = tiny_config()
        config.text_config.max_position_embeddings = 256
        model = model_of(config)
        batch = tiny_batch([[(40, 4, 8)]])
        length = batch["input_ids"].shape[1]
        with pytest.raises(ValueError, match=f"{length} tokens, .* context 256. It has 40 frames.*about 20 would fit"):
            model.generate(**batch, max_new_tokens=2)
        for frames, fits in ((20, True), (24, False)):
            assert (tiny_batch([[(frames, 4, 8)]])["input_ids"].shape[1] <= 256) == fits
        with pytest.raises(ValueError, match=r"context 256\. Shorten it"):
            model.generate(input_ids=torch.full((1, 300), 7), max_new_tokens=2)
        padded = torch.full((2, 300), 7)
        mask = torch.ones_like(padded)
        mask[:, :100] = 0
        assert model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=1, do_sample=False).shape[0] == 2

    @pytest.mark.parametrize(
        "rope, expected",
        [
            ({"rope_type": "default", "rope_theta": 1e4}, 64),
            ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256),
            ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}, 128),
        ],
        ids=["plain", "linear", "yarn"],
    )
    def test_the_context_counts_a_stretched_rotary_embedding(self, rope, expected):
        config = tiny_config()
        config.text_config.max_position_embeddings = 64
        config.text_config.rope_parameters = rope
        assert context_length(config.text_config) == expected


class TestLoading:
    def test_the_auto_classes_know_it(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path / "whole")
        model.model.vision_tower.save_pretrained(tmp_path / "stab")
        assert type(AutoConfig.from_pretrained(tmp_path / "whole")) is VideoPandaConfig
        assert type(AutoConfig.from_pretrained(tmp_path / "stab")) is VideoPandaVisionConfig
        assert type(AutoModel.from_pretrained(tmp_path / "whole")) is VideoPandaModel
        assert type(AutoModel.from_pretrained(tmp_path / "stab")) is VideoPandaVisionModel
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            assert type(auto_class.from_pretrained(tmp_path / "whole")) is VideoPandaForConditionalGeneration

    @torch.no_grad()
    def test_shards_and_device_map_load_to_the_same_logits(self, tmp_path):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto")
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @torch.no_grad()
    def test_every_dtype(self, tmp_path, dtype):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}
        logits = loaded(**batch).logits
        tolerance = {torch.float16: 0.05, torch.bfloat16: 0.5, torch.float64: 1e-4}[dtype]
        torch.testing.assert_close(logits.float(), model(**batch).logits, atol=tolerance, rtol=0.05)

    @pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
    @torch.no_grad()
    def test_every_attention(self, tmp_path, attention):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)], [(1, 4, 4)]])
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.model.language_model.config._attn_implementation == attention
        there = batch["attention_mask"].bool()
        with torch.compiler.set_stance("force_eager"):  # flex attention would compile C++ for a minute
            logits = loaded(**batch).logits
        torch.testing.assert_close(logits[there], model(**batch).logits[there], atol=1e-4, rtol=0)

    @needs_newer_torch
    @torch.no_grad()
    def test_without_videos_it_compiles_as_one_graph(self):
        """`generate` asks for it where the cache is static."""
        torch.compiler.reset()
        model, prompt = tiny_model(), torch.tensor([[5, 6, 7]])
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits, atol=1e-5, rtol=0)

    @pytest.mark.slow
    @needs_newer_torch
    @torch.no_grad()
    def test_compiled_it_computes_the_same(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)], []])
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


class TestStartingFromALanguageModel:
    @pytest.fixture(params=TEXT_CONFIGS)
    def folder(self, request, tmp_path):
        folder = tmp_path / request.param
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(request.param).text_config).save_pretrained(folder)
        return folder

    @torch.no_grad()
    def test_text_prompts_get_the_language_models_own_logits(self, folder):
        text_model = AutoModelForCausalLM.from_pretrained(folder)
        vision = {"hidden_size": 24, "num_attention_heads": 4, "patch_size": 2, "image_size": 16}
        model = VideoPandaForConditionalGeneration.from_text_pretrained(
            folder, vision_config=vision, video_token_id=99, row_token_id=100
        )
        ids = torch.randint(5, 99, (2, 12))
        torch.testing.assert_close(model(ids).logits[..., :99], text_model(ids).logits)
        assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == 101

    @torch.no_grad()
    def test_it_sees_videos_and_saves_and_loads(self, folder, tmp_path):
        vision = {"hidden_size": 24, "num_attention_heads": 4, "patch_size": 2, "image_size": 16}
        model = VideoPandaForConditionalGeneration.from_text_pretrained(
            folder, vision_config=vision, video_token_id=VIDEO, row_token_id=ROW, dtype=torch.float32
        )
        batch = tiny_batch([[(4, 4, 8)], []])
        logits = model(**batch).logits
        assert logits.isfinite().all()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, logits)

    def test_a_gguf_file_gives_both_the_weights_and_the_tokens(self, monkeypatch):
        asked, language_model = [], AutoModelForCausalLM.from_config(tiny_config().text_config)

        def model_from(path, **kwargs):
            asked.append((path, kwargs))
            return language_model

        def tokenizer_from(path, **kwargs):
            asked.append((path, kwargs))
            return chatml_tokenizer()

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_from)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer_from)
        VideoPandaForConditionalGeneration.from_text_pretrained("folder", gguf_file="model.gguf")
        assert asked == [("folder", {"gguf_file": "model.gguf"})] * 2

    def test_a_head_that_does_more_than_a_linear_map_is_refused(self, tmp_path):
        config = AutoConfig.for_model(
            "gemma2",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=99,
            final_logit_softcapping=0.1,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Gemma2ForCausalLM does more than a linear LM head"):
            VideoPandaForConditionalGeneration.from_text_pretrained(tmp_path, video_token_id=3, row_token_id=4)


class TestErrors:
    def test_placeholders_and_features_differ(self):
        model, batch = tiny_model(), tiny_batch([[(4, 4, 8)]])
        batch["input_ids"][batch["input_ids"] == ROW] = 7
        with pytest.raises(ValueError, match=r"36 `<video>` and `<row>` tokens, the videos give 44 features"):
            model(**batch)

    @pytest.mark.parametrize(
        ("grid", "patches", "message"),
        [
            ((3, 4, 4), 48, "Video 0 has 3 frames: a video needs 1 frame or a multiple of frames_per_clip=4"),
            ((4, 3, 4), 48, "Video 0 has 3 x 4 patches: both must be positive multiples of spatial_merge_size=2"),
            ((4, 10, 4), 160, "do not fit the canvas of 8 x 8"),
            ((4, 4, 4), 63, r"\[\[4, 4, 4\]\] describes 64 patches, but `pixel_values_videos` has 63"),
        ],
    )
    def test_grids_that_cannot_be(self, grid, patches, message):
        with pytest.raises(ValueError, match=message):
            tiny_model().get_video_features(torch.zeros(patches, PATCH_DIM), torch.tensor([grid]))

    def test_the_video_at_fault_is_named(self):
        with pytest.raises(ValueError, match="Video 1 has 6 frames"):
            tiny_model().get_video_features(torch.zeros(160, PATCH_DIM), torch.tensor([(4, 4, 4), (6, 4, 4)]))

    def test_patches_of_another_size(self):
        with pytest.raises(ValueError, match=r"must have shape \(patches, 12\)"):
            tiny_model().get_video_features(torch.zeros(64, 588), torch.tensor([(4, 4, 4)]))

    def test_pixels_without_a_grid(self):
        with pytest.raises(ValueError, match="`pixel_values_videos` need `video_grid_thw`"):
            tiny_model()(input_ids=torch.tensor([[5, 6]]), pixel_values_videos=torch.zeros(16, PATCH_DIM))

    def test_a_canvas_of_broken_windows(self):
        with pytest.raises(ValueError, match=r"`image_size` .* must be a multiple of"):
            VideoPandaVisionConfig(image_size=450)


def test_every_residual_branch_in_time_starts_as_the_identity():
    tower = VideoPandaForConditionalGeneration(tiny_config()).model.vision_tower
    zero = {name for name, weight in tower.named_parameters() if not weight.any() and "bias" not in name}
    assert zero == {
        "lste.expand.weight",
        "gstra.query",
        "gstra.attention.output.weight",
        "gstra.mlp_out.weight",
        "fusion.balance",
    }
