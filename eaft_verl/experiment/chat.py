"""`eaft chat`: the same prompt to a base model and what was trained from it, their answers below one another."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eaft_verl.data.template import render
from eaft_verl.errors import ConfigError, DataError, RunError
from eaft_verl.evaluation.model_files import positions_of
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.experiment.use import last_export
from eaft_verl.models import load_config, resolve_model
from eaft_verl.reporting.summary import runs_of
from eaft_verl.runs import Run, is_run

ANEW = "/new"


@dataclass
class Speaker:
    """A model that answers, by its name; `kwargs` are its template's. Loaded at its first answer."""

    name: str
    model: Path | str
    kwargs: dict[str, Any] | None = None
    said: list[dict[str, str]] = field(default_factory=list)
    loaded: tuple[Any, Any] | None = None


def chat_command(
    what: Sequence[str], prompt: str | None, system: str | None, new_tokens: int, temperature: float
) -> None:
    """Answer one prompt, or every line that is typed or piped in, until the input ends."""
    if new_tokens < 1:
        raise ConfigError("--new-tokens must be at least 1")
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty; say something, or leave it out to type")
    speakers = speakers_of(what)
    for asked in [prompt] if prompt is not None else _typed(speakers):
        for speaker in speakers:
            if asked == ANEW:
                speaker.said = []
                continue
            try:
                answer = _answer(speaker, asked, system, new_tokens, temperature)
            except (ConfigError, DataError) as error:  # a prompt that is too long, or that the template refuses
                if prompt is not None:
                    raise
                print(f"eaft: {error}; {ANEW} begins a new conversation", file=sys.stderr, flush=True)
                continue
            print(f"{f'{speaker.name}: ' if len(speakers) > 1 else ''}{answer}", flush=True)


def speakers_of(what: Sequence[str]) -> list[Speaker]:
    """The models to speak with: of a run its base and its last export, of a folder of runs the base and every arm.

    RunError or ConfigError where there is nothing that can speak.
    """
    found: dict[str, Speaker] = {}
    for one in what:
        path = Path(one)
        if is_run(path) or (path.is_dir() and not (path / "config.json").exists()):
            for speaker in _of_runs([Run(run) for run in runs_of([path])]):
                found.setdefault(str(speaker.model), speaker)
        else:
            model = resolve_model(one)
            load_config(model)  # what cannot be had is said before anybody types
            found.setdefault(str(model), Speaker(one, model))
    return list(found.values())


def _of_runs(runs: Sequence[Run]) -> Iterator[Speaker]:
    """The base that the runs share, then each that has an export."""
    base, silent = next((run.info["model"] for run in runs), ""), []
    kwargs = (runs[0].config.get("data") or {}).get("chat_template_kwargs") if runs else None
    yield Speaker("base", resolve_model(base), kwargs)
    for run in runs:
        if run.info["kind"] == "base":
            continue
        try:
            yield Speaker(run.path.name, last_export(run), kwargs)
        except RunError as error:
            silent.append(str(error))
    for line in silent:
        print(f"eaft: warning: {line}", file=sys.stderr)


def _typed(speakers: Sequence[Speaker]) -> Iterator[str]:
    """Lines of the standard input that say something; what can be done is said where somebody sits at it."""
    people = sys.stdin.isatty()
    if people:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits its line with it
        names = ", ".join(speaker.name for speaker in speakers)
        print(f"{names}; {ANEW} begins a new conversation, Ctrl-D ends", file=sys.stderr)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> ") if people else next(sys.stdin, None)
            if line is None:
                return
            if line.strip():
                yield line.strip()


def _answer(speaker: Speaker, asked: str, system: str | None, new_tokens: int, temperature: float) -> str:
    """The model's answer, which stays in its conversation as the question does."""
    from eaft_verl.evaluation.drift import make_probe
    from eaft_verl.evaluation.loading import load_model

    if speaker.loaded is None:
        speaker.loaded = load_model(speaker.model, EvaluateSettings())
    model, tokenizer = speaker.loaded
    opening = [{"role": "system", "content": _readable(system)}] if system else []
    said = [*speaker.said, {"role": "user", "content": _readable(asked)}]
    _require_room(speaker.name, model.config, tokenizer, [*opening, *said], speaker.kwargs)
    prompt = {"id": "0", "messages": [*opening, *said], "tools": None, "chat_template_kwargs": speaker.kwargs}
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    (example,) = make_probe(model, tokenizer, [prompt], new_tokens, **drawn)
    answer = str(example.messages[-1]["content"])
    speaker.said = [*said, {"role": "assistant", "content": answer}]
    return answer


def _readable(text: str) -> str:
    """What was typed, with a question mark for each byte that is no UTF-8: no tokenizer takes it."""
    return text.encode(errors="replace").decode()


def _require_room(
    name: str, config: Any, tokenizer: Any, messages: list[dict[str, str]], kwargs: dict[str, Any] | None
) -> None:
    """ConfigError for a conversation that fills all positions that the model knows: an answer would be noise."""
    text = render(tokenizer, messages, None, generate=True, kwargs=kwargs)
    known, tokens = positions_of(config), len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if known and tokens >= known:
        raise ConfigError(f"{name}: the conversation has {tokens:,} tokens and the model knows {known:,} positions")
