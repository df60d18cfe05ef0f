"""What the numbers of an analysis say, in words. No sentence is written without the numbers it stands on.

The remedy follows from four questions, in this order: does the model know this kind of text at all? is there enough to
act on (FEW of SFT's gradient, and more than in the model's own answers)? what kind are most conflicts (MOST of them)?
and, for content, in how many samples?
"""

from typing import Any

from eaft_verl.analysis.clouds import boxed
from eaft_verl.pages.numbers import number, share
from eaft_verl.tokens.stats import CONFLICT_PROB, LOW_ENTROPY

FEW = 0.02  # of SFT's gradient on conflicts: below it no gate changes much
MOST = 0.5  # of the conflicts: what most of them are; of the tokens: what most of the data is
LESSON = 0.5  # of the samples with a conflict of content: then it may be what the data is there to teach
TEN = 10  # labels of `top10_labels_share`
HEADLINES = {
    "read": "Read the data before anything else.",
    "none": "Conflicts are no reason to act.",
    "warm-up": "Warm up on the format before anything else.",
    "clean": "Clean the data before anything else.",
    "eaft": "EAFT, unless the conflicts are the lesson.",
    "mixed": "EAFT, with a look at the samples.",
}
Row = dict[str, Any]


class _Number(float):
    """`{x:%}` a share, `{x:points}` a difference of shares, `{x:,}` a count, `{x:.2}` two decimals."""

    def __format__(self, how: str) -> str:
        if how == "points":
            return f"{share(self).removesuffix(' %')} points"
        return share(self) if how == "%" else number(self, 0 if how == "," else int(how[1:]))


def verdict(data: Row, own: Row | None = None, apart: Row | None = None) -> Row:
    """{remedy: a key of HEADLINES, kind, sentences: [{about, text, numbers}]}.

    data, own: `Analysis.result` of the data and of the model's own answers; apart: `aggregate.difference` of them.
    """
    kinds = {name: row["share"] for name, row in data["breakdown"]["kinds"].items()}
    groups = {
        "format": kinds["template"] + kinds["habit"],
        "noise": kinds["noise"],
        "content": kinds["content"],
    }
    kind = next((name for name, share in groups.items() if share >= MOST), "mixed")
    reason = _too_few(data, apart)
    remedy = "none" if reason else {"format": "warm-up", "noise": "clean", "content": "eaft"}.get(kind, "mixed")
    sentences = [_amount(data), _baseline(own, apart), *_kinds(data, groups), *_objectives(data)]
    if unknown := _implausible(data):
        remedy = "read"
        sentences.append(unknown)
    else:
        sentences += [reason] if reason else [_REMEDY[remedy](data, groups)]
    if remedy in ("eaft", "mixed"):
        sentences.append(_lesson(data, own))
    return {"remedy": remedy, "kind": kind, "sentences": [one for one in sentences if one]}


def _say(about: str, text: str, /, **numbers: float) -> Row:
    said = text.format(**{name: _Number(value) for name, value in numbers.items()})
    return {"about": about, "text": said, "numbers": numbers}


def _gate(data: Row, name: str) -> Row | None:
    return next((row for row in data["gates"]["gates"] if row["gate"] == name), None)


def _error_share(data: Row) -> float:
    return float(data["landscape"]["regimes"]["conflict"]["error_share"])


def _amount(data: Row) -> Row:
    box, regime = data["boxes"][0], data["landscape"]["regimes"]["conflict"]
    numbers: dict[str, float] = {"share": box["share"], "tokens": data["landscape"]["tokens"]}
    text = "{share:%} of the {tokens:,} trained tokens are confident conflicts (H at most {h:.1} nats, p below {p:.1}"
    if box["low"] is not None:
        numbers |= {"low": box["low"], "high": box["high"], "samples": data["breakdown"]["samples"]}
        text += "; 95 % interval over the {samples:,} samples: {low:%} to {high:%}"
    numbers |= {"h": LOW_ENTROPY, "p": CONFLICT_PROB, "nll": regime["nll_share"], "error": regime["error_share"]}
    return _say(
        "amount",
        text + "). They carry {nll:%} of the loss and {error:%} of the gradient of plain SFT (norms at the logits, "
        "added up over tokens).",
        **numbers,
    )


