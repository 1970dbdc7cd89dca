"""Detect, align and crop every face of a data set once, into Parquet shards that lie beside a report.

    OUTPUT/data/F001_T1-00000.parquet    crops of 224 x 224 pixels (JPEG) with their labels, at most 1000 a shard
    OUTPUT/manifest.json                 settings, versions, counts, every frame left out and why
    OUTPUT/contact_sheet.jpg             some of the crops, to look at
    OUTPUT/README.md                     the data-set card, with the licence warning

A shard appears only when it is whole, and carries a fingerprint of its labels and pictures. After a kill the next run
makes the shards that are missing; where nothing has changed, it does nothing.
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image
from tqdm import tqdm

from .. import face_alignment
from ..face_alignment import CROP_SIZE, find_faces, which_detector
from .instructions import FEATURES
from .recordings import Recording
from .report import finish, push_to_hub, read_manifest, write_atomically


# What a shard holds: rows as in FEATURES, without the question, which is put anew at any time.
CROP_FEATURES = Features({name: kind for name, kind in FEATURES.items() if name not in ("prompt", "completion")})
SHARD_FRAMES = 1000
ROWS_IN_MEMORY = 100
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Settings:
    """What all crops in one folder have in common; other settings need another folder.

    Args:
        detector (`str`, *optional*, defaults to `"auto"`): `scrfd`, `cascade`, `auto`, `none` (the pictures are crops
            already) or the path of an SCRFD model; see `face_alignment.find_faces`.
        limit (`int`, *optional*): Take at most so many frames in all: the first ones of each sequence.
    """

    detector: str = "auto"
    limit: int | None = None


def prepare(
    recordings: Iterable[Recording],
    output_dir: str | Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    workers: int = 1,
    published: dict[str, dict[str, int]] | None = None,
) -> tuple[dict, int]:
    """Make all crops that are not there yet, delete those that are not asked for any more, then write the report.

    Args:
        recordings (`Iterable[Recording]`): The labelled frames of one data set.
        output_dir (`str` or `Path`): Where everything goes.
        settings ([`Settings`], *optional*): How faces are found.
        workers (`int`, *optional*, defaults to 1): Processes; with 1 all is done in this one.
        published (`dict`, *optional*): Frames by subject in published lists, by source, to compare with.

    Returns:
        `tuple`: The manifest, and how many shards this run made; 0 means that there was nothing to do.

    Raises:
        ValueError: The folder holds crops made with other settings or by another detector, or there are no frames.
        RuntimeError: The detector is not available.
    """
    folder, (head, parts, marks) = Path(output_dir), plan(list(recordings), settings)
    missing = [name for name, mark in marks.items() if stored_mark(folder / "data" / name) != mark]
    old = read_manifest(folder) if (folder / "manifest.json").exists() else None
    if old:
        _check_settings(folder, old, head)
        if not missing and old["fingerprint"] == head["fingerprint"] and old["complete"]:
            return old, 0
    find_faces(Image.new("RGB", (64, 64)), settings.detector)  # fails now rather than in every worker
    detector = which_detector(settings.detector)  # which may change with what is downloaded
    head["detector"] = (old or {}).get("detector", Path(detector).name)
    if missing and head["detector"] != Path(detector).name:
        raise ValueError(
            f"{folder} holds crops found by {head['detector']}, and this run would add some found by "
            f"{Path(detector).name}. Let AU_LLAVA_SCRFD name the same model, or give another output folder."
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "manifest.json", json.dumps(head | {"complete": False}, indent=1).encode())
    for file in (folder / "data").iterdir():
        gone = old and file.suffix == ".parquet" and file.name not in marks  # of people who are not listed any more
        if gone or file.suffix == ".partial":  # of a killed run
            file.unlink()
    jobs = {name: (parts[name], folder / "data" / name, detector, marks[name]) for name in missing}
    with tqdm(total=sum(len(job[0].numbers) for job in jobs.values()), unit="frame", desc=head["dataset"]) as progress:
        for name in _run_all(jobs, workers):
            progress.update(len(parts[name].numbers))
    return finish(folder, head, list(marks), published or {}), len(missing)


def plan(recordings: list[Recording], settings: Settings) -> tuple[dict, dict[str, Recording], dict[str, str]]:
    """What is to be made: the head of the manifest, and by the names of shards their frames and fingerprints.

    Raises:
        ValueError: There are no frames.
    """
    parts = _cut(recordings, settings.limit)
    if not any(part.numbers for part in parts.values()):
        why = [f"{one.sequence}, frame {number}: {text}" for one in recordings for number, text in one.left_out[:1]]
        raise ValueError("\n".join(["There are no labelled frames with pictures; check the data folder.", *why[:5]]))
    marks = {name: fingerprint(part) for name, part in parts.items()}
    one = recordings[0]
    head = {"dataset": one.dataset, "task": one.task, "action_units": list(one.action_units)}
    head["settings"] = asdict(settings) | {
        "camera": one.camera,
        "crop_size": CROP_SIZE,
        "alignment_code": digest_code(face_alignment),
    }
    return head | {"fingerprint": digest([head, marks])}, parts, marks


def _cut(recordings: list[Recording], limit: int | None) -> dict[str, Recording]:
    """The recordings in parts of at most `SHARD_FRAMES` frames, by the names of their shards."""
    parts: dict[str, Recording] = {}
    left = math.inf if limit is None else limit
    share = left if limit is None else math.ceil(limit / len(recordings))
    for recording in recordings:
        name = quote(recording.sequence, safe="")
        if len(name) > 100:  # a path, or other writing than Latin; a file's name has 255 bytes at most
            name = f"{name[:100]}-{digest(name)}"
        frames = int(min(len(recording.numbers), share, left))
        left -= frames
        # A recording without frames keeps one empty shard, which tells why.
        for start in range(0, max(frames, 1), SHARD_FRAMES):
            parts[f"{name}-{start:05d}.parquet"] = recording.part(start, min(start + SHARD_FRAMES, frames))
    return parts


def _check_settings(folder: Path, old: dict, new: dict) -> None:
    for key in ("dataset", "task", "action_units", "settings"):
        if old[key] != new[key]:
            raise ValueError(
                f"{folder} holds crops made with {key} {old[key]}, and this run asks for {new[key]}. Give another "
                "output folder, or delete this one to make its crops anew."
            )


def _run_all(jobs: dict[str, tuple], workers: int) -> Iterator[str]:
    """Make the shards and yield their names as they are done."""
    if workers == 1:
        for name, job in jobs.items():
            make_shard(*job)
            yield name
        return
    # Forked children could inherit locked threads of onnxruntime or OpenCV, so workers start afresh.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(make_shard, *job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(cancel_futures=True)


def make_shard(part: Recording, path: Path, detector: str, mark: str) -> None:
    """Crop the faces of one part of a recording; the shard appears under its name when it is whole."""
    note = {
        "fingerprint": mark,
        "subject": part.subject,
        "sequence": part.sequence,
        "left_out": list(part.left_out),
        "with_five_points": 0,
    }
    temporary = path.with_suffix(".partial")
    with pq.ParquetWriter(temporary, CROP_FEATURES.arrow_schema) as writer:
        crops = _crops(part, detector, note)
        while rows := list(islice(crops, ROWS_IN_MEMORY)):
            encoded = [CROP_FEATURES.encode_example(row) for row in rows]
            writer.write_table(pa.Table.from_pylist(encoded, CROP_FEATURES.arrow_schema))
        writer.add_key_value_metadata({"au_llava": json.dumps(note)})
    os.replace(temporary, path)


def _crops(part: Recording, detector: str, note: dict) -> Iterator[dict]:
    """Rows of [`CROP_FEATURES`]; the frames that give none are added to the note."""
    for position, picture, why in part.pictures():
        number, labels = part.numbers[position], part.labels[position]
        if picture is not None:
            faces, why = _faces(picture, detector)
        if picture is None or not faces:
            note["left_out"].append((number, why))
        elif np.isnan(labels).all():
            note["left_out"].append((number, "no known label"))
        else:
            buffer = BytesIO()
            note["with_five_points"] += faces[0].points is not None
            faces[0].crop.save(buffer, "JPEG", quality=JPEG_QUALITY)
            yield {
                "images": [{"bytes": buffer.getvalue(), "path": None}],
                "labels": labels.tolist(),
                "action_units": list(part.action_units),
                "task": part.task,
                "dataset": part.dataset,
                "subject": part.subject,
                "sequence": part.sequence,
                "frame": number,
            }


def _faces(picture: Image.Image, detector: str) -> tuple[list[face_alignment.Face], str]:
    """The largest face, or why there is none: one odd frame must not end hours of work."""
    try:
        return find_faces(picture, detector, max_faces=1), "no face found"
    except ValueError as error:
        return [], f"face cannot be aligned: {error}"


def _size(path: Path) -> int | None:
    """Bytes of a file; none of one that is not there, as where a link leads nowhere: whoever opens it tells so."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def fingerprint(part: Recording) -> str:
    """Changes when labels, or the names, folders or sizes of the pictures change."""
    files = part.images or [part.video]
    return digest(
        [
            part.dataset, part.task, part.action_units, part.subject, part.sequence, part.numbers, part.left_out,
            part.labels.tobytes().hex(),
            [(*path.absolute().parts[-2:], _size(path)) for path in files if path],
        ]
    )  # fmt: skip


