"""Which training rows contain a benchmark's question: cases counted by hand, and what each policy makes of them."""

import json
from pathlib import Path

import pytest

from eaft_verl.data.leakage import RUN, Against, summary, words
from eaft_verl.data.prepare import check_leakage, load_prepared, manifest_path, prepare
from eaft_verl.data.spec import DataSpec
from eaft_verl.data.synthesis import generate
from eaft_verl.errors import DataError
from eaft_verl.recipe.datasets import file_questions, question_of, recipe_questions

SHARED = Path(__file__).parents[3] / "shared" / "data"
LONG = " ".join(f"w{number}" for number in range(26))  # 26 words: 13 of them are half
NINE = "one two three four five six seven eight nine"


def chat(user: str, assistant: str = "ok") -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def test_words():
    assert words("What's 3+4 = 7, Anne?") == ["what", "s", "3", "+", "4", "=", "7", "anne"]
    assert words("他说A好") == ["他", "说", "a", "好"]
    assert words("5 - 3") != words("5 + 3")


@pytest.mark.parametrize(
    ("question", "user", "assistant", "found"),
    [
        (LONG, LONG, "ok", True),
        (LONG, f"Please: {LONG.upper().replace(' ', ', ')}!", "ok", True),
        (LONG, "Q", f"As asked, {LONG}", True),
        (LONG, " ".join(LONG.split()[:13]), "ok", True),  # 13 of 26 words
        (LONG + " w26", " ".join(LONG.split()[:13]), "ok", False),  # 13 of 27
        (LONG, " ".join(LONG.split()[:12]), "ok", False),  # no run of 13
        (LONG, " ".join([*LONG.split()[:12], "x", *LONG.split()[12:24]]), "ok", False),  # two runs of 12
        (LONG, " ".join(LONG.split()[:13]), " ".join(LONG.split()[13:]), True),  # in two turns
        (NINE, f"so {NINE} it is", "ok", True),
        (NINE, "Q", f"so {NINE} it is", True),
        (NINE, NINE.replace("nine", "ten"), "ok", False),
        ("What is 3 + 4?", "what is 3 + 4", "ok", True),
        ("What is 3 + 4?", "What is 3 + 5?", "ok", False),
        ("What is 3 + 4?", "Tell me: what is 3 + 4?", "ok", False),  # five words inside another question
        ("What is 3 + 4?", "Q", "What is 3 + 4?", False),
        ("...", "...", "...", False),
    ],
)
def test_one_question(question: str, user: str, assistant: str, found: bool):
    hits = Against({"b": [question]}).find(chat(user, assistant))
    assert hits == ({("b", 0)} if found else set())


def test_a_template_is_no_question():
    template = "Please solve the following problem with care and give only the final number as answer: {} apples"
    questions = [template.format(number) for number in range(40)]
    assert len(words(questions[0])) > RUN
    against = Against({"b": questions})
    assert against.find(chat(template.format(99))) == set()
    assert against.find(chat(template.format(7))) == {("b", 7)}
    varied = [
        f"{number} a{number} b{number} c{number} d{number} e{number} f{number} " + template for number in range(40)
    ]
    assert Against({"b": varied}).find(chat(varied[7])) == {("b", 7)}
    assert Against({"b": varied}).find(chat(varied[7].replace("f7", "zz"))) == set()


def test_system_turns_and_tools_do_not_count():
    against = Against({"b": [LONG]})
    assert against.find([{"role": "system", "content": LONG}, {"role": "tool", "content": LONG}]) == set()


def test_account_and_summary():
    against = Against({"a": [LONG, NINE], "b": ["What is 3 + 4?"]}, {"mmlu_pro": "on a hub"})
    found = [(row, against.find(messages)) for row, messages in (("r1", chat(LONG)), ("r2", chat(LONG, NINE)))]
    account = against.account(found)
    assert account["against"] == {
        "a": {"checked": 2, "hits": 2, "rows": 2, "ids": ["r1", "r2"]},
        "b": {"checked": 1, "hits": 0, "rows": 0, "ids": []},
    }
    assert summary(account) == [
        "leakage: 2 of 2 questions of a are in 2 training rows (kept): r1, r2",
        "leakage: no question found of b (1)",
        "leakage: mmlu_pro not checked: on a hub",
    ]


