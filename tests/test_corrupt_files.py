"""Corrupt files of every kind that the project reads: each ends well or in a documented error that names the file.

Every case is made from a whole file by damaging it as disks, networks and people do. The cases of a kind run in a
process of their own, so that a crash or a hang fails one test and says which case it was; that process may write below
its own folder only.
"""

import copy
import faulthandler
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_model
from dataset_trees import save, write_auw, write_occurrence, write_video
from peft import LoraConfig, get_peft_model
from PIL import Image

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import PRESETS
from au_llava.adapters import MADE_WITH, check_made_with, ever_seen
from au_llava.datasets_scripts.report import read_manifest
from au_llava.datasets_scripts.sources import Source
from au_llava.datasets_scripts.synthetic_faces.writer import write_split
from au_llava.journal import Journal
from evaluate_au import asked_before
from evaluation.answers import read_answers, read_origin
from evaluation.data import read_set
from evaluation.people import held_out


SECONDS = 60  # a case that takes longer hangs; all take well under one on an idle core
# What stands in files that people edit, programs cut short, or spreadsheets export.
TOKENS = [
    "NaN",
    "inf",
    "-1",
    "1e999",
    "9" * 20,
    "0x1F",
    "½",
    "日本",
    "null",
    "true",
    "{}",
    "[[",
    '"',
    "'",
    "\0",
    "",
    "- :",
]
TOKENS += [
    "\ufeff",
    "\u2028",
    "../../up",
    "/etc/passwd",
    "..",
    "AU12",
    "AU999",
    "{{",
    "%s",
    "&a *a",
    "!!python/name:os.system",
]


