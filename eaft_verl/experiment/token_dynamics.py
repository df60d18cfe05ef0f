"""`eaft analyze STORE STORE...`: how tokens moved from the first store's model to checkpoints of runs."""

from collections.abc import Sequence
from pathlib import Path

from eaft_verl.analysis.dynamics import GROUPS, Later, dynamics
from eaft_verl.analysis.figures import dynamics_pictures
from eaft_verl.analysis.store import TokenStore
from eaft_verl.errors import DataError
from eaft_verl.files import write_bytes, write_json
from eaft_verl.pages.numbers import number
from eaft_verl.runs import steps_in


def token_dynamics(base: Path, later: Sequence[Path], out: Path | None) -> None:
    """Print each group's loss by arm and step; write OUT/dynamics.json and figures (OUT: `dynamics` in the base store).

    later: stores of exports, RUN/checkpoints/step_000016, whose run and step they are named by.
    """
    rows = dynamics(TokenStore(base), [_later(TokenStore(path)) for path in later])
    folder = out or base / "dynamics"
    for name, image in dynamics_pictures(rows).items():
        write_bytes(folder / f"{name}.png", image)
    write_json(folder / "dynamics.json", {"schema": 1, "rows": rows})
    print(f"{'NLL, nats; groups fixed before training':44}" + "".join(f"{group:>14}" for group in GROUPS))
    for row in rows:
        losses = "".join(f"{number(row['fixed'][group]['nll']):>14}" for group in GROUPS)
        print(f"{row['arm']:34}{row['step']:>10,}{losses}")
    print(f"wrote {folder / 'dynamics.json'}")


def _later(store: TokenStore) -> Later:
    export = Path(store.meta["model"])
    step = next((step for step, folder in steps_in(export.parent).items() if folder.name == export.name), None)
    if step is None or export.parent.name != "checkpoints":
        raise DataError(
            f"{store.path} was made by {export}, which is no export of a run (RUN/checkpoints/step_000016); analyse "
            "the run's exports on the same data"
        )
    return Later(export.parent.parent.name, step, store)
