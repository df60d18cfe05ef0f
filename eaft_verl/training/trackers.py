"""Metrics to whoever else is told: W&B, MLflow, SwanLab, trackio, through verl's tracking. Nothing secret leaves."""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from verl.utils.tracking import Tracking

from eaft_verl.boundary import masked
from eaft_verl.errors import RunError
from eaft_verl.recipe.config import Config, plain
from eaft_verl.runs import Run, run_name

_NOT_LOGGED = ("split", "step", "time")
_WITHOUT_ACCOUNT = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}


class Trackers:
    """`log` every row of metrics.jsonl to the recipe's `trackers`; nothing where it names none.

    Raises RunError where one of them cannot be reached. Later failures are told once, and training goes on.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self.names, self.tracking = list(plain(config.trackers)), None
        if not self.names:
            return
        tree = masked(plain(config))
        told = {**tree, "trainer": {"name": tree["trainer"]}}  # verl looks for its own settings under this key
        try:
            with _environment(_defaults(config, run)):
                self.tracking = Tracking(masked(config.name), run_name(config.arm, config.seed), self.names, told)
        except Exception as error:  # whatever a service or its package raises
            ways = [f"`{name} login` or {_WITHOUT_ACCOUNT[name]}" for name in self.names if name in _WITHOUT_ACCOUNT]
            how = f"; {', '.join(ways)}" if ways else ""
            raise RunError(
                f"trackers: {', '.join(self.names)} cannot be started: {masked(_line(error))}{how}"
            ) from None
        if missing := sorted(set(self.names) - set(self.tracking.logger)):
            raise RunError(f"trackers: {missing[0]} cannot be started; its reason is in the warnings above")

    def log(self, row: dict[str, Any]) -> None:
        """The finite numbers of a row, as 'split/name'."""
        if self.tracking is None:
            return
        values = {
            f"{row['split']}/{name}": value
            for name, value in row.items()
            if name not in _NOT_LOGGED and isinstance(value, int | float) and math.isfinite(value)
        }
        try:
            self.tracking.log(data=masked(values), step=row["step"])
        except Exception as error:
            print(f"eaft: warning: trackers are left out from here on: {masked(_line(error))}", file=sys.stderr)
            self.tracking = None

    def close(self) -> None:
        """Hand over what is still waiting."""
        if self.tracking is not None:
            with contextlib.suppress(Exception):  # what is trained is trained, whatever a service says at the end
                self.tracking.finish()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _defaults(config: Config, run: Run) -> dict[str, str]:
    """Where they keep their files, and that a resumed run goes on in the same place; the user's own settings win.

    W&B and SwanLab would copy the console before it is masked, and code and command line of the process.
    """
    identity = hashlib.sha256(f"{run.path} {run.info['created']}".encode()).hexdigest()[:16]
    return {
        **{"WANDB_DIR": str(run.path), "WANDB_RUN_ID": identity, "WANDB_RESUME": "allow", "WANDB_CONSOLE": "off"},
        **{"WANDB_DISABLE_CODE": "true", "WANDB_X_DISABLE_META": "true"},
        **{"MLFLOW_TRACKING_URI": f"sqlite:///{config.output}/mlflow.db", "SWANLAB_LOG_DIR": str(run.path / "swanlog")},
        **{"SWANLAB_TERMINAL_PROXY_TYPE": "none", "SWANLAB_PROBE_RUNTIME": "false"},
    }


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """These variables inside, where they are not set already."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
