"""What a manifest says of a preparation, and the error that names the rows which stopped it."""

import math
import re
from collections import Counter
from typing import Any

import numpy as np

from eaft_verl.data.sources import count_rows
from eaft_verl.data.spec import DataSpec
from eaft_verl.data.take import Outcome
from eaft_verl.errors import DataError

_SHOWN = 5  # reasons named in an error; the manifest lists every row
# What differs between rows at the same fault: numbers, and what is quoted of them unless it may be a name.
_QUOTED = re.compile(r"""\b\d+\b|'(?!\w+')(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_CHOSEN = {"duplicate", "masked", *("over_long", "control_token", "leakage")}  # the last three: rejected by a setting
_REMEDIES = {
    "over_long": "set data.over_long=drop or truncate, or data.max_length={longest} or more",
    "control_token": "set data.control_tokens=escape or allow",
    "leakage": "remove these rows, or set data.leakage=drop to leave them out, warn to keep them",
}


def raise_refused(spec: DataSpec, outcome: Outcome) -> None:
    """DataError naming rows that a setting refuses, or some of the rejected ones if no row is left."""
    source = spec.source if isinstance(spec.source, str) else ", ".join(one.source for one in spec.sources)
    if outcome.refused:
        kinds = sorted({entry["kind"] for entry in outcome.refused})
        lengths = [int(entry["reason"].split()[0]) for entry in outcome.refused if entry["kind"] == "over_long"]
        known = {kind: said.format(longest=max(lengths, default=0)) for kind, said in _REMEDIES.items()}
        remedy = "".join(f"; {known[kind]}" for kind in kinds if kind in known)
        raise DataError(f"{source}: {len(outcome.refused)} rows are refused{remedy}. {_name_rows(outcome.refused)}")
    if not outcome.chosen_N.any():
        read = sum(outcome.read.values())
        at_fault = f"none of {read} rows is left. {_name_rows(outcome.rejected)}" if read else "it holds no rows"
        raise DataError(f"{source}: {at_fault}")


def rows_used(manifest: dict[str, Any]) -> str:
    """'4 of 64 rows are used; 60 are not: role 60', and why the first of them are not."""
    counts, entries = manifest["counts"], manifest["rejected"]
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts["rejected"].items()))
    out = f"; {sum(counts['rejected'].values())} are not: {kinds}" if kinds else ""
    left = counts["read"] - counts["kept"] - sum(counts["rejected"].values())
    cut = f"; {left} are left out by shares and caps" if left > 0 else ""
    used = f"{counts['kept']} of {counts['read']} rows are used{out}{cut}{_unread(manifest)}"
    return f"{used}. {_name_rows(entries)}" if entries else used


def _unread(manifest: dict[str, Any]) -> str:
    """'; 8 more are not read (rows=32)' where a limit cuts the source short."""
    spec = manifest["spec"]
    limit, source = spec.get("rows"), spec.get("source")
    if limit is None or manifest["counts"]["read"] < limit:
        return ""
    total = count_rows(source) if isinstance(source, str) else None
    more = "any more" if total is None else f"{total - limit} more"
    return "" if total is not None and total <= limit else f"; {more} are not read (rows={limit})"


def check_rejected(manifest: dict[str, Any], limit: float) -> None:
    """DataError if more than `limit` (a share) of the rows of a source are faulty.

    Copies of other rows, and what a setting or a row's own mask leaves out, are not faulty.
    """
    for name, part in manifest.get("sources", {"": manifest["counts"]}).items():
        faulty = sum(count for kind, count in part["rejected"].items() if kind not in _CHOSEN)
        if faulty > limit * part["read"]:
            enough = math.ceil(100 * faulty / part["read"]) / 100
            raise DataError(
                f"{f'source {name}: ' if name else ''}{faulty} of {part['read']} rows are faulty, more than "
                f"data.max_rejected={limit:g} allows; correct them, or set data.max_rejected={enough:g} to train "
                f"without them: {rows_used(manifest)}"
            )


def describe(tokenizer: Any, outcome: Outcome) -> dict[str, Any]:
    """The manifest's account of what was read and what came out."""
    rows = outcome.kept_N[outcome.chosen_N]
    lengths_E, trained_E = outcome.tokens_E[outcome.chosen_E].T.astype(np.int64)
    counts = {
        "read": sum(outcome.read.values()),
        "kept": len(rows),
        "rejected": dict(Counter(entry["kind"] for entry in outcome.rejected)),
        "truncated": int(rows["truncated"].sum()),
        "escaped": int((rows["escaped"] > 0).sum()),
        "escaped_tokens": int(rows["escaped"].sum()),
        "open_turns": int(rows["open"].sum()),
        "examples": len(lengths_E),
    }
    more = {
        "columns_not_used": dict(outcome.unused),
        "turns_left_out": int(rows["left"].sum()),
        "sources": _by_source(outcome, lengths_E, trained_E),
    }
    return {
        "tokenizer": tokenizer.name_or_path,
        "counts": counts,
        "tokens": {"total": int(lengths_E.sum()), "trained": int(trained_E.sum())},
        "lengths": _histogram(np.sort(lengths_E)),
        "end_of_turn": dict(outcome.ends),
        "rejected": outcome.rejected,
        **{key: value for key, value in more.items() if value},
    }


def _by_source(outcome: Outcome, lengths_E: Any, trained_E: Any) -> dict[str, dict[str, Any]]:
    """Counts of each named source."""
    chosen_N, source_N = outcome.chosen_N, outcome.kept_N["source"]
    source_E = np.repeat(source_N, outcome.kept_N["examples"])[outcome.chosen_E]
    found = {}
    for index, source in enumerate(outcome.spec.sources):
        if source.name is None:
            continue
        mine_N, mine_E = source_N == index, source_E == index
        rejected = Counter(entry["kind"] for entry in outcome.rejected if entry.get("source") == source.name)
        found[source.name] = {
            "read": outcome.read[index],
            "kept": int((mine_N & chosen_N).sum()),
            "left_out": int((mine_N & ~chosen_N).sum()),
            "rejected": dict(rejected),
            "examples": int(mine_E.sum()),
            "tokens": {"total": int(lengths_E[mine_E].sum()), "trained": int(trained_E[mine_E].sum())},
        }
    return found


def _histogram(lengths_E: Any) -> dict[str, Any]:
    """Sorted lengths by powers of two, with median, 95th percentile and maximum."""
    longest = int(lengths_E[-1])
    edges = [2**power for power in range(longest.bit_length() + 1)]
    return {
        "edges": edges,
        "counts": np.histogram(lengths_E, edges)[0].tolist(),
        "p50": int(lengths_E[(len(lengths_E) + 1) // 2 - 1]),
        "p95": int(lengths_E[-(-len(lengths_E) * 95 // 100) - 1]),
        "max": longest,
    }


def _name_rows(entries: list[dict[str, Any]]) -> str:
    """The first reasons, each with its first row and how many more it has, or others that differ in what they quote."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        alike.setdefault(_QUOTED.sub("", entry["reason"]), []).append(entry)
    shown = list(alike.values())[:_SHOWN]
    more = len(entries) - sum(map(len, shown))
    return "\n  ".join(["Rows at fault:", *map(_name_alike, shown), *[f"and {more} more"] * (more > 0)])


def _name_alike(entries: list[dict[str, Any]]) -> str:
    first, more = entries[0], len(entries) - 1
    if not more:
        return f"row {_place(first)}: {first['reason']}"
    if all(entry["reason"] == first["reason"] for entry in entries):
        return f"row {_place(first)} and {more} more: {first['reason']}"
    return f"row {_place(first)}: {first['reason']} ({more} more of this kind)"


def _place(entry: dict[str, Any]) -> str:
    return f"{entry['row']} of {entry['source']}" if "source" in entry else str(entry["row"])
