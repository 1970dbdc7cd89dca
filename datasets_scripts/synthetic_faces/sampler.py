"""Which expression a picture shows, the seeds behind everything, and the standard split."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .expression import SIDED, facs_intensities, feafa_intensities, level, occurrence
from .identity import Identity, draw_identity
from .layout import IDENTITIES, SPLIT_CODES, split_size
from .renderer import OVERSAMPLING, Rendering, render
from .scene import Scene, draw_scene
from .variation import another_make


SEED = 2019
NEUTRAL_SHARE, COMBINATION_SHARE = 0.08, 0.55
# Actions that often come together, with the weight of each combination.
COMBINATIONS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1.4, ("cheek_raise", "corner_pull")),
    (1.2, ("cheek_raise", "corner_pull", "lips_part")),
    (0.7, ("cheek_raise", "lid_tighten", "upper_lip_raise", "corner_pull", "lips_part")),
    (0.6, ("cheek_raise", "corner_pull", "lips_part", "jaw_drop")),
    (0.5, ("corner_pull", "dimple")),
    (0.9, ("inner_brow_raise", "outer_brow_raise")),
    (0.9, ("inner_brow_raise", "outer_brow_raise", "upper_lid_raise", "jaw_drop", "lips_part")),
    (0.8, ("inner_brow_raise", "outer_brow_raise", "brow_lower", "upper_lid_raise", "lip_stretch", "lips_part")),
    (0.9, ("brow_lower", "lid_tighten")),
    (0.8, ("brow_lower", "lid_tighten", "lip_tighten")),
    (0.8, ("brow_lower", "lid_tighten", "lip_press", "chin_raise")),
    (0.5, ("brow_lower", "upper_lid_raise", "lid_tighten", "lip_tighten")),
    (0.8, ("inner_brow_raise", "brow_lower", "corner_depress")),
    (0.8, ("inner_brow_raise", "brow_lower", "corner_depress", "chin_raise")),
    (0.7, ("corner_depress", "chin_raise")),
    (0.8, ("nose_wrinkle", "upper_lip_raise", "brow_lower")),
    (0.7, ("nose_wrinkle", "chin_raise")),
    (0.6, ("nose_wrinkle", "lid_tighten", "cheek_raise")),
    (0.6, ("upper_lip_raise", "lips_part")),
    (0.9, ("dimple",)),
    (0.5, ("dimple", "lip_press")),
    (0.9, ("lip_press", "chin_raise")),
    (0.7, ("lip_tighten",)),
    (0.6, ("lip_stretch", "lips_part")),
    (0.4, ("lip_stretch", "corner_depress")),
    (0.6, ("jaw_drop", "lips_part")),
    (0.8, ("lip_tighten", "chin_raise")),
    (0.4, ("pucker", "inner_brow_raise", "outer_brow_raise")),
    (0.4, ("funnel", "jaw_drop")),
    (0.3, ("pucker", "cheek_puff")),
    (0.3, ("upper_lip_suck", "lower_lip_suck")),
    (0.3, ("lower_lip_depress", "lips_part", "corner_depress")),
    (0.3, ("jaw_thrust", "chin_raise")),
)
# How often an action is drawn on its own account, so that rare ones stay frequent enough to learn.
SINGLE_WEIGHTS = {
    "inner_brow_raise": 0.6, "outer_brow_raise": 1.2, "brow_lower": 0.5, "upper_lid_raise": 1.8, "cheek_raise": 0.7,
    "lid_tighten": 0.8, "eye_close": 0.9, "nose_wrinkle": 1.6, "upper_lip_raise": 2.2, "corner_pull": 2.0,
    "dimple": 1.7, "corner_depress": 1.5, "lower_lip_depress": 1.5, "lip_stretch": 2.6, "chin_raise": 0.8,
    "pucker": 1.9, "funnel": 1.9, "lip_tighten": 4.1, "lip_press": 3.7, "lips_part": 0.6, "jaw_drop": 2.6,
    "upper_lip_suck": 1.8, "lower_lip_suck": 1.9, "jaw_left": 0.9, "jaw_right": 0.9, "jaw_thrust": 0.9,
    "cheek_puff": 1.4,
}  # fmt: skip
# Pairs that cannot or hardly happen together; one of the two goes.
EXCLUSIONS = (
    ("eye_close", "upper_lid_raise"), ("eye_close", "lid_tighten"), ("upper_lid_raise", "lid_tighten"),
    ("upper_lid_raise", "cheek_raise"), ("corner_pull", "corner_depress"), ("corner_pull", "lip_tighten"),
    ("corner_pull", "pucker"), ("corner_pull", "funnel"), ("corner_pull", "lip_stretch"),
    ("upper_lip_raise", "chin_raise"), ("dimple", "pucker"), ("dimple", "funnel"), ("lip_stretch", "pucker"),
    ("lip_stretch", "funnel"), ("lip_stretch", "lip_tighten"), ("lip_tighten", "lips_part"),
    ("lip_tighten", "jaw_drop"), ("lip_tighten", "lip_press"), ("lip_tighten", "upper_lip_raise"),
    ("lip_tighten", "funnel"), ("lip_tighten", "pucker"), ("lip_tighten", "lower_lip_depress"),
    ("lip_press", "lips_part"), ("lip_press", "jaw_drop"), ("lip_press", "upper_lip_raise"),
    ("lip_press", "lower_lip_depress"), ("lip_press", "pucker"), ("lip_press", "funnel"), ("pucker", "funnel"),
    ("upper_lip_suck", "upper_lip_raise"), ("upper_lip_suck", "lip_press"), ("upper_lip_suck", "lip_tighten"),
    ("upper_lip_suck", "pucker"), ("upper_lip_suck", "funnel"), ("upper_lip_suck", "lips_part"),
    ("lower_lip_suck", "lower_lip_depress"), ("lower_lip_suck", "lip_press"), ("lower_lip_suck", "lip_tighten"),
    ("lower_lip_suck", "pucker"), ("lower_lip_suck", "funnel"), ("lower_lip_suck", "lips_part"),
    ("lower_lip_suck", "chin_raise"), ("lower_lip_suck", "jaw_drop"), ("upper_lip_suck", "jaw_drop"),
    ("jaw_left", "jaw_right"), ("jaw_drop", "chin_raise"), ("cheek_puff", "jaw_drop"), ("cheek_puff", "lips_part"),
    ("cheek_puff", "corner_pull"), ("cheek_puff", "upper_lip_raise"), ("cheek_puff", "lower_lip_depress"),
    ("cheek_puff", "funnel"), ("chin_raise", "lower_lip_depress"), ("chin_raise", "lips_part"),
    ("corner_depress", "funnel"), ("corner_depress", "pucker"),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One image with everything that is known about it.

    Attributes:
        rendering (`Rendering`): crop (224, 224, 3) uint8, landmarks, motion field and pose.
        activations (`dict`): action to activation.
        facs (`dict`): AU code to intensity 0 to 1; `feafa` (`dict`): FEAFA code to intensity 0 to 1.
        jpeg_quality (`int`): With what quality the file is to be written, a part of the randomised camera.
        identity_name (`str`): e.g. `test-00017`.
        identity (`Identity`): The person.
    """

    rendering: Rendering
    activations: dict[str, float]
    facs: dict[str, float]
    feafa: dict[str, float]
    jpeg_quality: int
    identity_name: str
    identity: Identity

    @property
    def levels(self) -> dict[str, int]:
        """AU code to DISFA level, 0 to 5."""
        return {code: level(value) for code, value in self.facs.items()}

    @property
    def occurrences(self) -> dict[str, int]:
        """AU code to BP4D occurrence, 0 or 1."""
        return {code: occurrence(value) for code, value in self.facs.items()}


