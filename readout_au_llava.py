"""How AU-LLaVA answers: greedy decoding under the answer's grammar, in a handful of forward passes.

An answer array is mostly brackets, commas and points, and its digits can take few values. The model therefore drafts
the whole answer, verifies it in one forward pass, keeps it up to the first place where it would have chosen otherwise,
takes its own choices as the next draft, and repeats. The result is, token for token, that of greedy `generate` under
the same grammar.

Nothing here knows of Action Units or text: the grammar comes as token ids.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.generation import LogitsProcessor


# How many texts' keys and values are kept; for a language model of 7 billion parameters one takes about 0.25 GB.
PREFIXES = 4


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
    """

    opening: list[int]
    separator: list[int]
    closing: list[int]
    value_tokens: torch.Tensor
    values: torch.Tensor
    count: int
    neutral: int

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


@dataclass
class Recognition:
    """What [`ReadoutMixin.recognize`] gives for a batch of images.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): The answers' token ids, end-of-sequence token
            included.
        values (`torch.Tensor` of shape `(batch, count)`): The number answered for each Action Unit, in the task's
            range.
        probabilities (`torch.Tensor` of shape `(batch, count)`): The model's probability, 0 to 1, of that number.
        expected_values (`torch.Tensor` of shape `(batch, count)`): Mean of the distribution over the task's values;
            for a 0/1 task it is the probability of 1.
        distributions (`torch.Tensor` of shape `(batch, count, values)`): The model's probability of every allowed
            value. Where a value is written with several free tokens, the digits after a leading digit that was not
            chosen have not been seen by the model, and their share is spread evenly.
        forwards (`int`): Forward passes that the batch took.
    """

    sequences: torch.Tensor
    values: torch.Tensor
    probabilities: torch.Tensor
    expected_values: torch.Tensor
    distributions: torch.Tensor
    forwards: int


