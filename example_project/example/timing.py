"""How long stages took, as the spans of a chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """
    A stage's bar.

    :ivar start: where it begins, in percent of the whole.
    :ivar width: its length, in percent.
    """

    stage: str
    milliseconds: float
    start: float
    width: float


def spans(stages: Mapping[str, float]) -> list[Span]:
    """Return the stages' bars, each beginning where the one before ends."""
    whole = sum(stages.values()) or 1.0
    found, passed = [], 0.0
    for stage, seconds in stages.items():
        start = 100 * passed / whole
        found.append(Span(stage, seconds * 1000, start, 100 * seconds / whole))
        passed += seconds
    return found
