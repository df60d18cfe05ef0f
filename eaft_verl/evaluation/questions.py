"""The questions that a recipe's benchmarks ask, read without lm_eval: what training data must not contain."""

from eaft_verl.data.columns import PROMPT_KEYS
from eaft_verl.data.sources import at_hand, read_rows
from eaft_verl.errors import ConfigError, DataError
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.evaluation.tasks import BFCL, Entry, OwnTask

QUESTION_FIELDS = (*PROMPT_KEYS, "text", "QUESTION", "sent1", "sentence", "ctx")


def benchmark_questions(settings: EvaluateSettings) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({task: its questions, as far as they are scored}, {task: why its questions are not known here}).

    Questions are known where our task files read local or generated rows. Tasks of lm-evaluation-harness and rows on a
    hub are not read: that takes seconds, or a network, which the machine that trains may not have.
    """
    known: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    for entry in (entry for side in ("target", "general") for entry in settings.entries(side)):
        try:
            reason = _unreadable(entry)
            if reason or entry.own is None:
                unknown[entry.task] = reason
            else:
                known[entry.task] = _questions(entry, entry.own)
        except (ConfigError, DataError) as error:
            unknown[entry.task] = str(error)
    return known, unknown


def _unreadable(entry: Entry) -> str:
    if entry.task == BFCL:
        return "its questions are within bfcl-eval, in another environment"
    if entry.own is None:
        return "lm-evaluation-harness reads its documents itself; `eaft prepare --against FILE` checks a copy of them"
    source = str(entry.data or entry.own.data)
    if at_hand(source):
        return ""
    return f"its documents are on a hub; `eaft prepare --against {source}` checks them"


def _questions(entry: Entry, own: OwnTask) -> list[str]:
    fields = "|".join(own.fields).split("|")
    named = [name for name in QUESTION_FIELDS if name in fields] or list(QUESTION_FIELDS)
    rows = read_rows(str(entry.data or own.data))[: entry.limit]
    found = (next((row[name] for name in named if isinstance(row.get(name), str)), None) for row in rows)
    return [question for question in found if question is not None]