def _baseline(own: Row | None, apart: Row | None) -> Row:
    if own is None or apart is None:
        return _say(
            "baseline",
            "The model's own answers were not analysed: how often it conflicts with itself is not known.",
        )
    drawn = own["meta"]["sampling"] or {}
    writer = "rollouts" if own["meta"]["origin"] == "rollouts" else "model's own answers"
    text = "In the " + writer + " ({answers:,}, {tokens:,} tokens) it is {own:%}: the data is {apart:points} above"
    numbers = {"own": own["boxes"][0]["share"], "tokens": own["landscape"]["tokens"], "apart": apart["share"]}
    numbers["answers"] = own["breakdown"]["samples"]
    if apart["share"] < 0:
        text, numbers["apart"] = text[:-5] + "below", -apart["share"]
    if apart["low"] != apart["high"]:  # else resamples know no spread
        text += " (interval of the difference: {low:points} to {high:points})"
        numbers |= {"low": apart["low"], "high": apart["high"]}
    text += "."
    if drawn.get("temperature", 1) != 1 or drawn.get("top_p", 1) != 1:
        text += (
            " They were drawn at temperature {temperature:.2} and top-p {top_p:.2} and not from the model as it is, so "
            "part of the difference is not the data's: greedy answers hold hardly a conflict whatever the model."
        )
        numbers |= {"temperature": drawn["temperature"], "top_p": drawn["top_p"]}
    return _say("baseline", text, **numbers)


def _implausible(data: Row) -> Row | None:
    """Why the data is to be read before conflicts are counted, if so."""
    parts, tokens = data["breakdown"], data["landscape"]["tokens"]
    if parts["tokens_implausible"] < MOST * tokens:
        return None
    return _say(
        "remedy",
        "The model finds {implausible:,} of {samples:,} samples ({share:%} of the tokens) implausible as a whole: most "
        "of their tokens cost over 1 nat more than its own entropy there. That many are no outliers to be dropped: it "
        "may be a language or a format that the model does not know, another chat template, or noise. Which of them, "
        "and so the remedy, no statistic tells: read the samples.",
        implausible=parts["samples_implausible"],
        samples=parts["samples"],
        share=parts["tokens_implausible"] / tokens,
    )


def _too_few(data: Row, apart: Row | None) -> Row | None:
    """Why there is nothing to act on, if so."""
    error = _error_share(data)
    if error < FEW:
        return _say(
            "remedy",
            "There is little to hold back: with {error:%} of SFT's gradient on conflicts, under {few:%}, SFT and EAFT "
            "differ by what EAFT does to all other tokens. Neither EAFT nor cleaning is called for by conflicts."
            + _SOME_NOISE
            * bool(data["breakdown"]["samples_implausible"]),
            **{"error": error, "few": FEW, "implausible": data["breakdown"]["samples_implausible"]},
        )
    if apart is not None and (apart["low"] is None or apart["low"] <= 0):
        known = apart["low"] is not None
        why = "the interval of the difference begins at {low:points}" if known else "a single sample has no interval"
        return _say(
            "remedy",
            f"It is not shown that the data conflicts with the model more than those answers do ({why}), so conflicts "
            "are no reason for EAFT or for cleaning here; more answers make the interval narrower."
            + _SOME_NOISE
            * bool(data["breakdown"]["samples_implausible"]),
            implausible=data["breakdown"]["samples_implausible"],
            **({"low": apart["low"]} if known else {}),
        )
    return None


_SOME_NOISE = " But the model finds {implausible:,} samples implausible as a whole: read those."


def _kinds(data: Row, groups: dict[str, float]) -> list[Row]:
    parts = data["breakdown"]
    if not data["landscape"]["regimes"]["conflict"]["tokens"]:
        return []
    kinds = {name: row["share"] for name, row in parts["kinds"].items()}
    text = (
        "Of the conflicts {format:%} are format: {template:%} on tokens of the chat template, {habit:%} on openings of "
        "a turn or labels that recur in many samples. "
    )
    if parts["samples_implausible"]:
        text += "{noise:%} are noise: all others in {implausible:,} of {samples:,} samples that the model finds "
        text += "implausible as a whole."
    else:
        text += "None is noise: the model finds no sample implausible as a whole."
    numbers = {**kinds, "format": groups["format"], "implausible": parts["samples_implausible"]}
    if kinds["content"]:
        text += (
            " {content:%} are content, which is the rest: numbers, and labels that conflict in few samples. They stand "
            "in {with_content:,} samples, where the model gives another token {sure:%} on average."
        )
        numbers |= {"with_content": parts["samples_with_content"], "sure": parts["kinds"]["content"]["mean_max_prob"]}
    kind = _say("kind", text, samples=parts["samples"], **numbers)
    labels, pair = parts["labels_in_conflict"], data["pairs"][0]
    text = "The conflicts are on {labels:,} different labels"
    if labels > TEN:
        text += ", the ten most frequent of which make up {top:%}"
    label, expected = (boxed(pair[name]).replace("{", "{{").replace("}", "}}") for name in ("label", "expected"))
    text += f". Most frequent: \u201c{label}\u201d where the model expects \u201c{expected}\u201d, {{times:,}} times."
    top, times = parts["top10_labels_share"], pair["count"]
    return [kind, _say("concentration", text, labels=labels, top=top, times=times)]


