"""The head mesh: vertices, shape targets that move them, and one Catmull-Clark step that smooths the result.

The data lies in `head.npz`, a CC0 extract of the MakeHuman base mesh (see `make_head.py` and `README.md`). Coordinates
are decimetres: x to the subject's left (the right side of the image), y up, z out of the face. A target is a sparse
set of vertex displacements; targets add up.
"""

from functools import cache
from pathlib import Path

import numpy as np
from scipy import sparse


HEAD_FILE = Path(__file__).with_name("head.npz")
# Materials of faces, in the order of the groups of the base mesh.
SKIN, LEFT_EYE, RIGHT_EYE, LOWER_LASHES, UPPER_LASHES, UPPER_TEETH, LOWER_TEETH, TONGUE = range(8)
SPLIT_EXPRESSIONS = ("corner-puller", "depression", "depression-retraction", "elevation", "retraction")
# Targets that move both sides at once in the source and are split at the middle of the face for one-sided actions.
SPLIT_TARGETS = (
    "fu/browInnerUp", "mouth/mouth-angles-down", "mouth/mouth-dimples-in",
    *(f"expr/{race}/mouth-{name}" for race in ("african", "asian", "caucasian") for name in SPLIT_EXPRESSIONS),
)  # fmt: skip


def subdivide(quads: np.ndarray, corner_uv: np.ndarray, vertex_count: int):
    """One Catmull-Clark step, as a matrix that can be applied to any pose of the mesh.

    Args:
        quads (`np.ndarray`): (Q, 4) vertex numbers.
        corner_uv (`np.ndarray`): (Q, 4, 2) texture coordinates of the corners.
        vertex_count (`int`): Number of vertices V.

    Returns:
        `tuple`: a sparse (V', V) matrix, the new quads (4Q, 4) and their corner coordinates (4Q, 4, 2).
    """
    count = len(quads)
    edges = np.sort(np.stack([quads, np.roll(quads, -1, 1)], -1).reshape(-1, 2), 1)
    unique, edge_of = np.unique(edges, axis=0, return_inverse=True)
    edge_of = edge_of.ravel()
    edge_count = len(unique)
    faces_at_edge = np.bincount(edge_of, minlength=edge_count)
    border = faces_at_edge == 1

    def matrix(values, rows, columns, shape):
        return sparse.csr_matrix((values, (rows, columns)), shape)

    face_rows = np.repeat(np.arange(count), 4)
    face_points = matrix(np.full(count * 4, 0.25), face_rows, quads.ravel(), (count, vertex_count))
    midpoints = matrix(np.full(edge_count * 2, 0.5), np.repeat(np.arange(edge_count), 2), unique.ravel(),
                       (edge_count, vertex_count))  # fmt: skip
    edge_faces = matrix(1.0 / faces_at_edge[edge_of], edge_of, face_rows, (edge_count, count))
    keep, share = np.where(border, 1.0, 0.5), np.where(border, 0.0, 0.5)
    edge_points = sparse.diags(keep) @ midpoints + sparse.diags(share) @ (edge_faces @ face_points)

    valence = np.maximum(np.bincount(quads.ravel(), minlength=vertex_count), 1).astype(float)
    at_faces = matrix(np.ones(count * 4), quads.ravel(), face_rows, (vertex_count, count))
    at_edges = matrix(np.ones(edge_count * 2), unique.ravel(), np.repeat(np.arange(edge_count), 2),
                      (vertex_count, edge_count))  # fmt: skip
    edge_valence = np.maximum(np.asarray(at_edges.sum(1)).ravel(), 1)
    identity = sparse.identity(vertex_count, format="csr")
    inner = (
        sparse.diags(1 / valence**2) @ at_faces @ face_points
        + sparse.diags(2 / (valence * edge_valence)) @ at_edges @ midpoints
        + sparse.diags((valence - 3) / valence) @ identity
    )
    at_border = matrix(np.ones(border.sum() * 2), unique[border].ravel(), np.repeat(np.flatnonzero(border), 2),
                       (vertex_count, edge_count))  # fmt: skip
    border_valence = np.asarray(at_border.sum(1)).ravel()
    on_border = (border_valence > 0).astype(float)
    outer = 0.5 * identity + 0.5 * sparse.diags(1 / np.maximum(border_valence, 1)) @ at_border @ midpoints
    corners = sparse.diags(1 - on_border) @ inner + sparse.diags(on_border) @ outer

    edge_of = vertex_count + edge_of.reshape(count, 4)
    face_vertex = vertex_count + edge_count + np.arange(count)
    middle = corner_uv.mean(1)
    new_quads, new_uv = [], []
    for k in range(4):
        new_quads.append(np.stack([quads[:, k], edge_of[:, k], face_vertex, edge_of[:, k - 1]], 1))
        here, after, before = corner_uv[:, k], corner_uv[:, (k + 1) % 4], corner_uv[:, k - 1]
        new_uv.append(np.stack([here, (here + after) / 2, middle, (here + before) / 2], 1))
    smooth = sparse.vstack([corners, edge_points, face_points]).tocsr().astype(np.float32)
    return smooth, np.stack(new_quads, 1).reshape(-1, 4), np.stack(new_uv, 1).reshape(-1, 4, 2)


