"""Results for people and for the Hub, written into a model card: a section between markers, and `model-index`."""

import math
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from .calibration import fitted_to, temperatures_in_words
from .compare import COMPARED
from .data import RENDERED, is_own
from .scores import MODEL, answered_row, is_detection
from .table import NAMES, interval_cells, known_errors, number, published, remarks, verdicts, with_interval


def update_card(results: dict, readme: str | Path) -> Path:
    """Put the results into a model's README.md, in place of those that an earlier call put there.

    The section lies between two comments that name data set, protocol and options, at the end where there was none.
    Results of others are kept.

    Args:
        results (`dict`): From [`summarise`].
        readme: The card; it is made where there is none.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: One of the two comments is missing.
    """
    readme = Path(readme)
    card = ModelCard(
        readme.read_text(encoding="utf-8") if readme.is_file() else "---\nlibrary_name: transformers\n---\n"
    )
    entries, settings = _eval_results(results), results["settings"]
    about = f", {_asked(settings)} protocol"  # of whatever task, for the section has none but these
    kept = [
        entry
        for entry in card.data.eval_results or []
        if entry.dataset_type != settings["dataset"] or not str(entry.dataset_config).endswith(about)
    ]
    card.data.eval_results = kept + entries
    card.data.model_name = card.data.model_name or MODEL
    begin, end = (f"<!-- evaluate_au.py, {_key(results)}: {place} -->" for place in ("begin", "end"))
    section = f"{begin}\n{_section(results)}\n{end}"
    if (begin in card.text) != (end in card.text):
        raise ValueError(f"{readme}: of the comments {begin} and {end} one is missing; put it back, or take both out.")
    if begin in card.text:
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        card.text = re.sub(pattern, lambda _: section, card.text, count=1, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    draft = readme.with_suffix(".tmp")
    draft.write_text(str(card), encoding="utf-8")
    os.replace(draft, readme)
    return readme


def _key(results: dict) -> str:
    return f"{results['settings']['dataset']} {_asked(results['settings'])}"


def _asked(settings: dict) -> str:
    return " ".join(filter(None, (settings["protocol"], settings["options"])))


def _eval_results(results: dict) -> list[EvalResult]:
    settings, entries = results["settings"], []
    asked = _asked(settings)
    for task, result in results["tasks"].items():
        row = answered_row(result["rows"])
        how = f"mean over {len(result['action_units'])} Action Units{row.removeprefix(MODEL)}"
        for metric in COMPARED[is_detection(task)]:
            value = result["rows"][row]["mean"][metric]["value"]
            if math.isnan(value):
                continue
            entries.append(
                EvalResult(
                    task_type="image-text-to-text",
                    task_name=f"Facial Action Units: {task}",
                    dataset_type=settings["dataset"],
                    dataset_name=_called(settings["dataset"]),
                    dataset_config=f"{task}, {asked} protocol",
                    dataset_split=settings["split"],
                    metric_type=metric,
                    metric_name=f"{NAMES[metric]}, {how}",
                    metric_value=round(value, 4),
                )
            )
    return entries


def _called(dataset: str) -> str:
    if is_own(dataset):
        return f"Own pictures ({dataset})"
    return "Synthetic faces" if dataset in RENDERED else dataset.upper()


def _section(results: dict) -> str:
    """The section in words and tables."""
    settings = results["settings"]
    first = next(iter(results["tasks"].values()))
    lines = [
        f"## Results on {settings['dataset']}",
        "",
        f"{first['samples']} pictures of {first['subjects']} people, split `{settings['split']}`. Protocol "
        f"({settings['protocol']}): {results['protocol']}. In brackets 95 % intervals from resampling people. The "
        "constant baselines answer the same for every picture and are made of the very labels they are scored on.",
    ]
    for task, result in results["tasks"].items():
        metrics = COMPARED[is_detection(task)]
        lines += ["", f"### `{task}`, mean over {len(result['action_units'])} Action Units", ""]
        lines += ["| | " + " | ".join(NAMES[metric] for metric in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        for row, scores in result["rows"].items():
            lines.append(f"| {row} | " + " | ".join(with_interval(scores["mean"][name]) for name in metrics) + " |")
        lines += [f"| {' | '.join(cells)} | |" for cells in published(result)]
        row = answered_row(result["rows"])
        unit_scores = result["rows"][row]["action_units"]
        listed = (f"{unit} {number(unit_scores[unit][metrics[0]]['value'], 2)}" for unit in result["action_units"])
        lines += ["", f"{NAMES[metrics[0]]} of each{row.removeprefix(MODEL)}: {', '.join(listed)}."]
        for line in (*known_errors(result), *remarks(result["rows"][row]), *verdicts(result)):
            lines += ["", line]
    lines += _calibration(results["tasks"]) + _groups(results["tasks"])
    lines += _robustness(results["robustness"]) if "robustness" in results else []
    lines += _formats(results["formats"]) if "formats" in results else []
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"Made on {results['date']} with {versions}:", "", "```", results["command"], "```"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _calibration(tasks: dict) -> list[str]:
    rows = []
    for task, result in tasks.items():
        found = result["calibration"]
        if found["after"] is not None:
            pairs = ((number(found["before"][name]), number(found["after"][name])) for name in ("ece", "brier"))
            temperatures = temperatures_in_words(result, ".2f")
            rows.append(
                [f"`{task}`", fitted_to(found["fitted"]), temperatures, *(" to ".join(pair) for pair in pairs)]
            )
    if not rows:
        return []
    words = "Temperatures, thresholds, and how values follow. "
    words += "ECE is of the probability of each answer (of `detection`: of presence)."
    head = ["", "fitted to", "temperature", "ECE", "Brier score"]
    return ["", "### Calibration", "", words, "", *_table(head, rows), *_intervals(tasks)]


def _intervals(tasks: dict) -> list[str]:
    """One table for all tasks whose answers come with intervals."""
    rows = []
    for task, result in tasks.items():
        if result["calibration"]["intervals"]:
            (_, *lowest), (_, *more) = interval_cells(result)
            rows.append([f"`{task}`", *lowest, *more])
    if not rows:
        return []
    words = "Intervals beside answers, fitted to hold nine of ten labels of validation people:"
    head = ["", "of the lowest answer: labels held", "mean width", "of all other answers: labels held", "mean width"]
    return ["", words, "", *_table(head, rows)]


def _groups(tasks: dict) -> list[str]:
    """One table for all tasks, a row for each group."""
    first = next(iter(tasks.values()))["groups"]
    if not first:
        return []
    metrics = {task: COMPARED[is_detection(task)][0] for task in tasks}
    rows = [
        [f"{name}: {group}", str(scores["samples"])]
        + [with_interval(tasks[task]["groups"][name][group]["mean"][metric]) for task, metric in metrics.items()]
        for name, groups in first.items()
        for group, scores in groups.items()
    ]
    head = ["", "pictures", *(f"`{task}`, {NAMES[metric]}" for task, metric in metrics.items())]
    words = "Groups differ in how often Action Units occur, and F1 with it."
    return ["", "### By group", "", words, "", *_table(head, rows)]


def _robustness(found: dict) -> list[str]:
    """One table for all tasks, a row for each damage, its five strengths in a cell."""
    first = next(iter(found.values()))
    rows = [["as it is", *(number(result["clean"]["value"]) for result in found.values())]]
    for name, damage in first["damages"].items():
        strengths = ", ".join(f"{strength:g}" for strength in damage["strengths"])
        scores = (result["damages"][name]["scores"] for result in found.values())
        cells = (", ".join(number(entry["value"], 2) for entry in five) for five in scores)
        rows.append([f"{name} ({damage['unit']}: {strengths})", *cells])
    head = ["", *(f"`{task}`, {NAMES[result['metric']]}" for task, result in found.items())]
    words = f"The same {first['pictures']} pictures, damaged at five strengths; scores from mild to strong."
    return ["", "### Damaged pictures", "", words, "", *_table(head, rows)]


def _formats(found: dict) -> list[str]:
    rows = [
        [f"`{task}`", number(share), number(found["invalid_constrained"][task])]
        for task, share in found["invalid"].items()
    ]
    kinds = (found["contradictions"], found["contradictions_calibrated"])
    raw, fitted = ("; ".join(f"{pair} {number(share)}" for pair, share in kind.items()) for kind in kinds)
    words = f"On {found['pictures']} pictures. Share of answers that are no array of the right length and range:"
    table = _table(["", "free text", "under the grammar"], rows)
    lines = ["", "### Form of the answers", "", words, "", *table]
    if raw:
        more = f"One format calls a unit clearly present and the other clearly absent, of all answers: {raw}."
        lines += ["", f"{more} Calibrated, as the pipeline answers: {fitted}."]
    return lines
