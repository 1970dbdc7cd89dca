"""From a photograph to aligned face crops: open the picture, find its faces, bring each to one size and place.

The one alignment of the project: photographs and data sets, training and recognition all go through [`align`].
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, IOBase
from math import ceil
from numbers import Integral
from pathlib import Path

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.utils import logging


logger = logging.get_logger(__name__)

CROP_SIZE = 224  # side of a face crop in pixels
# Where (x, y) the eyes, nose tip and mouth corners lie in a crop, left in the picture before right. ArcFace's template
# (Deng et al., CVPR 2019) at 78 % of its size, so that forehead, brows and a dropped jaw stay in view.
FIVE_POINTS = ((84.38, 91.06), (139.33, 90.72), (112.03, 122.30), (89.38, 154.56), (134.98, 154.25))
MAX_PIXELS = 89_478_485  # larger pictures are refused before they are decoded: Pillow's own limit, 268 MB as RGB
ENCODED = (bytes, bytearray, memoryview)  # what a picture file may be read into
DETECTORS = ("auto", "scrfd", "cascade", "none")
GET_SCRFD = (
    "Set AU_LLAVA_SCRFD to an SCRFD .onnx file, or pass detector='scrfd' (--detector scrfd) once online "
    "(non-commercial models)."
)

# SCRFD sees two copies of a photograph, of this longest side and border in pixels: a small one in a wide border, for
# faces that fill the frame (missed at any usual size); a large one for faces from 1 % of the photograph's longer side.
SCRFD_PASSES = ((320, 160), (2560, 32))
# The cascade sees one copy, of this longest side at most, in a border of this part of it; this many windows must agree
# on a face. A crop has this many sides of its box, as SCRFD's points would give on average (1.40 to 1.57 a picture).
CASCADE_SIDE, CASCADE_BORDER, CASCADE_VOTES, CASCADE_CROP = 640, 0.1, 32, 1.5


@dataclass
class Face:
    """One face of a photograph; its parts are `None` where they are not known."""

    box: tuple[float, float, float, float] | None  # x0, y0, x1, y1 in pixels of the upright photograph, inside it
    score: float | None  # the detector's confidence, 0 to 1
    points: list[tuple[float, float]] | None  # five (x, y) in pixels of the photograph, ordered as FIVE_POINTS
    crop: Image.Image  # aligned, RGB, 224 x 224 pixels


def open_image(source: str | os.PathLike | bytes | IOBase | np.ndarray | Image.Image) -> Image.Image:
    """Open any picture as upright RGB with 8 bits a channel.

    EXIF orientation is applied; transparent parts become white; 16-bit grey is scaled to 8 bits, not clipped; of an
    animation the first frame is taken.

    Args:
        source: Path, http(s) URL, encoded bytes or an open binary file, PIL image, or array `(H, W)`, `(H, W, 1)`,
            `(H, W, 3)` RGB or `(H, W, 4)` RGBA: `uint8`, `uint16`, other integers from 0 to 255 or 65535, floats from
            0 to 1 (or 255).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, damaged, no picture (or one as text, such as a data URL), or larger than
            `MAX_PIXELS`.

    Example:

    >>> open_image(np.full((4, 6), 65535, dtype=np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else f"The given {type(source).__name__}"
    if isinstance(source, (str, os.PathLike)) and not name.startswith(("http://", "https://")):
        if len(name) > 4096:  # as long as paths are on Linux; systems' own errors would hold all of it
            raise ValueError(f"{name[:40]}... ({len(name)} characters): no path; decode it, and give bytes.")
        if not Path(source).is_file():
            raise FileNotFoundError(f"{name}: no such file; check the path (the current folder is {Path.cwd()}).")
        source = Path(source).read_bytes()
    try:
        if isinstance(source, str):
            source = httpx.get(source, follow_redirects=True, timeout=30).raise_for_status().content
        if isinstance(source, ENCODED):
            source = BytesIO(source)
        if isinstance(source, IOBase):
            source = Image.open(source)  # type: ignore[arg-type]  # IOBase is what all open files are
        image = source if isinstance(source, Image.Image) else _from_array(np.asarray(source))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
        with contextlib.suppress(Exception):  # now only the EXIF block can be at fault; a picture can do without it
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which Pillow's own conversion would clip
            image = _from_array(np.asarray(image))
        if image.mode == "La":  # Pillow converts it to LA only
            image = image.convert("LA")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except httpx.HTTPError as error:
        raise ValueError(f"{name}: cannot be fetched ({error}); check the address and the network.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too large ({error}); scale it down to {MAX_PIXELS} pixels or fewer.") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: no picture in it; replace it, or convert it to PNG or JPEG.") from error
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"{name}: unusable or damaged ({error}); replace the picture.") from error


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 0:  # whatever is no array
        raise ValueError("it is no picture; give a path, URL, bytes, open file, PIL image or array")
    values = values[:, :, 0] if values.shape[2:] == (1,) else values
    if values.size == 0 or values.ndim < 2 or values.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"shape {values.shape}; give (height, width), or that with 1, 3 or 4 channels last")
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    kind, low, high = values.dtype.kind, values.min(), values.max()
    whole = 65535 if high > 255 or values.dtype.str[1:] == "u2" else 255
    full, slack = (whole, 0) if kind in "iu" else (1 if high <= 4 else 255, 0.1)  # floats above 4 cannot mean 0 to 1
    if kind not in "biuf" or not -slack <= low / full <= high / full <= 1 + slack:
        raise ValueError(f"values from {low} to {high}; give integers from 0 to 255 or 65535, or floats from 0 to 1")
    return Image.fromarray((np.clip(values, 0, full) * (255 / full)).round().astype(np.uint8))


