"""FEAFA (Yan et al., 2019) and FEAFA+ (Gan et al., 2022): 24 continuous intensities a frame.

Layout: `PV001.output/00000012.auw` holds one line of 24 numbers from 0 to 1; the picture has the same number and lies
beside it or anywhere else below a folder whose name holds `PV001`. Part B, `SN001.output`, is DISFA labelled anew.

Prepare the crops once, then load a split:

    python -m au_llava.datasets_scripts.feafa --data_dir /data/FEAFA --output_dir data/feafa

>>> from au_llava.datasets_scripts.feafa import Feafa
>>> data = Feafa(config_name="subject", crops_dir="data/feafa", fold=1)  # doctest: +SKIP
>>> data.download_and_prepare(); train = data.as_dataset("train")  # doctest: +SKIP
"""

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..action_units import PRESETS
from ..inputs import tell_unread
from . import disfa
from .builder import CropsBuilder, CropsConfig
from .preparation import preparation_parser, run
from .recordings import PICTURES, Recording, read_lines, settle


# Groups of videos of part A that a public tool (farapy) keeps apart; its own fold 1 tests the last group. There is no
# official split by person. A person may appear in two videos: 127 videos show 122 people.
_VIDEOS = (
    (8, 9, 10, 11, 13, 19, 20, 24, 29, 30, 31, 33, 39, 40, 46, 53, 54, 55, 59, 60, 62, 76, 78, 82, 89, 100, 101, 102,
     103, 107, 109, 110, 114, 115, 116, 117, 119, 120, 122, 123, 124, 125),
    (3, 4, 5, 7, 12, 14, 15, 16, 18, 21, 22, 23, 25, 32, 37, 41, 44, 45, 50, 51, 52, 57, 67, 68, 70, 71, 72, 74, 80,
     85, 86, 87, 88, 90, 91, 94, 95, 97, 98, 111, 126, 127),
    (1, 2, 6, 17, 26, 27, 28, 34, 35, 36, 38, 42, 43, 47, 48, 49, 56, 58, 61, 63, 64, 65, 66, 69, 73, 75, 77, 79, 81,
     83, 84, 92, 93, 96, 99, 104, 105, 106, 108, 112, 113, 118, 121),
)  # fmt: skip
# What each fold of `subject` tests: videos of part A, and in part B the people of DISFA's fold of the same number.
PARTS = tuple(
    tuple(f"PV{number:03d}" for number in videos) + people
    for videos, people in zip(_VIDEOS, disfa.PARTS, strict=True)
)  # fmt: skip

PUBLISHED = {"PV": 99_356, "SN": 130_828}  # frames of part A and of part B
SOURCES = {"A": ("PV",), "B": ("SN",), "AB": ("PV", "SN")}
TOLERANCE = 1e-6  # what rounding to single precision may add to 0 or 1


def read_auw(path: Path, problems: list[str]) -> np.ndarray | None:
    """Read one label file.

    Args:
        path (`Path`): The `.auw` file.
        problems (`list[str]`): Gets a line if something is wrong.

    Returns:
        `np.ndarray` of shape `(24,)`: Intensities from 0 to 1 in the order of the preset `feafa`; or `None`.
    """
    before = len(problems)
    lines = read_lines(path, problems, separator=None)
    if len(problems) > before:
        return None
    try:
        if len(lines) != 1 or len(lines[0][1]) != len(PRESETS["feafa"]):
            raise ValueError(f"{[len(cells) for _, cells in lines]} numbers by line; one line of 24 is needed")
        values = np.array([float(cell) for cell in lines[0][1]])
        wrong = values[~((values >= -TOLERANCE) & (values <= 1 + TOLERANCE))]  # catches NaN as well
        if wrong.size:
            raise ValueError(f"{wrong[0]:g} is not in 0 to 1")
        return values.clip(0, 1)
    except ValueError as error:
        problems.append(f"{path}:{lines[0][0]}: {error}")
        return None


def find_recordings(data_dir: str | Path, part: str = "A", skip_bad_labels: bool = False) -> list[Recording]:
    """Read all labels of FEAFA and pair them with pictures by sequence and number.

    Args:
        data_dir (`str` or `Path`): The folder that holds all of it, searched to any depth, or that of one video.
        part (`str`, *optional*, defaults to `"A"`): `A`, `B` (DISFA labelled anew) or `AB`.
        skip_bad_labels (`bool`, *optional*, defaults to `False`): Leave frames with damaged labels out.

    Raises:
        FileNotFoundError: There are no `.auw` files of this part.
        ValueError: A label is damaged, or the part is none of the three.
    """
    sources = _sources(part)
    labels, pictures = _files(Path(data_dir), sources)
    if not labels:
        raise FileNotFoundError(f"{data_dir}: no .auw files in folders like {sources[0]}001.output.")
    known = {subject for group in PARTS for subject in group}
    problems = [f"{data_dir}: {name} is no sequence of FEAFA+" for name in sorted(set(labels) - known)]
    names = sorted(known & (labels.keys() | pictures.keys()))  # of a video without any label, too, it is told
    found = [_recording(name, labels[name], pictures[name], problems) for name in names]
    settle(problems, skip_bad_labels)
    return found


