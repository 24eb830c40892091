"""What holds for the project as a whole."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import django_async_smtp

PACKAGE = Path(django_async_smtp.__file__).parent
ROOT = Path(__file__).parent.parent

# From top to bottom: a module imports only what stands below it.
ORDER = [
    "__init__",
    "apps",
    "checks",
    "mail",
    "backend",
    "mailing",
    "dispatch",
    "delivery",
    "loop",
    "pool",
    "diagnosis",
    "session",
    "opening",
    "pipelining",
    "envelope",
    "policy",
    "tls",
    "options",
    "signals",
    "logs",
    "hints",
    "errors",
]


def files(module: str) -> list[Path]:
    """Return the files of a module, or of a package."""
    package = PACKAGE / module
    return sorted(package.glob("*.py")) or [PACKAGE / f"{module}.py"]


def imports(module: str, *, level: int) -> set[str]:
    """Return what a module imports when it runs, relative ones by level."""
    # From within a package, the others are one level further up.
    up = level + (PACKAGE / module).is_dir() if level else 0
    return set().union(*(imports_of(path, level=up) for path in files(module)))


def imports_of(path: Path, *, level: int) -> set[str]:
    """Return what a file imports when it runs, relative ones by level."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.Import) and not level:
            found |= {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in found}


def test_the_order_names_every_module() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    # What Django looks for by name.
    packages.remove("management")
    assert {path.stem for path in PACKAGE.glob("*.py")} | packages == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module: str) -> None:
    below = ORDER[ORDER.index(module) + 1 :]
    assert imports(module, level=1) <= set(below)


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "logs",
        "tls",
        "pipelining",
        "hints",
        "opening",
        "diagnosis",
        "session",
        "pool",
        "loop",
    ],
)
def test_what_speaks_smtp_imports_no_django(module: str) -> None:
    assert "django" not in imports(module, level=0)


def test_the_version_stands_in_one_place() -> None:
    installed = importlib.metadata.version("django-async-smtp")
    assert installed == django_async_smtp.__version__


def test_the_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="for the matrix")
def test_the_matrix_tests_the_installed_package() -> None:
    assert ROOT not in PACKAGE.parents


def test_the_demo_runs() -> None:
    demo = subprocess.run(
        [sys.executable, "example_project/demo.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    assert "All 23 messages arrived" in demo.stdout
