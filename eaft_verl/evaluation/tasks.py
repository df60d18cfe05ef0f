"""What may stand in `evaluate.target` and `evaluate.general`. The config check uses it: no torch, no lm_eval."""

import difflib
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eaft_verl.data.sources import at_hand, names_file
from eaft_verl.errors import ConfigError

TASK_FILES = Path(__file__).with_name("task_files")
RESERVED = {"heldout": "evaluate.heldout", "drift": "evaluate.drift", "drift_task": "evaluate.drift"}
_SAMPLING = ("temperature", "top_p")
_HARNESS_NAME = re.compile(r"^[A-Za-z0-9_.-]+$")
_ENTRY_KEYS = ("task", "data", "limit", "metric", "new_tokens", "samples", "temperature", "top_p")
_CLOSE = 0.8  # no built-in task is this close to one of ours, so such a name is a slip of the pen


@dataclass(frozen=True)
class OwnTask:
    """One line under `tasks:` in a task file of lm-eval's format: the fields its rows need and where they come from
    unless `data:` says so. The file itself is all that a new benchmark takes.

    fields: 'a|b' is one of both. checked: what `rows` checks in every row besides. built_in: the harness has this task
    too, but reads the hub only. get: where a file of these rows is to be had.
    """

    file: Path
    fields: tuple[str, ...] = ()
    data: str | None = None
    checked: str | None = None
    built_in: bool = False
    get: str = ""


@dataclass(frozen=True)
class Entry:
    """One benchmark asked for. `data`, `limit`, `metric`: None means the task's own. `file`: the user's task file.

    new_tokens: tokens of an answer at most; None: as many as the task file says.
    samples: responses drawn to every question, at `temperature` and `top_p`; without these, one greedy response.
    """

    task: str
    data: str | None = None
    limit: int | None = None
    metric: str | None = None
    file: Path | None = None
    new_tokens: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """{temperature, top_p} as far as they are given; {} for a greedy response."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def own(self) -> OwnTask | None:
        """The task file's definition of this task, or None if lm-evaluation-harness has to bring it."""
        if self.file:
            return _declared(self.file)[self.task]
        return LOCAL_VARIANTS.get(self.task) if self.data and self.task in LOCAL_VARIANTS else OWN_TASKS.get(self.task)


