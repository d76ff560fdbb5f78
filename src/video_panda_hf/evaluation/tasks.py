"""What a model is asked: tasks, their questions, and their videos in a folder."""

import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from . import loaders
from .questions import Question


VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
URLS = ("http://", "https://", "data:")
SCORES = ("correctness", "detail", "context", "temporal", "consistency")


@dataclass(frozen=True)
class Task:
    """
    A benchmark, or a file of questions.

    Args:
        name (`str`):
            Its name.
        metric (`str`):
            `"accuracy"` (a judge says yes or no), `"scores"` (a judge gives one or several scores from 0 to 5) or
            `"choice"` (no judge).
        load (`Callable`):
            Reads the questions of a local file or folder.
        hub (`str`, *optional*), configs (`tuple[str, ...]`), split (`str`):
            The data set on the Hub.
        counts (`tuple[int, int]`, *optional*):
            Questions and videos of the whole.
        paper (`dict[str, float]`, *optional*):
            What the paper reports.
        mean_of_types (`bool`, *optional*, defaults to `False`):
            Whether the usual figure is the mean over the types of questions.
        questions (`list[Question]`, *optional*):
            The questions, once they are loaded.
        videos (`Videos`, *optional*):
            Where the videos are.
    """

    name: str
    metric: str
    load: Callable
    hub: str | None = None
    configs: tuple[str, ...] = ()
    split: str = "test"
    counts: tuple[int, int] | None = None
    paper: dict[str, float] | None = None
    mean_of_types: bool = False
    questions: list[Question] = field(default_factory=list)
    videos: "Videos | None" = None

    def sample(self, limit: int | None, seed: int) -> list[Question]:
        """`limit` of the questions, the same ones for the same seed, in the task's order."""
        if limit is None or limit >= len(self.questions):
            return self.questions
        return [self.questions[i] for i in sorted(random.Random(seed).sample(range(len(self.questions)), limit))]


def qa(name: str, questions: int, videos: int, accuracy: float, score: float, load=loaders.open_ended) -> Task:
    return Task(name, "accuracy", load, counts=(questions, videos), paper={"accuracy": accuracy, "score": score})


TASKS = {
    task.name: task
    for task in (
        qa("msvd-qa", 13_157, 504, 64.7, 3.8),
        qa("msrvtt-qa", 72_821, 2_990, 54.8, 3.4),
        qa("tgif-qa", 13_691, 7_132, 42.9, 3.2),
        qa("activitynet-qa", 8_000, 800, 40.0, 3.3, loaders.activitynet),
        Task(
            "video-chatgpt",
            "scores",
            loaders.video_chatgpt,
            counts=(1_996 + 499 + 499, 499),
            paper=dict(zip(SCORES, (2.74, 2.47, 3.01, 2.26, 2.36), strict=True)),
        ),
        Task(
            "mvbench",
            "choice",
            loaders.mvbench,
            "OpenGVLab/MVBench",
            tuple(loaders.MVBENCH_FOLDERS),
            "train",
            mean_of_types=True,
        ),
        Task("video-mme", "choice", loaders.video_mme, "lmms-eval/Video-MME", counts=(2_700, 900)),
        Task("next-qa", "choice", loaders.next_qa, "lmms-eval/NExTQA", ("MC",)),
        Task("tempcompass", "choice", loaders.tempcompass, "lmms-eval/TempCompass", loaders.TEMPCOMPASS_KINDS),
        Task("egoschema", "choice", loaders.egoschema, "lmms-eval/egoschema", ("Subset",), counts=(500, 500)),
        Task(
            "perception-test",
            "choice",
            loaders.perception_test,
            "lmms-eval/PerceptionTest_Val",
            ("mc_question_val",),
            "validation",
        ),
        Task("tvbench", "choice", loaders.tvbench, "FunAILab/TVBench", loaders.TVBENCH_TASKS, "train"),
    )
}


