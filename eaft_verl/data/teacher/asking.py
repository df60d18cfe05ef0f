"""All prompts to the endpoint, many at a time, in the order of the draw, until enough answers are verified."""

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eaft_verl.boundary import run_async
from eaft_verl.data.leakage import Against
from eaft_verl.data.teacher.answer_file import AnswerFile
from eaft_verl.data.teacher.endpoint import Teacher
from eaft_verl.data.teacher.prompts import Prompt
from eaft_verl.data.teacher.spec import SynthesisSpec
from eaft_verl.data.teacher.verify import GradingPool, Verdict, judge
from eaft_verl.errors import ConfigError, Lost

_IN_A_ROW = 20  # requests given up one after the other, or as many as run at a time: then the endpoint is gone


def draw_order(seed: int, key: str) -> bytes:
    """Prompts sorted by this are in random order, which neither their files nor other prompts change."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


class Verdicts:
    """Of each prompt and sample, and how many rows they make."""

    def __init__(self, keep: int) -> None:
        self.keep, self.rows, self.open_failures = keep, 0, 0
        self._of: dict[str, dict[int, tuple[Verdict, bytes]]] = {}
        self._texts: dict[str, set[bytes]] = {}

    def add(self, prompt: Prompt, sample: int, verdict: Verdict, reply: dict[str, Any]) -> None:
        """Note one."""
        said = [reply.get("content"), reply.get("reasoning"), reply.get("tool_calls")]
        digest = hashlib.sha256(" ".join(str(said).split()).encode()).digest()[:16]
        self._of.setdefault(prompt.key, {})[sample] = (verdict, digest)
        self.open_failures += reply["outcome"] == "failed" and not reply["final"]
        if not verdict.reason:
            texts = self._texts.setdefault(prompt.key, set())
            before = min(self.keep, len(texts))
            texts.add(digest)
            self.rows += min(self.keep, len(texts)) - before

    def alike(self, prompts: Sequence[Prompt]) -> float | None:
        """Share of the prompts with several answers all of whose answers are the same; None if there are none."""
        several = [[digest for _, digest in self._of[one.key].values()] for one in prompts if one.key in self._of]
        several = [digests for digests in several if len(digests) > 1]
        return sum(len(set(digests)) == 1 for digests in several) / len(several) if several else None

    def of(self, prompt: Prompt) -> dict[int, Verdict]:
        """Of each sample asked, in order; the same words a second time are a duplicate."""
        seen: set[bytes] = set()
        found = {}
        for sample, (verdict, digest) in sorted(self._of.get(prompt.key, {}).items()):
            again = not verdict.reason and digest in seen
            seen |= set() if verdict.reason else {digest}
            found[sample] = Verdict("duplicate", "the prompt has this very answer already") if again else verdict
        return found


class Asking:
    """The questions, the endpoint and the file of answers."""

    def __init__(
        self, spec: SynthesisSpec, prompts: Sequence[Prompt], file: AnswerFile, model: str, against: Against | None
    ) -> None:
        self.spec, self.prompts, self.file, self.model, self.against = spec, prompts, file, model, against
        self.verdicts = Verdicts(spec.keep)
        self._failed_in_a_row = 0
        self._units = iter([(prompt, sample) for prompt in prompts for sample in range(spec.samples)])

    def run(self, grading: GradingPool | None) -> Verdicts:
        """Ask what is not answered yet and judge everything; Lost if the endpoint is gone, with all answers kept."""
        from tqdm import tqdm

        total = self.spec.rows or len(self.prompts) * self.spec.samples
        slow = 0.2 if sys.stderr.isatty() else 30
        unit = " rows" if self.spec.rows else " answers"
        with (
            tqdm(total=total, desc="synthesize", unit=unit, mininterval=slow) as bar,
            ThreadPoolExecutor(grading.size if grading else 1) as threads,
        ):
            run_async(self._all(grading, threads, bar))
        return self.verdicts

    async def _all(self, grading: GradingPool | None, threads: ThreadPoolExecutor, bar: Any) -> None:
        assert self.spec.endpoint is not None
        teacher = Teacher(self.spec.endpoint, self.spec.sampling)
        tasks = [
            asyncio.create_task(self._work(teacher, grading, threads, bar))
            for _ in range(self.spec.endpoint.concurrency)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await teacher.close()

    async def _work(self, teacher: Teacher, grading: GradingPool | None, threads: ThreadPoolExecutor, bar: Any) -> None:
        """One request after the other. Units are begun in order, so that those asked are the first ones."""
        for prompt, sample in self._units:
            if self.spec.rows and self.verdicts.rows >= self.spec.rows:
                return
            place = (prompt.key, sample)
            known = self.file.get(place) if self.file.has(place) else None
            if known is None:
                known = await teacher.answer(prompt, sample, self.model)
                self.file.add(known)
                self._check_alive(known)
            verdict = await asyncio.get_running_loop().run_in_executor(
                threads, judge, known, prompt.answer, grading, self.against
            )
            before = self.verdicts.rows
            self.verdicts.add(prompt, sample, verdict, known)
            bar.set_postfix_str(spending(self.file.spent, self.spec), refresh=False)
            bar.update(self.verdicts.rows - before if self.spec.rows else 1)

    def _check_alive(self, row: dict[str, Any]) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if row["outcome"] == "failed" else 0
        assert self.spec.endpoint is not None
        if self._failed_in_a_row >= max(_IN_A_ROW, self.spec.endpoint.concurrency):
            most = self.spec.sampling.max_tokens
            lower = f"; lower sampling.max_tokens, which is {most}" if "max_tokens" in row["error"] else ""
            kept = f"{len(self.file)} answers are kept in {self.file.path}: the same command goes on"
            raise Lost(
                f"{self.spec.endpoint.url}: {self._failed_in_a_row} requests in a row have failed, the last with "
                f"{row['error']}; {kept if len(self.file) else 'no answer has come'}{lower}"
            )


def spending(spent: dict[str, int], spec: SynthesisSpec) -> str:
    """'1,204 + 88,310 tokens, 0.05' for tokens of prompts and answers and, where prices are given, their cost."""
    said = f"{spent['prompt_tokens']:,} + {spent['completion_tokens']:,} tokens"
    cost = cost_of(spent, spec)
    return said if cost is None else f"{said}, cost {cost:.2f}"


def cost_of(spent: dict[str, int], spec: SynthesisSpec) -> float | None:
    """Money, in the unit of the prices; None without them."""
    prices = spec.endpoint.prices if spec.endpoint else None
    return None if prices is None else sum(spent[f"{kind}_tokens"] * price for kind, price in prices.items()) / 1e6


def model_to_ask(spec: SynthesisSpec) -> str:
    """The id of the model that is asked, once the endpoint has shown that it is there.

    ConfigError if it cannot be reached, or serves several models and none is named, or refuses the one that is named.
    """
    return run_async(_model_to_ask(spec))


async def _model_to_ask(spec: SynthesisSpec) -> str:
    assert spec.endpoint is not None
    teacher, wanted, url = Teacher(spec.endpoint, spec.sampling), spec.endpoint.model, spec.endpoint.url
    try:
        served = await teacher.served()
        if wanted is None:
            if len(served) != 1:
                listed = f"serves {', '.join(served[:9])}" if served else "does not list its models"
                raise ConfigError(f"endpoint.model is missing: {url} {listed}; name one of them")
            return served[0]
        if wanted not in served and (fault := await teacher.refusal(wanted)):
            listed = f"; it serves {', '.join(served[:9])}" if served else ""
            raise ConfigError(f"endpoint.model={wanted!r}: {url} refuses: {fault}{listed}")
        return wanted
    finally:
        await teacher.close()
