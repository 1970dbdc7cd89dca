"""Where the model looked: for each Action Unit a 16 x 16 map of the image patches that its answer rested on.

Two ways, neither of which changes an answer. `"attention"` takes one more pass over the answer and tells how it rests
on the attention paid to each patch. `"occlusion"` blurs one place of the crop after the other and tells how far each
answer moves; it takes hundreds of passes and is the more faithful, for attention tells only what reaches the answer
directly, and to first order (Jain and Wallace, 2019; occlusion: Zeiler and Fergus, 2014).

Nothing here knows of Action Units or text.
"""

from math import isqrt

import torch
from torch.nn import functional
from transformers import DynamicCache

from .grammar_au_llava import AnswerGrammar, ValueReader


METHODS = ("attention", "occlusion")
GRID = 16  # cells along a side of a map
WINDOW = 3  # cells along a side of what is blurred at once
BLUR = 5  # cells along a side of what is averaged to blur
SLIGHT = 1e-3  # a change of the expected value below this share of its range is none
FAINT = 1e-6  # and so is a change of the log-odds below this


def find_evidence(
    model,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    grammar: AnswerGrammar,
    attention_mask: torch.Tensor,
    answers: torch.Tensor,
    method: str = "attention",
    parallel: bool = False,
) -> torch.Tensor:
    """Maps of what the answers to a batch of crops rested on.

    Args:
        model ([`AuLlavaForConditionalGeneration`]): The model that answered; no other thread may use it meanwhile.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): Left-padded prompts with their image tokens.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): One face crop a prompt.
        grammar (`AnswerGrammar`): The grammar of the answers.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 for padding.
        answers (`torch.LongTensor` of shape `(batch, tokens)`): What the model read where it chose the values: its
            answers or, for the parallel read-out, the neutral draft.
        method (`str`, defaults to `"attention"`): `"attention"`: the attention that the answer's tokens pay to a
            patch, times how far the log-odds of the value would move for it, to first order, if an average patch had
            that attention instead; a sum over layers and heads. Plain attention is no evidence: much of it goes to
            places that carry nothing (Xiao et al., 2024). `"occlusion"`: how much the expected value changes when
            three by three cells are blurred, a mean over the windows that cover a cell.
        parallel (`bool`, defaults to `False`): The answers are a neutral draft.

    Returns:
        `torch.FloatTensor` of shape `(batch, count, 16, 16)`: top row first; each map is not negative and sums to 1,
        or is 0 everywhere where no place mattered.

    Raises:
        ValueError: Unknown method, or no pictures.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown evidence {method!r}; accepted: {', '.join(METHODS)}.")
    if pixel_values is None:
        raise ValueError("Evidence is found in the pictures; give pixel_values, not only what was encoded from them.")
    inputs = (input_ids.to(model.device), pixel_values, grammar, attention_mask.to(model.device), answers)
    maps = _attended(model, *inputs) if method == "attention" else _moved(model, *inputs, parallel)
    return maps / maps.sum((2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def on_crop(maps: torch.Tensor, view: float) -> torch.Tensor:
    """Maps of what the encoder sees as maps of the whole face crop.

    Args:
        maps (`torch.Tensor` of shape `(..., side, side)`): Square maps.
        view (`float`): The part of the crop's side that the encoder sees, around the middle: above 0, up to 1.

    Returns:
        `torch.Tensor` of the same shape and the same sums.

    >>> on_crop(torch.ones(4, 4), 0.5)
    tensor([[0., 0., 0., 0.],
            [0., 4., 4., 0.],
            [0., 4., 4., 0.],
            [0., 0., 0., 0.]])
    """
    cells = torch.arange(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    starts = (1 - view) / 2 * len(cells) + view * cells  # of the encoder's cells, in cells of the crop
    ends = torch.minimum(starts + view, cells[:, None] + 1)
    shares = (ends - torch.maximum(starts, cells[:, None])).clamp(min=0) / view
    return shares @ maps @ shares.T


def _attended(model, input_ids, pixel_values, grammar, attention_mask, answers) -> torch.Tensor:
    # Gradients cannot flow through tensors of inference mode, so copies are made outside of it.
    with torch.inference_mode(False), torch.no_grad():
        input_ids, attention_mask, answers = input_ids.clone(), attention_mask.clone(), answers.clone()
        mask = torch.cat([attention_mask, torch.ones_like(answers)], 1)[:, :-1]  # nothing is asked of the last token
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        tokens = torch.cat([input_ids, answers], 1)[:, :-1]
        cache, start = DynamicCache(), input_ids.shape[1] - 1
        model.model(
            input_ids=tokens[:, :start], attention_mask=mask[:, :start], position_ids=positions[:, :start],
            past_key_values=cache, use_cache=True,
            mm_encoder_outputs={"image": model.encode(pixel_values.clone())},
        )  # fmt: skip
        # What is seen at a place decides the next token: the prompt's last one the answer's first.
        embedded = model.get_input_embeddings()(tokens[:, start:]).detach().requires_grad_()
        language, reader = model.model.language_model, ValueReader(grammar, model.device)
        with torch.enable_grad():  # only the plain implementation tells its weights
            usual = language.config._attn_implementation
            language.set_attn_implementation("eager")
            try:
                outputs = language(
                    inputs_embeds=embedded, attention_mask=mask, position_ids=positions[:, start:],
                    past_key_values=cache, use_cache=True, output_attentions=True,
                )  # fmt: skip
            finally:
                language.set_attn_implementation(usual)
            odds = _log_odds(reader, model.lm_head(outputs.last_hidden_state))
            image = tokens == model.config.image_token_id
            patches = int(image[0].sum())
            maps = []
            for score in odds.sum(0):  # an answer's value after the other
                slopes = torch.autograd.grad(score, outputs.attentions, retain_graph=True)
                effect = torch.zeros(len(tokens), patches, device=model.device)
                for weights, slope in zip(outputs.attentions, slopes, strict=True):
                    seen, worth = (
                        layer.detach().float().permute(0, 3, 1, 2)[image].unflatten(0, (-1, patches))
                        for layer in (weights, slope)
                    )  # (batch, patches, heads, answer's tokens)
                    effect += (seen * (worth - worth.mean(1, keepdim=True))).sum((2, 3))
                maps.append(torch.where(effect.abs() < FAINT, 0, effect.abs()))
        side = isqrt(patches)
        found = torch.stack(maps, 1).unflatten(-1, (side, side))
        return functional.interpolate(found, size=(GRID, GRID), mode="area")


def _log_odds(reader: ValueReader, logits: torch.Tensor) -> torch.Tensor:
    """`(batch, count)`: log-odds of the value chosen against the others, a sum over the value's tokens."""
    chosen, read = reader.choose(logits)
    odds = torch.zeros(chosen.shape[:2], device=logits.device)
    for token, scores, alphabet in zip(chosen.unbind(-1), read, reader.alphabets, strict=True):
        if len(alphabet) > 1:
            taken = token[..., None] == alphabet
            odds = odds + (scores * taken).sum(-1) - scores.masked_fill(taken, -torch.inf).logsumexp(-1)
    return odds


