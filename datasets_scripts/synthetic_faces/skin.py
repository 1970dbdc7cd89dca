"""What is painted on the head: skin colour, brows, beard, make-up, wrinkles; and the hair map around the skull.

Skin is painted in a square texture that is projected from the front onto the head at rest, hair in a cylinder around
the skull. Noise comes from a small fixed bank, shifted and mixed anew for every face, because drawing it anew would
cost more time than everything else here.
"""

from functools import cache

import numpy as np
from scipy import ndimage


TEXTURE = 512
X_RANGE, Y_RANGE = (-1.0, 1.0), (5.9, 8.6)  # the part of the resting head that the texture covers
TEXEL_X, TEXEL_Y = (X_RANGE[1] - X_RANGE[0]) / TEXTURE, (Y_RANGE[1] - Y_RANGE[0]) / TEXTURE
X, Y = np.meshgrid(
    np.linspace(*X_RANGE, TEXTURE, dtype=np.float32), np.linspace(*Y_RANGE[::-1], TEXTURE, dtype=np.float32)
)
HAIR_ROWS, HAIR_COLUMNS, HAIR_TOP, HAIR_BOTTOM = 256, 512, 8.7, 5.5


def linear(srgb) -> np.ndarray:
    """8-bit sRGB colours to linear light, 0 to 1."""
    return ((np.asarray(srgb, np.float32) / 255) ** 2.2).astype(np.float32)


# From very light to very dark skin; a face's tone is a place between 0 and 1 along this list.
SKIN_TONES = linear([(246, 220, 204), (236, 200, 178), (222, 178, 152), (201, 150, 120), (170, 119, 92), (134, 90, 68),
                     (100, 66, 51), (72, 48, 39), (52, 36, 31)])  # fmt: skip
HAIR_COLOURS = linear([(22, 18, 16), (42, 30, 24), (72, 48, 33), (110, 78, 50), (168, 130, 88), (122, 56, 34),
                       (150, 150, 150), (208, 206, 202)])  # fmt: skip
IRIS_COLOURS = linear([(58, 38, 26), (84, 56, 36), (108, 80, 50), (92, 102, 70), (92, 116, 140), (120, 128, 136)])


def skin_tone(place: float) -> np.ndarray:
    """(3,) linear colour at `place`, 0 (lightest) to 1 (darkest)."""
    steps = np.arange(len(SKIN_TONES))
    return np.array([np.interp(place * (len(SKIN_TONES) - 1), steps, SKIN_TONES[:, c]) for c in range(3)], np.float32)


def smoothstep(low, high, x):
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _fractal(rng, base: int, octaves: int, fade: float) -> np.ndarray:
    total, amplitude, power = np.zeros((TEXTURE, TEXTURE), np.float32), 1.0, 0.0
    for octave in range(octaves):
        size = min(base * 2**octave, TEXTURE)
        grain = rng.standard_normal((size, size)).astype(np.float32)
        total += amplitude * ndimage.zoom(grain, TEXTURE / size, order=1, mode="grid-wrap", grid_mode=True)
        power += amplitude**2
        amplitude *= fade
    return total / np.sqrt(power)


@cache
def _noise_bank() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20190612)
    kinds = {"blotches": (4, 5, 0.5), "grain": (64, 3, 0.8), "pores": (128, 2, 0.9)}
    return {kind: np.stack([_fractal(rng, *shape) for _ in range(4)]) for kind, shape in kinds.items()}


def noise(rng, kind: str) -> np.ndarray:
    """(512, 512) noise of unit variance: `blotches`, `grain` or `pores`, by rising frequency."""
    field = _noise_bank()[kind][rng.integers(4)]
    field = field[:: 1 - 2 * int(rng.integers(2)), :: 1 - 2 * int(rng.integers(2))]
    return np.roll(field, tuple(rng.integers(0, TEXTURE, 2)), (0, 1))


