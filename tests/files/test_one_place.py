"""Plumbing stands once, in `vipllava/files/`: nobody else renames, locks or starts pools."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vipllava"
MODULES = {"fcntl", "filelock"}
NAMES = {"ProcessPoolExecutor", "ThreadPoolExecutor", "Pool", "ThreadPool", "flock", "lockf"}
ALLOWED = {
    # One thread that writes checkpoints beside training: no list of jobs, and the next one waits.
    ("training/checkpointing.py", "ThreadPoolExecutor"),
}


def plumbing(tree: ast.AST) -> Iterator[str]:
    """Yield what a module does that belongs into `files/`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr == "rename" or (module, node.func.attr) == ("os", "replace"):
                yield node.func.attr
            # A text's `replace` takes two arguments, a path's one.
            elif node.func.attr == "replace" and len(node.args) == 1 and not node.keywords:
                yield "replace"


def found_outside_files() -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("files/"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {(name, what) for what in plumbing(tree)}
    return found


def test_plumbing_stands_in_files_only():
    assert found_outside_files() == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.replace(a, b)",
        "import os\nos.rename(a, b)",
        "path.rename(other)",
        "path.replace(other)",
        "import fcntl",
        "from filelock import FileLock",
        "from concurrent.futures import ProcessPoolExecutor as P\nProcessPoolExecutor(2)",
        "multiprocessing.Pool(2)",
        "futures.ThreadPoolExecutor(2)",
    ],
)
def test_the_search_finds_it(code: str):
    assert list(plumbing(ast.parse(code)))


@pytest.mark.parametrize("code", ["text.replace(a, b)", "replace(value, field=1)", "path.name"])
def test_the_search_leaves_other_things_alone(code: str):
    assert not list(plumbing(ast.parse(code)))
