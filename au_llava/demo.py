"""`au-llava demo`: the example pictures and a real photograph, as tables to read and a report to look at."""

import base64
import io
import sys
from argparse import Namespace
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from PIL import Image

from . import default_checkpoint
from .action_units import TASKS, describe, get_task
from .drawing import answer_text, draw_faces, is_active, shown
from .inputs import PICTURES
from .photos import Photo, check_detector, detector_name, load_pipeline, provenance, questions, recognize
from .recognize import face_heading
from .tables import replaced, text_table


LEGEND = (
    "yes/no with the probability that the unit is present; levels and intensities with the mean of the model's\n"
    "distribution; a dot where the unit was not asked about in that format.\n"
)
ASTRONAUT = "astronaut (NASA, public domain)"
SYNTHETIC_ONLY = (
    "The checkpoint that comes with AU-LLaVA was trained on rendered faces only, never on photographs of people. "
    "On real photographs its answers are a demonstration and nothing to rely on."
)


def pictures() -> dict[str, Path | Image.Image]:
    """The demonstration's pictures by name: those of `examples/` and scikit-image's photograph of an astronaut."""
    from skimage.data import astronaut

    examples = sorted(Path(default_checkpoint(), "examples").iterdir())
    found: dict[str, Path | Image.Image] = {path.name: path for path in examples if path.suffix in PICTURES}
    return found | {ASTRONAUT: Image.fromarray(astronaut())}


def run(arguments: Namespace) -> int:
    """Carry out the subcommand; the exit code."""
    check_detector(arguments.detector)
    pipe = load_pipeline(arguments.model, arguments.device)
    shown, asked = pictures(), questions(TASKS)
    photos = []
    for name, photo in zip(shown, recognize(pipe, shown.values(), asked, arguments.detector), strict=True):
        photo.source = name
        photos.append(photo)
        if photo.error or not photo.faces:
            print(f"{name}: {photo.error or 'no face found'}\n")
        for place, entries in enumerate(zip(*photo.answers, strict=True), 1):
            print(face_heading(name, place, len(photo.faces), entries[0]), text_table(list(entries)), "", sep="\n")
    print(LEGEND)
    faces = [face for photo in photos for face in photo.faces]
    about = provenance(pipe, f"{arguments.detector} ({detector_name(faces)})")
    note = SYNTHETIC_ONLY if pipe.model.name_or_path == default_checkpoint() else ""
    report = arguments.output / "report.html"
    with replaced(report) as draft:
        draft.write_text(render(photos, about, note), encoding="utf-8")
    print(note, f"The report is {report}: open it in a browser.", sep="\n", file=sys.stderr)
    return 1 if any(photo.error for photo in photos) else 0


def render(photos: list[Photo], about: dict[str, str], note: str) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        photos (`list[Photo]`): The pictures with their answers to all three tasks.
        about (`dict[str, str]`): What produced the numbers, line by line.
        note (`str`): What a reader has to know before believing them; may be empty.
    """
    shown = [
        {
            "photo": photo,
            "drawn": data_uri(draw_faces(photo.image, photo.answers[0])) if photo.image else None,
            "faces": [
                {"crop": data_uri(face.crop), "entries": entries}
                for face, *entries in zip(photo.faces, *photo.answers, strict=True)
            ],
        }
        for photo in photos
    ]
    texts = {task: describe(task) for task in TASKS}
    return template("report.html").render(heading=face_heading, shown=shown, about=about, note=note, texts=texts)


def template(name: str) -> Template:
    """A page of this package, which may use `bars.html`."""
    pages = Environment(
        loader=PackageLoader("au_llava", "."), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    pages.globals.update(answer_text=answer_text, get_task=get_task, is_active=is_active, shown=shown)
    return pages.get_template(name)


def data_uri(image: Image.Image) -> str:
    """A picture as the text of a link, at most 900 pixels wide and high."""
    image = image.copy()
    image.thumbnail((900, 900))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
