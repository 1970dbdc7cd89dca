"""From labels to instruction samples: the question T as `prompt`, the answer array A as `completion`.

A row of every data set of the project has the columns of [`FEATURES`]. `labels` and `action_units` hold all that is
known about the frame, in the data set's order, with NaN for unknown; `prompt` and `completion` are one question about
it, as messages with plain string content, which TRL's `SFTTrainer` takes as they are.

Example:

>>> sample = instruct({"AU6": 1.0, "AU7": float("nan"), "AU12": 0.0}, "detection")
>>> sample["completion"]
[{'role': 'assistant', 'content': '[1, 0]'}]
>>> "AU7" in sample["prompt"][0]["content"]
False
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value, interleave_datasets

from ..action_units import ActionUnit, describe, get_task, known, select, write_answer


MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "labels": List(Value("float64")),
        "action_units": List(Value("string")),
        "task": Value("string"),
        "dataset": Value("string"),
        "subject": Value("string"),
        "sequence": Value("string"),
        "frame": Value("int32"),
    }
)

Labels = Mapping[str | ActionUnit, float]


@dataclass(frozen=True)
class Relations:
    """Which Action Units go together, learnt from training labels; see [`learn_relations`].

    Args:
        links (`tuple`): `(a, b, conditional, phi)`, strongest first: two codes, the share of frames with `b` active
            among those with `a` active (0 to 1), and the pair's correlation phi (-1 to 1).
    """

    links: tuple[tuple[str, str, float, float], ...]

    def sentence(self, action_units: Sequence[ActionUnit], most: int = 6) -> str:
        """The sentence added to T: the `most` strongest links between the units asked about, or nothing.

        >>> Relations((("AU6", "AU12", 0.85, 0.54),)).sentence(select("AU6,AU12"))
        'In the training data: when AU6 is active, AU12 is active in 85 % of frames.'
        """
        asked = {unit.code for unit in action_units}
        told = [link for link in self.links if {link[0], link[1]} <= asked][:most]
        clauses = [f"when {a} is active, {b} is active in {round(100 * share)} % of frames" for a, b, share, _ in told]
        return f"In the training data: {'; '.join(clauses)}." if clauses else ""


def learn_relations(
    labels: np.ndarray, codes: Sequence[str], active_from: float, least_phi: float = 0.25, least_negative: float = 0.1
) -> Relations:
    """Conditional co-occurrence of Action Units. Give the labels of training subjects only, never of test subjects.

    Args:
        labels (`np.ndarray` of shape `(frames, units)`): NaN for unknown; a pair is counted where both are known.
        codes (`Sequence[str]`): The columns' Action Units.
        active_from (`float`): From which value on a unit counts as active: 1 for `detection`, 2 for DISFA's levels.
        least_phi (`float`, *optional*, defaults to 0.25): The least correlation of a pair that is told.
        least_negative (`float`, *optional*, defaults to 0.1): The same for pairs that exclude each other.

    Raises:
        ValueError: `labels` has not one column per code.

    Example:

    >>> smiles = np.array([[1, 1], [1, 1], [0, 0], [0, 1]])
    >>> learn_relations(smiles, ["AU6", "AU12"], active_from=1).links[0][:3]
    ('AU6', 'AU12', 1.0)
    """
    if labels.ndim != 2 or labels.shape[1] != len(codes):
        raise ValueError(f"labels of shape {labels.shape} for {len(codes)} codes; give (frames, {len(codes)}).")
    seen = ~np.isnan(labels)
    active = np.where(seen, labels, -np.inf) >= active_from
    seen, active = seen.astype(np.float64), active.astype(np.float64)
    # Entry (a, b) of each: frames where both are known; of these, those with a, with b, and with both active.
    frames, first, second, both = seen.T @ seen, active.T @ seen, seen.T @ active, active.T @ active
    with np.errstate(divide="ignore", invalid="ignore"):
        share = both / first
        phi = (frames * both - first * second) / np.sqrt(first * (frames - first) * second * (frames - second))
    links = [
        (codes[a], codes[b], float(share[a, b]), float(phi[a, b]))
        for a, b in permutations(range(len(codes)), 2)
        # Of a pair's two directions the more telling one: the larger share of a friend, the smaller of a foe.
        if (phi[a, b] >= least_phi and (share[a, b], b) > (share[b, a], a))
        or (phi[a, b] <= -least_negative and (share[a, b], a) < (share[b, a], b))
    ]
    return Relations(tuple(sorted(links, key=lambda link: -abs(link[3]))))


def relations_in(rows: Dataset) -> Relations:
    """How all Action Units of some rows go together; a unit is active above the task's least value.

    Args:
        rows (`Dataset`): Of training subjects only.
    """
    rows = rows.select_columns(["task", "action_units", "labels"])
    codes = list(dict.fromkeys(code for units in rows["action_units"] for code in units))
    place, present = {code: number for number, code in enumerate(codes)}, np.full((len(rows), len(codes)), np.nan)
    for frame, row in enumerate(rows):
        values, low = np.array(row["labels"]), get_task(row["task"]).values[0]
        columns = [place[code] for code in row["action_units"]]
        present[frame, columns] = np.where(np.isnan(values), np.nan, values > low)
    return learn_relations(present, codes, active_from=1)


def lists_in(rows: Dataset) -> dict[str, list[list[str]]]:
    """By task, the lists of Action Units that some rows ask about, for [`AuLlavaProcessor`]'s `trained_lists`.

    What most rows of a task ask about stands first, and of two lists that equally many ask about, the longer one. A
    list that less than one row in a hundred asks about is left out, unless there is no other: it is hardly learnt, and
    where labels are unknown here and there, every combination makes one.

    Example:

    >>> row = {"task": "detection", "action_units": ["AU1", "AU6", "AU12"], "labels": [1.0, float("nan"), 0.0]}
    >>> lists_in(Dataset.from_list([row]))
    {'detection': [['AU1', 'AU12']]}
    """
    columns = zip(rows["task"], rows["action_units"], rows["labels"], strict=True)
    asked: dict[str, Counter[tuple[str, ...]]] = {}
    for task, codes, labels in columns:
        known = tuple(code for code, label in zip(codes, labels, strict=True) if label == label)  # not NaN
        asked.setdefault(task, Counter())[known] += 1
    found = {}
    for task, counts in sorted(asked.items()):
        order = sorted((-count, -len(codes), codes) for codes, count in counts.items())
        often = [part for part in order if -part[0] >= counts.total() / 100]
        found[task] = [list(codes) for *_, codes in often or order[:1]]
    return found


@dataclass(frozen=True)
class Question:
    """How a question is put.

    Args:
        shuffle (`bool`, *optional*, defaults to `False`): Ask about the units in random order.
        subset (`float`, *optional*, defaults to 0): The share of questions (0 to 1) that ask about a random part of
            the units, of random size, so that the model learns to answer any selection.
        relations ([`Relations`], *optional*): Told in T.
    """

    shuffle: bool = False
    subset: float = 0.0
    relations: Relations | None = None


def instruct(
    labels: Labels,
    task: str,
    action_units: "str | Iterable[str | ActionUnit] | None" = None,
    question: Question = Question(),  # noqa: B008 (frozen)
    generator: np.random.Generator | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Turn labels into one question and its answer, both written by `action_units.py`.

    Args:
        labels (`Mapping[str | ActionUnit, float]`): Values by Action Unit or its code, in the task's range. NaN or a
            missing unit means unknown, and is not asked about.
        task (`str`): `detection`, `intensity_level` or `intensity`.
        action_units (*optional*): Which units to ask about, see [`select`]; all of `labels` by default.
        question ([`Question`], *optional*): Order, subsets, relations.
        generator (`np.random.Generator`, *optional*): Needed for a `question` that shuffles or takes subsets.

    Returns:
        `dict`: `prompt` and `completion`, each a list with one message.

    Raises:
        ValueError: No asked label is known, a value is out of range, or a generator is missing.
    """
    units, numbers = ask(labels, task, action_units, question, generator)
    relations = question.relations.sentence(units) if question.relations else ""
    return {
        "prompt": [{"role": "user", "content": describe(task, units, relations)}],
        "completion": [{"role": "assistant", "content": write_answer(numbers, task, units)}],
    }


