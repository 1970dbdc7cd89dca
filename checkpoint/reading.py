"""Stage 5 of the default checkpoint: append a layer to the language model that reads the image tokens.

After its lessons a small language model knows which Action Unit each place of an answer stands for, but to learn to
look up each unit in the image is the slowest part of its training: what a place asks for has to be multiplied by what
the image says. One more layer is therefore started from linear fits, so that it does just that, and nothing else:

- one attention head looks at the image alone and brings along an estimate of every unit;
- in the layer's gated MLP, one neuron for each unit and place opens only there, and lets this unit's estimate through;
- what comes through is written in a direction of its own.

Then this layer's MLP and the output head learn to make digits of it. What reaches them is computed once, so that a
pass over thousands of faces takes seconds. All of it goes on learning afterwards.

    python -m checkpoint.reading --model runs/second --data_dir data/synthetic --output_dir runs/reading

After practice, `--again --model runs/practice` trains what the layer brings along of the image
(`checkpoint/estimates.py`), and then MLP and output head once more on what reaches them. With `--encoder runs/longer`,
an encoder that went on learning from the model's own, that one takes its place first, and the projector is fitted
anew, so that the language model meets image tokens that it can read.

Stopped and given again, it goes on: image tokens are kept, and the estimates within their training; the MLP goes on
from its last epoch, once what reaches it has been computed again.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import rms_norm
from tqdm import tqdm
from transformers import AutoModel, BitImageProcessorPil, set_seed
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from au_llava import AuLlavaForConditionalGeneration
from au_llava.losses import soft_digits_table
from checkpoint.begun import Course, begin, once, version_of
from checkpoint.cost import cost_of, operations
from checkpoint.estimates import train_estimates
from checkpoint.muon import make_optimizers
from checkpoint.practice import SPREAD, encode, spread_of, value_loss
from checkpoint.pretrain import SIZE, autocast, fit_linear, middle, read_shards
from checkpoint.questions import LISTS, Question, lifelike, open_model, read_labels, standardised, training_shards
from checkpoint.rate import set_rate


OPEN = 4.0  # a gate's input where it is to open; minus this elsewhere
LOOK = 5.5  # log of how much more an image token is looked at than a word
FEW = 1000  # faces whose states in the language model the layer is started from
CLEAR = 300  # faces whose states tell where a gate is to open that is fitted anew
SOME = 500  # faces of these whose states between the digits it learns from, too: brackets, commas and points
PART = 50  # faces that go through the language model together
LOUD = 0.5  # size of what the layer brings along, beside what is there


def regrid(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Image tokens `(pictures, tokens, width)` of square pictures, at `count` places of each instead."""
    before, after = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (before, before))
    return nn.functional.interpolate(grid, (after, after), mode="bilinear").flatten(2).transpose(1, 2)


@torch.no_grad()
def refit(projector: nn.Linear, before: torch.Tensor, now: torch.Tensor) -> None:
    """Let the projector make of another encoder's image tokens what it made of the old ones, by least squares.

    Args:
        before, now (`torch.Tensor` of shape `(pictures, tokens, width)`): The same pictures, by the two encoders;
            their numbers of tokens may differ.
    """
    fit_linear(projector, now.flatten(0, 1), regrid(projector(before.float()), now.shape[1]).flatten(0, 1))


