"""Where on a face crop an Action Unit is to be seen: the words of its `region` as ellipses, and a picture of them.

What an Action Unit is stands in [`action_units`]; this module knows only where the parts of a face lie in a crop that
[`align`] made. The parts of a real face lie near there, not exactly there.
"""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from .action_units import ActionUnit
from .drawing import ACTIVE, INK, _font
from .face_alignment import CROP_SIZE


Ellipse = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of a crop

MIDDLE = CROP_SIZE / 2
# Centre (x, y) and half axes in pixels of a crop. What lies left of the middle has a twin on the other side. Longer
# names stand before shorter ones that they begin with.
PARTS: dict[str, tuple[Ellipse, ...]] = {
    "sides and root of the nose": ((112, 92, 9, 9), (99, 114, 8, 16)),
    "centre of the forehead": ((112, 51, 24, 14),),
    "sides of the forehead": ((76, 53, 17, 13),),
    "forehead": ((85, 53, 26, 14),),
    "inner eyebrow": ((96, 74, 12, 9),),
    "outer eyebrow": ((71, 76, 13, 9),),
    "eyebrow": ((83, 75, 24, 10),),
    "skin between them": ((112, 76, 9, 11),),
    "upper eyelid": ((84, 86, 17, 6),),
    "lower eyelid": ((84, 98, 17, 6),),
    "eyelid": ((84, 92, 18, 10),),
    "outer eye corner": ((61, 95, 10, 9),),
    "cheek": ((72, 124, 18, 16),),
    "nasolabial furrow": ((87, 134, 8, 14),),
    "mouth corner": ((88, 155, 11, 10),),
    "skin below them": ((87, 172, 10, 8),),
    "upper lip": ((112, 147, 24, 7),),
    "lower lip": ((112, 165, 22, 8),),
    "between the lips": ((112, 156, 26, 7),),
    "lip": ((112, 156, 30, 15),),
    "chin": ((112, 186, 22, 13),),
    "jaw": ((112, 181, 45, 25),),
}


def region(unit: ActionUnit) -> list[Ellipse]:
    """The places on an aligned crop that a unit's `region` names; of paired ones only those on its `side`.

    Args:
        unit (`ActionUnit`): From the catalogue or of your own. Words that name no known part of a face are
            passed over.

    Returns:
        `list`: The ellipses' bounding boxes, (x0, y0, x1, y1) in pixels of a crop of 224 x 224.

    Example:

    >>> from au_llava.action_units import select
    >>> region(select("FEAFA12")[0])  # the subject's left mouth corner lies right in the picture
    [(125.0, 145, 147.0, 165)]
    """
    found = []
    for name in re.findall(rf"\b({'|'.join(PARTS)})s?\b", unit.region.lower()):
        for x, y, wide, high in PARTS[name]:
            twin = 2 * MIDDLE - x
            centres = {x, twin} if unit.side == "both" or x == twin else {x if unit.side == "right" else twin}
            found += [(centre - wide, y - high, centre + wide, y + high) for centre in sorted(centres)]
    return found


def region_mask(unit: ActionUnit) -> np.ndarray:
    """`(224, 224)` booleans: which pixels of a crop belong to the unit's [`region`]."""
    return np.asarray(mask_of([unit], 1)) > 0


def mask_of(units: Sequence[ActionUnit], scale: float) -> Image.Image:
    """Where some units are on a face crop that is enlarged: 255, elsewhere 0.

    Args:
        units (`Sequence[ActionUnit]`): One, several, or none.
        scale (`float`): How many pixels one of a crop of 224 takes.
    """
    mask = Image.new("L", (round(CROP_SIZE * scale),) * 2)
    draw = ImageDraw.Draw(mask)
    for unit in units:
        for ellipse in region(unit):
            draw.ellipse([side * scale for side in ellipse], 255)
    return mask


def draw_regions(crop: Image.Image, units: Sequence[ActionUnit], side: int = 448) -> Image.Image:
    """A face crop on which only the regions of some units keep their colours, outlined and named beside it.

    Args:
        crop (`PIL.Image.Image`): An aligned crop, as [`find_faces`] gives it.
        units (`Sequence[ActionUnit]`): The units to show, such as those found active; none gives the crop alone.
        side (`int`, defaults to 448): Height of the picture in pixels, at least 224.

    Returns:
        `PIL.Image.Image`: RGB; wider than high where names stand beside the face.
    """
    scale = side / CROP_SIZE
    face = crop.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    shown = [unit for unit in units if region(unit)]
    if not shown:
        return face
    dull = ImageEnhance.Brightness(ImageOps.grayscale(face).convert("RGB")).enhance(0.6)
    size = min(side // 20, int(0.85 * side / len(shown)))
    font = _font(size, bold=True)
    margin = round(max(font.getlength(unit.code) for unit in shown)) + 2 * size
    image = Image.new("RGB", (side + margin, side), "white")
    image.paste(Image.composite(face, dull, mask_of(shown, scale)), (0, 0))
    draw = ImageDraw.Draw(image)
    # A line leads from each name to the first part that its unit's region names, on the right side of the picture. The
    # name stands level with it, or as near as there is room.
    ends = {unit.code: max(region(unit)[:2], key=lambda box: box[2]) for unit in shown}
    shown.sort(key=lambda unit: ends[unit.code][1] + ends[unit.code][3])
    step = min(1.3 * size, side / len(shown))
    levels, level = {}, -step / 2
    for place, unit in enumerate(shown):
        _, y0, _, y1 = ends[unit.code]
        level = max(level + step, (y0 + y1) / 2 * scale)
        levels[unit.code] = min(level, side - step * (len(shown) - place - 0.5))
    for width, colour in ((max(3, side // 90), "white"), (max(1, side // 220), ACTIVE)):
        for unit in shown:
            for box in region(unit):
                draw.ellipse([edge * scale for edge in box], outline=colour, width=width)
        for code, (_, y0, x1, y1) in ends.items():
            end = [side, levels[code], side + size // 2, levels[code]]
            draw.line([x1 * scale, (y0 + y1) / 2 * scale, *end], colour, width)
    for code, height in levels.items():
        draw.text((side + size, height), code, INK, font, anchor="lm")
    return image