def ask(
    labels: Labels,
    task: str,
    action_units: "str | Iterable[str | ActionUnit] | None" = None,
    question: Question = Question(),  # noqa: B008 (frozen)
    generator: np.random.Generator | None = None,
) -> tuple[list[ActionUnit], list[float]]:
    """Choose the units that a question is about, with their values; takes and raises what [`instruct`] does."""
    values = {unit.code: value for unit, value in zip(select(list(labels)), labels.values(), strict=True)}
    asked = select(list(labels) if action_units is None else action_units, task)
    numbers, units = known([values.get(unit.code, float("nan")) for unit in asked], asked)
    if not units:
        raise ValueError(f"None of {', '.join(unit.code for unit in asked)} has a known label; leave this frame out.")
    if question.shuffle or question.subset:
        if generator is None:
            raise ValueError("Shuffled or partial questions need `generator`, such as numpy.random.default_rng(0).")
        order = _pick(len(units), question, generator)
        numbers, units = [numbers[index] for index in order], [units[index] for index in order]
    return units, numbers


def _pick(count: int, question: Question, generator: np.random.Generator) -> np.ndarray:
    """Indices of the units to ask about, in the order of asking."""
    order = generator.permutation(count)
    if generator.random() < question.subset:
        order = order[: generator.integers(1, count + 1)]
    return order if question.shuffle else np.sort(order)


