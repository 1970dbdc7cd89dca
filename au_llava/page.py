"""What the web page shows: a photograph's or a video's answers as HTML that needs no other file, and as downloads.

Nothing here knows of Gradio, and nothing is kept: pictures and tables stand in the HTML itself.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from markupsafe import Markup

from .action_units import cover, write_answer
from .demo import data_uri, template
from .drawing import draw_evidence, draw_faces, is_active
from .face_alignment import Face
from .face_regions import draw_regions
from .films import FACES, entry, write_timelines
from .photos import Question, detector_name, provenance, recognize
from .tables import columns, rows, write_table
from .videos import Video, recognize_video


PHOTO_BYTES, PHOTO_FACES = 20_000_000, 10
VIDEO_BYTES, VIDEO_SECONDS = 100_000_000, 60
STYLES = [Path(__file__).with_name(name) for name in ("bars.css", "page.css")]


def show_photo(pipe, path: str, asked: list[Question], detector: str = "auto", evidence: bool = False) -> str:
    """Recognise a photograph and show each face with its box, regions, bars, prompts and raw answers.

    Args:
        pipe ([`FacialActionUnitPipeline`]): What recognises.
        path (`str`): A picture of at most `PHOTO_BYTES`; its `PHOTO_FACES` largest faces are taken.
        asked (`list[Question]`): Tasks and their Action Units, as [`questions`] gives them.
        detector (`str`, defaults to `"auto"`): See [`find_faces`].
        evidence (`bool`, defaults to `False`): Also draw where the model looked, by attention.

    Returns:
        `str`: HTML.

    Raises:
        ValueError: The file is too large or no picture; the message names it without its folder.
    """
    name = Path(path).name
    _check_size(path, PHOTO_BYTES)
    [photo] = recognize(pipe, [path], asked, detector, PHOTO_FACES, return_evidence=evidence)
    if photo.error:
        raise ValueError(photo.error.replace(path, name))
    faces = [
        {
            "number": number,
            "score": face.score,
            "tasks": [
                {"entry": answers, "looked": _looked(face, answers) if evidence else None}
                | _regions(face, answers, units)
                for (_, units), answers in zip(asked, entries, strict=True)
            ],
        }
        for number, (face, *entries) in enumerate(zip(photo.faces, *photo.answers, strict=True), 1)
    ]
    raw = [
        _raw_answers(pipe, photo.faces, answers, question)
        for question, answers in zip(asked, photo.answers, strict=True)
    ]
    return template("page.html").render(
        drawn=data_uri(draw_faces(photo.image, photo.answers[0])),
        faces=faces,
        found_by=detector_name(photo.faces),
        prompts=[
            prompt | {"answers": texts}
            for question, some in zip(asked, raw, strict=True)
            for prompt, texts in zip(_prompts(pipe, question), some, strict=True)
        ],
        guessed=_guessed(pipe, asked),
        downloads=_downloads(pipe, rows(photo, name), asked, detector, Path(name).stem),
    )  # fmt: skip


def _check_size(path: str, most: int) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{Path(path).name}: uploads are deleted after a while, and this one is; upload it again.")
    size = Path(path).stat().st_size
    if size > most:
        raise ValueError(
            f"{Path(path).name}: {size / 1e6:.0f} MB are too many; make it {most / 1e6:.0f} MB or smaller."
        )


def _regions(face: Face, answers: dict, units: list) -> dict:
    active = [unit for unit in units if is_active(answers["action_units"][unit.code], answers["task"])]
    return {"active": [unit.code for unit in active], "picture": data_uri(draw_regions(face.crop, active))}


def _looked(face: Face, answers: dict) -> str:
    return data_uri(draw_evidence(face.crop, answers["action_units"], answers["task"], 400))


def _prompts(pipe, question: Question) -> list[dict]:
    """What the model is asked: whole lists that it was trained on, where they hold the units in question."""
    asked = pipe.processor.questions(*question)
    return [{"task": about, "text": pipe.processor.prompt(about, whole)} for about, whole in asked]


def _raw_answers(pipe, faces: list[Face], answers: list[dict], question: Question) -> list[list[str]]:
    """What the model wrote about each face, for each list that it was asked about, before any calibration."""
    asked, found = pipe.processor.questions(*question), [[face["action_units"] for face in answers]]
    if asked != [question] or question[0] in pipe.processor.calibration or pipe.processor.mirror:
        found = pipe.forward(faces, questions=asked, batch_size=8, calibrated=False, mirror=False)
    return [
        [write_answer([face[unit.code]["value"] for unit in whole], about, whole) for face in some]
        for (about, whole), some in zip(asked, found, strict=True)
    ]


def _guessed(pipe, asked: list[Question]) -> list[dict]:
    """Units that the model was not trained to tell, by task."""
    lists = pipe.processor.trained_lists
    strange = [(task, cover(task, units, lists)[1]) for task, units in asked]
    return [{"task": task, "units": [unit.code for unit in units]} for task, units in strange if lists and units]


def show_video(
    pipe,
    path: str,
    asked: list[Question],
    per_second: float = 2.0,
    detector: str = "auto",
    tell: Callable[[float], object] = lambda share: None,
) -> str:
    """Recognise a video and show a time line for each task.

    Args:
        path (`str`): A video of at most `VIDEO_BYTES` and `VIDEO_SECONDS`; of each frame the largest faces are taken.
        per_second (`float`, defaults to 2.0): How many frames of each second to look at.
        tell: Is told how much is done, from 0 to 1.

    Returns:
        `str`: HTML.

    Raises:
        ValueError: It is too large, too long, or no video; the message names it without its folder. Of a damaged video
            what could be read is shown, with a note.
    """
    name = Path(path).name
    _check_size(path, VIDEO_BYTES)
    too_long = f"{name}: longer than {VIDEO_SECONDS} seconds; cut it, or use `au-llava recognize`, which has no limit."
    found: list[dict] = []
    note = ""
    try:
        video = Video.open(path)
        seconds = video.count / video.rate
        if seconds > VIDEO_SECONDS:
            raise ValueError(too_long)
        with closing(recognize_video(pipe, video, asked, per_second, detector=detector, max_faces=FACES)) as groups:
            for group in groups:
                found += group
                if group[-1]["time"] > VIDEO_SECONDS:  # what a file says of its length may be wrong or missing
                    break
                tell(min(1.0, group[-1]["time"] / (seconds or VIDEO_SECONDS)))
    except ValueError as error:
        note = str(error).replace(path, name)
        if not found:
            raise ValueError(note) from error
    if found[-1]["time"] > VIDEO_SECONDS:
        raise ValueError(too_long)
    found = [row | {"file": name} for row in found]
    with TemporaryDirectory() as folder:
        written = write_timelines(Path(folder, "timeline"), video, lambda: iter(found), asked, per_second)
        lines = [_link(line, "image/png") for line in written]
    seen = Counter(row["face"] for row in found if row["status"] == "ok")
    return template("page.html").render(
        note=note,
        frames=len({row["frame"] for row in found}),
        still=_still(video, found, asked[0]) if seen else None,
        seen=seen,
        timelines=[{"task": task, "picture": line} for (task, _), line in zip(asked, lines, strict=False)],
        prompts=[prompt for question in asked for prompt in _prompts(pipe, question)],
        guessed=_guessed(pipe, asked),
        downloads=_downloads(pipe, found, asked, detector, Path(name).stem),
    )


def _still(video: Video, found: list[dict], question: Question) -> dict:
    """The first of the frames with the most faces, with their boxes and ids."""
    counts = Counter(row["frame"] for row in found if row["status"] == "ok")
    number, _ = counts.most_common(1)[0]
    frame = next(frame for frame in video.frames(start=number))
    entries = [entry(row, question) for row in found if row["frame"] == number and row["status"] == "ok"]
    return {"time": frame.time, "picture": data_uri(draw_faces(frame.image, entries))}


def _link(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _downloads(pipe, found: list[dict], asked: list[Question], detector: str, stem: str) -> list[dict]:
    """The rows as links that hold a CSV and a JSON file; the JSON says what each column means and what made it."""
    chosen = columns(asked, pipe.processor.calibration)
    with TemporaryDirectory() as folder:
        table, whole = Path(folder, "faces.csv"), Path(folder, "faces.json")
        write_table(table, iter(found), chosen, provenance(pipe, detector))
        meaning = json.loads(table.with_name("faces.csv.columns.json").read_text(encoding="utf-8"))
        named = [{column.name: column.value(row) for column in chosen} for row in found]
        whole.write_text(json.dumps(meaning | {"rows": named}, ensure_ascii=False, indent=1), encoding="utf-8")
        return [
            {"name": f"{stem}.csv", "link": _link(table, "text/csv")},
            {"name": f"{stem}.json", "link": _link(whole, "application/json")},
        ]


def show_error(message: str) -> str:
    """A message that a screen reader tells at once."""
    return str(Markup('<p class="au-error" role="alert">{}</p>').format(message))
