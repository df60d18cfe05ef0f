"""BFCL v3 (Berkeley function calling) by bfcl-eval, which has an environment of its own and asks an endpoint.

bfcl-eval's releases call their files v4; v3's categories among them are those of `GROUPS`.
"""

import json
import operator
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.evaluation.endpoint import Endpoint
from eaft_verl.evaluation.records import Sample, digest, mean_and_stderr, metric_entry, truncations
from eaft_verl.evaluation.settings import EvaluateSettings
from eaft_verl.evaluation.tasks import BFCL, BFCL_NEW_TOKENS, bfcl_python
from eaft_verl.models import load_tokenizer

GROUPS = {
    "non_live": (
        *("simple_python", "simple_java", "simple_javascript"),
        *("multiple", "parallel", "parallel_multiple", "irrelevance"),
    ),
    "live": (
        *("live_simple", "live_multiple", "live_parallel"),
        *("live_parallel_multiple", "live_irrelevance", "live_relevance"),
    ),
    "multi_turn": ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"),
}
CATEGORIES = tuple(category for group in GROUPS.values() for category in group)
MODEL = "eaft"
THREADS = 32  # questions asked of vLLM at a time
_FAILED = "Error during inference:"
_NO_ROOM = "context length"  # in any endpoint's words for a prompt that leaves no room


def measure_bfcl(
    settings: EvaluateSettings,
    path: Path | str,
    folder: Path,
    load: Callable[[Path | str], Any],
    free: Callable[[], None],
) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples) of the checkpoint behind an endpoint of its own. load, free: the held model's."""
    from eaft_verl.evaluation import harness

    (entry,) = (entry for side in ("target", "general") for entry in settings.entries(side) if entry.task == BFCL)
    most = entry.new_tokens or BFCL_NEW_TOKENS
    if settings.backend == "vllm":
        free()
        serving, threads = harness.vllm_server(path, MODEL, settings, most, folder / "server.log"), THREADS
    else:
        model, tokenizer = load(path)
        serving, threads = harness.server(model, tokenizer, settings, most), 1
    stop = [] if load_tokenizer(path).chat_template else harness.STOPS
    with serving as endpoint:
        return run_bfcl(endpoint, folder, entry.limit, threads, stop)


def counts_of(limit: int | None) -> dict[str, int | None]:
    """Questions of every category: all, or the first of each, `limit` in all as far as they go around evenly."""
    if limit is None:
        return dict.fromkeys(CATEGORIES)
    each, rest = divmod(limit, len(CATEGORIES))
    counts = {category: each + (number < rest) for number, category in enumerate(CATEGORIES)}
    return {category: count for category, count in counts.items() if count}


