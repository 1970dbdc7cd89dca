"""The one catalogue of facial Action Units, the tasks, the text description T and the answer array.

Everything the project knows about Action Units (AUs) stands here: their codes, names, muscles and places on the face,
the three tasks with their value ranges, how a question is put in words, and how an answer array is written and read.

Two name spaces are kept apart. `AU12` is a unit of the Facial Action Coding System (FACS). `FEAFA12` is one of the 24
units of the FEAFA data set (Yan et al., 2019), which numbers its own units from 1 and means something else by each
number.

Example:

>>> from au_llava.action_units import describe, select, write_answer, parse_answer
>>> units = select("AU6,AU12")
>>> print(describe("detection", units).splitlines()[0])
Task: detect which facial Action Units are present in the image of a face.
>>> write_answer([0, 1], "detection", units)
'[0, 1]'
>>> parse_answer("[0, 1]", "detection", units)
[0.0, 1.0]
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class ActionUnit:
    """One facial action, told well enough for a person or a language model to look for it.

    Args:
        code (`str`): Short unique name: `AU12` (FACS), `FEAFA12` (FEAFA), or a code of your own without blanks or
            commas.
        name (`str`): What the unit is called, e.g. `Lip Corner Puller`.
        action (`str`): What the muscles do and what it looks like, in a few words.
        region (`str`): Where on the face to look.
        muscles (`tuple[str, ...]`, *optional*): The muscles behind it.
        side (`str`, *optional*, defaults to `"both"`): `"left"`, `"right"` (the subject's) or `"both"`.

    Example:

    >>> wink = ActionUnit("WINK", "Wink", "one eye closes while the other stays open", "eyelids")
    >>> wink.code
    'WINK'
    """

    code: str
    name: str
    action: str
    region: str
    muscles: tuple[str, ...] = ()
    side: str = "both"

    def __post_init__(self):
        if not re.fullmatch(r"[^\s,;:\[\]]+", self.code):
            raise ValueError(f"ActionUnit code {self.code!r} must be one word without commas, colons or brackets.")
        if self.side not in ("left", "right", "both"):
            raise ValueError(f"ActionUnit {self.code}: side is {self.side!r}; accepted: 'left', 'right', 'both'.")
        if not (self.name.strip() and self.action.strip() and self.region.strip()):
            raise ValueError(f"ActionUnit {self.code}: name, action and region must not be empty.")
        if isinstance(self.muscles, str):
            raise ValueError(f"ActionUnit {self.code}: muscles is {self.muscles!r}; give a tuple of names.")
        if "\n" in self.line() or "<image>" in self.line():  # of which T has its own
            raise ValueError(f"ActionUnit {self.code}: {self.line()!r} holds a line break or <image>; leave it out.")

    def line(self) -> str:
        """This unit's line in T: code, name, muscles, action and where to look (paper, Fig. 2, part 2)."""
        muscles = f" ({', '.join(self.muscles)})" if self.muscles else ""
        return f"{self.code} {self.name}{muscles}: {self.action}. Look at the {self.region}."

    def mirrored(self) -> "ActionUnit":
        """The unit that this one becomes when the picture is flipped left to right.

        >>> select("FEAFA12")[0].mirrored().name
        'Right Lip Corner Pull'
        """
        if self.code in _MIRROR:
            return CATALOGUE[_MIRROR[self.code]]
        other = {"left": "right", "right": "left", "both": "both"}[self.side]
        name, action, region, *muscles = map(_swap, (self.name, self.action, self.region, *self.muscles))
        return replace(self, name=name, action=action, region=region, muscles=tuple(muscles), side=other)


def other_sides(units: list[ActionUnit]) -> list[int]:
    """For each unit the place of the one that it becomes when the picture is flipped; -1 where that is not among them.

    >>> other_sides(select("FEAFA12,FEAFA13,FEAFA1,FEAFA24"))
    [1, 0, -1, 3]
    """
    # Of one's own units the codes do not tell which is the other side, but what they say does.
    told, others = ([astuple(unit)[1:] for unit in own] for own in (units, [unit.mirrored() for unit in units]))
    return [told.index(other) if other in told else -1 for other in others]


def _swap(text: str) -> str:
    """Exchange the words left and right, keeping their capitals."""
    words = [("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")]
    other = dict(words) | {right: left for left, right in words}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda match: other[match.group()], text)


