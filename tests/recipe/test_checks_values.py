"""Values of one key that cannot be meant, and names that cannot be used."""

import re
from pathlib import Path

import pytest
from config_fixtures import composed_once  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from eaft_verl.errors import ConfigError
from eaft_verl.recipe.checks import check
from eaft_verl.recipe.file import MAX_VALUES, check_size
from eaft_verl.recipe.resolve import check_name, load_recipe, resolve

RECIPE = "{model: org/m, data: {train: org/d, heldout: org/e}, device: cpu, arms: {sft: {objective: {name: sft}}}}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("verl.optim.lr=.inf", "verl.optim.lr=inf must be a finite number"),
        ("verl.optim.num_cycles=.nan", "verl.optim.num_cycles=nan must be a finite number"),
        ("data.chat_template_kwargs={a: [1.0, -.inf]}", r"data.chat_template_kwargs.a\[1\]=-inf must be"),
        ("verl.optim.weight_decay=-5", "weight_decay=-5.0 must be 0 or more"),
        ("verl.optim.betas=[2,3]", r"betas=\[2, 3\] must be two numbers"),
        ("verl.optim.betas=[0.9]", r"betas=\[0.9\] must be two numbers"),
        ("verl.optim.betas=[0.9,yes]", "must be two numbers"),
        ("verl.optim.betas=[0.9,1]", "must be two numbers"),
        ("verl.optim.optimizer=Nope", "optimizer='Nope' is not one of AdamW"),
        ("verl.optim.optimizer_impl=os", "optimizer_impl='os' is not one of torch.optim"),
        ("verl.optim.optimizer_impl=bitsandbytes.optim", "'bitsandbytes.optim' is not installed"),
        ("verl.optim.lr_warmup_steps_ratio=1.5", "must be from 0 to 1"),
        ("evaluate.backend_args={trust_remote_code: true}", "evaluate.backend_args.trust_remote_code: code that comes"),
    ],
)
def test_a_value_that_cannot_be_meant(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=said):
        check(resolve(load_recipe(tmp_path / "r.yaml"), "sft", [override]), dry_run=True)


@given(st.text(max_size=140))
def test_a_name_is_one_word_that_no_path_can_be_made_of(name: str) -> None:
    good = (
        0 < len(name) <= 128 and name[0] not in "._-" and all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    )
    try:
        check_name(name)
    except ConfigError:
        assert not good
    else:
        assert good and Path("/root", name).resolve().parent == Path("/root") and len(name.splitlines()) == 1


@pytest.mark.parametrize("name", ["eaft\n", "a\r", "..", ".", "", "a/b", "-x", "é", "a\u2028", "x" * 129, 5, None])
def test_names_that_leave_a_folder_or_break_a_line(name: object) -> None:
    with pytest.raises(ConfigError, match="must be letters, digits"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a {b: *a}", "aliases stand for"),
        ("a: &a {<<: *a}", "aliases stand for"),
        ("[" * 51 + "]" * 51, "nested deeper"),
        ("x" * (MAX_VALUES + 1), "characters; at most"),
    ],
)
def test_yaml_that_is_no_recipe(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        check_size(text)


def test_aliases_of_a_recipe_are_fine() -> None:
    check_size("a: &a {b: 1}\nc: [*a, *a]\nd: {<<: *a}\n")