class _Loader(yaml.CSafeLoader):
    """Safe YAML that leaves lm-eval's `!function` tags alone."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


@functools.cache
def _declared(path: Path) -> dict[str, OwnTask]:
    """The tasks that a file serves, by name; a file without `tasks:` serves its `task`, with rows of any fields.

    Raises ConfigError for a file that is no such mapping or that names a key or check unknown here.
    """
    try:
        content = _Loader(path.read_bytes()).get_single_data()
        lines = content.get("tasks") or ({content["task"]: {}} if "task" in content else {})
        return {name: OwnTask(path, tuple(line.pop("fields", ())), **line) for name, line in lines.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is no task file of lm-evaluation-harness: {str(error).splitlines()[0]}") from None


def definition(path: Path) -> dict[str, Any]:
    """What a task file says, with what it includes; functions are None."""
    content = dict(_Loader(path.read_bytes()).get_single_data())
    included = content.pop("include", None)
    return {**definition(path.parent / included), **content} if included else content


def task_text(path: Path) -> str:
    """What decides a score: the task file, what it includes, and the Python files beside it that it names."""
    text = path.read_text(encoding="utf-8")
    names = [*re.findall(r"^include:\s*(\S+)", text, re.M), *re.findall(r"!function\s+(\w+)\.\w+\s*$", text, re.M)]
    beside = [path.parent / (name if name.endswith(".yaml") else f"{name}.py") for name in dict.fromkeys(names)]
    return "\n".join([text, *(task_text(file) for file in beside if file.is_file())])


_SHIPPED = {name: task for path in sorted(TASK_FILES.glob("*.yaml")) for name, task in _declared(path).items()}
OWN_TASKS = {name: task for name, task in _SHIPPED.items() if not task.built_in}
# Built-in tasks whose rows may also come from `data:`; the harness's own files can read only the hub.
LOCAL_VARIANTS = {name: task for name, task in _SHIPPED.items() if task.built_in}
BFCL = "bfcl_v3"  # has a runner of its own, see `bfcl`
BFCL_VARIABLE = "EAFT_BFCL_PYTHON"
BFCL_NEW_TOKENS = 4096  # of an answer at most, as bfcl-eval's handler of local models has it


def bfcl_python() -> Path:
    """The Python with bfcl-eval: that of EAFT_BFCL_PYTHON, or where examples/setup_bfcl.sh makes one."""
    return Path(os.environ.get(BFCL_VARIABLE) or Path.cwd() / ".bfcl" / "bin" / "python")


def parse_entries(entries: list[Any], key: str = "evaluate") -> list[Entry]:
    """Entries of a list of names and mappings with `_ENTRY_KEYS`. Reads no data, loads no model.

    key: dotted config key, for messages. Raises ConfigError for an unknown or misspelt name or key, a value of the
    wrong type, and a task that is asked for twice. What is not there yet (a data file) is `absent`'s to say.
    """
    parsed = [_parse(entry, f"{key}[{number}]") for number, entry in enumerate(entries)]
    names = [entry.task for entry in parsed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{key} names {', '.join(twice)} more than once; keep one entry per task")
    return parsed


def _parse(entry: Any, key: str) -> Entry:
    if isinstance(entry, str):
        entry = {"task": entry}
    if not isinstance(entry, dict) or "task" not in entry:
        raise ConfigError(
            f"{key} is {entry!r}; allowed: a task name or a mapping with task and, optionally, "
            + ", ".join(_ENTRY_KEYS[1:])
        )
    if unknown := sorted(set(entry) - set(_ENTRY_KEYS)):
        raise ConfigError(f"{key} has the unknown key {unknown[0]!r}; allowed: {', '.join(_ENTRY_KEYS)}")
    _check_values(entry, key)
    if entry["task"] == BFCL and entry.get("new_tokens") is None:
        entry = {**entry, "new_tokens": BFCL_NEW_TOKENS}
    parsed = _of_file(entry, key) if Path(entry["task"]).suffix in (".yaml", ".yml") else Entry(**entry)
    if parsed.file is None:
        _check_name(parsed.task, key)
    _check_data(parsed, key)
    return parsed


def _check_values(entry: dict[str, Any], key: str) -> None:
    for name in ("task", "data", "metric"):
        if entry.get(name) is not None and not isinstance(entry[name], str):
            raise ConfigError(f"{key}.{name} is {entry[name]!r}; expected text")
    for name, counted, otherwise in (("limit", "examples", "all"), ("new_tokens", "tokens", "the task's own")):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"{key}.{name} is {value!r}; expected a positive number of {counted}, or leave it out for {otherwise}"
            )
    _check_sampling(entry, key)


def _check_sampling(entry: dict[str, Any], key: str) -> None:
    samples = entry.get("samples", 1)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigError(f"{key}.samples is {samples!r}; expected a positive number of answers to every question")
    for name, most in (("temperature", 2.0), ("top_p", 1.0)):
        value = entry.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most
        ):
            raise ConfigError(f"{key}.{name} is {value!r}; expected a number above 0 and up to {most}")
    if entry.get("temperature") is None and (samples > 1 or entry.get("top_p") is not None):
        raise ConfigError(
            f"{key} asks for {'samples' if samples > 1 else 'top_p'} without a temperature: a greedy answer is always "
            "the same; set temperature, e.g. 0.6"
        )


def _of_file(entry: dict[str, Any], key: str) -> Entry:
    path = Path(entry["task"]).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}: task file {entry['task']!r} does not exist; give a file or the name of a task")
    names = list(_declared(path))
    if len(names) != 1 or not _HARNESS_NAME.match(str(names[0])) or names[0] in RESERVED:
        raise ConfigError(
            f"{key}: {path} serves {names or 'nothing'}; a task file here names one task, as `task: NAME`"
        )
    return Entry(**{**entry, "task": names[0]}, file=path)


def _check_name(name: str, key: str) -> None:
    if name in RESERVED:
        raise ConfigError(f"{key} is {name!r}, which is no task; set {RESERVED[name]} instead")
    if name in OWN_TASKS or name in LOCAL_VARIANTS or name == BFCL:
        return
    near = difflib.get_close_matches(name, OWN_TASKS, n=1, cutoff=_CLOSE)
    close = [own for own in near if not name.startswith(own)]  # a longer name is another task: truthfulqa_mc1
    if close or not _HARNESS_NAME.fullmatch(name):
        raise ConfigError(unknown_task(name, key, close))


def unknown_task(name: str, key: str, close: list[str]) -> str:
    """The message for a task nobody knows."""
    hint = f", did you mean {close[0]!r}?" if close else "."
    return (
        f"{key}: unknown task {name!r}{hint} Ours are {', '.join(OWN_TASKS)}; or any lm-evaluation-harness task; "
        "`eaft tasks` says what they need"
    )


def _check_data(entry: Entry, key: str) -> None:
    own = entry.own
    if entry.task == BFCL and (given := [name for name in ("data", *_SAMPLING) if getattr(entry, name)]):
        raise ConfigError(
            f"{key}: {given[0]} is given, but {BFCL} is asked as bfcl-eval asks; only limit and new_tokens may be set"
        )
    if entry.data is None:
        if own and own.data is None:
            fields = f" with {', '.join(own.fields).replace('|', ' or ')} in every row" * bool(own.fields)
            raise ConfigError(f"{key}: task {entry.task!r} needs data: a file{fields}{_where(own)}")
        return
    if own is None:
        allowed = ", ".join([*OWN_TASKS, *LOCAL_VARIANTS])
        raise ConfigError(
            f"{key}: data is given, but task {entry.task!r} reads its own data set; data may be set for {allowed}"
        )


def absent(entry: Entry, key: str, *, elsewhere: bool = False) -> str:
    """What the entry still needs before it can be scored, as a message; '' if it has all. `elsewhere`: see `check`."""
    if entry.task == BFCL and not elsewhere and not bfcl_python().is_file():
        return (
            f"{key}: {BFCL} is scored by bfcl-eval in an environment of its own, and {bfcl_python()} is not there: run "
            f"`bash examples/setup_bfcl.sh`, or name its Python in {BFCL_VARIABLE}"
        )
    if entry.data is None or not names_file(entry.data):
        return ""
    if elsewhere:
        return "" if Path(entry.data).is_absolute() else f"{key}.data={entry.data!r} must be an absolute path there"
    if at_hand(entry.data):
        return ""
    where = _where(entry.own) if entry.own else ""
    return f"{key}.data={entry.data!r} does not exist; give an existing file, generate:NAME or a hub id{where}"


def _where(own: OwnTask) -> str:
    return f"; to be had as {own.get}" if own.get else ""
