"""From a recipe entry to lm-evaluation-harness tasks: our files on our rows, or the harness's own tasks by name."""

import difflib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eaft_verl.errors import ConfigError, DataError
from eaft_verl.evaluation.quiet import quiet
from eaft_verl.evaluation.records import label
from eaft_verl.evaluation.responses import prepare_responses
from eaft_verl.evaluation.rows import benchmark_rows, check_ids
from eaft_verl.evaluation.tasks import LOCAL_VARIANTS, Entry, OwnTask, unknown_task

_SEED = 1234  # lm-evaluation-harness's default for few-shot sampling
_NLTK_TASKS = "ifeval"


@dataclass(frozen=True)
class Benchmark:
    """A loaded benchmark: one record in the run directory, one or several harness tasks behind it.

    documents: {task: numbers of the documents asked}; None for all. metric: the primary one; None for the first.
    """

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]
    version: str
    documents: dict[str, range] | None = None
    metric: str | None = None

    def first(self, count: int) -> "Benchmark":
        """The same benchmark with `count` questions in all, or those it has: as many of every task as there are.

        Of each task the first ones; what cannot be divided goes to tasks evenly spaced in their order.
        """
        with quiet():  # some tasks map their rows each time they are asked for them
            sizes = {
                name: len(self.documents[name] if self.documents else task.eval_docs)
                for name, task in self.tasks.items()
            }
        shares = _shares(list(sizes.values()), count)
        documents = {name: range(share) for name, share in zip(sizes, shares, strict=True) if share}
        # a group's own score would be that of other documents than its tasks'
        groups = self.groups if len(documents) == len(self.tasks) else {}
        return replace(self, tasks={name: self.tasks[name] for name in documents}, groups=groups, documents=documents)


def _shares(sizes: list[int], total: int) -> list[int]:
    """min(total, sum(sizes)) divided as evenly as the sizes allow: [5, 1, 5] and 6 -> [3, 1, 2]."""
    level = 0
    while (even := [min(size, level + 1) for size in sizes]) and sum(even) <= total and level < max(sizes):
        level += 1
    shares = [min(size, level) for size in sizes]
    open_ = [index for index, size in enumerate(sizes) if size > level]
    rest = min(total - sum(shares), len(open_))
    for number in range(rest):
        shares[open_[number * len(open_) // rest]] += 1
    return shares


def load_benchmark(entry: Entry) -> Benchmark:
    """The benchmark with its data read.

    Raises ConfigError for a task the harness does not know or cannot run here, DataError for unfit rows.
    """
    groups: dict[str, Group] = {}
    if entry.own:
        with quiet():
            task = _own_task(entry, entry.own)
        tasks = {entry.task: task}
        version = f"{entry.own.file.stem} {task.VERSION}"
    else:
        with quiet():
            tasks, groups = _harness_tasks(entry.task)
        for name, task in tasks.items():
            check_ids(name, itertools.islice(task.eval_docs, entry.limit))
        version = ", ".join(sorted({str(task.VERSION) for task in tasks.values()}))
    if _NLTK_TASKS in entry.task:
        _check_nltk(entry.task)
    if entry.own and entry.own.checked == "instructions":
        _check_instructions(tasks[entry.task], str(entry.data))
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
        _check_safe(task, entry)
        prepare_responses(task, entry)
    _check_metric(entry, tasks)
    benchmark = Benchmark(entry.task, tasks, groups, version, metric=entry.metric)
    return benchmark.first(entry.limit) if entry.limit else benchmark


def asked_together(benchmarks: Iterable[Benchmark], batch_size: object) -> Iterator[list[Benchmark]]:
    """Neighbours whose questions fit one batch: greedy answers under the same settings, with room made for them.

    A step of an answer reads every weight, whatever the number of rows: for 128 of them a matrix of SmolLM2 took one
    core 2.1 ms, where it took four times 1.3 ms for 32 each.
    """
    together: list[Benchmark] = []
    for benchmark in benchmarks:
        if together and not _one_batch([*together, benchmark], batch_size):
            yield together
            together = []
        together.append(benchmark)
    if together:
        yield together


def _one_batch(benchmarks: list[Benchmark], batch_size: object) -> bool:
    tasks = [(name, task) for benchmark in benchmarks for name, task in benchmark.tasks.items()]
    if any(task.OUTPUT_TYPE != "generate_until" for _, task in tasks) or len(dict(tasks)) < len(tasks):
        return False
    how = [task.get_config("generation_kwargs") for _, task in tasks]
    alike = all(one == how[0] and not one.get("do_sample") for one in how)
    rows = sum(len(task.instances) * (task.get_config("repeats") or 1) for _, task in tasks)
    return alike and isinstance(batch_size, int) and rows <= batch_size


def _check_safe(task: Task, entry: Entry) -> None:
    if task.get_config("unsafe_code"):
        raise ConfigError(
            f"task {entry.task!r} runs the code that the model writes, which is never done here; leave it out, and "
            "score the exports with lm_eval in a sandbox"
        )


def _check_metric(entry: Entry, tasks: dict[str, Task]) -> None:
    known = {
        label(metric, kind) for task in tasks.values() for metric in task.higher_is_better() for kind in _filters(task)
    }
    if entry.metric and entry.metric not in known:
        raise ConfigError(
            f"task {entry.task!r} has no metric {entry.metric!r}; choose one of {', '.join(sorted(known))}"
        )


def _filters(task: Task) -> list[str]:
    return [item["name"] for item in task.get_config("filter_list") or [{"name": "none"}]]


def _own_task(entry: Entry, own: OwnTask) -> Task:
    rows = benchmark_rows(entry, own)
    try:
        config = load_yaml(own.file)
    except ImportError as error:
        raise ConfigError(
            f"task {entry.task!r} needs a package that is missing ({error}): pip install 'eaft-verl[eval]'"
        ) from error
    # In memory: the harness would otherwise copy the file into the Arrow cache of the user's home.
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
    config["task"] = entry.task
    config.pop("tasks", None)  # ours, see OwnTask
    return ConfigurableTask(config=config)


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


def _check_instructions(task: Task, source: str) -> None:
    """DataError naming the row whose instructions IFEval's scorer does not know, or would make up the arguments of."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    for number, row in enumerate(task.eval_docs, 1):
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            given = {key: value for key, value in kwargs.items() if value is not None}
            if name not in INSTRUCTION_DICT:
                known = ", ".join(difflib.get_close_matches(name, INSTRUCTION_DICT, n=1) or INSTRUCTION_DICT)
                raise DataError(f"{source} row {number}: unknown instruction {name!r}; IFEval has {known}")
            instruction = INSTRUCTION_DICT[name](name)
            try:
                instruction.build_description(**given)
                missing = set(instruction.get_instruction_args_keys()) - set(given)
            except (TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{source} row {number}: the kwargs of {name!r} are not its own ({error})") from None
            if missing:
                raise DataError(f"{source} row {number}: the kwargs of {name!r} lack {', '.join(sorted(missing))}")
