"""Columns that nothing uses: what they mean is told by their names, and the advice to leave one out works."""

import shlex

import pytest
import yaml

from eaft_verl.data.formats import to_messages
from eaft_verl.data.spec import DataSpec, RowError
from eaft_verl.experiment.prepare import columns_of

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_what_data_columns_says_of_the_prompt_leaves_no_training_and_no_reasoning_behind():
    for key, value in (("loss_weight", 0.1), ("reasoning", "Because of the sea.")):
        with pytest.raises(RowError, match=f"column '{key}'"):
            to_messages({"dialog": [Q, A], key: value}, {"messages": "dialog"})
    unused: dict[str, int] = {}
    row = {"dialog": [Q, A], "reasoning": "R r", "system": "S s"}
    messages, _ = to_messages(row, {"messages": "dialog", "reasoning": None, "system": None}, unused)
    assert messages == [Q, A] and unused == {"reasoning": 1, "system": 1}
    for role, value in (("system", "S s"), ("weight", 3)):
        assert to_messages({"messages": [Q, A], role: value}, {role: None}) == ([Q, A], {})


@pytest.mark.parametrize("name", ["", "a: b", "it's", "yes", "a,b", "a\\b", "#1", "x y", "Größe"])
def test_the_advice_to_leave_a_column_out_works_for_every_name(name):
    row = {"messages": [Q, A], name: "some words of it"}
    with pytest.raises(RowError) as caught:
        to_messages(row)
    setting, _, given = shlex.split(str(caught.value).partition("leave it out by ")[2].removesuffix(")"))
    for columns in (yaml.safe_load(setting.removeprefix("data.columns=")), columns_of([given])):
        assert columns == {"ignore": [name]}
        assert DataSpec("a.jsonl", columns=columns).columns == columns
        assert to_messages(row, columns)[0] == [Q, A]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [Q, {**A, "content": "1 + 1"}], "masked": "1"}, "'masked' .*may say how to train"),
        ({"messages": [Q, {**A, "text": "B"}]}, r"messages\[\] key 'text'"),
        ({"messages": [Q, A], "img": "a.png"}, "'img' .*text alone cannot show"),
    ],
)
def test_columns_that_mean_something_by_other_names(row, reason):
    with pytest.raises(RowError, match=reason):
        to_messages(row)
