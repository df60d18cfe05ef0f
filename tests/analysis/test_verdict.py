"""What is said of stores made for each case, and that every number said is one that was found."""

import math
import re

import numpy as np
import pytest
import tiny
from analysis.made_stores import write_store

from eaft_verl.analysis.aggregate import analyse, difference
from eaft_verl.analysis.samples import Words
from eaft_verl.analysis.verdict import verdict

SAMPLES, LENGTH = 200, 40
TOKENIZER = tiny.tiny_tokenizer()
LETTERS = [i for i in range(3, len(TOKENIZER)) if not TOKENIZER.decode([i]).strip().isdigit()]


class Case:
    """SAMPLES x LENGTH tokens that the model expects; methods make some of them conflicts."""

    def __init__(self) -> None:
        size = SAMPLES * LENGTH
        self.sample = np.repeat(np.arange(SAMPLES), LENGTH)
        self.token = np.tile(np.resize(LETTERS, LENGTH), SAMPLES)
        self.prob, self.entropy, self.full = np.full(size, 0.9), np.full(size, 0.3), np.full(size, 0.35)
        self.role = ["assistant"] * size

    def conflict(self, rows, prob=0.01, token=None):
        self.prob[rows], self.entropy[rows], self.full[rows] = prob, 0.2, 0.22
        if token is not None:
            self.token[rows] = token
        return self

    def store(self, path, **meta):
        columns = {"token": self.token, "sample": self.sample, "role": self.role}
        columns |= {"logprob": np.log(self.prob), "entropy": self.entropy, "full_entropy": self.full}
        return write_store(
            path, vocab=len(TOKENIZER), sum_p2=self.prob**2 + 0.8 * (1 - self.prob) ** 2, **columns, **meta
        )


def rows_of(samples, place):
    return np.asarray(samples) * LENGTH + place


def judged(path, case, own=None):
    data = analyse(case.store(path / "data"), Words(TOKENIZER), ("sft", "eaft", "dft"), pictures=False)
    if own is None:
        return verdict(data.result), data.result
    beside = analyse(own.store(path / "own", origin="own"), Words(TOKENIZER), ("sft",), data.survey, pictures=False)
    apart = difference(data, beside)
    return verdict(data.result, beside.result, apart), data.result


