"""DISFA (Mavadati et al., 2013) as it is distributed: videos and AU levels, in the three published folds.

Layout:

    ActionUnit_Labels/SN001/SN001_au1.txt             a line `frame,level` for each frame from 1 on, levels 0 to 5
    Videos_LeftCamera/LeftVideoSN001_comp.avi         frame n is the n-th picture
    Videos_RightCamera/RightVideoSN001_comp.avi

Prepare the crops once, straight from the videos, then load a fold:

    python -m au_llava.datasets_scripts.disfa --data_dir /data/DISFA --output_dir data/disfa

>>> from au_llava.datasets_scripts.disfa import Disfa
>>> fold = Disfa(config_name="fold1", crops_dir="data/disfa", task="detection")  # doctest: +SKIP
>>> fold.download_and_prepare(); train = fold.as_dataset("train")  # doctest: +SKIP
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..action_units import PRESETS
from .builder import CropsBuilder, CropsConfig, part_of_fold
from .preparation import preparation_parser, run
from .recordings import Recording, read_frame, read_lines, read_number, settle


# The published groups of subjects, in JAANet's order (six published code bases agree on them).
PARTS = (
    ("SN002", "SN010", "SN001", "SN026", "SN027", "SN032", "SN030", "SN009", "SN016"),
    ("SN013", "SN018", "SN011", "SN028", "SN012", "SN006", "SN031", "SN021", "SN024"),
    ("SN003", "SN029", "SN023", "SN025", "SN008", "SN005", "SN007", "SN017", "SN004"),
)
SUBJECTS = tuple(sorted(subject for part in PARTS for subject in part))
FRAMES = 4845  # of every subject's video
# Labelled frames of each subject in published lists; SN010 lacks one label.
PUBLISHED = {"ME-GraphAU, MDHR and FMAE": dict.fromkeys(SUBJECTS, FRAMES) | {"SN010": 4844}}

# First and last frame, from 1, of stretches where the landmarks that come with DISFA are wrong. JAANet leaves exactly
# these frames out; ME-GraphAU, MDHR and FMAE keep them.
BAD_LANDMARKS = {
    "SN001": ((398, 420), (3190, 3243)),
    "SN002": ((800, 826),),
    "SN004": ((4541, 4555),),
    "SN006": ((1349, 1405),),
    "SN009": ((1736, 1808), (1851, 1885)),
    "SN011": ((4529, 4533), (4830, 4845)),
    "SN021": ((574, 616), (985, 1164), (1190, 1205), (1305, 1338), (1665, 1710), (1862, 2477), (2554, 4657),
              (4710, 4722)),
    "SN023": ((1021, 1049), (3378, 3557), (3584, 3668), (4547, 4621), (4741, 4772), (4825, 4845)),
    "SN025": ((4596, 4662), (4816, 4835)),
    "SN027": ((3461, 3494), (4738, 4785)),
    "SN028": ((1875, 1885), (4571, 4690)),
    "SN029": ((4090, 4543),),
    "SN030": ((939, 962), (1406, 1422), (2100, 2132), (2893, 2955)),
}  # fmt: skip


def read_levels(path: Path, problems: list[str]) -> dict[int, float]:
    """Read the label file of one subject and one AU.

    Args:
        path (`Path`): The text file.
        problems (`list[str]`): Gets a line for everything that is wrong; such frames are left out.

    Returns:
        `dict[int, float]`: Levels 0 to 5 by frame number.
    """
    levels: dict[int, float] = {}
    for line, cells in read_lines(path, problems):
        try:
            if len(cells) != 2:
                raise ValueError(f"{len(cells)} cells; frame and level are needed")
            number = read_frame(cells[0])
            if number > FRAMES:
                raise ValueError(f"frame {number} is beyond the {FRAMES} of DISFA's videos")
            if number in levels:
                raise ValueError(f"frame {number} stands there twice")
            levels[number] = read_number(cells[1], (0, 1, 2, 3, 4, 5))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    return levels


def has_bad_landmarks(subject: str, frame: int) -> bool:
    """Whether a frame, counted from 1, lies in one of the stretches of [`BAD_LANDMARKS`].

    >>> has_bad_landmarks("SN002", 800), has_bad_landmarks("SN002", 827)
    (True, False)
    """
    return any(first <= frame <= last for first, last in BAD_LANDMARKS.get(subject, ()))


def find_recordings(data_dir: str | Path, camera: str = "left", skip_bad_labels: bool = False) -> list[Recording]:
    """Read all labels of DISFA and find the videos.

    Args:
        data_dir (`str` or `Path`): The folder as distributed, with `ActionUnit_Labels` and the video folders in it.
        camera (`str`, *optional*, defaults to `"left"`): `left` (JAANet, ME-GraphAU) or `right` (FMAE).
        skip_bad_labels (`bool`, *optional*, defaults to `False`): Leave damaged labels out: they are unknown.

    Raises:
        FileNotFoundError: There are no label files.
        ValueError: A label is damaged, or the camera is neither `left` nor `right`.
    """
    root, problems, found = Path(data_dir), [], []
    if camera not in ("left", "right"):
        raise ValueError(f"Unknown camera {camera!r}; give 'left' or 'right'.")
    labels = root / "ActionUnit_Labels"
    folders = {path.name.upper(): path for path in labels.glob("*/")}
    subjects = [subject for subject in SUBJECTS if subject in folders]
    if not subjects:
        raise FileNotFoundError(f"{labels}: no folders like SN001; give the folder of DISFA as distributed.")
    videos = _videos(root, camera)
    for subject in subjects:
        files = {path.name.lower(): path for path in folders[subject].iterdir()}
        columns = []
        for code in PRESETS["disfa"]:
            name = f"{subject}_au{code.removeprefix('AU')}.txt"
            columns.append(read_levels(files.get(name.lower(), folders[subject] / name), problems))
        labelled = sorted(set().union(*columns))
        gaps = sorted(set(range(1, max(labelled, default=0))) - set(labelled))
        left_out = [(number, "no label") for number in gaps]
        films = videos[subject]
        if len(films) != 1:
            why = f"{len(films)} videos: {', '.join(map(str, films))}" if films else f"no video of the {camera} camera"
            left_out += [(number, why) for number in labelled]
            labelled, films = [], [None]
        values = np.array([[column.get(number, np.nan) for column in columns] for number in labelled])
        found.append(
            Recording(
                "disfa", "intensity_level", PRESETS["disfa"], subject, subject, tuple(labelled),
                values.reshape(-1, len(columns)), video=films[0], camera=camera, left_out=tuple(left_out),
            )
        )  # fmt: skip
    settle(problems, skip_bad_labels)
    return found


def _videos(root: Path, camera: str) -> dict[str, list[Path]]:
    """The camera's videos of each subject; names are spelt with capitals here and there."""
    name, found = re.compile(rf"{camera}video(SN\d{{3}})_comp\.avi", re.IGNORECASE), defaultdict(list)
    for path in sorted(root.glob("*/*")):
        if match := name.fullmatch(path.name):
            found[match.group(1).upper()].append(path)
    return found


