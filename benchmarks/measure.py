"""What was measured, in pairs of one run, and whether it is within its bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

HEAD: Final = ("case", "against", "theirs", "ours", "ratio", "spread", "bound", "")


@dataclass(frozen=True)
class Comparison:
    """
    Messages/s of another and of ours, measured in turn.

    :ivar theirs: a rate for each pair.
    :ivar ours: a rate for each pair.
    :ivar at_least: the bound of the median of the pairs' ratios.
    """

    case: str
    against: str
    theirs: Sequence[float]
    ours: Sequence[float]
    at_least: float

    @property
    def ratios(self) -> list[float]:
        """Ours to theirs, for each pair."""
        return [our / their for our, their in zip(self.ours, self.theirs, strict=True)]

    @property
    def is_met(self) -> bool:
        return median(self.ratios) >= self.at_least

    def cells(self) -> tuple[str, ...]:
        ratios = self.ratios
        return (
            self.case,
            self.against,
            f"{number(median(self.theirs))}/s",
            f"{number(median(self.ours))}/s",
            f"{number(median(ratios))}×",
            f"{number(min(ratios))} to {number(max(ratios))}",
            f"≥ {self.at_least:g}×",
            "met" if self.is_met else "NOT MET",
        )


@dataclass(frozen=True)
class Limit:
    """
    Something of ours that must stay small.

    :ivar values: one for each run.
    :ivar below: the bound of their median.
    """

    case: str
    values: Sequence[float]
    unit: str
    below: float

    @property
    def is_met(self) -> bool:
        return median(self.values) < self.below

    def cells(self) -> tuple[str, ...]:
        return (
            self.case,
            "",
            "",
            f"{number(median(self.values))} {self.unit}",
            "",
            f"{number(min(self.values))} to {number(max(self.values))}",
            f"< {self.below:g} {self.unit}",
            "met" if self.is_met else "NOT MET",
        )


@dataclass(frozen=True)
class Point:
    """
    What a chart shows above one value of x.

    :ivar rates: messages/s by backend.
    """

    chart: str
    x: float
    rates: dict[str, float]

    @property
    def is_met(self) -> bool:
        """A point has no bound."""
        return True

    def head(self) -> tuple[str, ...]:
        return (self.chart, *self.rates)

    def cells(self) -> tuple[str, ...]:
        return (f"{self.x:g}", *(f"{number(rate)}/s" for rate in self.rates.values()))


Result = Comparison | Limit | Point


def in_turn(repeats: int, *runs: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """Return what each run gave, over all rounds; they take turns in each."""
    rounds = [tuple(run() for run in runs) for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


def number(value: float) -> str:
    """Return it with three digits, or all that it has before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as a table in Markdown, the first as its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(
        f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines
    )


def as_json(result: Result) -> dict[str, Any]:
    return {"kind": type(result).__name__, **asdict(result), "is_met": result.is_met}