ROWS = [
    {"id": "clean", "prompt": "Q", "response": "A"},
    {"id": "leaked", "prompt": LONG, "response": "A"},
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_warn_keeps_and_counts(source, make_tokenizer, tmp_path):
    against = Against({"b": [LONG]})
    prepared = prepare(DataSpec(source), make_tokenizer(), tmp_path / "t.parquet", against)
    assert [example.id for example in prepared.examples] == ["clean", "leaked"]
    manifest = json.loads(manifest_path(prepared.path).read_text())
    assert manifest["leakage"]["against"]["b"] == {"checked": 1, "hits": 1, "rows": 1, "ids": ["leaked"]}
    again = prepare(DataSpec(source), make_tokenizer(), prepared.path, Against({"b": [NINE]}))
    assert again.manifest["leakage"]["against"]["b"]["hits"] == 0
    assert json.loads(manifest_path(prepared.path).read_text()) == again.manifest
    assert load_prepared(prepared.path).key == prepared.key


def test_error_names_rows_and_question(source, make_tokenizer, tmp_path):
    strict = Against({"b": [LONG]}, policy="error")
    with pytest.raises(
        DataError, match=r"(?s)1 rows are refused; remove these rows.*row 2: it contains question 1 of b"
    ):
        prepare(DataSpec(source), make_tokenizer(), tmp_path / "t.parquet", strict)
    prepare(DataSpec(source), make_tokenizer(), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"1 rows contain.* Row leaked: it contains question 1 of b .*--leakage drop"):
        prepare(DataSpec(source), make_tokenizer(), tmp_path / "t.parquet", strict)
    assert check_leakage(load_prepared(tmp_path / "t.parquet"), None).manifest.get("leakage") is None


def test_drop_rejects_the_row_and_is_another_data_set(source, make_tokenizer, tmp_path):
    out, against = tmp_path / "t.parquet", Against({"b": [LONG]}, policy="drop")
    prepared = prepare(DataSpec(source), make_tokenizer(), out, against)
    assert [example.id for example in prepared.examples] == ["clean"]
    assert prepared.manifest["counts"]["rejected"] == {"leakage": 1}
    assert prepared.manifest["rejected"][0]["row"] == 2
    assert prepared.manifest["leakage"]["against"]["b"]["ids"] == ["leaked"]
    assert prepare(DataSpec(source), make_tokenizer(), out, against).manifest == prepared.manifest
    for other in (None, Against({"b": [LONG]}), Against({"b": [NINE]}, policy="drop")):
        with pytest.raises(DataError, match="prepared with another leakage_dropped"):
            prepare(DataSpec(source), make_tokenizer(), out, other)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"question": "Q", "answer": "A"}, "Q"),
        ({"text": "T", "label": "true"}, "T"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2"),
        ({"question": "Q", "choices": ["a", "b"], "answer": 1}, "Q"),
        ({"messages": [*chat("Q0"), *chat("Q1")]}, "Q1"),
        ({"other": 1}, ""),
    ],
)
def test_question_of_any_row(row: dict, question: str):
    assert question_of(row) == question


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match="has no questions"):
        file_questions(str(tmp_path / "a.jsonl"), "warn")


