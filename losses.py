"""The loss on an answer: how much each of its tokens counts, and how wrong a near miss is.

Plain training asks for one exact token at each place of the answer array A. But A's digits are numbers, so a 4 in
place of a 5 is nearer than a 0; most faces show few Action Units, so answering 0 is nearly always right; and brackets,
commas and points are known after a few steps. [`AnswerTargets`] puts this into weights and soft targets for the
answer's tokens, and [`AnswerTrainer`] trains on them.

With every setting at its default the loss is that of TRL's `SFTTrainer`, which scores every word at every place of a
batch where it finds no Triton; [`AnswerTrainer`] scores the answers' places alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from .action_units import TASKS, ActionUnit, get_task
from .grammar_au_llava import AnswerGrammar
from .processing_au_llava import AuLlavaProcessor
from .trainer import AuLlavaTrainer


Answer = tuple[str, Sequence[ActionUnit], Sequence[float]]  # task, units asked about, their values

# A share below this counts as this one, lest a handful of labels rule the training.
LEAST_SHARE = 0.01


def presence(rows: Iterable[Mapping]) -> dict[tuple[str, str], float]:
    """How often each Action Unit is present: the share of known labels that are above the task's lowest value.

    Args:
        rows (`Iterable[Mapping]`): Training rows with `task`, `action_units` and `labels`, NaN for unknown.

    Returns:
        `dict`: By task and code, a share from 0 to 1.

    Example:

    >>> presence([{"task": "detection", "action_units": ["AU1"], "labels": [value]} for value in (0.0, 1.0, 0.0, 0.0)])
    {('detection', 'AU1'): 0.25}
    """
    known: Counter = Counter()
    present: Counter = Counter()
    for row in rows:
        low = get_task(row["task"]).values[0]
        for code, value in zip(row["action_units"], row["labels"], strict=True):
            if value == value:  # not NaN
                known[row["task"], code] += 1
                present[row["task"], code] += value > low
    return {name: present[name] / count for name, count in known.items()}


def soft_digits_table(grammar: AnswerGrammar, candidates: torch.Tensor, deviation: float) -> torch.Tensor:
    """For each value a label may have, the target distribution of each token that writes it.

    The label becomes a normal curve over the task's values. The target of a token is that curve's share of each digit,
    given the label's tokens before it; so 0.39 asks for a tenth of 3 or, less, 4, and for the hundredth after a 3.

    Args:
        grammar ([`AnswerGrammar`]): How the task's values are written.
        candidates (`torch.LongTensor` of shape `(candidates,)`): The token ids that distributions are over.
        deviation (`float`): The curve's standard deviation as a share of the task's range; 0 gives the label alone.

    Returns:
        `torch.Tensor` of shape `(values, width, candidates)`; the last dimension sums to 1.
    """
    values, tokens = grammar.values, grammar.value_tokens
    if deviation:
        steps = (values[:, None] - values) / (deviation * (values[-1] - values[0]))
        curve = (-(steps**2) / 2).softmax(-1)
    else:
        curve = torch.eye(len(values))
    begins_alike = torch.ones(len(values), len(values), dtype=torch.bool)
    places = []
    for column in tokens.T:
        share = curve * begins_alike
        places.append(share / share.sum(1, keepdim=True) @ (column[:, None] == candidates).float())
        begins_alike &= column[:, None] == column
    return torch.stack(places, 1)


class AnswerTargets:
    """Weights and soft targets for the tokens of answers; called by `QuestionCollator`.

    Args:
        processor ([`AuLlavaProcessor`]): Knows how answers are written in tokens.
        soft_digits (`float`, *optional*, defaults to 0): How far a label spreads to its neighbours: the standard
            deviation of the target, as a share (0 to 1) of the task's range. With 0.1, a level of 3 asks for 3 with
            0.79 and for 2 and 4 with 0.11 each; 0.35 spreads by 0.10; and 0 or 1 of `detection` stays as it is. At the
            ends of the range the curve is cut off and its mean lies inside: at 0.08 for an intensity of 0.
        rare_weight (`float`, *optional*, defaults to 0): How far a present unit counts more than an absent one, from 0
            (the same) to 1 (both classes of each unit count the same in total). The model's probabilities shift
            towards present by this; calibrate it afterwards.
        format_weight (`float`, *optional*, defaults to 1): The weight of brackets, commas, blanks, points and the end
            of the answer beside a digit's weight of 1. An answer's total weight stays the same.
        shares (`dict`, *optional*): What [`presence`] found in the training rows; needed for `rare_weight`.

    Raises:
        ValueError: A setting is out of range, or shares are missing.
    """

    def __init__(
        self,
        processor: AuLlavaProcessor,
        soft_digits: float = 0.0,
        rare_weight: float = 0.0,
        format_weight: float = 1.0,
        shares: Mapping[tuple[str, str], float] | None = None,
    ):
        for name, value in (("soft_digits", soft_digits), ("rare_weight", rare_weight)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; give a number from 0 (off) to 1.")
        if not format_weight >= 0:
            raise ValueError(f"format_weight is {format_weight!r}; give 0 or more, 1 to treat all tokens alike.")
        if rare_weight and shares is None:
            raise ValueError("rare_weight needs `shares`: how often each unit is present, from `presence(rows)`.")
        self.rare_weight, self.format_weight, self.shares = rare_weight, format_weight, shares or {}
        self.grammars = {task: processor.grammar(task, TASKS[task].preset) for task in TASKS}
        self.candidates = torch.cat([grammar.value_tokens.flatten() for grammar in self.grammars.values()]).unique()
        self.tables = {
            task: soft_digits_table(grammar, self.candidates, soft_digits) for task, grammar in self.grammars.items()
        }

    def __call__(self, labels: torch.Tensor, answers: Sequence[Answer]) -> dict[str, torch.Tensor]:
        """Tensors to add to a batch.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`): Token ids of the answers, -100 elsewhere.
            answers (`Sequence`): For each row the task, the units asked about, and their values.

        Returns:
            `dict`: `token_weights` `(batch, length)`, 0 outside the answer; `soft_targets`
            `(batch, length, candidates)`, all zeros where the label itself is the target; and `soft_tokens`
            `(batch, candidates)`, the candidates' token ids.

        Raises:
            ValueError: The labels of a row are not its answer.
        """
        weights = torch.zeros(labels.shape)
        soft = torch.zeros(*labels.shape, len(self.candidates))
        for row, (task, units, values) in enumerate(answers):
            grammar = replace(self.grammars[task], count=len(units))
            places = (labels[row] != -100).nonzero().squeeze(-1)
            if len(places) != len(grammar):
                raise ValueError(
                    f"Row {row} of the batch has {len(places)} answer tokens, but {task} of {len(units)} Action Units "
                    f"takes {len(grammar)}; train with this processor's own chat template and max_length null."
                )
            texts = get_task(task).texts
            numbers = [texts.index(get_task(task).write(value)) for value in values]
            slots = grammar.slots()
            soft[row, places[slots]] = self.tables[task][numbers]
            digits = slots[:, grammar.free()]  # all but points
            weight = torch.full((len(grammar),), float(self.format_weight))
            weight[digits] = 1.0
            weight *= len(weight) / weight.sum()
            weight[digits] *= torch.tensor(
                [self._rarity(task, unit, number > 0) for unit, number in zip(units, numbers, strict=True)]
            )[:, None]
            weights[row, places] = weight
        return {
            "token_weights": weights,
            "soft_targets": soft,
            "soft_tokens": self.candidates.expand(len(labels), -1).clone(),
        }

    def _rarity(self, task: str, unit: ActionUnit, present: bool) -> float:
        """The weight of a present or absent unit; its mean over the training labels is 1."""
        if not self.rare_weight:
            return 1.0
        share = min(max(self.shares[task, unit.code], LEAST_SHARE), 1 - LEAST_SHARE)
        total = share ** (1 - self.rare_weight) + (1 - share) ** (1 - self.rare_weight)
        return (share if present else 1 - share) ** -self.rare_weight / total


def answer_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, soft: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Weighted cross entropy, summed over the answers' tokens.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`): Each place's prediction of the same place.
        labels (`torch.LongTensor` of shape `(batch, length)`): -100 where nothing is learnt.
        weights (`torch.Tensor` of shape `(batch, length)`): As from [`AnswerTargets`].
        soft (`torch.Tensor` of shape `(batch, length, candidates)`): As from [`AnswerTargets`].
        tokens (`torch.LongTensor` of shape `(candidates,)`): Token ids of the candidates.
    """
    log_probabilities = logits.float().log_softmax(-1)
    exact = log_probabilities.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    near = (soft * log_probabilities[..., tokens]).sum(-1)
    return -(weights * torch.where(soft.any(-1), near, exact))[labels != -100].sum()


class AnswerTrainer(AuLlavaTrainer):
    """[`AuLlavaTrainer`] with the loss of [`answer_loss`]; without [`AnswerTargets`] each token counts the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        learnt = labels != -100
        plain = {
            "token_weights": learnt.float(),
            "soft_targets": torch.zeros(*labels.shape, 0, device=labels.device),
            "soft_tokens": labels.new_zeros(len(labels), 0),
        }
        inputs = plain | dict(inputs)
        del inputs["labels"]
        weights, soft, tokens = (inputs.pop(name) for name in plain)
        answer = labels.shape[1] - int(learnt.any(0).int().argmax())  # places from the first answer token to the end
        self.core().check_places(inputs["attention_mask"])
        outputs = model(**inputs, use_cache=False, logits_to_keep=answer + 1)
        labels, weights, soft = labels[:, -answer:], weights[:, -answer:], soft[:, -answer:]
        logits = outputs.logits[:, :-1]
        count = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        loss = answer_loss(logits, labels, weights, soft, tokens[0]) / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over processes; `count` is of them all

        # What SFTTrainer logs beside the loss
        right = (logits.argmax(-1) == labels).sum()
        right, seen = self.accelerator.gather(torch.stack([right, learnt.sum()])).view(-1, 2).sum(0)
        self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append((right / seen).item())
        return (loss, outputs) if return_outputs else loss
