"""The page and its Markdown twin: same numbers, escaped, self-contained, no console errors."""

import html
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reporting.fake_runs import HOSTILE, edit, edit_samples, make_arm, make_base, make_runs

from eaft_verl.pages.numbers import number, percent
from eaft_verl.reporting import page as pages
from eaft_verl.reporting.collect import load
from eaft_verl.reporting.comparability import check
from eaft_verl.reporting.markdown import Cell, Table, safe, table, verbatim
from eaft_verl.reporting.report import measure, report
from eaft_verl.reporting.wording import score, span

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    found = report(make_runs(folder), folder / "report")
    return found, folder / "report"


def measured(runs, out):
    """report.json's data without drawing the figures."""
    base, arms = load(runs)
    return measure(base, arms, out, problems=check(base, arms), seed=0)


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_number_of_the_table_is_in_page_and_markdown(made):
    found, out = made
    texts = (html.unescape(page(out)), (out / "report.md").read_text(encoding="utf-8"))
    columns = {column["id"]: column for column in found["columns"]}
    for arm in found["arms"]:
        for name, cell in found["results"][arm].items():
            shown = [score(columns[name], cell["score"]), span(columns[name], cell["delta"])]
            assert all(number in text for number in shown for text in texts), (arm, name, shown)
    assert all("+21.2 points [" in text and "KL 0.115" in text for text in texts)


def test_the_page_asks_nobody_for_anything(made):
    text = page(made[1])
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:|//)""", text)
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 9


def test_a_hostile_answer_is_text(made):
    found, out = made
    assert any(
        answer["text"] == HOSTILE
        for item in found["samples"]
        for example in item["examples"]
        for answer in example["answers"].values()
    )
    assert "&lt;script&gt;alert(" in page(out)
    assert "<script>" not in (out / "report.md").read_text()


CORPUS = (
    "![x](https://evil.example/p.png) and [y](https://evil.example) [y][z] ![z]",
    "[z]: https://evil.example 'title'\n\n[z]",
    "<img src=x onerror=alert(1)> <https://evil.example> &lt;b&gt; &#x3c;script&#x3e;",
    "https://evil.example www.evil.example mailto:a@evil.example",
    "a | b\n--- | ---\n| 1 | 2 |\n:-\n\\| ##",
    "# h\n## h ##\n===\n---\n- l\n+ l\n* l\n1. l\n2) l\n> q\n- [x] box\n[ ] box\n~~~\n```js\ncode\n```",
    "**b** __b__ *i* _i_ ~~s~~ `c` $x$ $$y$$ [^1] a_b_c \\* \\",
    "def f(x):\n    if x:\n        return  'two  spaces'\n\n\treturn None",
    "\x1b[31mred\x1b]8;;https://evil.example\x07 \x00\x08\x7f\x9b bidi\u202e\u2066 \ud800 end\r\nnext\rlast",
    "</td></tr></table><script>alert(1)</script> \u00a0\u25b2 \u00b7\u00a0lines",
)


def plain_text(text):
    """What a reader should see of it: its words."""
    unseen = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - set(
        b"\t\n\r\x1c\x1d\x1e\x1f"
    )
    kept = "".join(char for char in text if ord(char) not in unseen - {0x85})
    return kept.encode("utf-8", "replace").decode().split()


