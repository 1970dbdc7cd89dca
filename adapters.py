"""What surrounds a training: the base that it starts from, the merged model, the card, and who may see them."""

import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from au_llava import __version__

from .datasets_scripts.report import read_json
from .modeling_au_llava import AuLlavaForConditionalGeneration
from .processing_au_llava import AuLlavaProcessor


# Data sets whose agreements reach the weights that were trained on them.
RESTRICTED = ("bp4d", "disfa", "feafa")

# In the folder of a run, and of a base: what it was begun with. Hidden, for it is not to be published.
MADE_WITH = ".made_with.json"

# In the folder of a run: whom it was not trained on, and whom it was. They have names, and stay at home.
PEOPLE = ("held_out.json", "trained_on.json")
LOST = "restore it, or train anew, for it tells whom the model was trained on"

_CARD = """
# {title}

AU-LLaVA, fine-tuned by `train_sft.py`. It reads facial Action Units from an aligned face crop: see
`processor.grammar` and `model.recognize`, or `pipeline("facial-action-units")` for whole photographs.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)
```

An Action Unit describes a muscle movement, not an emotion, an intention, or a fact about a person. Do not use this
model for decisions about people, and ask for consent before you analyse a face.
{warning}
## Training

{parameters}

| data set | task | split | samples |
|---|---|---|---|
{data}

Made with {versions}:

```
{command}
```

The recipe:

```yaml
{recipe}
```
"""
_WARNING = """
> **Licence.** Trained on {names}, whose agreements reach the weights. {terms}
"""


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole; an older one is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        os.chmod(draft, 0o755)
        yield Path(draft)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
        os.mkdir(draft)  # for TemporaryDirectory to remove


def check_made_with(folder: str | Path, settings: Mapping) -> None:
    """See that a folder was begun with the same settings, before it is gone on with.

    Args:
        folder: Holds `MADE_WITH`, or is of a version that wrote none.
        settings (`Mapping`): What it would be begun with now.

    Raises:
        ValueError: It was begun with others.
    """
    path = Path(folder, MADE_WITH)
    remedy = "give another output_dir, or delete that folder"
    before = read_json(path, remedy) if path.is_file() else {}
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{folder} was begun with {name} {before[name]!r}, and now it is {value!r}. Give another output_dir, "
                "or delete that folder."
            )


def assemble(
    folder: str | Path,
    vision: str,
    language: str,
    gguf_file: str | None = None,
    prompt_layout: str = "image_first",
    dtype: str = "float32",
) -> None:
    """Join two backbones once and keep the result, so that restarts and adapters begin with the same projector.

    Args:
        folder: Where the model goes; nothing is done if it is there already, made of the same.
        vision, language, gguf_file: See [`AuLlavaForConditionalGeneration.from_backbones`].
        prompt_layout (`str`, *optional*, defaults to `"image_first"`): See [`AuLlavaProcessor`].
        dtype (`str`, *optional*, defaults to `"float32"`): Of the stored weights.

    Raises:
        ValueError: What is there was made of others.
    """
    parts = {"vision": vision, "language": language, "gguf_file": gguf_file}
    parts |= {"prompt_layout": prompt_layout, "dtype": dtype}
    if Path(folder).is_dir():
        check_made_with(folder, parts)
        return
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language, gguf_file=gguf_file, dtype=dtype)
    processor = AuLlavaProcessor.from_backbones(vision, language, gguf_file=gguf_file, prompt_layout=prompt_layout)
    side = processor.image_processor.crop_size["height"]  # the encoder's own, which is not always a crop's
    model.config.image_seq_length = model.count_patches(side)
    processor.patch_size = side // math.isqrt(model.config.image_seq_length)
    # Weights from a GGUF file are plain numbers by now, but their config still calls them quantised.
    for config in (model.config, model.config.text_config):
        config.__dict__.pop("quantization_config", None)
    with new_folder(folder) as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        Path(draft, MADE_WITH).write_text(json.dumps(parts))
        origins = [name for name in (vision, language) if not Path(name).is_dir()]
        facts = ModelCardData(library_name="transformers", base_model=origins or None, tags=["au-llava"])
        text = f"{vision} and {language}, joined by an untrained projector: a start for training.\n"
        Path(draft, "README.md").write_text(f"---\n{facts.to_yaml()}\n---\n\n# {Path(folder).name}\n\n{text}")


def merge(adapter: str | Path, folder: str | Path) -> None:
    """Work an adapter into its base, and write the full model with processor, code and card.

    Args:
        adapter: A folder that `train_sft.py` wrote.
        folder: Where the merged model goes.
    """
    base = json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AuLlavaForConditionalGeneration.from_pretrained(base), adapter)
    with new_folder(folder) as draft:
        model.merge_and_unload().save_pretrained(draft)
        AuLlavaProcessor.from_pretrained(adapter).save_pretrained(draft)
        for file in PEOPLE:
            shutil.copy(Path(adapter, file), draft)
        card = ModelCard.load(Path(adapter, "README.md"))
        card.data.library_name = "transformers"
        # Command and recipe tell of the training, and stay as they were.
        card.text = card.text.replace(f'from_pretrained("{adapter}"', f'from_pretrained("{folder}"')
        card.save(draft / "README.md")


def add_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the model's code beside an adapter, as `save_pretrained` does for a full model."""
    from .pipeline_au_llava import FacialActionUnitPipeline

    for item in (model, FacialActionUnitPipeline):
        custom_object_save(item, folder)


