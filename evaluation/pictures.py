"""The report's pictures, as small SVG drawings.

Colours are Okabe and Ito's (2008), which people with any kind of colour vision tell apart, and no meaning rests on
colour alone. Every function takes a task's entry of `results.json`, or its answers, and gives SVG text.
"""

from io import StringIO
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from au_llava.action_units import CATALOGUE, get_task

from .answers import Answers
from .calibration import nearest
from .scores import answered_row
from .table import NAMES


BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a9099", "#1a1a1a"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "au-llava",  # the same drawing gives the same bytes
}
_OTHERS = (("|", ORANGE), ("x", INK), ("^", "#CC79A7"), ("v", "#E69F00"))  # expected values, calibrated, other models
_BASELINES = {
    "always positive": ("s", ORANGE),
    "predict the mean": ("s", ORANGE),
    "majority": ("D", GREEN),
    "always zero": ("D", GREEN),
}


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return text.getvalue()


def bars(result: dict, metric: str) -> str:
    """A bar for each Action Unit with its 95 % interval, beside the baselines on the same labels.

    Args:
        result (`dict`): A task's entry of `results.json`.
        metric (`str`): `f1`, `mae`, `icc31`, ...
    """
    units, rows = result["action_units"], result["rows"]
    own = answered_row(rows)
    places = np.arange(len(units) + 1)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.24 * len(units) + 1.2))
        axes = figure.subplots()
        others = cycle(_OTHERS)
        for row, scores in rows.items():
            entries = [scores["mean"][metric]] + [scores["action_units"][unit][metric] for unit in units]
            values, low, high = (
                np.array([_number(entry[key]) for entry in entries]) for key in ("value", "low", "high")
            )
            if row == own:
                axes.barh(places[1:], values[1:], color=BLUE, height=0.62, label=own)
                axes.barh(places[:1], values[:1], color=INK, height=0.62)
                axes.hlines(places, low, high, color=GREY, linewidth=3, alpha=0.85)
            elif row in _BASELINES:
                marker, colour = _BASELINES[row]
                axes.plot(values, places, marker, color=colour, mfc="white", ms=5, mew=1.4, ls="", label=row)
            else:
                marker, colour = next(others)
                axes.plot(values, places, marker, color=colour, ms=11 if marker == "|" else 5, mew=2, ls="", label=row)
        axes.set_yticks(places, ["mean", *(_name(unit) for unit in units)])
        axes.set_ylim(len(units) + 0.6, -0.6)
        axes.set_xlabel(NAMES[metric] + " (line: 95 % interval over people)")
        axes.grid(axis="x", color="#e3e6ea", zorder=0)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: labels[place] != own)
        axes.legend([handles[place] for place in order], [labels[place] for place in order],
                    loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)  # fmt: skip
        return _svg(figure)


