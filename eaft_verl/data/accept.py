"""One raw row to its training examples, or why it has none. Runs in any process, knows of no other row."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from eaft_verl.data.encode import Encoded, Written, finish, special_tokens, write
from eaft_verl.data.formats import to_messages
from eaft_verl.data.leakage import Against, Hit
from eaft_verl.data.offsets import Tokens, tokenize
from eaft_verl.data.parquet import Example, to_batch
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.data.template import check_unused, normal_form
from eaft_verl.data.validate import check_fields, check_row

_LEAST, _MOST = 1e-30, 1e30  # weights, which are kept as 32-bit numbers
RawRow = tuple[int, int, dict[str, Any]]  # index of its source, number in it (1-based), columns


@dataclass
class Taken:
    """What became of one row. `fault`: (kind, reason) if it has no examples; `digest`: of what it says, if it says it.

    name: the row's own id, else the digest's beginning. left_turns: turns that are too long and were left out.
    ends: what ends the turns of its examples.
    """

    source: int
    number: int
    digest: str = ""
    name: str = ""
    fault: tuple[str, str] | None = None
    examples: int = 0
    truncated: int = 0
    open_turns: int = 0
    escaped: int = 0
    left_turns: int = 0
    ends: tuple[str, ...] = ()
    hits: set[Hit] = field(default_factory=set)


@dataclass
class Chunk:
    """Rows taken together: their examples in order, without ids, and what else is counted."""

    rows: list[Taken]
    batch: pa.RecordBatch
    unused: Counter[str]


@dataclass(frozen=True)
class Taker:
    """All that a row is taken by."""

    spec: DataSpec
    tokenizer: Any
    against: Against | None = None

    def __call__(self, rows: Sequence[RawRow]) -> Chunk:
        """What became of these rows. The tokenizer is asked for all of them at once."""
        chunk, examples = Chunk([], pa.record_batch([]), Counter()), list[Example]()
        drafts = []
        for source, number, row in rows:
            taken = Taken(source, number)
            chunk.rows.append(taken)
            try:
                drafts.append(self._read(taken, row, chunk))
            except RowError as error:
                taken.fault = _fault(error)
            except RecursionError:
                taken.fault = ("wrong_type", "its values are nested too deeply")
        tokens = tokenize(self.tokenizer, (one.text for draft in drafts for one in draft.written))
        for draft in drafts:
            found = list(islice(tokens, len(draft.written)))
            try:
                examples += self._examples(draft, found)
            except RowError as error:
                draft.taken.fault = _fault(error)
        chunk.batch = to_batch(examples)
        return chunk

    def _read(self, taken: Taken, row: dict[str, Any], chunk: Chunk) -> "_Draft":
        spec, source = self.spec, self.spec.sources[taken.source]
        unused = Counter[str]()
        messages, extra = to_messages(row, source.columns, unused)
        if unused:
            check_unused(self.tokenizer, unused)
            if not all(map(str.isascii, unused)):
                check_fields({"the name of a column": list(unused)})
            chunk.unused.update(unused)
        check_fields({name: extra[name] for name in ("id", "answer") if name in extra})
        common, own = dict(spec.chat_template_kwargs or {}), extra.get("chat_template_kwargs")
        messages, beside, taken.escaped = check_row(
            messages,
            special_tokens(self.tokenizer),
            spec.control_tokens,
            normal=normal_form(self.tokenizer),
            tools=extra.get("tools"),
            chat_template_kwargs={**common, **(own or {})},
        )
        tools, kwargs = beside["tools"], beside["chat_template_kwargs"]
        extra |= {"tools": tools} if tools else {}
        said = [messages, tools, own] if own else [messages, tools]
        taken.digest = _digest(said)
        taken.name = extra.get("id", taken.digest[:16])
        return _Draft(taken, messages, extra, kwargs, write(self.tokenizer, messages, spec.turns, tools, kwargs))

    def _examples(self, draft: "_Draft", tokens: Sequence[Tokens]) -> list[Example]:
        spec, taken, messages = self.spec, draft.taken, draft.messages
        source = spec.sources[taken.source]
        weight = _weight(draft.extra.get("weight", 1.0), source.weight)
        encoded = finish(draft.written, tokens, spec.max_length, spec.over_long, spec.turns)
        taken.examples = len(encoded)
        taken.truncated = sum(one.truncated for one in encoded)
        taken.open_turns = sum(one.open_turns for one in encoded)
        taken.left_turns = _trainable(messages) - len(encoded) if spec.turns == "split" else 0
        taken.ends = tuple(end for one in encoded for end in one.ends)
        if self.against:
            taken.hits = self.against.find(messages)
        return [_example(one, draft, weight, source.name) for one in encoded]


@dataclass(frozen=True)
class _Draft:
    """A row whose texts wait for their tokens."""

    taken: Taken
    messages: list[dict[str, Any]]
    extra: Mapping[str, Any]
    kwargs: dict[str, Any]
    written: list[Written]


def _fault(error: RowError) -> tuple[str, str]:
    """Kind and reason; what is quoted of the row may hold what cannot be written to the manifest."""
    return error.kind, str(error).encode("utf-8", "backslashreplace").decode()


def _weight(own: float, of_source: float) -> float:
    """The weight of the row times its source's; RowError for one that the file would keep as infinite or as 0."""
    weight = own * of_source
    if not _LEAST <= weight <= _MOST:
        raise RowError(
            "mask", f"weight of the row is {weight:g}, its source's included; from {_LEAST:g} to {_MOST:g} is allowed"
        )
    return weight


def _digest(said: list[Any]) -> str:
    """sha256 of what a row says; RowError for what JSON, in which it is kept, has not (a parquet may hold it)."""
    try:
        return hashlib.sha256(json.dumps(said, sort_keys=True, allow_nan=False).encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise RowError("wrong_type", f"its calls, tools or template arguments are not JSON ({error})") from None


def _trainable(messages: list[dict[str, Any]]) -> int:
    return sum(message["role"] == "assistant" and message.get("train", True) for message in messages)


def _example(one: Encoded, draft: _Draft, weight: float, source: str | None) -> Example:
    """The example, its messages marked so that whoever renders them again trains the same turns."""
    marked = [
        message if message["role"] != "assistant" or index in one.trained else {**message, "train": False}
        for index, message in enumerate(draft.messages[: one.turn + 1])
    ]
    return Example(
        id="",
        messages=marked,
        input_ids=one.input_ids,
        loss_mask=one.loss_mask,
        answer=draft.extra.get("answer"),
        tools=draft.extra.get("tools"),
        chat_template_kwargs=draft.kwargs or None,
        weight=weight,
        source=source,
    )
