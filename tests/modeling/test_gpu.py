"""What only a GPU can show: STAB never waits for the device, and computes there what it computes on the CPU."""

import pytest
import torch

from helpers.tiny_models import PATCH_DIM, tiny_batch, tiny_model


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GRIDS = [(8, 8, 8), (4, 4, 8), (1, 6, 4), (16, 2, 6)]


@pytest.fixture
def without_tf32():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("pad_to_square", [True, False])
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], GRIDS[2:3]], ids=["mixed", "square", "image"])
def test_stab_never_waits_for_the_device(grids, pad_to_square):
    model = tiny_model(pad_to_square=pad_to_square).cuda()
    grids = torch.tensor(grids)
    pixels = torch.randn(int(grids.prod(1).sum()), PATCH_DIM).cuda()
    expected = model.get_video_features(pixels, grids).pooler_output  # warm: libraries load and choose their kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = model.get_video_features(pixels, grids).pooler_output
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_stab_never_waits_either():
    model = tiny_model().cuda().train()
    grids = torch.tensor(GRIDS)
    pixels = torch.randn(int(grids.prod(1).sum()), PATCH_DIM).cuda()
    torch.cat(model.get_video_features(pixels, grids).pooler_output).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cat(model.get_video_features(pixels, grids).pooler_output).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pad_to_square", [True, False])
@torch.no_grad()
def test_it_computes_what_the_cpu_computes(pad_to_square, without_tf32):
    model = tiny_model(pad_to_square=pad_to_square)
    batch = tiny_batch([[(8, 8, 8)], [(4, 4, 8), (1, 6, 4)], []])
    on_cpu = model(**batch).logits
    on_gpu = model.cuda()(**{name: value.cuda() for name, value in batch.items()}).logits
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(on_gpu.cpu()[there], on_cpu[there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_answers_and_compiled_decoding(dtype):
    model = tiny_model(dtype=dtype).cuda()
    batch = {name: value.cuda() for name, value in tiny_batch([[(4, 4, 8)], []]).items()}
    eager = model.generate(**batch, max_new_tokens=6, do_sample=False)
    compiled = model.generate(**batch, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert eager.shape[1] == compiled.shape[1] > batch["input_ids"].shape[1]