def damage(content: bytes, draw: random.Random, text: bool) -> bytes:
    """One to three mishaps."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        until = min(len(content), at + draw.choice((1, 2, 16, 300)))
        kind = draw.choice(("cut", "flip", "zero", "random", "repeat", "drop") + ("token", "swap") * 4 * text)
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            content = (
                content[:at] + bytes(byte ^ (1 << draw.randrange(8)) for byte in content[at:until]) + content[until:]
            )
        elif kind == "zero":
            content = content[:at] + bytes(until - at) + content[until:]
        elif kind == "random":
            content = content[:at] + draw.randbytes(until - at) + content[until:]
        elif kind == "repeat":
            content = content[:until] + content[at:until] * draw.choice((1, 3, 50)) + content[until:]
        elif kind == "drop":
            content = content[:at] + content[until:]
        else:  # put a token in the place of a word, or of a value
            words = list(re.finditer(rb"[\w.+-]+", content)) or [re.match(b"", content)]
            word = draw.choice(words)
            new = draw.choice(TOKENS).encode() if kind == "token" else draw.choice(words).group()
            content = content[: word.start()] + new + content[word.end() :]
    return content


# ---- the kinds: what a whole file looks like, what is done with it, and how it may end


def picture() -> Image.Image:
    ramp = Image.linear_gradient("L").resize((60, 40))
    return Image.merge("RGB", (ramp, ramp.rotate(180), ramp))


def write_picture(folder: Path, draw: random.Random) -> Path:
    image, suffix = picture(), draw.choice(("jpg", "png", "gif", "webp", "bmp", "tiff", "ppm", "jp2", "avif"))
    if suffix == "png":
        image = draw.choice((image, image.convert("P"), image.convert("RGBA"), image.convert("I").convert("I;16")))
    options = {"exif": image.getexif().tobytes() + b"\0\0"} if suffix == "jpg" and draw.random() < 0.5 else {}
    if suffix == "gif":
        options = {"save_all": True, "append_images": [image.rotate(90)]}
    image.save(folder / f"picture.{suffix}", **options)
    return folder / f"picture.{suffix}"


def read_picture(path: Path) -> None:
    from au_llava.face_alignment import find_faces, open_image

    image = open_image(path)
    assert image.mode == "RGB" and find_faces(image, "none")[0].crop.size == (224, 224)


def write_film(folder: Path, draw: random.Random) -> Path:
    if draw.random() < 0.5:
        return write_video(folder / "film.avi", [10, 90, 200, 40])
    import cv2

    writer = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 20, (64, 48))
    for value in (10, 90, 200, 40):
        writer.write(np.full((48, 64, 3), value, np.uint8))
    writer.release()
    return folder / "film.mp4"


def read_film(path: Path) -> None:
    from itertools import islice

    from au_llava.videos import Video

    for frame in islice(Video.open(str(path)).frames(), 500):
        assert frame.image.mode == "RGB" and frame.time >= 0


def write_labels(folder: Path, draw: random.Random) -> Path:
    picture().save(folder / "00000001.png")
    return write_auw(folder / "PV001.output" / "00000001.auw", [draw.random() for _ in range(24)])


def read_labels(path: Path) -> None:
    from au_llava.datasets_scripts.feafa import find_recordings

    (recording,) = find_recordings(path.parents[1])
    assert ((recording.labels >= 0) & (recording.labels <= 1)).all()


def write_bp4d(folder: Path, draw: random.Random) -> Path:
    for frame in (9, 10, 11):
        save(folder / "Sequences(2D+3D)" / "F001" / "T1" / f"{frame:04d}.jpg", 10)
    return write_occurrence(folder, "F001_T1", {frame: {12: 1, 6: 9} for frame in (9, 10, 11)})


def read_bp4d(path: Path) -> None:
    from au_llava.datasets_scripts.bp4d import find_recordings

    (recording,) = find_recordings(path.parents[2])
    assert np.isin(recording.labels, (0, 1)).sum() + np.isnan(recording.labels).sum() == recording.labels.size


def write_disfa(folder: Path, draw: random.Random) -> Path:
    path = folder / "ActionUnit_Labels" / "SN010" / "SN010_au12.txt"
    path.parent.mkdir(parents=True)
    for code in PRESETS["disfa"]:
        text = "".join(f"{frame},{frame % 6}\n" for frame in range(1, 9))
        (path.parent / f"SN010_au{code.removeprefix('AU')}.txt").write_text(text)
    return path


def read_disfa(path: Path) -> None:
    from au_llava.datasets_scripts.disfa import find_recordings

    (recording,) = find_recordings(path.parents[2])
    assert len(recording.left_out) >= 8  # there is no video


def write_csv(folder: Path, draw: random.Random) -> Path:
    for name in ("a.png", "b.png"):
        picture().save(folder / name)
    lines = ["image,subject,sequence,frame,split,AU1,AU12", "a.png,anna,s1,1,train,0,1", "b.png,ben,s2,7,test,1,"]
    columns = draw.choice((7, 2))  # with and without the optional columns
    (folder / "labels.csv").write_text("\n".join(",".join(line.split(",")[:1] + line.split(",")[-columns + 1 :])
                                                 for line in lines))  # fmt: skip
    return folder / "labels.csv"


def read_csv(path: Path) -> None:
    from au_llava.datasets_scripts.csv_labels import find_recordings
    from au_llava.datasets_scripts.preparation import Settings, prepare

    prepare(find_recordings(path), path.parent / "crops", Settings("none"))


RECIPE = """\
model: runs/start
lora: null
freeze: [vision_tower]  # a remark
train_data: ["synthetic:data/synthetic"]
questions: [detection:bp4d, intensity:feafa]
augment: true
lora_dropout: 0.05
output_dir: runs/checkpoint
num_train_epochs: 1
per_device_train_batch_size: 16
learning_rate: 1.0e-3
bf16: false
use_cpu: true
report_to: none
"""


def write_recipe(folder: Path, draw: random.Random) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def read_recipe(path: Path) -> None:
    from au_llava.arguments import read_arguments

    sys.stderr = io.StringIO()  # argparse tells there what is wrong
    try:
        read_arguments(["--config", str(path)])
    except SystemExit as stop:
        raise ValueError(f"{path.name}: {sys.stderr.getvalue()}") from stop
    finally:
        sys.stderr = sys.__stderr__


SETTINGS = {"task": "detection"}


def write_journal(folder: Path, draw: random.Random) -> Path:
    journal = Journal(folder / "table.csv.partial", SETTINGS)
    for name in "abcd":
        journal.add({name: [{"file": name, "status": "ok"}]})
    journal.close()
    return folder / "table.csv.partial"


def read_journal(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    for name in "abcd":
        if name not in journal.done:
            journal.add({name: [{"file": name, "status": "ok"}]})
    assert len(list(journal.rows("abcd"))) >= 4
    journal.close()


MODELS = Path()  # holds a whole tiny model and an adapter for it, which the fixture writes


def model_file(name: str, kind: str = "model") -> Callable:
    def write(folder: Path, draw: random.Random) -> Path:
        for path in (MODELS / kind).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink()
        (folder / name).write_bytes((MODELS / kind / name).read_bytes())
        return folder / name

    return write


def read_model(path: Path) -> None:
    from au_llava.photos import load_pipeline

    pipe = load_pipeline(str(path.parent), "cpu")
    (face,) = pipe(picture(), task="detection", action_units="AU6,AU12", detector="none")
    assert list(face["action_units"]) == ["AU6", "AU12"]
    assert all(unit["value"] in (0, 1) and 0 <= unit["probability"] <= 1 for unit in face["action_units"].values())


KINDS = {  # writer, reader, whether it is text, cases by default, cases when slow
    "picture": (write_picture, read_picture, False, 60, 900),
    "video": (write_film, read_film, False, 8, 160),
    "auw": (write_labels, read_labels, True, 30, 300),
    "bp4d": (write_bp4d, read_bp4d, True, 8, 120),
    "disfa": (write_disfa, read_disfa, True, 8, 120),
    "csv": (write_csv, read_csv, True, 20, 260),
    "journal": (write_journal, read_journal, True, 60, 300),
    "recipe": (write_recipe, read_recipe, True, 0, 150),
    "config.json": (model_file("config.json"), read_model, True, 8, 90),
    "model.safetensors": (model_file("model.safetensors"), read_model, False, 8, 60),
    "adapter_config.json": (model_file("adapter_config.json", "adapter"), read_model, True, 2, 40),
    "adapter_model.safetensors": (model_file("adapter_model.safetensors", "adapter"), read_model, False, 2, 40),
    "processor_config.json": (model_file("processor_config.json"), read_model, True, 6, 60),
    "tokenizer.json": (model_file("tokenizer.json"), read_model, True, 4, 50),
    "tokenizer_config.json": (model_file("tokenizer_config.json"), read_model, True, 4, 40),
    "chat_template.jinja": (model_file("chat_template.jinja"), read_model, True, 4, 40),
    "generation_config.json": (model_file("generation_config.json"), read_model, True, 0, 20),
}


# ---- how cases are run


def forbid_writing_outside(folder: Path) -> None:
    """Let every attempt of this process to write, rename or delete elsewhere fail, and be seen."""
    allowed = (str(folder), "/dev/")

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
            paths = [path]
        elif event in ("os.symlink", "os.link"):
            paths = [arguments[1]]
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            paths = [argument for argument in arguments[:2] if isinstance(argument, (str, bytes, os.PathLike))]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            raise AssertionError(f"starts a process: {arguments}")
        else:
            return
        for path in paths:
            place = os.path.abspath(os.fsdecode(path))
            if not place.startswith(allowed):
                raise AssertionError(f"{event} of {place}, which is not below {folder}")

    sys.addaudithook(watch)


def run_cases(kind: str, first: int, count: int, folder: Path, pipe) -> None:
    """In a process of its own: damage and read, and tell how each case ended."""
    faulthandler.enable()
    # A file that makes the program ask for more is an error too, and must not take the machine along.
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "TMPDIR": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    write, read, text, *_ = KINDS[kind]
    forbid_writing_outside(folder)
    for case in range(first, first + count):
        draw, place = random.Random(f"{kind} {case}"), folder / f"case{case}"
        place.mkdir()
        path = write(place, draw)
        path.write_bytes(damage(path.read_bytes(), draw, text))
        pipe.send((case, "begun"))
        try:
            read(path)
            pipe.send((case, "fine"))
        except (ValueError, FileNotFoundError) as error:
            names = {path.name, place.name, path.stem} | ({"recipe", "lora"} if kind == "recipe" else set())
            told = type(error) in (ValueError, FileNotFoundError) and any(name in str(error) for name in names)
            pipe.send((case, "told" if told else f"unclear {type(error).__name__}: {str(error)[:500]}\n"
                       + "".join(traceback.format_exc()[-1500:])))  # fmt: skip
        except BaseException:
            pipe.send((case, traceback.format_exc()[-3000:]))
    pipe.send((None, "done"))


def attack(kind: str, count: int, folder: Path, first: int = 0) -> tuple[dict[str, int], list[str]]:
    """How many cases ended well or in a clear error, and what was wrong with the others."""
    counts, wrong, last = {"fine": 0, "told": 0}, [], None
    end = first + count
    while first < end:
        here, there = multiprocessing.Pipe()
        arguments = (kind, first, end - first, folder, there)
        process = multiprocessing.get_context("fork").Process(target=run_cases, args=arguments)
        process.start()
        there.close()
        try:
            while here.poll(SECONDS):
                case, outcome = here.recv()
                last = last if case is None else case
                if outcome in counts:
                    counts[outcome] += 1
                elif outcome not in ("begun", "done"):
                    wrong.append(f"{kind} case {case}: {outcome}")
                if outcome == "done":
                    first = end
                    break
            else:
                wrong.append(f"{kind} case {last}: hangs")
        except EOFError:
            process.join()
            wrong.append(f"{kind} case {last}: the process died ({process.exitcode})")
        if process.is_alive() and first < end:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if first < end:  # the cases after the one that killed it
            first = (first if last is None else last) + 1
    return counts, wrong


@pytest.fixture(scope="module", autouse=True)
def whole_model(tmp_path_factory, tokenizer):
    global MODELS
    MODELS = tmp_path_factory.mktemp("models")
    tiny_model(copy.deepcopy(tokenizer)).save_pretrained(MODELS / "model")
    base = AuLlavaForConditionalGeneration.from_pretrained(MODELS / "model")
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    get_peft_model(base, settings).save_pretrained(MODELS / "adapter")
    for folder in MODELS.iterdir():
        AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56).save_pretrained(folder)
        for code in folder.glob("*.py"):  # the package's own is used
            code.unlink()


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [kind for kind, entry in KINDS.items() if entry[3]])
def test_a_damaged_file_ends_in_a_clear_error_at_worst(kind, tmp_path):
    write, read, *_ = KINDS[kind]
    (tmp_path / "whole").mkdir()
    read(write(tmp_path / "whole", random.Random(0)))  # undamaged, it works
    before = listing(ROOT)
    counts, wrong = attack(kind, KINDS[kind][3], tmp_path)
    assert not wrong, "\n\n".join(wrong[:5])
    assert sum(counts.values()) == KINDS[kind][3]
    assert listing(ROOT) == before


@pytest.mark.parametrize(
    "name, read",
    [
        ("manifest.json", read_manifest),
        ("manifest.json", lambda folder: write_split(folder, "test", 1)),
        ("held_out.json", lambda folder: held_out(str(folder), "own")),
        ("trained_on.json", lambda folder: ever_seen(str(folder), set())),
        (MADE_WITH, lambda folder: check_made_with(folder, {"model": "."})),
        ("results.json", lambda folder: asked_before({}, str(folder))),
        ("predictions.parquet", read_answers),
        ("predictions.parquet", read_origin),
        ("train-0.parquet", lambda folder: Source(str(folder)).rows()),
        ("test-00000.parquet", lambda folder: read_set("synthetic", folder)),
        ("train-00000.parquet", lambda folder: Source(f"synthetic:{folder}").rows("train", ["detection:AU12"])),
    ],
)
def test_what_the_project_wrote_is_named_when_it_was_cut(name, read, tmp_path):
    (tmp_path / name).write_bytes(b'{"own": ["P')
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged \(.*\); \w+"):
        read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(kind, tmp_path):
    write, read, *_ = KINDS[kind]
    (tmp_path / "whole").mkdir()
    read(write(tmp_path / "whole", random.Random(0)))
    counts, wrong = attack(kind, KINDS[kind][4], tmp_path, first=1000)
    print(kind, json.dumps(counts))
    assert not wrong, "\n".join([*(entry.splitlines()[0] for entry in wrong), *wrong[:3]])
    assert counts["told"] > 0 or kind == "generation_config.json"  # transformers does without a damaged one
