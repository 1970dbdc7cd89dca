"""`au-llava recognize`: photographs and videos in, a table of faces and Action Units out."""

import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm

from .action_units import TASKS
from .drawing import draw_sheet
from .face_alignment import open_image
from .inputs import HEIC, PICTURES, VIDEOS, Input, described, expand, is_video
from .journal import Journal
from .photos import Photo, Question, check_detector, load_pipeline, provenance, questions, recognize
from .smoothing import smoothed
from .tables import (
    FORMATS,
    OPENFACE,
    Column,
    columns,
    failure,
    openface_columns,
    readable,
    replaced,
    rows,
    text_table,
    write_table,
)


# A folder of time lines that would take the place of one of the journal's files, and those that it would then meet.
_PARTIAL = re.compile(r"^(partial(-\d+)?_*)(?=[/\\])", re.IGNORECASE)


def run(arguments: Namespace) -> int:
    """Carry out the subcommand; the exit code: 0 all well, 1 some inputs failed or could not be drawn."""
    asked, output = prepared(arguments)
    if arguments.evidence and not arguments.overlay:
        raise ValueError("--evidence is drawn on overlays; give --overlay too.")
    if arguments.smooth and arguments.fps and arguments.smooth * arguments.fps < 1.999:
        raise ValueError(
            f"--smooth {arguments.smooth:g} seconds hold no other frame at --fps {arguments.fps:g}; give at least "
            f"{2 / arguments.fps:g}, or leave one of the two out."
        )
    crew = _crew(arguments)
    names = expand(arguments.input, arguments.overlay) if crew.is_main_process else []
    [inputs] = broadcast_object_list([described(names)])
    if not output and any(map(is_video, inputs)):
        raise ValueError("Videos need --output FILE.csv, .jsonl or .parquet.")
    if not output and crew.num_processes > 1:
        raise ValueError("Several processes need --output FILE.csv, .jsonl or .parquet.")
    if arguments.overlay and _is_file(arguments.overlay):
        _check_overlay(arguments.overlay, list(inputs))
    with crew.local_main_process_first():  # what has to be downloaded is downloaded once
        arguments.detector = check_detector(arguments.detector)
        device = arguments.device or (str(crew.device) if crew.num_processes > 1 else None)
        pipe = load_pipeline(arguments.model, device)
    chosen = _columns(pipe, asked, arguments)
    if arguments.openface and crew.is_main_process:
        _tell_mapping(asked, chosen)
    if not output:
        return 1 if _print_all(pipe, inputs, asked, chosen, arguments) else 0

    about = _about(pipe, arguments)
    settings: dict = {task: "; ".join(unit.line() for unit in units) for task, units in asked}
    settings |= {"fps": arguments.fps, "max faces": arguments.max_faces}
    # Photographs are drawn while they are recognised, so those that were done before would have no overlays.
    settings |= {"evidence": arguments.evidence, "overlay": arguments.overlay and str(arguments.overlay.absolute())}
    settings |= {name: text for name, text in about.items() if name != "date"}
    if arguments.smooth:
        about["smoothing"] = f"median over {arguments.smooth:g} seconds of a video's answers"
    journal = Journal(output.with_name(output.name + ".partial"), settings, crew.process_index)
    parts = dict.fromkeys(one.part for one in inputs.values())
    again = journal.take_back() & parts.keys()
    done = journal.done & parts.keys()
    if (done or again) and crew.is_main_process:
        more = f"; tried again, for they failed: {len(again)}" if again else ""
        print(f"{len(done)} of {len(inputs)} inputs were done before{more}.", file=sys.stderr)
    videos = [name for name in inputs if is_video(name)]
    mine = slice(crew.process_index, None, crew.num_processes)  # every so many-th piece of work
    try:
        undrawn = _do_photos(journal, pipe, asked, arguments, inputs, mine, again)
        for name in [name for name in videos[mine] if inputs[name].part not in journal.done]:
            _do_video(journal, pipe, name, inputs[name].part, asked, arguments)
        crew.wait_for_everyone()
        journal.reload()
        if lost := parts.keys() - journal.done:  # a table without them would take the place of a whole one
            raise ValueError(
                f"{journal.path} lost {len(lost)} of {len(inputs)} finished inputs: another job with this output took "
                f"it for its own, or it was deleted. Let no other write to {output}, and give the same command again."
            )
        if crew.is_main_process:  # before anything is drawn, for the table matters most
            write_table(output, _smooth(journal.rows(parts), asked, arguments), chosen, about)
        undrawn += sum(not _show_video(journal, pipe, name, inputs[name], asked, arguments) for name in videos[mine])
        undrawn = sum(gather_object([undrawn]))
    except BaseException:
        kept = f"{len(journal.done & parts.keys())} of {len(inputs)} inputs are done"
        print(f"Stopped; {kept}. The same command goes on from there.", file=sys.stderr)
        journal.close()
        raise
    if not crew.is_main_process:
        journal.close()
        return 0
    failed = len(journal.failed & parts.keys())
    if others := journal.remove(parts):
        print(f"{journal.path} still holds {others} inputs of an unfinished job; give all of its inputs to go on, or "
              "delete it.", file=sys.stderr)  # fmt: skip
    told = f"{len(inputs)} input{'s' if len(inputs) > 1 else ''}, {failed} failed" + (
        f", {undrawn} not drawn" if undrawn else ""
    )
    print(f"{told}: {output}, described in {output}.columns.json", file=sys.stderr)
    return 1 if failed or undrawn else 0


