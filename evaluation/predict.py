"""Ask a model about every picture of an evaluation set; stop and go on at any time, with any number of processes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor

from .data import EvaluationSet


# Rows of one part. Parts and batches are the same however many processes share them, and so are the answers.
PART = 256
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


def fingerprint(folder: str) -> list:
    """What tells one version of a model's weights from another: the files of a folder, or the Hub id itself."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files] or [folder]


def predict(
    evaluation_set: EvaluationSet,
    model: str,
    output: str | Path,
    batch_size: int = 32,
    dtype: str = "auto",
    tasks: list[str] | None = None,
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

    Returns:
        `Path`: The file, whose columns are those of `SCHEMA`.
    """
    state, output = processes(), Path(output)
    folds = sorted(set(evaluation_set.folds))
    sources = {fold: model.format(fold=fold) if "{fold}" in model else model for fold in folds}
    tasks = tasks or list(evaluation_set.labels)
    settings = {
        "model": {str(fold): [source, fingerprint(source)] for fold, source in sources.items()},
        "data": evaluation_set.fingerprint(),
        "batch_size": batch_size,
        "dtype": dtype,
        "tasks": tasks,
    }
    stamp = json.dumps(settings, sort_keys=True)
    target = output / "predictions.parquet"
    if target.is_file() and pq.read_schema(target).metadata.get(b"au_llava") == stamp.encode():
        return target
    parts = output / f"parts-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    parts.mkdir(parents=True, exist_ok=True)
    jobs = []
    for fold in folds:
        rows = [row for row, own in enumerate(evaluation_set.folds) if own == fold]
        jobs += [(fold, task, rows[start : start + PART]) for task in tasks for start in range(0, len(rows), PART)]
    names = [parts / f"{number:06d}.parquet" for number in range(len(jobs))]
    mine = [
        (name, job)
        for number, (name, job) in enumerate(zip(names, jobs, strict=True))
        if number % state.num_processes == state.process_index and not name.is_file()
    ]
    progress = tqdm(total=sum(len(job[2]) for _, job in mine), unit="answer", disable=not state.is_main_process)
    loaded = None
    for name, (fold, task, rows) in mine:
        if loaded is None or loaded[0] != sources[fold]:
            loaded = (sources[fold], *load(sources[fold], dtype))
        write(name, pa.Table.from_pylist(_ask(evaluation_set, task, rows, *loaded[1:], batch_size, progress), SCHEMA))
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _join(names, target, stamp)
        shutil.rmtree(parts)
    state.wait_for_everyone()
    return target


def load(source: str, dtype: str = "auto"):
    """Model, ready to answer on this process's device, and processor, from a folder or the Hub."""
    model = AuLlavaForConditionalGeneration.from_pretrained(source, dtype=dtype)
    return model.to(processes().device).eval(), AuLlavaProcessor.from_pretrained(source)


def _ask(evaluation_set: EvaluationSet, task: str, rows: list[int], model, processor, batch_size: int, progress):
    """Answers of one task about some rows, as dictionaries of `SCHEMA`."""
    units = evaluation_set.action_units(task)
    grammar, answers = processor.grammar(task, units), []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = processor(images=evaluation_set.pictures(batch), task=task, action_units=units)
        found = model.recognize(**inputs, grammar=grammar)
        for place, row in enumerate(batch):
            answers.append(
                {
                    "sample": evaluation_set.samples[row],
                    "subject": evaluation_set.subjects[row],
                    "split": evaluation_set.split,
                    "fold": evaluation_set.folds[row],
                    "groups": list(evaluation_set.groups[row].items()),
                    "task": task,
                    "action_units": units,
                    "labels": evaluation_set.labels[task][row].tolist(),
                    "values": found.values[place].tolist(),
                    "probabilities": found.probabilities[place].tolist(),
                    "expected_values": found.expected_values[place].tolist(),
                    "distributions": found.distributions[place].tolist(),
                }
            )
        progress.update(len(batch))
    return answers


def write(path: Path, table: pa.Table) -> None:
    """Write a file that is either whole or not there."""
    draft = path.with_suffix(".tmp")
    pq.write_table(table, draft, compression="zstd")
    os.replace(draft, path)


def _join(names: list[Path], target: Path, stamp: str) -> None:
    """Join the parts, one at a time, into one file that remembers its settings."""
    draft = target.with_suffix(".tmp")
    with pq.ParquetWriter(draft, SCHEMA.with_metadata({"au_llava": stamp}), compression="zstd") as writer:
        for name in names:
            writer.write_table(pq.read_table(name).replace_schema_metadata({"au_llava": stamp}))
    os.replace(draft, target)
