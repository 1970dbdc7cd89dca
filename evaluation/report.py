"""`report.html`: one file with tables, pictures and the protocol in words, that needs nothing beside it."""

import base64
import os
import re
from html import escape
from pathlib import Path

from . import faces, pictures
from .answers import Answers
from .calibration import apply_folds, fitted_to, temperatures_in_words
from .data import EvaluationSet
from .scores import CALIBRATED, MODEL, OURS, answered_row, is_detection
from .table import HEADLINES, NAMES, interval_cells, number, remarks, verdicts, with_interval


FACES = "Best and worst answers of each Action Unit"  # above the pictures of people
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%s</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid #ccd;font-size:1.3rem}h3{font-size:1.05rem}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
td,th{font-size:.9rem;padding:.2rem .55rem;text-align:right;border-bottom:1px solid #e3e6ea;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal;max-width:13rem}
tr.ours td{font-weight:600;background:#eef5fb}
img{max-width:100%%;height:auto}.note{color:#555;font-size:.9rem}pre{white-space:pre-wrap;background:#f5f6f8;padding:.6rem}
td.why{text-align:left;white-space:normal;min-width:16rem;max-width:none}
table.intervals td+td{white-space:normal;max-width:8.5rem}
figure{margin:1rem 0}figcaption{color:#555;font-size:.9rem}
</style></head><body>
"""


def write_report(
    results: dict, answers: dict[str, Answers], output: str | Path, evaluation_set: EvaluationSet | None = None
) -> Path:
    """Write the report.

    Args:
        results (`dict`): From [`summarise`].
        answers (`dict[str, Answers]`): What was scored, by task.
        output: Folder to write to.
        evaluation_set ([`EvaluationSet`], *optional*): The pictures, for the best and worst faces.

    Returns:
        `Path`: `report.html`.
    """
    settings = results["settings"]
    title = f"AU-LLaVA on {settings['dataset']}"
    parts = [_HEAD % escape(title), f"<h1>{escape(title)}</h1>", _facts(results)]
    for task, result in results["tasks"].items():
        parts.append(_task(task, result, answers[task], results["protocol"], evaluation_set))
    if "robustness" in results:
        parts.append(_robustness(results["robustness"], results["protocol"]))
    if "formats" in results:
        parts.append(_formats(results["formats"], results["protocol"]))
    parts.append("</body></html>\n")
    path = Path(output) / "report.html"
    draft = path.with_suffix(".tmp")
    draft.write_text("\n".join(parts), encoding="utf-8")
    os.replace(draft, path)
    return path


def without_faces(html: str) -> str:
    """A report without the pictures of people in it.

    >>> without_faces(f"<h2>Detection</h2><details><summary>{FACES}</summary><img src='...'></details><p>none</p>")
    '<h2>Detection</h2><p>none</p>'
    """
    return re.sub(f"<details><summary>{FACES}</summary>.*?</details>", "", html, flags=re.DOTALL)


def _facts(results: dict) -> str:
    settings, versions = results["settings"], results["versions"]
    calibrated = any(result["calibration"]["fitted"] for result in results["tasks"].values())
    rows = [
        ("model", ", ".join(settings["models"])),
        (
            "answers",
            f"{settings['decision']} of each distribution, read-out {settings['readout']}"
            + "; pictures and the scores of each unit are of the calibrated answers" * calibrated,
        ),
        ("data", f"{settings['dataset']}, split {settings['split']}"),
        ("protocol", f"{settings['protocol']}: {results['protocol']}"),
        ("date", results["date"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    cells = "".join(f"<tr><td>{name}</td><td class=why>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table><pre>{escape(results['command'])}</pre>"


def _task(task: str, result: dict, answers: Answers, protocol: str, evaluation_set: EvaluationSet | None) -> str:
    detection = is_detection(task)
    main = "f1" if detection else "icc31"
    fitted = {int(fold): own for fold, own in result["calibration"]["fitted"].items()}
    answers = apply_folds(answers, fitted) if fitted else answers  # pictures show what users are answered
    parts = [
        f"<h2>{task.replace('_', ' ').capitalize()}</h2>",
        f"<p class=note>{result['samples']} pictures of {result['subjects']} people; {result['unknown']} unknown "
        f"labels left out. Protocol: {escape(protocol)}. Intervals: 95 %, from resampling people. Baselines are made "
        "of the very labels they are scored on, to their advantage.</p>",
        _means(task, result),
        *(f"<p class=note>{escape(line)}</p>" for line in remarks(result["rows"][answered_row(result["rows"])])),
        *(f"<p><strong>{escape(line)}</strong></p>" for line in verdicts(result)),
        _figure(pictures.bars(result, main), f"{NAMES[main]} of each Action Unit; black: their mean."),
    ]
    if not detection:
        parts.append(_figure(pictures.bars(result, "mae"), "MAE of each Action Unit; less is better."))
    parts += [_units(result), _published(result), _groups(task, result), _calibration(task, result)]
    if task == "intensity_level":
        parts.append(_figure(pictures.confusion(answers), "Share of each true level, in percent, by answered level."))
    if task == "intensity":
        parts.append(_figure(pictures.densities(answers), "True intensity across, answer up; darker is more faces."))
    if evaluation_set is not None:
        sheet = faces.sheet(answers, evaluation_set)
        parts.append(
            f"<details><summary>{FACES}</summary><img src='{sheet}' alt='faces with labels and answers'></details>"
        )
    return "\n".join(parts)


def _table(head: list[str], rows: list[tuple[list[str], bool]], reason: bool = False) -> str:
    """A table; rows marked as ours stand out. With `reason`, the last column is a sentence."""
    lines = ["<table class=intervals><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for cells, ours in rows:
        marks = ["" for _ in cells]
        if reason:
            marks[-1] = " class=why"
        cells = "".join(f"<td{mark}>{escape(cell)}</td>" for cell, mark in zip(cells, marks, strict=True))
        lines.append(f"<tr{' class=ours' if ours else ''}>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _means(task: str, result: dict) -> str:
    names = [*HEADLINES[is_detection(task)], *(() if is_detection(task) else ("pearson", "icc21"))]
    if is_detection(task):
        names += ["average_precision", "accuracy"]
    rows, folds = result["rows"], result["folds"]
    lines = [
        ([row, *(with_interval(scores["mean"][name]) for name in names)], row in OURS) for row, scores in rows.items()
    ]
    table = _table(["mean over Action Units", *(NAMES[name] for name in names)], lines)
    if len(folds) == 1:
        return table
    extra = [
        ([row, *(f"{number(scores['pooled'][name])} (sd {number(scores['spread'][name])})" for name in names)], False)
        for row, scores in rows.items()
    ]
    return table + _table(["all folds pooled (spread of the folds)", *(NAMES[name] for name in names)], extra)


def _units(result: dict) -> str:
    names = list(result["rows"][MODEL]["mean"])
    row = answered_row(result["rows"])
    scores = result["rows"][row]["action_units"]
    lines = [
        ([unit, number(result["base_rate"][unit]), *(number(scores[unit][name]["value"]) for name in names)], False)
        for unit in result["action_units"]
    ]
    table = _table(["Action Unit", "labels above 0", *(NAMES[name] for name in names)], lines)
    return f"<details><summary>All scores of each Action Unit, {escape(row)}</summary>{table}</details>"


def _published(result: dict) -> str:
    if not result["published"]:
        return ""
    metric = result["published"][0]["metric"]
    units = list(result["published"][0]["action_units"])
    row = answered_row(result["rows"])
    ours = result["rows"][row]["action_units"]
    values = [ours[unit][metric]["value"] for unit in units]
    lines = [
        ([f"{row}, this evaluation", number(sum(values) / len(values)), "", *(map(number, values)), ""], True),
        *(
            ([row["method"], number(row["mean"]), number(row["printed"]), *map(number, row["action_units"].values())]
             + [row["note"]], False)
            for row in result["published"]
        ),
    ]  # fmt: skip
    head = [f"published {NAMES[metric]}", "mean", "as printed", *units, "known errors"]
    return "<h3>Beside the paper's table</h3>" + _table(head, lines, reason=True)


def _groups(task: str, result: dict) -> str:
    if not result["groups"]:
        return ""
    names = HEADLINES[is_detection(task)]
    lines = [
        (
            [f"{name}: {group}", str(scores["samples"]), *(with_interval(scores["mean"][key]) for key in names)]
            + [", ".join(scores["degenerate"])],
            False,
        )
        for name, groups in result["groups"].items()
        for group, scores in groups.items()
    ]
    head = ["group", "pictures", *(NAMES[name] for name in names), "units whose labels or answers are all alike"]
    return (
        f"<h3>By group</h3>{_table(head, lines, reason=True)}"
        "<p class=note>Groups differ in how often Action Units occur, and F1 with it.</p>"
    )


def _calibration(task: str, result: dict) -> str:
    found = result["calibration"]
    what = "presence" if is_detection(task) else "the value answered"
    lines = [
        ([name, number(found[state]["ece"]), number(found[state]["brier"])], state == "after")
        for state, name in (("before", "as the model gives them"), ("after", "calibrated"))
        if found[state] is not None
    ]
    fitted = found["fitted"]
    if fitted:
        note = f"Temperature {temperatures_in_words(result, 'g')}, fitted to {fitted_to(fitted)}."
    else:
        note = "No calibration is applied: the model has none, or it was fitted on these very people."
    return (
        f"<h3>Calibration</h3><p class=note>{note}</p>"
        + _table([f"probability of {what}", "ECE", "Brier score"], lines)
        + (_thresholds(result, fitted) if fitted and is_detection(task) else "")
        + (_intervals(result) if found["intervals"] else "")
        + _figure(pictures.reliability_diagram(found), f"Reliability of the probability of {what}.")
    )


def _intervals(result: dict) -> str:
    """How often the interval beside an answer holds the label."""
    kinds = zip(("the lowest", "any other"), interval_cells(result), strict=True)
    lines = [([name, *cells], False) for name, cells in kinds]
    head = ["answer", "answers", "labels in the interval", "mean width"]
    note = "Intervals beside answers were fitted to hold nine of ten labels of validation people."
    return f"<p class=note>{note}</p>{_table(head, lines)}"


def _thresholds(result: dict, fitted: dict[str, dict]) -> str:
    """F1 of each unit at 0.5 and at its fitted threshold."""
    rows = [result["rows"][name]["action_units"] for name in (MODEL, CALIBRATED)]
    lines = [
        (
            [
                unit,
                ", ".join(number(own.get("thresholds", {}).get(unit, 0.5)) for own in fitted.values()),
                *(with_interval(row[unit]["f1"]) for row in rows),
            ],
            False,
        )
        for unit in result["action_units"]
    ]
    head = ["Action Unit", "threshold" + (" (folds)" if len(fitted) > 1 else ""), "F1 at 0.5", "F1 at the threshold"]
    return f"<details><summary>Threshold and F1 of each Action Unit</summary>{_table(head, lines)}</details>"


def _robustness(found: dict, protocol: str) -> str:
    parts = [f"<h2>Robustness</h2><p class=note>Protocol: {escape(protocol)}.</p>"]
    for task, result in found.items():
        caption = (
            f"{NAMES[result['metric']]} of {task} on {result['pictures']} pictures, as they are (dashed) and damaged; "
            "the band is the 95 % interval over people."
        )
        names = [
            [
                name,
                *(
                    f"{strength:g}: {number(entry['value'])}"
                    for strength, entry in zip(damage["strengths"], damage["scores"], strict=True)
                ),
            ]
            for name, damage in result["damages"].items()
        ]
        head = [NAMES[result["metric"]], "mild", "", "", "", "strong"]
        clean = ["as it is", with_interval(result["clean"]), "", "", "", ""]
        lines = [(clean, True), *((cells, False) for cells in names)]
        parts.append(_figure(pictures.robustness_curves(result), caption) + _table(head, lines))
    return "\n".join(parts)


def _formats(found: dict, protocol: str) -> str:
    invalid = [
        ([task, number(share), number(found["invalid_constrained"][task])], False)
        for task, share in found["invalid"].items()
    ]
    contradictions = [
        ([pair, number(share), number(found["contradictions_calibrated"][pair])], False)
        for pair, share in found["contradictions"].items()
    ]
    return (
        f"<h2>Form of the answers</h2><p class=note>On {found['pictures']} pictures. Invalid is an answer that is not "
        "one array of the right length and range. Contradictions: one format calls a unit clearly present (1, level 3 "
        "or more, 0.5 or more) and the other clearly absent (0, level 0, 0.05 or less), of all pairs of picture and "
        f"unit; asked about {', '.join(found['units'])}. Protocol: {escape(protocol)}.</p>"
        + _table(["invalid answers, share", "free text (plain generate)", "under the grammar"], invalid)
        + _table(["contradictions between formats", "share", "calibrated, as the pipeline answers"], contradictions)
        * bool(contradictions)
    )


def _figure(svg: str, caption: str) -> str:
    """A drawing as an image of its own, so that names inside two drawings cannot clash."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f"<figure><img src='data:image/svg+xml;base64,{data}' alt='{escape(caption, quote=True)}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