def test_the_quickstart_is_clean_and_its_own_test_set_is_not():
    from eaft_verl.recipe.resolve import load_recipe, resolve

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    against = recipe_questions(resolve(recipe, "sft"))
    assert against.policy == "warn" and not against.not_checked
    assert set(against.questions) == {"two_shot_sums", "products", "gcd", "lcm", "letter_counting", "heldout"}
    assert not any(against.find(row["messages"]) for row in generate("two_shot_sums_train"))
    for name in ("two_shot_sums", "products", "gcd", "lcm", "letter_counting"):
        for number, question in enumerate(against.questions[name]):
            assert (name, number) in against.find(chat(question)), question
            assert {hit for hit in against.find(chat(question)) if hit[0] == name} == {(name, number)}, question


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs GSM8K")
def test_gsm8k_train_does_not_contain_its_test_set():
    from eaft_verl.data.sources import read_rows

    against = file_questions(str(SHARED / "gsm8k" / "test_dev.jsonl"), "warn")
    rows = read_rows(str(SHARED / "gsm8k" / "train.jsonl"))[:2000]
    assert not any(against.find(chat(row["question"], row["answer"])) for row in rows)
    for number, question in enumerate(against.questions[next(iter(against.questions))]):
        assert number in {place for _, place in against.find(chat(f"Solve this. {question} Think."))}


RECIPE = """
model: {model}
output: {folder}/out
device: cpu
data: {{train: {folder}/rows.jsonl, heldout: {folder}/heldout.jsonl, max_length: 200}}
evaluate: {{target: [{{task: gsm8k, data: {folder}/test.jsonl}}], general: [mmlu_pro]}}
arms: {{sft: {{objective: {{name: sft}}}}}}
"""


@pytest.fixture
def recipe(source, tmp_path: Path, tiny_model_path: Path) -> Path:
    """One training row holds the benchmark's question, none the held-out one's."""
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": NINE, "response": "A"}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": LONG, "answer": "7"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_path, folder=tmp_path))
    return path


def test_the_recipes_own_benchmarks_and_heldout_rows_are_looked_for(recipe: Path, capsys):
    import tiny

    from eaft_verl.recipe.datasets import prepare_data
    from eaft_verl.recipe.resolve import load_recipe, resolve

    def ids(*overrides: str) -> list[str]:
        config = resolve(load_recipe(recipe), "sft", [f"output={recipe.parent / str(len(overrides))}", *overrides])
        return [example.id for example in prepare_data(config, tiny.tiny_tokenizer(), "train").examples]

    assert ids() == ["clean", "leaked"]
    printed = capsys.readouterr().err
    assert "leakage: 1 of 1 questions of gsm8k are in 1 training rows (kept): leaked" in printed
    assert "no question found of heldout (1)" in printed and "mmlu_pro not checked" in printed
    assert ids("data.leakage=drop") == ["clean"]
    with pytest.raises(DataError, match="it contains question 1 of gsm8k"):
        ids("data.leakage=error", "seed=0")


def test_the_command_line(recipe: Path, source, tmp_path: Path, tiny_model_path: Path, capsys):
    from eaft_verl.cli import main

    model = ["--model", str(tiny_model_path)]
    assert main(["prepare", source, str(tmp_path / "a.parquet"), *model, "--against", str(recipe)]) == 0
    assert "1 of 1 questions of gsm8k are in 1 training rows (kept): leaked" in capsys.readouterr().out
    heldout = str(tmp_path / "heldout.jsonl")
    assert main(["prepare", str(tmp_path / "a.parquet"), *model, "--against", heldout]) == 0
    assert f"no question found of {heldout} (1)" in capsys.readouterr().out
    drop = ["--leakage", "drop"]
    assert main(["prepare", source, str(tmp_path / "b.parquet"), *model, "--against", str(recipe), *drop]) == 0
    assert "(left out): leaked" in capsys.readouterr().out
    assert main(["prepare", source, str(tmp_path / "c.parquet"), *model, *drop]) == 2
    assert "--leakage drop needs --against" in capsys.readouterr().err
    assert main(["prepare", source, str(tmp_path / "c.parquet"), *model, "--leakage", "x"]) == 2
    assert "choose one of warn, error, drop" in capsys.readouterr().err


def test_words_of_ascii_are_those_of_any_text():
    every = "".join(map(chr, range(128))) + " a_b 1.5e-3 x=y^2 (Don't) "
    assert words(every) == words(f"{every}é")[:-1]
    assert words("Don't x_1-2") == ["don", "t", "x_1", "-", "2"]