def trained_on(datasets: Iterable[str], base: str) -> list[str]:
    """Data sets behind the weights: those of this training, and those that the base's card, or its notes, name.

    Args:
        datasets (`Iterable[str]`): Names in the column `dataset`.
        base (`str`): Hub id or folder of the model that the training starts from.
    """
    try:
        inherited = ModelCard.load(str(cached_file(base, "README.md"))).data.datasets or []
    except OSError:  # it has no card, or none that can be reached
        inherited = []
    noted = [name for file in PEOPLE for name in _noted(base, file)]
    return sorted({*datasets, *noted, *([inherited] if isinstance(inherited, str) else inherited)})


def never_seen(
    base: str, trained: set[tuple[str, str]], held_out: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """By each data set that the weights were ever trained on: those of its people whom they were never trained on.

    `train_sft.py` keeps this as `held_out.json` beside the weights; `evaluate_au.py --calibrate` fits to these people.

    Args:
        base (`str`): Hub id or folder of the model that the training starts from. Of a data set that it was trained
            on, only people in its own `held_out.json` can remain; others join where that and its `trained_on.json`
            tell whom it has seen.
        trained (`set[tuple[str, str]]`): Data set and name of everyone that is trained on now.
        held_out (`Mapping`): The people that are held out now, by data set.
    """
    before = _noted(base, "held_out.json")
    unknown: dict = dict.fromkeys(trained_on([], base), ())
    people = dict.fromkeys((dataset for dataset, _ in trained), ()) | dict(held_out) | unknown | before
    seen = _noted(base, "trained_on.json")
    for dataset in seen.keys() & held_out.keys():
        if before.get(dataset):  # it is known whom the base has seen, and others may join
            people[dataset] = sorted({*before[dataset], *held_out[dataset]} - set(seen[dataset]))
    return {
        dataset: [name for name in names if (dataset, name) not in trained]
        for dataset, names in sorted(people.items())
    }


def ever_seen(base: str, trained: set[tuple[str, str]]) -> dict[str, list[str]]:
    """By data set: everyone that the weights were ever trained on, as far as it was noted.

    `train_sft.py` keeps this as `trained_on.json` beside the weights; `evaluate_au.py` tests on nobody in it.

    Args:
        base (`str`): Hub id or folder of the model that the training starts from.
        trained (`set[tuple[str, str]]`): Data set and name of everyone that is trained on now.
    """
    people = {dataset: set(names) for dataset, names in _noted(base, "trained_on.json").items()}
    for dataset, name in trained:
        people.setdefault(dataset, set()).add(name)
    return {dataset: sorted(names) for dataset, names in sorted(people.items())}


def _noted(base: str, file: str) -> dict[str, list[str]]:
    """People by data set, as one of the files of `PEOPLE` beside a model has them."""
    try:
        return read_json(Path(str(cached_file(base, file))), LOST)
    except OSError:  # nobody wrote them down, or the model is from the Hub, where they do not go
        return {}


def _restricted(names: list[str]) -> list[str]:
    """Those of some data sets whose agreements bind weights, too; people write their names in any case."""
    return [name for name in names if name.lower() in RESTRICTED]


def check_push(names: list[str], public: bool, licence: str | None, base: str | None) -> None:
    """See before the training whether its result may go to the Hub.

    Args:
        names (`list[str]`): From [`trained_on`].
        public (`bool`): Whether everyone is to see it.
        licence (`str`, *optional*): The licence or consent under which that is allowed.
        base (`str`, *optional*): What an adapter is pushed for; nothing for a full model.

    Raises:
        ValueError: It may not, or nobody could load it.
    """
    restricted = _restricted(names)
    if public and restricted and not licence:
        raise ValueError(
            f"Weights trained on {', '.join(name.upper() for name in restricted)} fall under the agreements of these "
            "data sets, and may not be made public without their owners' consent. Keep the repository private, or "
            'name the licence or consent: --public_licence "..."; it will stand in the card.'
        )
    if base is not None and Path(base).is_dir():
        raise ValueError(
            f"An adapter is of no use without its base, and {base} is a folder that nobody else has. Push that first "
            f"(python push_to_hub.py --model {base} --repo_id USER/NAME) and train with --model USER/NAME, or push "
            "the merged model with --merge."
        )


def make_card(
    folder: str,
    origins: list[str],
    adapter: bool,
    names: list[str],
    licence: str | None,
    parameters: str,
    data: Iterable[tuple[str, str, str, int]],
    recipe: str,
) -> str:
    """Write the model card of a training.

    Args:
        folder (`str`): The result's folder, or its id on the Hub.
        origins (`list[str]`): What it started from; folders are not named.
        adapter (`bool`): Whether the result is an adapter.
        names (`list[str]`): From [`trained_on`].
        licence (`str`, *optional*): Under which weights trained on restricted data are public.
        parameters (`str`): A sentence on what was trained.
        data: Data set, task, split, samples.
        recipe (`str`): The recipe's text.
    """
    restricted = _restricted(names)
    warning = ""
    if restricted:
        terms = f"Published under: {licence}." if licence else "Do not pass them on without their owners' consent."
        warning = _WARNING.format(names=", ".join(name.upper() for name in restricted), terms=terms)
    versions = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    facts = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=[name for name in origins if not Path(name).is_dir()] or None,
        datasets=names,
        license="other" if restricted else None,
        license_name="research-only" if restricted else None,
        tags=["facial-action-units", "au-llava", "custom_code", "arxiv:2409.08444"],
    )
    text = _CARD.format(
        title=Path(folder).name,
        folder=folder,
        warning=warning,
        parameters=parameters,
        data="\n".join(f"| {name} | {task} | {split} | {count:,} |" for name, task, split, count in data),
        versions=", ".join([f"au-llava {__version__}", *(f"{name} {version(name)}" for name in versions)]),
        command=shlex.join(["python", *sys.argv]),
        recipe=recipe.strip(),
    )
    return f"---\n{facts.to_yaml()}\n---\n{text}"
