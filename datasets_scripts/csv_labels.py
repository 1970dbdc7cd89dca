"""Your own pictures: a csv of image paths and Action Unit labels becomes the same rows as the published data sets.

    image,subject,AU1,AU12
    faces/anna_1.jpg,anna,0,1
    faces/ben_7.jpg,ben,1,

`image` is relative to the csv. An empty cell means unknown. `subject`, `sequence`, `frame` and `split` (`train` or
`test`) are optional; without `split`, a fifth of the subjects is tested. Without `subject` each sequence counts as
one, without `sequence` each picture.

>>> from au_llava.datasets_scripts.csv_labels import CsvLabels
>>> data = CsvLabels(data_dir="my_labels.csv", task="detection", crops_dir="data/mine")  # doctest: +SKIP
>>> data.download_and_prepare(); train = data.as_dataset("train")  # doctest: +SKIP
"""

import hashlib
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..action_units import CATALOGUE, get_task
from .builder import CropsBuilder, CropsConfig
from .feafa import in_random_test
from .preparation import digest, preparation_parser, run
from .recordings import Recording, read_frame, read_lines, settle


COLUMNS = ("image", "subject", "sequence", "frame", "split")


def read_csv(path: Path, task: str, problems: list[str]) -> tuple[list[str], list[dict]]:
    """Read the csv.

    Args:
        path (`Path`): The csv file.
        task (`str`): `detection`, `intensity_level` or `intensity`.
        problems (`list[str]`): Gets a line for everything that is wrong; such lines are left out.

    Returns:
        `tuple`: The codes of the label columns, and for each line `line` (its number), `image`, `subject`, `sequence`,
        `frame`, `split` and `labels`, a list of values with NaN for unknown. Where two people have a sequence of one
        name, the person's name goes before it.
    """
    before = len(problems)
    lines = read_lines(path, problems)
    if len(problems) > before:
        return [], []
    header = lines[0][1]
    codes = [name for name in header if name not in COLUMNS]
    strange = [name for name in codes if name not in CATALOGUE]
    if "image" not in header or not codes or strange or len(set(header)) < len(header):
        others = f"; leave out {', '.join(map(repr, strange))}" if strange and "image" in header else ""
        problems.append(
            f"{path}:1: the header {header} needs `image` and columns named like AU12 or FEAFA12, each once, "
            f"with commas between them; {', '.join(COLUMNS[1:])} may be there, too{others}"
        )
        return codes, []
    rows, places = [], {}
    for number, cells in lines[1:]:
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells; the header has {len(header)}")
            row = dict(zip(header, cells, strict=True))
            if row.get("split", "train") not in ("train", "test"):
                raise ValueError(f"split {row['split']!r} is neither 'train' nor 'test'")
            if not row["image"]:
                raise ValueError("the cell of `image` is empty; give the picture's path")
            subject = row.get("subject") or row.get("sequence") or row["image"]
            image = path.parent / row["image"]
            read = {
                "line": number,
                "image": image,
                "subject": subject,
                "sequence": row.get("sequence") or subject,
                "frame": read_frame(row["frame"]) if row.get("frame") else number - 1,
                "split": row.get("split"),
                "labels": [_value(row[code], task) for code in codes],
            }
            first = places.setdefault(os.path.abspath(image), number)  # of those that could be read
            if first != number:
                raise ValueError(f"{row['image']} stands in line {first}, too; give each picture once")
            rows.append(read)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if "split" not in header:
        tested = _tested({row["subject"] for row in rows})
        rows = [row | {"split": "test" if row["subject"] in tested else "train"} for row in rows]
    # Recordings of two people may have one name, such as T1; crops are kept by it.
    owners = defaultdict(set)
    for row in rows:
        owners[row["sequence"]].add(row["subject"])
    for row in rows:
        if len(owners[row["sequence"]]) > 1:
            row["sequence"] = f"{row['subject']}/{row['sequence']}"
    return codes, rows