def find_faces(image: Image.Image, detector: str = "auto", max_faces: int | None = None) -> list[Face]:
    """Find the faces of a picture and cut out each, aligned.

    Args:
        image: An upright RGB picture, as [`open_image`] gives it.
        detector: `"scrfd"`: insightface's SCRFD (Guo et al., ICLR 2022), which gives five points, so that crops are
            turned upright. Its model is the file that the environment variable `AU_LLAVA_SCRFD` names, else one that
            insightface has downloaded, else it is downloaded. The path of an `.onnx` file: SCRFD with that model.
            `"cascade"`: scikit-image's LBP cascade, without score; finds upright frontal faces, misses many. `"auto"`:
            SCRFD where a model is at hand, else the cascade. `"none"`: the picture is a face crop, scaled to fit.
        max_faces: Keep at most so many faces.

    Returns:
        The faces, largest box first; empty if there are none. What a crop shows beyond the photograph is black.

    Raises:
        ValueError: If the detector is unknown or its file is no SCRFD model, or `max_faces` no number of faces.
        FileNotFoundError, RuntimeError: If an SCRFD model is not where it should be, or cannot be downloaded.

    Example:

    >>> find_faces(Image.new("RGB", (320, 240)), detector="cascade")
    []
    """
    if max_faces is not None and (not isinstance(max_faces, Integral) or max_faces < 1):
        raise ValueError(f"max_faces is {max_faces!r}; give a whole number, 1 or more, or None for all.")
    if detector not in DETECTORS and not str(detector).endswith(".onnx"):
        raise ValueError(f"Unknown detector {detector!r}; give {', '.join(DETECTORS)} or the path of an .onnx file.")
    if detector == "none":
        return [Face(None, None, None, _warp(image, CROP_SIZE / max(image.size), complex(*image.size) / 2))]
    chosen = which_detector(detector)
    if detector == "auto" and chosen == "cascade":
        logger.warning_once(f"The LBP cascade seeks the faces: it misses many and turns none upright. {GET_SCRFD}")
    faces = _find_by_cascade(image) if chosen == "cascade" else _find_by_scrfd(image, chosen)
    faces.sort(key=lambda face: (face[0][2] - face[0][0]) * (face[0][1] - face[0][3]))
    found = []
    for box, score, points in faces[:max_faces]:
        x0, y0, x1, y1 = box
        scale = CROP_SIZE / CASCADE_CROP / (x1 - x0)
        crop = align(image, points) if points else _warp(image, scale, complex(x0 + x1, y0 + y1) / 2)
        x0, y0, x1, y1 = np.clip(box, 0, image.size * 2).tolist()
        found.append(Face((x0, y0, x1, y1), score, points, crop))
    return found


