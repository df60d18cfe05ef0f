"""What a user asks of `eaft synthesize`: where prompts come from, who answers them, what is kept."""

import difflib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eaft_verl.data.spec import Columns, check_columns
from eaft_verl.errors import ConfigError, require
from eaft_verl.grading.graders import check_reward
from eaft_verl.parameters import count, number

# The prompts of the EAFT paper (arXiv 2601.02151, App. B), as their cards on the hub describe them.
NAMED: dict[str, dict[str, Any]] = {
    "numina_math": {
        "source": "AI-MO/NuminaMath-CoT",
        "columns": {"messages": None, "prompt": "problem", "response": "solution"},
    },
    "big_math_verified": {
        "source": "SynthLabsAI/Big-Math-RL-Verified",
        "columns": {"prompt": "problem", "answer": "answer"},
        "difficulty": "llama8b_solve_rate",
    },
    "cross_think_math": {
        "source": "nvidia/Nemotron-CrossThink::train_math",
        "columns": {"prompt": "prompt", "answer": "reward_model.ground_truth"},
    },
    "huatuo_o1": {
        "source": "FreedomIntelligence/medical-o1-verifiable-problem",
        "columns": {"prompt": "Open-ended Verifiable Question", "answer": "Ground-True Answer"},
    },
    "nemotron_agentic": {"source": "nvidia/Nemotron-Agentic-v1::tool_calling", "thinking": False},
}


@dataclass(frozen=True)
class PromptSource:
    """One source of prompts.

    source: as DataSpec.source. columns: {role: column}; `a.b` is field b of column a. rows: the first so many only.
    difficulty: column by which acceptance is stated. thinking: whether rows whose own answers hold reasoning count.
    """

    source: str
    columns: Columns | None = None
    rows: int | None = number(None, 1)
    difficulty: str | None = None
    thinking: bool = True


