"""Pictures of result files. matplotlib is imported where it is needed: it comes with the ``bench`` extra alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Told apart by those who see colours otherwise, and in print: Paul Tol's muted scheme, then its greys.
COLOURS = (
    "#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#bbbbbb",
    "#dddddd", "#555555",
)  # fmt: skip
INK, FAINT = "#333333", "#dddddd"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure and its axes, ``width`` by ``height`` inches, without a frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """Write a picture that is the same file for the same figures."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "recbole-ssm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def stacked_bars(path: Path, title: str, groups: dict[str, dict[str, float]], xlabel: str) -> None:
    """Draw a horizontal bar a group, first group on top, its parts end to end; a part has one colour in all groups.

    Args:
        path: picture, of the kind that its suffix names.
        title: what is seen.
        groups: each bar's parts and their lengths, by the bar's name.
        xlabel: what the lengths are.
    """
    parts = list(dict.fromkeys(part for group in groups.values() for part in group))
    figure, axes = _figure(9, 1.6 + 0.42 * len(groups))
    names = list(groups)
    left = [0.0] * len(names)
    for number, part in enumerate(parts):
        widths = [max(0.0, groups[name].get(part, 0.0)) for name in names]
        axes.barh(names, widths, 0.7, left, label=part, color=COLOURS[number % len(COLOURS)], linewidth=0)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, row), (4, 0), textcoords="offset points", va="center", size=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, size=9)
    figure.suptitle(title, color=INK, size=10)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, path)


def lines(
    path: Path,
    title: str,
    series: dict[str, list[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    logx: bool = True,
    logy: bool = True,
    dashed: Sequence[str] = (),
    xnames: dict[float, str] | None = None,
    ticks: bool = True,
) -> None:
    """Draw a line a series.

    Args:
        path: picture, of the kind that its suffix names.
        title: what is seen.
        series: each line's points ``(x, y)``, by its name.
        xlabel: what ``x`` is.
        ylabel: what ``y`` is.
        logx: whether ``x`` has a logarithmic scale.
        logy: whether ``y`` has one.
        dashed: names of the series that others are compared with.
        xnames: what stands at a place on the axis instead of its number.
        ticks: whether every ``x`` is marked, on its line and on the axis.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axes = _figure(8, 4.5)
    for number, (name, points) in enumerate(series.items()):
        style = {"marker": "o" if ticks else "", "color": COLOURS[2 * number % len(COLOURS)]}
        if name in dashed:
            style = {"linestyle": "--", "color": INK}
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)
    axes.set_xscale("log" if logx else "linear")
    if logy:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    places = sorted({x for points in series.values() for x, _ in points})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if ticks:
        axes.set_xticks(places, None if xnames is None else [xnames[place] for place in places])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, size=9)
    axes.set_ylabel(ylabel, color=INK, size=9)
    figure.suptitle(title, color=INK, size=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, path)


def bars(path: Path, title: str, values: dict[str, float], xlabel: str, log: bool = False) -> None:
    """Draw a horizontal bar a value, first one on top.

    Args:
        path: picture, of the kind that its suffix names.
        title: what is seen.
        values: the bars' lengths, by their names.
        xlabel: what the lengths are.
        log: whether they have a logarithmic scale, which begins at half the least of them.
    """
    figure, axes = _figure(9, 1.2 + 0.42 * len(values))
    axes.barh(list(values), list(values.values()), 0.7, color=COLOURS[2], linewidth=0)
    for row, value in enumerate(values.values()):
        axes.annotate(
            f"{value:,.0f}", (value, row), (4, 0), textcoords="offset points", va="center", size=9, color=INK
        )  # fmt: skip
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(values.values()) / 2, 2 * max(values.values()))
    else:
        axes.margins(x=0.1)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, size=9)
    figure.suptitle(title, color=INK, size=10)
    _save(figure, path)


def dots(path: Path, title: str, values: dict[str, tuple[float, float | None]], xlabel: str) -> None:
    """Draw a dot a value, first one on top, with a bar of its deviation to both sides where it has one.

    Args:
        path: picture, of the kind that its suffix names.
        title: what is seen.
        values: mean and deviation, by name.
        xlabel: what they are.
    """
    figure, axes = _figure(9, 1.2 + 0.32 * len(values))
    for row, (name, (middle, deviation)) in enumerate(values.items()):
        axes.errorbar([middle], [name], xerr=[deviation or 0.0], fmt="o", color=COLOURS[2], capsize=4)
        note = f"{middle:.4f}".removeprefix("0")
        axes.annotate(note, (middle, row), (0, 6), textcoords="offset points", ha="center", size=8, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.1)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel(xlabel, color=INK, size=9)
    figure.suptitle(title, color=INK, size=10)
    _save(figure, path)