def which_detector(detector: str) -> str:
    """What seeks the faces on this machine when a detector is asked for.

    Args:
        detector: As for [`find_faces`]. `auto` takes the SCRFD model that is at hand, `scrfd` downloads one otherwise.

    Returns:
        `"cascade"` or the path of an SCRFD model for `auto` and `scrfd`; any other detector as it is.

    Raises:
        RuntimeError: If a model is to be downloaded and cannot be.

    Example:

    >>> which_detector("cascade")
    'cascade'
    """
    if detector not in ("auto", "scrfd"):
        return str(detector)
    at_hand = [os.environ.get("AU_LLAVA_SCRFD"), *sorted(Path.home().glob(".insightface/models/*/det_*.onnx"))]
    if found := next(filter(None, at_hand), "cascade" if detector == "auto" else None):
        return str(found)
    logger.warning("insightface downloads its buffalo_sc models, which are for non-commercial research only.")
    try:  # inside `try`, the Hub's check of imports lets a package be absent
        from insightface.utils import ensure_available

        with contextlib.redirect_stdout(sys.stderr):
            return str(next(Path(ensure_available("models", "buffalo_sc")).glob("det_*.onnx")))
    except Exception as error:
        raise RuntimeError(f"No SCRFD model could be downloaded ({error}). {GET_SCRFD}") from error


def align(image: Image.Image, points: Sequence[Sequence[float]], size: int = CROP_SIZE) -> Image.Image:
    """Turn, scale and shift a face so that its five points come to lie as near to `FIVE_POINTS` as they can.

    The similarity transform of least squares (Umeyama, 1991). Large faces are smoothed before they are made small.
    What lies beyond the photograph is black, as in insightface's own alignment.

    Args:
        image: The upright RGB picture.
        points: Five (x, y) in its pixels, pixel centres at whole numbers, ordered as `FIVE_POINTS`.
        size: Side of the RGB crop in pixels.

    Raises:
        ValueError: If there are not five points, or they do not differ.

    Example:

    >>> align(Image.new("RGB", (640, 480)), [(300, 200), (340, 200), (320, 225), (305, 245), (335, 245)]).size
    (224, 224)
    """
    source, target = (np.array([complex(x, y) for x, y in p]) + 0.5 + 0.5j for p in (points, FIVE_POINTS))
    spread = source - source.mean()  # with points as complex numbers, the best similarity is one quotient
    if len(source) != 5 or not 0 < (power := (abs(spread) ** 2).sum()) < np.inf:
        raise ValueError(f"The points {list(points)} make no face; give two eyes, nose tip and two mouth corners.")
    turn = complex((spread.conj() * target).sum() / power * (size / CROP_SIZE))
    middle = complex(CROP_SIZE, CROP_SIZE) / 2 - target.mean()
    return _warp(image, turn, complex(source.mean() + middle * (size / CROP_SIZE) / turn), size)


def _warp(image: Image.Image, turn: complex, centre: complex, size: int = CROP_SIZE) -> Image.Image:
    """A square of the picture around a point x + iy (corners at whole numbers), turned and scaled by a factor."""
    small = image.resize([ceil(side * min(1, abs(turn))) for side in image.size], reducing_gap=3)  # or it would alias
    wide, high = small.width / image.width, small.height / image.height
    back, corner = 1 / turn, centre - complex(size, size) / 2 / turn
    across = (back.real * wide, -back.imag * wide, corner.real * wide)
    down = (back.imag * high, back.real * high, corner.imag * high)
    return small.transform((size, size), Image.Transform.AFFINE, across + down, Image.Resampling.BICUBIC)


def _view(image: Image.Image, mode: str, scale: float, border: int, step: int = 1) -> Image.Image:
    """A scaled copy with a black border, each side a multiple of `step`."""
    small = image.convert(mode).resize([max(1, round(side * scale)) for side in image.size], reducing_gap=2)
    view = Image.new(mode, [ceil((side + 2 * border) / step) * step for side in small.size])
    view.paste(small, (border, border))
    return view


