"""`au-llava doctor`: what is installed, what is found, whether recognition works, and how to mend what does not."""

import platform
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from PIL import Image

from . import FacialActionUnitPipeline, __version__
from .action_units import TASKS
from .face_alignment import GET_SCRFD, find_faces
from .photos import detector_name, load_pipeline, questions, recognize


PACKAGES = (  # where there are two, either will do
    "torch transformers huggingface-hub safetensors pillow numpy scikit-image insightface onnxruntime "
    "opencv-python|opencv-python-headless matplotlib pyarrow"
)


def run(arguments: Namespace) -> int:
    """Carry out the subcommand; the exit code: 0 if recognition works, 1 if not."""
    print(f"au-llava {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    print("Packages")
    for names in PACKAGES.split():
        print(_package(names.split("|")))
    sound = (
        "found" if shutil.which("ffmpeg") else "missing; without it films have no sound: install it for your system"
    )
    print(_package(["gradio"], 'without it there is no web page: pip install "au-llava[app]"'))
    print(f"  {'ffmpeg':<16} {sound}")
    print("\nChecks")
    load = cache(lambda: load_pipeline(arguments.model, arguments.device))
    checks: list[tuple[str, Callable[[], str]]] = [
        ("device", _device),
        ("model", lambda: f"{load().model.name_or_path}, {load().model.num_parameters():,} parameters"),
        ("faces", lambda: _faces(arguments.detector)),
        ("recognition", lambda: _recognition(load())),
    ]
    good = [_report(name, check) for name, check in checks]
    print("\nAll is well." if all(good) else "\nSomething is amiss; see above.")
    return 0 if all(good) else 1


def _package(names: list[str], remedy: str = "") -> str:
    for name in names:
        with suppress(PackageNotFoundError):
            return f"  {name:<16} {version(name)}"
    return f"  {names[0]:<16} missing; {remedy or f'mend: pip install {names[0]}'}"


def _report(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"  ok      {name:<12} {check()}")
        return True
    except Exception as error:  # whatever is wrong here is what the user wants to read
        print(f"  FAILED  {name:<12} {type(error).__name__}: {error}")
        return False


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory >> 30} GiB"
    if torch.backends.mps.is_available():
        return "mps: Apple's GPU"
    return f"cpu with {torch.get_num_threads()} threads; a CUDA GPU or Apple's is used where torch finds one"


def _astronaut() -> Image.Image:
    from skimage.data import astronaut

    return Image.fromarray(astronaut())


def _faces(detector: str) -> str:
    faces = find_faces(_astronaut(), detector)
    if not faces:
        raise RuntimeError("no face found in a photograph that has one; try --detector scrfd.")
    found = f"{detector_name(faces)}: {len(faces)} found in a photograph of one person"
    return f"{found}. {GET_SCRFD}" if faces[0].box and not faces[0].points else found


def _recognition(pipe: FacialActionUnitPipeline) -> str:
    asked = questions(TASKS)
    [photo] = recognize(pipe, [_astronaut()], asked, "none")
    if photo.error:
        raise RuntimeError(photo.error)
    count = sum(len(faces[0]["action_units"]) for faces in photo.answers)
    return f"{count} answers to {len(asked)} questions about a photograph"
