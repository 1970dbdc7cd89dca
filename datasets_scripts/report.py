"""What a preparation tells about itself: manifest, comparison with published counts, contact sheet, card, upload."""

import importlib.metadata
import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from PIL import Image, ImageDraw

from .. import __version__


PACKAGES = ("datasets", "insightface", "numpy", "opencv-python", "pillow", "pyarrow", "scikit-image")
SHEET_CROPS, SHEET_COLUMNS, SHEET_SIDE = 48, 8, 112

_WARNING = """
> **Licence warning.** These crops are derived from {dataset}, whose licence binds whoever received it and usually
> forbids passing on images or anything made from them. Keep this repository private and share it with nobody who has
> not signed the licence agreement of {dataset}.
"""
_WARNING_OWN = """
> **These are faces of people.** Keep this repository private unless everyone in it has agreed that others see them.
"""
_CARD = """
# Aligned face crops of {dataset}
{warning}
{frames} face crops of 224 x 224 pixels from {subjects} subjects, with labels for the task `{task}` ({units}; NaN means
unknown). `manifest.json` tells how they were made and lists every frame that was left out, and why.

```python
from datasets import load_dataset
from au_llava.datasets_scripts.instructions import FreshSamples

crops = load_dataset("REPOSITORY", split="train").with_transform(FreshSamples())  # adds `prompt` and `completion`
```

All rows lie in one split. How they are divided by subject is told in `docs/data.md` of AU-LLaVA.
"""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_json(path: Path, remedy: str) -> dict:
    """Read what this project wrote as JSON.

    Args:
        remedy (`str`): What to do if it is damaged.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error


def check_whole(files: Iterable[Path]) -> None:
    """See that Parquet files are whole, by what stands at their ends.

    Raises:
        ValueError: One is not.
    """
    for file in files:
        try:
            pq.read_metadata(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it, and make it again.") from error


def read_manifest(folder: str | Path) -> dict:
    """Read the manifest of prepared crops.

    Raises:
        FileNotFoundError: `folder` holds no prepared crops.
        ValueError: The manifest is damaged, or of something else, such as rendered faces.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; prepare the crops first, see docs/data.md.")
    manifest = read_json(path, "delete its folder, and prepare the crops anew")
    if "fingerprint" not in manifest:
        raise ValueError(f"{path}: no manifest of prepared crops, but of other files; give the folder of the crops.")
    return manifest


