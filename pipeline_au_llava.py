"""`pipeline("facial-action-units")`: from a photograph to the Action Units of every face in it."""
# mypy: disable-error-code="override, assignment, operator"
# The base class passes one anonymous value from stage to stage; here each stage names and types what it takes.

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from io import IOBase
from numbers import Integral

import torch
from transformers import Pipeline
from transformers.utils import PROCESSOR_NAME, cached_file, logging

from .action_units import TASKS, ActionUnit, get_task, select
from .answers_au_llava import each_once
from .evidence_au_llava import on_crop
from .face_alignment import ENCODED, Face, find_faces, open_image
from .processing_au_llava import AuLlavaProcessor
from .recognition_au_llava import Recognition


logger = logging.get_logger(__name__)


class FacialActionUnitPipeline(Pipeline):
    """Finds the faces of a photograph, aligns them, and recognises their Action Units.

    Call it with a path, URL, PIL image, array, or many of them (a list, a column of a data set or table, a stack of
    arrays; or a generator, whose answers come one by one), and:

        task (`str`, defaults to `"detection"`): `detection` (0 or 1), `intensity_level` (0 to 5) or `intensity` (0 to
            1). action_units (defaults to the task's preset): A preset, codes (`"AU1,AU12"`), or a list with your own
            [`ActionUnit`]s in it.
        detector (`str`, defaults to `"auto"`): `auto`, `scrfd`, `cascade`, `none` (the picture is a face crop
            already), or the path of an SCRFD `.onnx` file.
        calibrated (`bool`, defaults to `True`): Use the checkpoint's temperatures and thresholds, where it has them.
        max_faces (`int`, *optional*): Keep at most so many faces of a photograph, the largest first.
        batch_size (`int`, defaults to 8): Faces that go through the model together. When memory runs out, half as many
            from then on.
        num_workers (`int`, defaults to 1): Threads that open photographs and find faces while the model is at work; 0
            for one after the other.
        readout (`str`, defaults to `"exact"`): `"exact"`, or `"parallel"` for one pass through a model trained for it;
            see [`recognize`].
        decision (`str`, defaults to `"mode"`): `"mode"`, `"mean"` or `"median"` of each unit's distribution; see
            [`Recognition.decide`].
        mirror (`bool`, *optional*): Also ask about each face's mirror image and join both answers: twice the work, and
            fewer errors. By default what the checkpoint's processor says.
        static_shapes (`bool`, defaults to `False`): Fill every batch up, so that a compiled model meets few shapes.
        return_evidence (`bool` or `str`, defaults to `False`): Also tell where the model looked: `True` or
            `"attention"`, or `"occlusion"`, slower and more faithful; see [`find_evidence`].

    Returns:
        For one photograph a list of faces, largest first, each `{"box": [x0, y0, x1, y1] in pixels or None, "score": 0
        to 1 or None, "task": ..., "action_units": {"AU12": {"name", "value", "probability", "expected_value"}, ...}}`,
        for `detection` also with the `"threshold"` from which on a unit is called present, for the others, where the
        checkpoint is calibrated, with the `"interval"`, `[low, high]`, in which the truth lies nine times in ten.
        With `return_evidence` each Action Unit also has `"evidence"`, 16 rows of 16 numbers that sum to 1 (or to 0,
        where no place mattered): what share of the answer rests on each patch of the face crop.
        For many, a list of those; the entry of a photograph that could not be read is `{"error": "..."}` instead.

    Example:

    >>> # pipe = pipeline("facial-action-units", model="path/or/hub-id", trust_remote_code=True)
    >>> # pipe("portrait.jpg", task="intensity_level")[0]["action_units"]["AU12"]["value"]
    """

    processor: AuLlavaProcessor

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # For an adapter transformers loads the base's processor, with the base's lists and calibration, unless another
        # is named.
        adapter, access = self.model.adapter, self.model.adapter_access
        optional = access | {"_raise_exceptions_for_missing_entries": False}
        of_base = self.processor.loaded_by_pipeline == self.model.name_or_path
        if adapter is not None and of_base and cached_file(adapter, PROCESSOR_NAME, **optional):
            self.processor = AuLlavaProcessor.from_pretrained(adapter, **access)
        self._affordable = sys.maxsize  # faces that memory has room for at once, once it has run out
        config = self.model.config
        given = (self.processor.image_token_id, self.processor.image_tokens)
        wanted = (config.image_token_id, config.image_seq_length)
        if given != wanted:
            raise ValueError(
                f"The processor (image token id {given[0]}, {given[1]} of them a picture) does not match the model "
                f"(image token id {wanted[0]}, {wanted[1]} of them a picture); load both from one folder."
            )

    def _sanitize_parameters(
        self, task=None, action_units=None, detector=None, max_faces=None, calibrated=None, return_evidence=None,
        readout=None, decision=None, static_shapes=None, mirror=None,
    ):  # fmt: skip
        question = {
            "task": task, "action_units": action_units, "calibrated": calibrated, "return_evidence": return_evidence,
            "readout": readout, "decision": decision, "static_shapes": static_shapes, "mirror": mirror,
        }  # fmt: skip
        search = {"detector": detector, "max_faces": max_faces}
        question, search = ({k: v for k, v in group.items() if v is not None} for group in (question, search))
        return search, question, {}

    def __call__(self, images, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs):
        search, question, _ = self._sanitize_parameters(**kwargs)
        search, question = self._preprocess_params | search, self._forward_params | question
        usual = self.task if self.task in TASKS else "detection"  # which the base class keeps from the parameters
        task = get_task(question.pop("task", usual)).name
        question["questions"] = [(task, select(question.pop("action_units", None), task))]
        size = _count("batch_size", 1, batch_size, self._batch_size, 8)
        workers = _count("num_workers", 0, num_workers, self._num_workers, 1)
        # A picture may be a string, a file or an array itself. Columns of data sets have items, but need not be
        # iterable.
        dimensions = getattr(images, "ndim", None)
        single = isinstance(images, (str, IOBase, Mapping, *ENCODED)) or dimensions not in (None, 1, 4)
        if not single and hasattr(images, "__getitem__"):
            # Arrays and columns of tables hold their pictures, and need not count them from 0; columns of streams
            # cannot be counted.
            items = _each(images) if dimensions is None and isinstance(images, Sized) else images
            return list(self._stream(items, search, question, size, workers))
        if not single and isinstance(images, Iterable):
            return self._stream(images, search, question, size, workers)
        faces = self.preprocess(images, **search)
        (answers,) = self._forward(faces, **question, batch_size=size)
        return self.postprocess(faces, answers, task)

    def _stream(self, images: Iterable, search: dict, question: dict, size: int, workers: int) -> Iterator:
        """Photographs in, results out in the same order, with faces of several photographs sharing a batch."""
        waiting: list[list[Face] | Exception] = []

        def flush() -> Iterator:
            faces = [face for entry in waiting if not isinstance(entry, Exception) for face in entry]
            (found,) = self._forward(faces, **question, batch_size=size)
            answers, task = iter(found), question["questions"][0][0]
            for entry in waiting:
                if isinstance(entry, Exception):
                    yield {"error": str(entry)}
                else:
                    yield self.postprocess(entry, [next(answers) for _ in entry], task)
            waiting.clear()

        def prepare(numbered: tuple) -> list[Face] | Exception:
            number, image = numbered
            if isinstance(image, Exception):
                return image
            try:
                photograph = open_image(image)
            except (OSError, ValueError) as error:  # this one is lost, the others are not
                return error
            return self.preprocess(photograph, name=_name(image, number), **search)

        for entry in _ahead(prepare, enumerate(images, 1), workers, size):
            waiting.append(entry)
            if sum(len(entry) for entry in waiting if isinstance(entry, list)) >= size or len(waiting) >= 4 * size:
                yield from flush()
        yield from flush()

    def preprocess(self, image, detector="auto", max_faces: int | None = None, name: str | None = None) -> list[Face]:
        """Open a photograph and find its faces; `name` is what a warning calls it."""
        faces = find_faces(open_image(image), detector=detector, max_faces=max_faces)
        if not faces:
            logger.warning(f"No face found in {name or _name(image)}.")
        return faces

    def _forward(
        self,
        faces: list[Face],
        questions: list[tuple[str, list[ActionUnit]]],
        batch_size: int,
        calibrated: bool = True,
        static_shapes: bool = False,
        mirror: bool | None = None,
        **how,
    ) -> list[list[dict]]:
        """For each question, a task and its Action Units, the answers about all faces; `how` goes to [`recognize`].

        Some faces at a time go through the model. Each is encoded once for all questions. A question may be put as
        several, or as another that is put anyway; see [`AuLlavaProcessor.questions`].
        """
        how |= {"static_shapes": static_shapes, "mirror": self.processor.mirror if mirror is None else mirror}
        wanted = [self.processor.questions(task, units) for task, units in questions]
        asked = each_once(wanted)
        grammars = [self.processor.grammar(task, whole) for task, whole in asked]
        prompts = [
            self.processor(images=face.crop, task=task, action_units=whole)["input_ids"]
            for face in faces[:1]  # a question's prompt is the same for each
            for task, whole in asked
        ]
        answers: list[list[dict]] = [[] for _ in questions]
        start = 0
        while start < len(faces):
            size = min(batch_size, self._affordable)
            crops = [face.crop for face in faces[start : start + size]]
            filling = crops[-1:] * (size - len(crops)) if static_shapes else []
            try:
                recognitions = list(self._recognize(crops + filling, prompts, grammars, **how))
            except RuntimeError as error:
                together = len(crops + filling)
                if together == 1 or not _out_of_memory(error):
                    raise
                self._affordable = together // 2
                logger.warning(f"Memory ran out at {together} faces; going on with {self._affordable} at a time.")
                continue
            for found, own, (task, units) in zip(answers, wanted, questions, strict=True):
                known: list[dict[str, dict]] = [{} for _ in crops]
                for about, whole in own:
                    named = self._named(recognitions[asked.index((about, whole))], about, task, whole, calibrated)
                    for answer, more in zip(known, named, strict=False):  # not of what fills the batch up
                        # By what was asked, for a unit of the user's own may have another's code that is in a list.
                        answer.update({unit.line(): more[unit.code] for unit in whole} | answer)
                found += [{unit.code: answer[unit.line()] for unit in units} for answer in known]
            start += len(crops)
        return answers

    def _named(
        self, recognition: Recognition, about: str, task: str, units: list[ActionUnit], calibrated: bool
    ) -> list[dict[str, dict]]:
        """For each face what the answers to one task, `about`, say of another, with evidence where there is some."""
        told = self.processor.told(recognition, about, task, units, calibrated)
        named = self.processor.read(told, task, units, calibrated)
        if recognition.evidence is not None:
            maps = on_crop(recognition.evidence.cpu().double(), self.processor.view).round(decimals=6)
            for answer, own in zip(named, maps.tolist(), strict=True):
                for unit, cells in zip(answer.values(), own, strict=True):
                    unit["evidence"] = cells
        return named

    def _recognize(self, crops: list, prompts: list, grammars: list, mirror: bool, **how) -> Iterator:
        """A [`Recognition`] for each question about the same crops."""
        pixels = self.processor.image_processor(crops, return_tensors="pt")["pixel_values"]
        encoded = self.model.encode(pixels, mirror)
        for prompt, grammar in zip(prompts, grammars, strict=True):
            rows = prompt.expand(len(crops), -1)
            yield self.model.recognize(rows, pixels, grammar, encoded=encoded, mirror=mirror, **how)

    def postprocess(self, faces: list[Face], answers: list[dict], task: str) -> list[dict]:
        """Join each face's place with its answer."""
        return [
            {
                "box": None if face.box is None else [round(float(side), 1) for side in face.box],
                "score": None if face.score is None else round(float(face.score), 4),
                "task": task,
                "action_units": answer,
            }
            for face, answer in zip(faces, answers, strict=True)
        ]

    def save_pretrained(self, save_directory, **kwargs):
        """Write model, processor and all their code into one folder that `pipeline` loads again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _count(name: str, least: int, *given) -> int:
    """The first number that was given; `None` was not."""
    number = next(number for number in given if number is not None)
    if not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name} is {number!r}; give a whole number, {least} or more.")
    return int(number)


def _each(images) -> Iterable:
    """The items of what holds many; in place of one that cannot be had, why.

    A column of a data set opens its pictures as they are asked for, and ends at one that is damaged.
    """

    def one(place: int):
        try:
            return images[place]
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, the last for a PNG
            return error

    return map(one, range(len(images)))


def _ahead(function: Callable, items: Iterable, workers: int, distance: int) -> Iterator:
    """What `function` makes of each item, in order, made by threads up to `distance` items ahead of who asks."""
    if workers == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > distance:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator or the machine itself had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _name(image, number: int | None = None) -> str:
    """What to call a picture in a message; `number` tells which of a list, the first being 1."""
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return f"the {type(image).__name__} given" + (f" as number {number}" if number else "")
