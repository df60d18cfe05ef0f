"""The page: its numbers, its files, text that stays text, and stores that do not belong together."""

import csv
import html as htmllib
import json
import re

import numpy as np
import pytest
import tiny
from analysis.made_stores import random_columns, write_store

from eaft_verl.analysis import clouds
from eaft_verl.analysis.page import count, write_page
from eaft_verl.data.parquet import Example
from eaft_verl.errors import DataError
from eaft_verl.pages.numbers import share

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny.tiny_tokenizer()
    found.add_tokens([HOSTILE, "=cmd()"])
    return found


def columns(vocab, seed, samples=12):
    found = random_columns(samples, 50, vocab=vocab, seed=seed)
    conflict = np.flatnonzero((found["entropy"] <= 0.5) & (found["logprob"] < np.log(0.2)))
    found["token"][conflict[::2]], found["token"][conflict[1::4]] = vocab - 2, vocab - 1
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    folder, vocab = tmp_path_factory.mktemp("page"), len(tokenizer)
    stores = [
        write_store(folder / "data", vocab=vocab, **columns(vocab, 1), source=[HOSTILE] * 600),
        write_store(folder / "own", vocab=vocab, origin="own", **columns(vocab, 2)),
    ]
    ids = [[5] * 10 + columns(vocab, 1)["token"][i * 50 : i * 50 + 50].tolist() for i in range(12)]
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": HOSTILE}]
    examples = [Example(f"id-{i} {HOSTILE}", said, row, [0] * 10 + [1] * 50) for i, row in enumerate(ids)]
    out = folder / "out"
    return write_page(out, stores, tokenizer, examples=examples, show=2), out


def page(out):
    return (out / "analysis.html").read_text(encoding="utf-8")


def test_numbers_of_the_page_are_those_of_the_file(made):
    found, out = made
    text = htmllib.unescape(page(out))
    assert (
        json.loads((out / "analysis.json").read_text())["data"]["boxes"][0]["share"]
        == found["data"]["boxes"][0]["share"]
    )
    for part in (found["data"], *found["beside"]):
        assert all(share(row["share"]) in text for row in part["boxes"])
        assert all(share(row["low"]) in text for row in part["boxes"] if row["low"] is not None)
        assert part["boxes"][0]["low"] is not None
    for row in found["data"]["gates"]["gates"]:
        assert share(row["gradient_share"]["conflict"]) in text
    for sentence in found["verdict"]["sentences"]:
        assert sentence["text"] in text
    assert count(found["data"]["landscape"]["tokens"]) == "600"


