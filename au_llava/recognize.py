"""`au-llava recognize`: photographs and videos in, a table of faces and Action Units out."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from .action_units import TASKS
from .drawing import draw_sheet
from .inputs import expand, is_video, place_below
from .journal import Journal
from .photos import Photo, Question, check_detector, load_pipeline, provenance, questions, recognize
from .tables import FORMATS, Column, columns, openface_columns, replaced, rows, text_table, write_table


def run(arguments: Namespace) -> int:
    """Carry out the subcommand; the exit code: 0 all well, 1 some inputs failed."""
    asked = _asked(arguments)
    chosen = openface_columns(asked) if arguments.openface else columns(asked)
    output = None if arguments.output in (None, "-") else Path(arguments.output)
    if output and output.suffix not in FORMATS:
        raise ValueError(f"{output}: the output's name must end in {', '.join(FORMATS)}; or give - for JSON Lines.")
    inputs = expand(arguments.input, arguments.overlay)
    if not output and any(map(is_video, inputs)):
        raise ValueError("Videos need --output FILE.csv, .jsonl or .parquet.")
    check_detector(arguments.detector)
    pipe = load_pipeline(arguments.model, arguments.device)
    if arguments.openface:
        _tell_mapping(asked, chosen)
    if not output:
        return 1 if _print_all(pipe, inputs, asked, chosen, arguments) else 0

    about = provenance(pipe, arguments.detector)
    settings = {"asked": [[task, [unit.line() for unit in units]] for task, units in asked], "fps": arguments.fps}
    settings |= {"max faces": arguments.max_faces} | {name: text for name, text in about.items() if name != "date"}
    journal = Journal(output.with_name(output.name + ".partial"), settings)
    todo = [name for name in inputs if name not in journal.done]
    if len(todo) < len(inputs):
        print(f"{len(inputs) - len(todo)} of {len(inputs)} inputs were done before.", file=sys.stderr)
    try:
        _do_photos(journal, pipe, [name for name in todo if not is_video(name)], asked, arguments, inputs)
        for name in filter(is_video, todo):
            _do_video(journal, pipe, name, asked, arguments)
        for name in filter(is_video, inputs):
            _show_video(journal, name, asked, arguments, inputs)
    except BaseException:
        kept = f"{len(journal.done)} of {len(inputs)} inputs are done"
        print(f"Stopped; {kept}. The same command goes on from there.", file=sys.stderr)
        journal.close()
        raise
    write_table(output, journal.rows(set(inputs)), chosen, about)
    failed = len(journal.failed & set(inputs))
    journal.remove()
    print(f"{len(inputs)} inputs, {failed} failed: {output}, described in {output}.columns.json", file=sys.stderr)
    return 1 if failed else 0


def _search(arguments: Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("detector", "max_faces", "batch_size")}


def _print_all(pipe, inputs: list[str], asked: list[Question], chosen: list[Column], arguments: Namespace) -> int:
    """Show every photograph on standard output as it comes; how many failed."""
    failed = 0
    with closing(recognize(pipe, inputs, asked, **_search(arguments))) as photos:
        for photo in photos:
            _save_overlay(photo, arguments.overlay, inputs)
            failed += bool(photo.error)
            if photo.error:
                print(f"au-llava: {photo.error}", file=sys.stderr)
            if arguments.output == "-":
                for row in rows(photo, photo.source):
                    print(json.dumps({column.name: column.value(row) for column in chosen}), flush=True)
            else:
                _print(photo)
    return failed


def _do_photos(journal: Journal, pipe, names: list[str], asked, arguments: Namespace, inputs: list[str]) -> None:
    with closing(recognize(pipe, names, asked, **_search(arguments))) as photos:
        for photo in tqdm(photos, total=len(names), unit="picture", disable=None if names else True):
            _save_overlay(photo, arguments.overlay, inputs)
            if photo.error:
                print(f"au-llava: {photo.error}", file=sys.stderr)
            journal.add(photo.source, rows(photo, photo.source))


def _do_video(journal: Journal, pipe, name: str, asked: list[Question], arguments: Namespace) -> None:
    from .videos import Video, recognize_video

    try:
        video, earlier = Video.open(name), journal.rows({name})
        some = recognize_video(pipe, video, asked, arguments.fps, earlier, **_search(arguments))
        with closing(some), tqdm(desc=name, total=round(video.count / video.rate, 1), unit="s", disable=None) as bar:
            for found in some:
                journal.add(name, found, done=False)
                bar.update(round(found[-1]["time"] - bar.n, 1))
        journal.add(name, [])
    except (OSError, ValueError) as error:
        print(f"au-llava: {error}", file=sys.stderr)
        journal.add(name, [{"file": name, "status": "failed", "error": str(error)}])


def _show_video(journal: Journal, name: str, asked: list[Question], arguments: Namespace, inputs: list[str]) -> None:
    """The time lines beside the table and, where overlays are asked for, the film."""
    from .films import write_film, write_timelines
    from .videos import Video

    def found() -> Iterator[dict]:
        return (row for row in journal.rows({name}) if "frame" in row)

    if any(True for _ in found()):
        video, place = Video.open(name), place_below(name, inputs)
        stem = Path(f"{arguments.output}.{'_'.join(place.parts)}")
        write_timelines(stem, video, found, asked, arguments.fps)
        if arguments.overlay:
            write_film(arguments.overlay / place.with_name(place.name + ".mp4"), video, found(), asked[0])


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


def _save_overlay(photo: Photo, folder: Path | None, inputs: list[str]) -> None:
    if folder and photo.image:
        place = place_below(photo.source, inputs)
        with replaced(folder / place.with_name(place.name + ".png")) as draft:
            draw_sheet(photo.image, *photo.answers).save(draft)
