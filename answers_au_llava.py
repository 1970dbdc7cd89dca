"""What to ask a model in order to learn about Action Units, and what its answers say, as named numbers."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from math import isnan

import torch
from transformers.utils import logging

from .action_units import PRESENT_LEVEL, ActionUnit, cover, get_task, select
from .recognition_au_llava import Recognition


logger = logging.get_logger(__name__)


def each_once(wanted: Iterable[list[tuple[str, list[ActionUnit]]]]) -> list[tuple[str, list[ActionUnit]]]:
    """All that several questions ask, each once; `wanted` holds what [`AnswersMixin.questions`] gives for each."""
    asked: list[tuple[str, list[ActionUnit]]] = []
    for one in chain(*wanted):
        if one not in asked:
            asked.append(one)
    return asked


def _check_asked(recognition: Recognition, task: str, units: list[ActionUnit]) -> None:
    """See that answers are about a task and some units, as far as their number tells."""
    given, wanted = tuple(recognition.distributions.shape[1:]), (len(units), len(get_task(task).values))
    if given != wanted:
        raise ValueError(
            f"The answers are about {given[0]} Action Units with {given[1]} values each, not about {wanted[0]} with "
            f"the {wanted[1]} of {task}; give the task and the units that were asked about, as `questions` gave them."
        )


class AnswersMixin:
    """Questions and answers of an [`AuLlavaProcessor`], which knows what its model was trained and calibrated on."""

    calibration: dict[str, dict]
    trained_lists: dict[str, list[list[str]]]
    free_tasks: list[str]

    def questions(self, task: str, action_units=None) -> list[tuple[str, list[ActionUnit]]]:
        """What to ask in order to learn what a task wants to know of some Action Units.

        A model that was trained on whole lists knows the units by their places in them, and answers badly about all
        units of another list. So whole lists are asked about, and of their answers the rest is left out. Of a unit
        that the model was trained to rate alone, levels tell whether it is present; see [`Recognition.presence`].

        Returns:
            `list[tuple[str, list[ActionUnit]]]`: Tasks and trained lists, each time the one that holds most of the
            units that are left; and, with a warning, the task and the units of which nothing tells it. Where the model
            was trained on any selection, just the units; and where its training is not known.
        """
        units = select(action_units, task)
        asked, strange = cover(task, units, self.trained_lists, self.free_tasks)
        if strange and self.trained_lists:
            lists = self.trained_lists.get(task, [])
            known = "; ".join(map(", ".join, lists)) or f"{', '.join(self.trained_lists)} alone"
            logger.warning_once(  # type: ignore[attr-defined]
                f"The model was not trained to answer {task} for {', '.join(unit.code for unit in strange)}, and will "
                f"guess. It was trained on {known}."
            )
        return [*asked, (task, strange)] if strange else asked

    def told(
        self, recognition: Recognition, about: str, task: str, action_units=None, calibrated: bool = True
    ) -> Recognition:
        """What answers to one task say of another: levels of presence, see [`questions`].

        A unit's threshold was fitted to presence as the levels tell it uncalibrated. Where there is none, the levels'
        temperature comes first, so that a unit is present just where its median level is so high.

        Args:
            recognition ([`Recognition`]): As the model gave it, about the task `about`.
            about, task (`str`): What was asked, and what is to be known. If they are the same, nothing changes.
            action_units: The units asked about; see [`select`].
            calibrated (`bool`, *optional*, defaults to `True`): Whether [`calibrate`] follows.
        """
        if about == task:
            return recognition
        usual = self.calibration.get(about, {}).get("temperature", 1.0) if calibrated else 1.0
        own = self.calibration.get(task, {}).get("thresholds", {})
        temperatures = [1.0 if unit.code in own else usual for unit in select(action_units, about)]
        return recognition.presence(PRESENT_LEVEL, temperatures)

    def _fitted(self, task: str, units: list[ActionUnit]) -> dict:
        """What calibrates the answers about some units; nothing, if nothing tells of any of them."""
        known = not self.trained_lists or len(cover(task, units, self.trained_lists)[1]) < len(units)
        return self.calibration.get(task, {}) if known else {}

    def calibrate(self, recognition: Recognition, task: str, action_units=None) -> Recognition:
        """Apply what was fitted on a validation split for the task; see [`Recognition.calibrated`].

        Nothing was fitted to guesses, so answers about units of which nothing tells stay as they are. Once is enough:
        [`read`] does it by itself.

        Raises:
            ValueError: The answers are not about this task and these units.
        """
        units = select(action_units, task)
        _check_asked(recognition, task, units)
        fitted = self._fitted(task, units)
        if not fitted:
            return recognition
        names = ("values", "probabilities", "expected_values", "distributions")
        here = {name: recognition.__dict__[name].cpu() for name in names}
        allowed = torch.tensor(get_task(task).values)
        return replace(recognition, **here).calibrated(fitted, [unit.code for unit in units], allowed)

    def read(
        self, recognition: Recognition, task: str, action_units=None, calibrated: bool = True
    ) -> list[dict[str, dict]]:
        """Name the numbers of a [`Recognition`], after [`calibrate`] unless `calibrated` is `False`.

        Returns:
            `list[dict]`: For each image, by Action Unit code: `name`; `value` (0 or 1; 0 to 5; or 0 to 1, by task; a
            real number in that range where the decision was `"mean"`); `probability` (0 to 1) of that value, or of the
            nearest one allowed; `expected_value`, the mean over the task's values, which for `detection` is the
            probability that the unit is present; for `detection` alone the `threshold` (0 to 1) at which it is called
            so; and for the others, where a calibration tells it, the `interval`, `[low, high]` in the task's range, in
            which the truth lies nine times in ten. All JSON-serialisable.

        Raises:
            ValueError: The answers are not about this task and these units.
        """
        chosen, units = get_task(task), select(action_units, task)
        _check_asked(recognition, task, units)
        fitted = self._fitted(task, units) if calibrated else {}
        if recognition.decision not in ("mode", fitted.get("decision")):
            fitted = {}  # thresholds, masses and margins go with the decision that they were fitted to
        if calibrated:
            recognition = self.calibrate(recognition, task, units)
        codes = [unit.code for unit in units]
        limits = dict.fromkeys(codes, 0.5) | fitted.get("thresholds", {})
        called = len(chosen.values) == 2 and recognition.decision != "mean"
        intervals = recognition.intervals(fitted, codes, torch.tensor(chosen.values))
        columns = (recognition.values, recognition.probabilities, recognition.expected_values, intervals)
        return [
            {
                unit.code: {
                    "name": unit.name,
                    "value": round(value, 6) if recognition.decision == "mean" else chosen.number(value),
                    "probability": round(probability, 6),
                    "expected_value": round(expected, 6),
                    **({"threshold": round(limits[unit.code], 6)} if called else {}),
                    **({} if isnan(ends[0]) else {"interval": [chosen.number(end) for end in ends]}),
                }
                for unit, value, probability, expected, ends in zip(units, *rows, strict=True)
            }
            for rows in zip(*(column.tolist() for column in columns), strict=True)
        ]
