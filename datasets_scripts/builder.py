"""What the builders of all data sets share: prepared crops become rows with questions.

`datasets` loads no scripts by name any more, so a builder is made directly:

>>> from au_llava.datasets_scripts.bp4d import Bp4d
>>> fold = Bp4d(config_name="fold1", data_dir="/data/BP4D", crops_dir="data/bp4d")  # doctest: +SKIP
>>> fold.download_and_prepare()  # doctest: +SKIP
>>> train, test = fold.as_dataset("train"), fold.as_dataset("test")  # doctest: +SKIP

Given `data_dir`, crops that are missing or out of date are made first; the command line does the same beforehand.
Without `data_dir`, the crops in `crops_dir` are taken as they are.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from .. import action_units
from ..face_alignment import which_detector
from . import instructions, recordings
from .instructions import FEATURES, Question, instruct, make_row, relations_in
from .preparation import Settings, digest, digest_code, plan, prepare
from .recordings import Recording
from .report import read_manifest


@dataclass
class CropsConfig(datasets.BuilderConfig):
    """Options of all builders here. `name` says which protocol.

    Args:
        data_dir (`str`, *optional*): The data set's folder as distributed.
        crops_dir (`str`, *optional*): The prepared crops; they are made in the cache if only `data_dir` is given.
        task (`str`): What the labels answer; each data set has its default.
        detector (`str`, *optional*, defaults to `"auto"`): See [`Settings`]. Without `data_dir` it means nothing.
        workers (`int`, *optional*, defaults to 1): Processes that make crops.
        action_units (`str`, *optional*): A preset or codes: only these labels; by default all that there are.
        relations (`bool`, *optional*, defaults to `False`): Tell in T which units go together in the labels of this
            fold's training subjects.
        skip_bad_labels (`bool`, *optional*, defaults to `False`): Leave frames with damaged labels out.
    """

    crops_dir: str | None = None
    task: str = ""
    detector: str = "auto"
    workers: int = 1
    action_units: str | None = None
    relations: bool = False
    skip_bad_labels: bool = False

    def recordings(self) -> list[Recording]:
        """Read the labels in `data_dir`."""
        raise NotImplementedError

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # `datasets` names its cache after this; of itself it would notice neither new labels nor new code.
        options = asdict(self) | {"data_dir": None, "crops_dir": None, "workers": None, "version": str(self.version)}
        code = digest_code(action_units, instructions, recordings, sys.modules[__name__], sys.modules[self.__module__])
        return f"{super().create_config_id({}, custom_features)}-{digest([self._crops(), options, code])}"

    def _crops(self) -> str:
        """What tells the crops of this config from all others: their fingerprint, and what found the faces."""
        if self.data_dir is None and self.crops_dir is None:
            raise ValueError(
                "Give data_dir, the data set's folder, or crops_dir, a folder of prepared crops, or both."
            )
        there = self.crops_dir is not None and Path(self.crops_dir, "manifest.json").is_file()
        manifest = read_manifest(self.crops_dir) if there or self.data_dir is None else {}
        asked = manifest if self.data_dir is None else plan(self.recordings(), Settings(self.detector))[0]
        return digest([asked["fingerprint"], manifest.get("detector") or self.found_by()])

    def found_by(self) -> str:
        """What would find the faces on this machine, as manifests name it."""
        return Path(which_detector(self.detector)).name


class CropsBuilder(datasets.GeneratorBasedBuilder):
    """Rows of [`FEATURES`] from prepared crops, in the splits `train` and `test`.

    A data set adds its configs, and [`split_of`]. Options of the config are keyword arguments, beside those of
    `datasets.DatasetBuilder` such as `cache_dir`.

    Raises:
        ValueError: Neither `data_dir` nor `crops_dir` is given, labels are damaged, or `crops_dir` is unfinished or
            holds crops of another data set, or with labels for another task.
    """

    BUILDER_CONFIG_CLASS = CropsConfig
    DATASET = ""  # as the column `dataset` names it

    def split_of(self, row: dict) -> str | None:
        """`train`, `test`, or `None` for a row that this protocol leaves out."""
        raise NotImplementedError

    def labels_of(self, row: dict) -> tuple[dict[str, float], str]:
        """The labels of a row by code, and the task that they answer."""
        return dict(zip(row["action_units"], row["labels"], strict=True)), row["task"]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        if self.config.name not in self.builder_configs:  # `datasets` makes up a config where none is named
            raise ValueError(f"Give config_name, one of {', '.join(self.builder_configs)}.")
        folder = self._prepare() if self.config.data_dir is not None else Path(self.config.crops_dir)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ValueError(f"{folder}: the preparation has not finished; run its command again.")
        shards = [folder / "data" / name for name in manifest["shards"]]
        for row in islice(rows_of(shards), 1):  # options that do not fit are refused now, not amid the writing
            if (row["dataset"], self.labels_of(row)[1]) != (self.DATASET, self.config.task):
                raise ValueError(
                    f"{folder} holds crops of {row['dataset']} with labels for {row['task']}, from which no rows of "
                    f"{self.DATASET} for task {self.config.task!r} can be made; give another folder or task."
                )
            self._asked(row), self.split_of(row)
        question = Question(relations=self._relations(shards) if self.config.relations else None)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards, "split": split, "question": question})
            for split in ("train", "test")
        ]

    def _prepare(self) -> Path:
        """Make what is missing of the crops; by default all folds share a folder of them in the cache."""
        found, settings = self.config.recordings(), Settings(self.config.detector)
        head = plan(found, settings)[0]
        kind = digest([*(head[key] for key in ("task", "action_units", "settings")), self.config.found_by()])
        folder = Path(self.config.crops_dir or Path(self.cache_dir).parents[1] / f"crops-{kind}")
        prepare(found, folder, settings, self.config.workers)
        return folder

    def _generate_examples(self, shards: list[Path], split: str, question: Question) -> Iterator[tuple[str, dict]]:
        for row in rows_of(shards):
            if self.split_of(row) != split:
                continue
            labels, task = self._asked(row)
            if all(np.isnan(value) for value in labels.values()):
                continue  # a question about nothing; only a choice of `action_units` can lead here
            sample = instruct(labels, task, question=question)
            origin = {name: row[name] for name in ("dataset", "subject", "sequence", "frame")}
            yield f"{row['sequence']}-{row['frame']}", make_row(row["images"][0], labels, task, sample, **origin)

    def _asked(self, row: dict) -> tuple[dict[str, float], str]:
        labels, task = self.labels_of(row)
        if self.config.action_units is not None:
            units = action_units.select(self.config.action_units, task)
            unlabelled = [unit.code for unit in units if unit.code not in labels]
            if unlabelled:
                raise ValueError(
                    f"{self.dataset_name} has no labels for {', '.join(unlabelled)}; it has: {', '.join(labels)}."
                )
            labels = {unit.code: labels[unit.code] for unit in units}
        return labels, task

    def _relations(self, shards: list[Path]) -> instructions.Relations:
        """Learnt from the rows of the split `train` only: test subjects stay unseen."""
        columns = [name for name in FEATURES if name not in ("images", "prompt", "completion")]
        asked = [self._asked(row) for row in rows_of(shards, columns) if self.split_of(row) == "train"]
        rows = [
            {"action_units": list(labels), "labels": list(labels.values()), "task": task} for labels, task in asked
        ]
        return relations_in(datasets.Dataset.from_list(rows))


def rows_of(shards: list[Path], columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of Parquet files, one after another, a hundred in memory at a time; all columns, or some."""
    for path in shards:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=100, columns=columns):
                yield from batch.to_pylist()


def part_of_fold(fold: str, naming: str) -> int:
    """Which of the three published parts, from 0, a fold tests.

    JAANet's lists and ME-GraphAU's count the same three groups of subjects from opposite ends.

    >>> part_of_fold("fold1", "jaanet"), part_of_fold("fold1", "megraphau")
    (0, 2)
    """
    orders = {"jaanet": (0, 1, 2), "megraphau": (2, 1, 0)}
    if naming not in orders:
        raise ValueError(f"Unknown naming {naming!r} of folds; accepted: {', '.join(orders)}.")
    return orders[naming][int(fold[-1]) - 1]
