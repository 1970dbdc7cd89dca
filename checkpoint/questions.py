"""What the default checkpoint is trained to be asked, as token ids, put to a language model that has image tokens."""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import DynamicCache, PreTrainedModel

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import PRESETS, select
from au_llava.datasets_scripts.synthetic_faces.builder import labels_of
from au_llava.datasets_scripts.synthetic_faces.expression import FACS_CODES, LEVEL_EDGES
from checkpoint.pretrain import LABELS


# Each task's preset; and intensities of FACS units, so that all tasks can be asked about the same units.
LISTS = (("detection", "bp4d"), ("intensity_level", "disfa"), ("intensity", "feafa"), ("intensity", "disfa"))
# What is asked, step by step: places in LISTS. The answer about FEAFA's units is four times as long as the others and
# the hardest to learn.
ROUND = (2, 0, 1, 2, 0, 3)
ALONE = 0.3  # share that is kept of faces with marked smiles but no raised cheeks, or the other way round


def open_model(folder: str) -> tuple[AuLlavaForConditionalGeneration, AuLlavaProcessor]:
    """A model of an earlier stage in 32 bits, and its processor; on the GPU, where there is one.

    So is everything that is made from then on: the stages do not say where.
    """
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    model = AuLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AuLlavaProcessor.from_pretrained(folder)


def training_shards(*folders: str) -> list[Path]:
    """The files of the rendered faces to learn from, in order."""
    return [file for folder in folders for file in sorted(Path(folder).glob("train-*.parquet"))]


def read_labels(files: list[Path]) -> list[dict]:
    """What is known of each face, without the pictures."""
    return [row for file in files for row in pq.read_table(file, columns=[*LABELS, "occurrences"]).to_pylist()]


def lifelike(rows: list[dict]) -> torch.Tensor:
    """Which faces `(n,)` to learn from so that smiles and raised cheeks come together about as often as in people.

    The renderer draws each as often alone as with the other, and then a broad smile says nothing of the cheeks.

    Args:
        rows (`list[dict]`): As [`read_labels`] gives them.
    """
    facs = torch.tensor([row["facs"] for row in rows])
    cheeks, smile = facs[:, FACS_CODES.index("AU6")], facs[:, FACS_CODES.index("AU12")]
    seen, marked = LEVEL_EDGES[1:3]
    alone = ((smile >= marked) & (cheeks < seen)) | ((cheeks >= seen) & (smile < seen))
    return (~alone | (torch.rand(len(rows)) < ALONE)).nonzero()[:, 0]


class Question:
    """One task's question about a list of units, and the answers to it.

    Args:
        processor ([`AuLlavaProcessor`]): With the text before the image.
        task (`str`): `detection`, `intensity_level` or `intensity`.
        preset (`str`): `bp4d`, `disfa` or `feafa`.
    """

    def __init__(self, processor, task: str, preset: str):
        self.name, self.task = f"{task}:{preset}", task
        self.units, self.grammar = select(preset, task), processor.grammar(task, preset)
        ids = processor.tokenizer(processor.prompt(task, preset), add_special_tokens=False)["input_ids"]
        first = ids.index(processor.image_token_id)
        self.before, self.after = torch.tensor([ids[:first]]), torch.tensor([ids[first + 1 :]])
        self.slots = self.grammar.slots()
        self.digits = self.slots[:, self.grammar.free()]
        # Where brackets, commas and points stand, `(length,)`.
        self.between = torch.ones(len(self.grammar), dtype=torch.bool)
        self.between[self.digits.flatten()] = False
        self.letters = self.grammar.value_tokens.unique()
        # What each letter adds to a value, `(digits, letters)`; in 0.39 only to what stands after the point. A 1
        # before it must not make up for that: a third of a 1.00 and the rest zero has the right mean for 0.33 only.
        texts = processor.tokenizer.convert_ids_to_tokens(self.letters.tolist())
        numbers = torch.tensor([float(text) if text.isdigit() else 0.0 for text in texts])
        whole = self.slots.shape[1] == 1
        scales = torch.tensor([float(whole), 0.0, 0.1, 0.01])[: self.slots.shape[1]][self.grammar.free()]
        self.worth = scales[:, None] * numbers

    def labels(self, rows: list[dict]) -> torch.Tensor:
        """The right answers to rows of the synthetic faces, as places in the grammar's values `(rows, units)`."""
        known = (labels_of(row, self.task) for row in rows)
        numbers = torch.tensor([[labels[unit.code] for unit in self.units] for labels in known])
        return (numbers[:, :, None] - self.grammar.values).abs().argmin(-1)

    def mirrored(self) -> torch.Tensor:
        """`(units,)`: where each unit of a mirrored face was before: the same place, or that of the other side."""
        return torch.tensor(self.grammar.mirrored)

    def write(self, labels: torch.Tensor) -> torch.Tensor:
        """Token ids `(rows, length)` of the answers that [`labels`] gives."""
        answers = self.grammar.template().repeat(len(labels), 1)
        answers[:, self.slots] = self.grammar.value_tokens[labels]
        return answers

    def put(self, language: PreTrainedModel, image: torch.Tensor, answers: torch.Tensor, **kwargs):
        """Run the language model without its head; the text before the image is computed once.

        Args:
            image (`torch.Tensor` of shape `(rows, tokens, width)`): What the projector made of each picture.
            answers (`torch.LongTensor` of shape `(rows, length)`): As the model is to see them.

        Returns:
            The language model's output; the last `length + 1` places are those before and in the answer.
        """
        cache = DynamicCache(config=language.config)
        language(input_ids=self.before, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(answers))
        after = torch.cat([self.after.expand(len(answers), -1), answers], 1)
        embeddings = torch.cat([image, language.embed_tokens(after)], 1)
        return language(inputs_embeds=embeddings, past_key_values=cache, **kwargs)


def standardised(values: torch.Tensor) -> torch.Tensor:
    """Values `(faces, units)` with mean 0 and spread 1 for each unit; units that never change stay at 0."""
    return (values - values.mean(0)) / values.std(0).clamp(min=1e-3)


def trained_lists() -> dict[str, list[list[str]]]:
    """By task the lists of codes in `LISTS`, as [`AuLlavaProcessor`] keeps them."""
    lists: dict[str, list[list[str]]] = {}
    for task, preset in LISTS:
        lists.setdefault(task, []).append(list(PRESETS[preset]))
    return lists
