"""From recognised faces to tables: for a terminal, and as CSV, JSON Lines or Parquet files with described columns."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .action_units import CATALOGUE, get_task
from .drawing import answer_text
from .photos import Photo, Question


FORMATS = (".csv", ".jsonl", ".parquet")
# The columns of Action Units that OpenFace 2 writes; AU28 has no intensity.
_OPENFACE = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 28, 45)
OPENFACE = [f"AU{unit:02d}_{kind}" for kind in "rc" for unit in _OPENFACE if (unit, kind) != (28, "r")]
HELD = "holds the true value nine times in ten, of faces like those the model was calibrated on; else empty"


@dataclass(frozen=True)
class Column:
    """One column of the output: what it is called, what it means, and where a row's value comes from."""

    name: str
    type: str  # "string", "int64" or "float64"
    unit: str
    range: str
    description: str
    value: Callable[[dict], Any]


def _own(name: str, type: str, unit: str, range: str, description: str) -> Column:
    return Column(name, type, unit, range, description, lambda row: row.get(name))


_PLACE = (
    _own("file", "string", "", "", "The input, as it was given or found"),
    _own("frame", "int64", "frame", "0 and up", "Number of the video frame; empty for a photograph"),
    _own("time", "float64", "second", "0 and up", "When the video frame is shown; empty for a photograph"),
    _own(
        "face",
        "int64",
        "",
        "1 and up",
        "The face: largest first in a photograph; in a video an id that stays with a place, not a person",
    ),
    *(
        _own(
            f"box_{side}", "float64", "pixel", "inside the picture", f"{text} of the face's box in the upright picture"
        )
        for side, text in (("x0", "Left"), ("y0", "Top"), ("x1", "Right"), ("y1", "Bottom"))
    ),
    _own("detection_score", "float64", "", "0 to 1", "The face detector's confidence; empty if it gives none"),
    _own("status", "string", "", "ok, no face, failed", "Whether the row holds a face"),
    _own("error", "string", "", "", "Why the input failed"),
)


def columns(asked: list[Question], calibration: dict[str, dict]) -> list[Column]:
    """The output's columns: place and status of the face, then three or five for each task and Action Unit.

    Answers are whole numbers where a task's are, unless its calibration decides for the mean.
    """
    chosen = list(_PLACE)
    for task, units in asked:
        low, high = get_task(task).texts[0], get_task(task).texts[-1]
        real = "." in low or calibration.get(task, {}).get("decision") == "mean"
        for unit in units:
            key, type = f"{unit.code}_{task}", "float64" if real else "int64"
            scale, about = get_task(task).answer, f"{unit.name} ({task.replace('_', ' ')})"
            mean = f"Mean of the model's distribution: {about}; where answers are 0 or 1, the probability of 1"
            chosen += [
                _own(key, type, scale, f"{low} to {high}", f"The model's answer: {about}"),
                _own(f"{key}_probability", "float64", "probability", "0 to 1", f"Of the model's answer: {about}"),
                _own(f"{key}_expected", "float64", scale, f"{low} to {high}", mean),
            ]
            if len(get_task(task).values) > 2:
                chosen += [
                    _own(
                        f"{key}_{end}",
                        type,
                        scale,
                        f"{low} to {high}",
                        f"{which} end of its interval: {about}; {HELD}",
                    )
                    for end, which in (("low", "Lower"), ("high", "Upper"))
                ]
    return chosen


def openface_columns(asked: list[Question]) -> list[Column]:
    """The same rows under OpenFace 2's names, as far as they can be mapped.

    `AU12_c` is the answer of `detection`; `AU12_r`, 0 to 5, the expected value of `intensity_level`. Units that are
    not of FACS have no name in OpenFace and are left out.
    """
    chosen = [
        Column("frame", "int64", "frame", "1 and up", "Video frame", lambda row: (row.get("frame") or 0) + 1),
        Column("face_id", "int64", "", "0 and up", "The face", lambda row: row.get("face") and row["face"] - 1),
        Column("timestamp", "float64", "second", "0 and up", "Time in the video", lambda row: row.get("time") or 0.0),
        Column("confidence", "float64", "", "0 to 1", "detection_score", lambda row: row.get("detection_score")),
        Column("success", "int64", "", "0 or 1", "1 if there is a face", lambda row: int(row["status"] == "ok")),
    ]
    for task, source, suffix, type, range in (
        ("intensity_level", "_expected", "r", "float64", "0 to 5"),
        ("detection", "", "c", "int64", "0 or 1"),
    ):
        for unit in [unit for name, units in asked if name == task for unit in units]:
            if unit.code.removeprefix("AU").isdecimal():
                name, key = f"AU{int(unit.code.removeprefix('AU')):02d}_{suffix}", f"{unit.code}_{task}{source}"
                own = _own(key, type, "", range, f"{key}, {unit.name}")
                chosen.append(replace(own, name=name, value=_called(key) if task == "detection" else own.value))
    return [*chosen, *_PLACE[:1], *_PLACE[4:8], *_PLACE[9:]]


