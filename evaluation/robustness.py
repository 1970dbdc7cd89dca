"""How scores fall when pictures get worse, so that users know when not to trust an answer."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from . import bootstrap
from .answers import Answers
from .calibration import apply_folds
from .data import EvaluationSet, spread
from .scores import is_detection, sums


CLEAN = "none"


def _blur(picture: Image.Image, pixels: float, _) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(pixels))


def _darken(picture: Image.Image, part: float, _) -> Image.Image:
    return picture.point(lambda value: value * part)


def _compress(picture: Image.Image, quality: int, _) -> Image.Image:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _shrink(picture: Image.Image, side: int, _) -> Image.Image:
    small = picture.resize((side, side), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


def _turn(picture: Image.Image, degrees: float, random: np.random.Generator) -> Image.Image:
    return picture.rotate(degrees * random.choice((-1, 1)), Image.Resampling.BILINEAR)


def _cover(picture: Image.Image, part: float, random: np.random.Generator) -> Image.Image:
    """A grey square at a random place of the middle three quarters, where the face is."""
    side = round(picture.width * part)
    low, high = picture.width // 8, picture.width * 7 // 8 - side
    x, y = (int(random.integers(low, max(high, low) + 1)) for _ in range(2))
    picture = picture.copy()
    picture.paste((128, 128, 128), (x, y, x + side, y + side))
    return picture


# What is done to a picture of 224 x 224 pixels, in which unit, at five strengths.
DAMAGES: dict[str, tuple[Callable, str, tuple[float, ...]]] = {
    "blur": (_blur, "deviation in pixels", (1, 2, 3, 4.5, 6)),
    "darkness": (_darken, "part of the brightness left", (0.6, 0.4, 0.25, 0.15, 0.08)),
    "JPEG": (_compress, "quality", (40, 20, 10, 6, 3)),
    "low resolution": (_shrink, "pixels a side", (112, 80, 56, 40, 28)),
    "rotation": (_turn, "degrees", (5, 10, 20, 30, 45)),
    "occlusion": (_cover, "grey square, part of the side", (0.2, 0.3, 0.4, 0.5, 0.6)),
}


def damaged(evaluation_set: EvaluationSet, pictures: int) -> EvaluationSet:
    """Some pictures of a set, each as it is and with every damage at every strength.

    What is random about a damage (side of a turn, place of a square) depends on the picture's name alone, so that
    every model sees the same.

    Args:
        evaluation_set ([`EvaluationSet`]): Any set.
        pictures (`int`): How many of its pictures, evenly spread.
    """
    rows = spread(len(evaluation_set), pictures)
    kinds = [(CLEAN, 0)] + [(name, strength) for name in DAMAGES for strength in range(1, 6)]
    source = [row for _ in kinds for row in rows]
    done = [kind for kind in kinds for _ in rows]

    def change(picture: Image.Image, row: int) -> Image.Image:
        name, strength = done[row]
        if name == CLEAN:
            return picture
        harm, _, strengths = DAMAGES[name]
        seed = zlib.crc32(f"{evaluation_set.samples[source[row]]} {name}".encode())
        return harm(picture.convert("RGB"), strengths[strength - 1], np.random.default_rng(seed))

    worse = evaluation_set.take(source)
    return replace(
        worse,
        samples=[f"{one} {name} {strength}" for one, (name, strength) in zip(worse.samples, done, strict=True)],
        groups=[{"damage": name, "strength": str(strength)} for name, strength in done],
        change=change,
    )


def curves(
    answers: dict[str, Answers], applied: dict[str, dict] | None = None, resamples: int = bootstrap.RESAMPLES
) -> dict:
    """Scores by damage and strength.

    Args:
        answers (`dict[str, Answers]`): By task, about a [`damaged`] set.
        applied (`dict`, *optional*): By task and test fold, the calibrations that the scores of undamaged pictures
            use: `calibration["fitted"]` of [`summarise`].
        resamples (`int`): Of people, for the intervals.

    Returns:
        `dict`: By task `pictures`, `metric` (`f1` or `mae`), `clean` and, by damage, `unit`, `strengths` and `scores`,
        each score as `{"value", "low", "high"}`.
    """
    result = {}
    for task, answer in answers.items():
        fitted = (applied or {}).get(task, {})
        answer = apply_folds(answer, {int(fold): own for fold, own in fitted.items()})
        metric = "f1" if is_detection(task) else "mae"

        def score(name: str, strength: int, answer=answer, metric=metric) -> dict:
            here = (answer.groups["damage"] == name) & (answer.groups["strength"] == str(strength))
            part = answer.take(here)
            people, scores = sums(part, part.values)
            draws = bootstrap.resample(people, scores, resamples)[metric][:, -1]
            low, high = bootstrap.interval(draws)
            value = float(bootstrap.mean_over(bootstrap.point(people, scores)[metric]))
            return {"value": value, "low": low, "high": high}

        result[task] = {
            "pictures": int((answer.groups["damage"] == CLEAN).sum()),
            "metric": metric,
            "clean": score(CLEAN, 0),
            "damages": {
                name: {
                    "unit": unit,
                    "strengths": list(strengths),
                    "scores": [score(name, strength) for strength in range(1, 6)],
                }
                for name, (_, unit, strengths) in DAMAGES.items()
            },
        }
    return result
