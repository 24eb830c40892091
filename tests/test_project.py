"""What holds for the project as a whole."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import django
import pytest
from django.core.management import BaseCommand

import django_async_smtp
from django_async_smtp.management.commands import smtpcheck
from django_async_smtp.management.commands.smtpcheck import EXIT_STATUS

PACKAGE = Path(django_async_smtp.__file__).parent
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"

# From top to bottom: a module imports only what stands below it.
ORDER = [
    "__init__",
    "apps",
    "checks",
    "mail",
    "tasks",
    "backend",
    "mailing",
    "dispatch",
    "delivery",
    "loop",
    "callers",
    "pool",
    "diagnosis",
    "session",
    "opening",
    "pipelining",
    "envelope",
    "policy",
    "tls",
    "options",
    "fleet",
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
    assert " passed" in demo.stdout.partition("What the server received")[0]
    assert "All 23 messages arrived" in demo.stdout


def without_times(text: str) -> str:
    """Return what smtpcheck wrote, but for what each run measures anew."""
    return re.sub(r" +\d+ ms\b.*", "", text)


def test_the_readme_has_the_exit_statuses() -> None:
    _, _, section = README.partition("| exit status |")
    table, _, _ = section.partition("\n\n")
    rows = re.findall(r"^\| (\d+) \| `(\w+)`", table, re.M)
    assert {stage: int(status) for status, stage in rows} == EXIT_STATUS


def test_the_readme_has_every_option_of_smtpcheck() -> None:
    parser = smtpcheck.Command().create_parser("manage.py", "smtpcheck")
    base = BaseCommand().create_parser("manage.py", "smtpcheck")
    django_has = {flag for action in base._actions for flag in action.option_strings}
    for action in parser._actions:
        for flag in set(action.option_strings) - django_has:
            assert re.search(rf"^\|.*`{flag}\b.*\|.*\|$", README, re.M), flag


def test_the_readme_shows_what_was_captured() -> None:
    text = (DOCS / "smtpcheck.txt").read_text()
    assert textwrap.indent(text, "    ") in README
    assert "](docs/smtpcheck.svg)" in README


def test_the_picture_needs_nothing_else() -> None:
    picture = (DOCS / "smtpcheck.svg").read_text()
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in picture
    assert "127.0.0.1" not in picture


@pytest.mark.parametrize("name", ["settings.png", "race.png"])
def test_the_readme_shows_the_example(name: str) -> None:
    assert f'src="docs/{name}"' in README
    assert (DOCS / name).stat().st_size < 60_000


@pytest.mark.skipif(django.VERSION >= (6, 1), reason="it was captured with EMAIL_*")
def test_the_captured_run_is_still_what_smtpcheck_says(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    subprocess.run(
        [sys.executable, "-m", "docs.smtpcheck_picture", str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=50,
    )
    now = (tmp_path / "smtpcheck.txt").read_text()
    assert without_times(now) == without_times((DOCS / "smtpcheck.txt").read_text())
    assert (tmp_path / "smtpcheck.svg").read_text().startswith("<svg ")
