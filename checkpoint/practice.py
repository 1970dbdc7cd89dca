"""Stage 6 of the default checkpoint: the language model practises on what the frozen encoder sees, computed once.

`train_sft.py` encodes every picture anew in every step, and can train anything. Here the encoder stays as it is, so
its image tokens of a few versions of each face are computed once, and all steps go to language model and projector:

    python -m checkpoint.practice --model runs/reading --data_dir data/synthetic data/other --output_dir runs/practice
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.losses import soft_digits_table
from au_llava.modeling_au_llava import moved
from checkpoint.begun import KEEP, Course, begin, once, version_of
from checkpoint.cost import cost_of, operations, operations_of
from checkpoint.muon import make_optimizers
from checkpoint.pretrain import SIZE, autocast, image_tokens, middle, read_shards
from checkpoint.questions import LISTS, ROUND, Question, open_model, read_labels, trained_lists, training_shards
from checkpoint.rate import set_rate


SPREAD, ERROR = 0.05, 1.0  # soft digits, and the weight of the error of values
NEUTRAL = 0.25  # share of neutral drafts
LOOKS = [[1, 0], [1.05, 4], [1.05, -4]]  # at each face: enlargement, and turn in degrees


@torch.inference_mode()
def encode(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Image tokens `(pictures, tokens, width)` in 16 bits of normalised pictures `(pictures, 3, 160, 160)`.

    They are the mean over all looks, as a published model sees a face.
    """
    parts = images.split(50)
    seen = [torch.stack([image_tokens(encoder, moved(part, *look)) for look in LOOKS]).mean(0) for part in parts]
    return torch.cat(seen).half()