def make_row(image, labels: Labels, task: str, sample: dict, **origin) -> dict:
    """One row of [`FEATURES`].

    Args:
        image: An aligned face crop, for training finds no faces, as `datasets.Image` takes it: a PIL image, a path, or
            `{"bytes": ..., "path": ...}`.
        sample (`dict`): What [`instruct`] made of `labels` and `task`.
        origin: `dataset`, `subject`, `sequence`, `frame`.
    """
    codes = [unit.code for unit in select(list(labels))]
    return {"images": [image], **sample, "labels": list(labels.values()), "action_units": codes, "task": task} | origin


class FreshSamples:
    """Makes a new question, on a newly augmented picture, each time a row is read: for `Dataset.with_transform`.

    Rows need no `prompt` and `completion` of their own, so it also takes prepared crops as they lie in their shards.

    Random numbers come from numpy's global generator, because `transformers` seeds it, gives each worker process its
    own, and restores it when a training run is resumed.

    Args:
        augment (`Augmentation`, *optional*): Called with picture, labels and generator; see `augmentation.py`.
        question ([`Question`], *optional*): Order, subsets, relations.
        action_units (`Sequence[ActionUnit]`, *optional*): Units of your own that the rows' codes refer to.

    Example:

    >>> fresh = FreshSamples(question=Question(shuffle=True, subset=0.5))
    >>> train = train.with_transform(fresh)  # doctest: +SKIP
    """

    def __init__(
        self,
        augment: Callable | None = None,
        question: Question = Question(),  # noqa: B008 (frozen)
        action_units: Sequence[ActionUnit] = (),
    ):
        self.augment, self.question = augment, question
        self.own = {unit.code: unit for unit in action_units}

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        fresh = [self._row(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        return {name: [row[name] for row in fresh] for name in fresh[0]}

    def _row(self, row: dict) -> dict:
        generator = np.random.default_rng(np.random.randint(2**31))
        units = select([self.own.get(code, code) for code in row["action_units"]])
        labels, image = dict(zip(units, row["labels"], strict=True)), row["images"][0]
        if self.augment:
            image, labels = self.augment(image, labels, generator)
        sample = instruct(labels, row["task"], question=self.question, generator=generator)
        return row | make_row(image, labels, row["task"], sample)


def mix(
    parts: Sequence[Dataset] | Sequence[IterableDataset],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
) -> Dataset | IterableDataset:
    """Interleave data sets and tasks, so that one model learns all three answer formats.

    Args:
        parts: Data sets with the columns of [`FEATURES`].
        weights (`Sequence[float]`, *optional*): How often each is drawn, relative to the others; equal by default.
        seed (`int`, *optional*, defaults to 0): Seeds the draws.
        stopping_strategy (`str`, *optional*): With `all_exhausted` every row appears at least once and small sets
            repeat; with `first_exhausted` the shortest one ends the mixture.

    Raises:
        ValueError: A weight is not positive, or there is not one per data set.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    if len(weights) != len(parts) or not all(weight > 0 for weight in weights):
        raise ValueError(f"weights {list(weights)} for {len(parts)} data sets; give each one a positive weight.")
    return interleave_datasets(
        [part if part.features == FEATURES else part.cast(FEATURES) for part in parts],  # to cast writes all anew
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy=stopping_strategy,
    )
