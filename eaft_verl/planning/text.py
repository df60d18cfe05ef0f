"""A plan for people (tables) and for programs (JSON)."""

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from eaft_verl.boundary import inert, unguarded
from eaft_verl.planning.arm_plan import ArmPlan
from eaft_verl.planning.formulas import GIB
from eaft_verl.planning.machine import Machine

WIDTH = 120  # columns of text
HEADING = 24  # columns of a heading, unless one name is longer
Cells = dict[str, str]  # {row: what stands in it}
Column = dict[str, tuple[Cells, Cells]]  # {section: (parts, what sums them up)} of arms whose numbers are the same
Grouped = list[tuple[list[str], Any]]  # arms, and what is the same for all of them


def print_plans(plans: Sequence[ArmPlan], machine: Machine) -> None:
    """Print one column for the arms whose numbers are equal, then what does not fit with its remedies, then the
    assumptions. Nothing is wider than WIDTH but a word that is."""
    console = Console(  # a long name is not cut
        file=unguarded(sys.stdout), highlight=False, emoji=False, markup=False, width=10 * WIDTH
    )
    kind = f"{machine.nodes} x {machine.devices} {inert(machine.kind)}, {machine.gib:.4g} GiB each"
    console.print(f"plan for {kind}; sizes in GiB")
    for table in _tables(console, _grouped((plan.arm.name, _column(plan)) for plan in plans)):
        console.print(table)
    for line in _lines(plans, machine):
        print(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def _grouped(said: Iterable[tuple[str, Any]]) -> Grouped:
    """What is said of arms one by one, every thing once with all of its arms."""
    groups: Grouped = []
    for name, what in said:
        for names, known in groups:
            if known == what:
                names.append(name)
                break
        else:
            groups.append(([name], what))
    return groups


def _tables(console: Console, columns: Grouped) -> Iterator[Table]:
    """As few tables as fit side by side."""
    while columns:
        tables = ((count, _table(columns[:count])) for count in range(len(columns), 0, -1))
        count, table = next(pair for pair in tables if pair[0] == 1 or console.measure(pair[1]).maximum <= WIDTH)
        yield table
        columns = columns[count:]


def _table(columns: Grouped) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("", no_wrap=True)
    for names, _ in columns:
        width = max(HEADING, *(len(name) + 1 for name in names))
        heading = textwrap.fill(", ".join(names), width, break_long_words=False, break_on_hyphens=False)
        table.add_column(heading, justify="right", no_wrap=True)
    for section in columns[0][1]:
        table.add_row(section, style="bold")
        cells = [column[section] for _, column in columns]
        for part in (0, 1):
            for name in dict.fromkeys(name for pair in cells for name in pair[part]):
                table.add_row(f"  {name}", *(pair[part].get(name, "-") for pair in cells))
    return table


def _column(plan: ArmPlan) -> Column:
    return {
        "one device, at its peak": _device(plan),
        "fullest host": (_sizes(plan.host), {"sum": gib(plan.needed)}),
        "disk": (_sizes(plan.disk), {}),
        "time (estimate)": _times(plan),
    }


def _device(plan: ArmPlan) -> tuple[Cells, Cells]:
    sums = {"sum": gib(plan.peak), "peak in": plan.phase, "verdict": plan.verdict}
    if plan.measured:
        sums |= {
            f"probe, {kind}": gib(plan.measured[key]) for kind, key in (("planned", "planned"), ("measured", "peak"))
        }
    return _sizes(plan.device), sums


def _sizes(parts: dict[str, float]) -> Cells:
    return {name: gib(size) for name, size in parts.items() if size}


def _times(plan: ArmPlan) -> tuple[Cells, Cells]:
    arm = plan.arm
    parts = {name: duration(part) for name, part in plan.seconds.items() if part > 0.005 * plan.step_s}
    sums = {"update": duration(plan.step_s), "tokens in an update": f"{arm.setup.update_tokens:,.0f}"}
    sums["tokens / s"] = f"{arm.setup.update_tokens / plan.step_s:,.0f}"
    if plan.before_s:
        sums["passes before training"] = duration(plan.before_s)
    if arm.updates_per_epoch is None:
        sums["epoch"] = "unknown"
    else:
        sums["updates in an epoch"] = f"{arm.updates_per_epoch:,}"
        sums["epoch"] = duration(plan.step_s * arm.updates_per_epoch)
    if (total := plan.training_s) is not None:
        sums |= {"updates in all": f"{arm.updates:,}", "training": duration(total)}
        sums["device hours"] = f"{total * arm.setup.devices / 3600:,.2f}"
    return parts, sums


def _lines(plans: Sequence[ArmPlan], machine: Machine) -> Iterator[str]:
    """What does not fit with what would, then what else must be known; what holds for every arm without their names."""
    misfits = [(plan.arm.name, _verdict(plan)) for plan in plans if plan.verdict != "fits"]
    for names, (first, *rest) in _grouped(misfits):
        yield f"{', '.join(names)}: {first}"
        yield from rest
    for names, note in _grouped((plan.arm.name, note) for plan in plans for note in _notes(plan)):
        yield note if len(names) == len(plans) else f"{', '.join(names)}: {note}"
    if not plans[0].measured:
        yield f"speed: {machine.speed.source}; a share between 0.8 and 1.2 of it is ordinary"
    if machine.host_gib is None:
        yield "memory of a host is not known: give --host GIB to have it judged"


def _notes(plan: ArmPlan) -> list[str]:
    problem = [f"would not start: {plan.problem}"] if plan.problem else []
    measured = [f"{plan.measured['flops'] / 1e12:.3g} TFLOP/s a device, measured"] if plan.measured else []
    return [*problem, *plan.arm.notes, *plan.facts, *measured]


def _verdict(plan: ArmPlan) -> list[str]:
    lines = [f"{plan.verdict} ({'; '.join(plan.reasons)})"]
    for remedy in plan.remedies:
        size = f"{remedy['peak'] / GIB:.1f} GiB a device, {remedy['host'] / GIB:.0f} GiB a host"
        lines.append(f"  {remedy['way']}: {size}, {duration(remedy['step_s'])} an update")
        lines.append(f"    {' '.join(remedy['overrides'])}")
    nothing = "  nothing that `eaft plan` knows makes it fit: a smaller model, a shorter data.max_length, more nodes"
    return lines if plan.remedies else [*lines, nothing]


def as_json(plans: Sequence[ArmPlan], machine: Machine) -> str:
    """The plans as JSON: bytes and seconds."""
    arms = {
        plan.arm.name: {
            "verdict": plan.verdict,
            "reasons": [*plan.reasons, *([f"would not start: {plan.problem}"] if plan.problem else [])],
            "device": {"phase": plan.phase, "parts": plan.device, "bytes": plan.peak},
            "host": {"parts": plan.host, "bytes": plan.needed},
            "disk": plan.disk,
            "seconds": {**plan.seconds, "update": plan.step_s, "before": plan.before_s},
            "tokens_per_update": plan.arm.setup.update_tokens,
            "updates_per_epoch": plan.arm.updates_per_epoch,
            "updates": plan.arm.updates,
            "measured": plan.measured,
            "remedies": plan.remedies,
            "notes": [*plan.arm.notes, *plan.facts],
        }
        for plan in plans
    }
    return json.dumps({"machine": vars(machine), "arms": arms}, indent=2)


def gib(size: float) -> str:
    """'3.10', '44.0'."""
    return f"{size / GIB:.{2 if size < 10 * GIB else 1}f}"


def duration(seconds: float) -> str:
    """'3.1 s', '12 min', '4.0 h'."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