def prepared(arguments: Namespace) -> tuple[list[Question], Path | None]:
    """What is asked, and the table's file, if it goes to one."""
    asked = _asked(arguments)
    output = None if arguments.output in (None, "-") else Path(arguments.output)
    if output and output.suffix not in FORMATS:
        raise ValueError(f"{output}: the output's name must end in {', '.join(FORMATS)}; or give - for JSON Lines.")
    if output and output.is_dir():
        raise ValueError(f"{output}: there is a folder of this name; give the output another.")
    return asked, output


def _columns(pipe, asked: list[Question], arguments: Namespace) -> list[Column]:
    return openface_columns(asked) if arguments.openface else columns(asked, pipe.processor.calibration)


def _crew(arguments: Namespace) -> PartialState:
    """Which of how many processes this is: one, but under `accelerate launch` or `torchrun`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    cpu = arguments.device == "cpu" or found is None or found.type == "mps"
    return PartialState(cpu=cpu, timeout=timedelta(days=30))  # the first to finish has to wait for the last


def _smooth(rows: Iterator[dict], asked: list[Question], arguments: Namespace) -> Iterator[dict]:
    step = 1 / arguments.fps if arguments.fps else 0.0
    return smoothed(rows, asked, arguments.smooth, step) if arguments.smooth else rows


def _about(pipe, arguments: Namespace) -> dict[str, str]:
    """What produces the numbers, and how they are asked for."""
    mirror = pipe.processor.mirror if arguments.mirror is None else arguments.mirror
    asked = {"read-out": arguments.readout, "mirror images": "asked about, too" if mirror else "not asked about"}
    return provenance(pipe, arguments.detector) | asked


def _settings(arguments: Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("detector", "max_faces", "batch_size", "readout", "mirror")}


def _for_photos(arguments: Namespace) -> dict:
    return {"opened": _opened, "return_evidence": arguments.evidence or False}


def _opened(name: str) -> Image.Image:
    try:
        return open_image(name)
    except ValueError as error:
        if not name.lower().endswith(HEIC) or not Path(name).is_file():
            raise
        raise ValueError(f"{name}: HEIC cannot be read; convert it to JPEG.") from error


def _print_all(
    pipe, inputs: dict[str, Input], asked: list[Question], chosen: list[Column], arguments: Namespace
) -> int:
    """Show every photograph on standard output as it comes; how many failed."""
    failed = 0
    with closing(recognize(pipe, inputs, asked, **_settings(arguments), **_for_photos(arguments))) as photos:
        for photo in photos:
            drawn = _save_overlay(photo, inputs[photo.source].place, arguments.overlay)
            failed += bool(photo.error) or not drawn
            if photo.error:
                print(f"au-llava: {photo.error}", file=sys.stderr)
            if arguments.output == "-":
                for row in rows(photo, photo.source):
                    print(json.dumps({column.name: column.value(row) for column in chosen}), flush=True)
            else:
                _print(photo)
    return failed


def _do_photos(
    journal: Journal, pipe, asked, arguments: Namespace, inputs: dict[str, Input], mine: slice, again: set[str]
) -> int:
    """Recognise photographs in groups; how many could not be drawn. A group is done as a whole or again, so that
    batches and with them the last digits of the answers are the same however often the job was stopped, and by however
    many processes it is done. Only what is missing for no other reason than that it failed is tried again by itself,
    for where many addresses are dead there is one in every group."""
    photos, size = [name for name in inputs if not is_video(name)], 4 * arguments.batch_size
    groups = [photos[start : start + size] for start in range(0, len(photos), size)][mine]
    missing = [[name for name in group if not _is_done(journal, inputs[name], arguments)] for group in groups]
    groups = [
        lost if all(inputs[name].part in again for name in lost) else group
        for group, lost in zip(groups, missing, strict=True)
        if lost
    ]
    quiet, undrawn = None if groups and mine.start == 0 else True, 0
    with tqdm(total=sum(map(len, groups)), unit="picture", disable=quiet) as bar:
        for group in groups:
            found = {}
            some = recognize(pipe, group, asked, **_settings(arguments), **_for_photos(arguments))
            with closing(some) as answered:
                for photo in answered:
                    undrawn += not _save_overlay(photo, inputs[photo.source].place, arguments.overlay)
                    if photo.error:
                        print(f"au-llava: {photo.error}", file=sys.stderr)
                    found[inputs[photo.source].part] = rows(photo, photo.source)
                    bar.update()
            journal.add(found)
    return undrawn


def _is_done(journal: Journal, photo: Input, arguments: Namespace) -> bool:
    """Whether nothing of a photograph is missing: no rows and no overlay."""
    drawn = not arguments.overlay or _overlay(arguments.overlay, f"{photo.place}.png").is_file()
    return photo.part in journal.done and drawn


def _do_video(journal: Journal, pipe, name: str, part: str, asked: list[Question], arguments: Namespace) -> None:
    from .videos import Video, recognize_video

    try:
        video, earlier = Video.open(name), journal.rows([part])
        if arguments.smooth and arguments.smooth * video.rate < 1.999:
            print(
                f"au-llava: {name}: --smooth {arguments.smooth:g} seconds hold no other of its {video.rate:g} frames "
                f"a second, so nothing is smoothed; give at least {2 / video.rate:g}.",
                file=sys.stderr,
            )
        some = recognize_video(pipe, video, asked, arguments.fps, earlier, **_settings(arguments))
        with closing(some), _video_bar(video, arguments.fps) as bar:
            bar.update(len({row["frame"] for row in journal.rows([part])}))
            for found in some:
                journal.add({part: found}, done=False)
                bar.update(len({row["frame"] for row in found}))
        journal.add({part: []})
    except (OSError, ValueError) as error:
        print(f"au-llava: {error}", file=sys.stderr)
        journal.add({part: [failure(name, str(error))]})


def _video_bar(video, per_second: float | None) -> tqdm:
    """Progress in frames that are looked at: so many a second, and the time left."""
    share = min(1.0, per_second / video.rate) if per_second else 1.0
    quiet = None if PartialState().is_main_process else True
    return tqdm(desc=video.path, total=math.ceil(video.count * share) or None, unit="frame", disable=quiet)


def _show_video(journal: Journal, pipe, name: str, known: Input, asked: list[Question], arguments: Namespace) -> bool:
    """The time lines beside the table and, where overlays are asked for, the film; whether that went well."""
    from .films import write_film, write_timelines
    from .videos import Video

    def found() -> Iterator[dict]:
        return (row for row in _smooth(journal.rows([known.part]), asked, arguments) if "frame" in row)

    def draw() -> None:
        video = Video.open(name)
        place = _PARTIAL.sub(r"\1_", known.place)
        write_timelines(Path(f"{arguments.output}.{place}"), video, found, asked, arguments.fps)
        if arguments.overlay:
            limits = pipe.processor.calibration.get("detection", {}).get("thresholds", {})
            limits = limits if asked[0][0] == "detection" else None
            write_film(_overlay(arguments.overlay, f"{known.place}.mp4"), video, found(), asked[0], limits)

    return not any(True for _ in found()) or _drawn(name, draw)


def _drawn(name: str, draw: Callable[[], None]) -> bool:
    """Whether an input could be drawn; if not, the reason is told, and no answer is lost for it."""
    try:
        draw()
        return True
    except (OSError, ValueError) as error:
        print(f"au-llava: {name}: not drawn ({error})", file=sys.stderr)
        return False


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
    there = {column.name for column in mapped}
    if absent := [name for name in OPENFACE if name not in there]:
        print("Columns of OpenFace that are not there:", ", ".join(absent), file=sys.stderr)


def _print(photo: Photo) -> None:
    if not photo.error and not photo.faces:
        print(f"{readable(photo.source)}: no face found\n", flush=True)
    for place, entries in enumerate(zip(*photo.answers, strict=True), 1):
        print(face_heading(readable(photo.source), place, len(photo.faces), entries[0]))
        print(text_table(list(entries)), flush=True, end="\n\n")


def face_heading(name: str, place: int, count: int, entry: dict) -> str:
    """A line that tells a face: its picture, number, box and score."""
    box = entry["box"] and " ".join(f"{side:.0f}" for side in entry["box"])
    score = "" if entry["score"] is None else f", score {entry['score']:.2f}"
    return f"{name}, face {place} of {count}, {f'box {box}' if box else 'the whole picture'}{score}"


def _save_overlay(photo: Photo, place: str, target: Path | None) -> bool:
    if not target or not photo.image:
        return True
    path, image = _overlay(target, f"{place}.png"), photo.image

    def draw() -> None:
        with replaced(path) as draft:
            draw_sheet(image, *photo.answers, crops=[face.crop for face in photo.faces]).save(draft)

    return _drawn(photo.source, draw)


def _overlay(target: Path, place: str) -> Path:
    """Where an overlay goes: to its place in the folder `target`, or to the file of that name."""
    return target if _is_file(target) else target / place


def _check_overlay(target: Path, inputs: list[str]) -> None:
    if len(inputs) != 1:
        raise ValueError(f"--overlay {target} is one file, but there are {len(inputs)} inputs; name a folder.")
    endings = (".mp4",) if is_video(inputs[0]) else PICTURES
    if target.suffix.lower() not in endings:
        raise ValueError(f"--overlay {target}: for {inputs[0]} name a folder, or a file in {', '.join(endings)}.")
    if target.exists() and Path(inputs[0]).exists() and target.samefile(inputs[0]):
        raise ValueError(f"--overlay {target} is the input, which would be lost; name another file, or a folder.")


def _is_file(target: Path) -> bool:
    return target.suffix.lower() in PICTURES + VIDEOS and not target.is_dir()
