"""What is to be launched, the same for every place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What to launch: a recipe with one arm or all of them (`arm` None), seeds, overrides, variables that travel."""

    recipe: str
    arm: str | None
    seeds: str | None = None
    overrides: tuple[str, ...] = ()
    wait: float = 0.0
    env: tuple[str, ...] = ()
    recipe_hash: str | None = None  # of the recipe that was checked; another one is refused where the job runs
    restarts: int = 0  # of a training after the loss of a worker or node

    def words(self) -> list[str]:
        """Arguments of `eaft launch` but for where."""
        what = ["--compare"] if self.arm is None else ["--arm", self.arm]
        seeds = ["--seeds", self.seeds] if self.seeds else []
        wait = ["--wait", f"{self.wait:g}"] if self.wait else []
        checked = ["--recipe-hash", self.recipe_hash] if self.recipe_hash else []
        again = ["--max-restarts", str(self.restarts)] if self.restarts else []
        return [self.recipe, *what, *seeds, *wait, *again, *self.overrides, *checked]
