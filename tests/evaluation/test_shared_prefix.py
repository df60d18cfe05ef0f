"""What rows begin with is computed once, and every row scores and writes as it does alone, for whatever model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eaft_verl.attention.grouped import use_grouped
from eaft_verl.data.parquet import Example
from eaft_verl.evaluation import shared_prefix
from eaft_verl.evaluation.shared_prefix import SMALLEST, by_tree, common_beginning, prompts
from eaft_verl.evaluation.teacher_forced import answer_logits

SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}
SIZES |= {"max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
# how the model is made, and whether its beginning is shared
KINDS = {
    "llama": (GROUPED, True),
    "qwen3": (GROUPED | {"head_dim": 8}, True),
    "gpt2": ({**SIZES, "n_positions": 256}, True),
    "mistral": (GROUPED | {"sliding_window": 8}, False),
    "qwen2": (GROUPED | WINDOW, False),
    "mpt": ({"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, False),
    "mamba": ({"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),
}
START = [5 + number % 11 for number in range(SMALLEST + 9)]
ROWS = [START + rest for rest in ([31], [41, 42, 43, 44, 45, 46], [51, 52, 53], [41, 42])]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **KINDS[request.param][0])
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), KINDS[request.param][1]


@pytest.fixture
def lengths(kind):
    """Tokens of every forward pass."""
    model, seen = kind[0], list[int]()
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_answers_are_those_of_every_prompt_alone(kind, lengths):
    model, shared = kind
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    given = prompts(model, ids, mask)
    assert ("past_key_values" in given) is shared
    found = model.generate(**given, **how)[:, width:].tolist()
    sizes = list(lengths)
    for row, answer in zip(ROWS, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **how)
        alone = alone[0, len(row) :].tolist()
        assert answer[: len(alone)] == alone
    assert len({tuple(answer) for answer in found}) > 1  # the answers depend on the prompts
    assert sizes[:2] == [len(START), len(ROWS) * (width - len(START))] if shared else sizes[0] == len(ROWS) * width


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_one_prompt_asked_several_times(kind, lengths):
    """All but its last token are shared, which has to be read by every row."""
    ids = torch.tensor([ROWS[1]] * 3)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    found = kind[0].generate(**prompts(kind[0], ids, torch.ones_like(ids)), **how).tolist()
    assert lengths[:2] == [len(ROWS[1]) - 1, 3]
    alone = kind[0].generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **how)[0].tolist()
    assert found == [alone] * 3 and alone[: len(ROWS[1])] == ROWS[1]


def test_scores_are_those_of_every_row_alone(kind, lengths):
    model, shared = kind
    examples = [
        Example(str(n), [], row, [0] * len(START) + [1] * (len(row) - len(START))) for n, row in enumerate(ROWS)
    ]
    found = dict(answer_logits(model, examples))
    first = len(START) - 1  # the logits of the last shared token are wanted
    assert lengths == (
        [first, len(ROWS) * (max(map(len, ROWS)) - first)] if shared else [len(ROWS) * max(map(len, ROWS))]
    )
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row])).logits[0, first:-1]
        torch.testing.assert_close(found[number], alone, rtol=0, atol=2e-5)


def test_a_beginning_is_shared_where_it_saves_something():
    assert common_beginning(ROWS, 99) == len(START)
    assert common_beginning(ROWS, SMALLEST) == SMALLEST
    assert common_beginning(ROWS, SMALLEST - 1) == 0
    assert common_beginning(ROWS[:1], 99) == 0
    assert common_beginning([[1, 2, 3], [2, 2, 3]], 99) == 0


# as a tree: whatever two rows begin with

TREES = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "phi3": GROUPED,
    "granite": GROUPED,
    "qwen3_moe": GROUPED | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}
MORE = [61 + number % 7 for number in range(SMALLEST + 3)]  # which two rows alone have in common
FOREST = [*ROWS, START + MORE + [70], START + MORE + [71, 72, 73], [9, 8, 7], [*START, 31]]


@pytest.fixture(params=TREES)
def model(request):
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **TREES[request.param])
    config.initializer_range = 0.2
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain = copy.deepcopy(made)
    assert use_grouped(made) and by_tree(made, 999) and not by_tree(plain, 999)
    return made, plain


@pytest.mark.parametrize("together", [4096, 80], ids=["one tree", "several trees"])
def test_answers_after_a_tree_are_those_of_every_prompt_alone(model, together, monkeypatch):
    monkeypatch.setattr(shared_prefix, "TREE_TOKENS", together)
    width = max(map(len, FOREST))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in FOREST])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in FOREST])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    sizes: list[int] = []
    model[0].register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = model[0].generate(**prompts(model[0], ids, mask), **how)[:, width:].tolist()
    for row, answer in zip(FOREST, found, strict=True):
        alone = model[1].generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **how)
        alone = alone[0, len(row) :].tolist()
        assert answer[: len(alone)] == alone
    assert len({tuple(answer) for answer in found}) > 3
    if together == 4096:  # all but the last token of each row: the start, what two have in common, the short ends
        assert sizes[0] == len(START) + len(MORE) + sum((0, 5, 2, 1, 0, 2, 2, 0)) and sizes[1] == len(FOREST)
    else:
        assert sizes[0] <= together and sizes[1] <= together and sizes[-1] == len(FOREST)


def test_scores_from_a_tree_are_those_of_every_row_alone(model):
    """Rows of other lengths, answers of several parts, a row twice."""
    masks = [[int(place % 5 > 1) for place in range(len(row))] for row in FOREST]
    examples = [Example(str(n), [], row, mask) for n, (row, mask) in enumerate(zip(FOREST, masks, strict=True))]
    for budget in (4096, 100, 1):
        found = dict(answer_logits(model[0], examples, budget))
        assert sorted(found) == list(range(len(FOREST)))
        for number, (row, mask) in enumerate(zip(FOREST, masks, strict=True)):
            with torch.no_grad():
                alone = model[1](input_ids=torch.tensor([row])).logits[0]
            wanted = [place - 1 for place, marked in enumerate(mask) if marked]
            torch.testing.assert_close(found[number], alone[wanted], rtol=0, atol=2e-5)


def test_rows_too_long_for_a_tree_and_other_attention_go_the_usual_way(model, monkeypatch):
    example = [Example("0", [], ROWS[1], [0] * 5 + [1] * (len(ROWS[1]) - 5))]
    expected = dict(answer_logits(model[0], example))[0]
    monkeypatch.setattr(shared_prefix, "TREE_TOKENS", len(ROWS[1]) - 1)
    assert not by_tree(model[0], len(ROWS[1]))
    torch.testing.assert_close(dict(answer_logits(model[0], example))[0], expected, rtol=0, atol=2e-5)
    monkeypatch.undo()
    model[0].set_attn_implementation("eager")
    assert not by_tree(model[0], 9)
