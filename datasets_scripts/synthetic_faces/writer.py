"""Write a split as Parquet shards with embedded JPEG files. A killed run is taken up where it stopped."""

import io
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PillowImage
from tqdm.auto import tqdm

from ..report import read_json
from .expression import ACTIONS, FACS_CODES, FEAFA_CODES, LEVEL_EDGES, OCCURRENCE_LEVEL
from .layout import FEATURES, IDENTITIES, IMAGES_PER_IDENTITY, LICENSE, VERSION, split_size
from .renderer import OVERSAMPLING
from .sampler import SEED, Sample, render_sample
from .variation import MAKE


IMAGES_PER_SHARD = 250


def to_row(sample: Sample, index: int) -> dict:
    """One sample as a row with the columns of `FEATURES`; the image becomes a JPEG file of its own quality."""
    file, rendering, identity = io.BytesIO(), sample.rendering, sample.identity
    PillowImage.fromarray(rendering.image).save(file, "JPEG", quality=sample.jpeg_quality)
    return {
        "image": {"bytes": file.getvalue(), "path": f"{sample.identity_name}-{index:06d}.jpg"},
        "facs": [sample.facs[code] for code in FACS_CODES],
        "levels": [sample.levels[code] for code in FACS_CODES],
        "occurrences": [sample.occurrences[code] for code in FACS_CODES],
        "feafa": [sample.feafa[code] for code in FEAFA_CODES],
        "activations": [sample.activations.get(action, 0.0) for action in ACTIONS],
        "landmarks": rendering.landmarks.ravel().tolist(),
        "points": rendering.points.ravel().tolist(),
        "pose": rendering.pose.tolist(),
        "flow": rendering.flow.tobytes(),
        "identity": sample.identity_name,
        "skin": identity.skin_group,
        "gender": identity.gender_group,
        "age": identity.age_group,
        "index": index,
    }


def write_shard(path: Path, split: str, first: int, count: int, seed: int, varied: float, quick: bool) -> int:
    """Render images `first` to `first + count - 1` into one file, which appears only when it is whole."""
    numbers, oversampling = range(first, first + count), OVERSAMPLING
    if quick:  # all pictures of a person one after another
        numbers = [n % IMAGES_PER_IDENTITY * IDENTITIES[split] + n // IMAGES_PER_IDENTITY for n in numbers]
        oversampling = 1
    rows = [to_row(render_sample(index, split, seed, varied, oversampling), index) for index in numbers]
    table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, unfinished, compression="zstd", row_group_size=50)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def write_split(
    output_dir: str | Path,
    split: str,
    limit: int | None = None,
    workers: int = 1,
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = SEED,
    varied: float = 0.0,
    quick: bool = False,
) -> list[Path]:
    """Write the first `limit` images of a split, leaving out shards that are already there.

    Args:
        output_dir (`str` or `Path`): Folder of the shards; it is made if need be.
        split (`str`): `train`, `validation` or `test`.
        limit (`int`, *optional*): Number of images; by default all. Any first part is a fair sample of all people,
            unless `quick`.
        workers (`int`): Number of processes.
        images_per_shard (`int`): How many images a file holds.
        seed (`int`): [`sampler.SEED`] for the standard split.
        varied (`float`): Share of images of another make, 0 to 1 (see `variation.py`); 0 for the standard split.
        quick (`bool`): Draw them at their own size, with jagged edges, and all of a person one after another.

    Returns:
        `list[Path]`: the shards in order.

    Raises:
        ValueError: Unknown split, a limit or share out of range, or a folder that another version or seed has written.
    """
    if split not in IDENTITIES:
        raise ValueError(f"Unknown split {split!r}; accepted: {', '.join(IDENTITIES)}.")
    limit = split_size(split) if limit is None else limit
    if not 1 <= limit <= split_size(split):
        raise ValueError(f"limit is {limit}; split {split!r} has 1 to {split_size(split)} images.")
    for name, value in (("workers", workers), ("images_per_shard", images_per_shard)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 0 <= varied <= 1:
        raise ValueError(f"varied is {varied}; it is a share of the images, 0 to 1.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _claim(output_dir, images_per_shard, seed, varied, quick)
    jobs, paths, done = [], [], 0
    for first in range(0, limit, images_per_shard):
        path = output_dir / f"{split}-{first // images_per_shard:05d}.parquet"
        count = min(images_per_shard, limit - first)
        paths.append(path)
        if path.exists() and _rows(path) >= count:
            done += count
        else:
            jobs.append((path, split, first, count, seed, varied, quick))
    with tqdm(total=limit, initial=done, desc=f"rendering {split}", unit="image") as bar:
        for count in _run(jobs, workers):
            bar.update(count)
    return paths


def _rows(path: Path) -> int:
    """How many images a shard holds; none if it is no whole file."""
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid):
        return 0


def _run(jobs, workers: int):
    if workers == 1 or len(jobs) < 2:
        yield from (write_shard(*job) for job in jobs)
        return
    # Fresh processes: forked ones would inherit the locks of whatever threads the caller has.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(_write_shard, jobs)


def _write_shard(job) -> int:
    return write_shard(*job)


def _claim(output_dir: Path, images_per_shard: int, seed: int, varied: float, quick: bool) -> None:
    """Write what the folder holds into `manifest.json`, or check that it holds the same."""
    path = output_dir / "manifest.json"
    manifest = {
        "version": VERSION,
        "seed": seed,
        "varied": varied,
        "make": MAKE if varied else 0,
        "quick": quick,
        "license": LICENSE,
        "images_per_shard": images_per_shard,
        "identities": IDENTITIES,
        "level_edges": list(LEVEL_EDGES),
        "occurrence_level": OCCURRENCE_LEVEL,
        "facs": list(FACS_CODES),
        "feafa": list(FEAFA_CODES),
        "activations": list(ACTIONS),
    }
    if path.exists():
        found = {"varied": 0.0, "make": 0, "quick": False} | read_json(path, "give an empty --output_dir")
        different = sorted(key for key in manifest if found.get(key) != manifest[key])
        if different:
            raise ValueError(
                f"{path} was written with other settings ({', '.join(different)}); give an empty --output_dir, "
                "as images of two kinds must not be mixed."
            )
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(unfinished, path)


def summary(paths: list[Path]) -> dict:
    """Counts over shards: images, people, how many images show each AU, and the groups of appearance."""
    columns = ["occurrences", "feafa", "identity", "skin", "gender", "age"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
    seen, units = np.array(table["occurrences"].to_pylist()), np.array(table["feafa"].to_pylist())
    groups = {
        name: {row["values"]: row["counts"] for row in table[name].value_counts().to_pylist()} for name in columns[3:]
    }
    return {
        "images": table.num_rows,
        "identities": len(table["identity"].unique()),
        "occurrence": {code: int(count) for code, count in zip(FACS_CODES, seen.sum(0), strict=True)},
        "feafa_above_0.1": {code: int(count) for code, count in zip(FEAFA_CODES, (units > 0.1).sum(0), strict=True)},
        **groups,
    }