def reliability_diagram(calibration: dict) -> str:
    """Stated probability against observed frequency, before and after; a dot's area is its share of the answers."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.9, 3.5))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
        states = [("before", BLUE, "o", "as the model gives them"), ("after", ORANGE, "s", "calibrated")]
        for state, colour, marker, label in states:
            found = calibration[state]
            if found is None:
                continue
            mean, frequency, count = np.array(found["bins"]).T
            axes.plot(mean, frequency, color=colour, linewidth=1.2)
            axes.scatter(mean, frequency, s=8 + 160 * count / count.sum(), marker=marker, color=colour,
                         edgecolor="white", zorder=3, label=f"{label}: ECE {found['ece']:.3f}")  # fmt: skip
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="stated probability", ylabel="observed frequency")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.05, 1.0), frameon=False, fontsize=8, markerscale=0.8)
        return _svg(figure)


def confusion(answers: Answers) -> str:
    """For each Action Unit, how the true levels (rows) were answered (columns), in percent of the row."""
    units, levels = answers.action_units, len(get_task(answers.task).values)
    columns = 4
    lines = -(-len(units) // columns)
    with matplotlib.rc_context(_STYLE | {"font.size": 7}):
        figure = Figure(figsize=(2.2 * columns, 1.7 * lines))
        grid = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.45, "wspace": 0.75})
        for axes in grid.flat[len(units) :]:
            axes.set_axis_off()
        for place, (axes, unit) in enumerate(zip(grid.flat, units, strict=False)):
            seen = ~np.isnan(answers.labels[:, place])
            truth = nearest(answers.labels[seen, place], answers.task)
            table = np.zeros((levels, levels))
            np.add.at(table, (truth, nearest(answers.values[seen, place], answers.task)), 1)
            count = table.sum(1)
            share = table / np.maximum(count, 1)[:, None]
            axes.imshow(share, cmap="Blues", vmin=0, vmax=1.2)  # black or white words can be read on all of it
            for row, column in np.ndindex(levels, levels):
                if share[row, column] >= 0.005:
                    tone = "black" if share[row, column] < 0.7 else "white"
                    axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", color=tone)
            axes.set_title(unit, fontsize=8)
            axes.set_xticks(range(levels))
            axes.set_yticks(range(levels), [f"{level} (n={count[level]:.0f})" for level in range(levels)])
        figure.supxlabel("answered level", fontsize=8, y=0.03)
        figure.supylabel("true level", fontsize=8, x=0.03)
        return _svg(figure)


def densities(answers: Answers) -> str:
    """For each Action Unit, where true (across) and answered (up) intensities fall; darker is more."""
    units, top = answers.action_units, get_task(answers.task).values[-1]
    columns = 6
    lines = -(-len(units) // columns)
    with matplotlib.rc_context(_STYLE | {"font.size": 7}):
        figure = Figure(figsize=(1.25 * columns, 1.35 * lines))
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(units) :]:
            axes.set_axis_off()
        for place, (axes, unit) in enumerate(zip(grid.flat, units, strict=False)):
            seen = ~np.isnan(answers.labels[:, place])
            edges = np.linspace(0, top, 11)
            counts, _, _ = np.histogram2d(
                answers.labels[seen, place], answers.values[seen, place], bins=(edges, edges)
            )
            shade = np.log10(counts.T + 1)  # most labels are 0: on a plain scale nothing else would show
            axes.imshow(shade, cmap="Blues", origin="lower", extent=(0, top, 0, top))
            axes.plot([0, top], [0, top], color=ORANGE, linewidth=0.8)
            axes.set_title(unit, fontsize=7.5, pad=2)
            axes.set_xticks([0, top])
            axes.set_yticks([0, top])
        figure.supxlabel("true intensity", fontsize=8, y=0.04)
        figure.supylabel("answer", fontsize=8, x=0.07)
        return _svg(figure)


def robustness_curves(task: dict) -> str:
    """A score against the strength of each damage; the band is its 95 % interval.

    Args:
        task (`dict`): One task of [`robustness.curves`].
    """
    names = list(task["damages"])
    with matplotlib.rc_context(_STYLE | {"font.size": 7.5}):
        figure = Figure(figsize=(7.4, 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(2, 3, sharey=True).flat, names, strict=True):
            damage = task["damages"][name]
            value, low, high = (
                np.array([_number(entry[key]) for entry in (task["clean"], *damage["scores"])])
                for key in ("value", "low", "high")
            )
            places = np.arange(len(value))
            axes.fill_between(places, low, high, color=BLUE, alpha=0.2, linewidth=0)
            axes.plot(places, value, "o-", color=BLUE, ms=4)
            axes.axhline(value[0], color=GREY, linewidth=1, linestyle="--")
            axes.set_xticks(places, ["as is", *(f"{strength:g}" for strength in damage["strengths"])])
            axes.set_title(f"{name} ({damage['unit']})", fontsize=7.5)
            axes.set_ylim(bottom=0)
        figure.supylabel(NAMES[task["metric"]], fontsize=8)
        return _svg(figure)


def _name(unit: str) -> str:
    """`AU12 Lip Corner Puller`; units of a user's own have only their code here."""
    return f"{unit} {CATALOGUE[unit].name}" if unit in CATALOGUE else unit


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
