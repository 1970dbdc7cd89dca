"""How AU-LLaVA answers: greedy decoding under the answer's grammar, in a handful of forward passes.

An answer array is mostly brackets, commas and points, and its digits can take few values. The model therefore drafts
the whole answer, verifies it in one forward pass, keeps it up to the first place where it would have chosen otherwise,
takes its own choices as the next draft, and repeats. The result is, token for token, that of greedy `generate` under
the same grammar. Or it reads every value at once, from one pass over a draft that says nothing.

Nothing here knows of Action Units or text: the grammar comes as token ids.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .evidence_au_llava import find_evidence
from .grammar_au_llava import AnswerGrammar, ValueReader
from .recognition_au_llava import Recognition


READOUTS = ("exact", "parallel")

# How many texts' keys and values are kept; for a language model of 7 billion parameters one takes about 0.25 GB.
PREFIXES = 4
SAMPLE = 997  # every 997th number of a weight is looked at, to tell whether it is still the same


_TURNS: WeakKeyDictionary = WeakKeyDictionary()  # not in the models, which are copied and pickled; locks are not


def _in_turn(method: Callable) -> Callable:
    """Let threads use a model one after the other: its caches, and how it attends, are all of theirs.

    Amid a training it is read as in use: dropout would change the answer, and batch norms the model.
    """

    @wraps(method)
    def alone(self, *args, **kwargs):
        with _TURNS.setdefault(self, RLock()):
            learning = [part for part in self.modules() if part.training]
            for part in learning:
                part.training = False
            try:
                return method(self, *args, **kwargs)
            finally:
                for part in learning:
                    part.training = True

    return alone


# Caches hold all tokens, in layers with a sliding window, too: masks hide what is outside, and a cache of the window
# alone could not go back to an earlier token.
class _StaticCache(Cache):
    """A cache of fixed size, which can forget the tokens after a place."""

    layers: list[StaticLayer]  # type: ignore[assignment]

    def __init__(self, config: PreTrainedConfig, size: int):
        super().__init__(layers=[StaticLayer(size) for _ in range(config.get_text_config().num_hidden_layers)])

    def rewind(self, length: int) -> None:
        """Go on after the first `length` tokens."""
        for layer in self.layers:
            layer.cumulative_length.fill_(length)


class ReadoutMixin:
    """Gives a vision-language model the method [`recognize`]."""

    # What the model that this is mixed into brings along.
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    model: Any
    get_image_features: Callable
    modules: Callable
    __call__: Callable

    _prefixes: tuple[tuple, OrderedDict[tuple[int, ...], DynamicCache]] | None = None
    _static: tuple[tuple, _StaticCache] | None = None

    @_in_turn
    @torch.inference_mode()
    def recognize(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        grammar: AnswerGrammar,
        attention_mask: torch.Tensor | None = None,
        draft: torch.Tensor | None = None,
        reuse_prefix: bool = True,
        readout: str = "exact",
        decision: str = "mode",
        static_shapes: bool = False,
        return_evidence: bool | str = False,
        encoded: BaseModelOutputWithPooling | None = None,
        mirror: bool = False,
    ) -> Recognition:
        """Answer under a grammar: always the right number of values, always in range. Threads take turns.

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
            readout (`str`, *optional*, defaults to `"exact"`): `"exact"` answers as greedy `generate` under the
                grammar would. `"parallel"` reads all values from one forward pass in which the answer's digits are
                neutral; the model has to be trained for it (`train_sft.py --neutral`).
            decision (`str`, *optional*, defaults to `"mode"`): What is made of a distribution: see
                [`Recognition.decide`].
            static_shapes (`bool`, *optional*, defaults to `False`): Keep rows and lengths from pass to pass, in a
                cache of fixed size, so that a compiled `forward` meets two shapes only. The answer is the same.
            return_evidence (`bool` or `str`, *optional*, defaults to `False`): Also tell where the model looked:
                `True` or `"attention"`, or `"occlusion"`; see [`find_evidence`].
            encoded (`BaseModelOutputWithPooling`, *optional*): From [`encode`], with the same `mirror`: several
                questions about a picture look at it once. `pixel_values` are then needed for evidence only.
            mirror (`bool`, *optional*, defaults to `False`): Also ask about each picture's mirror image, and join both
                answers; see [`Recognition.both_sides`]. Twice the work, and fewer errors.

        Returns:
            [`Recognition`].

        Raises:
            ValueError: There are not as many prompts as pictures; their image tokens do not fit the pictures, as
                processor and model do not belong together; prompt and answer are longer than the language model's
                table of places; an unknown `readout` or `decision`; a draft of another shape, or one for the parallel
                read-out, which has its own.
        """
        if readout not in READOUTS:
            raise ValueError(f"Unknown readout {readout!r}; accepted: {', '.join(READOUTS)}.")
        if readout == "parallel" and draft is not None:
            raise ValueError("The parallel read-out has a draft of its own; leave `draft` out.")
        if draft is not None and draft.shape != (wanted := (len(input_ids), len(grammar))):
            raise ValueError(f"The draft is of shape {tuple(draft.shape)}; give an answer for each prompt: {wanted}.")
        if mirror:
            if pixel_values is not None:
                pixel_values = with_mirror_images(pixel_values)
            both = self.recognize(
                torch.cat([input_ids, input_ids]), pixel_values, grammar,
                None if attention_mask is None else torch.cat([attention_mask, attention_mask]),
                None if draft is None else torch.cat([draft, draft]),
                reuse_prefix, readout,
                static_shapes=static_shapes, return_evidence=return_evidence, encoded=encoded,
            )  # fmt: skip
            return both.both_sides(grammar).decide(decision, grammar.values.to(self.device))
        device, (batch, prompt_length), length = self.device, input_ids.shape, len(grammar)
        if encoded is None:
            if pixel_values is None:
                raise ValueError("No picture was given; give `pixel_values`, or `encoded` from `encode`.")
            encoded = self.encode(pixel_values)
        self._check_image_tokens(input_ids, encoded)
        input_ids = input_ids.to(device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = torch.cat([attention_mask.to(device), attention_mask.new_ones(batch, length).to(device)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        reader, template = ValueReader(grammar, device), grammar.template().to(device)
        if draft is None:
            draft = (grammar.neutral_draft() if readout == "parallel" else template).expand(batch, -1)
        answers = template.repeat(batch, 1)  # which knows the tokens around the values better than any draft
        answers[:, reader.slots] = draft.to(device)[:, reader.slots]
        finals = [torch.zeros(batch, grammar.count, len(letters), device=device) for letters in reader.alphabets]

        end = prompt_length + length - 1  # nothing is asked of the last token
        self.check_places(mask[:, :end])
        shared = self._shared_length(input_ids, attention_mask) if reuse_prefix else 0
        cache = self._cache(input_ids[:1, :shared], batch, end if static_shapes else None)
        rows = torch.arange(batch, device=device)  # the rows still being decoded
        start, forwards = 0, 0  # answer tokens before `start` are final in all of `rows` and need no recomputing
        logits = None
        while True:
            if forwards == 0:
                tokens = torch.cat([input_ids[:, shared:], answers[:, :-1]], 1)
                begin, image = shared, {"image": encoded}
            else:
                begin, image = prompt_length + start - 1, None
                tokens = answers[rows, start - 1 : -1]
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
                logits = outputs.logits.clone() if static_shapes else outputs.logits  # CUDA graphs reuse their outputs
            else:
                logits[:, start:] = outputs.logits
            chosen, read = reader.choose(logits)
            choices = template.repeat(len(rows), 1)
            choices[:, reader.slots] = chosen
            agrees = choices == answers[rows]
            answers[rows] = choices
            done = agrees.all(1) | (readout == "parallel")
            for final, scores in zip(finals, read, strict=True):
                final[rows[done]] = scores[done]
            if done.all():
                break
            # Up to its first disagreement, and with the choice made there, each row is final. The draft goes on from
            # the earliest such place in the batch, so that one cache serves every row; rows that are further check
            # the same tokens as alone, so none needs more passes for the company. Finished rows leave.
            if isinstance(cache, _StaticCache):
                start = 1
                cache.rewind(prompt_length)
                continue
            keep = ~done
            start = int((~agrees[keep]).int().argmax(1).min()) + 1
            cache.crop(-(cache.get_seq_length() - (prompt_length + start - 1)))
            if done.any():
                cache.batch_select_indices(keep.nonzero().squeeze(1))
                rows, logits = rows[keep], logits[keep]

        answered = answers[:, reader.slots]
        distributions = reader.distribution(finals, answered if readout == "exact" else None)
        values = grammar.values.to(device)
        picked = (answered[:, :, None] == reader.tokens).all(-1)
        recognition = Recognition(
            sequences=answers,
            values=(picked * values).sum(-1),
            probabilities=(picked * distributions).sum(-1),
            expected_values=distributions @ values,
            distributions=distributions,
            forwards=forwards,
        )
        if return_evidence:
            method, given = "attention" if return_evidence is True else return_evidence, answers
            if readout == "parallel":
                given = draft.to(device).expand_as(answers)
            question = (input_ids, pixel_values, grammar, attention_mask, given)
            recognition.evidence = find_evidence(self, *question, method, readout == "parallel")
        return recognition.decide(decision, values)

    @_in_turn
    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, mirror: bool = False) -> BaseModelOutputWithPooling:
        """What vision tower and projector make of face crops, for as many questions about them as there are.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): From the processor, on any device.
            mirror (`bool`, *optional*, defaults to `False`): Also of their mirror images, which come after them.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list with one tensor `(patches, text_hidden_size)` a
            picture.

        Example:

        >>> # encoded = model.encode(inputs["pixel_values"], mirror=True)
        >>> # model.recognize(inputs["input_ids"], None, grammar, encoded=encoded, mirror=True)
        """
        seen = with_mirror_images(pixel_values) if mirror else pixel_values
        return self.get_image_features(pixel_values=seen.to(self.device, self.dtype))

    def _shared_length(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Tokens before the image that all rows of a batch have in common."""
        same = (input_ids == input_ids[:1]).all(0) & attention_mask.to(input_ids.device).bool().all(0)
        same &= (input_ids != self.config.image_token_id).all(0)
        return int(same.int().argmin())

    def _cache(self, tokens: torch.Tensor, batch: int, size: int | None) -> Cache:
        """A cache that begins with a text `(1, length)` for a batch; with room for `size` tokens, or growing."""
        prefix = self._prefix(tokens) if tokens.shape[1] else DynamicCache()
        if size is None:
            copied = copy.deepcopy(prefix)
            if tokens.shape[1]:
                copied.batch_repeat_interleave(batch)
            return copied
        # CUDA graphs find their tensors by address, so batches of one size share one cache.
        wanted = (batch, size, self.dtype, self.device)
        if self._static is None or self._static[0] != wanted:
            self._static = (wanted, _StaticCache(self.config, size))
        static = self._static[1]
        static.rewind(0)
        if tokens.shape[1]:
            for number, (keys, values, _) in enumerate(prefix):
                static.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
        return static

    def _prefix(self, tokens: torch.Tensor) -> DynamicCache:
        """Keys and values of a text `(1, length)`, from memory if they are there."""
        state = self._text_state()
        if self._prefixes is None or self._prefixes[0] != state:
            self._prefixes = (state, OrderedDict())
        known, key = self._prefixes[1], tuple(tokens[0].tolist())
        if key not in known:
            cache = DynamicCache()
            self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            known[key] = cache
            if len(known) > PREFIXES:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    def _text_state(self) -> tuple:
        """What differs once the language model does: trained, loaded, cast, moved, its adapters switched or scaled.

        Or once it computes otherwise, under autocast.
        """
        language = self.model.language_model
        weights = [weight.detach() for weight in language.parameters() if not weight.is_meta]  # not those on disk
        # A part of them by value, for PyTorch does not count what fused optimizers or `.data` change; and by PyTorch's
        # count, which also tells of a change between the parts. Of weights made for inference alone there is none.
        sums = [weight.flatten()[::SAMPLE].sum(dtype=torch.float32).to(self.device) for weight in weights]
        counts = [None if weight.is_inference() else weight._version for weight in weights]
        places = [(weight.dtype, weight.device) for weight in weights]
        marks = ("_disable_adapters", "_active_adapter", "scaling")  # PEFT's own
        switches = [str(vars(part)[mark]) for part in language.modules() for mark in marks if mark in vars(part)]
        kind = self.device.type
        mixed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return torch.stack(sums).tolist() if sums else [], counts, places, switches, mixed

    def _check_image_tokens(self, input_ids: torch.Tensor, encoded) -> None:
        """See that each prompt holds as many image tokens as its picture has patches."""
        found = (input_ids == self.config.image_token_id).sum(1).tolist()
        expected = [len(patches) for patches in encoded.pooler_output]
        if len(found) != len(expected):
            raise ValueError(
                f"There are {len(found)} prompts and {len(expected)} encoded pictures, mirror images included; give "
                "as many pictures as prompts, and to `encode` the same `mirror` as to `recognize`."
            )
        if found != expected:
            raise ValueError(
                f"The prompts hold {found} image tokens (id {self.config.image_token_id}), but the vision tower makes "
                f"{expected} patches of the pictures. Use the processor that was saved with this model."
            )

    def check_places(self, attention_mask: torch.Tensor) -> None:
        """See that a language model with a table of places, as GPT-2 and OPT have, has one for each token.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 for tokens, 0 for padding.

        Raises:
            ValueError: There are more tokens than places.
        """
        text = self.config.get_text_config()
        settings = vars(text)
        tables = {"max_position_embeddings", "n_positions"} & settings.keys()
        if "rope_parameters" in settings or not tables:  # it counts distances
            return
        places = min(settings[name] for name in tables)
        if (tokens := int(attention_mask.sum(1).max())) > places:
            raise ValueError(
                f"Prompt and answer are {tokens} tokens long, but {text.model_type} has places for {places}; ask "
                "about fewer Action Units at a time, or take a language model with more places."
            )


def with_mirror_images(pixel_values: torch.Tensor) -> torch.Tensor:
    """Pictures `(batch, 3, height, width)`, and then their mirror images in the same order."""
    return torch.cat([pixel_values, pixel_values.flip(-1)])
