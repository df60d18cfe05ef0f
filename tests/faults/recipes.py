"""Recipes and command lines that cannot be meant."""

import shutil

from .matrix import ARM, RECIPE, Lab, Outcome, fault


@fault("a key with a typo", "refused in one line that names it and the right one")
def _typo(lab: Lab) -> Outcome:
    seen = lab.train("verl.trainer.save_frequency=2")
    assert seen.code == 2 and "verl.trainer.save_freq" in seen.last_line and "Traceback" not in seen.said
    return Outcome(f"exit 2: {seen.last_line}")


@fault("a recipe that is a folder, binary, empty, a list, CSV, torn, or not there", "one line that names it")
def _no_recipe(lab: Lab) -> Outcome:
    for name, content, said in (
        ("binary.yaml", bytes(range(256)), "is not valid YAML"),
        ("empty.yaml", b"", "needs `arms:`"),
        ("list.yaml", b"- a\n", "is a list"),
        ("x.csv", b"prompt,response\na,b\n", "needs `arms:`"),
        ("torn.yaml", b"arms: {eaft: {objective: {na", "is not valid YAML"),
        ("tab.yaml", b"arms:\n\teaft: {}\n", "is not valid YAML"),
    ):
        (lab.folder / name).write_bytes(content)
        lab.eaft("train", lab.folder / name, "--arm", ARM, "--dry-run").refused(name, said)
    lab.eaft("train", lab.folder, "--arm", ARM, "--dry-run").refused("is a folder; name a YAML file")
    lab.eaft("train", lab.folder / "none.yaml", "--arm", ARM).refused("none.yaml does not exist")
    return Outcome("exit 2")


