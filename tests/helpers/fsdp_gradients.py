"""Run by torchrun on two processes: the gradients of a batch of which the second process has only text, or a picture,
under FSDP2 of torch itself (accelerate has it on GPUs alone), against those of one process with the whole batch."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.training import collate, distilling_model, make_examples
from video_panda_hf.training.parts import keep_in_step


def loss_of(model, teacher, batch: dict) -> torch.Tensor:
    features, grids = torch.zeros(0, teacher.hidden_size), torch.zeros(0, 3, dtype=torch.long)
    if "pixel_values_videos" in batch:
        grids = teacher.grids(batch["video_grid_thw"])
        features = teacher(batch["pixel_values_videos"], batch["video_grid_thw"])
    outputs = model(**batch, teacher_features=features, teacher_grid_thw=grids, num_frames_in_batch=8)
    return outputs.loss + outputs.distillation_loss


def main() -> None:
    dist.init_process_group("gloo")
    examples = make_examples()
    for other in (examples[4], examples[2]):
        assert_same_gradients([collate(examples[:2]), collate([other])])
    dist.destroy_process_group()


def assert_same_gradients(parts: list[dict]) -> None:
    whole, teacher = distilling_model(checkpointing=True)
    (sum(loss_of(whole, teacher, part) for part in parts) / 2).backward()

    model, _ = distilling_model(checkpointing=True)
    keep_in_step(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model, teacher, parts[dist.get_rank()]).backward()
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, atol=1e-5, rtol=1e-5, msg=name)


if __name__ == "__main__":
    main()
