"""Commands forked from one process that has imported what they import: those seconds are paid once per test process.

Each is still a process of its own, in a session of its own: its exit code, its streams and what it leaves behind are
those of `eaft`. What an interpreter does at its start (the path, variables read by packages) needs a real start.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FORKS = multiprocessing.get_context("forkserver")  # has no threads, unlike this process
_FORKS.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "torch.distributed.tensor", "transformers.models.auto.modeling_auto"),
        *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
        *("accelerate", "safetensors.torch", "pyarrow.compute", "pyarrow.parquet", "hydra", "omegaconf", "scipy.stats"),
        *("matplotlib.pyplot", "jinja2", "tensordict", "datasets", "peft", "ray"),
        "composed",
    ]
)


def eaft(words: Sequence[object], folder: Path, out: Path, err: Path | None = None, timeout: float = 600.0) -> int:
    """Exit code of `eaft WORDS`, run in a folder, negative for a signal; what it prints goes to two files, or to one.

    Raises subprocess.TimeoutExpired.
    """
    given = [str(word) for word in words]
    process = _FORKS.Process(target=_run, args=(given, str(folder), str(out), err and str(err), dict(os.environ)))
    process.start()
    process.join(timeout)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # whatever it left
    if process.exitcode is None:
        raise subprocess.TimeoutExpired(given, timeout, out.read_bytes())
    return process.exitcode


def _run(words: list[str], folder: str, out: str, err: str | None, environ: Mapping[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ, PYTHONPATH=str(ROOT))
    installed = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix})
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path.startswith(installed))]
    for number, name in ((1, out), (2, err or out)):
        stream = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["eaft", *words]
    try:
        from eaft_verl.cli import main

        sys.exit(main())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
