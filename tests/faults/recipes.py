"""Recipes and command lines that cannot be meant."""

from .matrix import ARM, Lab, Outcome, fault


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