# FACS names and muscles: Ekman, Friesen and Hager (2002), as listed by public references; the wording is our own.
_FACS = [
    ActionUnit("AU1", "Inner Brow Raiser", "the inner ends of the eyebrows go up and the mid forehead wrinkles",
               "inner eyebrows and centre of the forehead", ("frontalis, pars medialis",)),
    ActionUnit("AU2", "Outer Brow Raiser", "the outer ends of the eyebrows go up and the brows look arched",
               "outer eyebrows and sides of the forehead", ("frontalis, pars lateralis",)),
    ActionUnit("AU4", "Brow Lowerer", "the eyebrows go down and together, with upright creases between them",
               "eyebrows and the skin between them", ("corrugator supercilii", "depressor supercilii", "procerus")),
    ActionUnit("AU5", "Upper Lid Raiser", "the upper eyelids go up, the eyes open wide and white shows above the iris",
               "upper eyelids", ("levator palpebrae superioris",)),
    ActionUnit("AU6", "Cheek Raiser", "the cheeks go up and the skin beside the eyes gathers into crow's feet",
               "cheeks and outer eye corners", ("orbicularis oculi, pars orbitalis",)),
    ActionUnit("AU7", "Lid Tightener", "the eyelids tighten and the lower lid straightens, narrowing the eyes",
               "lower eyelids", ("orbicularis oculi, pars palpebralis",)),
    ActionUnit("AU9", "Nose Wrinkler", "the skin along the nose is pulled up and wrinkles, lifting the nostril wings",
               "sides and root of the nose", ("levator labii superioris alaeque nasi",)),
    ActionUnit("AU10", "Upper Lip Raiser", "the upper lip is drawn straight up and the furrow beside the nose deepens",
               "upper lip and nasolabial furrow", ("levator labii superioris",)),
    ActionUnit("AU12", "Lip Corner Puller", "the mouth corners are pulled back and up, as in a smile",
               "mouth corners and cheeks", ("zygomaticus major",)),
    ActionUnit("AU14", "Dimpler", "the mouth corners tighten and are pulled inward, with a dimple beside them",
               "mouth corners", ("buccinator",)),
    ActionUnit("AU15", "Lip Corner Depressor", "the mouth corners are pulled down",
               "mouth corners and the skin below them", ("depressor anguli oris",)),
    ActionUnit("AU16", "Lower Lip Depressor", "the lower lip is pulled down and flattened and lower teeth may show",
               "lower lip", ("depressor labii inferioris",)),
    ActionUnit("AU17", "Chin Raiser", "the chin boss is pushed up and wrinkles, and the lower lip is pushed up",
               "chin and lower lip", ("mentalis",)),
    ActionUnit("AU18", "Lip Pucker", "the lips are drawn together and pushed forward, as for a kiss",
               "lips", ("incisivii labii superioris", "incisivii labii inferioris")),
    ActionUnit("AU20", "Lip Stretcher", "the mouth corners are pulled straight sideways and the lips flatten",
               "mouth corners and lips", ("risorius", "platysma")),
    ActionUnit("AU22", "Lip Funneler", "the lips are pushed outward and rounded into a funnel",
               "lips", ("orbicularis oris",)),
    ActionUnit("AU23", "Lip Tightener", "the lips tighten and narrow and their red parts look thin",
               "red parts of the lips", ("orbicularis oris",)),
    ActionUnit("AU24", "Lip Pressor", "the lips are pressed firmly together without raising the chin",
               "line between the lips", ("orbicularis oris",)),
    ActionUnit("AU25", "Lips Part", "the lips are apart and a gap, the teeth or the inner mouth shows",
               "gap between the lips", ("depressor labii inferioris", "relaxed mentalis or orbicularis oris")),
    ActionUnit("AU26", "Jaw Drop", "the lower jaw hangs down and the teeth separate",
               "lower jaw and chin", ("relaxed masseter, temporalis and medial pterygoid",)),
    ActionUnit("AU27", "Mouth Stretch", "the lower jaw is pulled far down and the mouth stretches wide open",
               "lower jaw and cheeks", ("pterygoids", "digastric")),
    ActionUnit("AU28", "Lip Suck", "the red parts of the lips are drawn in over the teeth",
               "red parts of the lips", ("orbicularis oris",)),
    ActionUnit("AU43", "Eyes Closed", "the upper eyelids come down and the eyes stay closed",
               "eyelids", ("relaxed levator palpebrae superioris", "orbicularis oculi")),
    # A blink is an event in time; a model that sees one picture can only tell that the eyes are closed in it.
    ActionUnit("AU45", "Blink", "the eyes are closed in this frame, as in the middle of a blink",
               "eyelids", ("relaxed levator palpebrae superioris", "orbicularis oculi")),
]  # fmt: skip


