"""Every reason to refuse a comparison, one at a time, and what --force makes of it."""

import shutil

import pytest
from omegaconf import OmegaConf
from reporting.fake_runs import edit, edit_samples, make_arm, make_base, make_runs

from eaft_verl.errors import RunError
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.comparability import check, config_differences, flatten


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    make_runs(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "runs")


def checked(folder, **options):
    base, arms = load([folder / name for name in ("base", "sft", "eaft")])
    return check(base, arms, **options)


def change_key(key, value):
    return lambda info: {**info, "keys": {**info["keys"], key: value}}


def refused(folder, *expected):
    with pytest.raises(RunError) as error:
        checked(folder)
    assert all(text in str(error.value) for text in (*expected, "--force")), str(error.value)
    found = checked(folder, force=True)
    assert found
    assert all(line in str(error.value) for line in found)


def test_comparable_runs_pass(folder):
    assert checked(folder) == []


@pytest.mark.parametrize("key", ["model", "template", "evaluation", "data"])
def test_a_differing_key_is_refused_with_both_values_and_runs(folder, key):
    edit(folder / "eaft" / "run.json", change_key(key, "zzz"))
    first = "sft" if key == "data" else "base"
    old = {"model": "m0", "template": "t0", "evaluation": "e0", "data": "d0"}[key]
    refused(folder, f"keys.{key}", repr(old), "'zzz'", str(folder / first), str(folder / "eaft"))


@pytest.mark.parametrize("key", ["model", "template", "evaluation"])
def test_a_base_of_another_model_template_or_evaluation_is_refused(folder, key):
    edit(folder / "base" / "run.json", change_key(key, "zzz"))
    refused(folder, f"keys.{key}", "'zzz'", str(folder / "base"))


def test_a_key_that_nobody_recorded_proves_nothing(folder):
    for name in ("sft", "eaft"):
        edit(folder / name / "run.json", change_key("data", None))
    refused(folder, "keys.data: None")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt_hash", "p9"),
        ("task_version", "2"),
        ("data_hash", "d9"),
        ("n", 39),
        ("metric", "f1"),
        ("side", "general"),
    ],
)
@pytest.mark.parametrize("step", ["step_000012", "step_000003"])
def test_a_differing_benchmark_is_refused(folder, key, value, step):
    def differ(record):
        if key == "metric":
            record["metrics"][value] = record["metrics"][record["metric"]]
        return {**record, key: value}

    edit(folder / "eaft" / "eval" / step / "gsm8k.json", differ)
    refused(folder, f"benchmark gsm8k, {key}", repr(value), str(folder / "base"), str(folder / "eaft"))


def test_differing_example_ids_are_refused(folder):
    edit_samples(
        folder / "eaft" / "samples" / "step_000012" / "gsm8k.jsonl",
        lambda rows: [{**rows[0], "id": "gsm8k-999"}, *rows[1:]],
    )
    refused(folder, "benchmark gsm8k, example ids: 1 only in base", "gsm8k-999", str(folder / "eaft"))


def test_a_benchmark_of_one_run_only_is_refused(folder):
    (folder / "sft" / "eval" / "step_000012" / "mmlu.json").unlink()
    refused(folder, "benchmark mmlu", f"sft seed 0 ({folder / 'sft'}) lacks it")


@pytest.mark.parametrize("name", ["base", "eaft"])
def test_an_unfinished_run_is_refused(folder, name):
    edit(folder / name / "run.json", lambda info: {**info, "status": "running"})
    refused(folder, "status", "'running'", str(folder / name))


def test_a_missing_final_evaluation_is_refused(folder):
    shutil.rmtree(folder / "eaft" / "eval" / "step_000012")
    refused(folder, "final evaluation", "no evaluation at step 12", "[3, 6, 9]", str(folder / "eaft"))


def test_an_undeclared_difference_is_refused(folder):
    path = folder / "eaft" / "config.yaml"
    path.write_text(path.read_text().replace("lr: 1.0e-5", "lr: 2.0e-5"))
    refused(
        folder, "config verl.optim.lr: 1e-05 in sft seed 0, 2e-05 in eaft seed 0", "neither sft nor eaft declares it"
    )


def test_how_the_model_was_wrapped_changes_no_number(folder):
    """Also beside a run of an earlier version, which has another key there."""
    for name, policy in (("sft", {"min_num_params": 0}), ("eaft", {"disable": None})):
        path = folder / name / "config.yaml"
        config = OmegaConf.load(path)
        OmegaConf.update(config, "verl.engine.wrap_policy", policy, force_add=True)
        OmegaConf.save(config, path)
    assert checked(folder) == []


def test_a_declared_difference_passes_also_through_its_parent(folder):
    path = folder / "eaft" / "config.yaml"
    path.write_text(path.read_text().replace("top_k: 20", "top_k: 50").replace("1.0e-5", "2.0e-5"))
    edit(folder / "eaft" / "run.json", lambda info: {**info, "declared": ["objective", "verl.optim"]})
    assert checked(folder) == []
    _, arms = load([folder / name for name in ("base", "sft", "eaft")])
    rows = {row["key"]: row for row in config_differences(arms)}
    assert rows.keys() == {"objective.name", "objective.top_k", "verl.optim.lr"}
    assert rows["objective.top_k"]["values"] == {"sft seed 0": "20", "eaft seed 0": "50"}
    assert all(row["declared"] for row in rows.values())


def with_lr(path, lr, *declared):
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("lr: 1.0e-5", f"lr: {lr}"))
    edit(path / "run.json", lambda info: {**info, "declared": [*info["declared"], *declared]})


