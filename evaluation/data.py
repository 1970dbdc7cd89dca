"""What is asked of a model on each data set, and the rows it is asked about."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from au_llava.action_units import PRESETS
from au_llava.datasets_scripts.synthetic_faces.expression import FACS_CODES


SYNTHETIC_SAMPLE = Path(__file__).resolve().parent.parent / "datasets_scripts" / "synthetic_faces" / "sample"
# For each data set: the task, and the Action Units that its published results are about.
QUESTIONS = {
    "synthetic": (("detection", "bp4d"), ("intensity_level", "disfa"), ("intensity", "feafa")),
    "bp4d": (("detection", "bp4d"),),
    "disfa": (("detection", "disfa8"), ("intensity_level", "disfa")),
    "feafa": (("intensity", "feafa"),),
}


@dataclass
class EvaluationSet:
    """Pictures and labels that a model is scored on.

    Args:
        name (`str`): `synthetic`, `bp4d`, `disfa` or `feafa`.
        images (`datasets.Dataset`): One column of aligned face crops, decoded when read.
        samples (`list[str]`): A name for each picture, the same on every machine.
        subjects (`list[str]`): Who is in it; intervals resample these.
        folds (`list[int]`): The test fold that each picture belongs to, from 1; 0 where the set has one test split.
        labels (`dict`): task to array `(samples, units)`, NaN where unknown, in the order of `QUESTIONS`.
        groups (`list[dict[str, str]]`): What else is known of each picture, such as the apparent skin tone.
    """

    name: str
    images: datasets.Dataset
    samples: list[str]
    subjects: list[str]
    folds: list[int]
    labels: dict[str, np.ndarray]
    groups: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.samples)

    def pictures(self, rows: list[int]) -> list[Image.Image]:
        """Some of the face crops."""
        (column,) = self.images.column_names
        return [item[0] if isinstance(item, list) else item for item in self.images[rows][column]]

    def fingerprint(self) -> str:
        """The same for the same pictures and labels, and else another."""
        digest = hashlib.sha256("\n".join([self.name, *self.samples]).encode())
        for labels in self.labels.values():
            digest.update(labels.tobytes())
        for file in self.images.cache_files:  # the folder is named after the content of the data files
            digest.update(Path(file["filename"]).parent.name.encode())
        return digest.hexdigest()

    def action_units(self, task: str) -> list[str]:
        """Codes of the units that `task` asks about here."""
        return list(PRESETS[dict(QUESTIONS[self.name])[task]])


def read_shards(data_dir: str | Path, split: str | None = None, limit: int | None = None) -> datasets.Dataset:
    """Parquet shards of a folder as one data set that is read from disk, not held in memory.

    Args:
        data_dir: A folder of `*.parquet` files, or with one folder a split, or with the split in the files' names.
        split (`str`, *optional*): Take `data_dir/split/*.parquet`, else `data_dir/split-*.parquet`, else all files.
        limit (`int`, *optional*): Only the first so many rows.

    Raises:
        FileNotFoundError: The folder has no Parquet files.
    """
    folder = Path(data_dir)
    files = sorted(folder.glob(f"{split}/*.parquet")) or sorted(folder.glob(f"{split}-*.parquet"))
    files = files or sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"No Parquet files in {folder}; name a folder of prepared shards with --data_dir.")
    rows = datasets.Dataset.from_parquet([str(file) for file in files])
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def read_synthetic(data_dir: str | Path = SYNTHETIC_SAMPLE, split: str = "test", limit: int | None = None):
    """The rendered faces: all three tasks from one set of muscle activations.

    A shard has the columns that `datasets_scripts/synthetic_faces/writer.py` names; the columns of apparent skin tone,
    gender and age become groups.

    Raises:
        FileNotFoundError: `data_dir` has no shards.

    Returns:
        [`EvaluationSet`]
    """
    rows = read_shards(data_dir, split, limit)

    def columns(name: str, preset: str) -> np.ndarray:
        return np.array(rows[name], float)[:, [FACS_CODES.index(code) for code in PRESETS[preset]]]

    return EvaluationSet(
        name="synthetic",
        images=rows.select_columns(["image"]),
        samples=[f"{identity}/{index}" for identity, index in zip(rows["identity"], rows["index"], strict=True)],
        subjects=list(rows["identity"]),
        folds=[0] * len(rows),
        labels={
            "detection": columns("occurrences", "bp4d"),
            "intensity_level": columns("levels", "disfa"),
            "intensity": np.array(rows["feafa"], float).round(4),
        },
        groups=list(rows.select_columns(["skin", "gender", "age"])),
    )
