"""`eaft tasks` says of each benchmark what is scored when it is named."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from eaft_verl.evaluation.tasks import LOCAL_VARIANTS
from eaft_verl.experiment.tasks import tasks_listing

FILES = {"gsm8k": "gsm8k/gsm8k", "mmlu": "mmlu/default/_default_template", "winogrande": "winogrande/default"}
FILES |= {name: f"aime/{name}" for name in ("aime24", "aime25")}


@pytest.mark.parametrize("name", sorted(LOCAL_VARIANTS))
def test_a_built_in_task_is_listed_with_the_harness_own_metric_and_shots(name: str) -> None:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm_eval is not installed")
    stem = Path(spec.origin).parent / "tasks" / FILES.get(name, f"{name}/{name}")
    file = next(path for path in (stem.with_suffix(".yaml"), stem.parent / f"{stem.name}_yaml") if path.exists())

    class Loader(yaml.SafeLoader):
        """lm-eval's `!function` tags are left alone."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # type: ignore[no-untyped-call]
    theirs = yaml.load(file.read_text(encoding="utf-8"), Loader)
    metrics = {one["metric"] for one in theirs["metric_list"]}
    (line,) = [line.split() for line in tasks_listing() if line.split()[:1] == [name]]
    assert line[1] in metrics and int(line[2]) == theirs.get("num_fewshot", 0)
