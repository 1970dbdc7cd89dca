"""Draw every unit at 0, 0.5 and 1 on three people beside its difference map; or faces of other makes, in one picture.

python -m au_llava.datasets_scripts.synthetic_faces.sheet --output docs/synthetic_faces_units.jpg
python -m au_llava.datasets_scripts.synthetic_faces.sheet --makes --output docs/synthetic_faces_makes.jpg
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ... import action_units
from .expression import FACS_CODES, expression_of_unit
from .identity import Identity
from .renderer import render
from .sampler import identity_of
from .scene import Scene
from .variation import another_make


PEOPLE = (26, 31, 21)  # of the split `validation`
UNITS = (*FACS_CODES, "FEAFA10", "FEAFA12", "FEAFA16", "FEAFA17", "FEAFA18", "FEAFA23")
INTENSITIES = (0.0, 0.5, 1.0)
WINDOW = (34, 36, 190, 216)  # the face in a crop: left, top, right, bottom
TILE = (70, 81)
TOGETHER = (("AU6",), ("AU6", "AU12", "AU25"), ("AU4", "AU9"), ("AU1", "AU2", "AU5", "AU26"))  # shown in other makes
MAKES = 4  # the usual one first


def draw_unit(identity: Identity, code: str) -> list[np.ndarray]:
    """Crops (224, 224, 3) of one person with a unit at each of `INTENSITIES`, from the front, and the difference map.

    The difference map shows in which pixels the last crop differs from the first one.
    """
    crops = []
    for intensity in INTENSITIES:
        activations = expression_of_unit(code, intensity)
        crops.append(render(identity, activations, Scene(noise=0.0), np.random.default_rng(0)).image)
    difference = np.abs(crops[-1].astype(int) - crops[0]).max(-1, keepdims=True)
    return [*crops, np.repeat(np.clip(3 * difference, 0, 255), 3, -1).astype(np.uint8)]


def draw_sheet(people: tuple[int, ...] = PEOPLE, units: tuple[str, ...] = UNITS) -> Image.Image:
    """One row a unit, two blocks of rows side by side; four tiles a person."""
    identities = [dataclasses.replace(identity_of(k, "validation"), frame=None, lenses=None) for k in people]
    half, margin, line = (len(units) + 1) // 2, 92, 4
    width = margin + len(people) * (4 * TILE[0] + line)
    sheet = Image.new("RGB", (2 * width, half * (TILE[1] + line) + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for block in range(2):
        for k in range(len(people)):
            for column, title in enumerate((*map(str, INTENSITIES), "difference")):
                x = block * width + margin + k * (4 * TILE[0] + line) + column * TILE[0]
                draw.text((x + 2, 2), title, fill="black")
    for number, code in enumerate(units):
        left, top = number // half * width, number % half * (TILE[1] + line) + 16
        name = action_units.CATALOGUE[code].name.replace(" ", "\n")
        draw.text((left + 4, top + 4), f"{code}\n{name}", fill="black")
        for k, identity in enumerate(identities):
            for column, crop in enumerate(draw_unit(identity, code)):
                tile = Image.fromarray(crop).crop(WINDOW).resize(TILE, Image.Resampling.LANCZOS)
                sheet.paste(tile, (left + margin + k * (4 * TILE[0] + line) + column * TILE[0], top))
    return sheet


def draw_makes(people: tuple[int, ...] = PEOPLE) -> Image.Image:
    """One block of columns a person: four expressions as usual, and in three other makes."""
    left = 70
    sheet = Image.new("RGB", (left + MAKES * len(people) * (TILE[0] + 2), 16 + len(TOGETHER) * (TILE[1] + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, codes in enumerate(TOGETHER):
        draw.text((4, 20 + row * (TILE[1] + 4)), "+".join(codes).replace("+AU", "\n+"), fill="black")
    for column, number in enumerate(people):
        identity = dataclasses.replace(identity_of(number, "validation"), frame=None, lenses=None)
        for make in range(MAKES):
            x = left + (column * MAKES + make) * (TILE[0] + 2)
            draw.text((x + 2, 2), f"other make {make}" if make else "usual", fill="black")
            person, scene = identity, Scene(noise=0.0)
            if make:
                person, scene = another_make(np.random.default_rng((number, make)), identity, scene)
            for row, codes in enumerate(TOGETHER):
                shown = {}
                for code in codes:
                    shown |= expression_of_unit(code, 0.9)
                crop = Image.fromarray(render(person, shown, scene, np.random.default_rng(0)).image)
                tile = crop.crop(WINDOW).resize(TILE, Image.Resampling.LANCZOS)
                sheet.paste(tile, (x, 16 + row * (TILE[1] + 4)))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--makes", action="store_true", help="draw some expressions as in other makes instead")
    parser.add_argument("--output", type=Path, default=Path("docs/synthetic_faces_units.jpg"), help="the picture")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    (draw_makes() if arguments.makes else draw_sheet()).save(arguments.output, quality=64)


if __name__ == "__main__":
    main()
