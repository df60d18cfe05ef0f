"""Formulas of `eaft plan` for what is not on a device: bytes on hosts and on disk. Letters and sources: formulas.py."""

from eaft_verl.planning.architectures import Architecture
from eaft_verl.planning.formulas import PROCESS, Setup, update_scratch


def host_bytes(setup: Setup, export: int, reference_tokens: float = 0.0) -> dict[str, float]:
    """{part: bytes on the fullest host}, a device's own memory not counted. [V]

    Loading: an untied model is read whole by the first process only, a tied one by every process, in the stored dtype.
    Exports are gathered on the first process. The reference cache is page cache: the system may take it back.
    """
    per_host = setup.devices / setup.nodes
    copies = per_host if setup.model.tied else 1
    loading = copies * setup.master * setup.model.parameters if setup.cuda else 0.0
    parts = {
        "processes": PROCESS * per_host,
        "loading or export": max(loading, export * setup.model.parameters),
        "reference cache": cache_bytes(reference_tokens, setup.cache_k),
    }
    offloaded = sum(setup.stored.values()) if setup.offload_policy else setup.parked * setup.model.parameters
    parts["offloaded"] = offloaded / setup.nodes
    if setup.offload_policy:
        parts["scratch"] = update_scratch(setup) * per_host
    if setup.reference and setup.reference_on_host:
        parts["reference"] = setup.reference.parameters * setup.compute / setup.nodes
    return {name: size for name, size in parts.items() if size}


def cache_bytes(tokens: float, k: int) -> float:
    """A reference cache: K ids (int32) and log-probabilities (fp32), and one tail, per trained token. [C]"""
    return tokens * (8 * k + 4) if k else 0.0


def checkpoint_bytes(setup: Setup) -> float:
    """A state to resume: the trained weights and their optimizer state, of all ranks; frozen ones are the base's."""
    return setup.master * setup.trained + setup.stored["optimizer"]


def export_bytes(model: Architecture, dtype: int) -> float:
    """A Hugging Face folder; a tied head is written once, an adapter is merged."""
    return dtype * model.parameters
