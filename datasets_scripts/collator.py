"""Batches for training: rows with labels become freshly asked questions on freshly augmented pictures."""

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from ..action_units import TASKS, select
from ..processing_au_llava import AuLlavaProcessor
from .instructions import Question, ask, instruct


class QuestionCollator:
    """Puts one question to all pictures of a batch, then lets TRL's collator tokenise it.

    The units asked about and their order are drawn once a batch, so that all its prompts have the same text, whose
    keys and values need computing only once. What is drawn depends on the seed, the epoch (which the trainer sets in
    `epoch`) and the rows, and on nothing that came before: a resumed run, worker processes and batches fetched ahead
    change nothing.

    Args:
        collate (`Callable`): TRL's `DataCollatorForVisionLanguageModeling`.
        augment (`Callable`, *optional*): Called with picture, labels and generator; see `augmentation.py`.
        question ([`Question`], *optional*): Order, subsets, relations.
        targets ([`AnswerTargets`], *optional*): Adds weights and soft targets for answers; see `losses.py`.
        neutral ([`NeutralDraft`], *optional*): Hides digits of some answers from the model, never from the loss.
        seed (`int`, *optional*, defaults to 0): Seeds all draws.
    """

    def __init__(
        self,
        collate: Callable[[list[dict]], dict],
        augment: Callable | None = None,
        question: Question = Question(),  # noqa: B008 (frozen)
        neutral: "NeutralDraft | None" = None,
        targets: Callable | None = None,
        seed: int = 0,
    ):
        self.collate, self.augment, self.question, self.neutral = collate, augment, question, neutral
        self.targets, self.seed, self.epoch = targets, seed, 0

    def plain(self) -> "QuestionCollator":
        """The same without augmentation, chance, relations or weights: for validation, which asks as users do."""
        return QuestionCollator(self.collate)

    def __call__(self, rows: list[dict]) -> dict:
        names = repr([[row[name] for name in ("dataset", "task", "subject", "sequence", "frame")] for row in rows])
        generator = np.random.default_rng([self.seed, self.epoch, zlib.crc32(names.encode())])
        asked = int(generator.integers(2**31))
        samples = [self._sample(row, generator, asked) for row in rows]
        answers = [sample.pop("answer") for sample in samples]
        batch = self.collate(samples)
        if self.targets:
            batch |= self.targets(batch["labels"], answers)
        return self.neutral(batch, generator) if self.neutral else batch

    def _sample(self, row: dict, generator: np.random.Generator, asked: int) -> dict:
        units = select(row["action_units"])
        labels, image = dict(zip(units, row["labels"], strict=True)), row["images"][0]
        if self.augment:
            image, labels = self.augment(image, labels, generator)
        chosen, values = ask(labels, row["task"], units, self.question, np.random.default_rng(asked))
        told = Question(relations=self.question.relations)
        sample = instruct(dict(zip(chosen, values, strict=True)), row["task"], chosen, told)
        return {"images": [image], **sample, "answer": (row["task"], chosen, values)}


class NeutralDraft:
    """Teaches the parallel read-out: in some rows every digit of the answer stands as the neutral token.

    Such a row asks for each digit from the picture and the question alone, as `recognize(readout="parallel")` does.
    Labels are never touched. A share below 1 keeps the exact read-out, which sees the digits before, in practice.

    Args:
        processor ([`AuLlavaProcessor`]): Names the digits' tokens and the neutral one.
        share (`float`): Share of rows (0 to 1) whose digits are hidden.
    """

    def __init__(self, processor: AuLlavaProcessor, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"neutral is {share}; give the share of answers, 0 to 1, whose digits are hidden.")
        grammars = [processor.grammar(task) for task in TASKS]
        self.digits = torch.cat([grammar.value_tokens[:, grammar.free()].flatten() for grammar in grammars]).unique()
        self.token, self.share = grammars[0].neutral, share

    def __call__(self, batch: dict, generator: np.random.Generator) -> dict:
        """Hide digits in `batch["input_ids"]` `(batch, length)` where `batch["labels"]` has them."""
        rows = torch.from_numpy(generator.random(len(batch["labels"])) < self.share)
        hidden = torch.isin(batch["labels"], self.digits) & rows[:, None]
        return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, self.token)}


class QuestionSampler(Sampler[int]):
    """Shuffles rows so that each batch holds rows of one question, and batches of all questions mix.

    Args:
        questions (`Sequence`): What each row asks, e.g. its task.
        batch_size (`int`): Rows a batch.
        seed (`int`): Seeds the order, together with the epoch.

    Example:

    >>> order = list(QuestionSampler(["a", "b", "a", "b"], batch_size=2, seed=0))
    >>> sorted(order[:2]) in ([0, 2], [1, 3])
    True
    """

    def __init__(self, questions: Sequence, batch_size: int, seed: int):
        self.groups = [np.flatnonzero(np.asarray(questions) == name) for name in sorted(set(questions))]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch; the trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        whole, rest = [], []
        for group in self.groups:
            rows = group[torch.randperm(len(group), generator=generator).numpy()].tolist()
            batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
            whole += [batch for batch in batches if len(batch) == self.batch_size]
            rest += [row for batch in batches if len(batch) < self.batch_size for row in batch]
        for place in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[place]
        yield from rest