def load_task(name: str | os.PathLike, videos=None, questions=None) -> Task:
    """
    A task with its questions.

    Args:
        name (`str` or `os.PathLike`):
            The name of a benchmark (`TASKS`), or a .jsonl, .json, .csv or .parquet file of your own questions.
        videos (`str` or `os.PathLike`, *optional*):
            The folder of the videos. Defaults to the folder of the questions' file.
        questions (`str` or `os.PathLike`, *optional*):
            The file or folder of the benchmark's questions as they are distributed. Defaults to the data set on the
            Hub, or, where there is none, to the folder of the videos.

    Returns:
        `Task`: with `questions` and `videos`.

    Raises:
        ValueError: for an unknown name, or questions that are not in the benchmark's format.
        FileNotFoundError: if a file or folder is not there.
    """
    if str(name) not in TASKS:
        return own_task(Path(name), videos)
    task = TASKS[str(name)]
    source = questions if questions is not None or task.hub else videos
    if source is None and task.hub is None:
        raise ValueError(f"{name}: give `videos` or `questions`, the folder of its question files")
    if source is not None and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    tables = loaders.hub_tables(task.hub, task.configs, task.split) if source is None else Path(source)
    try:
        found = task.load(tables)
    except (LookupError, TypeError, AttributeError) as error:
        problem = f"a row has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{source or task.hub} is not in the format of {name}: {problem}") from error
    if not found:
        raise ValueError(f"{source or task.hub} has no question of {name}")
    folder = videos if videos is not None else source
    return replace(task, questions=with_unique_ids(found), videos=Videos(folder or Path()))


def own_task(file: Path, videos=None) -> Task:
    if file.suffix not in loaders.READERS:
        raise ValueError(f"{file} is no task: there are {', '.join(TASKS)}, and files of {', '.join(loaders.READERS)}")
    found = with_unique_ids(loaders.own(file))
    kinds = {question.options is not None for question in found}
    if len(kinds) != 1:
        what = "questions with options and without: give them in two files" if kinds else "no question"
        raise ValueError(f"{file} has {what}")
    metric = "choice" if kinds.pop() else "accuracy"
    return Task(file.stem, metric, loaders.own, questions=found, videos=Videos(videos or file.parent))


def with_unique_ids(questions: list[Question]) -> list[Question]:
    """The second question of an id gets the id with #2, and so on."""
    seen: dict[str, int] = {}
    unique = []
    for question in questions:
        seen[question.id] = seen.get(question.id, 0) + 1
        number = seen[question.id]
        unique.append(question if number == 1 else replace(question, id=f"{question.id}#{number}"))
    return unique


def as_line(question: Question) -> dict:
    return {key: value for key, value in asdict(question).items() if value is not None}


class Videos:
    """
    The videos of a folder and of the folders in it.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if self.folder.is_file():
            self.folder = self.folder.parent
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of videos")
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> str:
        """
        The path of a video. It may be named without its extension, without the `v_` of ActivityNet's files, and
        without its folders. A folder of pictures is a video, too.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if several fit.
        """
        if name.startswith(URLS):
            return name
        if name and (self.folder / name).exists():
            return str(self.folder / name)
        *parents, last = Path(name).parts or ("",)
        stem = Path(last).stem if last.lower().endswith(VIDEO_SUFFIXES) else last
        for wanted in (stem, f"v_{stem}"):
            paths = self._all().get(wanted, [])
            inside = [path for path in paths if is_inside(path, parents)]
            paths = inside or paths
            if len({path.parent for path in paths}) > 1:
                names = ", ".join(str(path.relative_to(self.folder)) for path in paths)
                raise ValueError(f"several videos are {name}: {names}")
            if paths:
                return str(paths[0])
        raise FileNotFoundError(f"no video {name} in {self.folder}")

    def _all(self) -> dict[str, list[Path]]:
        """The videos by their names without extensions; of several kinds, the more usual one first."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, files in os.walk(self.folder, followlinks=True):
                found = [Path(folder, file) for file in files if file.lower().endswith(VIDEO_SUFFIXES)]
                if any(file.lower().endswith(PICTURE_SUFFIXES) for file in files) and Path(folder) != self.folder:
                    self._by_name.setdefault(Path(folder).name, []).append(Path(folder))
                for path in found:
                    self._by_name.setdefault(path.stem, []).append(path)
            for paths in self._by_name.values():
                paths.sort(key=lambda path: (str(path.parent), kind_of(path)))
        return self._by_name


def kind_of(path: Path) -> int:
    suffix = path.suffix.lower()
    return VIDEO_SUFFIXES.index(suffix) if suffix in VIDEO_SUFFIXES else len(VIDEO_SUFFIXES)


def is_inside(path: Path, parents: list[str]) -> bool:
    """Whether a path goes through folders of these names, in this order. `star` is also the name of `star_small`."""
    folders = iter(path.parent.parts)
    return all(any(folder == name or folder.startswith(f"{name}_") for folder in folders) for name in parents)
