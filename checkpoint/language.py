"""Stage 3 of the default checkpoint: reading lessons for the language model.

A language model pretrained elsewhere knows how to find its way in a list; this one begins from random weights, and
pictures alone teach it that so slowly that it settles on how often each unit occurs. So before it meets pictures it
answers questions about image tokens whose first dimensions hold the exact activations, where the projector starts with
the encoder's estimates of them; and a probe on its first layer, thrown away afterwards, has to name the unit that each
place of the answer stands for.

    python -m checkpoint.language --model runs/start --data_dir data/synthetic --output_dir runs/language
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from au_llava.action_units import PRESETS, TASKS
from checkpoint.begun import KEEP, Course, begin, version_of
from checkpoint.pretrain import UNITS, autocast, middle, read_shards, units_of
from checkpoint.questions import Question, open_model, read_labels, standardised, training_shards
from checkpoint.rate import set_rate


CODES = [*dict.fromkeys(code for codes in PRESETS.values() for code in codes)]
DEPTH = 1  # the layer after which a place has to know its unit; those above look up what the picture says of it
NOISE = 0.3  # in each image token, in standard deviations of an activation


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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model, processor = open_model(args.model)
    files = training_shards(args.data_dir)
    output = begin(
        args.output_dir,
        model=version_of(Path(args.model, "model.safetensors")),
        faces=[version_of(file) for file in files],
        seed=args.seed,
    )
    rows = read_labels(files)
    activations = standardised(torch.from_numpy(np.stack([units_of(row) for row in rows])).to(model.device))
    with torch.no_grad():
        pictures = middle(read_shards(files, 64)["images"].to(model.device))
        faces = torch.stack(model.get_image_features(pictures).pooler_output)
    language = model.model.language_model
    probe = nn.Linear(language.config.hidden_size, len(CODES))
    weights = [*language.parameters(), *model.lm_head.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    questions = {task: Question(processor, task, TASKS[task].preset) for task in TASKS}
    separators = processor.tokenizer.convert_tokens_to_ids(["[", ","])
    course = Course(output / "lessons.pt", {"model": model, "probe": probe}, [optimizer])
    first = course.at.get("step", 0)

    losses: dict[str, list[float]] = {task: [] for task in TASKS}
    bar = tqdm(range(first, args.steps), desc="lessons", unit="step", mininterval=5, initial=first, total=args.steps)
    for step in bar:
        set_seed(1000 * args.seed + step)
        set_rate([optimizer], args.learning_rate, step / args.steps, 50 / args.steps)
        task = random.choice(list(TASKS))
        question, chosen = questions[task], random.choices(range(len(rows)), k=args.batch_size)
        answer = question.write(question.labels([rows[index] for index in chosen]))
        number, inside = places(answer, separators, len(question.units))
        units_at = torch.tensor([CODES.index(unit.code) for unit in question.units])[number]
        seen = faces[torch.randint(len(faces), (len(answer),))].clone()
        exact = activations[chosen][:, None]
        seen[:, :, :UNITS] = exact + NOISE * torch.randn(*seen.shape[:2], UNITS)
        with autocast(model.device):
            told = question.put(language, seen, answer, output_hidden_states=True)
            logits = model.lm_head(told.last_hidden_state[:, -answer.shape[1] - 1 : -1])
            state = told.hidden_states[DEPTH][:, -answer.shape[1] :]
            named = probe(nn.functional.rms_norm(state, state.shape[-1:]))
        answer_loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), answer)
        loss = answer_loss + nn.functional.cross_entropy(named.float()[inside], units_at[inside])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses[task].append(answer_loss.item())
        if step % 20 == 0:
            right = (named.argmax(-1) == units_at)[inside].float().mean().item()
            means = {name: f"{np.mean(values[-20:]):.3f}" for name, values in losses.items() if values}
            bar.set_postfix(named=f"{right:.0%}", **means)
        if (step + 1) % KEEP == 0:
            course.keep(step=step + 1)
    model.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