class _ValueReader:
    """Chooses values from logits, one token at a time, among the values that are still possible."""

    def __init__(self, grammar: AnswerGrammar, device: torch.device):
        self.grammar = grammar
        self.slots = grammar.slots().to(device)
        self.tokens = grammar.value_tokens.to(device)
        # Per token of a value: the distinct token ids there, and which of them each value uses.
        self.alphabets, self.letters = [], []
        for column in self.tokens.T:
            alphabet, letter = torch.unique(column, return_inverse=True)
            self.alphabets.append(alphabet)
            self.letters.append(letter)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Greedy choice under the grammar.

        Args:
            logits (`torch.Tensor` of shape `(batch, count, width, vocabulary)`): Logits for each token of each value.

        Returns:
            The chosen tokens `(batch, count, width)`, and for each of the `width` tokens the log-probabilities
            `(batch, count, alphabet)` of the tokens allowed there after the ones chosen before.
        """
        possible = torch.ones(*logits.shape[:2], len(self.tokens), dtype=torch.bool, device=logits.device)
        chosen, log_probabilities = [], []
        for place, (alphabet, letter) in enumerate(zip(self.alphabets, self.letters, strict=True)):
            allowed = torch.zeros(*possible.shape[:2], len(alphabet), dtype=torch.bool, device=logits.device)
            allowed = allowed.scatter_reduce(2, letter.expand_as(possible), possible, "amax")
            scores = logits[:, :, place, alphabet].float().masked_fill(~allowed, -torch.inf).log_softmax(-1)
            best = scores.argmax(-1)
            chosen.append(alphabet[best])
            log_probabilities.append(scores)
            possible = possible & (letter == best[..., None])
        return torch.stack(chosen, -1), log_probabilities

    def distribution(self, answer: torch.Tensor, log_probabilities: list[torch.Tensor]) -> torch.Tensor:
        """Probability of every value `(batch, count, values)`, given the chosen tokens `(batch, count, width)`."""
        total = torch.zeros(*answer.shape[:2], len(self.tokens), device=answer.device)
        on_path = torch.ones_like(total, dtype=torch.bool)
        for place, (letter, scores) in enumerate(zip(self.letters, log_probabilities, strict=True)):
            same_start = (self.tokens[:, None, :place] == self.tokens[None, :, :place]).all(-1)
            branches = torch.tensor([letter[row].unique().numel() for row in same_start], device=answer.device)
            total += torch.where(on_path, scores[..., letter], -branches.log())
            on_path = on_path & (self.tokens[:, place] == answer[..., place, None])
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


class ReadoutMixin:
    """Gives a vision-language model the method [`recognize`]."""

    # What the model that this is mixed into brings along.
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    model: Callable
    parameters: Callable
    get_image_features: Callable
    __call__: Callable

    _prefixes: tuple[int, OrderedDict[tuple[int, ...], DynamicCache]] | None = None

    @torch.inference_mode()
    def recognize(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        grammar: AnswerGrammar,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
        reuse_prefix: bool = True,
    ) -> Recognition:
        """Answer under a grammar: always the right number of values, always in range.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Left-padded prompts with their image tokens.
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): One face crop a prompt.
            grammar (`AnswerGrammar`): From [`AuLlavaProcessor.grammar`].
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 for padding.
            draft (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): A first guess at the answers, e.g. those
                of the previous video frame. It changes the number of passes, never the answer.

            reuse_prefix (`bool`, *optional*, defaults to `True`): Compute the text that all prompts begin with only
                once, for this batch and later ones. It pays with the text before the image, and never changes the
                answer.

        Returns:
            [`Recognition`].

        Raises:
            ValueError: The prompts' image tokens do not fit the pictures: processor and model do not belong together.
        """
        device, (batch, prompt_length), length = self.device, input_ids.shape, len(grammar)
        encoded = self._encode_images(input_ids, pixel_values)
        input_ids = input_ids.to(device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = torch.cat([attention_mask.to(device), attention_mask.new_ones(batch, length).to(device)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        reader = _ValueReader(grammar, device)
        template = grammar.template().to(device)
        answers = (template.expand(batch, -1) if draft is None else draft.to(device)).clone()
        width = [len(alphabet) for alphabet in reader.alphabets]
        finals = [torch.zeros(batch, grammar.count, size, device=device) for size in width]

        shared = self._shared_length(input_ids, attention_mask) if reuse_prefix else 0
        cache = self._prefix(input_ids[:1, :shared], batch) if shared else DynamicCache(config=self.config)
        rows = torch.arange(batch, device=device)  # the rows still being decoded
        start, forwards = 0, 0  # answer tokens before `start` are final in all of `rows` and need no recomputing
        logits = None
        while len(rows):
            if forwards == 0:
                tokens = torch.cat([input_ids[:, shared:], answers[:, :-1]], 1)
                begin, image = shared, {"image": encoded}
            else:
                begin, image = prompt_length + start - 1, None
                tokens = answers[rows, start - 1 : -1]
            end = prompt_length + length - 1
            outputs = self(
                input_ids=tokens,
                attention_mask=mask[rows, :end],
                position_ids=positions[rows, begin:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=length - start,
                mm_encoder_outputs=image,
            )
            forwards += 1
            if logits is None:
                logits = outputs.logits
            else:
                logits[:, start:] = outputs.logits
            chosen, log_probabilities = reader.choose(logits[:, reader.slots])
            choices = template.repeat(len(rows), 1)
            choices[:, reader.slots] = chosen
            agrees = choices == answers[rows]
            answers[rows] = choices
            done = agrees.all(1)
            for final, scores in zip(finals, log_probabilities, strict=True):
                final[rows[done]] = scores[done]
            if done.all():
                break
            # Up to its first disagreement, and with the choice made there, each row is final; the draft goes on from
            # the earliest such place in the batch, so that one cache serves every row.
            keep = ~done
            start = int((~agrees[keep]).int().argmax(1).min()) + 1
            cache.crop(-(cache.get_seq_length() - (prompt_length + start - 1)))
            if done.any():
                cache.batch_select_indices(keep.nonzero().squeeze(1))
                rows, logits = rows[keep], logits[keep]

        distributions = reader.distribution(answers[:, reader.slots], finals)
        values = grammar.values.to(device)
        picked = (answers[:, reader.slots][:, :, None] == reader.tokens).all(-1)
        return Recognition(
            sequences=answers,
            values=(picked * values).sum(-1),
            probabilities=(picked * distributions).sum(-1),
            expected_values=distributions @ values,
            distributions=distributions,
            forwards=forwards,
        )

    def _shared_length(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Tokens before the image that all rows of a batch have in common."""
        same = (input_ids == input_ids[:1]).all(0) & attention_mask.to(input_ids.device).bool().all(0)
        same &= (input_ids != self.config.image_token_id).all(0)
        return int(same.int().argmin())

    def _prefix(self, tokens: torch.Tensor, batch: int) -> DynamicCache:
        """Keys and values of a text `(1, length)`, from memory if they are there, repeated for a batch."""
        # Training steps, loading, casting and moving all change one of these.
        weights = hash(tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in self.parameters()))
        if self._prefixes is None or self._prefixes[0] != weights:
            self._prefixes = (weights, OrderedDict())
        known, key = self._prefixes[1], tuple(tokens[0].tolist())
        if key not in known:
            cache = DynamicCache(config=self.config)
            self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            known[key] = cache
            if len(known) > PREFIXES:
                known.popitem(last=False)
        known.move_to_end(key)
        copied = copy.deepcopy(known[key])
        copied.batch_repeat_interleave(batch)
        return copied

    def _encode_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor):
        """Encode the pictures, and see that each prompt holds as many image tokens as its picture has patches."""
        encoded = self.get_image_features(pixel_values=pixel_values.to(self.device, self.dtype))
        found = (input_ids == self.config.image_token_id).sum(1).tolist()
        expected = [len(patches) for patches in encoded.pooler_output]
        if found != expected:
            raise ValueError(
                f"The prompts hold {found} image tokens (id {self.config.image_token_id}), but the vision tower makes "
                f"{expected} patches of the pictures. Use the processor that was saved with this model."
            )
        return encoded
