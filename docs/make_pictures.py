"""Render the pictures of `docs/units.md` and write the page: every unit at rest and at its maximum, and each task.

python docs/make_pictures.py
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from au_llava.action_units import CATALOGUE, PRESETS, TASKS, ActionUnit, select
from au_llava.datasets_scripts.synthetic_faces.expression import (
    expression_of_unit,
    facs_intensities,
    feafa_intensities,
    level,
    occurrence,
)
from au_llava.datasets_scripts.synthetic_faces.renderer import render
from au_llava.datasets_scripts.synthetic_faces.sampler import identity_of
from au_llava.datasets_scripts.synthetic_faces.scene import Scene
from au_llava.drawing import draw_bars, draw_face_map


DOCS = Path(__file__).parent
PERSON = dataclasses.replace(identity_of(31, "validation"), frame=None, lenses=None)
WINDOW, TILE = (34, 36, 190, 216), (112, 129)  # the face in a crop: left, top, right, bottom; size of a tile
SAME_PICTURE = {"AU45": "AU43"}  # one frame of a blink shows closed eyes
SMILE = {"cheek_raise_left": 0.7, "cheek_raise_right": 0.7, "corner_pull_left": 0.9, "corner_pull_right": 0.75}
SMILE |= {"lips_part": 0.4, "inner_brow_raise_left": 0.2, "inner_brow_raise_right": 0.2}


def face(activations: dict[str, float]) -> Image.Image:
    """The person's crop with an expression, from the front."""
    return Image.fromarray(render(PERSON, activations, Scene(noise=0.0), np.random.default_rng(0)).image)


def draw_units() -> None:
    """`units/CODE.jpg`: the face at rest beside the face with the unit at its maximum."""
    rest = face({})
    for code in CATALOGUE:
        if code not in SAME_PICTURE:
            pair = Image.new("RGB", (2 * TILE[0] + 4, TILE[1]), "white")
            for left, crop in ((0, rest), (TILE[0] + 4, face(expression_of_unit(code, 1.0)))):
                pair.paste(crop.crop(WINDOW).resize(TILE, Image.Resampling.LANCZOS), (left, 0))
            pair.save(DOCS / "units" / f"{code}.jpg", quality=80)


def draw_tasks() -> None:
    """`units/TASK.jpg`: one face beside the labels that the renderer gives it for the task."""
    crop, facs, feafa = face(SMILE), facs_intensities(SMILE), feafa_intensities(SMILE)
    labels = {
        "detection": {code: occurrence(value) for code, value in facs.items()},
        "intensity_level": {code: level(value) for code, value in facs.items()},
        "intensity": feafa,
    }
    for task, values in labels.items():
        answers = {
            unit.code: {"name": unit.name, "value": values[unit.code], "expected_value": values[unit.code]}
            for unit in select(None, task)
        }
        bars = draw_bars(answers, task, 420)
        sheet = Image.new("RGB", (224 + bars.width, max(224, bars.height)), "white")
        sheet.paste(crop, (0, 0))
        sheet.paste(bars, (224, 0))
        sheet.save(DOCS / "units" / f"{task}.jpg", quality=80)
        if task == "intensity":
            draw_face_map(answers, task).quantize(64).save(DOCS / "face_map.png", optimize=True)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def line(unit: ActionUnit) -> str:
    """A unit's row in the page."""
    picture = SAME_PICTURE.get(unit.code, unit.code)
    presets = ", ".join(name for name, codes in PRESETS.items() if unit.code in codes)
    muscles = f" *{', '.join(unit.muscles)}*" if unit.muscles else ""
    return (
        f"| `{unit.code}` **{unit.name}** | ![{unit.code} at rest and at its maximum](units/{picture}.jpg) "
        f"| {_capital(unit.action)}.{muscles} | {unit.region} | {presets} |"
    )


PAGE = """\
# Tasks and Action Units

<!-- Written by `python docs/make_pictures.py` from action_units.py; change those, not this page. -->

The pictures are rendered, so what they show is known exactly. Their bars are labels, not a model's answers.

## The three tasks

{tasks}

## Units of FACS

The Facial Action Coding System numbers what muscles do. `AU25` to `AU27` open the mouth ever further. `AU45` is an
event in time; in one picture it looks like `AU43`.

{facs}

## Units of FEAFA

The data set FEAFA numbers 24 units of its own: `FEAFA12` is not `AU12`. Left and right are taken
for the subject's, so that the left mouth corner lies on the right of the picture; its papers do not say whose
they are. A jaw thrust can hardly be seen from the front.

{feafa}

A unit of your own is an `ActionUnit` with a code, a name, what it looks like and where to look; see
[the quick start](quick_start.md#some-units-and-units-of-your-own). A model answers it as well as its training lets it.
"""
HEAD = """\
| unit | at rest, at its maximum | what it looks like, *its muscles* | where to look | in |
|---|---|---|---|---|
"""


def page() -> str:
    """`units.md`."""
    tasks = [
        f"### `{task.name}`: {task.answer}\n\n"
        f"{_capital(task.purpose.removeprefix('Task: '))} It asks about `{task.preset}` unless you name units.\n\n"
        f"![A face and its right answers to {task.name}](units/{task.name}.jpg)"
        for task in TASKS.values()
    ]
    tables = {
        name: HEAD + "\n".join(line(unit) for unit in CATALOGUE.values() if unit.code.startswith("FEAFA") == ours)
        for name, ours in (("facs", False), ("feafa", True))
    }
    return PAGE.format(tasks="\n\n".join(tasks), **tables)


if __name__ == "__main__":
    (DOCS / "units").mkdir(exist_ok=True)
    draw_units()
    draw_tasks()
    (DOCS / "units.md").write_text(page())
