"""Pictures for people: bars per Action Unit, face boxes on a photograph, both on one sheet, a drawn face with
the places of its units, where the model looked, and a video's time line.

Most functions take what [`FacialActionUnitPipeline`] gives, and give a PIL image. The colours are Okabe and Ito's
(2008), which people with any kind of colour vision tell apart; no meaning rests on colour alone.

Example:

>>> from au_llava.drawing import draw_bars
>>> smile = {"AU12": {"name": "Lip Corner Puller", "value": 4, "probability": 0.7, "expected_value": 3.8}}
>>> draw_bars(smile, "intensity_level", width=480).width
480
"""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from .action_units import CATALOGUE, get_task


INK, PALE, TRACK, ACTIVE = "#1a1a1a", "#5f6368", "#e3e6ea", "#0072B2"
INACTIVE = "#a3abb5"
SEEN = 0.1  # from which intensity on, 0 to 1, a unit is said to act; less is a trace
AS_ANSWERED = ("intensity",)  # tasks whose answers are drawn, for calibration sets those right, and not the mean
FACE_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def answer_text(unit: dict, task: str) -> str:
    """How an answer reads beside its bar: `present`, `absent`, a level, or an intensity with two decimals.

    Args:
        unit (`dict`): One entry of `action_units` in a pipeline's result.
        task (`str`): The task that the entry answers.

    Example:

    >>> answer_text({"value": 1, "expected_value": 0.93}, "detection")
    'present'
    >>> answer_text({"value": 0.93, "expected_value": 0.93}, "detection")  # with decision="mean"
    '0.93'
    """
    chosen, value = get_task(task), unit["value"]
    if value not in chosen.values:  # a mean
        return f"{value:.2f}"
    return ("absent", "present")[int(value)] if len(chosen.values) == 2 else chosen.write(value)


def is_active(unit: dict, task: str) -> bool:
    """Whether an answer says that a unit acts: a value above the lowest, or a mean that is nearer to such a value.

    An intensity has to be `SEEN` at least.

    >>> is_active({"value": 0.3}, "detection"), is_active({"value": 0.3, "threshold": 0.25}, "detection")
    (False, True)
    """
    lowest, second = get_task(task).values[:2]
    return unit["value"] >= (SEEN if task == "intensity" else unit.get("threshold", (lowest + second) / 2))


def shown(unit: dict, task: str) -> float:
    """What is drawn of an answer: the expected value, which tells more than 0 or 1, or a level; see `AS_ANSWERED`.

    >>> unit = {"value": 1, "expected_value": 0.15}
    >>> shown(unit, "intensity_level"), shown(unit, "intensity")
    (0.15, 1)
    """
    return unit["value"] if task in AS_ANSWERED else unit["expected_value"]


