"""What a model's answers to a batch of pictures are: a distribution for each value, and the number decided on it.

Nothing here knows of networks or text; Action Units are names in a calibration.
"""

from dataclasses import dataclass, replace

import torch

from .grammar_au_llava import AnswerGrammar


DECISIONS = ("mode", "mean", "median")
FAINT = 1e-12  # a probability below is taken for this, so that it has a logarithm


@dataclass
class Recognition:
    """What `model.recognize` gives for a batch of images.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): The answers' token ids, end-of-sequence token
            included.
        values (`torch.Tensor` of shape `(batch, count)`): The number answered for each Action Unit, in the task's
            range.
        probabilities (`torch.Tensor` of shape `(batch, count)`): The model's probability, 0 to 1, of that number.
        expected_values (`torch.Tensor` of shape `(batch, count)`): Mean of the distribution over the task's values;
            for a 0/1 task it is the probability of 1.
        distributions (`torch.Tensor` of shape `(batch, count, values)`): The model's probability of every allowed
            value. With `readout="exact"` it is exact where a value is written with one free token. With several, each
            token's is exact after those that were chosen before it; the share of what begins otherwise is spread
            evenly over it, so that of an intensity of 1.00 nothing is known of the values below but their sum. With
            `readout="parallel"` it is the product of the digits' own probabilities, each read without knowing the
            others.
        forwards (`int`): Forward passes that the batch took.
        decision (`str`): How `values` follow from `distributions`: `"mode"`, `"mean"` or `"median"`.
        evidence (`torch.Tensor` of shape `(batch, count, 16, 16)`, *optional*): What each answer rested on; see
            [`find_evidence`].
    """

    sequences: torch.Tensor
    values: torch.Tensor
    probabilities: torch.Tensor
    expected_values: torch.Tensor
    distributions: torch.Tensor
    forwards: int
    decision: str = "mode"
    evidence: torch.Tensor | None = None

    def decide(self, decision: str, allowed: torch.Tensor) -> "Recognition":
        """Answer with another number of each distribution.

        Args:
            decision (`str`): `"mode"` keeps the values, the most probable ones digit by digit; `"mean"` answers with
                the expected value, a real number and best for correlations and squared errors; `"median"` with the
                lowest value that at least half of the probability does not exceed, best for absolute errors.
            allowed (`torch.Tensor` of shape `(values,)`): The task's values, in rising order.

        Returns:
            [`Recognition`] whose `values` are decided so, and whose `probabilities` are those of the nearest allowed
            values.

        Raises:
            ValueError: The decision is none of these.
        """
        if decision not in DECISIONS:
            raise ValueError(f"Unknown decision {decision!r}; accepted: {', '.join(DECISIONS)}.")
        if decision == "mode":
            return self
        if decision == "mean":
            values = self.expected_values
        else:
            below = (self.distributions.cumsum(-1) < 0.5).sum(-1)
            values = allowed.to(below.device)[below.clamp(max=len(allowed) - 1)]
        probabilities = self.distributions.gather(-1, _nearest(values, allowed)[..., None]).squeeze(-1)
        return replace(self, values=values, probabilities=probabilities, decision=decision)

    def presence(self, least: int, temperatures: list[float]) -> "Recognition":
        """Of answers about levels, whether each unit is present.

        Args:
            least (`int`): The lowest level that counts as present; see `PRESENT_LEVEL`.
            temperatures (`list[float]`): For each unit, what its distribution is raised to the inverse of before.

        Returns:
            [`Recognition`] of 0 and 1, decided as before; `sequences` are still the levels that were written.
        """
        present = _tempered(self.distributions, temperatures)[..., least:].sum(-1)
        distributions = torch.stack([1 - present, present], -1)
        probabilities, values = distributions.max(-1)
        found = replace(
            self,
            values=values.to(present),
            probabilities=probabilities,
            expected_values=present,
            distributions=distributions,
        )
        return found.decide(self.decision, torch.tensor([0.0, 1.0]))

    def calibrated(self, fitted: dict, names: list[str], allowed: torch.Tensor) -> "Recognition":
        """Apply what was fitted to a model's answers about people apart from those asked about.

        Args:
            fitted (`dict`): `temperature` (1 if there is none), which distributions are raised to the inverse of; or
                by name `temperatures`, in place of it (1 for a name that is not in them). Then what the `"mode"` is
                replaced by: `thresholds` on P(1), 0 to 1, by name; or `lines`, by name `[zero, slope]`, which make of
                the expected value, as the model gave it, the allowed value nearest to `slope * (expected - zero)`; or
                a `decision`, see [`decide`]. Where a name has no threshold, it is 0.5; no line, its value stays.
            names (`list[str]`): What the columns are called there.
            allowed (`torch.Tensor` of shape `(values,)`): The task's values, in rising order.

        Returns:
            [`Recognition`]; a `"mean"` or `"median"` is taken again from the new distributions.
        """
        distributions = _tempered(self.distributions, temperatures_of(fitted, names))
        expected, values = distributions @ allowed, self.values
        if "thresholds" in fitted:
            limits = torch.tensor([fitted["thresholds"].get(name, 0.5) for name in names], dtype=expected.dtype)
            values = (expected >= limits).to(expected)
        if "lines" in fitted:
            known = torch.tensor([name in fitted["lines"] for name in names])
            lines = [fitted["lines"].get(name, (0.0, 0.0)) for name in names]
            zeros, slopes = torch.tensor(lines, dtype=expected.dtype).T
            found = slopes * (self.expected_values - zeros)
            values = torch.where(known, allowed[_nearest(found, allowed)], values)
        moved = replace(
            self,
            values=values,
            probabilities=distributions.gather(-1, _nearest(values, allowed)[..., None]).squeeze(-1),
            expected_values=expected,
            distributions=distributions,
        )
        return moved.decide(fitted.get("decision", "mode") if self.decision == "mode" else self.decision, allowed)

    def intervals(self, fitted: dict, names: list[str], allowed: torch.Tensor) -> torch.Tensor:
        """Where the true numbers lie nine times in ten, as far as people apart from those asked about tell.

        Args:
            fitted (`dict`): What [`calibrated`] has applied. Its `mass`, 0 to 1, says how much of a distribution the
                values from end to end hold, grown from the answer towards the more probable side. Or its `margins`
                say by name `[lowest, more]`: how far at most the truth lies from the task's lowest value where that is
                answered, and from any other answer.
            names (`list[str]`): What the columns are called there.
            allowed (`torch.Tensor` of shape `(values,)`): The task's values, in rising order.

        Returns:
            `torch.Tensor` of shape `(batch, count, 2)`: Lower and upper ends, inside the task's range, on the CPU; NaN
            where there is no mass and a name has no margin.
        """
        if "mass" in fitted:
            ends = _grown(self.distributions.cpu(), _nearest(self.values.cpu(), allowed), fitted["mass"])
            return allowed[torch.stack(ends, -1)]
        unknown, values = (float("nan"), float("nan")), self.values.cpu()
        margins = torch.tensor([fitted.get("margins", {}).get(name, unknown) for name in names], dtype=values.dtype)
        reach = torch.where(values > allowed[0], margins[:, 1], margins[:, 0])
        return torch.stack([values - reach, values + reach], -1).clamp(float(allowed[0]), float(allowed[-1]))

    def both_sides(self, grammar: AnswerGrammar) -> "Recognition":
        """Join the answers about pictures with those about their mirror images.

        What is right of a face does not hang on which way round it is, but a model's errors do. The joint distribution
        is the geometric mean of both, scaled to sum 1; the value is its most probable one, digit by digit.

        Args:
            grammar (`AnswerGrammar`): Of the answers. Where a value's counterpart was not asked about
                (`grammar.mirrored` is -1), the picture's own distribution stays.

        Returns:
            [`Recognition`] with half of the rows: this one has the pictures in the first half of its rows, and their
            mirror images, in the same order, in the second.
        """
        (own, other), device = self.distributions.chunk(2), self.distributions.device
        places = torch.tensor(grammar.mirrored, device=device)
        paired = (places >= 0)[:, None]
        logs = (own.clamp(min=FAINT).log() + other[:, places].clamp(min=FAINT).log()) / 2
        distributions = torch.where(paired, logs.softmax(-1), own)
        chosen, allowed = grammar.most_probable(distributions), grammar.values.to(device)
        sequences = self.sequences[: len(own)].clone()
        sequences[:, grammar.slots().to(device)] = grammar.value_tokens.to(device)[chosen]
        evidence = self.evidence
        if evidence is not None:
            here, there = evidence.chunk(2)
            maps = torch.where(paired[..., None], here + there[:, places].flip(-1), here)
            evidence = maps / maps.sum((2, 3), keepdim=True).clamp(min=FAINT)
        return replace(
            self,
            sequences=sequences,
            values=allowed[chosen],
            probabilities=distributions.gather(-1, chosen[..., None]).squeeze(-1),
            expected_values=distributions @ allowed,
            distributions=distributions,
            evidence=evidence,
        )