@fault(
    "values of the wrong kind: lr=abc, rows=many, seed=1.5, max_length=0, an unknown arm", "the key and what is allowed"
)
def _wrong_kinds(lab: Lab) -> Outcome:
    for override, said in (
        ("verl.optim.lr=abc", "verl.optim.lr='abc' must be a number"),
        ("data.rows=many", "data.rows='many'"),
        ("seed=1.5", "seed=1.5 must be an integer"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        ("data.max_length=0", "data.max_length=0"),
        ("data.max_rejected=2", "data.max_rejected=2.0 must be between 0 and 1"),
        ("data.max_rejected=few", "data.max_rejected='few' must be a number"),
    ):
        lab.train(override, "--dry-run").refused(said)
    lab.eaft("train", lab.recipe, "--arm", "none", "--dry-run").refused("has no arm 'none'; its arms are eaft")
    return Outcome("exit 2")


@fault(
    "K above the vocabulary, of the objective and of its anchor", "refused at the dry run, with the number of tokens"
)
def _candidates(lab: Lab) -> Outcome:
    lab.train("objective.k=1000", "--dry-run").refused("objective.k=1000: the vocabulary of", "has 384 tokens")
    anchor = "objective.anchor={kind: forward_kl_topk, coef: 0.5, k: 999}"
    lab.train(anchor, "--dry-run").refused("objective.anchor.k=999", "has 384 tokens")
    return Outcome("exit 2")


@fault("`eaft evaluate` of what is not there", "says so, and not that the default recipe is missing")
def _nothing_to_evaluate(lab: Lab) -> Outcome:
    lab.eaft("evaluate", "/nonexistent").refused("model='/nonexistent' is not a folder here")
    return Outcome("exit 2")


@fault("an own objective without weight(), or with one weight for all tokens", "the dry run names it and what is wrong")
def _own_objective(lab: Lab) -> Outcome:
    for name, said in (
        ("NoWeight", "weight() raises TypeError: NoWeight defines no weight()"),
        ("OneNumber", "weight() has shape [] for statistics of shape [5]"),
    ):
        seen = lab.train(f"objective.name='tests.faults.broken_objectives:{name}'", "--dry-run")
        assert seen.code == 0 and f"broken_objectives:{name}': {said}" in seen.said, seen.said
    return Outcome("exit 0 with a warning: a run would stop here")


CHAINS = """
arms:
  eaft: {{objective: {{name: eaft}}}}
  next: {{objective: {{name: sft}}, start: eaft}}
"""


def _recipe_of(lab: Lab, arms: str) -> None:
    lab.write_recipe(RECIPE[: RECIPE.index("arms:")] + arms.lstrip())


@fault("arms that wait for each other", "refused, the whole circle named")
def _circles(lab: Lab) -> Outcome:
    _recipe_of(lab, CHAINS.replace("name: eaft}}}}", "name: eaft}}, start: next}}"))
    lab.eaft("compare", lab.recipe, "--dry-run").refused("arms eaft -> next -> eaft form a circle", "next starts from")
    return Outcome("exit 2")


@fault("`eaft train` of an arm whose start is not trained yet", "what must exist first, and the command that makes it")
def _no_start(lab: Lab) -> Outcome:
    _recipe_of(lab, CHAINS)
    dry = lab.eaft("train", lab.recipe, "--arm", "next", "--dry-run")
    said = f"first run `eaft train {lab.recipe} --arm eaft seed=0`"
    assert dry.code == 0 and "a run would stop here: next starts from eaft" in dry.said and said in dry.said, dry.said
    seen = lab.eaft("train", lab.recipe, "--arm", "next")
    assert seen.code == 2 and said in seen.said and "Traceback" not in seen.said, seen.said
    return Outcome("exit 2")


@fault("a start that was trained again after the arm behind it", "stale: named and refused, the arm kept", slow=True)
def _stale_start(lab: Lab) -> Outcome:
    _recipe_of(lab, CHAINS)
    short = ("verl.trainer.total_training_steps=2",)
    assert lab.eaft("compare", lab.recipe, *short).code == 0
    shutil.rmtree(lab.run)
    assert lab.eaft("train", lab.recipe, "--arm", ARM, "verl.optim.lr=2e-3", *short).code == 0
    seen = lab.eaft("train", lab.recipe, "--arm", "next", *short)
    assert seen.code == 2 and "finished run" in seen.last_line, seen.said
    _recipe_of(lab, CHAINS.replace("{{name: eaft}}", "{{name: eaft}}, verl: {{optim: {{lr: 2.0e-3}}}}"))
    seen = lab.eaft("compare", lab.recipe, *short)
    assert seen.code == 2 and "start: the checkpoint of eaft is another one (" in seen.last_line, seen.said
    return Outcome(f"exit 2: {seen.last_line[:160]}")


@fault("a rule that no arm can be judged by, an alarm without a limit, an unknown tracker", "one line with the reason")
def _cannot_be_judged(lab: Lab) -> Outcome:
    for override, said in (
        ("choose={forget_at_most: {general: -1 point}}", "evaluate.general is empty"),
        ("choose={forget_at_most: {kl: 0.02}, by: target}", "evaluate.target is empty"),
        ("meter={every: 2, alarm: {then: stop}}", "meter.alarm.kl=None"),
        ("trackers=[neptune]", "is not one of wandb, mlflow, swanlab, trackio"),
    ):
        lab.train(override, "--dry-run").refused(said)
    return Outcome("exit 2")


@fault(
    "objectives and anchors that cannot be meant: a parameter with a typo, l2 under LoRA",
    "refused at the dry run in one line that names the key and the way out",
)
def _objectives(lab: Lab) -> Outcome:
    for overrides, words in (
        (["objective.powr=2"], ("objective.powr is unknown", "power")),
        (
            ["objective={name: sft, anchor: {kind: l2, coef: 10}}", "verl.model.lora_rank=4"],
            ("verl.model.lora_rank=4", "weight_decay"),
        ),
    ):
        lab.train(*overrides, "--dry-run").refused(*words)
    return Outcome("exit 2")


@fault(
    "a benchmark that is misspelt, whose data or package is not there, or whose answers cannot be drawn",
    "refused before anything is loaded; what is meant, where it is to be had, what to run",
)
def _benchmarks(lab: Lab) -> Outcome:
    for entry, *said in (
        ("cluewsk", "did you mean 'cluewsc'?", "`eaft tasks`"),
        ("cluewsc", "needs data", "CLUEbenchmark/FewCLUE"),
        ("{task: gsm8k, data: none.jsonl}", "none.jsonl' does not exist", "openai/grade-school-math"),
        ("{task: sums, samples: 8}", "without a temperature"),
        ("{task: sums, samples: many}", "samples is 'many'"),
        ("{task: sums, temperature: hot}", "temperature is 'hot'"),
        ("bfcl_v3", "bash examples/setup_bfcl.sh"),
    ):
        lab.train(f"evaluate.target=[{entry}]").refused("evaluate.target[0]", *said)
    return Outcome("exit 2")