@lru_cache(maxsize=4)
def _scrfd(path: str):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such SCRFD model; check the detector's path or AU_LLAVA_SCRFD.")
    try:
        import onnxruntime
        from insightface.model_zoo import get_model

        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3  # it warns at every size other than the exported one
        model = get_model(path, providers=["CPUExecutionProvider"], sess_options=quiet, static_shape_sessions=False)
        if not model.use_kps:
            raise ValueError("it gives no five points")
        return model
    except ImportError as error:
        raise ImportError("SCRFD needs insightface; install it with `pip install insightface`.") from error
    except Exception as error:
        raise ValueError(f"{path}: not an SCRFD model with five points ({error}); give one.") from error


def _find_by_scrfd(image: Image.Image, path: str) -> list[tuple]:
    model, found = _scrfd(path), [np.zeros((0, 15))]
    for side, border in SCRFD_PASSES:
        scale = min(side, max(320, *image.size)) / max(image.size)
        view = _view(image, "RGB", scale, border, step=32)
        boxes, points = model.detect(np.asarray(view)[:, :, ::-1], input_size=view.size)
        places = np.concatenate([boxes[:, :4], points.reshape(-1, 10)], axis=1)
        found.append(np.concatenate([(places - border) / scale, boxes[:, 4:]], axis=1))
    rows = np.concatenate(found)
    rows = rows[model.nms(rows[:, [0, 1, 2, 3, 14]])].tolist()
    return [(row[:4], row[14], list(zip(row[4:14:2], row[5:14:2], strict=True))) for row in rows]


def _windows(grey: Image.Image, most: int, growth: float) -> np.ndarray:
    """Every square `(N, 4)` that the cascade takes for a face, not yet merged."""
    found = _cascade().detect_multi_scale(np.asarray(grey), growth, 1, (24, 24), (most, most), 1, 1)
    return np.array([(w["c"], w["r"], w["c"] + w["width"], w["r"] + w["height"]) for w in found], float).reshape(-1, 4)


@lru_cache(maxsize=1)
def _cascade():
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade

        return Cascade(lbp_frontal_face_cascade_filename())
    except ImportError as error:
        raise ImportError("The cascade needs scikit-image; install it with `pip install scikit-image`.") from error


def _overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of squares `(N, 4)` with one."""
    common = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(0).prod(1)
    return common / ((boxes[:, 2] - boxes[:, 0]) ** 2 + (box[2] - box[0]) ** 2 - common)


def _find_by_cascade(image: Image.Image) -> list[tuple]:
    """Alone the cascade finds a face in every wall. A second look at each find, in its own size, tells them apart."""
    scale = min(1, CASCADE_SIDE / max(image.size))
    border = round(CASCADE_BORDER * scale * max(image.size))
    view = _view(image, "L", scale, border)
    windows, found = _windows(view, min(view.size), 1.2), []
    while len(windows):
        agree = max((_overlap(windows, window) > 0.5 for window in windows), key=np.sum)
        first = windows[agree].mean(0)
        windows = windows[~agree & (_overlap(windows, first) < 0.3)]
        corner, zoom = first[:2] - 0.4 * (first[2] - first[0]), (first[2] - first[0]) / 28  # the face, 28 of 50 pixels
        frame = (*corner, *(corner + 50 * zoom))
        patch = view.transform((50, 50), Image.Transform.EXTENT, frame, Image.Resampling.BILINEAR)
        mirrored = _windows(ImageOps.mirror(patch), 40, 1.06)[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (50, 0, 50, 0)
        second = np.concatenate([_windows(patch, 40, 1.06), mirrored])
        second = second[_overlap(second, np.array([11, 11, 39, 39])) > 0.45]
        if len(second) >= CASCADE_VOTES:
            found.append((len(second), ((second.mean(0) * zoom + np.tile(corner, 2)) - border) / scale))
    faces: list[tuple] = []
    for _, box in sorted(found, key=lambda find: -find[0]):
        middle = (box[:2] + box[2:]) / 2
        if not any(((other[:2] < middle) & (middle < other[2:])).all() for other, *_ in faces):
            faces.append((box, None, None))
    return faces
