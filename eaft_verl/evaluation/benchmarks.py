"""From a recipe entry to lm-evaluation-harness tasks: our files on our rows, or the harness's own tasks by name."""

import difflib
import functools
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eaft_verl.errors import ConfigError, DataError
from eaft_verl.evaluation.quiet import quiet
from eaft_verl.evaluation.records import label
from eaft_verl.evaluation.rows import benchmark_rows, check_ids
from eaft_verl.evaluation.tasks import LOCAL_VARIANTS, TASK_FILES, Entry, OwnTask, unknown_task
from eaft_verl.grading.answers import opened_thinking

_SEED = 1234  # lm-evaluation-harness's default for few-shot sampling
_NLTK_TASKS = "ifeval"


@dataclass(frozen=True)
class Benchmark:
    """A loaded benchmark: one record in the run directory, one or several harness tasks behind it."""

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]
    version: str
    limit: int | None = None
    metric: str | None = None


def load_benchmark(entry: Entry, max_length: int) -> Benchmark:
    """The benchmark with its data read; generation limits are cut to what fits in max_length tokens.

    Raises ConfigError for a task the harness does not know or cannot run here, DataError for unfit rows.
    """
    if entry.own:
        with quiet():
            task = _own_task(entry, entry.own)
        tasks, groups = {entry.task: task}, {}
        version = f"{entry.own.file.removesuffix('.yaml')} {task.VERSION}"
    else:
        with quiet():
            tasks, groups = _harness_tasks(entry.task)
        for name, task in tasks.items():
            check_ids(name, itertools.islice(task.eval_docs, entry.limit))
        version = ", ".join(sorted({str(task.VERSION) for task in tasks.values()}))
    if _NLTK_TASKS in entry.task:
        _check_nltk(entry.task)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
        _cut_generation(task, max_length)
    metrics = {
        label(metric, kind) for task in tasks.values() for metric in task.higher_is_better() for kind in _filters(task)
    }
    if entry.metric and entry.metric not in metrics:
        raise ConfigError(
            f"task {entry.task!r} has no metric {entry.metric!r}; choose one of {', '.join(sorted(metrics))}"
        )
    return Benchmark(entry.task, tasks, groups, version, entry.limit, entry.metric)


def _filters(task: Task) -> list[str]:
    return [item["name"] for item in task.get_config("filter_list") or [{"name": "none"}]]


class _ThoughtfulTask(ConfigurableTask):
    """A task of ours: its scorers see the thinking that the chat template has opened at the end of the prompt."""

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """The scores of one document's responses."""
        asked = vars(self).get("_instances")  # unset until the requests are built
        opened = opened_thinking(str(asked[0].args[0])) if asked else ""
        return super().process_results(doc, [opened + text if isinstance(text, str) else text for text in results])


def _own_task(entry: Entry, own: OwnTask) -> Task:
    rows = benchmark_rows(entry, own)
    try:
        config = load_yaml(TASK_FILES / own.file)
    except ImportError as error:
        raise ConfigError(
            f"task {entry.task!r} needs a package that is missing ({error}): pip install 'eaft-verl[eval]'"
        ) from error
    # In memory: the harness would otherwise copy the file into the Arrow cache of the user's home.
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
    config["task"] = entry.task
    return _ThoughtfulTask(config=config)


@functools.cache
def _task_manager() -> TaskManager:
    """Index of the harness's 14,000 task files: about ten seconds, so made once and only if a built-in is asked for."""
    return TaskManager()


def _harness_tasks(name: str) -> tuple[dict[str, Task], dict[str, Group]]:
    manager = _task_manager()
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        raise ConfigError(unknown_task(name, "evaluate", close))
    try:
        loaded: dict[str, Any] = manager.load([name])
    except ImportError as error:
        raise ConfigError(f"task {name!r} needs a package that is missing ({error}); install it") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data of task {name!r} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); "
            f"without the hub, give local rows as {{task: ..., data: ...}}: {', '.join(LOCAL_VARIANTS)} take them"
        ) from error
    return loaded["tasks"], loaded.get("groups", {})


def _cut_generation(task: Task, max_length: int) -> None:
    """The harness asserts that an answer is shorter than the context; AIME's 32,768 tokens fit in few models."""
    if task.get_config("output_type") != "generate_until":
        return
    wanted = task.get_config("generation_kwargs").get("max_gen_toks", 256)
    room = max_length - min(1024, max_length // 2)
    if wanted > room:
        logging.getLogger(__name__).warning(
            f"{task.task_name}: answers cut at {room} tokens instead of {wanted}, as evaluate.max_length={max_length}"
        )
        task.set_config(key="generation_kwargs", value={"max_gen_toks": room}, update=True)


def _check_nltk(name: str) -> None:
    """IFEval's scorer prints that it downloaded punkt_tab even when it could not, and fails at the first use."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise ConfigError(
            f"task {name!r} needs NLTK's punkt_tab, which is not found; run 'python -m nltk.downloader punkt_tab', or "
            "set NLTK_DATA to a folder that holds tokenizers/punkt_tab"
        ) from None
