"""What a wheel takes along: the recipes, found by name where there is no checkout."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from eaft_verl.cli import main
from eaft_verl.recipe import shipped
from eaft_verl.recipe.resolve import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for part in ("eaft_verl", "recipes"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(source)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / done.stdout.splitlines()[-1]


def test_a_wheel_holds_every_recipe_and_every_file_that_the_code_reads(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(Path(name).stem for name in names if "/share/eaft-verl/recipes/" in name) == RECIPES
    read = [path for path in (ROOT / "eaft_verl").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {str(path.relative_to(ROOT)) for path in read} <= set(names)


def test_an_installed_wheels_recipes_go_by_name(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pip lays a wheel out: .data/data under the prefix, which RECORD names relative to site-packages."""
    site = tmp_path / "lib/site-packages"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (site / "eaft_verl-0.1.0.data/data/share").rename(tmp_path / "share")
    record = site / "eaft_verl-0.1.0.dist-info/RECORD"
    record.write_text(record.read_text().replace("eaft_verl-0.1.0.data/data/share", "../../share"))
    installed = next(iter(importlib.metadata.distributions(path=[str(site)])))
    real = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed if "eaft" in name else real(name))
    monkeypatch.setattr(shipped, "__file__", str(site / "eaft_verl/recipe/shipped.py"))
    monkeypatch.chdir(tmp_path)
    shipped.shipped.cache_clear()
    try:
        assert shipped.shipped()["quickstart"] == tmp_path / "share/eaft-verl/recipes/quickstart.yaml"
        assert load_recipe("quickstart.yaml").path == Path("share/eaft-verl/recipes/quickstart.yaml")
        assert main(["recipes", "quickstart"]) == 0
        assert capsys.readouterr().out == (ROOT / "recipes/quickstart.yaml").read_text()
        assert main(["recipes", "math_glm4_9b"]) == 0
        assert "extends: math_qwen3_4b.yaml" in capsys.readouterr().out
    finally:
        shipped.shipped.cache_clear()


def test_recipes_are_listed_and_named_where_one_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert sorted(line.split()[0] for line in listed.splitlines() if line.startswith("  ")) == RECIPES
    assert (
        "quickstart                 The first thing to run: five ways to train a small model, on two cores " in listed
    )
    assert main(["compare", "quikstart"]) == 2 and "did you mean quickstart?" in capsys.readouterr().err
    assert main(["compare", "none_of_ours"]) == 2
    assert f"by name there are {', '.join(RECIPES)}" in capsys.readouterr().err
