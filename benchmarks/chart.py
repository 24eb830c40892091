"""Draws the chart of the README: the backends over distance, and over recipients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from .measure import Point

# Backend -> its label and colour (Okabe and Ito: told apart by the colour-blind, too).
LINES: Final = {
    "ours": ("django-async-smtp", "#0072b2"),
    "nodemailer": ("nodemailer's pool", "#009e73"),
    "Django": ("Django's backend", "#d55e00"),
}


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw both charts into one SVG."""
    # Without a date and random ids, the same figures give the same file.
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    figure = Figure(figsize=(10, 4), layout="constrained")
    distance, recipients = figure.subplots(1, 2)
    lines(distance, [point for point in points if point.chart == "round trips"])
    distance.set_title("One send_messages() of many, by distance")
    distance.set_xlabel("round trip to the server, ms")
    lines(recipients, [point for point in points if point.chart == "recipients"])
    recipients.set_title("One message after another, 20 ms, by recipients")
    recipients.set_xlabel("recipients of a message")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def lines(axes: Any, points: Sequence[Point]) -> None:
    """Draw a line a backend; the values of x stand at equal distances."""
    places = range(len(points))
    for backend, (label, colour) in LINES.items():
        if backend in points[0].rates:
            rates = [point.rates[backend] for point in points]
            axes.plot(places, rates, marker="o", label=label, color=colour)
    axes.set_xticks(places, [f"{point.x:g}" for point in points])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel("messages/s")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
