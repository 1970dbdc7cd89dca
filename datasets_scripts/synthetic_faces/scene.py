"""Where the camera stands, how the crop is aligned, what light there is, what the camera does to the picture."""

import colorsys
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage


CROP = 224
# Where the five points come to lie in a crop (x, y in pixels): the eye left in the image, the eye right in the image,
# nose tip, the mouth corner left in the image, the one right in it. The same numbers as in face_alignment.py, where
# photographs are aligned; a test compares them.
TEMPLATE = np.array([[84.38, 91.06], [139.33, 90.72], [112.03, 122.30], [89.38, 154.56], [134.98, 154.25]])


@dataclass
class Scene:
    """Everything about one picture that is neither the person nor the expression.

    Angles are degrees; yaw turns the face to the subject's left, pitch down, roll to the subject's right shoulder.
    Directions of light are in the camera's frame (x right in the image, y up, z towards the camera).
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    distance: float = 14.0  # decimetres
    jitter: np.ndarray = field(default_factory=lambda: np.zeros((5, 2)))  # error of the five points in crop pixels
    lights: np.ndarray = field(default_factory=lambda: np.array([[0.45, 0.6, 0.8], [-0.7, 0.1, 0.5]]))
    light_colours: np.ndarray = field(default_factory=lambda: np.array([[1.0, 0.97, 0.92], [0.25, 0.27, 0.3]]))
    ground: np.ndarray = field(default_factory=lambda: np.array([0.14, 0.13, 0.13]))
    sky: np.ndarray = field(default_factory=lambda: np.array([0.33, 0.34, 0.37]))
    brightness: float = 0.2  # linear brightness that a face of medium tone gets
    contrast: float = 1.0
    white_balance: np.ndarray = field(default_factory=lambda: np.ones(3))
    saturation: float = 1.0
    blur: float = 0.0  # crop pixels
    motion: tuple[float, float] = (0.0, 0.0)  # path of a moving camera in crop pixels
    shrink: float = 1.0  # share of the resolution that the camera had
    noise: float = 0.003
    vignette: float = 0.0
    jpeg_quality: int = 95
    wrinkles: float = 1.0  # strength of the furrows that actions raise; 0 leaves them out
    occluded: bool = False
    plain_background: bool = True


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a camera, a light and the faults of a photograph."""
    warmth, key = rng.normal(0, 0.09), rng.uniform(0.5, 1.2)
    side = rng.choice([-1, 1])
    lights = np.array([
        [side * rng.uniform(0.0, 0.95), rng.uniform(-0.1, 0.9), rng.uniform(0.35, 1)],
        [rng.uniform(-1, 1), rng.uniform(-0.3, 0.6), rng.uniform(0.1, 1)],
    ])  # fmt: skip
    colours = np.stack(
        [np.array([1 + warmth, 1, 1 - warmth]) * key, np.array([1 - warmth, 1, 1 + warmth]) * rng.uniform(0, 0.5)]
    )
    return Scene(
        yaw=float(np.clip(rng.normal(0, 13), -32, 32)),
        pitch=float(np.clip(rng.normal(0, 8), -22, 22)),
        roll=float(np.clip(rng.normal(0, 6), -20, 20)),
        distance=float(np.exp(rng.uniform(np.log(5.5), np.log(28)))),
        jitter=rng.normal(0, 2.5, (5, 2)),
        lights=lights,
        light_colours=colours,
        ground=np.array([0.14, 0.13, 0.13]) * rng.uniform(0.4, 2.0),
        sky=np.array([0.33, 0.34, 0.37]) * rng.uniform(0.5, 1.8),
        brightness=float(np.exp(rng.normal(np.log(0.2), 0.3))),
        contrast=float(rng.uniform(0.85, 1.2)),
        white_balance=np.exp(rng.normal(0, 0.03, 3)),
        saturation=0.0 if rng.random() < 0.04 else float(rng.uniform(0.65, 1.2)),
        blur=float(max(0, rng.uniform(-0.6, 0.9))),
        motion=tuple(rng.normal(0, 1.5, 2)) if rng.random() < 0.1 else (0.0, 0.0),
        shrink=float(rng.uniform(0.35, 0.9)) if rng.random() < 0.25 else 1.0,
        noise=float(rng.uniform(0.002, 0.022)),
        vignette=float(max(0, rng.uniform(-0.3, 0.4))),
        jpeg_quality=int(rng.integers(68, 96)),
        wrinkles=0.0 if rng.random() < 0.4 else float(rng.uniform(0.3, 1.3)),
        occluded=bool(rng.random() < 0.08),
        plain_background=False,
    )


