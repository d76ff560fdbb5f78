"""How good a model is: answers to the questions of benchmarks or of your own, judgements of them, and a report.

`load_task` → `predict` → `judge` → `report`. Each step writes to a folder, and goes on where it was stopped.
"""

from .judge import check_table, estimate, judge
from .judges import ExactJudge, JudgeError, LocalJudge, OpenAIJudge
from .predict import fingerprint, predict
from .questions import Question, chosen_option
from .report import Report, report
from .tasks import TASKS, Task, load_task


__all__ = [
    "TASKS",
    "ExactJudge",
    "JudgeError",
    "LocalJudge",
    "OpenAIJudge",
    "Question",
    "Report",
    "Task",
    "check_table",
    "chosen_option",
    "estimate",
    "fingerprint",
    "judge",
    "load_task",
    "predict",
    "report",
]
