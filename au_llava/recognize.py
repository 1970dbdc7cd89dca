"""`au-llava recognize`: photographs and folders of them in, a table of faces and Action Units out."""

import glob
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from .action_units import TASKS
from .drawing import draw_sheet
from .journal import Journal
from .photos import Photo, Question, check_detector, load_pipeline, provenance, questions, recognize
from .tables import FORMATS, columns, openface_columns, replaced, rows, text_table, write_table


PICTURES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".ppm",
)


def expand(inputs: Iterable[str], leave_out: Path | None = None) -> list[str]:
    """Every picture that the inputs name, each once, in order.

    Args:
        inputs: Files, http(s) addresses, folders (searched with all below them), patterns such as `"day?/*.jpg"`, or
            `"-"` for a list of those on standard input, one a line. What names no picture is kept, to be reported.
        leave_out (`Path`, *optional*): A folder whose pictures are not inputs.
    """
    found: list[str] = []
    for text in inputs:
        if text == "-":
            found += expand((line.strip() for line in sys.stdin if line.strip()), leave_out)
        elif Path(text).is_dir():
            files = [path for path in Path(text).rglob("*") if path.suffix.lower() in PICTURES]
            files = [path for path in files if not path.name.startswith(".") and leave_out not in path.parents]
            found += [str(path) for path in sorted(files)] or [text]
        elif glob.has_magic(text) and not Path(text).exists():
            found += sorted(glob.glob(text, recursive=True)) or [text]
        else:
            found.append(text)
    return list(dict.fromkeys(found))


def run(arguments: Namespace) -> int:
    """Carry out the subcommand; the exit code: 0 all well, 1 some inputs failed."""
    asked = _asked(arguments)
    chosen = openface_columns(asked) if arguments.openface else columns(asked)
    output = None if arguments.output in (None, "-") else Path(arguments.output)
    if output and output.suffix not in FORMATS:
        raise ValueError(f"{output}: the output's name must end in {', '.join(FORMATS)}; or give - for JSON Lines.")
    inputs = expand(arguments.input, arguments.overlay)
    check_detector(arguments.detector)
    pipe = load_pipeline(arguments.model, arguments.device)
    if arguments.openface:
        _tell_mapping(asked, chosen)

    settings = {"asked": [[task, [unit.line() for unit in units]] for task, units in asked]}
    settings |= {"max faces": arguments.max_faces} | provenance(pipe, arguments.detector)
    settings.pop("date")
    journal = output and Journal(output.with_name(output.name + ".partial"), settings)
    todo = [name for name in inputs if not journal or name not in journal.done]
    if len(todo) < len(inputs):
        print(f"{len(inputs) - len(todo)} of {len(inputs)} inputs were done before.", file=sys.stderr)
    photos = recognize(pipe, todo, asked, arguments.detector, arguments.max_faces, arguments.batch_size)
    failed = 0
    try:
        with closing(photos):
            for photo in tqdm(photos, total=len(todo), unit="picture", disable=None if output else True):
                found = rows(photo, photo.source)
                if arguments.overlay and photo.image:
                    _save_overlay(photo, arguments.overlay, inputs)
                failed += bool(photo.error)
                if photo.error:
                    print(f"au-llava: {photo.error}", file=sys.stderr)
                if journal:
                    journal.add(photo.source, found)
                elif arguments.output == "-":
                    named = ({column.name: column.value(row) for column in chosen} for row in found)
                    print(*map(json.dumps, named), sep="\n", flush=True)
                else:
                    _print(photo)
    except BaseException:
        if journal:
            journal.close()
            kept = f"{len(journal.done)} of {len(inputs)} inputs are kept"
            print(f"Stopped; {kept}. The same command goes on from there.", file=sys.stderr)
        raise
    if output and journal:
        write_table(output, journal.rows(set(inputs)), chosen, provenance(pipe, arguments.detector))
        failed = sum(journal.done[name] for name in inputs)
        journal.remove()
        print(f"{len(inputs)} inputs, {failed} failed: {output}, described in {output}.columns.json", file=sys.stderr)
    return 1 if failed else 0


def _asked(arguments: Namespace) -> list[Question]:
    if arguments.openface and arguments.task not in (None, "all", "detection", "intensity_level"):
        raise ValueError(f"--openface has no columns for --task {arguments.task}; leave --task out.")
    if arguments.openface:
        tasks = [arguments.task] if arguments.task in TASKS else ["detection", "intensity_level"]
    else:
        tasks = list(TASKS) if arguments.task == "all" else [arguments.task or "detection"]
    return questions(tasks, arguments.action_units)


def _tell_mapping(asked: list[Question], chosen: list) -> None:
    mapped = [column for column in chosen if re.fullmatch(r"AU\d+_[cr]", column.name)]
    print(
        "OpenFace's columns:", ", ".join(f"{c.name} = {c.description.split(',')[0]}" for c in mapped), file=sys.stderr
    )
    left = [f"{unit.code} ({task})" for task, units in asked for unit in units
            if not any(column.description.startswith(f"{unit.code}_{task}") for column in mapped)]  # fmt: skip
    if left:
        print("Without a name in OpenFace and left out:", ", ".join(left), file=sys.stderr)


def _print(photo: Photo) -> None:
    if not photo.error and not photo.faces:
        print(f"{photo.source}: no face found\n", flush=True)
    for place, entries in enumerate(zip(*photo.answers, strict=True), 1):
        print(face_heading(str(photo.source), place, len(photo.faces), entries[0]))
        print(text_table(list(entries)), flush=True, end="\n\n")


def face_heading(name: str, place: int, count: int, entry: dict) -> str:
    """A line that tells a face: its picture, number, box and score."""
    box = entry["box"] and " ".join(f"{side:.0f}" for side in entry["box"])
    score = "" if entry["score"] is None else f", score {entry['score']:.2f}"
    return f"{name}, face {place} of {count}, {f'box {box}' if box else 'the whole picture'}{score}"


def _save_overlay(photo: Photo, folder: Path, inputs: list[str]) -> None:
    """Names follow the inputs' folders below the one that holds them all, so that no two pictures share one."""
    if photo.source.startswith(("http://", "https://")):
        name = Path(re.sub(r"[^\w.-]+", "_", photo.source))
    else:
        local = [Path(text).absolute().parent for text in inputs if not text.startswith(("http://", "https://"))]
        top = next(path for path in (local[0], *local[0].parents) if all(path in (p, *p.parents) for p in local))
        name = Path(photo.source).absolute().relative_to(top)
    with replaced(folder / name.with_name(name.name + ".png")) as draft:
        draw_sheet(photo.image, *photo.answers).save(draft)
