"""A plan for people (tables) and for programs (JSON)."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from eaft_verl.planning.arm_plan import ArmPlan, Machine
from eaft_verl.planning.formulas import GIB

PIPE_WIDTH = 200  # columns where no terminal says otherwise
Column = tuple[dict[str, str], dict[str, str]]  # the parts of one arm's section, and what sums them up


def print_plans(plans: Sequence[ArmPlan], machine: Machine) -> None:
    """Print one column per arm, then what does not fit with its remedies, then the assumptions."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True, width=width)
    kind = f"{machine.nodes} x {machine.devices} {machine.kind}, {machine.gib:.4g} GiB each"
    console.print(f"plan for {kind}; sizes in GiB")
    console.print(_table(plans))
    for plan in plans:
        _print_verdict(console.print, plan)
    for line in _assumptions(plans, machine):
        console.print(line)


def _table(plans: Sequence[ArmPlan]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(plan.arm.name, justify="right")
    for title, columns in _sections(plans):
        table.add_row(title, *[""] * len(plans), style="bold")
        for part in (0, 1):
            for name in dict.fromkeys(name for column in columns for name in column[part]):
                table.add_row(f"  {name}", *(column[part].get(name, "-") for column in columns))
    return table


def _sections(plans: Sequence[ArmPlan]) -> list[tuple[str, list[Column]]]:
    return [
        ("one device, at its peak", [_device(plan) for plan in plans]),
        ("fullest host", [(_sizes(plan.host), {"sum": _gib(plan.needed)}) for plan in plans]),
        ("disk", [(_sizes(plan.disk, "at once"), {"at once": _gib(plan.disk["at once"])}) for plan in plans]),
        ("time (estimate)", [_times(plan) for plan in plans]),
    ]


def _device(plan: ArmPlan) -> Column:
    sums = {"sum": _gib(plan.peak), "peak in": plan.phase, "verdict": plan.verdict}
    if plan.measured:
        sums["probe, planned"] = _gib(plan.measured["planned"])
        sums["probe, measured"] = _gib(plan.measured["peak"])
    return _sizes(plan.device), sums


def _sizes(parts: dict[str, float], without: str = "") -> dict[str, str]:
    return {name: _gib(size) for name, size in parts.items() if size and name != without}


def _times(plan: ArmPlan) -> Column:
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
    if arm.updates is not None:
        total = plan.before_s + plan.step_s * arm.updates
        sums |= {"updates in all": f"{arm.updates:,}", "training": duration(total)}
        sums["device hours"] = f"{total * arm.setup.devices / 3600:,.2f}"
    return parts, sums


def _print_verdict(show: Any, plan: ArmPlan) -> None:
    if plan.verdict == "fits" and not plan.reasons:
        return
    show(f"{plan.arm.name}: {plan.verdict}" + (f" ({'; '.join(plan.reasons)})" if plan.reasons else ""))
    if plan.verdict == "fits":
        return
    for remedy in plan.remedies:
        size = f"{remedy['peak'] / GIB:.1f} GiB a device, {remedy['host'] / GIB:.0f} GiB a host"
        show(f"  {remedy['way']}: {size}, {duration(remedy['step_s'])} an update", style="bold")
        show(f"    {' '.join(remedy['overrides'])}")
    if not plan.remedies:
        show("  nothing that `eaft plan` knows makes it fit: a smaller model, a shorter data.max_length, more nodes")


def _assumptions(plans: Sequence[ArmPlan], machine: Machine) -> list[str]:
    said = {plan.arm.name: (*plan.arm.notes, *plan.facts) for plan in plans}
    lines = [note for note in said[plans[0].arm.name] if all(note in notes for notes in said.values())]
    lines += [f"{name}: {note}" for name, notes in said.items() for note in notes if note not in lines]
    if plans[0].measured:
        lines += [f"{plan.arm.name}: {plan.measured['flops'] / 1e12:.3g} TFLOP/s a device, measured" for plan in plans]
    else:
        lines.append(f"speed: {machine.speed.source}; a share between 0.8 and 1.2 of it is ordinary")
    if machine.host_gib is None:
        lines.append("memory of a host is not known: give --host GIB to have it judged")
    return lines


def as_json(plans: Sequence[ArmPlan], machine: Machine) -> str:
    """The plans as JSON: bytes and seconds."""
    arms = {}
    for plan in plans:
        arm = plan.arm
        arms[arm.name] = {
            "verdict": plan.verdict,
            "reasons": plan.reasons,
            "device": {"phase": plan.phase, "parts": plan.device, "bytes": plan.peak},
            "host": {"parts": plan.host, "bytes": plan.needed},
            "disk": plan.disk,
            "seconds": {**plan.seconds, "update": plan.step_s, "before": plan.before_s},
            "tokens_per_update": arm.setup.update_tokens,
            "updates_per_epoch": arm.updates_per_epoch,
            "updates": arm.updates,
            "measured": plan.measured,
            "remedies": plan.remedies,
            "notes": [*arm.notes, *plan.facts],
        }
    return json.dumps({"machine": vars(machine), "arms": arms}, indent=2)


def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """'3.1 s', '12 min', '4.0 h'."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
