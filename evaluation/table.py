"""Results as lines of text, for the terminal."""

import math

from .scores import MODEL, is_detection


# The scores shown first, and whether more is better.
HEADLINES = {True: ("f1", "balanced_accuracy", "roc_auc"), False: ("mae", "mae_nonzero", "icc31", "ccc")}
LESS_IS_BETTER = ("mae", "mae_nonzero", "mse")
NAMES = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
    "mae": "MAE",
    "mae_nonzero": "MAE, non-zero",
    "mse": "MSE",
    "pearson": "Pearson",
    "ccc": "CCC",
    "icc31": "ICC(3,1)",
    "icc21": "ICC(2,1)",
}


def number(value: float | None, digits: int = 3) -> str:
    """A score as people read it.

    >>> number(0.61549), number(float("nan"))
    ('0.615', '-')
    """
    return (
        "-" if value is None or math.isnan(value) else f"{round(value, digits) + 0:.{digits}f}"
    )  # + 0: no minus zero


def with_interval(entry: dict, digits: int = 3) -> str:
    """A score with its 95 % interval, where it has one."""
    low, high = entry["low"], entry["high"]
    known = low is not None and not math.isnan(low)
    span = f" [{number(low, digits)},\N{NO-BREAK SPACE}{number(high, digits)}]" if known else ""
    return number(entry["value"], digits) + span


def columns(lines: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first column to the left, the others to the right."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def task_table(task: str, result: dict) -> str:
    """The means of all rows with intervals, then each Action Unit's headline score for every row."""
    names, rows = HEADLINES[is_detection(task)], result["rows"]
    means = [["mean", *(NAMES[name] for name in names)]]
    means += [[row, *(with_interval(scores["mean"][name]) for name in names)] for row, scores in rows.items()]
    means += [[*cells, *[""] * (len(names) - 1)] for cells in published(result)]
    main = names[0]
    per_unit = [
        ["", "labels above 0", *(f"{NAMES[main]} {row}" for row in rows), *(NAMES[name] for name in names[1:])]
    ]
    for unit in result["action_units"]:
        scores = {row: rows[row]["action_units"][unit] for row in rows}
        cells = [scores[row][main] for row in rows] + [scores[MODEL][name] for name in names[1:]]
        per_unit.append([unit, number(result["base_rate"][unit]), *(number(cell["value"]) for cell in cells)])
    head = (
        f"{task}: {result['samples']} pictures of {result['subjects']} people, {len(result['action_units'])} Action "
        f"Units; 95 % intervals over people"
    )
    words = (*known_errors(result), *remarks(rows[MODEL]), *verdicts(result))
    return "\n".join([head, "", columns(means), "", columns(per_unit), *words])


def published(result: dict) -> list[list[str]]:
    """Name and mean of the paper's rows; of how many units, where it has not all that are scored here."""
    count = len(result["action_units"])
    return [
        [
            f"{row['method']}, published"
            + ("" if len(row["action_units"]) == count else f", {len(row['action_units'])} units"),
            number(row["mean"]),
        ]
        for row in result["published"]
    ]


def known_errors(result: dict) -> list[str]:
    """What is wrong with the paper's rows, a line for each that something is wrong with."""
    return [
        f"{row['method']}, published as {number(row['printed'])}: {row['note']}."
        for row in result["published"]
        if row["note"]
    ]


def remarks(row: dict) -> list[str]:
    """What to know about scores set by convention, one line for all units that share it."""
    units = {}
    for unit, note in row["degenerate"].items():
        units.setdefault(note, []).append(unit)
    everyone = len(row["action_units"])
    return [
        f"{f'all {everyone} units' if len(codes) == everyone else ', '.join(codes)}: {note}."
        for note, codes in units.items()
    ]


def interval_cells(result: dict) -> list[list[str]]:
    """Of the intervals beside answers, for the lowest answer and then for all others: how many there are, the share of
    labels that they hold, and their mean width.

    Args:
        result (`dict`): A task's entry of `results.json`, with intervals.
    """
    kinds = (result["calibration"]["intervals"][name] for name in ("lowest", "more"))
    return [[str(kind["answers"]), number(kind["holds"]), number(kind["width"])] for kind in kinds]


def verdicts(result: dict) -> list[str]:
    """Which of our rows and the rows of other models is better, in words, one line for each pair.

    Args:
        result (`dict`): A task's entry of `results.json`.
    """
    lines = []
    for pair in result["comparisons"]:
        low, high = pair["low"], pair["high"]
        ours, other = (
            f"{pair[who]} ({number(pair[value])})" for who, value in (("ours", "first"), ("other", "second"))
        )
        if not (low > 0 or high < 0):  # NaN, too: a few people tell nothing of others
            words = f"{ours} and {other} are not clearly apart"
        elif (low > 0) != (pair["metric"] in LESS_IS_BETTER):
            words = f"{ours} is better than {other}"
        else:
            words = f"{other} is better than {ours}"
        span = with_interval(pair | {"value": pair["difference"]}, 4)
        lines.append(f"Mean {NAMES[pair['metric']]}: {words}; difference {span}.")
    return lines