def temperatures_of(fitted: dict, names: list[str]) -> list[float]:
    """What the distribution of each name is raised to the inverse of, as [`Recognition.calibrated`] takes it."""
    usual = 1.0 if "temperatures" in fitted else fitted.get("temperature", 1.0)
    return [fitted.get("temperatures", {}).get(name, usual) for name in names]


def _tempered(distributions: torch.Tensor, temperatures: list[float]) -> torch.Tensor:
    """Distributions `(batch, count, values)` raised to the inverse of each unit's temperature, and scaled to sum 1."""
    powers = torch.tensor(temperatures, dtype=distributions.dtype, device=distributions.device)
    return (distributions.clamp(min=FAINT).log() / powers[:, None]).softmax(-1)


def _grown(distributions: torch.Tensor, start: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last places of runs that hold a mass, each grown from `start` on whichever side is more probable."""
    walls = torch.nn.functional.pad(distributions, (1, 1), value=-1.0)
    low, high = start + 1, start + 1
    held = walls.gather(-1, low[..., None])[..., 0]
    for _ in range(distributions.shape[-1] - 1):
        before, after = (walls.gather(-1, place[..., None])[..., 0] for place in (low - 1, high + 1))
        grows = (held < mass) & (torch.maximum(before, after) >= 0)
        down, up = grows & (before > after), grows & (before <= after)
        held = held + torch.where(grows, torch.maximum(before, after), 0)
        low, high = low - down.long(), high + up.long()
    return low - 1, high - 1


def _nearest(values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The place among the allowed values of the one nearest to each value."""
    return (values[..., None] - allowed.to(values.device)).abs().argmin(-1)