def _spot(x, y, width, height) -> np.ndarray:
    """A soft ellipse on both sides of the face (on the middle line when x is 0)."""
    return np.exp(-(((np.abs(X) - x) / width) ** 2 + ((Y - y) / height) ** 2)).astype(np.float32)


@cache
def _regions() -> dict[str, np.ndarray]:
    """Fixed masks of facial regions at rest."""
    beard = smoothstep(0.28, 0.5, np.abs(X)) * smoothstep(7.0, 6.6, Y) + _spot(0, 6.33, 0.3, 0.14)
    moustache = 0.8 * _spot(0, 6.78, 0.2, 0.045)
    neck = smoothstep(6.1, 6.3, Y)
    return {
        "cheeks": _spot(0.38, 6.98, 0.2, 0.16),
        "nose": _spot(0, 6.9, 0.12, 0.12),
        "under_eyes": _spot(0.32, 7.16, 0.17, 0.06),
        "lids": _spot(0.33, 7.33, 0.18, 0.07),
        "freckles": _spot(0, 7.05, 0.5, 0.25),
        "beard": np.clip(beard * neck, 0, 1).astype(np.float32),
        "moustache": np.clip(moustache, 0, 1).astype(np.float32),
    }


def _brows(rng, masculine: float) -> np.ndarray:
    """(512, 512) cover of the eyebrows: an arched band of short slanted strokes."""
    thickness, arch = rng.uniform(0.02, 0.05) * (0.8 + 0.5 * masculine), rng.uniform(0.0, 0.10)
    height, inner, outer = 7.455 + rng.uniform(-0.025, 0.03), rng.uniform(0.09, 0.15), rng.uniform(0.46, 0.57)
    side = np.abs(X)
    along = np.clip((side - inner) / (outer - inner), 0, 1)
    middle = height + arch * np.sin(np.pi * np.clip(along * 0.8 + 0.05, 0, 1)) - 0.03 * along
    half = np.maximum(thickness * (1 - 0.72 * along**1.5), 0.004)
    band = np.exp(-(np.abs((Y - middle) / half) ** 3))
    band *= smoothstep(outer + 0.02, outer - 0.10, side) * smoothstep(inner - 0.03, inner + 0.05, side)
    strokes = noise(rng, "grain")[:, (np.arange(TEXTURE) * 0.6).astype(int)]
    rows = (np.arange(TEXTURE)[:, None] + (side[:1] / TEXEL_X * 0.55)).astype(int) % TEXTURE
    strokes = np.take_along_axis(strokes, rows, 0)
    density = 0.12 if rng.random() < 0.06 else rng.uniform(0.6, 1.05)
    return np.clip(band * (1 + 0.35 * strokes) * density, 0, 0.97)