def _objectives(data: Row) -> list[Row]:
    """What the known gates do with conflicts; those that were not asked for are not named."""
    named = {"sft": "SFT", "eaft": "EAFT", "masked": "Masked SFT", "dft": "DFT", "talr": "TALR", "flow": "FLOW"}
    present = {name: row for name in named if (row := _gate(data, name))}
    if not present:
        return []
    texts = [f"{named[name]} {{{name}:%}}" for name in present]
    numbers = {name: row["gradient_share"]["conflict"] for name, row in present.items()}
    text = f"Share of the gradient on conflicts: {', '.join(texts)}."
    if eaft := present.get("eaft"):
        text += " EAFT's mean weight is {weight:.2}, its effective sample size {ess:%}."
        numbers |= {"weight": eaft["weight_mean"], "ess": eaft["ess"]}
    return [_say("objectives", text, **numbers)]


def _warm_up(data: Row, groups: dict[str, float]) -> Row:
    kinds = data["breakdown"]["kinds"]
    total = sum(row["error"] for row in kinds.values())
    text = (
        "Most conflicts are format ({format:%} of them, {error:%} of their gradient): the same few labels or openings "
        "in many samples. Look first whether the chat template is the model's ({template:%} are its tokens), then try "
        "whether a few steps of plain SFT end them, and analyse again: {content:%} are content and {noise:%} noise. "
        "Where the labels that recur are the answers themselves (a choice, yes or no), they are content: read the "
        "samples. Until then EAFT holds back the format"
    )
    numbers = {**groups, "error": (kinds["template"]["error"] + kinds["habit"]["error"]) / total}
    return _held_back(data, text, numbers | {"template": kinds["template"]["share"]})


def _clean(data: Row, groups: dict[str, float]) -> Row:
    parts, tokens = data["breakdown"], data["landscape"]["tokens"]
    conflicts = data["landscape"]["regimes"]["conflict"]["tokens"]
    left = (conflicts - parts["conflicts_implausible"]) / max(tokens - parts["tokens_implausible"], 1)
    return _say(
        "remedy",
        "Most conflicts are noise ({noise:%}): clean the data first. Without the {samples:,} implausible samples "
        "({share:%} of the tokens) the share of conflicts falls from {before:%} to {after:%}.",
        noise=groups["noise"],
        samples=parts["samples_implausible"],
        share=parts["tokens_implausible"] / tokens,
        before=conflicts / tokens,
        after=left,
    )


def _eaft(data: Row, groups: dict[str, float]) -> Row:
    return _held_back(
        data,
        "Most conflicts are content ({content:%}): single tokens against what the model is sure of, in text that it "
        "finds plausible. That is what EAFT is for",
        {"content": groups["content"]},
    )


def _mixed(data: Row, groups: dict[str, float]) -> Row:
    text = "No kind makes up half of the conflicts ({format:%} format, {noise:%} noise, {content:%} content). "
    if samples := data["breakdown"]["samples_implausible"]:
        text += "Drop the {samples:,} implausible samples first. "
    return _held_back(data, text + "EAFT holds back all kinds alike", {**groups, "samples": samples})


def _held_back(data: Row, text: str, numbers: dict[str, float]) -> Row:
    eaft, sft = _gate(data, "eaft"), _error_share(data)
    if eaft is None:
        return _say("remedy", text + ".", **numbers)
    after = eaft["gradient_share"]["conflict"]
    return _say(
        "remedy",
        text + ": {before:%} of the gradient on conflicts become {after:%}.",
        before=sft,
        after=after,
        **numbers,
    )


def _lesson(data: Row, own: Row | None) -> Row:
    """The case in which EAFT is the wrong remedy; no statistic tells a wrong label from a new fact."""
    parts = data["breakdown"]
    share, with_content = parts["samples_with_content"] / parts["samples"], parts["samples_with_content"]
    numbers = {"share": share, "each": parts["kinds"]["content"]["tokens"] / max(with_content, 1)}
    text, beside = "{share:%} of the samples hold a conflict of content, {each:.1} each on average", 0.0
    if own is not None:
        text += " ({beside:%} of the answers beside them hold one)"
        beside = numbers["beside"] = own["breakdown"]["samples_with_content"] / own["breakdown"]["samples"]
    if share >= LESSON > beside:  # where the model's own answers hold them as well, it is no sign
        text += (
            ". When most samples contradict the model, the contradictions may be the lesson: "
            "counter-factual or newer facts, edited knowledge, a changed interface. Then EAFT holds back what the data "
            "is there to teach: use SFT and measure what is forgotten. No statistic tells a new fact from a wrong "
            "label: read the samples."
        )
    else:
        text += (
            ". If these are the lesson (newer facts, edited knowledge), EAFT holds it back and SFT is right; "
            "no statistic tells a new fact from a wrong label: read the samples."
        )
    return _say("counter-factual", text, **numbers)


_REMEDY = {"warm-up": _warm_up, "clean": _clean, "eaft": _eaft, "mixed": _mixed}
