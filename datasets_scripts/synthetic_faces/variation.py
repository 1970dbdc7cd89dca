"""Faces of another make, for training only: other sculpts of the same actions, odd light, odd skin, poor cameras.

All faces of the standard split share one mesh, one set of sculpted actions and one shader. A model that is to read
faces that were made otherwise must not learn these by heart. What is changed here leaves the labels as they are.
"""

import colorsys
from dataclasses import replace

import numpy as np

from . import skin
from .expression import OTHER_RECIPES, RECIPES, personal_style
from .identity import Identity
from .mesh import load_head
from .scene import Scene


MAKE = 3  # counts up whenever the same seed begins to draw other faces, which must not be mixed in a folder
OTHER_SHARE = 0.35  # of the actions are wholly as the other artists have them, of the rest half in part
STYLE_SPREAD = 1.6  # times the usual differences between persons in how they perform an action
SCULPT_SPREAD = 0.2  # of the logarithm of how far a part of the face moves, in each direction
SMOOTH = 2.5  # radians a decimetre of the waves that tell which parts move more and which less
# What moves along with an action in living skin and not in the mesh's own sculpts, and up to which weight: raised
# cheeks bulge and narrow the eye, a wrinkled nose takes the brows along, a smile lifts cheeks, parted lips bare teeth.
COMPANY: dict[str, dict[str, float]] = {
    "cheek_raise": {"fu/eyeSquint{Side}": 0.8, "cheek/{s}-cheek-trans-up": 0.8, "cheek/{s}-cheek-volume-incr": 0.8,
                    "eyes/{s}-eye-bag-incr": 0.6},
    "nose_wrinkle": {"fu/browDown{Side}": 0.7, "fu/eyeSquint{Side}": 0.5, "fu/cheekSquint{Side}": 0.5,
                     "fu/mouthUpperUp{Side}": 0.2},
    "upper_lip_raise": {"expr/~/nose-{side}-elevation": 0.6},
    "brow_lower": {"fu/eyeSquint{Side}": 0.35},
    "corner_pull": {"fu/cheekSquint{Side}": 0.3, "cheek/{s}-cheek-volume-incr": 0.3, "fu/mouthUpperUp{Side}": 0.2},
    "lips_part": {"fu/mouthUpperUp{Side}": 0.8},
}  # fmt: skip
EYE_NEAR, EYE_FAR = 0.25, 0.55  # decimetres from an eye's centre: lids must meet, so nothing is changed near them


def another_make(rng: np.random.Generator, identity: Identity, scene: Scene) -> tuple[Identity, Scene]:
    """Change how a person's face moves and looks, and how it is lit and photographed.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        identity (`Identity`), scene (`Scene`): As they were drawn.

    Returns:
        `tuple`: the identity and the scene to render in their place.
    """
    return _resculpt(rng, _repaint(rng, identity)), _relight(rng, scene)


def _resculpt(rng, identity: Identity) -> Identity:
    """Another artist's idea of every action: other shares of the targets, and another reach of each part."""
    head = load_head()
    waves, phases = rng.normal(0, SMOOTH, (3, 6, 3)), rng.uniform(0, 2 * np.pi, (3, 6))
    fields = np.cos(np.einsum("vx,akx->vak", head.vertices, waves) + phases).sum(2) / np.sqrt(3)
    away = np.linalg.norm(head.vertices[:, None] - head.eye_centres, axis=2).min(1)
    free = np.clip((away - EYE_NEAR) / (EYE_FAR - EYE_NEAR), 0, 1)[:, None]
    sculpt = np.exp(SCULPT_SPREAD * fields * free).astype(np.float32)
    style = personal_style(rng, STYLE_SPREAD, COMPANY, _mixed_recipes(rng))
    return replace(identity, style=style, sculpt=sculpt)


def _mixed_recipes(rng) -> dict[str, dict[str, float]]:
    """Each action as one artist has it, or as the others have, or something between the two."""
    recipes = dict(RECIPES)
    for action, theirs in OTHER_RECIPES.items():
        share = 1.0 if rng.random() < OTHER_SHARE else max(0.0, float(rng.uniform(-1, 1)))
        recipes[action] = {target: (1 - share) * weight for target, weight in RECIPES[action].items()}
        for target, weight in theirs.items():
            recipes[action][target] = recipes[action].get(target, 0.0) + share * weight
    return recipes


def _repaint(rng, identity: Identity) -> Identity:
    """Other colours, other gloss, and furrows that have nothing to do with the expression."""
    albedo = identity.albedo * np.exp(rng.normal(0, 0.2, 3)).astype(np.float32)
    albedo = albedo * (1 + rng.uniform(0, 0.25) * skin.noise(rng, "blotches"))[..., None]
    kind = rng.random()
    if kind < 0.1:  # plaster: one colour, no brows
        albedo = np.broadcast_to(albedo.mean((0, 1)), albedo.shape)
    elif kind < 0.2:
        albedo = np.broadcast_to(albedo.mean(2, keepdims=True), albedo.shape)
    palette, surface = identity.palette * np.exp(rng.normal(0, 0.25, (6, 1))), identity.surface.copy()
    surface[0], surface[3] = rng.uniform(0, 0.9), rng.uniform(0, 1)  # gloss and strength of the lips' colour
    odd = rng.uniform(0, 1, len(identity.age_lines)) * (rng.random(len(identity.age_lines)) < 0.2)
    return replace(
        identity,
        albedo=np.ascontiguousarray(np.clip(albedo, 0.004, 1), np.float32),
        palette=palette.astype(np.float32),
        surface=surface,
        age_lines=identity.age_lines + odd,
    )


def _relight(rng, scene: Scene) -> Scene:
    """Light without shadows, hard light from anywhere, coloured light; and a worse camera."""
    kind, lights, colours = rng.random(), scene.lights, scene.light_colours
    sky, ground = scene.sky, scene.ground
    if kind < 0.2:  # from all sides alike
        colours, sky, ground = 0 * colours, np.full(3, 0.4), np.full(3, 0.4)
    elif kind < 0.35:
        colours, sky, ground = 0.3 * colours, 1.5 * sky, 1.5 * ground
    elif kind < 0.5:
        lights = np.array([[*rng.uniform(-1, 1, 2), rng.uniform(0.15, 1)], lights[1]])
        colours, sky, ground = np.stack([1.3 * colours[0], 0 * colours[1]]), 0.3 * sky, 0.3 * ground
    elif kind < 0.7:
        colours = np.array([colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.4, 1)) for _ in "12"])
    return replace(
        scene,
        lights=lights,
        light_colours=colours,
        sky=sky,
        ground=ground,
        brightness=scene.brightness * float(np.exp(rng.normal(0, 0.25))),
        contrast=float(rng.uniform(0.65, 1.5)),
        white_balance=scene.white_balance * np.exp(rng.normal(0, 0.1, 3)),
        saturation=0.0 if rng.random() < 0.15 else float(rng.uniform(0.3, 1.6)),
        blur=float(max(0, rng.uniform(-0.6, 1.3))),
        noise=float(rng.uniform(0.002, 0.04)),
        jpeg_quality=int(rng.integers(50, 96)),
        wrinkles=0.0 if rng.random() < 0.5 else float(rng.uniform(0.2, 1.6)),
    )