def run_bfcl(
    endpoint: Endpoint, folder: Path, limit: int | None, threads: int, stop: Sequence[str] = ()
) -> tuple[Any, list[Sample]]:
    """(record fields, samples): the model behind the endpoint asked and scored; answers in `folder` are kept.

    threads: questions asked at a time; 1 where the endpoint answers one at a time, or the others would time out. stop:
    texts that end an answer.
    Raises RunError where bfcl-eval ends with an error, or answers are missing because the endpoint failed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _drop_failed(folder)
    request = {"model": MODEL, "counts": counts_of(limit), "threads": threads, "stop": list(stop)}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    package = str(Path(__file__).parents[2])
    given = {"OPENAI_BASE_URL": endpoint.url, "OPENAI_API_KEY": endpoint.key, "PYTHONPATH": package}
    environment = {**os.environ, **given, "BFCL_PROJECT_ROOT": str(folder)}
    log = folder / "bfcl.log"
    with log.open("w", encoding="utf-8") as output:
        command = [str(bfcl_python()), "-m", "eaft_verl.evaluation.bfcl_driver"]
        code = subprocess.run(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"])[-1]
        raise RunError(f"bfcl-eval ended with code {code} ({last[:200]}); its output: {log}")
    return read_scores(folder, endpoint)


def read_scores(folder: Path, endpoint: Endpoint) -> tuple[dict[str, Any], list[Sample]]:
    """(record fields, samples) from bfcl-eval's result and score files below `folder`.

    A question's score is 1 unless its category's score file lists it among the failures, or it did not fit the context
    and so was not asked: to bfcl-eval that is a call not made, which is right for `irrelevance`. `accuracy` is the mean
    over all questions; `overall`, where every category was asked, the mean of the groups: of multi-turn and non-live
    that of their categories, the three `simple_` counting as one; of live that of its questions.
    """
    results, failed = _lines(folder / "result", "result"), _lines(folder / "score", "score")
    if absent := sorted(set(results) ^ set(failed)):
        raise RunError(f"bfcl-eval left no scores of {', '.join(absent)}; its output: {folder / 'bfcl.log'}")
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    samples = []
    for category in sorted(results, key=CATEGORIES.index):
        wrong = {row["id"] for row in failed[category] if "id" in row}
        _check(category, results[category], failed[category], wrong, folder)
        for row in sorted(results[category], key=lambda row: str(row["id"])):
            answer = row["result"] if isinstance(row["result"], str) else json.dumps(row["result"], ensure_ascii=False)
            shown = json.dumps(asked[row["id"]], ensure_ascii=False)
            sample = {"id": row["id"], "prompt": shown, "response": answer, "target": "", "category": category}
            right = row["id"] not in wrong and not _not_asked(row)
            samples.append({**sample, "scores": {"accuracy": float(right)}, **_cut(row, endpoint)})
    version = folder / "version.txt"
    harness = f"bfcl-eval {version.read_text(encoding='utf-8') if version.is_file() else 'of unknown version'}"
    return {**_record(samples), "task_version": BFCL, "harness": harness}, samples


def _record(samples: list[Sample]) -> dict[str, Any]:
    by_category: dict[str, list[float]] = {}
    for sample in samples:
        by_category.setdefault(sample["category"], []).append(sample["scores"]["accuracy"])
    mean, stderr = mean_and_stderr([sample["scores"]["accuracy"] for sample in samples])
    metrics = {"accuracy": metric_entry(mean, stderr, True)}
    if (overall := _overall(by_category)) is not None:
        metrics["overall"] = metric_entry(overall, None, True)
    return {
        "metric": "accuracy",
        "metrics": metrics,
        "n": len(samples),
        "categories": {name: {"right": int(sum(scores)), "n": len(scores)} for name, scores in by_category.items()},
        "prompt_hash": digest(sample["prompt"] for sample in samples),
        "data_hash": digest([sample["id"], sample["prompt"]] for sample in samples),
        **truncations(samples),
    }


def _overall(scores: dict[str, list[float]]) -> float | None:
    if set(scores) != set(CATEGORIES):
        return None
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    simple = [mean[name] for name in CATEGORIES if name.startswith("simple_")]
    single = [mean[name] for name in GROUPS["non_live"] if not name.startswith("simple_")]
    live = [score for name in GROUPS["live"] for score in scores[name]]
    turns = [mean[name] for name in GROUPS["multi_turn"]]
    groups = ([sum(simple) / len(simple), *single], live, turns)
    return sum(sum(values) / len(values) for values in groups) / len(groups)


def _lines(folder: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """{category: rows of its file}."""
    found = {}
    for path in sorted((folder / MODEL).rglob(f"BFCL_v4_*_{kind}.json")):
        category = path.name.removeprefix("BFCL_v4_").removesuffix(f"_{kind}.json")
        found[category] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return found


def _check(category: str, rows: list[Any], scores: list[Any], wrong: set[str], folder: Path) -> None:
    """RunError where an answer is missing since the endpoint failed, or the counts do not say what the rows say."""
    broken = [row for row in rows if _unanswered(row)]
    if broken:
        said = str(broken[0]["result"]).splitlines()[0][:200]
        raise RunError(f"{len(broken)} of {len(rows)} questions of {category} have no answer ({said}); run it again")
    header = scores[0] if scores else {}
    if (header.get("total_count"), header.get("correct_count")) != (len(rows), len(rows) - len(wrong)):
        raise RunError(f"bfcl-eval's score of {category} counts {header}, its rows otherwise; see {folder}")


def _unanswered(row: dict[str, Any]) -> bool:
    return _failed(row) and _NO_ROOM not in row["result"]


def _not_asked(row: dict[str, Any]) -> bool:
    return _failed(row) and _NO_ROOM in row["result"]


def _failed(row: dict[str, Any]) -> bool:
    return isinstance(row["result"], str) and row["result"].startswith(_FAILED)


def _cut(row: dict[str, Any], endpoint: Endpoint) -> dict[str, str]:
    """{truncated: answer} if an answer to it is as long as it might be, {truncated: prompt} if it was not asked."""
    if _failed(row):
        return {"truncated": "prompt"}
    asked, written = _flat(row.get("input_token_count", 0)), _flat(row.get("output_token_count", 0))
    most = [min(endpoint.new_tokens, endpoint.max_length - tokens) for tokens in asked]
    return {"truncated": "answer"} if any(map(operator.ge, written, most)) else {}


def _flat(counts: Any) -> list[int]:
    """Of one answer, or of those of several turns of several steps."""
    return [number for count in counts for number in _flat(count)] if isinstance(counts, list) else [int(counts)]


def _drop_failed(folder: Path) -> None:
    """Answers that an endpoint failed to give are asked for again; bfcl-eval would keep them, as wrong ones."""
    for path in (folder / "result").rglob("BFCL_v4_*_result.json"):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.strip() and not _unanswered(json.loads(line))]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