def finish(folder: Path, head: dict, shards: list[str], published: dict[str, dict[str, int]]) -> dict:
    """Write manifest, contact sheet and card for the shards of `folder`, and return the manifest."""
    subjects: Counter[str] = Counter()
    left_out: dict[tuple[str, str], list[int]] = defaultdict(list)
    with_five_points = 0
    for name in shards:
        stored = pq.read_metadata(folder / "data" / name)
        note = json.loads(stored.metadata[b"au_llava"])
        subjects[note["subject"]] += stored.num_rows
        with_five_points += note["with_five_points"]
        for frame, why in note["left_out"]:
            left_out[note["sequence"], why].append(frame)
    manifest = head | {
        "frames": subjects.total(),
        "aligned_by_five_points": with_five_points,
        "subjects": dict(sorted(subjects.items())),
        "left_out": [
            {"sequence": sequence, "why": why, "frames": frames} for (sequence, why), frames in left_out.items()
        ],
        "comparison": compare(subjects, published) if head["settings"]["limit"] is None else [],
        "versions": {"au-llava": __version__, "python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "shards": shards,
        "complete": True,
    }
    sheet = BytesIO()
    draw_contact_sheet([folder / "data" / name for name in shards]).save(sheet, "JPEG", quality=88)
    write_atomically(folder / "contact_sheet.jpg", sheet.getvalue())
    write_atomically(folder / "README.md", str(make_card(manifest)).encode())
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def compare(counts: dict[str, int], published: dict[str, dict[str, int]]) -> list[str]:
    """Say plainly where the number of frames differs from published ones.

    Args:
        counts (`dict[str, int]`): Frames by subject.
        published (`dict[str, dict[str, int]]`): By source: frames by subject, or by what the subjects' names begin
            with.

    Example:

    >>> compare({"SN001": 4845, "SN010": 4840}, {"list A": {"SN001": 4845, "SN010": 4844}})
    ['list A: 9689 frames; here 9685 (-4). SN010: 4844 there, 4840 here (-4).']
    """
    lines = []
    for source, theirs in published.items():
        ours = {key: sum(n for subject, n in counts.items() if subject.startswith(key)) for key in theirs}
        others = {subject: n for subject, n in counts.items() if n and not subject.startswith(tuple(theirs))}
        total, wanted = sum(counts.values()), sum(theirs.values())
        told = [f"{key}: {theirs[key]} there, {ours[key]} here ({ours[key] - theirs[key]:+d})" for key in theirs
                if ours[key] != theirs[key]]  # fmt: skip
        told += [f"{subject}: not there, {n} here" for subject, n in others.items()]
        same = f"{source}: {wanted} frames; here {total}"
        lines.append(f"{same} ({total - wanted:+d}). {'; '.join(told)}." if told else f"{same}, the same.")
    return lines


def draw_contact_sheet(shards: list[Path]) -> Image.Image:
    """Up to 48 crops, evenly over the shards, with sequence, frame and the units that are not 0."""
    sizes = [pq.read_metadata(path).num_rows for path in shards]
    total = sum(sizes)
    wanted = [index * total // SHEET_CROPS for index in range(SHEET_CROPS)] if total > SHEET_CROPS else range(total)
    rows, start = [], 0
    for path, size in zip(shards, sizes, strict=True):
        inside = [index - start for index in wanted if start <= index < start + size]
        rows += pq.read_table(path).take(inside).to_pylist() if inside else []
        start += size
    height = SHEET_SIDE + 28
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, max(1, -(-len(rows) // SHEET_COLUMNS)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x, y = index % SHEET_COLUMNS * SHEET_SIDE, index // SHEET_COLUMNS * height
        crop = Image.open(BytesIO(row["images"][0]["bytes"]))
        sheet.paste(crop.resize((SHEET_SIDE, SHEET_SIDE)), (x, y))
        active = [
            f"{code.removeprefix('FEA').removeprefix('AU').removeprefix('FA')}={value:g}"
            for code, value in zip(row["action_units"], row["labels"], strict=True)
            if value > 0
        ]
        draw.text((x + 2, y + SHEET_SIDE + 1), f"{row['sequence']} #{row['frame']}", fill="black", font_size=10)
        draw.text((x + 2, y + SHEET_SIDE + 13), " ".join(active)[:22], fill="dimgray", font_size=10)
    return sheet


def make_card(manifest: dict) -> DatasetCard:
    """The data-set card, with the licence warning, or of pictures of one's own a word about the people in them."""
    own = manifest["dataset"] == "own"  # as a csv's rows are called
    name = "one's own pictures" if own else manifest["dataset"].upper()
    data = DatasetCardData(
        license=None if own else "other",
        license_name=None if own else "research-only",
        task_categories=["image-classification"],
        tags=["facial-action-units", "au-llava"],
        configs=[{"config_name": "default", "data_files": "data/*.parquet"}],
    )
    text = _CARD.format(
        dataset=name,
        warning=_WARNING_OWN if own else _WARNING.format(dataset=name),
        frames=manifest["frames"],
        subjects=len(manifest["subjects"]),
        task=manifest["task"],
        units=", ".join(manifest["action_units"]),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


def push_to_hub(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload prepared crops with manifest, contact sheet and card.

    Args:
        folder (`str` or `Path`): What `prepare` made.
        repository (`str`): `owner/name`.
        private (`bool`, *optional*, defaults to `True`): The licences of these data sets forbid anything else.

    Returns:
        `str`: The address of the repository.

    Raises:
        ValueError: The preparation has not come to its end, or the repository is there already and is public.
    """
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(f"{folder}: the preparation has not finished; run it again before uploading.")
    api = HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
    if private and not api.repo_info(repository, repo_type="dataset").private:
        raise ValueError(f"{repository} is public; give --public if everyone may see these faces, or another name.")
    shards = [f"data/{name}" for name in manifest["shards"]]
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=["README.md", "manifest.json", "contact_sheet.jpg", *shards],
        delete_patterns="data/*",  # of people who are not listed any more
    )
    return str(address)
