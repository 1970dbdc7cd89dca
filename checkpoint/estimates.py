"""What the language model's last layer brings along of the image: an estimate of every unit, trained by itself.

`checkpoint/reading.py` starts that layer from linear fits. Practice moves all that stands before it, and an encoder
that has gone on learning tells more than what was fitted then; but losses on digits hardly reach these estimates. So
they are trained on the labels alone, with the projector, whose tokens the layers before blur less when it has learnt
how to pass through them. Everything else stays as it is.

Faces that the encoder has not learnt from teach most: of others it tells more than it will of new ones.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from au_llava import AuLlavaForConditionalGeneration
from checkpoint.begun import KEEP, Course
from checkpoint.cost import operations_of
from checkpoint.muon import make_optimizers
from checkpoint.questions import ROUND, Question, standardised
from checkpoint.rate import set_rate


ROW = 8  # pictures in one sequence
BATCH = 64  # pictures of a step; a multiple of ROW
RATE = 1e-3
KEPT = 0.1  # weight of what the estimates are of words, which the head looks at a little, too


class Glance:
    """What the last layer's head looks at after one question's text: its normed input at a picture's image tokens.

    Pictures stand one behind the other in a sequence, and a mask keeps them apart. So the text before the image, which
    is far longer than they are, is not there once a picture.

    Args:
        model ([`AuLlavaForConditionalGeneration`]): Only its projector may change from call to call.
    """

    @torch.no_grad()
    def __init__(self, model: AuLlavaForConditionalGeneration, question: Question):
        self.projector, self.language = model.model.multi_modal_projector, model.model.language_model
        self.text = DynamicCache(config=self.language.config)
        self.words = self._entering(self.text, input_ids=question.before)[0]  # the same of the text, `(words, width)`

    def _entering(self, cache: DynamicCache, **inputs) -> torch.Tensor:
        """The last layer's normed input `(rows, length, width)`."""
        found: list[torch.Tensor] = []
        norm = self.language.layers[-1].input_layernorm
        hook = norm.register_forward_hook(lambda module, given, made: found.append(made))
        self.language(past_key_values=cache, **inputs)
        hook.remove()
        return found[0]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean over each picture, `(pictures, width)`.

        Args:
            tokens (`torch.Tensor` of shape `(pictures, tokens, width)`): Of so many times `ROW` pictures.
        """
        tokens = tokens.float().unflatten(0, (-1, ROW))
        rows, count, before = len(tokens), tokens.shape[2], self.text.get_seq_length()
        own = torch.ones(count, count, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(ROW * count, before, dtype=torch.bool), torch.block_diag(*[own] * ROW)], 1)
        text = copy.deepcopy(self.text)
        text.batch_repeat_interleave(rows)
        seen = self._entering(
            text,
            inputs_embeds=self.projector(tokens).flatten(1, 2),
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=(before + torch.arange(count)).repeat(rows, ROW),
        )
        return seen.unflatten(1, (ROW, count)).mean(2).flatten(0, 1)


def train_estimates(
    model: AuLlavaForConditionalGeneration,
    questions: list[Question],
    tokens: torch.Tensor,
    labels: list[torch.Tensor],
    steps: int,
    file: Path,
    seed: int = 0,
) -> int:
    """Train the projector and the last layer's estimates, each step on one question about some faces.

    Args:
        tokens (`torch.Tensor` of shape `(pictures, tokens, width)`): What the encoder sees of some faces.
        labels (`list[torch.Tensor]`): For each question the right answers, from [`Question.labels`].
        steps (`int`): Of 64 faces each.
        file (`Path`): From which a stopped run goes on.

    Returns:
        `int`: The floating-point operations that all steps took.
    """
    projector, values = model.model.multi_modal_projector, model.model.language_model.layers[-1].self_attn.v_proj
    glances = [Glance(model, question) for question in questions]
    words = torch.cat([glance.words for glance in glances])
    wanted = [standardised(question.grammar.values[own]) for question, own in zip(questions, labels, strict=True)]
    heads, first = nn.ModuleList(), 0
    for question in questions:
        head = nn.Linear(values.in_features, len(question.units), bias=False)
        head.weight.data.copy_(values.weight[first : first + len(question.units)])
        heads.append(head)
        first += len(question.units)
    said = [head(words).detach() for head in heads]
    trained = nn.ModuleList([projector, heads])
    model.requires_grad_(False)
    trained.requires_grad_(True)
    optimizers = make_optimizers(trained, list(trained.parameters()), RATE)

    def learn(asked: int, rows: torch.Tensor) -> float:
        """The loss of one question about some faces, and its gradients."""
        trained.zero_grad()
        head = heads[asked]
        loss = (head(glances[asked](tokens[rows])) - wanted[asked][rows]).pow(2).mean()
        (loss + KEPT * (head(words) - said[asked]).pow(2).mean()).backward()
        return loss.item()

    losses: list[list[float]] = [[] for _ in questions]
    course = Course(file, {"trained": trained}, optimizers)
    done = course.at.get("step", 0)
    bar = tqdm(range(done, steps), desc="estimates", unit="step", mininterval=5, initial=done, total=steps)
    for step in bar:
        set_rate(optimizers, RATE, step / steps, 20 / steps)
        asked = ROUND[step % len(ROUND)]
        rows = np.random.default_rng([seed, step]).integers(len(tokens), size=BATCH)
        losses[asked].append(learn(asked, torch.from_numpy(rows).to(tokens.device)))
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            named = zip(questions, losses, strict=True)
            bar.set_postfix({question.name: f"{np.mean(own[-20:]):.3f}" for question, own in named if own})
        if (step + 1) % KEEP == 0 or step + 1 == steps:
            course.keep(step=step + 1)
    cost = operations_of(steps, lambda asked: learn(asked, torch.arange(BATCH) % len(tokens)))
    model.requires_grad_(True).zero_grad()
    with torch.no_grad():
        values.weight[:first] = torch.cat([head.weight for head in heads])
    return cost