def head_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) rotation of the head in the camera's frame."""
    a, b, c = np.radians([yaw, pitch, roll])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    tilt = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return tilt @ nod @ turn


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares similarity transform (Umeyama, 1991) between points of the plane.

    Args:
        source, target (`np.ndarray`): (N, 2) points.

    Returns:
        `np.ndarray`: (2, 3), to be applied to columns (x, y, 1).
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    left, right = source - source_mean, target - target_mean
    u, singular, vt = np.linalg.svd(right.T @ left / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (singular * sign).sum() / left.var(0).sum()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


# A detector sets the eyes and the nose tip a little higher than their middle and their foremost point: mean difference
# to SCRFD on 200 renderings, in decimetres of the head.
EYE_RISE, NOSE_RISE = 0.018, 0.030


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """The five alignment points (5, 3) of 68 landmarks (68, 3) of the head, as a face detector would see them."""
    eyes = [landmarks[[36, 39]].mean(0), landmarks[[42, 45]].mean(0)]
    points = np.stack([*eyes, landmarks[30], landmarks[48], landmarks[54]])
    points[:, 1] += [EYE_RISE, EYE_RISE, NOSE_RISE, 0, 0]
    return points


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """A square picture (W, W, C) with `size` pixels a side: linear, corner on corner."""
    place = np.linspace(0, len(picture) - 1, size)
    low = np.minimum(place.astype(int), len(picture) - 2)
    share = (place - low)[:, None, None]
    rows = picture[low] * (1 - share) + picture[low + 1] * share
    share = share[:, 0]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def background(rng: np.random.Generator, width: int, plain: bool) -> np.ndarray:
    """(width, width, 3) linear light behind the head: a colour gradient, some soft and hard shapes, some texture."""
    if plain:
        return np.full((width, width, 3), 0.18, np.float32)
    small = width // 4
    corners = np.array([
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.02, 0.9)) for _ in range(4)
    ])  # fmt: skip
    corners = corners.reshape(2, 2, 3) if rng.random() < 0.7 else np.broadcast_to(corners[:1, None], (2, 2, 3))
    y, x = np.mgrid[0 : 1 : small * 1j, 0 : 1 : small * 1j].astype(np.float32)
    picture = np.stack([ndimage.map_coordinates(corners[..., c], [y, x], order=1) for c in range(3)], -1)
    for _ in range(rng.integers(0, 8)):
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.02, 0.9)))
        (cx, cy), (a, b), turn = rng.random(2), rng.uniform(0.03, 0.4, 2), rng.uniform(0, np.pi)
        u = np.abs((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / a
        v = np.abs((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / b
        edge = np.maximum(u, v) if rng.random() < 0.5 else np.hypot(u, v)
        cover = (1 / (1 + np.exp(np.clip((edge - 1) * rng.uniform(5, 40), -30, 30))))[..., None]
        picture = picture * (1 - cover) + cover * colour
    picture *= 1 + rng.uniform(0, 0.2) * resize(rng.standard_normal((small // 4, small // 4, 1)), small)
    picture = resize(picture, width)
    return np.ascontiguousarray(np.clip(picture * 0.6, 0, 1), np.float32)


def photograph(rng: np.random.Generator, light: np.ndarray, face_brightness: float, scene: Scene) -> np.ndarray:
    """Turn linear light into the picture that a camera would write.

    Args:
        rng (`np.random.Generator`): Where the noise comes from.
        light (`np.ndarray`): (224, 224, 3) linear light.
        face_brightness (`float`): Mean light on the face over the square root of the skin's own brightness.
        scene (`Scene`): Exposure and faults.

    Returns:
        `np.ndarray`: (224, 224, 3) uint8, sRGB.
    """
    light = light * (scene.brightness / face_brightness) * scene.white_balance
    if scene.vignette:
        y, x = np.mgrid[-1 : 1 : CROP * 1j, -1 : 1 : CROP * 1j]
        light = light * (1 - scene.vignette * 0.5 * (x**2 + y**2))[..., None]
    grey = light.mean(-1, keepdims=True)
    light = np.clip(grey + scene.saturation * (light - grey), 0, None)
    light = 1.25 * light / (1 + 0.35 * light)  # highlights roll off as on film
    picture = np.clip(light, 0, 1) ** (1 / 2.2)
    picture = (picture - 0.45) * scene.contrast + 0.45
    if scene.shrink < 1:
        size = round(CROP * scene.shrink)
        coarse = resize(ndimage.gaussian_filter(picture, (0.4 / scene.shrink,) * 2 + (0,)), size)
        picture = resize(coarse, CROP)
    if scene.blur:
        picture = ndimage.gaussian_filter(picture, (scene.blur, scene.blur, 0))
    if any(scene.motion):
        steps = [
            ndimage.shift(picture, (t * scene.motion[1], t * scene.motion[0], 0), order=1, mode="nearest")
            for t in (-0.5, 0, 0.5)
        ]
        picture = np.mean(steps, 0)
    shot = rng.standard_normal((CROP, CROP, 1)) * 0.7 + rng.standard_normal((CROP, CROP, 3)) * 0.5
    picture = picture + scene.noise * shot * np.sqrt(np.clip(picture, 0.1, 1) + 0.3)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