@dataclass
class DisfaConfig(CropsConfig):
    """Options of [`Disfa`], beside those of [`CropsConfig`].

    Args:
        task (`str`, *optional*, defaults to `"intensity_level"`): Or `detection`: levels from `threshold` on are
            present.
        threshold (`int`, *optional*, defaults to 2): The literature's. The paper's text says "above 2", which is 3.
        camera (`str`, *optional*, defaults to `"left"`): Or `right`. Without `data_dir` it means nothing.
        drop_bad_landmarks (`bool`, *optional*, defaults to `False`): Leave out the frames in [`BAD_LANDMARKS`].
        naming (`str`, *optional*, defaults to `"jaanet"`): What `fold1` tests: JAANet's part 1, or with `megraphau`
            (ME-GraphAU, MDHR) JAANet's part 3. `fold2` tests part 2 in both.
    """

    task: str = "intensity_level"
    threshold: int = 2
    camera: str = "left"
    drop_bad_landmarks: bool = False
    naming: str = "jaanet"

    def recordings(self) -> list[Recording]:
        return find_recordings(self.data_dir, self.camera, self.skip_bad_labels)


class Disfa(CropsBuilder):
    """DISFA in three folds of subjects: `fold1`, `fold2` and `fold3`, each with the splits `train` and `test`."""

    BUILDER_CONFIG_CLASS = DisfaConfig
    DATASET = "disfa"
    BUILDER_CONFIGS = [DisfaConfig(name=f"fold{fold}") for fold in (1, 2, 3)]

    def split_of(self, row: dict) -> str | None:
        if self.config.drop_bad_landmarks and has_bad_landmarks(row["subject"], row["frame"]):
            return None
        tested = PARTS[part_of_fold(self.config.name, self.config.naming)]
        return "test" if row["subject"] in tested else "train"

    def labels_of(self, row: dict) -> tuple[dict[str, float], str]:
        levels, task = super().labels_of(row)
        threshold = self.config.threshold
        if threshold not in (1, 2, 3, 4, 5):
            raise ValueError(f"threshold is {threshold!r}; give the level, 1 to 5, from which on a unit is present.")
        if self.config.task == "intensity_level":
            if threshold != 2:
                raise ValueError(f"threshold={threshold} says what is present; give task=detection with it.")
            return levels, task
        # A comparison would make an unknown level absent, so NaN passes as it is.
        return {c: v if np.isnan(v) else float(v >= threshold) for c, v in levels.items()}, "detection"


def main(arguments: list[str] | None = None) -> None:
    parser = preparation_parser("Detect, align and crop the faces of DISFA.")
    parser.add_argument("--camera", choices=("left", "right"), default="left")
    chosen = parser.parse_args(arguments)
    run(find_recordings(chosen.data_dir, chosen.camera, chosen.skip_bad_labels), chosen, PUBLISHED)


if __name__ == "__main__":
    main()
