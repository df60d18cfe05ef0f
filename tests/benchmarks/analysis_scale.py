"""Time and memory of an analysis by rows of its store: `python -m tests.benchmarks.analysis_scale 1e4 1e5 1e6 1e7 1e8`.

Prints one JSON: a row for every size, and the line `fixed + ns * rows` through them with how far each size is off it.
Every size runs in a process of its own; 300 tokens a sample, a vocabulary of 50,000, a store of 26 bytes a row in
TMPDIR that is removed again. The wall clock means something on an idle machine only; seconds of CPU divided by the
cores are the least it can take, and those too grow by half where other work shares the cores' caches. `page`:
everything that `eaft analyze` does with a store, figures drawn, page written; `gates`: the gate lab with its usual
gates. Peak memory is resident (`ru_maxrss`), nearly all of it this process's own; `analysis_mib` is what the analysis
adds to the imports.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eaft_verl.analysis.store import COLUMNS, FILE, GROUP, META, WRITTEN, TokenStore

VOCAB, LENGTH = 50_000, 300


def main(sizes: list[str]) -> None:
    """Make, measure and remove a store of each size."""
    runs: list[dict[str, Any]] = []
    for size in map(int, map(float, sizes)):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size)
            for what in ("page", "gates"):
                command = [sys.executable, "-m", "tests.benchmarks.analysis_scale", f"--{what}", folder]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(said))
                print(said.strip(), file=sys.stderr, flush=True)
    lines = {what: line([run for run in runs if run["what"] == what]) for what in ("page", "gates")}
    print(json.dumps({"cores": os.cpu_count(), "runs": runs, "lines": lines}, indent=1))


def line(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """seconds = fixed + ns * rows, by least squares of the relative error, of wall clock and of CPU."""
    rows = np.array([run["rows"] for run in runs], float)
    found = {}
    for name in ("seconds", "cpu_seconds"):
        took = np.array([run[name] for run in runs])
        terms = np.column_stack([np.ones_like(rows), rows])
        fixed, each = np.linalg.lstsq(terms / took[:, None], np.ones_like(rows), rcond=None)[0]
        off = ((fixed + each * rows) / took - 1).round(3).tolist()
        found[name] = {"fixed": round(float(fixed), 2), "ns_per_row": round(float(each * 1e9), 1), "off": off}
    return found


def write(folder: Path, size: int) -> None:
    """Rows whose statistics are independent draws; row groups repeat one of them under other sample numbers."""
    rng, rows = np.random.default_rng(0), min(size, GROUP)
    prob = rng.beta(0.5, 0.25, rows)
    floats = {"logprob": np.log(prob), "entropy": rng.random(rows) ** 2 * np.log(20), "max_prob": np.maximum(prob, 0.4)}
    floats |= {"full_entropy": floats["entropy"] * 1.1, "sum_p2": prob**2, "top_k_mass": rng.uniform(0.9, 1, rows)}
    token = (rng.zipf(1.3, rows) % VOCAB).astype(np.int32)
    texts = {name: pa.array(["one"] * rows).dictionary_encode() for name in ("role", "source")}
    meta = {"schema": 1, "model": "m", "keys": {"model": "m", "data": "d", "template": "t"}, "k": 20, "vocab": VOCAB}
    meta |= {"origin": "data", "sampling": None, "samples": -(-size // LENGTH), "tokens": size}
    schema = COLUMNS.with_metadata({META: json.dumps(meta)})
    with pq.ParquetWriter(folder / FILE, schema, **WRITTEN) as writer:
        for start in range(0, size, rows):
            index = np.arange(start, min(start + rows, size))
            columns = {"sample": index // LENGTH, "position": index % LENGTH, "token": token, "argmax": token}
            columns |= floats | texts
            table = pa.table({name: columns[name][: len(index)] for name in COLUMNS.names}).cast(COLUMNS)
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=GROUP)


def measured(what: str, folder: Path) -> None:
    """Print seconds, nanoseconds a row and the largest resident memory of this process as JSON."""
    import torch

    from eaft_verl.analysis.gates import WORDS, sweep
    from eaft_verl.analysis.page import write_page

    class Tokenizer:
        """What the page asks of one."""

        all_special_ids: ClassVar[list[int]] = [0]
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

        def __len__(self) -> int:
            return VOCAB

        def decode(self, tokens: list[int], **options: bool) -> str:
            return f"word{tokens[0]}"

        def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
            return [self.decode([token]) for token in tokens]

    store = TokenStore(folder)
    torch.ones(1 << 16).exp()  # its first use takes half a second
    before, load = _peak(), os.getloadavg()[0]
    started, spent = time.perf_counter(), time.process_time()
    sweep(store, WORDS) if what == "gates" else write_page(folder / "page", [store], Tokenizer())
    seconds, spent, rows = time.perf_counter() - started, time.process_time() - spent, store.meta["tokens"]
    found = {"what": what, "rows": rows, "seconds": round(seconds, 2), "cpu_seconds": round(spent, 2)}
    found |= {"ns_per_row": round(seconds / rows * 1e9, 1), "cpu_ns_per_row": round(spent / rows * 1e9, 1)}
    found |= {"peak_rss_mib": round(_peak()), "analysis_mib": round(_peak() - before), "load_before": round(load, 1)}
    print(json.dumps(found))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        measured(sys.argv[1][2:], Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