class HeadMesh:
    """The smoothed head and its targets. Build it once with [`load_head`].

    Attributes:
        vertices (`np.ndarray`): (V, 3) base vertices at rest, float32.
        rest (`np.ndarray`): (S, 3) smoothed vertices at rest; skin, hair and clothes are painted in these coordinates.
        triangles, materials: (T, 3) and (T,) of everything opaque.
        lash_triangles, lash_materials, lash_uv: the same for the eyelashes, with (L, 3, 2) texture coordinates.
        lips, inside, ears (`np.ndarray`): (S,) masks from 0 to 1: red of the lips, inside of the mouth, ears.
        landmarks (`np.ndarray`): (68,) smoothed vertices, in the common order of 68 facial landmarks.
        skin (`np.ndarray`): (K,) smoothed vertices that belong to the skin.
        eye_centres (`np.ndarray`): (2, 3) centres of the left and right eyeball at rest.
    """

    def __init__(self):
        with np.load(HEAD_FILE) as data:
            self.vertices = data["vertices"]
            quads, corner_uv, materials = data["quads"].astype(np.int64), data["corner_uv"], data["materials"]
            names, bounds = data["target_names"].tolist(), data["target_bounds"]
            indices, deltas = data["target_indices"].astype(np.int64), data["target_deltas"].astype(np.float32)
            self.lips, self.inside = data["lips"].astype(np.float32) / 255, data["inside"].astype(np.float32) / 255
            self.landmarks = data["landmarks"].astype(np.int64)
        self._targets = {
            name: (indices[low:high], deltas[low:high])
            for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True)
        }
        for name in SPLIT_TARGETS:
            indices, deltas = self._targets[name]
            left = np.clip(self.vertices[indices, 0] / 0.12 + 0.5, 0, 1)[:, None]
            self._targets[name + "Left"] = (indices, deltas * left)
            self._targets[name + "Right"] = (indices, deltas * (1 - left))

        self._smooth, quads, corner_uv = subdivide(quads, corner_uv, len(self.vertices))
        materials = np.repeat(materials, 4)
        triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)
        uv = np.concatenate([corner_uv[:, [0, 1, 2]], corner_uv[:, [0, 2, 3]]]).astype(np.float32)
        materials = np.concatenate([materials, materials]).astype(np.int32)
        lash = (materials == LOWER_LASHES) | (materials == UPPER_LASHES)
        self.triangles, self.materials = triangles[~lash], materials[~lash]
        self.lash_triangles, self.lash_materials, self.lash_uv = triangles[lash], materials[lash], uv[lash]
        self.rest = self.smooth(self.vertices)
        self.skin = self.part(SKIN)
        self.eye_centres = np.stack([self._middle(LEFT_EYE), self._middle(RIGHT_EYE)])
        self.ears = self._moved_by("ears/")

    @property
    def target_names(self) -> list[str]:
        return list(self._targets)

    def add(self, vertices: np.ndarray, target: str, weight: float) -> None:
        """Add `weight` times a target to `vertices` (V, 3), in place."""
        indices, deltas = self._targets[target]
        vertices[indices] += np.float32(weight) * deltas  # a vertex occurs once in a target

    def smooth(self, vertices: np.ndarray) -> np.ndarray:
        """(V, 3) base vertices to (S, 3) smoothed ones."""
        return (self._smooth @ vertices).astype(np.float32)

    def part(self, material: int) -> np.ndarray:
        """Smoothed vertices of one material."""
        return np.unique(self.triangles[self.materials == material])

    def _middle(self, material: int) -> np.ndarray:
        points = self.rest[self.part(material)]
        return (points.min(0) + points.max(0)) / 2

    def _moved_by(self, prefix: str) -> np.ndarray:
        moved = np.zeros(len(self.vertices), np.float32)
        for name, (indices, deltas) in self._targets.items():
            if name.startswith(prefix):
                moved[indices] = np.maximum(moved[indices], np.linalg.norm(deltas, axis=1))
        return np.clip(self._smooth @ moved / 0.04 - 0.5, 0, 1).astype(np.float32)


@cache
def load_head() -> HeadMesh:
    """The head mesh, read once per process."""
    return HeadMesh()
