"""What an answer may look like, as token ids, and how numbers are read from logits under that grammar.

Nothing here knows of Action Units, text or networks.
"""

from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessor


@dataclass(frozen=True)
class AnswerGrammar:
    """The token ids that an answer may hold: opening, `count` values with separators between them, closing.

    Args:
        opening (`list[int]`): Tokens before the first value.
        separator (`list[int]`): Tokens between two values.
        closing (`list[int]`): Tokens after the last value, the end-of-sequence token included.
        value_tokens (`torch.LongTensor` of shape `(values, width)`): How each allowed value is written.
        values (`torch.Tensor` of shape `(values,)`): The number that each of them stands for, in rising order.
        count (`int`): How many values an answer has: the number of Action Units asked about.
        neutral (`int`): The token that stands for a digit which is not known yet.
        mirrored (`list[int]`): For each value the place of the one that tells the same of the mirrored picture: its
            own, or that of the other side; -1 where that is not asked about.
    """

    opening: list[int]
    separator: list[int]
    closing: list[int]
    value_tokens: torch.Tensor
    values: torch.Tensor
    count: int
    neutral: int
    mirrored: list[int]

    @property
    def width(self) -> int:
        """Tokens of one value."""
        return self.value_tokens.shape[1]

    def __len__(self) -> int:
        """Tokens of a whole answer."""
        forced = len(self.opening) + (self.count - 1) * len(self.separator) + len(self.closing)
        return forced + self.count * self.width

    def slots(self) -> torch.Tensor:
        """`(count, width)`: the place in the answer of each token of each value."""
        starts = len(self.opening) + torch.arange(self.count) * (self.width + len(self.separator))
        return starts[:, None] + torch.arange(self.width)

    def template(self) -> torch.Tensor:
        """`(tokens,)`: an answer in which every value is the lowest one."""
        value = self.value_tokens[0].tolist()
        tokens = self.opening + (value + self.separator) * (self.count - 1) + value + self.closing
        return torch.tensor(tokens)

    def free(self) -> torch.Tensor:
        """`(width,)`: which tokens of a value tell values apart; for `0.35` the digits, not the point."""
        return (self.value_tokens != self.value_tokens[0]).any(0)

    def neutral_draft(self) -> torch.Tensor:
        """`(tokens,)`: an answer that says nothing: the neutral token in place of every free one."""
        tokens = self.template()
        tokens[self.slots()[:, self.free()]] = self.neutral
        return tokens

    def most_probable(self, distributions: torch.Tensor) -> torch.Tensor:
        """The value that greedy decoding would write: the most probable first token, then the next.

        Args:
            distributions (`torch.Tensor` of shape `(batch, count, values)`): Probability of every value.

        Returns:
            `torch.LongTensor` of shape `(batch, count)`: Places in `values`.
        """
        possible, tokens = torch.ones_like(distributions), self.value_tokens.to(distributions.device)
        for letters in tokens.T:
            # Each value's share is that of all possible values with the same token here.
            shares = (distributions * possible) @ (letters[:, None] == letters).to(distributions)
            best = letters[shares.argmax(-1)]
            possible = possible * (letters == best[..., None])
        return possible.argmax(-1)


class ValueReader:
    """Chooses values from logits, one token at a time, among the values that are still possible.

    Args:
        grammar (`AnswerGrammar`): The values and their tokens.
        device (`torch.device`): Where the logits will be.
    """

    def __init__(self, grammar: AnswerGrammar, device: torch.device):
        self.slots = grammar.slots().to(device)
        self.tokens = grammar.value_tokens.to(device)
        # Per token of a value: the distinct token ids there, which of them each value uses, and which of them may
        # follow what each value begins with.
        self.alphabets, self.letters, self.allowed = [], [], []
        for place, column in enumerate(self.tokens.T):
            alphabet, letter = torch.unique(column, return_inverse=True)
            same_start = (self.tokens[:, None, :place] == self.tokens[None, :, :place]).all(-1)
            uses = letter[:, None] == torch.arange(len(alphabet), device=device)
            self.alphabets.append(alphabet)
            self.letters.append(letter)
            self.allowed.append((same_start[:, :, None] & uses).any(1))

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Greedy choice under the grammar.

        Args:
            logits (`torch.Tensor` of shape `(batch, tokens, vocabulary)`): Logits for each token of an answer.

        Returns:
            The chosen tokens `(batch, count, width)`, and for each of the `width` tokens the logits
            `(batch, count, alphabet)` of the token ids that some value has there.
        """
        read = [
            logits[:, slots[:, None], alphabet].float()
            for slots, alphabet in zip(self.slots.T, self.alphabets, strict=True)
        ]
        possible = torch.ones(*read[0].shape[:2], len(self.tokens), dtype=torch.bool, device=logits.device)
        chosen = []
        for scores, alphabet, letter in zip(read, self.alphabets, self.letters, strict=True):
            allowed = torch.zeros_like(scores, dtype=torch.uint8)  # scatters of booleans are for the CPU only
            allowed = allowed.scatter_reduce(2, letter.expand_as(possible), possible.byte(), "amax").bool()
            best = scores.masked_fill(~allowed, -torch.inf).argmax(-1)
            chosen.append(alphabet[best])
            possible = possible & (letter == best[..., None])
        return torch.stack(chosen, -1), read

    def distribution(self, read: list[torch.Tensor], seen: torch.Tensor | None) -> torch.Tensor:
        """Probability of every value.

        Args:
            read (`list[torch.Tensor]`): From [`choose`].
            seen (`torch.LongTensor` of shape `(batch, count, width)`, *optional*): The tokens of each value that the
                model saw before those that it was asked for. What follows another beginning is unknown then, and its
                share is spread evenly: after `1.00` all of `0.00` to `0.99` alike. `None`: it saw neutral tokens,
                and the logits hold whatever comes before.

        Returns:
            `torch.Tensor` of shape `(batch, count, values)`.
        """
        total = torch.zeros(*read[0].shape[:2], len(self.tokens), device=read[0].device)
        known = torch.ones_like(total, dtype=torch.bool)
        for place, (scores, letter, allowed) in enumerate(zip(read, self.letters, self.allowed, strict=True)):
            norm = scores[:, :, None].masked_fill(~allowed, -torch.inf).logsumexp(-1)
            total += torch.where(known, scores[..., letter] - norm, -allowed.sum(-1).log())
            if seen is not None:
                known = known & (self.tokens[:, place] == seen[..., place, None])
        return total.exp()


class GrammarLogitsProcessor(LogitsProcessor):
    """Lets `generate` write nothing but answers of one grammar; slow, but stock transformers.

    Args:
        grammar (`AnswerGrammar`): What may be written.
        prompt_length (`int`): Tokens of the prompt, image tokens included.

    Example:

    >>> # model.generate(**inputs, logits_processor=[GrammarLogitsProcessor(grammar, inputs["input_ids"].shape[1])])
    """

    def __init__(self, grammar: AnswerGrammar, prompt_length: int):
        self.template, self.slots, self.tokens = grammar.template(), grammar.slots(), grammar.value_tokens
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.prompt_length
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        inside = (self.slots == place).nonzero()
        if len(inside):
            slot, offset = inside[0].tolist()
            tokens = self.tokens.to(input_ids.device)
            written = input_ids[:, input_ids.shape[1] - offset :]
            possible = (tokens[None, :, :offset] == written[:, None]).all(-1)
            for row, values in enumerate(possible):
                allowed[row, tokens[values, offset]] = True
        else:
            allowed[:, self.template[min(place, len(self.template) - 1)]] = True
        return scores.masked_fill(~allowed, -torch.inf)
