"""Run by torchrun on two processes: gradients of batches of which each process has videos, pictures or text, at
random, against those of one process with both parts. The argument is `ddp`, `fsdp2`, `fsdp2_stab` (STAB is a unit of
its own) or `zero3`. FSDP2 is torch's own (accelerate has it on GPUs alone)."""

import random
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.training import collate, distilling_model, make_examples, tiny_teacher
from video_panda_hf import VideoPandaVisionModel
from video_panda_hf.training import VideoPandaDistillationHead, VideoPandaTeacher, attach_distillation_head
from video_panda_hf.training.distillation import of_videos, videos_by_teacher
from video_panda_hf.training.parts import keep_in_step


MIXES = 50
VIDEOS, PICTURES, TEXT = [0, 1, 3], [2], [4]
KINDS = [VIDEOS, PICTURES, TEXT, VIDEOS + PICTURES, VIDEOS + TEXT, PICTURES + TEXT]


def main(strategy: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    distils = strategy != "zero3"
    whole, teachers = new_model(distils)
    model, backward, gradients = STRATEGIES[strategy](new_model(distils)[0])
    examples, draw = make_examples(), random.Random(0)
    for number in range(MIXES):
        parts = [collate([examples[i] for i in draw.choices(draw.choice(KINDS), k=2)]) for _ in range(2)]
        whole.zero_grad()
        model.zero_grad()
        (sum(loss_of(whole, teachers, part) for part in parts) / 2).backward()
        backward(loss_of(model, teachers, parts[dist.get_rank()]))
        for name, gradient in gradients():
            expected = whole.get_parameter(name).grad
            expected = torch.zeros_like(gradient) if expected is None else expected
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5, msg=f"{name}, mix {number}")
    dist.destroy_process_group()


def new_model(distils: bool):
    """In training, without dropout: batch norm sees the videos of a process. With a teacher for videos and another one
    for pictures."""
    model, teacher = distilling_model(checkpointing=True)
    picture_teacher = tiny_teacher("clip", 8, 2, hidden_size=24)
    picture_teacher = VideoPandaTeacher(picture_teacher, model.config.vision_config, (0.5,) * 3, (0.5,) * 3)
    attach_distillation_head(model, VideoPandaDistillationHead(32, 24, num_layers=2), "picture_distillation_head")
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if not distils:
        del model.distillation_head, model.picture_distillation_head
    return model, {"": teacher, "picture_": picture_teacher} if distils else None


def loss_of(model, teachers, batch: dict) -> torch.Tensor:
    if teachers is None:
        return model(**batch).loss
    grids, inputs = batch.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long)), {"num_frames_in_batch": 8}
    for kind, chosen in videos_by_teacher(grids, has_picture_teacher=True).items():
        features = torch.zeros(0, teachers[kind].hidden_size)
        if chosen.any():
            features = teachers[kind](of_videos(batch["pixel_values_videos"], grids, chosen), grids[chosen])
        inputs |= {f"{kind}teacher_features": features, f"{kind}teacher_grid_thw": teachers[kind].grids(grids[chosen])}
    outputs = model(**batch, **inputs)
    return outputs.loss + outputs.distillation_loss


def ddp(model):
    keep_in_step(model)
    wrapped = DistributedDataParallel(model)
    return wrapped, torch.Tensor.backward, lambda: ((name, weight.grad) for name, weight in model.named_parameters())


def fsdp2(model, stab: bool = False):
    keep_in_step(model, sharded=True)
    mesh = init_device_mesh("cpu", (2,))
    for module in [*model.model.language_model.layers, *([model.model.vision_tower] if stab else [])]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def gradients():
        return ((name, weight.grad.full_tensor()) for name, weight in model.named_parameters())

    return model, torch.Tensor.backward, gradients


def zero3(model):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    keep_in_step(model, sharded=True)
    set_z3_leaf_modules(model, [VideoPandaVisionModel])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )

    def gradients():
        yield from ((name, safe_get_full_grad(weight)) for name, weight in model.named_parameters())
        engine.step()

    return engine, engine.backward, gradients


STRATEGIES = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_stab": lambda model: fsdp2(model, stab=True), "zero3": zero3}


if __name__ == "__main__":
    main(sys.argv[1])