def formats():
    """The first token, one label in the middle of every sample, and the end of turn."""
    case = Case().conflict(rows_of(range(SAMPLES), 0)).conflict(rows_of(range(SAMPLES), 20), token=LETTERS[3])
    case.conflict(rows_of(range(SAMPLES), LENGTH - 1), token=TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
    return case


def noise():
    """Ten samples of which the model expects nothing; it is sure of something else at every second token."""
    case = Case()
    bad = np.isin(case.sample, range(10))
    case.prob[bad], case.entropy[bad], case.full[bad] = 0.001, 1.5, 3.0
    case.token[bad] = np.random.default_rng(0).choice(LETTERS, bad.sum())
    return case.conflict(np.flatnonzero(bad)[::2], prob=0.002)


def facts(share=1.0):
    """One word per sample that contradicts the model, a different one each time."""
    chosen = np.arange(round(SAMPLES * share))
    return Case().conflict(rows_of(chosen, 3 + chosen % 30), token=np.resize(LETTERS, len(chosen)))


def test_format_is_warmed_up(tmp_path):
    found, data = judged(tmp_path, formats())
    assert (found["remedy"], found["kind"]) == ("warm-up", "format")
    kinds = data["breakdown"]["kinds"]
    assert kinds["template"]["tokens"] == 200
    assert kinds["habit"]["tokens"] == 400
    assert "100 % are format" in text(found, "kind")
    assert "33.3 % are its tokens" in text(found, "remedy")


def test_noise_is_cleaned(tmp_path):
    found, data = judged(tmp_path, noise())
    assert (found["remedy"], found["kind"]) == ("clean", "noise")
    parts = data["breakdown"]
    assert (parts["samples_implausible"], parts["tokens_implausible"], parts["conflicts_implausible"]) == (10, 400, 200)
    assert "falls from 2.5 % to 0 %" in text(found, "remedy")
    assert "the 10 implausible samples (5 % of the tokens)" in text(found, "remedy")


def test_facts_are_for_eaft_unless_they_are_the_lesson(tmp_path):
    found, data = judged(tmp_path, facts())
    assert (found["remedy"], found["kind"]) == ("eaft", "content")
    assert data["breakdown"]["samples_with_content"] == 200
    assert "100 % of the samples" in text(found, "counter-factual")
    assert "EAFT holds back what the data is there to teach" in text(found, "counter-factual")
    nll = -math.log(0.01)
    error = {p: math.sqrt(1 - 2 * p + p**2 + 0.8 * (1 - p) ** 2) for p in (0.01, 0.9)}
    weight = {0.01: 0.2, 0.9: 0.3}
    shares = [error[0.01] / (error[0.01] + 39 * error[0.9])]
    shares.append(weight[0.01] * error[0.01] / (weight[0.01] * error[0.01] + 39 * weight[0.9] * error[0.9]))
    assert f"{shares[0]:.1%} of the gradient".replace("%", " %") in text(found, "amount")
    assert f"{nll / (nll + 39 * -math.log(0.9)):.1%} of the loss".replace("%", " %") in text(found, "amount")
    expected = "{:.1%} of the gradient on conflicts become {:.1%}".format(*shares).replace("%", " %")
    assert expected in text(found, "remedy")


def test_facts_in_few_samples_are_no_lesson_by_themselves(tmp_path):
    case = facts(0.4)
    case.conflict(rows_of(np.arange(80), 35), token=np.resize(LETTERS[::-1], 80))
    found, _ = judged(tmp_path, case)
    assert found["remedy"] == "eaft"
    assert "40 % of the samples" in text(found, "counter-factual")
    assert "If these are the lesson" in text(found, "counter-factual")


def test_a_mixture_names_all_three(tmp_path):
    case = noise()
    sound = np.arange(20, 140)
    case.conflict(rows_of(sound, 4 + sound % 9), token=np.resize(LETTERS, len(sound)))
    case.conflict(rows_of(np.arange(60, 170), 0))
    found, _ = judged(tmp_path, case)
    assert (found["remedy"], found["kind"]) == ("mixed", "mixed")
    assert "Drop the 10 implausible samples first" in text(found, "remedy")


def test_few_conflicts_ask_for_nothing(tmp_path):
    found, _ = judged(tmp_path, facts(0.02))
    assert found["remedy"] == "none"
    assert "under 2 %" in text(found, "remedy")
    assert not any(one["about"] == "counter-factual" for one in found["sentences"])


def test_no_conflict_at_all(tmp_path):
    found, _ = judged(tmp_path, Case())
    assert found["remedy"] == "none"
    assert text(found, "amount").startswith("0 % of the 8,000 trained tokens")


def test_no_more_than_in_own_answers_asks_for_nothing(tmp_path):
    found, _ = judged(tmp_path, facts(), own=facts())
    assert found["remedy"] == "none"
    assert "it is 2.5 %: the data is 0 points above" in text(found, "baseline")


def test_more_than_in_own_answers(tmp_path):
    found, _ = judged(tmp_path, facts(), own=facts(0.2))
    assert found["remedy"] == "eaft"
    assert "(200, 8,000 tokens) it is 0.50 %: the data is 2 points above" in text(found, "baseline")


def test_a_single_answer_beside_the_data_shows_nothing(tmp_path):
    found, data = judged(tmp_path, facts())
    assert found["remedy"] == "eaft"
    found = verdict(data, data, {"share": 0.02, "low": None, "high": None})
    assert found["remedy"] == "none"
    assert "(a single sample has no interval)" in text(found, "remedy")


def test_content_in_most_own_answers_too_is_no_sign_of_a_lesson(tmp_path):
    found, _ = judged(tmp_path, facts(), own=facts(0.6))
    assert "(60 % of the answers beside them hold one). If these are the lesson" in text(found, "counter-factual")


def test_data_that_the_model_knows_nothing_of_is_read_first(tmp_path):
    """Random tokens, and a model that is sure of another token everywhere: nothing is left after cleaning."""
    for name, entropy, prob in (("random", 2.0, 1e-5), ("all conflict", 0.1, 0.001)):
        case = Case()
        case.prob[:], case.entropy[:], case.full[:] = prob, entropy, entropy
        case.token[:] = np.random.default_rng(0).choice(LETTERS, len(case.token))
        found, _ = judged(tmp_path / name, case)
        assert found["remedy"] == "read"
        assert "200 of 200 samples (100 % of the tokens) implausible as a whole" in text(found, "remedy")


def test_a_few_implausible_samples_are_named_though_conflicts_ask_for_nothing(tmp_path):
    case = Case()
    bad = np.isin(case.sample, range(10))
    case.prob[bad], case.entropy[bad], case.full[bad] = 0.001, 1.5, 3.0
    found, _ = judged(tmp_path, case)
    assert found["remedy"] == "none" and "10 samples implausible as a whole: read those" in text(found, "remedy")


def one_word(argmax):
    """Answers of one word and its end, each word once; the model is sure of `argmax`, one after the other."""
    rows = 2 * SAMPLES
    prob, token = np.tile([0.01, 0.95], SAMPLES), np.full(rows, TOKENIZER.convert_tokens_to_ids("<|im_end|>"))
    token[::2] = np.resize(LETTERS, SAMPLES)
    columns = {"sample": np.repeat(np.arange(SAMPLES), 2), "token": token, "logprob": np.log(prob)}
    columns |= {"entropy": np.full(rows, 0.1), "argmax": np.repeat(np.resize(argmax, SAMPLES), 2)}
    return columns | {"sum_p2": np.full(rows, 0.9)}


@pytest.mark.parametrize(("argmax", "kind"), [(LETTERS[::-1], "content"), ([5], "format")])
def test_answers_of_one_word_are_content_unless_the_model_expects_the_same_opening(tmp_path, argmax, kind):
    store = write_store(tmp_path, vocab=len(TOKENIZER), **one_word(argmax))
    data = analyse(store, Words(TOKENIZER), ("sft", "eaft"), pictures=False).result
    found = verdict(data)
    assert found["kind"] == kind
    assert data["breakdown"]["samples_with_content"] == (200 if kind == "content" else 0)
    if kind == "content":
        assert "100 % of the samples hold a conflict of content, 1.0 each" in text(found, "counter-factual")


def test_what_stands_beside_the_data_is_called_what_it_is(tmp_path):
    data = analyse(facts().store(tmp_path / "data"), Words(TOKENIZER), ("sft",), pictures=False)
    words = {}
    for origin, sampling in (("own", {"temperature": 0.0, "top_p": 1.0}), ("rollouts", {"run": "x"})):
        beside = analyse(
            Case().store(tmp_path / origin, origin=origin), Words(TOKENIZER), ("sft",), data.survey, pictures=False
        ).result
        beside["meta"]["sampling"] = sampling
        words[origin] = text(verdict(data.result, beside, {"share": 0.02, "low": 0.01, "high": 0.03}), "baseline")
    assert words["own"].startswith("In the model's own answers (200, 8,000 tokens)")
    assert "drawn at temperature 0.00 and top-p 1.00" in words["own"]
    assert words["rollouts"].startswith("In the rollouts (200, ") and "temperature" not in words["rollouts"]


@pytest.mark.parametrize("make", [formats, noise, facts, lambda: facts(0.3), lambda: facts(0.01), Case])
def test_no_number_is_said_that_was_not_found(tmp_path, make):
    """Every number of a sentence is one of its `numbers`, in percent, as a count, or with decimals."""
    found, _ = judged(tmp_path, make())
    for one in found["sentences"]:
        known = set()
        for value in one["numbers"].values():
            known |= {
                f"{value:,.0f}",
                f"{value:.1f}",
                f"{value:.2f}",
                f"{100 * value:.1f}",
                f"{100 * value:.2f}",
                f"{100 * value:.0f}",
                f"{100 * value:.1g}",  # of a share that two decimals would call zero
                f"{100 * value:.3f}",  # of one that two decimals would call all
            }
        said = re.findall(r"\d[\d,]*(?:\.\d+)?", one["text"].replace("95 % interval", ""))
        assert set(said) <= known, (one["text"], set(said) - known)


def text(found, about):
    (one,) = [one["text"] for one in found["sentences"] if one["about"] == about]
    return one


def test_the_template_s_tokens_in_noise_are_told_from_noise(tmp_path):
    """60 samples are noise from beginning to end; the last of their 40 tokens is the template's."""
    case = Case().conflict(np.arange(60 * LENGTH))
    case.token[rows_of(range(60), LENGTH - 1)] = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    found, _ = judged(tmp_path, case)
    said = "2.5 % on tokens of the chat template, 0 % on openings of a turn or labels that recur in many samples."
    assert said in text(found, "kind")
    assert "97.5 % are noise: all others in 60 of 200 samples that" in text(found, "kind")


def test_samples_without_a_spread_have_no_interval(tmp_path):
    """Every sample has one conflict in 40 tokens, the answers beside them have none."""
    found, _ = judged(tmp_path, Case().conflict(rows_of(range(SAMPLES), 20)), Case())
    assert "the data is 2.5 points above." in text(found, "baseline") and "interval" not in text(found, "amount")