def _called(key: str) -> Callable[[dict], int | None]:
    """0 or 1 from an answer to `detection`, a mean too; none where there is no face."""
    return lambda row: int(row[key] >= 0.5) if key in row else None


def rows(photo: Photo, name: str) -> list[dict]:
    """One row for each face of a photograph, or one that says why there is none."""
    name = readable(name)
    if photo.error:
        return [failure(name, photo.error)]
    if not photo.faces:
        return [{"file": name, "status": "no face"}]
    return [
        row(entries, place) | {"file": name, "status": "ok"}
        for place, entries in enumerate(zip(*photo.answers, strict=True), 1)
    ]


def failure(name: str, error: str) -> dict:
    """The row of an input that has none."""
    return {"file": readable(name), "status": "failed", "error": readable(error)}


def readable(text: str) -> str:
    """A text with a file's name as tables and pictures can hold it: what is not UTF-8 in it is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def row(entries: Iterable[dict], face: int) -> dict:
    """The columns of one face, from its entries in the pipeline's results for each task."""
    values: dict[str, Any] = {"face": face}
    for entry in entries:
        values["detection_score"] = entry["score"]
        values |= zip(("box_x0", "box_y0", "box_x1", "box_y1"), entry["box"] or (), strict=False)
        for code, unit in entry["action_units"].items():
            key = f"{code}_{entry['task']}"
            values |= {key: unit["value"], f"{key}_probability": unit["probability"]}
            values[f"{key}_expected"] = unit["expected_value"]
            values |= zip((f"{key}_low", f"{key}_high"), unit.get("interval", ()), strict=False)
    return values


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_table(path: Path, rows: Iterable[dict], chosen: list[Column], about: dict) -> None:
    """Write rows to a `.csv`, `.jsonl` or `.parquet` file, and the columns' meaning to `.columns.json` beside it."""
    named = ({column.name: column.value(row) for column in chosen} for row in rows)
    with replaced(path) as draft:
        if path.suffix == ".parquet":
            _write_parquet(draft, named, chosen)
        else:
            with draft.open("w", encoding="utf-8", newline="") as file:
                if path.suffix == ".csv":
                    writer = csv.DictWriter(file, [column.name for column in chosen], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(named)
                else:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in named)
    with replaced(path.with_name(path.name + ".columns.json")) as draft:
        meaning = [{k: v for k, v in asdict(column).items() if k != "value"} for column in chosen]
        told = json.dumps({"columns": meaning, "produced by": about}, indent=2, ensure_ascii=False)
        draft.write_text(f"{told}\n", encoding="utf-8")


def _write_parquet(path: Path, named: Iterable[dict], chosen: list[Column]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema(
        [
            pyarrow.field(c.name, c.type, metadata={"unit": c.unit, "range": c.range, "description": c.description})
            for c in chosen
        ]
    )
    named = iter(named)
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(named, 10_000)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def text_table(entries: list[dict]) -> str:
    """One face as plain text: a line for each Action Unit, a column for each task.

    Args:
        entries (`list[dict]`): The face's entries in the pipeline's results, one a task.
    """
    names = {code: unit["name"] for entry in entries for code, unit in entry["action_units"].items()}
    heads = []
    for entry in entries:
        chosen = get_task(entry["task"])
        heads.append(
            "present (probability)" if len(chosen.values) == 2 else
            f"{chosen.name.replace('_', ' ')} {chosen.values[0]:g}-{chosen.values[-1]:g} (mean)"
        )  # fmt: skip
    lines = [["code", "name", *heads]]
    catalogue = list(CATALOGUE)
    for code in sorted(names, key=lambda code: catalogue.index(code) if code in catalogue else len(catalogue)):
        lines.append(
            [code, names[code], *(_cell(entry["action_units"].get(code), entry["task"]) for entry in entries)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(unit: dict | None, task: str) -> str:
    if unit is None:
        return "."
    answer = {"absent": "no ", "present": "yes"}.get(text := answer_text(unit, task), text)
    return f"{answer} ({unit['expected_value']:.2f})"