def _pair(first: int, name: str, action: str, region: str) -> list[ActionUnit]:
    """A FEAFA unit of the left side and its twin of the right side, numbered `first` and `first + 1`."""
    return [
        ActionUnit(f"FEAFA{first + offset}", f"{side.capitalize()} {name}", action.format(side=side),
                   region.format(side=side), side=side)
        for offset, side in enumerate(("left", "right"))
    ]  # fmt: skip


# Order and names: FEAFA (Yan et al., 2019) and FEAFA+ (Gan et al., 2022). Whether their "left" is the subject's or the
# image's left is not stated in the sources at hand; here it is the subject's.
_FEAFA = [
    *_pair(1, "Eye Close", "the {side} eyelids close", "{side} eyelids"),
    *_pair(3, "Lid Raise", "the {side} upper eyelid goes up and the eye opens wide", "{side} upper eyelid"),
    *_pair(5, "Brow Lower", "the {side} eyebrow goes down and inward", "{side} eyebrow"),
    *_pair(7, "Brow Raise", "the {side} eyebrow goes up", "{side} eyebrow and forehead"),
    ActionUnit("FEAFA9", "Jaw Drop", "the lower jaw hangs down and the mouth opens", "lower jaw and chin"),
    ActionUnit("FEAFA10", "Jaw Slide Left", "the lower jaw moves to the left", "lower jaw and chin", side="left"),
    ActionUnit("FEAFA11", "Jaw Slide Right", "the lower jaw moves to the right", "lower jaw and chin", side="right"),
    *_pair(12, "Lip Corner Pull", "the {side} mouth corner is pulled back and up", "{side} mouth corner"),
    *_pair(14, "Lip Corner Stretch", "the {side} mouth corner is pulled straight sideways", "{side} mouth corner"),
    ActionUnit("FEAFA16", "Upper Lip Suck", "the upper lip is drawn in over the teeth", "upper lip"),
    ActionUnit("FEAFA17", "Lower Lip Suck", "the lower lip is drawn in over the teeth", "lower lip"),
    ActionUnit("FEAFA18", "Jaw Thrust", "the lower jaw is pushed forward", "lower jaw and chin"),
    ActionUnit("FEAFA19", "Upper Lip Raise", "the upper lip is drawn up", "upper lip"),
    ActionUnit("FEAFA20", "Lower Lip Depress", "the lower lip is pulled down", "lower lip"),
    ActionUnit("FEAFA21", "Chin Raise", "the chin and the lower lip are pushed up", "chin and lower lip"),
    ActionUnit("FEAFA22", "Lip Pucker", "the lips are drawn together and pushed forward", "lips"),
    ActionUnit("FEAFA23", "Cheek Puff", "the cheeks are blown out with air", "cheeks"),
    ActionUnit("FEAFA24", "Nose Wrinkle", "the skin of the nose is pulled up and wrinkles",
               "sides and root of the nose"),
]  # fmt: skip

CATALOGUE: dict[str, ActionUnit] = {unit.code: unit for unit in _FACS + _FEAFA}

_BY_NAME = {unit.name: unit.code for unit in _FEAFA}
_MIRROR = {unit.code: _BY_NAME[_swap(unit.name)] for unit in _FEAFA}

PRESETS: dict[str, tuple[str, ...]] = {
    "bp4d": ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU14", "AU15", "AU17", "AU23", "AU24"),
    "disfa": ("AU1", "AU2", "AU4", "AU5", "AU6", "AU9", "AU12", "AU15", "AU17", "AU20", "AU25", "AU26"),
    "disfa8": ("AU1", "AU2", "AU4", "AU6", "AU9", "AU12", "AU25", "AU26"),
    "feafa": tuple(unit.code for unit in _FEAFA),
}


