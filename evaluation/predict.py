"""Ask a model about every picture of an evaluation set; stop and go on at any time, with any number of processes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers.utils.hub import cached_file, extract_commit_hash

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, __version__
from au_llava.action_units import cover, select
from au_llava.answers_au_llava import each_once

from .answers import STAMP
from .data import EvaluationSet


# Pictures of one part. Parts and batches are the same however many processes share them, and so are the answers.
PART = 128
# Beside the processor's settings.
_READ = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer*", "chat_template.jinja")
_NUMBERS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    {
        "sample": pa.string(),
        "subject": pa.string(),
        "split": pa.string(),
        "fold": pa.int32(),
        "groups": pa.map_(pa.string(), pa.string()),
        "task": pa.string(),
        "action_units": pa.list_(pa.string()),
        "labels": _NUMBERS,
        "values": _NUMBERS,
        "probabilities": _NUMBERS,
        "expected_values": _NUMBERS,
        "distributions": pa.list_(_NUMBERS),
    }
)


def processes() -> PartialState:
    """The processes that Accelerate started, on whatever accelerator there is, else on the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def fingerprint(source: str) -> dict:
    """What tells one version of a model from another, other than its calibration, which changes no prediction.

    Args:
        source (`str`): Folder or Hub id.

    Returns:
        `dict`: `files`, of a folder, and of an adapter's base that is a folder, names, sizes and times of weights,
        configuration and tokenizer; `commit`, of a Hub id the one at hand; `processor`, a hash of the processor's
        settings.
    """
    folders, adapter = [source], Path(source, "adapter_config.json")
    if adapter.is_file():
        folders.append(json.loads(adapter.read_text())["base_model_name_or_path"])
    files = sorted(file for folder in folders for pattern in _READ for file in Path(folder).glob(pattern))
    settings = AuLlavaProcessor.get_processor_dict(source)[0] | {"calibration": None}
    return {
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "commit": extract_commit_hash(cached_file(source, "processor_config.json"), None),
        "processor": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }


def of_fold(model: str, fold: int) -> str:
    """The folder or Hub id of the model for a test fold, from a name that may hold `{fold}`.

    >>> of_fold("runs/bp4d_{fold}", 2)
    'runs/bp4d_2'
    """
    return model.replace("{fold}", str(fold))


def predict(
    evaluation_set: EvaluationSet,
    model: str,
    output: str | Path,
    batch_size: int = 32,
    dtype: str = "auto",
    tasks: list[str] | None = None,
    readout: str = "exact",
    mirror: bool | None = None,
) -> Path:
    """Write `predictions.parquet`: for every picture and task its labels, answers and probabilities.

    Parts that are already there are kept, so that a run that was stopped goes on, and a run that was finished does
    nothing; another model, or other pictures, start anew. Under `accelerate launch` the processes share the parts.

    Args:
        evaluation_set ([`EvaluationSet`]): Pictures and labels.
        model (`str`): Folder or Hub id of model and processor; `{fold}` in it stands for the number of the test fold.
        output: Folder to write to.
        batch_size (`int`): Pictures that go through the model together.
        dtype (`str`): `auto`, `float32`, `bfloat16` or `float16`.
        tasks (`list[str]`, *optional*): Only these of the set's tasks.
        readout (`str`): `exact` or `parallel`; see `model.recognize`.
        mirror (`bool`, *optional*): Ask about mirror images, too; by default as each model's processor says.

    Returns:
        `Path`: The file, whose columns are those of `SCHEMA`.
    """
    state, output = processes(), Path(output)
    folds = sorted(set(evaluation_set.folds))
    sources = {fold: of_fold(model, fold) for fold in folds}
    tasks = tasks or list(evaluation_set.labels)
    mirrors = {str(fold): _mirrors(source, mirror) for fold, source in sources.items()}
    settings = {
        "model": {str(fold): [source, fingerprint(source)] for fold, source in sources.items()},
        "data": evaluation_set.fingerprint(),
        "version": __version__,
        "by_levels": _by_levels(sources[folds[0]], evaluation_set.units["detection"]) if "detection" in tasks else [],
        "batch_size": batch_size,
        "dtype": dtype,
        "tasks": tasks,
        "readout": readout,
        "mirror": mirrors,
    }
    stamp = json.dumps(evaluation_set.origin() | settings, sort_keys=True)
    target = output / "predictions.parquet"
    if target.is_file() and pq.read_schema(target).metadata.get(STAMP) == stamp.encode():
        return target
    parts = output / f"parts-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    parts.mkdir(parents=True, exist_ok=True)
    jobs = []
    for fold in folds:
        rows = [row for row, own in enumerate(evaluation_set.folds) if own == fold]
        jobs += [(fold, rows[start : start + PART]) for start in range(0, len(rows), PART)]
    names = [parts / f"{number:06d}.parquet" for number in range(len(jobs))]
    mine = [
        (name, job)
        for number, (name, job) in enumerate(zip(names, jobs, strict=True))
        if number % state.num_processes == state.process_index and not name.is_file()
    ]
    count = sum(len(rows) for _, (_, rows) in mine)
    progress = tqdm(total=count, unit="picture", disable=not state.is_main_process)
    loaded = None
    for name, (fold, rows) in mine:
        if loaded is None or loaded[0] != sources[fold]:
            loaded = (sources[fold], *load(sources[fold], dtype))
        how = {"readout": readout, "mirror": mirrors[str(fold)]}
        write(name, _ask(evaluation_set, tasks, rows, *loaded[1:], batch_size, how, progress))
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _join(names, target, stamp)
        shutil.rmtree(parts)
    state.wait_for_everyone()
    return target