@torch.no_grad()
def states(
    model: AuLlavaForConditionalGeneration,
    question: Question,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    norm: nn.Module,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What enters one of the language model's norms, for neutral drafts and for answers that are another face's.

    Right answers would give away units that often come together, where the image has to tell: in use the model sees
    its own answers, which are not always right.

    Args:
        tokens (`torch.Tensor` of shape `(pictures, tokens, width)`): From the encoder.
        labels (`torch.LongTensor` of shape `(pictures, units)`): From [`Question.labels`].
        norm (`nn.Module`): Before it stands what is looked at.

    Yields:
        For some pictures at a time: states of image tokens `(pictures, tokens, width)`, of words `(words, width)`, and
        of the places that predict each token of the answer `(pictures, length, width)`.
    """
    language, found = model.model.language_model, []
    hook = norm.register_forward_pre_hook(lambda module, given: found.append(given[0].float()))
    neutral = question.grammar.neutral_draft()
    for start in range(0, len(tokens), PART):
        part, wanted = tokens[start : start + PART].float(), labels[start : start + PART]
        hidden = (torch.arange(len(part)) % 2 == 0)[:, None]
        answers = torch.where(hidden, neutral, question.write(wanted.roll(1, 0)))
        found.clear()
        question.put(language, model.model.multi_modal_projector(part), answers)
        before, after = found
        image, places = after[:, : part.shape[1]], after[:, -answers.shape[1] - 1 : -1]
        yield image, torch.cat([before[0], after[0, part.shape[1] :]]), places
    hook.remove()


def fit(given: torch.Tensor, wanted: torch.Tensor, strength: float = 1e-3) -> torch.Tensor:
    """Least squares without a constant: the matrix `(outputs, inputs)` that makes `wanted` of `given`."""
    square = given.T @ given
    ridge = strength * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square + ridge, given.T @ wanted).T


def gates_of(given: list[torch.Tensor]) -> torch.Tensor:
    """Gates that each open in one place of the answers, and nowhere else, by least squares.

    Args:
        given (`list[torch.Tensor]` of shape `(faces, units, digits, width)`): For each question what enters the MLP.

    Returns:
        `torch.Tensor` of shape `(places, width)`: for each question, unit and digit a gate whose input is to be `OPEN`
        there, and minus that elsewhere.
    """
    places = torch.cat([part.flatten(1, 2) for part in given], 1)
    everywhere, share = places.flatten(0, 1), places.shape[1]
    square, shut = everywhere.T @ everywhere, -OPEN * everywhere.sum(0)
    gates = []
    for here in places.unbind(1):  # counts as much as all other places together
        own = square + share * here.T @ here + 0.1 * torch.eye(len(square))
        gates.append(torch.linalg.solve(own, shut + (share + 2) * OPEN * here.sum(0)))
    return torch.stack(gates)


@torch.no_grad()
def append_reader(
    model: AuLlavaForConditionalGeneration, questions: list[Question], tokens: torch.Tensor, labels: list[torch.Tensor]
) -> None:
    """Append the layer. The answers stay as they are until [`train_reader`] is done.

    Args:
        tokens (`torch.Tensor` of shape `(pictures, tokens, width)`): What the encoder sees of some faces.
        labels (`list[torch.Tensor]`): For each question the right answers, from [`Question.labels`].
    """
    language, config = model.model.language_model, model.config.text_config
    width, size = config.hidden_size, language.layers[0].self_attn.head_dim

    # What the layer will find there, and what the image tells of each unit: from the projector's tokens, of which
    # there are many, by way of what the layers before have made of them.
    projected = torch.cat([model.model.multi_modal_projector(part.float()).mean(1) for part in tokens.split(500)])
    few = tokens[:FEW]
    looks, words, seen, at, estimates, neurons = [], [], [], [], [], []
    for number, (question, wanted) in enumerate(zip(questions, labels, strict=True)):
        reached = states(model, question, few, wanted, language.norm)
        parts = tqdm(reached, desc=question.name, total=math.ceil(len(few) / PART))
        image, text, places = (list(column) for column in zip(*parts, strict=True))
        seen.append(torch.cat([rms_norm(part, (width,)).mean(1) for part in image]))
        looks.append(torch.cat(image[:4]).flatten(0, 1))
        words.append(torch.cat(text[:4]))
        at.append(torch.cat(places[:8])[:, question.digits])
        standard = standardised(question.grammar.values[wanted])
        estimates.append(fit(projected, standard) @ fit(seen[-1], projected[: len(few)], 1e-5))
        neurons += [(number, unit, digit) for unit in range(len(question.units)) for digit in range(at[-1].shape[2])]
    read = torch.cat(estimates)
    ways = list(dict.fromkeys((number, digit) for number, _, digit in neurons))
    assert len(read) <= size and len(read) + len(ways) < width and len(neurons) <= config.intermediate_size

    # Directions that the states at the places hardly use: one for each unit's estimate, and one for each way to write
    every = torch.cat([places.reshape(-1, width) for places in at])
    directions = torch.linalg.eigh(every.T @ every / len(every)).eigenvectors.T
    carried, spoken = directions[: len(read)], directions[len(read) : len(read) + len(ways)]
    loud = LOUD * every.pow(2).mean().sqrt()
    norm = language.norm.weight
    head = model.lm_head.weight * norm
    taken = directions[: len(read) + len(ways)]
    model.lm_head.weight.copy_((head - head @ taken.T @ taken) / norm)

    layer = LlamaDecoderLayer(config, layer_idx=len(language.layers))
    layer.apply(model._init_weights)
    attention, mlp = layer.self_attn, layer.mlp
    slow = size // 2 - 1  # rotary position embedding turns this pair of dimensions the least
    scale = (LOOK * size**0.5) ** 0.5
    pictures, texts = rms_norm(torch.cat(looks), (width,)), rms_norm(torch.cat([*words, every[::20]]), (width,))
    # That all image tokens are looked at alike matters more than that no word is.
    sight = fit(torch.cat([5 * pictures, texts]), torch.cat([torch.full((len(pictures), 1), 5.0), 0 * texts[:, :1]]))
    attention.q_proj.weight[:size] = attention.k_proj.weight[:size] = 0
    attention.q_proj.weight[slow] = scale * fit(rms_norm(every, (width,)), torch.ones(len(every), 1))[0]
    attention.k_proj.weight[slow] = scale * sight[0]
    attention.v_proj.weight[:size] = 0
    attention.v_proj.weight[: len(read)] = read
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[:, : len(read)] = loud * carried.T

    # Gates, fitted to the states with the estimates added
    given = []
    for number, places in enumerate(at):
        brought = loud * seen[number][: len(places)] @ read.T @ carried
        given.append(rms_norm(places + brought[:, None, None], (width,)))
    mlp.gate_proj.weight[: len(neurons)] = gates_of(given)
    mlp.down_proj.weight.zero_()
    first = [0, *torch.tensor([len(part) for part in estimates]).cumsum(0).tolist()]
    for neuron, (own, unit, digit) in enumerate(neurons):
        mlp.up_proj.weight[neuron] = carried[first[own] + unit] / LOUD
        mlp.down_proj.weight[:, neuron] = loud / LOUD / OPEN * spoken[ways.index((own, digit))]
    language.layers.append(layer)
    config.num_hidden_layers += 1


@torch.no_grad()
def wake(mlp: nn.Module, entering: list[torch.Tensor], values: list[torch.Tensor]) -> int:
    """Start those neurons anew that say little of their unit: most often a gate has shut, and hardly learns any more.

    Args:
        mlp (`nn.Module`): With a neuron for each question, unit and digit in front, as [`append_reader`] makes it.
        entering (`list[torch.Tensor]` of shape `(faces, units, digits, width)`): For each question what enters it.
        values (`list[torch.Tensor]` of shape `(faces, units)`): For each question the right values.

    Returns:
        `int`: How many there were.
    """
    fitted = gates_of([places[:CLEAR] for places in entering])
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    first, woken = 0, 0
    for places, right in zip(entering, values, strict=True):
        units, digits = places.shape[1:3]
        digit = min(digits - 1, 1)  # the only one, or the first after the point
        here, own = places[:, :, digit], first + digits * torch.arange(units) + digit
        first += units * digits
        standard = standardised(right)
        said = nn.functional.silu((here * gate[own]).sum(-1)) * (here * up[own]).sum(-1)
        loud = (said * standard).mean(0)  # how much of the unit's value is in what is said
        usual = loud.abs().median()
        silent = (loud.abs() < usual / 2) & (right.std(0) > 1e-3)
        written = (loud[~silent].sign() * down[:, own[~silent]]).mean(1)
        for unit in silent.nonzero()[:, 0].tolist():
            neuron = own[unit]
            gate[neuron] = fitted[neuron]
            brought = fit(here[:, unit], standard[:, unit, None], 1e-2)[0]
            opened = nn.functional.silu(here[:, unit] @ gate[neuron]) * (here[:, unit] @ brought)
            up[neuron] = brought * usual / (opened * standard[:, unit]).mean()
            down[:, neuron] = written
        woken += int(silent.sum())
    return woken


def train_reader(
    model: AuLlavaForConditionalGeneration,
    questions: list[Question],
    tokens: torch.Tensor,
    labels: list[torch.Tensor],
    epochs: int,
    file: Path,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
    seed: int = 0,
) -> int:
    """Train the last layer's MLP and what comes after it, on digits and on what stands between them.

    With Muon, for with AdamW gates shut by the way (docs/checkpoint.md); and those that are shut start anew.

    Args:
        tokens, labels: As for [`append_reader`].
        epochs (`int`): Passes over the faces.
        file (`Path`): From which a stopped run goes on.

    Returns:
        `int`: The floating-point operations that all steps took.
    """
    language = model.model.language_model
    layer, given, between = language.layers[-1], [], []
    after = nn.ModuleList([layer.post_attention_layernorm, layer.mlp, language.norm, model.lm_head])
    optimizers = make_optimizers(layer.mlp, list(after.parameters()), learning_rate)
    course = Course(file, {"model": model}, optimizers)
    done = course.at.get("epoch", 0)
    for question, own in zip(questions, labels, strict=True):
        reached = states(model, question, tokens, own, layer.post_attention_layernorm)
        parts = tqdm(reached, desc=f"reaching the last MLP, {question.name}", total=math.ceil(len(tokens) / PART))
        device = model.device
        with autocast(device):
            found = [places.half() for _, _, places in parts]
        some = torch.cat(found[: SOME // PART])
        between.append((some[:, question.between], question.grammar.template()[question.between]))
        given.append(torch.cat([places[:, question.digits] for places in found]))
    tables = [soft_digits_table(question.grammar, question.letters, SPREAD) for question in questions]
    spreads = [spread_of(question, own) for question, own in zip(questions, labels, strict=True)]
    values = [question.grammar.values[own] for question, own in zip(questions, labels, strict=True)]
    if not done:
        with torch.no_grad():
            woken = wake(layer.mlp, [layer.post_attention_layernorm(places.float()) for places in given], values)
        print(f"{woken} neurons of the last MLP start anew")
    batch = min(batch_size, len(tokens))

    def say(states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token, from what enters the last MLP's norm."""
        states = states.float()
        return model.lm_head(language.norm(states + layer.mlp(layer.post_attention_layernorm(states)))).log_softmax(-1)

    def learn(rows: torch.Tensor) -> list[float]:
        """Each question's loss about some faces, and the gradients of all."""
        after.zero_grad()
        losses = []
        columns = zip(questions, given, between, labels, tables, spreads, strict=True)
        for question, places, (fixed, wanted), own, table, spread in columns:
            few = fixed[torch.randint(len(fixed), [8])]
            form = nn.functional.nll_loss(say(few).transpose(1, 2), wanted.expand(len(few), -1))
            losses.append(value_loss(question, say(places[rows]), own[rows], table, spread) + form)
        sum(losses).backward()
        return [loss.item() for loss in losses]

    per_epoch = len(tokens) // batch
    steps = epochs * per_epoch
    first = done * per_epoch
    bar = tqdm(range(first, steps), desc="the last MLP", unit="step", mininterval=5, initial=first, total=steps)
    for step in bar:
        if step % per_epoch == 0:
            torch.manual_seed(1000 * seed + step // per_epoch)
            order = torch.randperm(len(tokens)).split(batch)
        set_rate(optimizers, learning_rate, step / steps, 20 / steps)
        losses = learn(order[step % per_epoch])
        nn.utils.clip_grad_norm_(after.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            named = zip(questions, losses, strict=True)
            bar.set_postfix({question.name: f"{loss:.3f}" for question, loss in named})
        if (step + 1) % per_epoch == 0:
            course.keep(epoch=(step + 1) // per_epoch)
    norm, parts = layer.post_attention_layernorm, math.ceil(len(tokens) / PART)
    reaching = sum(
        operations(list, states(model, question, tokens[:PART], own[:PART], norm))
        for question, own in zip(questions, labels, strict=True)
    )
    return parts * reaching + steps * operations(learn, torch.arange(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--encoder", help="an encoder that takes the place of the model's own")
    parser.add_argument("--data_dir", required=True, nargs="+", help="folders of faces; all are learnt from")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--limit", type=int, help="faces to learn from")
    parser.add_argument("--states", type=int, default=12_000, help="faces whose states the layer's MLP learns from")
    parser.add_argument("--steps", type=int, default=600, help="with --again, of the layer's estimates")
    parser.add_argument("--epochs", type=int, default=4, help="of the MLP, over these faces; 0 leaves it as it is")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--again", action="store_true", help="the model has this layer already: train its estimates and MLP"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model, processor = open_model(args.model)
    cost = cost_of(args.model) if args.again else {}
    processor.calibration = {}  # what was fitted to its answers so far will not fit those to come
    files = training_shards(*args.data_dir)
    output = begin(
        args.output_dir,
        model=version_of(Path(args.model, "model.safetensors")),
        encoder=version_of(Path(args.encoder, "model.safetensors")) if args.encoder else None,
        faces=[version_of(file) for file in files],
        **{name: vars(args)[name] for name in ("again", "limit", "states", "steps", "batch_size", "seed")},
    )
    faces, rows = read_shards(files, args.limit), read_labels(files)[: args.limit]
    kept = lifelike(rows)
    kept = kept[torch.randperm(len(kept))]  # the MLP learns from the first of them: of every folder
    images, rows = faces["images"][kept.cpu()], [rows[k] for k in kept.tolist()]
    if args.encoder:
        processor.image_processor = BitImageProcessorPil.from_pretrained(args.encoder)
        own, side = model.model.vision_tower, model.model.vision_tower.config.image_size
        model.model.vision_tower = AutoModel.from_pretrained(args.encoder, dtype=torch.float32).eval()
        same = middle(images[:FEW].to(model.device))
        before = encode(own, nn.functional.interpolate(same, (side, side), mode="bilinear", antialias=True))
        now = encode(model.model.vision_tower, same)
        refit(model.model.multi_modal_projector, before, now)
        model.config.vision_config = model.model.vision_tower.config
        model.config.image_seq_length = now.shape[1]
        processor.patch_size = SIZE // math.isqrt(now.shape[1])

    def look() -> torch.Tensor:
        parts = tqdm(images.split(500), desc="encoding")
        return torch.cat([encode(model.model.vision_tower, middle(part.to(model.device))) for part in parts])

    tokens = once(output / "tokens.pt", look)
    questions = [Question(processor, *about) for about in LISTS]
    labels = [question.labels(rows) for question in questions]
    if args.again:
        trained = train_estimates(model, questions, tokens, labels, args.steps, output / "estimates.pt", args.seed)
        cost["reading"] = cost.get("reading", 0) + trained
    else:
        cost["reading"] = operations(append_reader, model, questions, tokens, labels)
    if args.epochs:
        some = tokens[: args.states], [own[: args.states] for own in labels]
        how = args.epochs, output / "mlp.pt", args.learning_rate, args.batch_size, args.seed
        cost["reading"] += train_reader(model, questions, *some, *how)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    # In floating-point operations; what comes next adds its own.
    (output / "cost.json").write_text(json.dumps(cost) + "\n")


if __name__ == "__main__":
    main()