def versions(encoder: nn.Module, faces: dict, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder sees of each face `count` times, as in use; each time half of the faces are mirrored.

    Returns:
        Image tokens `(versions, faces, tokens, width)` in 16 bits; and what is mirrored, `(versions, faces)`.
    """
    device = next(encoder.parameters()).device
    tokens: list[torch.Tensor] = []
    flipped: list[torch.Tensor] = []
    for version in range(count):
        generator, parts = torch.Generator("cpu").manual_seed(1000 * seed + version), []
        for start in tqdm(range(0, len(faces["images"]), 50), desc=f"encoding, {version + 1}/{count}", mininterval=5):
            images = middle(faces["images"][start : start + 50].to(device))
            mirrored = (torch.rand(len(images), generator=generator, device="cpu") < 0.5).to(device)
            parts.append(
                (encode(encoder, torch.where(mirrored[:, None, None, None], images.flip(3), images)), mirrored)
            )
        for whole, found in zip((tokens, flipped), zip(*parts, strict=True), strict=True):
            whole.append(torch.cat(found))
    return torch.stack(tokens), torch.stack(flipped)


def spread_of(question: Question, labels: torch.Tensor) -> torch.Tensor:
    """Each unit's standard deviation `(units,)`, in which [`value_loss`] counts its error.

    So rare units teach as much as frequent ones, which cross entropy alone does not let them.
    """
    return question.grammar.values[labels].std(0).clamp(min=1e-2)


def value_loss(
    question: Question, said: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of the digits, softened; and the error of what they mean.

    Args:
        said (`torch.Tensor` of shape `(rows, units, digits, vocabulary)`): Log-probabilities at the free digits.
        labels (`torch.LongTensor` of shape `(rows, units)`): From [`Question.labels`].
        table (`torch.Tensor` of shape `(values, width, candidates)`): From [`soft_digits_table`].
        spread (`torch.Tensor` of shape `(units,)`): From [`spread_of`].
    """
    letters = said[..., question.letters]
    digits = -(table[labels][:, :, question.grammar.free()] * letters).sum(-1).mean()
    expected = (letters.exp() * question.worth).sum((-2, -1))
    values = question.grammar.values[labels]
    # Of 1.00, what stands after the point says nothing.
    counted = values < 1 if len(question.worth) > 1 else torch.ones_like(values)
    return digits + ERROR * (counted * ((expected - values) / spread).pow(2)).mean()


def answer_loss(
    question: Question,
    logits: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    spread: torch.Tensor,
    format_weight: float,
) -> torch.Tensor:
    """[`value_loss`], and the cross entropy of the tokens between the digits.

    Args:
        logits (`torch.Tensor` of shape `(rows, length, vocabulary)`): Each place's prediction of the same place.
        labels, table, spread: As for [`value_loss`].
        format_weight (`float`): How much brackets, commas and points count beside the digits.
    """
    said = logits.float().log_softmax(-1)
    fixed = question.grammar.template()[question.between].expand(len(said), -1)
    format_loss = nn.functional.nll_loss(said[:, question.between].transpose(1, 2), fixed)
    return value_loss(question, said[:, question.digits], labels, table, spread) + format_weight * format_loss


def practise(
    model: AuLlavaForConditionalGeneration,
    processor: AuLlavaProcessor,
    rows: list[dict],
    tokens: torch.Tensor,
    flipped: torch.Tensor,
    args: argparse.Namespace,
    file: Path,
) -> int:
    """Train language model and projector; a stopped run goes on from `file`.

    Returns:
        `int`: The floating-point operations that all steps took.
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    questions = [Question(processor, *about) for about in LISTS]
    labels = [question.labels(rows) for question in questions]
    mirrored = [question.mirrored() for question in questions]
    tables = [soft_digits_table(question.grammar, question.letters, SPREAD) for question in questions]
    spreads = [spread_of(question, own) for question, own in zip(questions, labels, strict=True)]
    weights = [*language.parameters(), *projector.parameters(), *model.lm_head.parameters()]
    optimizers = make_optimizers(language, weights, args.learning_rate)
    course = Course(file, {"model": model}, optimizers)
    device, first = model.device, course.at.get("step", 0)

    def loss_of(asked: int, image: torch.Tensor, wanted: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Of one question about some faces; the answers of the rows `hidden` are not shown."""
        question = questions[asked]
        seen = torch.where(hidden, question.grammar.neutral_draft(), question.write(wanted))
        with autocast(device):
            output = question.put(language, projector(image.float()), seen)
            logits = model.lm_head(output.last_hidden_state[:, -seen.shape[1] - 1 : -1])
        return answer_loss(question, logits, wanted, tables[asked], spreads[asked], args.format_weight)

    losses: list[list[float]] = [[] for _ in questions]
    bar = tqdm(range(first, args.steps), desc="practice", unit="step", mininterval=5, initial=first, total=args.steps)
    for step in bar:
        generator = np.random.default_rng([args.seed, step])
        set_rate(optimizers, args.learning_rate, step / args.steps, 20 / args.steps)
        asked = ROUND[step % len(ROUND)]
        chosen = torch.from_numpy(generator.choice(len(rows), args.batch_size, replace=False)).to(device)
        version = torch.from_numpy(generator.integers(len(tokens), size=args.batch_size)).to(device)
        wanted = labels[asked][chosen]
        wanted = torch.where(flipped[version, chosen][:, None], wanted[:, mirrored[asked]], wanted)
        hidden = torch.from_numpy(generator.random(args.batch_size) < NEUTRAL).to(device)[:, None]
        model.zero_grad()
        loss = loss_of(asked, tokens[version, chosen], wanted, hidden)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses[asked].append(loss.item())
        if step % 20 == 0:
            named = zip(questions, losses, strict=True)
            bar.set_postfix({question.name: f"{np.mean(values[-20:]):.3f}" for question, values in named if values})
        if (step + 1) % KEEP == 0:
            course.keep(step=step + 1)

    def learn(asked: int) -> None:
        some = slice(args.batch_size)
        loss_of(asked, tokens[0, some], labels[asked][some], torch.tensor(False)).backward()

    return operations_of(args.steps, learn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True, nargs="+", help="folders of faces; all are learnt from")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--versions", type=int, default=2, help="of each face")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--format_weight", type=float, default=1.0, help="of brackets, commas and points")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model, processor = open_model(args.model)
    cost = cost_of(args.model)
    files = training_shards(*args.data_dir)
    rows = read_labels(files)
    output = begin(
        args.output_dir,
        model=version_of(Path(args.model, "model.safetensors")),
        faces=[version_of(file) for file in files],
        versions=args.versions,
        seed=args.seed,
    )

    tokens, flipped = once(
        output / "tokens.pt", lambda: versions(model.model.vision_tower, read_shards(files), args.versions, args.seed)
    )
    practice = practise(model, processor, rows, tokens, flipped, args, output / "practice.pt")
    encoding = operations(encode, model.model.vision_tower, torch.zeros(1, 3, SIZE, SIZE)) * flipped.numel()
    # In floating-point operations; `baselines/linear_head.py --compute` takes the sum.
    for name, count in (("practice", practice), ("encoding", encoding)):
        cost[name] = cost.get(name, 0) + count
    (output / "cost.json").write_text(json.dumps(cost) + "\n")
    processor.trained_lists = trained_lists()
    model.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
