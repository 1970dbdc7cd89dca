"""Two questions about the answers' form: does free text hold to it, and do the three formats contradict each other?"""

import numpy as np
import torch

from au_llava.action_units import PRESETS, TASKS, ActionUnit, cover, parse_answer, select

from .data import EvaluationSet, spread


# A format says clearly that a unit is absent up to the first number, and clearly that it is present from the second.
CLEAR = {"detection": (0, 1), "intensity_level": (0, 3), "intensity": (0.05, 0.5)}
# Units that the model was asked about both as present or absent and as a level.
SHARED = tuple(unit for unit in PRESETS["bp4d"] if unit in PRESETS["disfa"])


def check_formats(
    model,
    processor,
    evaluation_set: EvaluationSet,
    pictures: int,
    batch_size: int = 32,
    tasks: list[str] | None = None,
) -> dict:
    """Ask about some pictures, evenly spread, in other ways than the scores do.

    Args:
        model, processor: As loaded by [`predict.load`].
        evaluation_set ([`EvaluationSet`]): The pictures.
        pictures (`int`): How many of them.
        batch_size (`int`): How many at a time.
        tasks (`list[str]`, *optional*): Only these of the set's tasks.

    Returns:
        `dict`: `pictures`; for each task `invalid`, the share (0 to 1) of answers by plain `generate`, greedy and
        without a grammar, that are no valid answer, and `invalid_constrained`, the same under the grammar;
        `contradictions`, the share of picture and unit pairs, over `units`, that one format calls clearly present and
        another clearly absent, for each pair of formats that the model was trained to answer;
        `contradictions_calibrated`, the same of what the model's calibration makes of the answers, which is what the
        pipeline gives. A format that the set asks about `units` anyway is asked as the scores ask it; the others are
        asked as the pipeline asks about `units`.
    """
    rows = spread(len(evaluation_set), pictures)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    own = {task: processor.questions(task, evaluation_set.units[task]) for task in tasks or evaluation_set.units}
    trained, free = processor.trained_lists, processor.free_tasks
    formats = [task for task in TASKS if not trained or not cover(task, select(SHARED), trained, free)[1]]
    asked = {
        task: own[task]
        if set(SHARED) <= {unit.code for _, units in own.get(task, ()) for unit in units}
        else processor.questions(task, list(SHARED))
        for task in formats
    }
    invalid, constrained = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0.0)
    values, calibrated = ({task: [] for task in formats} for _ in range(2))
    for batch in batches:
        crops = evaluation_set.pictures(batch)
        recognized = {
            task: [_recognize(model, processor, crops, about, units) for about, units in lists]
            for task, lists in asked.items()
        }
        for task, lists in own.items():
            same = lists == asked.get(task)  # what is asked for the contradictions has just been answered
            for place, (about, units) in enumerate(lists):
                found = recognized[task][place] if same else _recognize(model, processor, crops, about, units)
                texts = processor.batch_decode(found.sequences, skip_special_tokens=True)
                constrained[task] += sum(not valid(text, about, units) for text in texts) / len(lists)
                texts = _write(model, processor, crops, about, units)
                invalid[task] += sum(not valid(text, about, units) for text in texts) / len(lists)
        for task, lists in asked.items():
            codes = [unit.code for _, units in lists for unit in units]
            columns = [codes.index(code) for code in SHARED]
            pairs = [(found, *asked_of) for found, asked_of in zip(recognized[task], lists, strict=True)]
            raw = [processor.told(found, about, task, units, calibrated=False) for found, about, units in pairs]
            fitted = [
                processor.calibrate(processor.told(found, about, task, units), task, units)
                for found, about, units in pairs
            ]
            for kept, answers in ((values, raw), (calibrated, fitted)):
                kept[task].append(torch.cat([found.values.cpu() for found in answers], 1).numpy()[:, columns])
    stacked, fitted = ({task: np.concatenate(parts) for task, parts in own.items()} for own in (values, calibrated))
    return {
        "pictures": len(rows),
        "units": list(SHARED),
        "invalid": {task: count / len(rows) for task, count in invalid.items()},
        "invalid_constrained": {task: count / len(rows) for task, count in constrained.items()},
        "contradictions": contradictions(stacked),
        "contradictions_calibrated": contradictions(fitted),
    }


def contradictions(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of clear contradictions between each two formats.

    Args:
        values (`dict[str, numpy.ndarray]`): By task, answers `(pictures, units)` about the same units.

    >>> contradictions({"detection": np.array([[1, 0]]), "intensity_level": np.array([[0, 2]])})
    {'detection / intensity_level': 0.5}
    """
    absent = {task: found <= CLEAR[task][0] for task, found in values.items()}
    present = {task: found >= CLEAR[task][1] for task, found in values.items()}
    tasks = list(values)
    return {
        f"{one} / {other}": float(((present[one] & absent[other]) | (absent[one] & present[other])).mean())
        for place, one in enumerate(tasks)
        for other in tasks[place + 1 :]
    }


@torch.inference_mode()
def _write(model, processor, crops: list, task: str, units: list[ActionUnit]) -> list[str]:
    """What the model writes when nothing keeps it to the answer's form."""
    inputs = processor(images=crops, task=task, action_units=units).to(model.device, model.dtype)
    room = len(processor.grammar(task, units)) + 8
    written = model.generate(**inputs, max_new_tokens=room, do_sample=False)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _recognize(model, processor, crops: list, task: str, units: list[ActionUnit]):
    inputs = processor(images=crops, task=task, action_units=units)
    return model.recognize(**inputs, grammar=processor.grammar(task, units), mirror=processor.mirror)


def valid(text: str, task: str, units: list[ActionUnit]) -> bool:
    """Whether a text is an answer: an array of the right length and range, and nothing else.

    >>> from au_llava.action_units import select
    >>> valid("[0, 1]", "detection", select("AU6,AU12")), valid("[0, 2]", "detection", select("AU6,AU12"))
    (True, False)
    """
    try:
        parse_answer(text, task, units)
    except ValueError:
        return False
    return True
