"""Stage 3 of the default checkpoint: the language model learns which Action Unit each place of an answer stands for.

A language model pretrained elsewhere knows how to find its way in a list; this one begins from random weights, and the
pictures alone teach it that so slowly that it settles on how often each unit occurs. Here it reads questions with
random answers, and a probe on its middle layer, thrown away afterwards, has to name the unit at each place.

    python -m checkpoint.language --model runs/start --data_dir data/synthetic --output_dir runs/language
"""

import argparse
import random
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, get_cosine_schedule_with_warmup, set_seed

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import PRESETS, TASKS, get_task, select, write_answer
from checkpoint.pretrain import middle, read_shards


CODES = [*dict.fromkeys(code for codes in PRESETS.values() for code in codes)]


def places(answer: torch.Tensor, separators: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the values of an answer stand.

    Args:
        answer (`torch.LongTensor` of shape `(batch, length)`): Tokens of arrays of `count` values.
        separators (`list[int]`): The tokens `[` and `,`, after each of which a value begins.

    Returns:
        The number of the value that each token belongs to, and whether it belongs to one, both `(batch, length)`.

    >>> places(torch.tensor([[9, 1, 5, 2, 5, 7, 8]]), [1, 2], 2)
    (tensor([[0, 0, 0, 1, 1, 1, 1]]), tensor([[False,  True,  True,  True,  True,  True,  True]]))
    """
    number = torch.isin(answer, torch.tensor(separators)).cumsum(1) - 1
    return number.clamp(0, count - 1), number >= 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model = AuLlavaForConditionalGeneration.from_pretrained(args.model)
    processor = AuLlavaProcessor.from_pretrained(args.model)
    files = sorted(Path(args.data_dir).glob("train-*.parquet"))
    with torch.no_grad():
        faces = torch.stack(model.get_image_features(middle(read_shards(files, 64)["images"])).pooler_output)
    language = model.model.language_model
    # Where a place has to know its unit, so that the layers above can look up what the picture says of it.
    depth = language.config.num_hidden_layers // 2
    probe = nn.Linear(language.config.hidden_size, len(CODES))
    weights = [*language.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * args.steps), args.steps)
    separators = processor.tokenizer.convert_tokens_to_ids(["[", ","])

    hits: list[float] = []
    bar = tqdm(range(args.steps), desc="places", unit="step", mininterval=5)
    for step in bar:
        task = random.choice(list(TASKS))
        units = select(None, task)
        values = [[random.choice(get_task(task).values) for _ in units] for _ in range(args.batch_size)]
        user = processor.messages(task)
        before = processor.tokenizer(processor.prompt(task), add_special_tokens=False)["input_ids"]
        texts = [
            processor.apply_chat_template([*user, {"role": "assistant", "content": write_answer(row, task, units)}])
            for row in values
        ]
        rows = torch.tensor(processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
        image = before.index(processor.image_token_id)
        after = torch.cat([torch.tensor(before[image + 1 :]).expand(len(rows), -1), rows[:, len(before) :]], 1)
        number, inside = places(rows[:, len(before) :], separators, len(units))
        units_at = torch.tensor([CODES.index(unit.code) for unit in units])[number]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache = DynamicCache(config=language.config)
            language(input_ids=rows[:1, :image], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
            seen = faces[torch.randint(len(faces), (len(rows),))]
            embeddings = torch.cat([seen, language.embed_tokens(after)], 1)
            states = language(inputs_embeds=embeddings, past_key_values=cache, output_hidden_states=True).hidden_states
            guesses = probe(nn.functional.rms_norm(states[depth][:, -number.shape[1] :], states[depth].shape[-1:]))
        guesses = guesses.float()[inside]
        loss = nn.functional.cross_entropy(guesses, units_at[inside])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        hits.append((guesses.argmax(-1) == units_at[inside]).float().mean().item())
        if step % 20 == 0:
            recent = hits[-20:]
            bar.set_postfix(named=f"{sum(recent) / len(recent):.0%}")
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print(f"Of the last 20 questions' places, {sum(hits[-20:]) / 20:.1%} were named. Saved to {args.output_dir}.")


if __name__ == "__main__":
    main()
