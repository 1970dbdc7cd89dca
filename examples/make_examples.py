"""Render the example portraits: four people whom the model never saw in training, each with an expression.

python examples/make_examples.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from au_llava.datasets_scripts.synthetic_faces import renderer, scene
from au_llava.datasets_scripts.synthetic_faces.sampler import SEED, identity_of


SIDE, FACE = 512, 1.75  # pixels; size of the face relative to the crop that the model is trained on

# name: person of the test split, activation of each action from 0 to 1, and pose
PORTRAITS: dict[str, tuple[int, dict[str, float], dict[str, float]]] = {
    "smile": (
        222,
        {"cheek_raise_left": 0.8, "cheek_raise_right": 0.8, "corner_pull_left": 0.9, "corner_pull_right": 0.9}
        | {"lips_part": 0.5},
        {"yaw": 6, "pitch": -2},
    ),
    "surprise": (
        247,
        {f"{action}_{side}": 0.9 for action in ("inner_brow_raise", "outer_brow_raise", "upper_lid_raise")
         for side in ("left", "right")} | {"jaw_drop": 0.7, "lips_part": 0.8},
        {"yaw": -4, "roll": 3},
    ),
    "frown": (
        246,
        {f"{action}_{side}": strength for action, strength in (("brow_lower", 0.9), ("lid_tighten", 0.7))
         for side in ("left", "right")} | {"lip_press": 0.8, "chin_raise": 0.6},
        {"yaw": 3, "pitch": 3},
    ),
    "wink": (
        211,
        {"eye_close_left": 1.0, "cheek_raise_left": 0.7, "corner_pull_left": 0.9, "dimple_left": 0.4},
        {"yaw": -3, "roll": -2},
    ),
}  # fmt: skip


def portrait(person: int, activations: dict[str, float], pose: dict[str, float]) -> Image.Image:
    """The renderer's picture with a wider frame around the face than its crops have."""
    renderer.CROP = scene.CROP = SIDE
    corner = np.array([(SIDE - 224 * FACE) / 2, (SIDE - 224 * FACE) / 2 + 12])
    renderer.TEMPLATE = scene.TEMPLATE * FACE + corner
    view = scene.Scene(**pose, distance=12.0, plain_background=False)
    rendering = renderer.render(identity_of(person, "test", SEED), activations, view, np.random.default_rng(person))
    return Image.fromarray(rendering.image)


if __name__ == "__main__":
    for name, (person, activations, pose) in PORTRAITS.items():
        portrait(person, activations, pose).save(Path(__file__).parent / f"{name}.jpg", quality=92)
