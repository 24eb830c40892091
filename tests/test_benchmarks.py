"""The benchmarks run, in a tiny form; what they find is for `make bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.cases import CASES
from benchmarks.lab import Lab
from benchmarks.measure import Comparison, Limit, Point, Result, as_json, table


def run(name: str) -> list[Result]:
    with Lab(is_tiny=True) as lab:
        return list(CASES[name](lab))


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[list[Result]]]]:
    """All of them at once: they spend their time on starting processes."""
    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(run, name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs(name: str, runs: dict[str, Future[list[Result]]]) -> None:
    results = runs[name].result()
    assert results
    for result in results:
        assert json.dumps(as_json(result))
        assert len(table([result.cells()]).splitlines()) == 2


def test_a_bound_is_for_the_median_of_the_ratios() -> None:
    theirs, ours = [1.0, 10.0, 100.0], [3.0, 20.0, 100.0]
    assert Comparison("", "", theirs, ours, at_least=2).is_met
    assert not Comparison("", "", theirs, ours, at_least=2.1).is_met


def test_a_limit_is_not_reached() -> None:
    assert Limit("", [1, 2, 90], "ms", below=3).is_met
    assert not Limit("", [1, 3, 90], "ms", below=3).is_met


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.chart import draw

    charts = "round trips", "recipients"
    rates = {"Django": 10.0, "ours": 200.0}
    path = tmp_path / "docs" / "chart.svg"
    draw([Point(chart, x, rates) for chart in charts for x in (1, 10)], path)
    assert "<svg" in path.read_text()
