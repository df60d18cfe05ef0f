"""What setuptools runs when it builds the package: the commit it is built from goes into it, see `source.py`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

PACKAGE = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("source", Path(__file__).with_name("source.py"))
assert _SPEC is not None and _SPEC.loader is not None
SOURCE = importlib.util.module_from_spec(_SPEC)  # its own package is not installed yet
_SPEC.loader.exec_module(SOURCE)


def _leave_commit(tree: str) -> None:
    target = Path(tree) / PACKAGE.name / SOURCE.BUILT
    if target.parent.is_dir():
        target.unlink(missing_ok=True)  # a source distribution may hold it as a link to the checkout's
        target.write_text(json.dumps(SOURCE.commit(PACKAGE)), encoding="utf-8")


class BuildPy(build_py):
    """The package's files and the commit; an editable installation has its checkout."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        if not self.editable_mode:
            _leave_commit(self.build_lib)


class Sdist(sdist):
    """The source distribution, from which a wheel without a repository may be built."""

    def make_release_tree(self, base_dir: str, files: Any) -> None:
        """See setuptools."""
        super().make_release_tree(base_dir, files)
        _leave_commit(base_dir)
