"""Runs all cases, or those named: python -m benchmarks [CASE ...]; see `make bench`."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import django

from .cases import CASES
from .lab import Lab, smtp_sink
from .measure import HEAD, Point, Result, as_json, table

# What the chart shows; other points are in tables only.
DRAWN: Final = {"round trips", "recipients"}


def main() -> int:
    """Return the exit status: 1 where a bound is not met."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--tiny", action="store_true", help="only see that they run")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--chart", type=Path, help="where to draw both charts")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CASES)}")
    # Ended by it, too, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = run(arguments.cases or list(CASES), is_tiny=arguments.tiny)
    print_tables(results)
    if arguments.json:
        write(arguments.json, results)
    points = [
        result
        for result in results
        if isinstance(result, Point) and result.chart in DRAWN
    ]
    if arguments.chart and {point.chart for point in points} == DRAWN:
        from .chart import draw

        draw(points, arguments.chart)
    return 0 if arguments.tiny or all(result.is_met for result in results) else 1


def run(names: list[str], *, is_tiny: bool) -> list[Result]:
    results: list[Result] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with Lab(is_tiny=is_tiny) as lab:
            results += CASES[name](lab)
    return results


def versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "Django": django.__version__,
        "server": "smtp-sink" if smtp_sink() else "benchmarks/server.py",
    }


def print_tables(results: list[Result]) -> None:
    print(", ".join(" ".join(item) for item in versions().items()), end="\n\n")
    if django.VERSION < (6, 1):
        print("The bounds are those of Django 6.1.", end="\n\n")
    bounded = [result.cells() for result in results if not isinstance(result, Point)]
    if bounded:
        print(table([HEAD, *bounded]), end="\n\n")
    points = (result for result in results if isinstance(result, Point))
    for _, chart in groupby(points, lambda point: point.chart):
        first, *rest = chart
        rows = [first.head(), first.cells(), *(point.cells() for point in rest)]
        print(table(rows), end="\n\n")


def write(path: Path, results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {**versions(), "results": [*map(as_json, results)]}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