class Parts(NamedTuple):
    """What [`render`] takes, in its order."""

    identity: Identity
    activations: dict[str, float]
    scene: Scene
    rng: np.random.Generator  # of background, noise and occluder
    gaze: tuple[float, float]


def _generator(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(words))


def sample_activations(rng: np.random.Generator) -> dict[str, float]:
    """Draw an expression: none, a usual combination with extras, or independent actions, some of them one-sided."""
    strengths: dict[str, float] = {}
    kind = rng.random()
    if kind >= NEUTRAL_SHARE:
        names, weights = list(SINGLE_WEIGHTS), np.array(list(SINGLE_WEIGHTS.values()))
        singles = rng.choice(len(names), size=6, replace=False, p=weights / weights.sum())
        if kind < NEUTRAL_SHARE + COMBINATION_SHARE:
            chances = np.array([weight for weight, _ in COMBINATIONS])
            common = rng.uniform(0.25, 1.0)
            for action in COMBINATIONS[rng.choice(len(COMBINATIONS), p=chances / chances.sum())][1]:
                strengths[action] = float(np.clip(common * rng.uniform(0.55, 1.25), 0.05, 1))
            singles = singles[: rng.choice(4, p=[0.08, 0.25, 0.37, 0.3])]
        else:
            singles = singles[: rng.choice([1, 2, 3, 4, 5, 6], p=[0.07, 0.12, 0.18, 0.22, 0.21, 0.2])]
        for k in singles:
            strengths.setdefault(names[k], float(rng.uniform(0.1, 1.0)))
    for first, second in EXCLUSIONS:
        if first in strengths and second in strengths:
            del strengths[(first, second)[rng.integers(2)]]

    activations: dict[str, float] = {}
    for action, strength in strengths.items():
        if action in SIDED:
            left, right = _sides(rng, action, strength)
            activations |= {action + "_left": left, action + "_right": right}
        else:
            activations[action] = strength
    if "jaw_drop" in activations:
        activations["jaw_drop"] *= 0.6 if rng.random() < 0.75 else 1.0  # mostly within AU26; a gaping mouth is rarer
        quiet = not {"upper_lip_raise", "lower_lip_depress", "funnel", "lips_part"} & set(strengths)
        if quiet and activations["jaw_drop"] < 0.3 and rng.random() < 0.25:
            activations["lips_seal"] = 1.0
    _blink(rng, activations)
    return {action: round(float(value), 4) for action, value in activations.items() if value > 0}


