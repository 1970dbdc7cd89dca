"""Results for people and for the Hub, written into a model card: a section between markers, and `model-index`."""

import math
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from .scores import MODEL, is_detection
from .table import NAMES, number, remarks, with_interval


_SHOWN = {True: ("f1", "roc_auc"), False: ("mae", "icc31")}


def update_card(results: dict, readme: str | Path) -> Path:
    """Put the results into a model's README.md, in place of those that an earlier call put there.

    The section lies between two comments that name data set and protocol, at the end where there was none. Results of
    other data sets and protocols are kept.

    Args:
        results (`dict`): From [`summarise`].
        readme: The card; it is made where there is none.

    Returns:
        `Path`: The card.
    """
    readme = Path(readme)
    card = ModelCard(
        readme.read_text(encoding="utf-8") if readme.is_file() else "---\nlibrary_name: transformers\n---\n"
    )
    entries = _eval_results(results)
    replaced = {(entry.dataset_type, entry.dataset_config) for entry in entries}
    kept = [
        entry for entry in card.data.eval_results or [] if (entry.dataset_type, entry.dataset_config) not in replaced
    ]
    card.data.eval_results = kept + entries
    card.data.model_name = card.data.model_name or MODEL
    begin, end = (f"<!-- evaluate_au.py, {_key(results)}: {place} -->" for place in ("begin", "end"))
    section = f"{begin}\n{_section(results)}\n{end}"
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
    return f"{results['settings']['dataset']} {results['settings']['protocol']}"


def _eval_results(results: dict) -> list[EvalResult]:
    settings, entries = results["settings"], []
    for task, result in results["tasks"].items():
        for metric in _SHOWN[is_detection(task)]:
            value = result["rows"][MODEL]["mean"][metric]["value"]
            if math.isnan(value):
                continue
            entries.append(
                EvalResult(
                    task_type="image-text-to-text",
                    task_name=f"Facial Action Units: {task}",
                    dataset_type=settings["dataset"],
                    dataset_name=settings["dataset"].upper()
                    if settings["dataset"] != "synthetic"
                    else "Synthetic faces",
                    dataset_config=f"{task}, {settings['protocol']} protocol",
                    dataset_split=settings["split"],
                    metric_type=metric,
                    metric_name=f"{NAMES[metric]}, mean over {len(result['action_units'])} Action Units",
                    metric_value=round(value, 4),
                )
            )
    return entries


def _section(results: dict) -> str:
    """The section in words and tables."""
    settings = results["settings"]
    first = next(iter(results["tasks"].values()))
    lines = [
        f"## Results on {settings['dataset']}",
        "",
        f"{first['samples']} pictures of {first['subjects']} people, split `{settings['split']}`. Protocol "
        f"({settings['protocol']}): {results['protocol']}. In brackets 95 % intervals from resampling people. The "
        "baselines answer the same for every picture and are made of the very labels they are scored on.",
    ]
    for task, result in results["tasks"].items():
        metrics = _SHOWN[is_detection(task)]
        lines += ["", f"### `{task}`, mean over {len(result['action_units'])} Action Units", ""]
        lines += ["| | " + " | ".join(NAMES[metric] for metric in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        for row, scores in result["rows"].items():
            lines.append(f"| {row} | " + " | ".join(with_interval(scores["mean"][name]) for name in metrics) + " |")
        unit_scores = result["rows"][MODEL]["action_units"]
        listed = (f"{unit} {number(unit_scores[unit][metrics[0]]['value'], 2)}" for unit in result["action_units"])
        lines += ["", f"{NAMES[metrics[0]]} of each: {', '.join(listed)}."]
        lines += ["", *remarks(result["rows"][MODEL])] if result["rows"][MODEL]["degenerate"] else []
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"Made on {results['date']} with {versions}:", "", "```", results["command"], "```"])
