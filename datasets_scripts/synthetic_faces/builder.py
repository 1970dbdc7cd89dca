"""The synthetic faces as a builder of `datasets`.

>>> from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces
>>> faces = SyntheticFaces(config_name="detection")  # without data_dir: the sample that comes with the project
>>> faces.download_and_prepare()  # doctest: +SKIP
>>> rows = faces.as_dataset("test")  # doctest: +SKIP
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from ... import action_units
from .. import instructions
from ..builder import rows_of
from ..instructions import instruct, make_row
from ..preparation import digest, digest_code
from ..report import check_whole
from . import expression, layout
from .expression import FACS_CODES, FEAFA_CODES


SAMPLE = Path(__file__).with_name("sample")  # the first 300 images of the split `test`
FACES = "faces"  # the config whose rows are the images with all labels, as they were written


@dataclass
class SyntheticFacesConfig(datasets.BuilderConfig):
    """Options of [`SyntheticFaces`]. `name` is `faces` or a task.

    Args:
        data_dir (`str`, *optional*): Folder with the shards that the command wrote; by default the project's sample.
        action_units (`str`, *optional*): With a task: a preset or codes to ask about; by default the task's preset.
            `detection` and `intensity_level` take any FACS code of the data set, `intensity` FEAFA codes as well.
    """

    action_units: str | None = None

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # `datasets` names its cache after this; of itself it would notice neither new shards nor new code.
        folder = Path(self.data_dir or SAMPLE)
        shards = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.parquet"))
        ]
        code = digest_code(action_units, instructions, expression, layout, sys.modules[__name__])
        fingerprint = digest([str(folder.resolve()), shards, self.action_units, str(self.version), code])
        return f"{super().create_config_id({}, custom_features)}-{fingerprint}"


class SyntheticFaces(datasets.GeneratorBasedBuilder):
    """Rendered faces in the splits `train`, `validation` and `test`, as far as they have been rendered.

    The config `faces` has a row for every image with the columns of [`layout.FEATURES`]; the configs `detection`,
    `intensity_level` and `intensity` ask one question about every image, in rows of [`instructions.FEATURES`].

    Raises:
        FileNotFoundError: There are no shards in `data_dir`.
        ValueError: A unit is asked about that has no label.
    """

    BUILDER_CONFIG_CLASS = SyntheticFacesConfig
    BUILDER_CONFIGS = [SyntheticFacesConfig(name=name) for name in (FACES, *action_units.TASKS)]
    DEFAULT_CONFIG_NAME = FACES

    def _info(self) -> datasets.DatasetInfo:
        features = layout.FEATURES if self.config.name == FACES else instructions.FEATURES
        return datasets.DatasetInfo(features=features, license=layout.LICENSE)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        if self.config.name != FACES:  # now, and not amid the writing
            self._check_units(self.config.name)
        folder = Path(self.config.data_dir or SAMPLE)
        shards = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in layout.IDENTITIES}
        if not any(shards.values()):
            raise FileNotFoundError(
                f"No shards of synthetic faces in {folder}; render them with "
                f"python -m au_llava.datasets_scripts.synthetic_faces --output_dir {folder}"
            )
        check_whole(path for paths in shards.values() for path in paths)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"shards": paths})
            for split, paths in shards.items()
            if paths
        ]

    def _check_units(self, task: str) -> None:
        known = [*FACS_CODES, *(FEAFA_CODES if task == "intensity" else ())]
        units = action_units.select(self.config.action_units, task)
        missing = [unit.code for unit in units if unit.code not in known]
        if missing:
            raise ValueError(
                f"The synthetic faces have no {task} label for {', '.join(missing)}; they have: {', '.join(known)}."
            )

    def _generate_examples(self, shards: list[Path]) -> Iterator[tuple[int, dict]]:
        for row in rows_of(shards):
            yield row["index"], row if self.config.name == FACES else self._question(row)

    def _question(self, row: dict) -> dict:
        task = self.config.name
        known = labels_of(row, task)
        labels = {unit.code: known[unit.code] for unit in action_units.select(self.config.action_units, task)}
        origin = {
            "dataset": "synthetic_faces",
            "subject": row["identity"],
            "sequence": row["identity"],
            "frame": row["index"],
        }
        return make_row(row["image"], labels, task, instruct(labels, task), **origin)


def labels_of(row: dict, task: str) -> dict[str, float]:
    """All labels of one task that a row of [`layout.FEATURES`] holds, by code."""
    column = {"detection": "occurrences", "intensity_level": "levels", "intensity": "facs"}[task]
    labels = dict(zip(FACS_CODES, map(float, row[column]), strict=True))
    if task == "intensity":
        labels |= zip(FEAFA_CODES, row["feafa"], strict=True)
    return labels