def draw_bars(action_units: dict[str, dict], task: str, width: int = 560, title: str | None = None) -> Image.Image:
    """A bar for each Action Unit of one face.

    The bar is what [`shown`] gives, on a scale of the task's whole range: of an `intensity` the answer, else the
    expected value, which for `detection` is the probability that the unit is present; a line stands at the threshold
    from which it is called so, where the result tells it. Where it tells the interval in which the truth lies nine
    times in ten, a line with two ends spans it. The text at a bar's end is the model's answer. Units that do not act
    have grey bars; see [`is_active`].

    Args:
        action_units (`dict[str, dict]`): `face["action_units"]` of a pipeline's result.
        task (`str`): `detection` (0 or 1), `intensity_level` (0 to 5) or `intensity` (0 to 1).
        width (`int`, defaults to 560): Width of the picture in pixels, at least 240. Text grows with it.
        title (`str`, *optional*): A line above the bars; defaults to the task and its range.

    Returns:
        `PIL.Image.Image`: RGB, `width` pixels wide, as high as it takes.

    Raises:
        ValueError: Unknown task, no Action Unit, or too narrow.
    """
    chosen = get_task(task)
    if width < 240 or not action_units:
        raise ValueError(
            f"width is {width} with {len(action_units)} Action Units; give at least 240 pixels and 1 unit."
        )
    size = max(11, width // 37)
    plain, bold, row = _font(size), _font(size, bold=True), round(size * 1.75)
    top, pad = round(size * 3.7), size // 2 + 2
    image = Image.new("RGB", (width, top + row * len(action_units) + row + pad), "white")
    draw = ImageDraw.Draw(image)
    draw.text((pad, pad), _fit(title or _title(task), bold, width - 2 * pad), INK, bold)
    meanings = {"detection": "probability", "intensity_level": "mean; text: answer", "intensity": "answer"}
    meaning = f"bar: {meanings[task]}"
    if any("threshold" in unit for unit in action_units.values()):
        meaning += "; line: threshold"
    if any("interval" in unit for unit in action_units.values()):
        meaning += "; line: 9 of 10 true values"
    draw.text((pad, pad + 1.5 * size), _fit(meaning, plain, width - 2 * pad), PALE, plain)

    code_width = min(max(bold.getlength(code) for code in action_units) + size, 0.3 * width)
    left = round(pad + code_width + min(0.36 * width, max(plain.getlength(u["name"]) for u in action_units.values())))
    right = round(width - pad - size / 2 - max(plain.getlength(t) for t in ("present", chosen.texts[-1])))
    left, low, high = min(left + size, right - width // 5), chosen.values[0], chosen.values[-1]

    def across(value: float) -> float:
        return left + (right - size - left) * (value - low) / (high - low)

    bottom = top + row * len(action_units)
    steps = len(chosen.values) - 1 if 2 < len(chosen.values) < 12 else 4 if right - left > 12 * size else 2
    for tick in (low + (high - low) * step / steps for step in range(steps + 1)):
        draw.line([across(tick), top, across(tick), bottom], TRACK, 1)
        draw.text((across(tick), bottom + 2), f"{tick:g}", PALE, _font(size - 2), anchor="mt")
    for index, (code, unit) in enumerate(action_units.items()):
        middle = top + row * index + row / 2
        active = is_active(unit, task)
        draw.text((pad, middle), _fit(code, bold, code_width - size / 2), INK, bold, anchor="lm")
        name = _fit(unit["name"], plain, left - pad - code_width - size / 2)
        draw.text((pad + code_width, middle), name, INK, plain, anchor="lm")
        reach = row * 0.28
        draw.rectangle([left, middle - reach, across(high), middle + reach], TRACK)
        end = across(min(max(shown(unit, task), low), high))
        draw.rectangle([left, middle - reach, end, middle + reach], ACTIVE if active else INACTIVE)
        if "threshold" in unit:
            limit, beyond = across(unit["threshold"]), row * 0.4
            draw.line([limit, middle - beyond, limit, middle + beyond], INK, max(1, size // 8))
        if "interval" in unit:
            ends, cap = [across(end) for end in unit["interval"]], row * 0.18
            caps = ([end, middle - cap, end, middle + cap] for end in ends)
            for line in ([ends[0], middle, ends[1], middle], *caps):
                draw.line(line, INK, max(1, size // 10))
        text = answer_text(unit, task)
        draw.text((right, middle), text, INK if active else PALE, bold if active else plain, anchor="lm")
    return image


def draw_faces(image: Image.Image, faces: list[dict]) -> Image.Image:
    """A photograph with a numbered box around each face and, under it, the codes of its active Action Units.

    Args:
        image (`PIL.Image.Image`): The upright photograph, as [`open_image`] gives it.
        faces (`list[dict]`): A pipeline's result for it. A face without a box is the whole picture. An entry with
            `"id"` is labelled and coloured by it, else by its place in the list, from 1.

    Returns:
        `PIL.Image.Image`: RGB, of the photograph's size.
    """
    image = image.convert("RGB")
    draw, side = ImageDraw.Draw(image), min(image.size)
    line, font = max(2, side // 200), _font(max(11, side // 32), bold=True)
    for place, face in enumerate(faces, 1):
        number = face.get("id", place)
        colour = FACE_COLOURS[(number - 1) % len(FACE_COLOURS)]
        x0, y0, x1, y1 = face["box"] or (0, 0, image.width - 1, image.height - 1)
        draw.rectangle([x0, y0, x1, y1], outline="white", width=line + 2)
        draw.rectangle([x0, y0, x1, y1], outline=colour, width=line)
        active = [code for code, unit in face["action_units"].items() if is_active(unit, face["task"])]
        _tag(draw, image, str(number), x0, y0, colour, font, above=True)
        if active:
            room = max(x1 - x0, side / 3)
            _tag(draw, image, _fit(" ".join(active), font, room), x0, y1, colour, font, above=False)
    return image


def _tag(draw, image: Image.Image, text: str, x: float, y: float, colour: str, font, above: bool) -> None:
    """Dark text on white with a coloured edge, kept inside the picture."""
    pad = font.size // 4
    width, height = font.getlength(text) + 2 * pad, font.size + 2 * pad
    x = min(max(x, 0), image.width - width - 1)
    y = min(max(y - height if above else y, 0), image.height - height - 1)
    draw.rectangle([x, y, x + width, y + height], "white", colour, max(1, pad // 3))
    draw.text((x + pad, y + height / 2), text, INK, font, anchor="lm")


def draw_sheet(
    image: Image.Image, *answers: list[dict], bars_width: int = 560, crops: list[Image.Image] | None = None
) -> Image.Image:
    """A photograph with its face boxes, and beneath it the bars of every face, side by side for each task.

    Args:
        image (`PIL.Image.Image`): The upright photograph.
        answers (`list[dict]`): The pipeline's results for it, one list a task, with the same faces in the same order.
        bars_width (`int`, defaults to 560): Width of a block of bars in pixels.
        crops (`list[PIL.Image.Image]`, *optional*): The faces' crops; with them, and with results that hold evidence,
            [`draw_evidence`] of each face stands beneath its bars.

    Returns:
        `PIL.Image.Image`: RGB; the photograph at its own size or, if it is smaller, scaled up to the bars' width.
    """
    columns = len(answers)
    blocks = []
    for place, same_face in enumerate(zip(*answers, strict=True)):
        titles = [_face_title(face, place + 1, len(answers[0])) for face in same_face]
        blocks.append(
            [
                draw_bars(face["action_units"], face["task"], bars_width, title)
                for face, title in zip(same_face, titles, strict=True)
            ]
        )
        if crops and any("evidence" in unit for face in same_face for unit in face["action_units"].values()):
            blocks.append(
                [draw_evidence(crops[place], face["action_units"], face["task"], bars_width) for face in same_face]
            )
    scale = max(1.0, bars_width / image.width)  # before boxes and codes are drawn, which could not be read otherwise
    size = (round(image.width * scale), round(image.height * scale))
    boxes = [face | {"box": face["box"] and [side * scale for side in face["box"]]} for face in answers[0]]
    photo = draw_faces(image.resize(size, Image.Resampling.LANCZOS), boxes)
    heights = [max(block.height for block in row) for row in blocks]
    sheet = Image.new("RGB", (max(photo.width, columns * bars_width), photo.height + sum(heights)), "white")
    sheet.paste(photo, ((sheet.width - photo.width) // 2, 0))
    top = photo.height
    for row, height in zip(blocks, heights, strict=True):
        for column, block in enumerate(row):
            sheet.paste(block, (column * bars_width, top))
        top += height
    return sheet


def draw_evidence(crop: Image.Image, action_units: dict[str, dict], task: str, width: int = 560) -> Image.Image:
    """Where the model looked: the face crop with the evidence of each active Action Unit, a tile for each.

    The redder a place, the larger is its share of what the answer rested on, relative to the largest share of that
    tile. Where no unit is active, those with the highest values are shown.

    Args:
        crop (`PIL.Image.Image`): The aligned face crop that was recognised, as [`find_faces`] gives it.
        action_units (`dict[str, dict]`): `face["action_units"]` of a pipeline's result with `return_evidence`.
        task (`str`): The task that they answer.
        width (`int`, defaults to 560): Width of the picture in pixels; four tiles stand side by side.

    Returns:
        `PIL.Image.Image`: RGB, `width` pixels wide.

    Raises:
        ValueError: The results hold no evidence.
    """
    traced = {code: unit for code, unit in action_units.items() if "evidence" in unit}
    if not traced:
        raise ValueError("The results hold no evidence; ask the pipeline with return_evidence=True.")
    columns = 4
    active = {code: unit for code, unit in traced.items() if is_active(unit, task)}
    if not active:
        highest = sorted(traced, key=lambda code: -shown(traced[code], task))[:columns]
        active = {code: traced[code] for code in highest}
    side, size = width // columns, max(10, width // 42)
    line, font = 2 * size, _font(size, bold=True)
    grey = ImageOps.autocontrast(ImageOps.grayscale(crop.convert("RGB")), cutoff=1).convert("RGB")
    face = np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS), dtype=float)
    red = np.array(ImageColor.getrgb(FACE_COLOURS[0]), dtype=float)
    rows = -(-len(active) // columns)
    image = Image.new("RGB", (width, rows * (side + line)), "white")
    draw = ImageDraw.Draw(image)
    for place, (code, unit) in enumerate(active.items()):
        left, top = place % columns * side, place // columns * (side + line)
        cells = np.array(unit["evidence"], dtype=np.float32)
        light = Image.fromarray(cells / max(cells.max(), 1e-9)).resize((side, side), Image.Resampling.BILINEAR)
        share = 0.75 * np.asarray(light)[..., None]
        image.paste(Image.fromarray((face + (red - face) * share).astype(np.uint8)), (left, top + line))
        text = _fit(f"{code} {answer_text(unit, task)}", font, side - size)
        draw.text((left + size // 2, top + line / 2), text, INK, font, anchor="lm")
    return image


# A face in the coordinates of a crop: polygons' points (x, y) left of the middle, which have twins, and across it.
_HALF_LINES = (
    ((66, 79), (74, 73), (86, 71), (101, 76)),  # brow
    ((68, 92), (76, 86), (85, 84), (94, 87), (99, 93), (91, 98), (82, 99), (74, 97), (68, 92)),  # eye
    ((107, 92), (104, 112), (99, 122), (102, 127), (112, 130)),  # nose
)
_LINES = (
    ((86, 155), (99, 149), (112, 151), (125, 149), (138, 155), (112, 157), (86, 155)),  # upper lip
    ((86, 155), (112, 158), (138, 155), (125, 167), (112, 170), (99, 167), (86, 155)),  # lower lip
)
_HEAD = (40, 14, 184, 212)


def draw_face_map(action_units: dict[str, dict], task: str, width: int = 480, title: str | None = None) -> Image.Image:
    """A drawn face on which the places of the Action Units are the darker, the higher their values, see [`shown`].

    Units of one side colour that side, which is the subject's: the subject's left is the picture's right. Where places
    overlap, the highest value counts. Beside it the units stand in order, those that act in bold.

    Args:
        action_units (`dict[str, dict]`): `face["action_units"]` of a pipeline's result. Units that are not in the
            catalogue are listed, but colour nothing.
        task (`str`): `detection` (0 or 1), `intensity_level` (0 to 5) or `intensity` (0 to 1).
        width (`int`, defaults to 480): Width of the picture in pixels, at least 240.
        title (`str`, *optional*): A line above; defaults to the task and its range.

    Returns:
        `PIL.Image.Image`: RGB, `width` pixels wide.

    Raises:
        ValueError: Too narrow, or no Action Unit.
    """
    from .face_regions import mask_of  # which draws with this module's colours

    if width < 240 or not action_units:
        raise ValueError(
            f"width is {width} with {len(action_units)} Action Units; give at least 240 pixels and 1 unit."
        )
    low, high = get_task(task).values[0], get_task(task).values[-1]
    size = max(10, width // 40)
    side, line = round(0.6 * width), round(1.9 * size)
    top, scale = line, 2 * side / 224  # drawn at twice its size, for smooth edges

    def scaled(points):
        return [(x * scale, y * scale) for x, y in points]

    strength = np.zeros((2 * side, 2 * side))
    for code, unit in action_units.items():
        mask = mask_of([CATALOGUE[code]] if code in CATALOGUE else [], scale)
        share = (min(max(shown(unit, task), low), high) - low) / (high - low)
        strength = np.maximum(strength, share * (np.asarray(mask) > 0))
    white, full = np.array([255.0, 255.0, 255.0]), np.array(ImageColor.getrgb(ACTIVE), dtype=float)
    face = Image.fromarray((white + (full - white) * strength[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(face)
    thick = max(2, side // 90)
    draw.ellipse([edge * scale for edge in _HEAD], outline=PALE, width=thick)
    for points in (*_LINES, *_HALF_LINES, *(tuple((224 - x, y) for x, y in points) for points in _HALF_LINES)):
        draw.line(scaled(points), PALE, thick, joint="curve")
    face = face.resize((side, side), Image.Resampling.LANCZOS)

    step = min(1.7 * size, side / len(action_units))
    image = Image.new("RGB", (width, top + side), "white")
    image.paste(face, (0, top))
    draw = ImageDraw.Draw(image)
    draw.text(
        (size // 2, size // 2),
        _fit(title or _title(task), _font(size, bold=True), width - size),
        INK,
        _font(size, bold=True),
    )
    order = sorted(action_units, key=lambda code: -shown(action_units[code], task))
    small = max(8, min(size, round(step / 1.25)))
    for place, code in enumerate(order):
        unit = action_units[code]
        active = is_active(unit, task)
        font = _font(small, bold=active)
        text = _fit(f"{code}  {shown(unit, task):.2f}  {unit['name']}", font, width - side - size)
        draw.text((side, top + (place + 0.5) * step), text, INK if active else PALE, font, anchor="lm")
    return image


def _title(task: str) -> str:
    """The task and the range of its values."""
    chosen = get_task(task)
    return f"{chosen.name.replace('_', ' ').capitalize()}: {chosen.answer.split(' from ')[-1]}"


def _face_title(face: dict, place: int, count: int) -> str:
    which = f"Face {face.get('id', place)}. " if count > 1 or "id" in face else ""
    return which + _title(face["task"])


def draw_timeline(values: dict[int, np.ndarray], units: dict[str, str], task: str, seconds: float, title: str = ""):
    """How the Action Units of a video's faces change over time, as a heat map for each face.

    Args:
        values (`dict[int, np.ndarray]`): By face id, `(units, steps)` what [`shown`] gives of each answer, equal steps
            of time; NaN (drawn white) where the face was not seen.
        units (`dict[str, str]`): The names of the Action Units by code, in the order of the values' rows.
        task (`str`): The task that the values answer.
        seconds (`float`): Duration of the video.
        title (`str`, *optional*): A line above.

    Returns:
        `matplotlib.figure.Figure`: To show in a notebook or to save as PNG, PDF or SVG.

    Raises:
        ValueError: No face.
    """
    from matplotlib.figure import Figure

    if not values:
        raise ValueError("A time line needs at least one face; no face was found.")
    chosen = get_task(task)
    figure = Figure(figsize=(11, 0.9 + len(values) * (0.75 + 0.24 * len(units))), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12, parse_math=False)  # a file's name may have dollar signs
    all_axes = figure.subplots(len(values), sharex=True, squeeze=False)[:, 0]
    for axes, (number, rows) in zip(all_axes, values.items(), strict=True):
        picture = axes.imshow(
            rows, aspect="auto", interpolation="nearest", cmap="cividis",
            vmin=chosen.values[0], vmax=chosen.values[-1], extent=(0, seconds, len(units) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(len(units)), [f"{code} {name}" for code, name in units.items()], fontsize=8)
        axes.set_title(f"Face {number}", fontsize=10, loc="left")
    all_axes[-1].set_xlabel("time in seconds")
    scale = {"detection": "probability", "intensity_level": "mean, 0 to 5", "intensity": "answer, 0 to 1"}[task]
    figure.colorbar(picture, ax=all_axes, fraction=0.03, pad=0.01).set_label(scale, fontsize=8)
    return figure
