"""The default checkpoint's small tokenizer: byte-level BPE trained on this project's own prompts and answers."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from au_llava.action_units import CATALOGUE, PRESETS, TASKS, describe, write_answer
from au_llava.processing_au_llava import CHAT_TEMPLATES


VOCABULARY = 1024


def corpus() -> list[str]:
    """Prompts over random Action Unit lists with random answers: everything the tokenizer has to write well."""
    random_state = random.Random(0)
    texts = [*CHAT_TEMPLATES.values()]
    codes = {"FACS": [c for c in CATALOGUE if c.startswith("AU")], "FEAFA": list(PRESETS["feafa"])}
    for _ in range(600):
        task = random_state.choice(list(TASKS))
        family = random_state.choice(list(codes))
        chosen = random_state.sample(codes[family], random_state.randint(1, len(codes[family])))
        units = [CATALOGUE[code] for code in chosen]
        answer = write_answer([random_state.choice(TASKS[task].values) for _ in units], task, units)
        texts.append(f" USER: {describe(task, units)} ASSISTANT: {answer}")
    return texts


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same on every machine.

    Each digit, bracket, comma and point is a token of its own, as in Llama's tokenizer, so that each value of an
    answer is written with equally many tokens.

    >>> tokenizer = train_tokenizer()
    >>> tokenizer.tokenize("[0.35, 1.00]")
    ['[', '0', '.', '3', '5', ',', 'Ġ', '1', '.', '0', '0', ']']
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[\[\](){},.:;\n]|\s(?=\d)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
    )