def _moved(model, input_ids, pixel_values, grammar, attention_mask, answers, parallel) -> torch.Tensor:
    reader, values = ValueReader(grammar, model.device), grammar.values.to(model.device)
    slight = SLIGHT * float(values[-1] - values[0])
    cells = torch.eye(GRID * GRID, device=model.device).unflatten(-1, (GRID, GRID))
    windows = functional.max_pool2d(cells, WINDOW, 1, WINDOW // 2)  # (windows, 16, 16): the cells that each one blurs
    maps = []
    for ids, pixels, mask, answer in zip(
        input_ids, pixel_values.to(model.device), attention_mask, answers, strict=True
    ):
        mask = torch.cat([mask, torch.ones_like(answer)])[None, :-1]
        shared = model._shared_length(ids[None], mask[:, : len(ids)])

        def expected(pictures, ids=ids, mask=mask, answer=answer, shared=shared) -> torch.Tensor:
            """`(pictures, count)`: means of the distributions, were the rest of the answer the same."""
            rows = len(pictures)
            prompts, given = ids.expand(rows, -1), answer.expand(rows, -1)
            outputs = model(
                input_ids=torch.cat([prompts[:, shared:], given[:, :-1]], 1),
                attention_mask=mask.expand(rows, -1),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:].expand(rows, -1),
                past_key_values=model._cache(prompts[:1, :shared], rows, None),
                use_cache=True,
                logits_to_keep=len(answer),
                mm_encoder_outputs={"image": model.encode(pictures)},
            )
            seen = None if parallel else given[:, reader.slots]
            return reader.distribution(reader.choose(outputs.logits)[1], seen) @ values

        height, width = pixels.shape[-2:]
        sides = [BLUR * side // GRID // 2 * 2 + 1 for side in (height, width)]
        margins = [sides[1] // 2] * 2 + [sides[0] // 2] * 2
        padded = functional.pad(pixels[None], margins, "reflect")
        blurred = functional.avg_pool2d(padded, sides, 1)
        whole, changes = expected(pixels[None]), []
        for some in windows.split(32):
            hidden = functional.interpolate(some[:, None], size=(height, width), mode="nearest")
            changes.append((expected(torch.where(hidden > 0, blurred, pixels)) - whole).abs())
        change = torch.cat(changes)
        change = torch.where(change < slight, 0, change)
        maps.append((change.T @ windows.flatten(1) / windows.sum((1, 2))).unflatten(-1, (GRID, GRID)))
    return torch.stack(maps)
