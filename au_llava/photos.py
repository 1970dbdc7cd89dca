"""Photographs in, faces with the answers to several questions out: what every subcommand that recognises shares."""

import hashlib
import json
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, PROCESSOR_NAME, cached_file, find_adapter_config_file, logging
from transformers.utils.hub import extract_commit_hash

from . import (
    AuLlavaForConditionalGeneration,
    AuLlavaProcessor,
    FacialActionUnitPipeline,
    __version__,
    default_checkpoint,
)
from .action_units import ActionUnit, get_task, select
from .face_alignment import Face, find_faces, open_image, which_detector


Question = tuple[str, list[ActionUnit]]


@dataclass
class Photo:
    """One picture and what was found in it.

    Args:
        source: What was asked for: a path, URL, array or PIL image.
        image: The upright picture; `None` if it could not be opened.
        faces: Its faces, largest first.
        answers: One list a question, with one entry a face, as [`FacialActionUnitPipeline`] gives them.
        error: Why the picture could not be read, in words.
    """

    source: Any
    image: Image.Image | None = None
    faces: list[Face] = field(default_factory=list)
    answers: list[list[dict]] = field(default_factory=list)
    error: str | None = None


def load_pipeline(model: str | None = None, device: str | None = None) -> FacialActionUnitPipeline:
    """Load a model or an adapter, from a folder or by its Hub id, by default the checkpoint of the package.

    The package's own code is used, not what lies beside the weights.

    Raises:
        ValueError: There is no AU-LLaVA at that place, or its files are damaged; or torch cannot use the device.
    """
    try:
        torch.empty(1, device=device or "cpu")
    except Exception as error:  # each kind of device has errors of its own
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device {device!r} cannot be used ({reason}); give cpu, or leave it out.") from error
    logging.disable_progress_bar()
    place = model or default_checkpoint()
    remedy = "give a folder that save_pretrained wrote or the id of an AU-LLaVA on the Hub"
    try:
        files = {path.name for path in Path(place).glob("*.json")}
        if Path(place).is_dir() and not files & {"config.json", ADAPTER_CONFIG_NAME}:
            raise FileNotFoundError("the folder holds no config.json")
        if not Path(place).is_dir() and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
            raise FileNotFoundError("there is no such folder")
        adapter = find_adapter_config_file(place)
        base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else place
        kind = PreTrainedConfig.get_config_dict(base)[0].get("model_type")
        if kind != "au_llava":
            raise ValueError(f"its config.json says model_type {kind!r}")
        network = AuLlavaForConditionalGeneration.from_pretrained(place)
        network.name_or_path = place  # an adapter's, where transformers tells its base's
        pipe = FacialActionUnitPipeline(network, processor=AuLlavaProcessor.from_pretrained(place), device=device)
        # Much damage, and files that do not belong together, show in use only.
        task, (units, *_) = next(iter(pipe.processor.trained_lists.items()), ("detection", [["AU1"]]))
        (face,) = pipe(Image.new("RGB", (224, 224)), task=task, action_units=units, detector="none")
        if not all(isfinite(unit["probability"]) for unit in face["action_units"].values()):
            raise ValueError("its weights give no numbers")
        return pipe
    except Exception as error:  # loaders raise whatever they like
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".:")
        raise ValueError(f"{place}: no model could be loaded ({reason}); {remedy}.") from error


def questions(tasks: Iterable[str], action_units: str | None = None) -> list[Question]:
    """Each task with its Action Units: those given, else the task's own preset."""
    return [(get_task(task).name, select(action_units, task)) for task in tasks]


def check_detector(detector: str) -> str:
    """Try the detector on an empty picture, so that a wrong name or a missing model shows before any work.

    Returns:
        `str`: What it is on this machine, see [`which_detector`].
    """
    try:
        find_faces(Image.new("RGB", (64, 64)), detector)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return which_detector(detector)