def test_every_figure_is_a_png_with_its_data(made):
    out = made[1]
    images = {path.stem for path in (out / "figures").glob("*.png")}
    assert images == {path.stem for path in (out / "figures").glob("*.json")}
    assert images == {
        *(f"{kind}_{name}" for kind in ("landscape", "landscape_log", "scatter") for name in ("data", "own")),
        *("places", "gates", "overlap", "gradients", "agreement", "words_branching", "words_settled", "words_conflict"),
    }
    assert all((out / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in images)
    assert page(out).count("data:image/png;base64,") == len(images) - 3  # words are text on the page


def test_the_page_asks_nobody_for_anything_and_text_stays_text(made):
    text = page(made[1])
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:|//)""", text)
    assert "<script" not in text
    assert "url(" not in text
    assert "org/<model>" not in text
    assert text.count(htmllib.escape(HOSTILE, quote=False).replace("'", "&#39;")) > 10


def test_words_in_csv(made):
    found, out = made
    rows = list(csv.DictReader((out / "figures" / "words_conflict.csv").open(encoding="utf-8")))
    assert [int(row["count"]) for row in rows] == [row["count"] for row in found["data"]["clouds"]["conflict"]]
    assert {row["text"] for row in rows} >= {HOSTILE, "'=cmd()"}  # a spreadsheet would run it


def test_words_of_one_regime_differ_in_colour_and_one_without_text_has_a_sign():
    highest = np.log(20)
    assert len({clouds.ink(entropy, highest) for entropy in (0.0, 0.4, 2.0, 2.9)}) == 4
    assert clouds.ink(5.0, highest) == clouds.ink(highest, highest)
    row = {"text": "", "count": 3, "mean_entropy": 0.1}
    assert clouds.boxed("") == "\u2205" and clouds.draw([row], highest).axes[0].texts[0].get_text() == "\u2205"


def test_words_against_a_loop(made, tokenizer):
    found, _ = made
    rows = columns(len(tokenizer), 1)
    inside = (rows["entropy"] <= 0.5) & (rows["logprob"] < np.log(0.2))
    for row in found["data"]["clouds"]["conflict"]:
        own = inside & (rows["token"] == row["token"])
        assert row["count"] == own.sum()
        assert row["mean_entropy"] == pytest.approx(rows["entropy"][own].mean(), rel=1e-5)
        assert row["mean_prob"] == pytest.approx(np.exp(rows["logprob"][own]).mean(), rel=1e-5)


def test_conflicts_by_source_role_and_place_add_up(made):
    parts = made[0]["data"]["breakdown"]
    conflicts = made[0]["data"]["landscape"]["regimes"]["conflict"]["tokens"]
    for name in ("by_source", "by_role", "by_place"):
        assert sum(row["conflicts"] for row in parts[name]) == conflicts
        assert sum(row["tokens"] for row in parts[name]) == 600
    assert [row["tokens"] for row in parts["by_place"]] == [12 * n for n in (1, 1, 2, 4, 8, 16, 18)]
    assert sum(row["tokens"] for row in parts["kinds"].values()) == conflicts
    assert sum(row["count"] for row in made[0]["data"]["pairs"]) <= conflicts


def test_a_store_alone_without_examples(tmp_path, tokenizer):
    store = write_store(tmp_path / "s", vocab=len(tokenizer), **random_columns(1, 30, vocab=len(tokenizer)))
    found = write_page(tmp_path / "out", [store], tokenizer, gates=("eaft:power=1,2",))
    assert found["beside"] == [] and found["difference"] is None
    assert "were not analysed" in page(tmp_path / "out")


def test_a_page_keeps_no_figure_of_an_earlier_one(tmp_path, tokenizer):
    vocab, out = len(tokenizer), tmp_path / "out"
    stores = [
        write_store(tmp_path / "data", vocab=vocab, **columns(vocab, 1)),
        write_store(tmp_path / "own", vocab=vocab, origin="own", **columns(vocab, 2)),
    ]
    write_page(out, stores, tokenizer)
    own, mine = out / "figures" / "landscape_own.png", out / "figures" / "landscape_mine.png"
    mine.write_bytes(own.read_bytes())
    write_page(out, stores[:1], tokenizer)
    left = {path.name for path in (out / "figures").iterdir()}
    fresh = tmp_path / "fresh"
    write_page(fresh, stores[:1], tokenizer)
    assert left == {path.name for path in (fresh / "figures").iterdir()} | {mine.name}


def test_many_sources_and_text_that_steers(tmp_path, tokenizer):
    found = random_columns(12, 50, vocab=len(tokenizer))
    source = [f"part-{i:03} \x1b[31m\u202e" for i in range(600)]
    store = write_store(tmp_path / "s", vocab=len(tokenizer), **found, source=source)
    made = write_page(tmp_path / "out", [store], tokenizer, gates=("sft", "eaft"))
    text = page(tmp_path / "out")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)
    assert text.count("part-") == 20 and "The 20 with the most conflicts of 600" in text
    assert len(made["data"]["breakdown"]["by_source"]) == 600


def test_a_token_alone(tmp_path, tokenizer):
    store = write_store(tmp_path / "s", vocab=len(tokenizer), token=[7], logprob=[-0.1], entropy=[0.2])
    write_page(tmp_path / "out", [store], tokenizer)
    assert "1 trained tokens" in page(tmp_path / "out")


def test_stores_of_two_models_and_another_tokenizer_are_refused(tmp_path, tokenizer):
    vocab = len(tokenizer)
    one = write_store(tmp_path / "one", vocab=vocab, **columns(vocab, 1))
    keys = {"model": "other", "data": "d", "template": "t"}
    two = write_store(tmp_path / "two", vocab=vocab, keys=keys, origin="own", **columns(vocab, 1))
    with pytest.raises(DataError, match="made with another model"):
        write_page(tmp_path / "out", [one, two], tokenizer)
    with pytest.raises(DataError, match="give the tokenizer of"):
        write_page(tmp_path / "out", [one], tiny.tiny_tokenizer())
    assert not (tmp_path / "out").exists()