def test_what_a_third_arm_declares_excuses_nobody_else(tmp_path):
    runs = make_runs(tmp_path, ("sft", "eaft", "grpo"))
    with_lr(runs[2], 1e-4)
    with_lr(runs[3], 1e-6, "verl.optim.lr")
    base, arms = load(runs)
    (line,) = check(base, arms, force=True)
    assert line.startswith(
        "config verl.optim.lr: 1e-05 in sft seed 0, 0.0001 in eaft seed 0, and neither sft nor eaft declares it"
    )
    assert {row["key"]: row["declared"] for row in config_differences(arms)}["verl.optim.lr"] is False
    edit(runs[2] / "run.json", lambda info: {**info, "declared": [*info["declared"], "verl.optim.lr"]})
    assert check(*load(runs)) == []


def seeds_of_two_arms(folder):
    return [make_base(folder / "base"), *(make_arm(folder / f"{a}{s}", a, s) for a in ("sft", "eaft") for s in (0, 1))]


def test_within_an_arm_only_the_seed_differs_whatever_is_declared(tmp_path):
    runs = seeds_of_two_arms(tmp_path)
    assert check(*load(runs)) == []
    for run in runs[3:]:
        with_lr(run, 1e-4 if run.name == "eaft1" else 2e-5, "verl.optim.lr")
    (line,) = check(*load(runs), force=True)
    assert line == (
        "config verl.optim.lr: 2e-05 in eaft seed 0, 0.0001 in eaft seed 1; runs of one arm may differ in their seed "
        "only, so train them with one recipe"
    )


@pytest.mark.parametrize("budget", [{}, {"budget": {"of": "sft", "unit": "tokens"}}])
def test_seeds_differ_in_length_only_where_it_follows_from_a_budget(tmp_path, budget):
    runs = seeds_of_two_arms(tmp_path)
    for run, steps in zip(runs[3:], (11, 12), strict=True):
        config = run / "config.yaml"
        config.write_text(
            config.read_text().replace("verl:\n", f"verl:\n  trainer: {{total_training_steps: {steps}}}\n")
        )
        declared = ["objective.name", "verl.trainer.total_training_steps"]
        edit(run / "run.json", lambda info, d=declared: {**info, "declared": d, "derived": budget})
    found = check(*load(runs), force=True)
    assert [line.split(":")[0] for line in found] == ([] if budget else ["config verl.trainer.total_training_steps"])


def test_choosing_an_objective_declares_its_parameters(folder):
    path = folder / "sft" / "config.yaml"
    path.write_text(path.read_text().replace("  top_k: 20\n", ""))
    assert checked(folder) == []


def test_all_reasons_are_listed_at_once(folder):
    edit(folder / "eaft" / "run.json", lambda info: {**change_key("model", "zzz")(info), "status": "failed"})
    assert len(checked(folder, force=True)) == 2


def test_flatten_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": None}) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "d": "{}",
        "e": "null",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sft", "eaft"], "exactly one base run .* found 0"),
        (["base", "base", "sft"], "exactly one base run .* found 2"),
        (["base"], "at least one arm run"),
        (["base", "sft", "sft"], "arm 'sft' seed 0 is given twice"),
    ],
)
def test_the_set_of_runs_must_make_sense(folder, names, message):
    with pytest.raises(RunError, match=message):
        load([folder / name for name in names])


def test_arms_are_grouped_by_seed_with_the_reference_first(tmp_path):
    paths = [make_arm(tmp_path / f"eaft{seed}", "eaft", seed) for seed in (1, 0)]
    paths += [make_arm(tmp_path / "sft", "sft"), make_base(tmp_path / "base")]
    _, arms = load(paths)
    assert [(arm.name, arm.seeds) for arm in arms] == [("sft", (0,)), ("eaft", (0, 1))]


def test_a_folder_that_is_no_run_and_a_run_of_unknown_kind_are_refused(folder, tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        load([tmp_path])
    edit(folder / "sft" / "run.json", lambda info: {**info, "kind": "other"})
    with pytest.raises(RunError, match="kind='other'"):
        load([folder / "sft"])


def test_repeated_example_ids_are_refused(folder):
    edit_samples(folder / "sft" / "samples" / "step_000012" / "gsm8k.jsonl", lambda rows: [rows[0], *rows])
    with pytest.raises(RunError, match="repeated example ids"):
        checked(folder, force=True)


def test_an_arm_that_its_meter_ended_is_exempt_from_the_budget_and_said_to_be(tmp_path):
    from eaft_verl.reporting.caveats import interruptions
    from eaft_verl.reporting.spending import budgets

    runs = [
        make_base(tmp_path / "base"),
        make_arm(tmp_path / "sft", "sft"),
        make_arm(tmp_path / "e", "eaft", steps=(3, 6)),
    ]
    base, arms = load(runs)
    with pytest.raises(RunError, match="budget: eaft seed 0 has 6 updates, sft seed 0 12"):
        check(base, arms)
    meter = {"alarm": 6, "then": "stop", "stopped": True}
    edit(runs[2] / "run.json", lambda info: {**info, "meter": meter})
    base, arms = load(runs)
    assert check(base, arms) == []
    row = next(row for row in budgets(arms)["arms"] if row["arm"] == "eaft")
    assert (row["equal"], row["alarmed"]) == (None, True)
    assert interruptions(arms) == [
        "eaft seed 0: the forgetting meter's alarm went off after update 6, which ended its training"
    ]