def shown(markdown):
    """(words that a viewer shows, types of the inline pieces), with HTML, tables and ~~ switched on."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    pieces = [piece for token in tokens for piece in token.children or ()]
    texts = [[piece.content if piece.type == "text" else "\n" for piece in token.children or ()] for token in tokens]
    return "\n".join(map("".join, texts)).split(), {piece.type for piece in pieces}, {token.type for token in tokens}


def assert_inert(text):
    words = plain_text(text)
    for before in ("", "- ", "> ", "## "):
        found, inline, blocks = shown(f"{before}{safe(text)}")
        assert found == words and inline <= {"text"}, (before, text)
        assert len(blocks) <= {"": 3, "- ": 7, "> ": 5, "## ": 3}[before], (before, text, blocks)
    found, inline, blocks = shown(verbatim(text) if words else "")
    assert found == words and inline <= {"text", "hardbreak"}, text
    assert blocks <= {"paragraph_open", "inline", "paragraph_close"}, (text, blocks)
    grid = shown(table(Table([Cell("h")] * 2, [[Cell(text, (text,)), Cell("last")]])))[0]
    expected = ["h", "h", *(word for word in words * 2 if word != "\u00b7"), "last"]
    assert [word for word in grid if word != "\u00b7"] == expected, text


@pytest.mark.parametrize("text", CORPUS)
def test_no_markup_of_a_text_survives(text):
    assert_inert(text)


@settings(max_examples=400)
@given(st.text(alphabet="![](){}<>&;#*_~`|\\$:/-+=.1^ax w\n\t\"'\u00a0\u00b7\u25b2", max_size=24))
def test_no_markup_of_any_text_survives(text):
    assert_inert(text)


def test_addresses_are_broken_where_a_viewer_would_link_them():
    # GitHub's autolinks start at a literal '://' or 'www.' of the source, or are mail; others link bare names too
    assert safe("see https://a.example or www.a.example") == "see https\\:/\\/a\\.example or www\\.a\\.example"
    assert safe("a@b.example costs 3.14 //x") == "a\\@b\\.example costs 3.14 /\\/x"


@pytest.mark.parametrize("text", [*CORPUS, "a@evil.com evil.com/x //evil.com ftp://evil.com b\u00fc.de 1.2.3.4"])
def test_a_viewer_that_links_whatever_looks_like_an_address_finds_none(text):
    pytest.importorskip("linkify_it")
    viewer = MarkdownIt("commonmark", {"html": True, "linkify": True}).enable(["table", "strikethrough", "linkify"])
    for written in (safe(text), verbatim(text), table(Table([Cell("h")] * 2, [[Cell(text, (text,)), Cell(text)]]))):
        assert not re.search(r"<(a|img|script|del|input)\b", viewer.render(written)), written


def test_hostile_answers_are_text_in_both_files(tmp_path):
    runs = make_runs(tmp_path)
    for run, step in ((runs[0], 0), (runs[1], 12), (runs[2], 12)):
        path = run / "samples" / f"step_{step:06d}" / "chain_sum.jsonl"
        texts = [text.replace("\ud800", "") for text in CORPUS]
        hostile = [{"response": text, "prompt": text, "target": text} for text in texts]
        edit_samples(path, lambda rows, new=hostile: [{**row, **new[i % len(new)]} for i, row in enumerate(rows)])
    edit(runs[2] / "run.json", lambda info: {**info, "recipe": CORPUS[0], "model": CORPUS[2]})
    edit(runs[1] / "run.json", lambda info: {**info, "recipe": CORPUS[0], "model": CORPUS[2]})
    rows = [{"arm": "dft", "seed": 0, "run": "dft", "error": text} for text in CORPUS]
    base, arms = load(runs)
    found = measure(base, arms, tmp_path / "report", problems=list(CORPUS), seed=0, failed=rows)
    text = pages.text(found, set())
    _, inline, _ = shown(text)
    assert inline <= {"text", "hardbreak", "softbreak", "strong_open", "strong_close"}
    made = pages.html(text, found["arms"], {})
    allowed = "head body header main footer nav section h1 h2 h3 p a ul li i strong small span br div details summary "
    allowed += "table thead tbody tr th td blockquote"
    assert set(re.findall(r"<(\w+)", made.split("</style>")[1])) <= set(allowed.split())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text + made)
    assert set(re.findall(r'href="([^"]*)"', made)) <= {"data:,", *re.findall(r'href="(#[a-z-]+)"', made)}
    first = found["samples"][0]["examples"][0]["answers"]["sft"]["text"]
    assert plain_text(first)[-1] in html_text(made)


def html_text(page):
    return html.unescape(re.sub("<[^>]*>", " ", page))


def test_zero_has_digits_and_the_unknown_a_dash():
    assert [number(value, 1) for value in (0.0, -0.0, 0, None, float("nan"), float("inf"))] == ["0.0"] * 3 + [
        "\u2013"
    ] * 3
    assert (percent(0.0), percent(None)) == ("0 %", "\u2013")


def test_sections_are_in_order(made):
    titles = re.findall(r"<h2><span>\d+</span>([^<]+)</h2>", page(made[1]))
    assert [title.split(":")[0] for title in titles] == [
        *("Headline", "Results", "Arm against arm", "Paths", "Pareto", "Training curves"),
        *("What differs between the arms", "Cost", "Sample answers", "Caveats, glossary, environment"),
    ]
    assert "one seed: intervals cover examples only" in made[0]["caveats"][0]


def test_words_follow_the_intervals(made):
    sft, eaft = (
        {item["arm"]: " ".join(item["sentences"]) for item in made[0]["headline"]}[arm] for arm in ("sft", "eaft")
    )
    assert "held-out NLL is better: \u22120.550 nats per token" in sft
    assert "Target mean is not clearly changed: +21.2 points [+5.0, +36.3]" in sft  # p = .012, one of 16 in its table
    assert "General mean is not clearly changed: \u22128.7 points" in sft
    assert "Against SFT at the end: target mean +1.2 points [0.0, +3.8], no clear difference" in eaft
    assert "], too few seeds for a claim; general mean" in eaft
    assert "+0.020 at 100 % (too few seeds for a claim)" in eaft


def test_a_worse_arm_is_called_worse(tmp_path, dots):
    for name in ("base", "sft"):
        (make_base if name == "base" else lambda path: make_arm(path, "sft"))(tmp_path / name)
    for step, right in (("000000", 1.0), ("000012", 0.0)):
        run = tmp_path / ("base" if step == "000000" else "sft")
        for name in ("chain_sum", "gsm8k"):
            change = {"score": right, "stderr": 0.0, "higher_is_better": True}
            edit(
                run / "eval" / f"step_{step}" / f"{name}.json", lambda r, c=change: {**r, "metrics": {"exact_match": c}}
            )
            samples = run / "samples" / f"step_{step}" / f"{name}.jsonl"
            edit_samples(samples, lambda rows, s=right: [{**row, "scores": {"exact_match": s}} for row in rows])
    found = report([tmp_path / "base", tmp_path / "sft"], tmp_path / "report")
    assert "Target mean is worse: \u2212100.0 points [\u2212100.0, \u2212100.0]" in found["headline"][0]["sentences"][0]
    assert found["equal_gain"]["target_mean"]["levels"] == []
    text = page(tmp_path / "report")
    assert "too few arms are better than the base" in text
    assert "There is one arm only" in text


def test_force_shows_every_problem_in_a_banner(tmp_path, dots):
    runs = make_runs(tmp_path)
    edit(runs[2] / "run.json", lambda info: {**info, "keys": {**info["keys"], "data": "<zzz>"}})
    edit_samples(runs[2] / "samples" / "step_000012" / "mmlu.jsonl", lambda rows: rows[:-4])
    found = report(runs, tmp_path / "report", force=True)
    text = page(tmp_path / "report")
    assert 'class="banner" role="alert"' in text
    assert len(found["problems"]) == 2
    assert all(html.escape(line, quote=False) in text.replace("&#39;", "'") for line in found["problems"])
    assert "Forced: these runs are not comparable" in (tmp_path / "report" / "report.md").read_text()
    assert "mmlu: only the 36 examples shared by all runs are used" in found["caveats"]
    assert found["results"]["sft"]["mmlu"]["delta"]["low"] is not None


def without(runs, *names):
    for run in runs:
        for name in names:
            for path in run.glob(f"*/step_*/{name}.json*"):
                path.unlink()


def test_missing_sides_are_left_out_with_a_line(tmp_path, dots):
    runs = make_runs(tmp_path)
    out = tmp_path / "report"
    report(runs, out)
    without(runs, "drift", "ifeval", "mmlu")
    found = report(runs, out)
    text = page(out)
    assert "No general benchmarks were evaluated" in text
    assert "No drift evaluation" in text
    assert "The Pareto plot needs target and general benchmarks" in text
    assert found["paths"] == {}
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {"deltas", "curves_step", "curves_tokens", "curves_seconds"}  # those of the first report are gone
    without(runs, "chain_sum", "gsm8k", "heldout")
    assert report(runs, out)["columns"] == []


def test_an_arm_that_never_started_can_be_forced(tmp_path, dots):
    runs = make_runs(tmp_path)
    shutil.rmtree(runs[2] / "eval")
    (runs[2] / "metrics.jsonl").unlink()
    edit(runs[2] / "run.json", lambda info: {**{k: info[k] for k in info if k != "total_steps"}, "status": "created"})
    found = report(runs, tmp_path / "report", force=True)
    assert found["results"]["eaft"] == {}
    assert "status: eaft seed 0" in found["problems"][0]
    assert "Target learning was not measured." in page(tmp_path / "report")


def test_a_diverged_arm_is_reported_not_hidden(tmp_path):
    runs = make_runs(tmp_path)
    for path in (runs[2] / "eval").glob("step_000012/heldout.json"):
        edit(path, lambda record: {**record, "metrics": {"nll": {**record["metrics"]["nll"], "score": "nan"}}})
    found = measured(runs, tmp_path / "report")
    assert "heldout" not in found["results"]["eaft"]
    assert "eaft seed 0, step 12: heldout is nan, so it is left out" in found["caveats"]
    assert [point["step"] for point in found["paths"]["heldout"]["eaft"]] == [0, 3, 6, 9]


def test_a_score_that_is_no_mean_of_samples_gets_no_interval(tmp_path):
    runs = make_runs(tmp_path)
    change = {"exact_match": {"score": 0.9, "stderr": None, "higher_is_better": True}}
    edit(runs[1] / "eval" / "step_000012" / "gsm8k.json", lambda record: {**record, "metrics": change})
    found = measured(runs, tmp_path / "report")
    cell = found["results"]["sft"]["gsm8k"]
    assert (cell["score"], cell["delta"]["low"]) == (0.9, None)
    assert found["results"]["sft"]["target_mean"]["delta"]["low"] is None
    assert found["results"]["sft"]["chain_sum"]["delta"]["low"] is not None
    assert any("gsm8k: the recorded exact_match is not the mean of its samples" in line for line in found["caveats"])


def test_what_was_cut_off_is_said(tmp_path):
    runs = make_runs(tmp_path)
    for run, step, prompts, answers in ((0, 0, 0, 0), (1, 12, 0, 9), (1, 6, 0, 8), (2, 12, 1, 7)):
        cut = {"prompts": prompts, "answers": answers}
        edit(
            runs[run] / "eval" / f"step_{step:06d}" / "gsm8k.json", lambda record, cut=cut: record | {"truncated": cut}
        )
    lines = [line for line in measured(runs, tmp_path / "report")["caveats"] if "cut off" in line]
    assert lines == [
        "gsm8k: answers cut off: sft seed 0 9 of 40 (22%), eaft seed 0 7 of 40 (18%)",
        "gsm8k: prompts cut off: eaft seed 0 1 of 40 (2%)",
    ]


def test_measures_that_are_known_at_some_steps_only_are_drawn_where_they_are(tmp_path):
    runs = make_runs(tmp_path)
    for run in runs[1:]:
        for step in (3, 6):
            for name in ("chain_sum", "gsm8k", "ifeval", "mmlu"):
                (run / "eval" / f"step_{step:06d}" / f"{name}.json").unlink()
    found = measured(runs, tmp_path / "report")
    assert [point["step"] for point in found["paths"]["heldout"]["eaft"]] == [0, 3, 6, 9, 12]
    assert [point["step"] for point in found["paths"]["target_mean"]["eaft"]] == [0, 9, 12]
    assert found["equal_gain"]["target_mean"]["levels"] and found["equal_gain"]["heldout"]["levels"]


def test_seeds_are_averaged_and_widen_the_interval(tmp_path):
    runs = [make_base(tmp_path / "base")]
    runs += [make_arm(tmp_path / f"{arm}{seed}", arm, 10 * seed) for arm in ("sft", "eaft") for seed in (0, 1)]
    found = measured(runs, tmp_path / "report")
    cell = found["results"]["sft"]["drift.kl"]
    assert cell["seeds"] == {"0": 0.21, "10": pytest.approx(0.42)}  # the fake seed s has kl (1 + s / 10)
    assert cell["score"] == pytest.approx(0.315)
    assert cell["low"] < 0.25
    assert cell["high"] > 0.38
    assert found["caveats"][0].startswith("scores are means over 2 seeds")
    kl = found["versus"]["arms"]["eaft"]["drift.kl"]  # paired by seed: -0.06 with seed 0, -0.12 with seed 10
    assert kl["delta"] == pytest.approx(-0.09)
    # two seeds leave one degree of freedom: -0.09 -+ 12.7 * 0.06 / sqrt(2) / sqrt(2), no longer clear of zero
    assert (kl["low"], kl["high"]) == pytest.approx((-0.09 - 12.706 * 0.03, -0.09 + 12.706 * 0.03), abs=0.01)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_page_opens_without_console_errors(made, tmp_path):
    quiet = "--no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-component-update"
    command = [CHROMIUM, "--headless", *quiet.split(), "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", (made[1] / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<h2>") == 10
    assert "<script>" not in done.stdout


def test_sources_table_counts_rows_and_trained_tokens() -> None:
    from eaft_verl.reporting.tables import sources_table

    def source(kept: int, left: int, trained: int) -> dict[str, object]:
        counts = {"kept": kept, "left_out": left, "rejected": {"duplicate": 2}, "examples": kept}
        return {**counts, "tokens": {"total": 9 * trained, "trained": trained}}

    table = sources_table({"sources": {"own": source(1200, 0, 3000), "replay": source(40, 7, 1000)}})
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows[0][:6] == ["own", "1,200", "0", "2", "1,200", "3,000"] and rows[0][6].startswith("75")
    assert rows[1][:6] == ["replay", "40", "7", "2", "40", "1,000"] and rows[1][6].startswith("25")


def test_a_run_that_was_gone_on_with_otherwise_says_so(tmp_path, dots):
    runs = make_runs(tmp_path)
    changes = [{"attempt": 2, "settings": ["verl.optim.lr=0.001 (now 0.0001)"]}]
    lost = ["metrics.jsonl lacks 2 of the steps up to 8 (from step 3); they are lost"]
    edit(runs[-1] / "run.json", lambda info: info | {"changes": changes, "lost_metrics": lost})
    told = report(runs, tmp_path / "report")["caveats"]
    line = f"eaft seed 0 was interrupted and gone on with: {changes[0]['settings'][0]} from attempt 2 on; {lost[0]}"
    assert line in told
