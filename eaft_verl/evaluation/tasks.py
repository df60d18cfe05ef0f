"""What may stand in `evaluate.target` and `evaluate.general`. The config check uses it: no torch, no lm_eval."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_verl.data.readers import SUFFIXES
from eaft_verl.errors import ConfigError

TASK_FILES = Path(__file__).with_name("task_files")
RESERVED = {"heldout": "evaluate.heldout", "drift": "evaluate.drift"}
_HARNESS_NAME = re.compile(r"^[A-Za-z0-9_.-]+$")
_ENTRY_KEYS = ("task", "data", "limit", "metric")
_CLOSE = 0.8  # no built-in task is this close to one of ours, so such a name is a slip of the pen


@dataclass(frozen=True)
class OwnTask:
    """One of our tasks: its lm-eval file, the fields its rows need, and where they come from unless `data:` says so.

    checked: what `rows` checks in every row besides.
    """

    file: str
    fields: tuple[str, ...]
    data: str | None = None
    checked: str = "number"


@dataclass(frozen=True)
class Entry:
    """One benchmark asked for. `data`, `limit`, `metric`: None means the task's own."""

    task: str
    data: str | None = None
    limit: int | None = None
    metric: str | None = None

    @property
    def own(self) -> OwnTask | None:
        """Our definition of this task, or None if lm-evaluation-harness has to bring it."""
        return LOCAL_VARIANTS.get(self.task) if self.data and self.task in LOCAL_VARIANTS else OWN_TASKS.get(self.task)


def _generated(name: str) -> OwnTask:
    return OwnTask(f"{name}.yaml", ("question", "answer"), f"generate:{name}")


_GSM8K = OwnTask("gsm8k.yaml", ("question", "answer"), "openai/gsm8k:main:test")
OWN_TASKS = {
    "sums": OwnTask("sums.yaml", ("prompt", "answer"), "generate:sums_heldout"),
    "two_shot_sums": _generated("two_shot_sums"),
    "products": _generated("products"),
    "gcd": _generated("gcd"),
    "lcm": _generated("lcm"),
    "letter_counting": _generated("letter_counting"),
    "gsm8k_local": _GSM8K,
    "cluewsc": OwnTask("cluewsc.yaml", ("text", "target", "label"), checked="cluewsc"),
    # Asked as a chat, so that a model may think before it answers.
    "aime24_boxed": OwnTask("boxed.yaml", ("answer",), "HuggingFaceH4/aime_2024", "boxed"),
    "aime25_boxed": OwnTask("boxed.yaml", ("answer",), "math-ai/aime25::test", "boxed"),
    "gsm8k_boxed": OwnTask("boxed.yaml", ("question", "answer"), "openai/gsm8k:main:test", "boxed"),
    "mmlu_chat": OwnTask("mmlu_chat.yaml", ("question", "choices", "answer"), "cais/mmlu:all:test", "options"),
    "medmcqa_chat": OwnTask("medmcqa_chat.yaml", ("question",), "openlifescienceai/medmcqa::validation", "options"),
    "medqa_chat": OwnTask("medqa_chat.yaml", (), "GBaker/MedQA-USMLE-4-options-hf::test", "options"),
    "pubmedqa_chat": OwnTask("pubmedqa_chat.yaml", ("QUESTION", "CONTEXTS", "final_decision"), checked="options"),
    "cluewsc_chat": OwnTask("cluewsc_chat.yaml", ("text", "target", "label"), checked="cluewsc"),
}
# Built-in tasks whose rows may also come from `data:`; the harness's own files can read only the hub.
LOCAL_VARIANTS = {
    "gsm8k": _GSM8K,
    "mmlu": OwnTask("mmlu.yaml", ("subject", "question", "choices", "answer"), checked="four choices"),
    "ifeval": OwnTask("ifeval.yaml", ("key", "prompt", "instruction_id_list", "kwargs"), checked="instructions"),
    "aime24": OwnTask("aime.yaml", ("problem", "answer")),
    "aime25": OwnTask("aime.yaml", ("problem", "answer")),
}
# Benchmarks of the paper that are known by name only: a recipe may list them, and says so at --dry-run.
UNBUILT = {
    "bfcl_v3": "(Berkeley function calling) has no runner here yet: score the exports with the bfcl-eval package",
}


def parse_entries(entries: list[Any], key: str = "evaluate") -> list[Entry]:
    """Entries of a list of names and {task, data, limit, metric} mappings. Reads no data, loads no model.

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
            f"{key} is {entry!r}; allowed: a task name or a mapping with task and, optionally, data, limit, metric"
        )
    if unknown := sorted(set(entry) - set(_ENTRY_KEYS)):
        raise ConfigError(f"{key} has the unknown key {unknown[0]!r}; allowed: {', '.join(_ENTRY_KEYS)}")
    for name in ("task", "data", "metric"):
        if entry.get(name) is not None and not isinstance(entry[name], str):
            raise ConfigError(f"{key}.{name} is {entry[name]!r}; expected text")
    limit = entry.get("limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"{key}.limit is {limit!r}; expected a positive number of examples, or leave it out for all")
    parsed = Entry(**entry)
    _check_name(parsed.task, key)
    _check_data(parsed, key)
    return parsed


def _check_name(name: str, key: str) -> None:
    if name in RESERVED:
        raise ConfigError(f"{key} is {name!r}, which is no task; set {RESERVED[name]} instead")
    if name in OWN_TASKS or name in LOCAL_VARIANTS or name in UNBUILT:
        return
    close = difflib.get_close_matches(name, OWN_TASKS, n=1, cutoff=_CLOSE)
    if close or not _HARNESS_NAME.match(name):
        raise ConfigError(unknown_task(name, key, close))


def unknown_task(name: str, key: str, close: list[str]) -> str:
    """The message for a task nobody knows."""
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"{key}: unknown task {name!r}{hint} Ours are {', '.join(OWN_TASKS)}; or any lm-evaluation-harness task"


def _check_data(entry: Entry, key: str) -> None:
    own = entry.own
    if entry.data is None:
        if own and own.data is None:
            raise ConfigError(
                f"{key}: task {entry.task!r} needs data: a file with {', '.join(own.fields)} in every row"
            )
        return
    if own is None:
        allowed = ", ".join([*OWN_TASKS, *LOCAL_VARIANTS])
        raise ConfigError(
            f"{key}: data is given, but task {entry.task!r} reads its own data set; data may be set for {allowed}"
        )


def absent(entry: Entry, key: str, *, elsewhere: bool = False) -> str:
    """What the entry still needs before it can be scored, as a message; '' if it has all. `elsewhere`: see `check`."""
    if entry.task in UNBUILT:
        return f"{key}: {entry.task} {UNBUILT[entry.task]}; until then leave it out of the recipe"
    if entry.data is None or Path(entry.data).suffix not in SUFFIXES:
        return ""
    if elsewhere:
        return "" if Path(entry.data).is_absolute() else f"{key}.data={entry.data!r} must be an absolute path there"
    if Path(entry.data).is_file():
        return ""
    return f"{key}.data={entry.data!r} does not exist; give an existing file, generate:NAME or a hub id"