@dataclass(frozen=True)
class Endpoint:
    """Where answers come from, and how hard it may be asked. None of it but `model` is part of what an answer is.

    url: base URL of the OpenAI-compatible API, `/v1` included. model: id; None: the only one that is served.
    api_key: as ${oc.env:NAME} only. timeout: seconds of one attempt, its last byte included. attempts: of one request.
    backoff: seconds before the second attempt; doubled each time up to a minute, and what Retry-After asks is kept.
    prices: {prompt: P, completion: C}, in money per million tokens.
    """

    url: str = ""
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = count(16)
    requests_per_minute: float | None = number(None, 0, positive=True)
    timeout: float = number(600.0, 0, positive=True)
    attempts: int = count(6)
    backoff: float = number(1.0, 0, 60)
    prices: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: as Qwen3-235B-A22B-Instruct-2507's card says. extra: further fields of the request."""

    temperature: float = number(0.7, 0)
    top_p: float = number(0.8, 0, 1, positive=True)
    max_tokens: int = count(16384)
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SynthesisSpec:
    """The whole of it.

    endpoint: None draws from the answers that the rows have. samples: answers to a prompt. keep: verified ones of a
    prompt that become rows, at most. system, instruction: put before the conversation, and after its last user turn.
    keep_instruction: whether rows hold both. grader: as reward.grader; None keeps answers as they come.
    rows: how many rows are drawn (None: all). seed: of the order in which prompts are drawn. own: the answers are those
    of the model that will be trained.
    """

    prompts: Mapping[str, PromptSource]
    endpoint: Endpoint | None = None
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = count(1)
    keep: int = count(1)
    system: str | None = None
    instruction: str | None = None
    keep_instruction: bool = True
    grader: str | None = None
    grader_seconds: float = number(10.0, 0.1, 600)
    rows: int | None = number(None, 1)
    seed: int = number(0, 0)
    own: bool = False

    def request(self) -> dict[str, Any]:
        """What decides an answer besides its prompt: kept answers are of one such request."""
        model = self.endpoint.model if self.endpoint else None
        return {"model": model, **{f"sampling.{key}": value for key, value in asdict(self.sampling).items()}}

    def choice(self) -> dict[str, Any]:
        """What else decides the rows."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("endpoint", "sampling", "prompts")}
        return kept | {f"prompts.{name}": asdict(one) for name, one in self.prompts.items()}


def parse_spec(tree: Mapping[str, Any], where: str) -> SynthesisSpec:
    """The spec that a mapping describes; ConfigError names the key under `where`, what is allowed, what was meant."""
    tree = dict(tree)
    if not tree.get("prompts"):
        raise ConfigError(f"{where}: prompts is missing: a file, a hub id, or {', '.join(NAMED)}")
    tree["prompts"] = _prompt_sources(tree["prompts"], where)
    if isinstance(tree.get("endpoint"), str):
        tree["endpoint"] = {"url": tree["endpoint"]}
    if tree.get("endpoint") is not None:
        tree["endpoint"] = _endpoint(_built(Endpoint, tree["endpoint"], where, "endpoint"), where)
    if "sampling" in tree:
        tree["sampling"] = _built(Sampling, tree["sampling"] or {}, where, "sampling")
    spec: SynthesisSpec = _built(SynthesisSpec, tree, where)
    if spec.grader is not None:
        try:
            check_reward(spec.grader, 0, spec.grader_seconds)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).replace('reward.grader', 'grader')}") from None
    require(spec.keep <= spec.samples, f"{where}: keep={spec.keep} is more than samples={spec.samples}")
    return spec


def _endpoint(endpoint: Endpoint, where: str) -> Endpoint:
    try:
        parts = urlsplit(endpoint.url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that cannot be
        sound = False
    if not sound:
        raise ConfigError(f"{where}: endpoint.url={endpoint.url!r} must be http://HOST:PORT/v1, or endpoint: null")
    priced = endpoint.prices
    if priced is not None and not (
        isinstance(priced, Mapping)
        and set(priced) == {"prompt", "completion"}
        and all(isinstance(price, int | float) and price >= 0 for price in priced.values())
    ):
        raise ConfigError(
            f"{where}: endpoint.prices={priced!r} must be {{prompt: P, completion: C}}, money per million tokens"
        )
    return endpoint


def _prompt_sources(value: Any, where: str) -> dict[str, PromptSource]:
    """Sources by name: of a name, a file, a hub id, a list of them, or a mapping of names to any of these."""
    if isinstance(value, Mapping) and isinstance(value.get("source"), str):
        value = [value]
    if isinstance(value, Mapping):
        entries = dict(value)
    else:
        listed = value if isinstance(value, list | tuple) else [value]
        entries = {}
        for entry in listed:
            source = entry.get("source") if isinstance(entry, Mapping) else entry
            require(isinstance(source, str), f"{where}: prompts={value!r} must name files, hub ids or known sources")
            name = Path(str(source)).name.split(".")[0].split(":")[0]
            require(name not in entries, f"{where}: two sources are called {name!r}; write prompts: {{NAME: SOURCE}}")
            entries[name] = entry
    return {str(name): _prompt_source(str(name), entry, where) for name, entry in entries.items()}


def _prompt_source(name: str, entry: Any, where: str) -> PromptSource:
    known = NAMED.get(entry if isinstance(entry, str) and entry in NAMED else name, {})
    given = entry if isinstance(entry, Mapping) else {} if entry is None or entry in NAMED else {"source": entry}
    key = f"prompts.{name}"
    source: PromptSource = _built(PromptSource, {**known, **given}, where, key)
    require(isinstance(source.source, str) and source.source, f"{where}: {key}.source must name a file or a hub id")
    check_columns(source.columns, f"{where}: {key}.columns")
    return source


def _built(kind: Any, tree: Any, where: str, prefix: str = "") -> Any:
    """A dataclass from a mapping, each value checked against its field."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: {prefix}={tree!r} must be a mapping")
    known = {one.name: one for one in fields(kind)}
    for name, value in tree.items():
        dotted = f"{prefix}.{name}".lstrip(".")
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {f'{prefix}.{close[0]}'.lstrip('.')}?" if close else f"allowed: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {dotted}; {hint}")
        if fault := _fault(known[name], value):
            raise ConfigError(f"{where}: {dotted}={value!r} must be {fault}")
    if kind is PromptSource and "source" not in tree:
        raise ConfigError(f"{where}: {prefix}.source is missing: a file, a hub id, or {', '.join(NAMED)}")
    return kind(**tree)


def _fault(wanted: Field[Any], value: Any) -> str | None:
    """What the value of a field must be, if it is not that."""
    kind = wanted.type
    if check := wanted.metadata.get("check"):
        whole = kind in (int, int | None) and value is not None and type(value) is not int
        return check(value) or ("a whole number" if whole else None)
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind in (str, str | None):
        return "" if isinstance(value, str) or (value is None and kind is not str) else "text"
    if "Mapping" in str(kind) and not (value is None or isinstance(value, Mapping)):
        return "a mapping"
    return ""
