"""A task of `video_panda_hf.evaluation` in the course of training."""

import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, wait_for_everyone

from video_panda_hf import evaluation

from .arguments import VideoPandaTrainingArguments


def load_eval_task(args: VideoPandaTrainingArguments, processor, is_sharded: bool) -> evaluation.Task | None:
    """The task `args.eval_task`. Raises `ValueError` where it cannot be run."""
    if args.eval_task is None:
        return None
    if is_sharded:
        raise ValueError(
            "`eval_task` does not work with FSDP or ZeRO-3, whose processes have to generate in step: run "
            "`video-panda eval` on a checkpoint, or choose DDP or ZeRO-2."
        )
    if not hasattr(processor, "video_processor"):
        raise ValueError("`eval_task` needs the processor: give it as `processing_class`.")
    task = evaluation.load_task(args.eval_task, args.eval_task_videos)
    if task.metric == "scores":
        raise ValueError(f"eval_task = {args.eval_task}: exact comparison gives no scores. Run `video-panda eval`.")
    return task


def figures_of(
    task: evaluation.Task, model, processor, args: VideoPandaTrainingArguments, step: int, **options
) -> dict:
    """
    The shares of right answers of a task, on all processes: `eval_<task>_accuracy` by the judge `exact`, and for open
    questions `eval_<task>_match` by the judge `match`, which an answer with further words does not pass.

    Each process answers the questions about its share of the videos. The answers stay in `eval/<task>/step-<step>` of
    the output folder.
    """
    folder = Path(args.output_dir) / "eval" / task.name / f"step-{step}"
    if args.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, maybe with other weights
    wait_for_everyone()
    process = (args.process_index, args.world_size)
    shown = not args.disable_tqdm and args.process_index == 0
    evaluation.predict(task, model, processor, folder, process=process, progress=shown, **options)
    wait_for_everyone()
    found = {}
    if args.process_index == 0:
        judges = {"accuracy": None} if task.metric == "choice" else {"accuracy": "exact", "match": "match"}
        for told, judge in judges.items():
            if judge is not None:
                evaluation.judge(folder, evaluation.ExactJudge(whole=judge == "match"), progress=False)
            for figure in evaluation.report([folder], judge).figures[0]:
                if figure.value and figure.name.endswith(", all"):
                    name = figure.name.removesuffix(", all").replace("accuracy", told, 1).replace(" of ", " ")
                    found[f"eval_{task.name}_{name.replace(' ', '_')}"] = figure.value[0]
    torch.cuda.empty_cache()
    return broadcast_object_list([found])[0]
