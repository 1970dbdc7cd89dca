"""Things that lie on or before the face: long hair or a head scarf, glasses, and hands or objects in front of it."""

import numpy as np
from scipy import ndimage


HAIR_SHELL, FRAME = 8, 9  # materials, after those of mesh.py


def _grid_triangles(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Triangles of a grid of vertices, row after row; `closed` joins the last row to the first."""
    row, column = np.meshgrid(np.arange(rows if closed else rows - 1), np.arange(columns - 1), indexing="ij")
    a, b = row * columns + column, ((row + 1) % rows) * columns + column
    return np.stack([a, a + 1, b, a + 1, b + 1, b], -1).reshape(-1, 3).astype(np.int32)


def hair_shell(rng, neutral: np.ndarray, ears: np.ndarray, rise: float, bottom: float, front: float):
    """A curtain of hair (or cloth) around the skull, open before the face.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        neutral (`np.ndarray`): (S, 3) the person's smoothed head.
        ears (`np.ndarray`): (S,) mask of the ears, which the curtain covers.
        rise (`float`): How much higher this head lies than the head at rest.
        bottom (`float`): Height at which it ends on the head at rest.
        front (`float`): Angle from straight ahead at which it begins, in radians.

    Returns:
        `tuple`: vertices (N, 3) and triangles (M, 3).
    """
    rows, columns = 26, 44
    bottom = bottom + rise
    ear, skull = neutral[ears > 0.5], neutral[neutral[:, 1] > 6.9 + rise]
    centre, top, lift = np.median(ear[:, 2]) - 0.1, skull[:, 1].max(), rng.uniform(0.03, 0.12)
    height = np.linspace(top - 0.1, bottom, rows)[:, None]
    # Above the ears the curtain follows the skull, from there on it hangs straight down.
    slices = [skull[np.abs(skull[:, 1] - max(y, 7.25 + rise)) < 0.09] for y in height[:, 0]]
    lift = lift * np.clip((top - height) / 0.5, 0.15, 1)
    width = np.array([[np.abs(part[:, 0]).max()] for part in slices]) + lift
    back = np.array([[centre - part[:, 2].min()] for part in slices]) + lift
    ahead = np.minimum(0.85, np.array([[part[:, 2].max() - centre] for part in slices]) + lift)
    flare = 1 + rng.uniform(-0.05, 0.16) * np.clip((7.2 + rise - height) / 1.5, 0, 1)
    vertices = []
    for side in (-1, 1):
        ragged = front + rng.normal(0, 0.035, (rows, 1)) + rng.uniform(-0.1, 0.1) * (height - 7.2 - rise)
        angle = ragged + (np.pi - ragged) * np.linspace(0, 1, columns // 2)[None]
        wave = 1 + 0.02 * np.sin(angle * rng.uniform(6, 14) + rng.uniform(0, 6) + height * rng.uniform(0, 3))
        x = side * width * flare * wave * np.abs(np.sin(angle)) ** 0.7
        z = centre + np.where(np.cos(angle) > 0, ahead, back) * wave * np.cos(angle)
        fall = (top - 0.1 - height) / (top - 0.1 - bottom)
        uneven = height + fall**3 * rng.normal(0, 0.06, (1, columns // 2))
        part = np.stack([x, uneven + np.zeros_like(x), z], -1)
        vertices.append(part if side < 0 else part[:, ::-1])
    grid = np.concatenate(vertices, 1)
    return grid.reshape(-1, 3), _grid_triangles(rows, columns, closed=False)


def _tube(points: np.ndarray, thickness: float, closed: bool):
    """A tube of six sides along `points` (N, 3)."""
    ahead = np.roll(points, -1, 0) - np.roll(points, 1, 0)
    if not closed:
        ahead[0], ahead[-1] = points[1] - points[0], points[-1] - points[-2]
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    across = np.cross(ahead, [0.03, 0.1, 1.0])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    up = np.cross(ahead, across)
    turn = np.linspace(0, 2 * np.pi, 7)
    ring = np.cos(turn)[None, :, None] * across[:, None] + np.sin(turn)[None, :, None] * up[:, None]
    vertices = points[:, None] + thickness * ring
    return vertices.reshape(-1, 3), _grid_triangles(len(points), 7, closed)


def glasses(rng, neutral: np.ndarray, landmarks: np.ndarray):
    """A pair of glasses that sits on one person's nose and ears.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        neutral (`np.ndarray`): (S, 3) the person's smoothed head.
        landmarks (`np.ndarray`): (68,) landmark vertices.

    Returns:
        `tuple`: frame vertices and triangles, lens vertices and triangles.
    """
    points = neutral[landmarks]
    right, left = points[36:42].mean(0), points[42:48].mean(0)
    eyes = (right + left) / 2
    half_distance = (left[0] - right[0]) / 2
    front = max(points[27, 2], points[19:25, 2].max()) + 0.05
    width = min(rng.uniform(0.75, 0.92) * half_distance, half_distance - 0.06)
    height, power = width * rng.uniform(0.5, 0.95), rng.uniform(2.0, 4.5)
    thickness, drop = rng.uniform(0.008, 0.028), rng.uniform(0.0, 0.06)
    bend = rng.uniform(0.1, 0.4)

    def place(x, y):
        """A point of the front: (x, y) around the middle between the eyes, bent backwards at the sides."""
        return np.stack([eyes[0] + x, eyes[1] - drop + y, front - bend * x**2], -1)

    parts, lenses = [], []
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    cosine, sine = np.cos(turn), np.sin(turn)
    rim_x = width * np.sign(cosine) * np.abs(cosine) ** (2 / power)
    rim_y = height * np.sign(sine) * np.abs(sine) ** (2 / power)
    rimless = rng.random() < 0.12
    for side in (-1, 1):
        rim = place(side * half_distance + rim_x, rim_y)
        parts.append(_tube(rim, 0.004 if rimless else thickness, closed=True))
        fan = np.stack([np.full(40, 40), np.arange(40), (np.arange(40) + 1) % 40], -1).astype(np.int32)
        lenses.append((np.concatenate([rim, place(np.array([side * half_distance]), np.zeros(1))]), fan))
        hinge = place(np.array([side * (half_distance + width)]), np.array([0.25 * height]))[0]
        ear = np.array([side * (np.abs(points[[0, 16], 0]).mean() + 0.06), hinge[1] - 0.02, points[0, 2] - 0.35])
        arm = hinge + (ear - hinge) * np.linspace(0, 1, 12)[:, None]
        parts.append(_tube(arm, max(thickness * 0.9, 0.01), closed=False))
    gap = np.linspace(-(half_distance - width), half_distance - width, 9)
    bridge = place(gap, 0.2 * height + 0.03 * (1 - (gap / gap[-1]) ** 2))
    parts.append(_tube(bridge, thickness, closed=False))
    return join(parts), join(lenses)


def join(parts):
    """Join meshes (vertices, triangles) into one."""
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in parts])
    return (
        np.concatenate([vertices for vertices, _ in parts]),
        np.concatenate([triangles + start for (_, triangles), start in zip(parts, starts, strict=False)]).astype(
            np.int32
        ),
    )


def _capsule(x, y, start, end, radius):
    """Signed distance to a capsule divided by its radius, and how far the nearest point is from its axis (x, y)."""
    step = end - start
    t = np.clip(((x - start[0]) * step[0] + (y - start[1]) * step[1]) / (step @ step), 0, 1)
    dx, dy = x - start[0] - t * step[0], y - start[1] - t * step[1]
    return np.hypot(dx, dy) / radius, dx / radius, dy / radius


def draw_occluder(rng, image: np.ndarray, skin: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Draw a hand, a band of cloth or an object that reaches in from the edge and covers a little of the face.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        image (`np.ndarray`): (W, W, 3) linear light, changed in place.
        skin (`np.ndarray`): (3,) brightness of the person's skin in this light.
        grain (`np.ndarray`): (512, 512) noise.

    Returns:
        `np.ndarray`: (W, W) bool, what is covered.
    """
    width = image.shape[0]
    y, x = np.mgrid[0 : 1 : width * 1j, 0 : 1 : width * 1j].astype(np.float32)
    heading = rng.uniform(0, 2 * np.pi)
    tip = np.array([0.5, 0.52]) + rng.uniform(0.18, 0.38) * np.array([np.cos(heading), np.sin(heading)])
    heading += rng.normal(0, 0.35)  # it need not point at the middle of the face
    outward = np.array([np.cos(heading), np.sin(heading)])
    across = np.array([-outward[1], outward[0]])
    kind = rng.choice(["hand", "cloth", "thing"], p=[0.5, 0.25, 0.25])
    if kind == "hand":
        radius, colour = rng.uniform(0.035, 0.05), skin * rng.uniform(0.85, 1.15)
        shapes = []
        for k in range(rng.integers(2, 5)):
            start = tip + across * (k - 1) * radius * 2.0 + outward * rng.uniform(0, 0.05)
            shapes.append((start, start + outward * 0.9 + across * 0.05 * (k - 1), radius * rng.uniform(0.9, 1.05)))
    elif kind == "cloth":
        colour = rng.uniform(0.02, 0.5, 3)
        start = tip + outward * rng.uniform(0.12, 0.2)
        behind = start + outward * 0.2
        shapes = [(start - across, start + across, rng.uniform(0.08, 0.16)), (behind - across, behind + across, 0.2)]
    else:
        colour = rng.uniform(0.01, 0.6, 3)
        shapes = [(tip, tip + outward * rng.uniform(0.3, 0.9), rng.uniform(0.04, 0.1))]
    cover, shade = np.zeros((width, width), np.float32), np.zeros((width, width), np.float32)
    light = rng.normal(0, 0.5, 2)
    for start, end, radius in shapes:
        distance, dx, dy = _capsule(x, y, start, end, radius)
        inside = np.clip((1 - distance) * radius * width, 0, 1)
        bulge = np.sqrt(np.clip(1 - distance**2, 0, 1))
        lit = 0.35 + 0.5 * bulge + 0.35 * (dx * light[0] + dy * light[1]) * np.clip(distance, 0, 1)
        shade = shade * (1 - inside) + inside * np.clip(lit, 0.08, 1.3)
        cover = np.maximum(cover, inside)
    texture = 1 + rng.uniform(0.03, 0.15) * grain[:width, :width]
    shadow = ndimage.shift(ndimage.uniform_filter(cover, 15), rng.uniform(-6, 6, 2), order=1)
    image *= (1 - 0.45 * shadow * (1 - cover))[..., None]
    paint = (shade * texture)[..., None] * np.asarray(colour, np.float32)
    image[:] = image * (1 - cover[..., None]) + cover[..., None] * paint
    return cover > 0.5
