"""What is evaluated, and the key that two runs must share to be compared. Imports neither torch nor lm_eval."""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from eaft_verl.data.sources import at_hand, source_hash
from eaft_verl.errors import ConfigError
from eaft_verl.evaluation.tasks import Entry, absent, parse_entries, task_text

BACKENDS = ("hf", "vllm")
PROTOCOL = (
    5  # to be raised when the same settings give other scores than before; 5: ended rows leave, so others are drawn
)
HF_ARGUMENTS = ("dtype", "attn_implementation", "batch_size", "device", "token_budget")


@dataclass(frozen=True)
class DriftSettings:
    """Drift from the base model: on its own greedy answers to prompts, or on given answers if the rows have them.

    task_rows: so many prompts of the held-out data, the task's own, whose answers the base writes too; 0: none.
    """

    data: str = "generate:neutral_prompts"
    rows: int = 48
    new_tokens: int = 48  # answer tokens per prompt at most
    task_rows: int = 32


@dataclass(frozen=True)
class EvaluateSettings:
    """The `evaluate` section of a recipe.

    target, general: task names or mappings, see `tasks.Entry`. heldout: prepared data (a parquet file) whose NLL is
    the held-out NLL. drift: see DriftSettings. limit: first examples of every benchmark, and of a group of tasks in
    all, drawn evenly from its tasks. backend_args: for hf, HF_ARGUMENTS; for vllm, arguments of lm_eval's vllm model.
    max_length: tokens of prompt and answer together. chat_template_kwargs: what the recipe's data are rendered with.
    """

    target: list[Any] = field(default_factory=list)
    general: list[Any] = field(default_factory=list)
    heldout: str | None = None
    drift: dict[str, Any] | None = None
    limit: int | None = None
    backend: str = "hf"
    backend_args: dict[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    chat_template_kwargs: dict[str, Any] | None = None

    def entries(self, side: str) -> list[Entry]:
        """Parsed entries of 'target' or 'general', the common limit filled in."""
        parsed = parse_entries(list(getattr(self, side)), f"evaluate.{side}")
        return [entry if entry.limit else replace(entry, limit=self.limit) for entry in parsed]

    def drift_settings(self) -> DriftSettings | None:
        """`drift` with defaults filled in, or None."""
        return None if self.drift is None else DriftSettings(**self.drift)

    def check(self, *, dry_run: bool = False) -> None:
        """Raise ConfigError for anything that would fail later; reads no data and loads no model.

        `dry_run`: what is absent may still come.
        """
        names = [entry.task for side in ("target", "general") for entry in self.entries(side)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"evaluate.target and evaluate.general both name {', '.join(twice)}; a task has one side")
        for name in ("limit", "max_length"):
            _positive(getattr(self, name), f"evaluate.{name}", optional=name == "limit")
        self._check_drift()
        self._check_backend()
        if not dry_run and (missing := self.absent()):
            raise ConfigError(missing[0])

    def absent(self, *, elsewhere: bool = False) -> list[str]:
        """What the evaluation needs and is not there: data files, benchmarks without a runner, vLLM.

        `elsewhere`: it runs on another machine, where files must have absolute paths.
        """
        sides = {side: self.entries(side) for side in ("target", "general")}
        found = [
            absent(entry, f"evaluate.{side}[{number}]", elsewhere=elsewhere)
            for side, entries in sides.items()
            for number, entry in enumerate(entries)
        ]
        if self.backend == "vllm" and not elsewhere and importlib.util.find_spec("vllm") is None:
            found.append("evaluate.backend=vllm, but vllm is not installed here; install it or set backend: hf")
        return [message for message in found if message]

    def _check_drift(self) -> None:
        if self.drift is None:
            return
        known = [item.name for item in fields(DriftSettings)]
        if not isinstance(self.drift, Mapping) or set(self.drift) - set(known):
            raise ConfigError(f"evaluate.drift is {self.drift!r}; allowed: a mapping with {', '.join(known)}")
        for name in ("rows", "new_tokens"):
            _positive(getattr(self.drift_settings(), name), f"evaluate.drift.{name}", optional=False)
        if (rows := self.drift.get("task_rows")) != 0:
            _positive(rows, "evaluate.drift.task_rows", optional="task_rows" not in self.drift)

    def _check_backend(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"evaluate.backend={self.backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
        if self.backend == "hf" and (unknown := sorted(set(self.backend_args) - set(HF_ARGUMENTS))):
            allowed = ", ".join(HF_ARGUMENTS)
            raise ConfigError(
                f"evaluate.backend_args has {unknown[0]!r}, which backend hf does not take; allowed: {allowed}"
            )


def _positive(value: Any, key: str, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} is {value!r}; expected a positive whole number")


def evaluation_key(settings: EvaluateSettings) -> str:
    """Sixteen hex digits, equal only if two runs' scores may be compared.

    Covers the settings, the contents of every data source and task file of ours, and the harness's version; not the
    place where local data lie.
    """
    drift = settings.drift_settings()
    sources = [entry.data or (entry.own.data if entry.own else None) for entry in _all_entries(settings)]
    boxed = any(entry.own and entry.own.checked == "boxed" for entry in _all_entries(settings))
    description = {
        "protocol": PROTOCOL,
        "entries": {side: [_entry_key(entry) for entry in settings.entries(side)] for side in ("target", "general")},
        "sources": [_source_key(source) for source in sources],
        "heldout": _source_key(settings.heldout),
        "drift": drift and {**vars(drift), "data": _source_key(drift.data)},
        "limit": settings.limit,
        "backend": settings.backend,
        "backend_args": dict(settings.backend_args),
        "max_length": settings.max_length,
        "lm_eval": importlib.metadata.version("lm_eval") if importlib.util.find_spec("lm_eval") else None,
        "math_verify": boxed and importlib.util.find_spec("math_verify") is not None,
    }
    if settings.chat_template_kwargs:
        description["chat_template_kwargs"] = settings.chat_template_kwargs
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _all_entries(settings: EvaluateSettings) -> list[Entry]:
    return [entry for side in ("target", "general") for entry in settings.entries(side)]


def _entry_key(entry: Entry) -> dict[str, Any]:
    text = task_text(entry.own.file) if entry.own else None
    drawn = {"samples": entry.samples, **entry.sampling} if entry.sampling else {}
    cut = {"new_tokens": entry.new_tokens} if entry.new_tokens else {}
    return {"task": entry.task, "limit": entry.limit, "metric": entry.metric, "file": text, **cut, **drawn}


def _source_key(source: str | None) -> str | None:
    """Hash of a local or generated source; a hub id stands for itself, because reading it may need the network."""
    if source is None or not at_hand(source):
        return source
    return source_hash(source)
