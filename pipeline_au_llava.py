"""`pipeline("facial-action-units")`: from a photograph to the Action Units of every face in it."""
# mypy: disable-error-code="override, assignment, operator"
# The base class passes one anonymous value from stage to stage; here each stage names and types what it takes.

import os
from collections.abc import Iterable, Iterator

from transformers import Pipeline
from transformers.utils import logging

from .action_units import select
from .face_alignment import Face, find_faces, open_image
from .processing_au_llava import AuLlavaProcessor


logger = logging.get_logger(__name__)


class FacialActionUnitPipeline(Pipeline):
    """Finds the faces of a photograph, aligns them, and recognises their Action Units.

    Call it with a path, URL, PIL image, array, or a list or generator of them, and:

        task (`str`, defaults to `"detection"`): `detection` (0 or 1), `intensity_level` (0 to 5) or `intensity` (0 to
            1). action_units (defaults to the task's preset): A preset, codes (`"AU1,AU12"`), or a list with your own
            [`ActionUnit`]s in it.
        detector (`str`, defaults to `"auto"`): `auto`, `scrfd`, `cascade`, `none` (the picture is a face crop
            already), or the path of an SCRFD `.onnx` file.
        calibrated (`bool`, defaults to `True`): Use the checkpoint's temperatures and thresholds, where it has them.
        max_faces (`int`, *optional*): Keep at most so many faces of a photograph, the largest first.
        batch_size (`int`, defaults to 8): Faces that go through the model together.
        return_evidence (`bool` or `str`, defaults to `False`): Also tell where the model looked: `True` or
            `"attention"`, or `"occlusion"`, slower and more faithful; see [`find_evidence`].

    Returns:
        For one photograph a list of faces, largest first, each `{"box": [x0, y0, x1, y1] in pixels or None, "score": 0
        to 1 or None, "task": ..., "action_units": {"AU12": {"name", "value", "probability", "expected_value"}, ...}}`.
        With `return_evidence` each Action Unit also has `"evidence"`, 16 rows of 16 numbers that sum to 1 (or to 0,
        where no place mattered): what share of the answer rests on each patch of the face crop.
        For a list, a list of those; the entry of a photograph that could not be read is `{"error": "..."}` instead.

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
        config = self.model.config
        given = (self.processor.image_token_id, self.processor.image_tokens)
        wanted = (config.image_token_id, config.image_seq_length)
        if given != wanted:
            raise ValueError(
                f"The processor (image token id {given[0]}, {given[1]} of them a picture) does not match the model "
                f"(image token id {wanted[0]}, {wanted[1]} of them a picture); load both from one folder."
            )

    def _sanitize_parameters(
        self, task=None, action_units=None, detector=None, max_faces=None, calibrated=None, return_evidence=None
    ):
        question = {"task": task, "action_units": action_units, "calibrated": calibrated}
        question["return_evidence"] = return_evidence
        search = {"detector": detector, "max_faces": max_faces}
        question, search = ({k: v for k, v in group.items() if v is not None} for group in (question, search))
        return search, question, {}

    def __call__(self, images, batch_size: int | None = None, **kwargs):
        search, question, _ = self._sanitize_parameters(**kwargs)
        search, question = self._preprocess_params | search, self._forward_params | question
        task = question.get("task", "detection")
        question |= {"task": task, "action_units": select(question.get("action_units"), task)}
        size = next(number for number in (batch_size, self._batch_size, 8) if number is not None)
        if size < 1:
            raise ValueError(f"batch_size is {size}; give 1 or more.")
        if isinstance(images, (list, tuple)):
            return list(self._stream(images, search, question, size))
        if isinstance(images, Iterator):
            return self._stream(images, search, question, size)
        faces = self.preprocess(images, **search)
        return self.postprocess(faces, self._forward(faces, **question, batch_size=size), task)

    def _stream(self, images: Iterable, search: dict, question: dict, size: int) -> Iterator:
        """Photographs in, results out in the same order, with faces of several photographs sharing a batch."""
        waiting: list[list[Face] | Exception] = []

        def flush() -> Iterator:
            faces = [face for entry in waiting if not isinstance(entry, Exception) for face in entry]
            answers = iter(self._forward(faces, **question, batch_size=size))
            for entry in waiting:
                if isinstance(entry, Exception):
                    yield {"error": str(entry)}
                else:
                    yield self.postprocess(entry, [next(answers) for _ in entry], question["task"])
            waiting.clear()

        for image in images:
            try:
                photograph = open_image(image)
            except (OSError, ValueError) as error:  # this one is lost, the others are not
                waiting.append(error)
            else:
                waiting.append(self.preprocess(photograph, name=_name(image), **search))
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
        task: str,
        action_units: list,
        batch_size: int,
        calibrated: bool = True,
        return_evidence: bool | str = False,
    ) -> list[dict]:
        """Recognise the Action Units of faces, some at a time."""
        grammar, answers = self.processor.grammar(task, action_units), []
        for start in range(0, len(faces), batch_size):
            crops = [face.crop for face in faces[start : start + batch_size]]
            inputs = self.processor(images=crops, task=task, action_units=action_units)
            recognition = self.model.recognize(**inputs, grammar=grammar, return_evidence=return_evidence)
            answers += self.processor.read(recognition, task, action_units, calibrated)
            if recognition.evidence is not None:
                for answer, maps in zip(answers[start:], recognition.evidence.double().round(decimals=6), strict=True):
                    for unit, cells in zip(answer.values(), maps.tolist(), strict=True):
                        unit["evidence"] = cells
        return answers

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


def _name(image) -> str:
    """What to call a picture in a message."""
    return str(image) if isinstance(image, (str, os.PathLike)) else f"the {type(image).__name__} given"