@dataclass(frozen=True)
class Task:
    """One of the paper's three questions; they differ only in T and in the values that an answer may hold.

    Args:
        name (`str`): `detection`, `intensity_level` or `intensity`.
        purpose (`str`): Part 1 of T.
        answer (`str`): What one number of the answer means, for part 3 of T.
        texts (`tuple[str, ...]`): Every way in which one value may be written, in rising order, all of one length.
        preset (`str`): The AU list asked about when the caller names none.
    """

    name: str
    purpose: str
    answer: str
    texts: tuple[str, ...]
    preset: str

    @property
    def values(self) -> tuple[float, ...]:
        """The number that each of `texts` stands for."""
        return tuple(float(text) for text in self.texts)

    def takes(self, value: float) -> bool:
        """Whether it may stand as a label: whole ones as they are or not at all; a fine scale's are rounded.

        >>> TASKS["intensity_level"].takes(2.5), TASKS["intensity"].takes(0.349)
        (False, True)
        """
        return value in self.values if "." not in self.texts[0] else 0 <= value <= 1

    def number(self, value: float) -> int | float:
        """An allowed value as people write it: an integer where the task has only integers."""
        return round(value, 2) if "." in self.texts[0] else round(value)

    def write(self, value: float) -> str:
        """The text of the allowed value nearest to `value`.

        >>> TASKS["intensity"].write(0.349)
        '0.35'
        """
        low, high = self.values[0], self.values[-1]
        if not low <= value <= high:  # also False for NaN
            raise ValueError(
                f"{self.name} value {value!r} is not in {low:g} to {high:g}; leave unknown labels out of the question."
            )
        return self.texts[round((value - low) / (high - low) * (len(self.texts) - 1))]


# The lowest level at which studies of DISFA call a unit present.
PRESENT_LEVEL = 2

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "detection",
            "Task: detect which facial Action Units are present in the image of a face.",
            "0 (absent) or 1 (present)",
            ("0", "1"),
            "bp4d",
        ),
        Task(
            "intensity_level",
            "Task: rate the intensity level of facial Action Units in the image of a face.",
            "a whole number from 0 (absent) to 5 (maximum)",
            ("0", "1", "2", "3", "4", "5"),
            "disfa",
        ),
        Task(
            "intensity",
            "Task: estimate the continuous intensity of facial Action Units in the image of a face.",
            "a decimal number from 0.00 (absent) to 1.00 (maximum)",
            tuple(f"{step / 100:.2f}" for step in range(101)),
            "feafa",
        ),
    )
}


def get_task(task: str) -> Task:
    """Look a task up by name.

    Raises:
        ValueError: The name is not `detection`, `intensity_level` or `intensity`.
    """
    if task not in tuple(TASKS):  # for which a list of tasks is just unknown, too
        raise ValueError(f"Unknown task {task!r}; accepted: {', '.join(TASKS)}.")
    return TASKS[task]


def select(action_units: "str | Iterable[str | ActionUnit] | None", task: str = "detection") -> list[ActionUnit]:
    """Turn what a caller may say into a list of `ActionUnit`.

    Args:
        action_units: Codes and presets (`bp4d`, `disfa`, `disfa8`, `feafa`) in one string (`"AU1,AU12"`) or a list,
            which may hold `ActionUnit` objects, too; one such object; or `None` for the task's own preset.
        task (`str`): Names the preset when `action_units` is `None`.

    Raises:
        ValueError: Unknown or duplicate code, or an empty list.

    Example:

    >>> [unit.code for unit in select("disfa8")][:3]
    ['AU1', 'AU2', 'AU4']
    """
    if action_units is None:
        action_units = get_task(task).preset
    if isinstance(action_units, str):
        action_units = [code for code in re.split(r"[,\s]+", action_units) if code]
    named: Iterable = action_units if isinstance(action_units, Iterable) else [action_units]
    units: list[ActionUnit] = []
    for item in named:
        if hasattr(item, "code"):
            # Code loaded from the Hub holds its own copy of this class, so an object of the other copy is rebuilt
            # here.
            units.append(ActionUnit(item.code, item.name, item.action, item.region, tuple(item.muscles), item.side))
            continue
        members = PRESETS.get(str(item).strip().lower(), (str(item).strip().upper(),))
        if not CATALOGUE.keys() >= set(members):
            raise ValueError(
                f"Unknown Action Unit {item!r}; accepted: {', '.join(CATALOGUE)}, the presets "
                f"{', '.join(PRESETS)}, or an ActionUnit of your own."
            )
        units += [CATALOGUE[code] for code in members]
    codes = [unit.code for unit in units]
    if not codes:
        raise ValueError(
            "The list of Action Units is empty; name at least one, or a preset: " + ", ".join(PRESETS) + "."
        )
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice:
        raise ValueError(f"Action Units named more than once: {', '.join(twice)}; name each one once.")
    return units