def paint_skin(rng, tone: float, masculine: float, hair: np.ndarray):
    """Paint one person's face.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        tone, masculine (`float`): 0 to 1.
        hair (`np.ndarray`): (3,) linear hair colour, for brows and beard.

    Returns:
        `tuple`: albedo (512, 512, 3) in linear light, and its mean skin colour (3,).
    """
    region = _regions()
    base = skin_tone(tone) * np.array([1, 1 + rng.normal(0, 0.03), 1 + rng.normal(0, 0.05)], np.float32)
    colour = np.ones((TEXTURE, TEXTURE, 3), np.float32) * base
    mottle, grain = rng.uniform(0.02, 0.07), rng.uniform(0.01, 0.045)
    colour *= (1 + mottle * noise(rng, "blotches") + grain * noise(rng, "grain"))[..., None]
    red = region["cheeks"] * rng.uniform(0, 0.6) + region["nose"] * rng.uniform(0.0, 0.6)
    colour *= 1 + red[..., None] * np.array([0.10, -0.16, -0.12], np.float32) * (1 - 0.6 * tone)
    shadow = region["under_eyes"] * rng.uniform(0, 0.45) + region["lids"] * rng.uniform(0.0, 0.4)
    colour *= 1 - shadow[..., None] * np.array([0.25, 0.42, 0.38], np.float32)
    if masculine < 0.5 and rng.random() < 0.25:  # eye shadow
        tint = rng.uniform(0.1, 0.7, 3).astype(np.float32) * base
        cover = (region["lids"] * rng.uniform(0.2, 0.7))[..., None]
        colour = colour * (1 - cover) + cover * tint
    if tone < 0.5 and rng.random() < 0.25:
        freckles = smoothstep(1.0, 2.0, noise(rng, "pores")) * region["freckles"]
        colour *= 1 - freckles[..., None] * np.array([0.25, 0.45, 0.5], np.float32)
    for _ in range(rng.poisson(0.8)):  # moles
        x, y, size = rng.uniform(-0.55, 0.55), rng.uniform(6.3, 8.0), rng.uniform(0.006, 0.016)
        colour *= 1 - 0.7 * np.exp(-(((X - x) ** 2 + (Y - y) ** 2) / size**2))[..., None]
    if masculine > 0.5 and rng.random() < 0.7:
        strength = rng.uniform(0.05, 0.3) if rng.random() < 0.65 else rng.uniform(0.4, 0.95)
        parts = region["beard"] * (rng.random() < 0.85) + region["moustache"] * (rng.random() < 0.85)
        cover = np.clip(parts * strength * (0.75 + 0.5 * noise(rng, "pores")), 0, 0.95)[..., None]
        colour = colour * (1 - cover) + cover * hair * 0.7
    cover = _brows(rng, masculine)[..., None]
    colour = colour * (1 - cover) + cover * np.minimum(hair * 0.75, base * 0.55)
    return np.clip(colour, 0.004, 1).astype(np.float32), base


def pores(rng) -> np.ndarray:
    """(512, 512) height of the fine skin relief."""
    return noise(rng, "grain") * np.float32(rng.uniform(0.0004, 0.0016))


def _valley(points, width: float) -> np.ndarray:
    """Height of a soft valley along a line through `points` (x, y), -1 at its bottom."""
    points, distance = np.array(points, np.float32), np.full(X.shape, 9, np.float32)
    for start, end in zip(points[:-1], points[1:], strict=True):
        step = end - start
        t = np.clip(((X - start[0]) * step[0] + (Y - start[1]) * step[1]) / (step @ step), 0, 1)
        distance = np.minimum(distance, np.hypot(X - start[0] - t * step[0], Y - start[1] - t * step[1]))
    return -np.exp(-((distance / width) ** 2))


def _forehead(first: float, last: float, heights) -> np.ndarray:
    total = 0
    for k, height in enumerate(heights):
        x = np.linspace(first, last, 20)
        total = total + _valley(
            np.stack([x, height + 0.03 * np.cos(x * 3 + k) + 0.012 * np.sin(x * 23 + 2 * k)], 1), 0.016
        )
    return total


