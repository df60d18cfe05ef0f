"""Who may import what, how large a piece may grow, and calls that have no place here. Read from the source."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "eaft_verl"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
# Lowest first: a room may import those before it. `root` is every module of the root but the two that stand elsewhere.
ROOMS = (
    *("root", "pages", "tokens", "attention", "objectives", "grading", "data", "evaluation", "recipe", "planning"),
    "cluster",
    *("analysis", "reporting", "training", "experiment", "launch", "cli"),
)
SIDE_BY_SIDE = ({"analysis", "reporting", "training"},)  # no order among them: they import none of each other
HOMES = {  # package -> rooms that may import it
    "torch": {"tokens", "attention", "training", "evaluation", "analysis"},
    "verl": {"training"},
    "tensordict": {"training"},
    "ray": {"training", "cluster", "launch"},
    "lm_eval": {"evaluation"},
    "vllm": {"evaluation"},
    "matplotlib": {"pages", "reporting", "analysis"},
}
EXCEPTIONS = {
    ("smollm2", "torch"),  # converts the packaged model; nothing else of the root touches tensors
    ("private", "vllm"),  # a CPU build of it within verl's workers, for trials
}
MAX_ROOT = 8
MAX_FUNCTION, MAX_MODULE = 40, 300
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "tools", "stuff"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 2 or (len(parts) == 2 and (PACKAGE / parts[1]).is_dir()):
        return parts[1]
    return parts[-1] if parts[-1] in ("objectives", "cli") else "root"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that the module imports; `lazy`: those inside functions and for type checking too."""
    tree = tree_of(path)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not lazy and (late or for_types):
            skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in skipped:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def runtime_roots(path: Path) -> set[str]:
    """Packages that the module can load, types left out: `if TYPE_CHECKING` loads nothing."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def ours(path: Path) -> set[str]:
    """Modules of this package that the module imports, late and type-checking imports counted."""
    found = set()
    for dotted in imports(path):
        if dotted.startswith("eaft_verl"):
            found.add(dotted if dotted in MODULES else dotted.rpartition(".")[0])
    return found - {module_of(path)}


def test_the_package_was_found() -> None:
    assert len(FILES) > 100 and {room_of(module) for module in MODULES} <= set(ROOMS)


# order


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    room = room_of(module_of(path))
    for other in ours(path):
        assert other in MODULES, f"{other} does not exist"
        target = room_of(other)
        assert ROOMS.index(target) <= ROOMS.index(room), f"{room} imports {other}"
        assert target == room or not any({room, target} <= group for group in SIDE_BY_SIDE), other


def test_no_circle_between_modules() -> None:
    TopologicalSorter({module: ours(path) - {"eaft_verl"} for module, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_package_is_imported_in_its_rooms_only(path: Path) -> None:
    room, found = room_of(module_of(path)), runtime_roots(path)
    for package, rooms in HOMES.items():
        assert room in rooms or package not in found or (path.stem, package) in EXCEPTIONS, package


def test_few_modules_stand_in_the_root() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= MAX_ROOT


def test_objectives_parameters_and_token_types_need_the_standard_library_only() -> None:
    for path in (*(PACKAGE / "objectives").glob("*.py"), PACKAGE / "parameters.py", PACKAGE / "tokens" / "stats.py"):
        assert runtime_roots(path) - {"eaft_verl"} <= sys.stdlib_module_names


def top_level_closure(name: str) -> set[str]:
    """Roots of everything that importing one of our modules loads, through our own modules."""
    seen: set[str] = set()
    waiting, found = [name], set()
    while waiting:
        module = waiting.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        for dotted in imports(MODULES[module], lazy=False):
            if dotted.startswith("eaft_verl"):
                waiting += [dotted, dotted.rpartition(".")[0]]
            else:
                found.add(dotted.partition(".")[0])
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("cli", "objectives", "models", "runs", "recipe.resolve", "recipe.checks", "recipe.datasets"),
        *("planning.command", "cluster.doctor", "reporting.report", "experiment.compare", "experiment.train"),
        *("launch.places", "evaluation.settings"),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(name: str) -> None:
    heavy = {"torch", "verl", "ray", "lm_eval", "vllm", "transformers", "datasets", "matplotlib", "tensordict"}
    assert not heavy & top_level_closure(f"eaft_verl.{name}")


@pytest.mark.parametrize("path", [path for path in FILES if path.stem == "__init__"][1:], ids=name_of)
def test_a_room_says_what_it_may_import_and_what_to_read_first(path: Path) -> None:
    said = ast.get_docstring(tree_of(path)) or ""
    first = said.partition("Read `")[2].partition("`")[0]
    assert (path.parent / first).is_file(), "Read `FILE` first"


# size and names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_is_named_after_what_it_does(path: Path) -> None:
    words = {word for part in path.relative_to(PACKAGE).with_suffix("").parts for word in part.split("_")}
    assert not VAGUE & words


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_and_modules_have_docstrings(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# calls


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_call_that_runs_text(path: Path) -> None:
    assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & runtime_roots(path)
    for name, call in calls(tree_of(path)):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "yaml.load"}
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


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest takes the second for the first: it is an error, or never run."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