def _sides(rng, action: str, strength: float) -> tuple[float, float]:
    """Left and right activation: mostly alike, sometimes lopsided, sometimes one side alone."""
    lone = 0.06 if action in ("upper_lid_raise", "inner_brow_raise") else 0.14
    kind = rng.random()
    if kind < lone:
        weaker = 0.0
    elif kind < lone + 0.14:
        weaker = rng.uniform(0.2, 0.75)
    else:
        weaker = 1 - abs(rng.normal(0, 0.05))
    sides = (strength, strength * max(weaker, 0.0))
    return sides if rng.random() < 0.5 else sides[::-1]


def _blink(rng, activations: dict[str, float]) -> None:
    """Lids are never quite still: a little droop anywhere, now and then a blink. Both count as eye closure."""
    if "upper_lid_raise_left" in activations or "eye_close_left" in activations:
        return
    lid = rng.uniform(0.3, 1.0) if rng.random() < 0.05 else max(0.0, rng.normal(0.0, 0.05))
    for side in ("left", "right"):
        activations["eye_close_" + side] = min(lid * (1 + rng.normal(0, 0.03)), 1.0)


def sample_gaze(rng: np.random.Generator) -> tuple[float, float]:
    """Direction of the eyes, to the subject's left and up."""
    left, up = np.clip(rng.normal(0, 0.35, 2), -0.9, 0.9)
    return float(left), float(up)


@lru_cache(maxsize=1)  # pictures of one person may be drawn one after another
def identity_of(index: int, split: str, seed: int = SEED) -> Identity:
    """Person `index` of a split."""
    return draw_identity(_generator(seed, SPLIT_CODES[split], index, 0))


def _image_generators(index: int, split: str, seed: int) -> list[np.random.Generator]:
    """Generators of an image's expression, scene and noise, so that a change to one does not disturb the others."""
    take, person = divmod(index, IDENTITIES[split])
    return [_generator(seed, SPLIT_CODES[split], person, take + 1, part) for part in range(4)]


def draw_parts(index: int, split: str = "train", seed: int = SEED, varied: float = 0.0) -> Parts:
    """What image `index` of a split is made of, so that one part of it can be changed before it is rendered.

    Args:
        index (`int`): 0 to [`split_size`] - 1.
        split (`str`): `train`, `validation` or `test`.
        seed (`int`): [`SEED`] for the standard split.
        varied (`float`): Share of images, 0 to 1, of another make (see [`another_make`]); 0 for the standard split.

    Raises:
        ValueError: There is no such split or image.
    """
    if split not in IDENTITIES:
        raise ValueError(f"Unknown split {split!r}; accepted: {', '.join(IDENTITIES)}.")
    if not 0 <= index < split_size(split):
        raise ValueError(f"Image {index} of split {split!r}: it has images 0 to {split_size(split) - 1}.")
    for_expression, for_scene, for_noise, for_make = _image_generators(index, split, seed)
    activations = sample_activations(for_expression)
    gaze = sample_gaze(for_expression)
    identity, scene = identity_of(index % IDENTITIES[split], split, seed), draw_scene(for_scene)
    if for_make.random() < varied:
        identity, scene = another_make(for_make, identity, scene)
    return Parts(identity, activations, scene, for_noise, gaze)


def render_sample(
    index: int, split: str = "train", seed: int = SEED, varied: float = 0.0, oversampling: int = OVERSAMPLING
) -> Sample:
    """Draw image `index` of a split. The result depends on the arguments alone.

    They are those of [`draw_parts`], and how many times larger than it is the crop is drawn.

    Raises:
        ValueError: There is no such split or image.

    Example:

    >>> sample = render_sample(0, "test")
    >>> sample.rendering.image.shape, sample.identity_name
    ((224, 224, 3), 'test-00000')
    """
    parts = draw_parts(index, split, seed, varied)
    return Sample(
        rendering=render(*parts, oversampling),
        activations=parts.activations,
        facs=facs_intensities(parts.activations),
        feafa=feafa_intensities(parts.activations),
        jpeg_quality=parts.scene.jpeg_quality,
        identity_name=f"{split}-{index % IDENTITIES[split]:05d}",
        identity=parts.identity,
    )