def cover(
    task: str, units: list[ActionUnit], lists: dict[str, list[list[str]]], free: Collection[str] = ()
) -> tuple[list[tuple[str, list[ActionUnit]]], list[ActionUnit]]:
    """What to ask in order to learn what a task wants to know of some units, and the units of which nothing tells it.

    Levels tell of presence, too, see `PRESENT_LEVEL`.

    Args:
        task (`str`): `detection`, `intensity_level` or `intensity`.
        units (`list[ActionUnit]`): In question.
        lists (`dict[str, list[list[str]]]`): By task, the lists of codes that may be asked about. Of those of a task
            each time the one that holds most of the units left is taken.
        free (`Collection[str]`): Tasks that may be asked about any selection of the units in their lists.

    Example:

    >>> asked, others = cover("detection", select("AU1,AU25,AU43"), {"intensity_level": [PRESETS["disfa"]]})
    >>> [(about, len(whole)) for about, whole in asked], [unit.code for unit in others]
    ([('intensity_level', 12)], ['AU43'])
    """
    asked: list[tuple[str, list[ActionUnit]]] = []
    left = [*units]
    for about in (task, "intensity_level") if task == "detection" else (task,):
        wholes = [select(codes, about) for codes in lists.get(about, [])]
        if about in free:
            wholes = [[unit for unit in left if any(unit in whole for whole in wholes)]]
        while any(unit in whole for whole in wholes for unit in left):
            asked.append((about, max(wholes, key=lambda whole: len({*left} & {*whole}))))
            left = [unit for unit in left if unit not in asked[-1][1]]
    return asked, left


def describe(task: str, action_units: "str | Iterable[str | ActionUnit] | None" = None, relations: str = "") -> str:
    """Write T, the text description that goes to the model beside the image (paper, section III-B and Fig. 2).

    Args:
        task (`str`): `detection`, `intensity_level` or `intensity`.
        action_units: See [`select`].
        relations (`str`, *optional*): A sentence on how the units go together, added to part 2.

    Returns:
        `str`: Part 1, the purpose; part 2, a line for each Action Unit; part 3, the output format.
    """
    chosen, units = get_task(task), select(action_units, task)
    lines = [chosen.purpose, "Action Units:", *(unit.line() for unit in units)]
    if relations:
        lines.append(relations)
    count = "1 number" if len(units) == 1 else f"{len(units)} numbers"
    lines.append(f"Output format: an array of {count} in this order, each {chosen.answer}.")
    return "\n".join(lines)


def write_answer(values: Sequence[float], task: str, action_units: Sequence[ActionUnit]) -> str:
    """Write the answer array A, one number per Action Unit, rounded to the task's resolution.

    Args:
        values (`Sequence[float]`): One value per unit: 0 or 1, 0 to 5, or 0 to 1, by task.

    Raises:
        ValueError: A value is unknown (NaN) or out of range, or their number is wrong.

    Example:

    >>> write_answer([0.349, 1], "intensity", select("FEAFA1,FEAFA2"))
    '[0.35, 1.00]'
    """
    if len(values) != len(action_units):
        raise ValueError(f"{len(values)} values for {len(action_units)} Action Units; give one value per unit.")
    chosen, texts = get_task(task), []
    for value, unit in zip(values, action_units, strict=True):
        try:
            texts.append(chosen.write(value))
        except ValueError as error:
            raise ValueError(f"{unit.code}: {error}") from None
    return "[" + ", ".join(texts) + "]"


def parse_answer(text: str, task: str, action_units: Sequence[ActionUnit]) -> list[float]:
    """Read an answer array back into numbers. The only parser of answers in the project.

    Blanks around the array do not matter; anything else that [`write_answer`] would not write is refused, never
    guessed.

    Raises:
        ValueError: The text is no array, or has the wrong length or a value outside the task's range.
    """
    match = re.fullmatch(r"\s*\[([^\[\]]*)\]\s*", text)
    if not match:
        raise ValueError(f"The answer {text!r} is not one array in square brackets.")
    parts = [part.strip() for part in match.group(1).split(",")]
    chosen = get_task(task)
    values = []
    for part in parts:
        if part not in chosen.texts:
            raise ValueError(f"The answer holds {part!r}, which is not {chosen.answer}, as {chosen.name} asks.")
        values.append(float(part))
    if len(values) != len(action_units):
        raise ValueError(f"The answer holds {len(values)} values for {len(action_units)} Action Units.")
    return values


def known(values: Sequence[float], action_units: Sequence[ActionUnit]) -> tuple[list[float], list[ActionUnit]]:
    """Keep the units whose value is known (not NaN), as only those can be asked about in training."""
    kept = [(value, unit) for value, unit in zip(values, action_units, strict=True) if not math.isnan(value)]
    return [value for value, _ in kept], [unit for _, unit in kept]