def stored_mark(path: Path) -> str:
    """The fingerprint in a shard, or nothing if the file is no whole shard."""
    try:
        return json.loads(pq.read_metadata(path).metadata[b"au_llava"])["fingerprint"]
    except (OSError, pa.ArrowInvalid, KeyError):
        return ""


def digest(value) -> str:
    """A short hash of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def digest_code(*modules: ModuleType) -> str:
    """A short hash of what modules do; comments and layout do not count."""
    return digest([ast.dump(ast.parse(inspect.getsource(module))) for module in modules])


def count(text: str) -> int:
    """An option's number of things, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def preparation_parser(description: str) -> argparse.ArgumentParser:
    """The options that all data sets share."""
    parser = argparse.ArgumentParser(description=description)
    where = "the data set's folder, as distributed; of your own pictures the csv"
    parser.add_argument("--data_dir", type=Path, required=True, help=where)
    parser.add_argument("--output_dir", type=Path, required=True, help="where crops and report go")
    parser.add_argument("--detector", default="auto", help="scrfd, cascade, auto, none, or the path of an SCRFD model")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="processes")
    parser.add_argument("--limit", type=count, help="at most so many frames in all, for a quick look")
    damaged = "leave frames with damaged labels out; of DISFA, the labels alone"
    parser.add_argument("--skip_bad_labels", action="store_true", help=damaged)
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the result; the repository is private")
    parser.add_argument("--public", action="store_true", help="make that repository public: mind the licence")
    return parser


def run(recordings: list[Recording], chosen: argparse.Namespace, published: dict[str, dict[str, int]]) -> None:
    """What every preparation command does, told in plain words."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores already
    settings = Settings(chosen.detector, chosen.limit)
    manifest, made = prepare(recordings, chosen.output_dir, settings, chosen.workers, published)
    print(f"{made} shards made." if made else "Nothing to do: all crops are there.")
    print(f"{manifest['frames']} crops of {len(manifest['subjects'])} subjects in {chosen.output_dir}.")
    for entry in manifest["left_out"]:
        print(f"Left out: {len(entry['frames'])} frames of {entry['sequence']}: {entry['why']}")
    print("\n".join(manifest["comparison"]))
    print(f"Look at {chosen.output_dir / 'contact_sheet.jpg'}.")
    if chosen.push_to_hub:
        print(push_to_hub(chosen.output_dir, chosen.push_to_hub, private=not chosen.public))
