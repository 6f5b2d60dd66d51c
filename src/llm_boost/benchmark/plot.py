"""A picture of a run: the roofline with every test on it, and the speeds as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")  # a file, whatever display there is

from matplotlib import pyplot as plt

from llm_boost.benchmark.latency import Result
from llm_boost.benchmark.limits import Limits

GIGA = 1e9


def draw(path: Path, title: str, results: Sequence[Result], limits: Limits) -> None:
    """Writes a PNG. Roofline: Williams et al., 2009, https://doi.org/10.1145/1498765.1498785."""
    figure, (roofline, bars) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    figure.suptitle(f"{title}, {limits.threads} threads")
    _roofline(roofline, results, limits)
    _bars(bars, results)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def _roofline(axes: Any, results: Sequence[Result], limits: Limits) -> None:
    intensities = [r.operations_per_second / r.bytes_per_second for r in results]
    x = np.geomspace(min([0.5, *intensities]) / 2, max([1000.0, *intensities]) * 2, 200)
    for kind, rate in limits.dot_rates.items():
        axes.plot(x, np.minimum(x * limits.bandwidth, rate) / GIGA, lw=1, label=f"limit, {kind} dots")
    for dtype in dict.fromkeys(r.subject.dtype for r in results):
        own = [(i, r) for i, r in zip(intensities, results, strict=True) if r.subject.dtype == dtype]
        axes.plot([i for i, _ in own], [r.operations_per_second / GIGA for _, r in own], "o", label=dtype)
        for intensity, result in own:
            place = (intensity, result.operations_per_second / GIGA)
            axes.annotate(result.case.name, place, fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="GOP/s", title="Roofline")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _bars(axes: Any, results: Sequence[Result]) -> None:
    tests = list(dict.fromkeys(r.case.name for r in results))
    dtypes = list(dict.fromkeys(r.subject.dtype for r in results))
    height = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        own = [r for r in results if r.subject.dtype == dtype]
        places = [tests.index(r.case.name) + (number + 0.5) * height - 0.4 for r in own]
        means = [float(np.mean(r.tokens_per_second)) for r in own]
        spread = [float(np.std(r.tokens_per_second)) for r in own]
        drawn = axes.barh(places, means, height, xerr=spread, label=dtype)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7, padding=3)
    axes.set(xlabel="tokens/s", title="Speed", yticks=range(len(tests)), yticklabels=tests)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend(fontsize=8)