@cache
def wrinkle_bank() -> dict[str, np.ndarray]:
    """Height maps (512, 512) of the furrows that muscle actions raise, by name; `_left` is the subject's left."""
    left = {
        "forehead_outer": _forehead(0.2, 0.52, (7.64, 7.72, 7.80)),
        "crow_feet": sum(_valley([(0.53, 7.28 + 0.02 * k), (0.60, 7.28 + 0.07 * k), (0.66, 7.27 + 0.10 * k)], 0.011)
                         for k in (-1, 0, 1)),
        "lower_lid": _valley([(0.2, 7.17), (0.33, 7.14), (0.47, 7.185)], 0.014),
        "cheek_bag": _valley([(0.17, 7.13), (0.30, 7.06), (0.46, 7.11)], 0.016),
        "nasolabial": _valley([(0.17, 7.02), (0.24, 6.93), (0.30, 6.82), (0.335, 6.68)], 0.022),
        "nose_side": sum(_valley([(0.03, 7.22 + 0.05 * k), (0.10, 7.25 + 0.06 * k)], 0.011) for k in (-1, 0, 1, 2)),
        "dimple": 1.3 * _valley([(0.295, 6.675), (0.315, 6.61), (0.30, 6.545)], 0.017)
        + 0.6 * _valley([(0.335, 6.66), (0.355, 6.60), (0.34, 6.55)], 0.014),
        "marionette": _valley([(0.26, 6.58), (0.285, 6.50), (0.28, 6.42)], 0.018),
    }  # fmt: skip
    bank = {"forehead_inner": _forehead(-0.2, 0.2, (7.66, 7.74, 7.82))}
    glabella = _valley([(0.045, 7.40), (0.06, 7.47), (0.055, 7.56)], 0.014)
    glabella = glabella + 0.6 * _valley([(0.10, 7.42), (0.115, 7.50)], 0.012)
    bank["glabella"] = glabella + glabella[:, ::-1]
    bank["nose_root"] = sum(_valley([(-0.07, y), (0, y + 0.012), (0.07, y)], 0.012) for y in (7.30, 7.35))
    boss = np.exp(-(((X / 0.16) ** 2 + ((Y - 6.36) / 0.09) ** 2) ** 1.5))
    bank["chin_boss"] = 0.7 * boss * _fractal(np.random.default_rng(7), 32, 4, 0.5)
    bank["chin_fold"] = _valley([(-0.13, 6.46), (0, 6.475), (0.13, 6.46)], 0.02)
    bank["lip_lines"] = sum(
        _valley([(x, 6.78), (x * 0.95, 6.72)], 0.007) + 0.7 * _valley([(x, 6.49), (x * 1.05, 6.44)], 0.008)
        for x in (-0.15, -0.11, -0.07, -0.03, 0.03, 0.07, 0.11, 0.15)
    )
    for name, height in left.items():
        bank[name + "_left"], bank[name + "_right"] = height, height[:, ::-1]
    return {name: ndimage.gaussian_filter(height.astype(np.float32), 0.8) for name, height in bank.items()}


@cache
def _wrinkle_stack() -> np.ndarray:
    return np.stack(list(wrinkle_bank().values())).reshape(len(wrinkle_bank()), -1)


def relief(height: np.ndarray, strengths: np.ndarray):
    """Add wrinkles to a relief.

    Args:
        height (`np.ndarray`): (512, 512) the skin's own relief.
        strengths (`np.ndarray`): one strength per entry of [`wrinkle_bank`], 0 to about 1.5.

    Returns:
        `tuple`: the slopes (512, 512, 2) along x and y, and the darkening (512, 512) of the creases, 0.7 to 1.
    """
    if strengths.any():
        height = height + (strengths.astype(np.float32) @ _wrinkle_stack()).reshape(TEXTURE, TEXTURE) * 0.014
    down, right = np.gradient(height)
    return np.stack([right / TEXEL_X, -down / TEXEL_Y], -1), np.clip(1 + np.minimum(height * 9, 0), 0.7, 1)


def hair_map(rng, hairline: np.ndarray, softness: float, ragged: float) -> np.ndarray:
    """Where the skull is covered, in a cylinder around it.

    Args:
        hairline (`np.ndarray`): (512,) height above which hair grows, by angle from -pi to pi (0 is the front).
        softness (`float`): How gradually the hair thins out at its line, in decimetres.
        ragged (`float`): How far single strands reach below the line, in decimetres.

    Returns:
        `np.ndarray`: (256, 512, 2) cover from 0 to 1 and the brightness of strands around 1.
    """
    grain = noise(rng, "pores")[:HAIR_ROWS, :]
    strands = ndimage.uniform_filter1d(noise(rng, "grain")[:HAIR_ROWS, :], 25, axis=0) * 2.0
    height = np.linspace(HAIR_TOP, HAIR_BOTTOM, HAIR_ROWS, dtype=np.float32)[:, None]
    cover = np.clip((height - hairline[None] + ragged * strands) / softness + 0.5, 0, 1)
    cover = np.clip(cover + 0.35 * grain * cover * (1 - cover), 0, 1)
    return np.stack([cover, 1 + 0.22 * strands + 0.08 * grain], -1).astype(np.float32)