def _mirrors(source: str, mirror: bool | None) -> bool:
    """Whether a model is asked about mirror images: what was said, or else what its processor says."""
    return AuLlavaProcessor.get_processor_dict(source)[0].get("mirror", False) if mirror is None else mirror


def _by_levels(source: str, codes: list[str]) -> list[str]:
    """The units whose presence a model's levels tell."""
    lists = AuLlavaProcessor.get_processor_dict(source)[0].get("trained_lists") or {}
    asked, strange = cover("detection", select(codes), lists)
    detected = {unit.code for about, whole in asked if about == "detection" for unit in whole}
    return [code for code in codes if code not in detected | {unit.code for unit in strange}]


def load(source: str, dtype: str = "auto"):
    """Model, ready to answer on this process's device, and processor, from a folder or the Hub."""
    model = AuLlavaForConditionalGeneration.from_pretrained(source, dtype=dtype)
    return model.to(processes().device).eval(), AuLlavaProcessor.from_pretrained(source)


def _ask(
    evaluation_set: EvaluationSet,
    tasks: list[str],
    rows: list[int],
    model,
    processor,
    batch_size: int,
    how: dict,
    progress,
) -> pa.Table:
    """Answers about some pictures, each of which is read once for all tasks."""
    # As for users: of some units of a list that the model was trained on, the list.
    wanted = {task: processor.questions(task, evaluation_set.units[task]) for task in tasks}
    asked = each_once(wanted.values())
    grammars = [processor.grammar(task, whole) for task, whole in asked]
    blank = Image.new("RGB", (1, 1))  # the prompt is the same for every picture
    prompts = [processor(images=blank, task=task, action_units=whole)["input_ids"] for task, whole in asked]
    found: list[list] = [[] for _ in asked]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        pixels = processor.image_processor(evaluation_set.pictures(batch), return_tensors="pt")["pixel_values"]
        encoded = model.encode(pixels, how["mirror"])
        for parts, prompt, grammar in zip(found, prompts, grammars, strict=True):
            each = prompt.expand(len(batch), -1)
            parts.append(model.recognize(each, None, grammar, encoded=encoded, **how))
        progress.update(len(batch))
    tables = []
    for task, questions in wanted.items():
        own = [
            [processor.told(part, about, task, whole, calibrated=False) for part in found[asked.index((about, whole))]]
            for about, whole in questions
        ]
        codes = [unit.code for _, whole in questions for unit in whole]
        places = [codes.index(code) for code in evaluation_set.units[task]]
        names = ("values", "probabilities", "expected_values", "distributions")
        answers = (
            torch.cat([torch.cat([part.__dict__[name] for part in parts]) for parts in own], 1)[:, places].cpu()
            for name in names
        )
        tables.append(answer_table(evaluation_set, task, rows, *answers))
    return pa.concat_tables(tables)


def answer_table(
    evaluation_set: EvaluationSet, task: str, rows: list[int], values, probabilities, expected_values, distributions
) -> pa.Table:
    """Answers of any model, as they are stored.

    Args:
        evaluation_set ([`EvaluationSet`]): What was asked about.
        task (`str`): What was asked.
        rows (`list[int]`): Which pictures of the set.
        values, probabilities, expected_values: Arrays of shape `(rows, units)`.
        distributions: Array of shape `(rows, units, values)`.

    Returns:
        `pyarrow.Table`: With the columns of `SCHEMA`.
    """

    def picked(column: list) -> list:
        return [column[row] for row in rows]

    columns = {
        "sample": picked(evaluation_set.samples),
        "subject": picked(evaluation_set.subjects),
        "split": [evaluation_set.split] * len(rows),
        "fold": picked(evaluation_set.folds),
        "groups": [list(known.items()) for known in picked(evaluation_set.groups)],
        "task": [task] * len(rows),
        "action_units": [evaluation_set.units[task]] * len(rows),
        "labels": _lists(evaluation_set.labels[task][rows]),
        "values": _lists(values),
        "probabilities": _lists(probabilities),
        "expected_values": _lists(expected_values),
        "distributions": _lists(distributions),
    }
    return pa.table(columns, schema=SCHEMA)


def _lists(numbers) -> pa.Array:
    """The first axis becomes rows, the others nested lists."""
    numbers = np.asarray(numbers, np.float32)
    lists = pa.array(numbers.reshape(-1), from_pandas=False)
    for size in reversed(numbers.shape[1:]):
        lists = pa.ListArray.from_arrays(np.arange(0, len(lists) + 1, size, dtype=np.int32), lists)
    return lists


def write(path: Path, table: pa.Table) -> None:
    """Write a file that is either whole or not there."""
    draft = path.with_suffix(".tmp")
    pq.write_table(table, draft, compression="zstd")
    os.replace(draft, path)


def _join(names: list[Path], target: Path, stamp: str) -> None:
    """Join the parts, one at a time, into one file that remembers its settings."""
    draft = target.with_suffix(".tmp")
    with pq.ParquetWriter(draft, SCHEMA.with_metadata({STAMP: stamp}), compression="zstd") as writer:
        for name in names:
            writer.write_table(pq.read_table(name).replace_schema_metadata({STAMP: stamp}))
    os.replace(draft, target)
