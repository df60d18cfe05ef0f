"""No text becomes code: nothing evaluates, unpickles or hands a line to a shell, by whatever name it is reached."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    [*(ROOT / "eaft_verl").rglob("*.py"), *(ROOT / "docker").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
)
HELPERS = sorted(path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_"))
SHELL = sorted(
    path for folder in ("examples", "docker", "eaft_verl") for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch", ".yaml", ".cpu", ".gpu")
)  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "codeop", "pty"),
    *("commands", "imp", "cffi", "ptyprocess", "pexpect", "jsonpickle"),
}
CALLS = {
    *(f"os.{name}" for name in ("system", "popen", "startfile")),
    *(f"os.{kind}{how}" for kind in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "builtins.eval"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader", "numpy.core", "pandas.read_pickle"),
    *(
        "pandas.eval",
        "sympy.sympify",
        "sympy.parse_expr",
        "sympy.parsing",
        "operator.methodcaller",
        "types.FunctionType",
    ),
    *("types.CodeType", "timeit.timeit", "ast.compile", "torch.hub", "torch.jit.load", "inspect.currentframe"),
}
STARTERS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
BY_NAME = {  # file: why it may import a module that text names
    "eaft_verl/recipe/objective.py": "a recipe's objective, 'module:Class'",
    "eaft_verl/grading/graders.py": "a recipe's grader, 'module:function'",
    "eaft_verl/boundary.py": "runpy, in the line that `python_command` starts a module with",
}


def names_of(tree: ast.Module) -> dict[str, str]:
    """{name in the module: dotted name that it stands for}, however it was imported or assigned."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for _ in range(3):  # a = torch.load; b = a
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if said := dotted(node.value, found):
                    found |= {
                        target.id: said for target in targets if isinstance(target, ast.Name) and target.id not in found
                    }
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The dotted name that an expression stands for, through getattr and import_module too; '' where it is none."""
    if isinstance(node, ast.Name):
        return names.get(
            node.id, node.id if node.id in BUILTINS | {"getattr", "vars", "globals", "__builtins__"} else ""
        )
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := dotted(node.value, names)) else ""
    if isinstance(node, ast.Call):
        called, first = dotted(node.func, names), node.args[0] if node.args else None
        if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            return f"{dotted(node.args[0], names)}.{node.args[1].value}"
        if called in ("importlib.import_module", "__import__") and isinstance(first, ast.Constant):
            return str(first.value)
        if called in ("vars", "importlib.reload") and first is not None:
            return dotted(first, names)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        inner = dotted(node.value, names)
        return f"{inner}.{node.slice.value}" if inner else ""
    if isinstance(node, ast.Attribute | ast.Subscript):
        return dotted(node.value, names)
    return ""


def is_text(node: ast.AST) -> bool:
    """Whether an expression is a string, however put together."""
    joined = isinstance(node, ast.BinOp) and (is_text(node.left) or is_text(node.right))
    method = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "format")
    )
    return (
        isinstance(node, ast.JoinedStr)
        or joined
        or method
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )


def is_true(node: ast.AST) -> bool:
    return not (isinstance(node, ast.Constant) and not node.value)


def faults(source: str, *, by_name: bool = False) -> Iterator[str]:
    """What of a module turns text into code."""
    tree = ast.parse(source)
    names = names_of(tree)
    for name in names.values():
        if name.partition(".")[0] in MODULES or name in CALLS or any(name.startswith(f"{call}.") for call in CALLS):
            yield f"imports {name}"
    for node in ast.walk(tree):
        said = dotted(node, names) if isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript) else ""
        said = said.removeprefix("builtins.").removeprefix("__builtins__.")
        if (
            said in BUILTINS
            or said in CALLS
            or said.partition(".")[0] in MODULES
            or any(said.startswith(f"{c}.") for c in CALLS)
        ):
            yield f"line {node.lineno}: {said}"
        if isinstance(node, ast.Dict):
            pairs = {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            if any(name in pairs and is_true(pairs[name]) for name in ("shell", "trust_remote_code", "allow_pickle")):
                yield f"line {node.lineno}: a mapping that switches it on"
        if isinstance(node, ast.Call):
            yield from of_call(node, dotted(node.func, names), by_name=by_name)


def of_call(node: ast.Call, called: str, *, by_name: bool) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    for name in ("shell", "trust_remote_code", "allow_pickle"):
        if name in given and is_true(given[name]):
            yield f"line {node.lineno}: {name}={ast.unparse(given[name])}"
    if called in STARTERS and node.args and is_text(node.args[0]):
        yield f"line {node.lineno}: {called} with text"
    if called == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
        yield f"line {node.lineno}: torch.load without weights_only"
    if called == "importlib.import_module" and not by_name and not isinstance(node.args[0], ast.Constant):
        yield f"line {node.lineno}: import by a name that is not written there"
    if called.startswith("runpy.") and not by_name:
        yield f"line {node.lineno}: {called}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("recv", "send") and "Connection" in called:
        yield f"line {node.lineno}: pickles over a pipe"


BOMBS = (ROOT / "tests/faults/checkpoints.py", ROOT / "tests/faults/models.py")


@pytest.mark.parametrize("path", [*FILES, *HELPERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_becomes_code(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"), by_name=str(path.relative_to(ROOT)) in BY_NAME)
    bombs = path in BOMBS  # they write a pickle, to see that nobody reads it
    assert [fault for fault in found if not (bombs and "pickle" in fault)] == []


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_evaluates_a_variable(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        assert not {"eval", "source"} & set(words) and 'bash -c "$' not in line and "curl" not in words, line


FOUND = """
eval('1')
e = eval; e('1')
map(exec, [])
import builtins as b; b.exec('')
vars(__builtins__)['eval']
import pickle
from pickle import loads as x
import importlib as i; i.import_module('pickle').loads(b'')
import os as o; o.system('x')
from os import popen as p; p('x')
import os; getattr(os, 'system')('x')
import os; f = os.system; g = f; g('x')
import os; vars(os)['system']('x')
os = __import__('os')
import yaml; yaml.load(x, Loader=yaml.SafeLoader)
from yaml import unsafe_load
from torch import load; load('x')
import torch as t; t.load('x', weights_only=False)
import torch; torch.load('x', weights_only=w)
import subprocess; subprocess.run('ls')
from subprocess import run as r; r(f'ls {x}', check=True)
import subprocess; subprocess.run(['x'], shell=True)
import subprocess; subprocess.run(['x'], **{'shell': 1})
import subprocess as s; s.Popen(' '.join(x))
import subprocess; subprocess.getoutput('x')
f(trust_remote_code=x)
import importlib; importlib.import_module(name)
import runpy; runpy.run_path(x)
import numpy; numpy.load(x, allow_pickle=True)
from sympy import sympify
from sympy.parsing.latex import parse_latex
import asyncio; asyncio.create_subprocess_shell(x)
"""
HARMLESS = """
model.eval()
import torch; torch.load(x, weights_only=True)
import re; re.compile('x')
f(trust_remote_code=False)
import subprocess; subprocess.run(['git', x], check=True)
import importlib; importlib.import_module('eaft_verl.cli')
import yaml; yaml.safe_load(x)
from importlib.metadata import version
import os; os.environ['system']
"""


@pytest.mark.parametrize("source", FOUND.strip().splitlines())
def test_what_is_found(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize("source", HARMLESS.strip().splitlines())
def test_what_is_harmless(source: str) -> None:
    assert list(faults(source)) == []
