"""Who may import what, how large a piece may grow, and calls that have no place here. Read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "eaft_verl"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
LIGHT = (*("runs.py", "files.py", "cli.py", "compare.py", "objectives.py"),)
MAX_FUNCTION, MAX_MODULE, MAX_PAPER = 50, 300, 350
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "tools", "stuff"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def type_checking_nodes(tree: ast.Module) -> set[ast.AST]:
    """Nodes that never run: bodies of `if TYPE_CHECKING`."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Dotted names that the module imports at run time; `lazy`: those inside functions too."""
    tree = tree_of(path)
    skipped = type_checking_nodes(tree)
    if not lazy:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path, *, lazy: bool = True) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, lazy=lazy)}


def test_the_package_was_found() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_engines_are_imported_in_their_folder_only(path: Path) -> None:
    name, found = name_of(path), roots(path)
    if not name.startswith("training/"):
        assert not {"verl", "tensordict"} & found
    if not name.startswith(("training/", "cluster/", "launch/")):
        assert "ray" not in found
    if not name.startswith("evaluation/"):
        assert not {"lm_eval", "vllm"} & found
    if name != "reporting/plots.py":
        assert "matplotlib" not in found


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in FILES
        if name_of(path) in LIGHT or name_of(path).startswith(("reporting/", "recipe/", "planning/"))
    ],
    ids=name_of,
)
def test_light_modules_import_no_torch_even_lazily(path: Path) -> None:
    assert not {"torch", "verl", "ray", "lm_eval", "vllm", "transformers"} & roots(path)


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith("data/")], ids=name_of)
def test_data_imports_no_torch_and_libraries_lazily(path: Path) -> None:
    assert "torch" not in roots(path)
    assert not {"transformers", "datasets", "reasoning_gym"} & roots(path, lazy=False)


def test_objectives_and_parameters_need_the_standard_library_only() -> None:
    for name, own in (("objectives.py", {"eaft_verl"}), ("parameters.py", set())):
        assert roots(PACKAGE / name) - own <= sys.stdlib_module_names


def test_token_statistics_need_torch_only() -> None:
    for path in (PACKAGE / "tokens").glob("*.py"):
        allowed = {"eaft_verl"} if path.stem in {"stats", "__init__"} else {"eaft_verl", "torch"}
        assert roots(path) - sys.stdlib_module_names <= allowed
        ours = {name for name in imports(path, lazy=True) if name.startswith("eaft_verl")}
        assert all(name.startswith("eaft_verl.tokens.") for name in ours)


def top_level_closure(name: str) -> set[str]:
    """Roots of everything that importing one of our modules loads, through our own modules."""
    seen: set[str] = set()
    waiting, found = [name], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = PACKAGE.parent / Path(*module.split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if not path.exists():
            continue
        for dotted in imports(path, lazy=False):
            if dotted.startswith("eaft_verl"):
                waiting += [dotted, dotted.rpartition(".")[0]]
            else:
                found.add(dotted.partition(".")[0])
    return found


@pytest.mark.parametrize(
    "name", ["cli", "recipe.resolve", "recipe.checks", "runs", "reporting.report", "compare", "objectives", "models"]
)
def test_importing_a_light_module_loads_nothing_heavy(name: str) -> None:
    heavy = {"torch", "verl", "ray", "lm_eval", "vllm", "transformers", "datasets", "matplotlib", "tensordict"}
    assert not heavy & top_level_closure(f"eaft_verl.{name}")


# size and names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_size(path: Path) -> None:
    limit = MAX_PAPER if name_of(path) == "objectives.py" else MAX_MODULE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_is_named_after_what_it_does(path: Path) -> None:
    words = {word for part in path.relative_to(PACKAGE).with_suffix("").parts for word in part.split("_")}
    assert not VAGUE & words


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_and_modules_have_docstrings_and_types(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, node.name


# calls


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_call_that_runs_text(path: Path) -> None:
    assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & roots(path)
    for name, call in calls(tree_of(path)):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "torch.load", "yaml.load"}
        for keyword in call.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in {"shell", "trust_remote_code", "allow_pickle"} and is_true), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_bare_except_and_no_silent_default(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            assert len(node.args) == 2, node.lineno