def _tested(people: set[str]) -> set[str]:
    """About a fifth, one at least and never all; each is drawn by its name alone, and so alike in every csv."""
    order = sorted(people, key=lambda name: hashlib.sha256(f"0/{name}/0".encode()).digest())
    count = sum(in_random_test(name, 0) for name in people)
    return set(order[: min(max(count, 1), len(people) - 1)])


def _value(cell: str, task: str) -> float:
    if not cell:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not get_task(task).takes(value):
        raise ValueError(
            f"{cell!r} is no value of {task}: {get_task(task).answer}; leave the cell empty where it is unknown"
        )
    return value


def find_recordings(csv: str | Path, task: str = "detection", skip_bad_labels: bool = False) -> list[Recording]:
    """Read the csv and group its pictures by sequence.

    Raises:
        ValueError: The task is unknown, something in the csv is wrong, or it lists no picture.
    """
    problems: list[str] = []
    get_task(task)
    codes, rows = read_csv(Path(csv), task, problems)
    groups: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        group = groups[row["subject"], row["sequence"]]
        if row["frame"] in group:
            problems.append(f"{csv}:{row['line']}: frame {row['frame']} of {row['sequence']} stands there twice")
        group.setdefault(row["frame"], row)
        splits[row["subject"]].add(row["split"])
    both = [name for name, own in splits.items() if len(own) > 1]
    if both:  # nothing that could be left out
        raise ValueError(
            f"{csv}: {', '.join(both[:5])} in the splits train and test; a person in both would be known to the model "
            "that is tested. Mend the column split, or leave it out: then people are divided."
        )
    settle(problems, skip_bad_labels)
    if not rows:
        raise ValueError(f"{csv}: no line below the header can be used; give a line for each picture.")
    found = []
    for (subject, sequence), group in groups.items():
        # Path.exists raises where a name is too long for any file.
        kept = {frame: row for frame, row in group.items() if os.path.exists(row["image"])}
        missing = tuple((frame, f"no file {row['image']}") for frame, row in group.items() if frame not in kept)
        labels = np.array([row["labels"] for row in kept.values()]).reshape(-1, len(codes))
        images = tuple(row["image"] for row in kept.values())
        found.append(
            Recording("own", task, tuple(codes), subject, sequence, tuple(kept), labels, images, left_out=missing)
        )
    return found


@dataclass
class CsvConfig(CropsConfig):
    """Options of [`CsvLabels`], beside those of [`CropsConfig`]. Here `data_dir` is the csv file, and must be given.

    Args:
        task (`str`, *optional*, defaults to `"detection"`): What the labels answer.
    """

    task: str = "detection"

    def recordings(self) -> list[Recording]:
        return find_recordings(self.data_dir, self.task, self.skip_bad_labels)

    @cached_property
    def splits(self) -> dict[tuple[str, int], str]:
        """The split of each picture, by sequence and frame."""
        rows = read_csv(Path(self.data_dir), self.task, [])[1]
        return {(row["sequence"], row["frame"]): row["split"] for row in rows}

    def _crops(self) -> str:
        # The crops are the same whatever their splits; the rows are not.
        return digest([super()._crops(), sorted((*place, split) for place, split in self.splits.items())])


class CsvLabels(CropsBuilder):
    """Pictures and labels of your own."""

    BUILDER_CONFIG_CLASS = CsvConfig
    DATASET = "own"
    BUILDER_CONFIGS = [CsvConfig(name="default")]

    def split_of(self, row: dict) -> str:
        return self.config.splits[row["sequence"], row["frame"]]


def main(arguments: list[str] | None = None) -> None:
    parser = preparation_parser("Detect, align and crop the faces that a csv lists; give the csv as --data_dir.")
    parser.add_argument("--task", default="detection", help="detection, intensity_level or intensity")
    chosen = parser.parse_args(arguments)
    run(find_recordings(chosen.data_dir, chosen.task, chosen.skip_bad_labels), chosen, {})


if __name__ == "__main__":
    main()