def _sources(part: str) -> tuple[str, ...]:
    """How the names of a part's sequences begin."""
    if part not in SOURCES:
        raise ValueError(f"Unknown part {part!r} of FEAFA+; accepted: {', '.join(SOURCES)}.")
    return SOURCES[part]


def _files(root: Path, sources: tuple[str, ...]) -> tuple[dict, dict]:
    """Label files and pictures, each a list, by sequence and then by number."""
    labels: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    pictures: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    home, read = root.absolute().parent, set()
    for folder, folders, names in os.walk(root, onerror=tell_unread, followlinks=True):
        sequences = re.findall(r"(?:PV|SN)\d{3}", str(Path(folder).absolute().relative_to(home)).upper())
        place = (os.path.realpath(folder), *sequences[-1:])
        if place in read:  # a link leads here as well, perhaps one from within
            folders.clear()
            continue
        read.add(place)
        folders.sort()
        if sequences and sequences[-1].startswith(sources):
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                kind = labels if suffix.lower() == ".auw" else pictures if suffix.lower() in PICTURES else None
                if kind is not None and stem.isdecimal():  # the authors' `_crop` pictures are passed over
                    kind[sequences[-1]][int(stem)].append(Path(folder, name))
    return labels, pictures


def _recording(name: str, labels: dict, pictures: dict, problems: list[str]) -> Recording:
    rows, images, left_out = {}, {}, {number: "no label" for number in pictures if number not in labels}
    for number, files in sorted(labels.items()):
        if len(files) > 1:
            problems.append(f"{files[1]}: a second label file for the frame of {files[0]}")
            continue
        values = read_auw(files[0], problems)
        here = [path for path in pictures.get(number, ()) if path.parent == files[0].parent]
        choice = here or pictures.get(number, ())  # beside the label first
        if values is None:
            left_out[number] = "damaged label"
        elif len(choice) != 1:
            left_out[number] = f"{len(choice)} pictures: {', '.join(map(str, choice))}" if choice else "no picture"
        else:
            rows[number], images[number] = values, choice[0]
    return Recording(
        "feafa", "intensity", PRESETS["feafa"], name, name, tuple(rows), np.array(list(rows.values())).reshape(-1, 24),
        images=tuple(images.values()), left_out=tuple(sorted(left_out.items())),
    )  # fmt: skip


def in_random_test(sequence: str, frame: int, seed: int = 0) -> bool:
    """Whether the paper's random split, 4 frames to train on for 1 to test on, tests a frame.

    Each frame is drawn by itself from a hash, so that a missing frame does not move the others.

    >>> sum(in_random_test("PV001", frame) for frame in range(10_000))
    2065
    """
    drawn = hashlib.sha256(f"{seed}/{sequence}/{frame}".encode()).digest()
    return int.from_bytes(drawn[:8]) < 2**64 / 5


@dataclass
class FeafaConfig(CropsConfig):
    """Options of [`Feafa`], beside those of [`CropsConfig`].

    Args:
        part (`str`, *optional*, defaults to `"A"`): `A`, `B` (DISFA labelled anew) or `AB`.
        fold (`int`, *optional*, defaults to 1): Which of the three groups `subject` tests.
        seed (`int`, *optional*, defaults to 0): Seed of the random split `paper`.
    """

    task: str = "intensity"
    part: str = "A"
    fold: int = 1
    seed: int = 0

    def recordings(self) -> list[Recording]:
        return find_recordings(self.data_dir, self.part, self.skip_bad_labels)


class Feafa(CropsBuilder):
    """FEAFA, split as `paper` (random 4:1) or as `subject` (no video, in part B no person, in both splits).

    Neighbouring frames of a video look the same, so `paper` puts nearly the same pictures into both splits. It exists
    to compare with the paper; judge a model by `subject`.
    """

    BUILDER_CONFIG_CLASS = FeafaConfig
    DATASET = "feafa"
    BUILDER_CONFIGS = [FeafaConfig(name="paper"), FeafaConfig(name="subject")]

    def split_of(self, row: dict) -> str | None:
        if not row["subject"].startswith(_sources(self.config.part)):
            return None
        if self.config.fold not in (1, 2, 3):
            raise ValueError(f"FEAFA has no fold {self.config.fold}; give 1, 2 or 3.")
        if self.config.name == "paper":
            tested = in_random_test(row["sequence"], row["frame"], self.config.seed)
        else:
            tested = row["subject"] in PARTS[self.config.fold - 1]
        return "test" if tested else "train"


def main(arguments: list[str] | None = None) -> None:
    parser = preparation_parser("Detect, align and crop the faces of FEAFA or FEAFA+.")
    parser.add_argument("--part", choices=tuple(SOURCES), default="A")
    chosen = parser.parse_args(arguments)
    published = {"FEAFA+": {source: PUBLISHED[source] for source in SOURCES[chosen.part]}}
    run(find_recordings(chosen.data_dir, chosen.part, chosen.skip_bad_labels), chosen, published)


if __name__ == "__main__":
    main()