def recognize(
    pipe: FacialActionUnitPipeline,
    sources: Iterable[Any],
    asked: list[Question],
    detector: str = "auto",
    max_faces: int | None = None,
    batch_size: int = 8,
    opened: Callable[[Any], Image.Image] = open_image,
    **how,
) -> Generator[Photo, None, None]:
    """Find the faces of every picture once and ask each question about them.

    Pictures are opened and searched on a thread of their own while the model works on the ones before. Faces of
    several pictures share a batch. A picture that cannot be read gives a [`Photo`] with its error; the others go on.
    `opened` makes a source an upright picture; `how` holds the pipeline's `readout`, `mirror` and `return_evidence`.
    """

    def found(source: Any) -> Photo:
        try:
            if isinstance(source, str) and Path(source).is_dir():
                raise ValueError(f"{source}: this folder holds no pictures; check the path.")
            image = opened(source)
            return Photo(source, image, find_faces(image, detector, max_faces))
        except (OSError, ValueError) as error:
            return Photo(source, error=str(error))

    waiting: list[Photo] = []
    for photo in _ahead(map(found, sources)):
        waiting.append(photo)
        if sum(len(photo.faces) for photo in waiting) >= batch_size or len(waiting) >= batch_size:
            yield from _answered(pipe, waiting, asked, batch_size, how)
            waiting = []
    yield from _answered(pipe, waiting, asked, batch_size, how)


def _ahead(items: Iterator[Photo], depth: int = 2) -> Iterator[Photo]:
    """The items of an iterator, made on another thread, `depth` of them in advance."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item


def _answered(pipe, photos: list[Photo], asked: list[Question], batch_size: int, how: dict) -> list[Photo]:
    faces = [face for photo in photos for face in photo.faces]
    answers = pipe.forward(faces, questions=asked, batch_size=batch_size, **how)
    for (task, _), found in zip(asked, map(iter, answers), strict=True):
        for photo in photos:
            photo.answers.append(pipe.postprocess(photo.faces, [next(found) for _ in photo.faces], task))
    return photos


def detector_name(faces: list[Face]) -> str:
    """What found these faces, as people may read it."""
    if not faces:
        return "no face found"
    if faces[0].points:
        return "SCRFD, crops aligned by five points"
    return "LBP cascade, crops by box" if faces[0].box else "none: each picture is a face crop"


# Of a model's folder, what its answers hang on: weights; and settings, the calibration among them.
_FILES = {
    "weights": ("*.safetensors",),
    "settings": ("*config.json", "chat_template.jinja", "tokenizer.*"),
}


def _version_of(place: str) -> dict[str, str]:
    """Checksums of what lies in a model's folder, or the commit of a model from the Hub."""
    if not Path(place).is_dir():
        return {"commit": str(extract_commit_hash(cached_file(place, PROCESSOR_NAME), None))}
    entry = {}
    for what, patterns in _FILES.items():
        files = sorted(path for pattern in patterns for path in Path(place).glob(pattern))
        if files:
            states = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            entry[f"{what} SHA-256"] = _checksum(*states)
    return entry


@lru_cache(maxsize=8)  # the web page wants it with each answer, and a large model's takes longer than those
def _checksum(*files: tuple[Path, int, int]) -> str:
    """The first 16 digits of files' checksum; each comes with what tells that it has not changed: size and time."""
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            while part := file.read(1_000_000):
                digest.update(part)
    return digest.hexdigest()[:16]


def provenance(pipe: FacialActionUnitPipeline, detector: str) -> dict[str, str]:
    """What produces the numbers: model, checksums of its weights and settings, versions, detector and date."""
    place = pipe.model.name_or_path
    entry = {"model": place} | _version_of(place)
    if pipe.model.adapter is not None:
        base = pipe.model.peft_config["default"].base_model_name_or_path
        entry |= {"base": base} | {f"base's {what}": known for what, known in _version_of(base).items()}
    entry["parameters"] = f"{pipe.model.num_parameters():,}"
    entry["device"] = f"{pipe.model.device.type}, {str(pipe.model.dtype).removeprefix('torch.')}"
    if limits := pipe.processor.calibration.get("detection", {}).get("thresholds"):
        least = ", ".join(f"{code} {limit:.2f}" for code, limit in limits.items())
        entry["present from a probability of"] = f"{least}; other units 0.50"
    entry["detector"] = detector
    packages = ("torch", "transformers", "insightface", "scikit-image", "pillow")
    versions = [f"{name} {version(name)}" for name in packages]
    entry["versions"] = ", ".join([f"au-llava {__version__}", *versions, f"Python {platform.python_version()}"])
    entry["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return entry
