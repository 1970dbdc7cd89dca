"""BP4D (Zhang et al., 2014) as it is distributed: frame folders and AU codes, in the three published folds.

Layout:

    AUCoding/AU_OCC/F001_T1.csv               header row; frame number, a column for each AU: 0, 1, 9 = unknown
    AUCoding/AU_INT/AU06/F001_T1_AU06.csv     frame number, level 0 to 5 or 9; for AUs 6, 10, 12, 14 and 17
    Sequences(2D+3D)/F001/T1/0643.jpg         three or four digits, or no padding at all

Prepare the crops once, then load a fold:

    python -m au_llava.datasets_scripts.bp4d --data_dir /data/BP4D --output_dir data/bp4d

>>> from au_llava.datasets_scripts.bp4d import Bp4d
>>> fold = Bp4d(config_name="fold1", crops_dir="data/bp4d")  # doctest: +SKIP
>>> fold.download_and_prepare(); train = fold.as_dataset("train")  # doctest: +SKIP
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..action_units import PRESETS
from .builder import CropsBuilder, CropsConfig, part_of_fold
from .preparation import preparation_parser, run
from .recordings import Recording, read_frame, read_lines, read_number, settle, with_images


# The published groups of subjects, in JAANet's order (JAANet's, ME-GraphAU's, MDHR's and FMAE's lists agree on them).
PARTS = (
    ("F001", "M007", "F018", "F008", "F002", "M004", "F010", "F009", "M012", "M001", "F016", "M014", "F023", "M008"),
    ("M011", "F003", "M010", "M002", "F005", "F022", "M018", "M017", "F013", "M016", "F020", "F011", "M013", "M005"),
    ("F007", "F015", "F006", "F019", "M006", "M009", "F012", "M003", "F004", "F021", "F017", "M015", "F014"),
)
SUBJECTS = tuple(sorted(subject for part in PARTS for subject in part))
INTENSITY_UNITS = ("AU6", "AU10", "AU12", "AU14", "AU17")

_FRAMES = (
    3934, 3937, 3700, 3737, 3915, 3576, 3573, 3695, 3297, 3266, 3732, 3543, 3434, 3490, 3451, 3510, 3823, 3525, 3489,
    3646, 3447, 3593, 3726, 4153, 3833, 3379, 3521, 3271, 3572, 3684, 3291, 3290, 3298, 3469, 3609, 3613, 3483, 3664,
    3648, 3542, 3488,
)  # fmt: skip
# Labelled frames of each subject in published lists.
PUBLISHED = {"ME-GraphAU, MDHR and FMAE": dict(zip(SUBJECTS, _FRAMES, strict=True))}
PUBLISHED["JAANet"] = PUBLISHED["ME-GraphAU, MDHR and FMAE"] | {
    "F017": 3692, "F021": 3442, "F023": 3696, "M003": 3301, "M009": 3279, "M010": 3282,
}  # fmt: skip


def read_occurrence(path: Path, problems: list[str]) -> tuple[list[int], np.ndarray]:
    """Read one csv of `AU_OCC`.

    Columns are found by the header's AU numbers; without a header a column's position is its AU number.

    Args:
        path (`Path`): The csv file.
        problems (`list[str]`): Gets a line for everything that is wrong; frames with a wrong value are unknown.

    Returns:
        `tuple`: Frame numbers, and labels `(frames, 12)`: 0, 1, or NaN for code 9, in the order of the preset `bp4d`.
    """
    lines = read_lines(path, problems)
    wanted = [code.removeprefix("AU") for code in PRESETS["bp4d"]]
    if not lines:
        return [], np.empty((0, len(wanted)))
    header = [cell.upper().removeprefix("AU") for cell in lines[0][1]]
    if set(wanted) <= set(header):
        columns, lines = [header.index(au) for au in wanted], lines[1:]
    elif set(header[1:]) <= {"0", "1", "9"} and len(header) > int(wanted[-1]):
        columns = [int(au) for au in wanted]
    else:
        absent = ", ".join(au for au in wanted if au not in header)
        problems.append(f"{path}:{lines[0][0]}: no column for AU {absent}")
        return [], np.empty((0, len(wanted)))
    return _read_frames(path, lines, columns, (0, 1, 9), problems)


def read_intensity(path: Path, problems: list[str]) -> tuple[list[int], np.ndarray]:
    """Read one csv of `AU_INT`: frame number and level; see [`read_occurrence`].

    A first line that begins with a letter is a header row; there need not be one.

    Returns:
        `tuple`: Frame numbers, and levels `(frames, 1)`: 0 to 5, or NaN for code 9.
    """
    lines = read_lines(path, problems)
    if lines and lines[0][1][0][:1].isalpha():
        lines = lines[1:]
    return _read_frames(path, lines, [1], (0, 1, 2, 3, 4, 5, 9), problems)


def _read_frames(path, lines, columns: list[int], accepted, problems: list[str]) -> tuple[list[int], np.ndarray]:
    rows: dict[int, list[float]] = {}
    for line, cells in lines:
        try:
            number = read_frame(cells[0])
            if number in rows:
                raise ValueError(f"frame {number} stands there twice")
            rows[number] = [np.nan] * len(columns)  # all that a damaged line tells; so the manifest names its frame
            if len(cells) <= max(columns):
                raise ValueError(f"{len(cells)} cells; {max(columns) + 1} are needed")
            rows[number] = [read_number(cells[column], accepted) for column in columns]
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    return list(rows), np.array(list(rows.values())).reshape(len(rows), len(columns))


def find_recordings(data_dir: str | Path, task: str = "detection", skip_bad_labels: bool = False) -> list[Recording]:
    """Read all labels of BP4D and find their pictures.

    Args:
        data_dir (`str` or `Path`): The folder as distributed, with `AUCoding` and `Sequences(2D+3D)` in it.
        task (`str`, *optional*): `detection` (12 AUs of `AU_OCC`) or `intensity_level` (5 AUs of `AU_INT`).
        skip_bad_labels (`bool`, *optional*, defaults to `False`): Leave frames with damaged labels out.

    Raises:
        FileNotFoundError: There is no such folder in `data_dir`.
        ValueError: A label is damaged, or the task is not one of the two.
    """
    root, problems, found = Path(data_dir), [], []
    if task not in ("detection", "intensity_level"):
        raise ValueError(f"BP4D has no labels for task {task!r}; give 'detection' or 'intensity_level'.")
    labels = _folder(root, "AUCoding/AU_OCC", "AU_OCC")
    pictures = _folder(root, "Sequences(2D+3D)", "Sequences")
    for path in sorted(labels.iterdir()):
        match = re.fullmatch(r"([FM]\d{3})_(T[1-8])\.csv", path.name, re.IGNORECASE)
        if not match:
            continue
        subject, session = match.group(1).upper(), match.group(2).upper()
        if subject not in SUBJECTS:
            problems.append(f"{path}: {subject} is none of BP4D's 41 subjects")
            continue
        if task == "detection":
            units = PRESETS["bp4d"]
            numbers, values = read_occurrence(path, problems)
        else:
            units = INTENSITY_UNITS
            numbers, values = _read_intensities(labels.parent / "AU_INT", f"{subject}_{session}", problems)
        images, missing = with_images(numbers, pictures / subject / session)
        kept = [position for position, number in enumerate(numbers) if number in images]
        found.append(
            Recording(
                "bp4d", task, units, subject, f"{subject}_{session}",
                tuple(numbers[position] for position in kept), values[kept],
                images=tuple(images[numbers[position]] for position in kept), left_out=tuple(missing.items()),
            )
        )  # fmt: skip
    if not found:
        raise FileNotFoundError(f"{labels}: no files like F001_T1.csv; give the folder of BP4D as distributed.")
    settle(problems, skip_bad_labels)
    return found


def _read_intensities(folder: Path, sequence: str, problems: list[str]) -> tuple[list[int], np.ndarray]:
    """Levels `(frames, 5)` of one sequence; a frame that is absent for some AU is unknown there."""
    columns = []
    for unit in INTENSITY_UNITS:
        name = f"AU{int(unit[2:]):02d}"
        numbers, levels = read_intensity(folder / name / f"{sequence}_{name}.csv", problems)
        columns.append(dict(zip(numbers, levels[:, 0].tolist(), strict=True)))
    numbers = sorted(set().union(*columns))
    return numbers, np.array([[column.get(number, np.nan) for column in columns] for number in numbers]).reshape(-1, 5)


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root}: no folder {names[0]}; give the folder of BP4D as distributed.")


@dataclass
class Bp4dConfig(CropsConfig):
    """Options of [`Bp4d`], beside those of [`CropsConfig`].

    Args:
        task (`str`, *optional*, defaults to `"detection"`): Or `intensity_level`, for five AUs.
        naming (`str`, *optional*, defaults to `"jaanet"`): What `fold1` tests: JAANet's part 1, or with `megraphau`
            (ME-GraphAU, MDHR) JAANet's part 3. `fold2` tests part 2 in both.
    """

    task: str = "detection"
    naming: str = "jaanet"

    def recordings(self) -> list[Recording]:
        return find_recordings(self.data_dir, self.task, self.skip_bad_labels)


class Bp4d(CropsBuilder):
    """BP4D in three folds of subjects: `fold1`, `fold2` and `fold3`, each with the splits `train` and `test`."""

    BUILDER_CONFIG_CLASS = Bp4dConfig
    DATASET = "bp4d"
    BUILDER_CONFIGS = [Bp4dConfig(name=f"fold{fold}") for fold in (1, 2, 3)]

    def split_of(self, row: dict) -> str:
        tested = PARTS[part_of_fold(self.config.name, self.config.naming)]
        return "test" if row["subject"] in tested else "train"


def main(arguments: list[str] | None = None) -> None:
    parser = preparation_parser("Detect, align and crop the faces of BP4D.")
    parser.add_argument("--task", choices=("detection", "intensity_level"), default="detection")
    chosen = parser.parse_args(arguments)
    run(find_recordings(chosen.data_dir, chosen.task, chosen.skip_bad_labels), chosen, PUBLISHED)


if __name__ == "__main__":
    main()
