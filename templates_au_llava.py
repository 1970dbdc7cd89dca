"""The text around T: the chat layout of prompts, and the template by which transformers' decision pipeline asks."""

import json
import os
from pathlib import Path

from .action_units import CATALOGUE, get_task, select


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CONTENT = {
    "image_first": "{{ images(message) }}{{ text(message) }}",
    "text_first": "{{ text(message) }}{{ images(message) }}",
}
# The Vicuna v1.5 chat layout. The answer and its end-of-sequence token are what training puts the loss on.
_CHAT_TEMPLATE = """\
{%%- macro images(message) -%%}
{%%- if message['content'] is not string -%%}
{%%- for part in message['content'] if part['type'] == 'image' -%%}%(image)s{%%- endfor -%%}
{%%- endif -%%}
{%%- endmacro -%%}
{%%- macro text(message) -%%}
{%%- if message['content'] is string -%%}{{ message['content'] }}
{%%- else -%%}{%%- for part in message['content'] if part['type'] == 'text' -%%}{{ part['text'] }}{%%- endfor -%%}
{%%- endif -%%}
{%%- endmacro -%%}
{{- bos_token -}}
{%%- if messages[0]['role'] == 'system' -%%}{{ text(messages[0]) }}{%%- else -%%}%(system)s{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message['role'] == 'user' -%%}{{ ' USER: ' }}%(content)s
{%%- elif message['role'] == 'assistant' -%%}
{{ ' ASSISTANT:' }}{%% generation %%}{{ ' ' + text(message) + eos_token }}{%% endgeneration %%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{ ' ASSISTANT:' }}{%%- endif -%%}
"""
CHAT_TEMPLATES = {
    layout: _CHAT_TEMPLATE
    % {
        "system": SYSTEM,
        "image": "<image>{{ '\\n' }}" if layout == "image_first" else "{{ '\\n' }}<image>",
        "content": content,
    }
    for layout, content in _CONTENT.items()
}

# Which task answers which type of question.
DECISION_TASKS = {"noul": "detection", "score": "intensity_level"}
# The sentinels of `transformers.decision`: an option is read before a mark; a split only keeps tokens apart.
_MARK, _SPLIT = "<|mark|>", "<|split|>"
_DECISION_TEMPLATE = """\
{%%- set units = %(units)s -%%}
{%%- set prompts = %(prompts)s -%%}
{%%- macro pictures(part) -%%}
{%%- if part is mapping and part.type == 'image' -%%}.
{%%- elif part is mapping -%%}{%%- for value in part.values() -%%}{{ pictures(value) }}{%%- endfor -%%}
{%%- elif part is iterable and part is not string -%%}{%%- for value in part -%%}{{ pictures(value) }}{%%- endfor -%%}
{%%- endif -%%}
{%%- endmacro -%%}
{%%- if pictures(state) | length != 1 -%%}
{{ raise_exception('The state has to hold one picture of a face: a name that stands in the assets.') }}
{%%- endif -%%}
{%%- if pictures(questions) -%%}
{{ raise_exception('The name of a picture stands in a question, too; call the picture otherwise, such as photo-1.') }}
{%%- endif -%%}
{%%- set prompt = prompts[questions[0].type] -%%}
{%%- if not prompt or questions | map(attribute='type') | unique | list | length != 1 -%%}
{{ raise_exception('One request asks either noul questions (is a unit present?) or score questions (its level).') }}
{%%- endif -%%}
{%%- if prompt.untrained -%%}{{ raise_exception(prompt.untrained) }}{%%- endif -%%}
{%%- set asked = namespace(lines=[], whole=[]) -%%}
{%%- for question in questions -%%}
{%%- if question.options | length != prompt.options -%%}
{{ raise_exception('Question ' ~ question.name ~ ' needs ' ~ prompt.options ~ ' criteria, the lowest first.') }}
{%%- endif -%%}
{%%- set line = units[question.name] or units[question.instructions] or question.instructions -%%}
{%%- if not line or line is not string -%%}
{{ raise_exception('Question ' ~ question.name ~ ' is no Action Unit; name it so, or describe your own in text.') }}
{%%- endif -%%}
{%%- if line in asked.lines -%%}
{{ raise_exception('Question ' ~ question.name ~ ' is about a unit of another question; ask about each one once.') }}
{%%- endif -%%}
{%%- set asked.lines = asked.lines + [line] -%%}
{%%- endfor -%%}
{%%- for codes in prompt.lists if not asked.whole -%%}
{%%- set found = namespace(lines=[], told=[]) -%%}
{%%- for code in codes -%%}
{%%- set found.lines = found.lines + [units[code]] -%%}
{%%- if units[code] in asked.lines -%%}{%%- set found.told = found.told + [units[code]] -%%}{%%- endif -%%}
{%%- endfor -%%}
{%%- if found.told == asked.lines -%%}{%%- set asked.whole = found.lines -%%}{%%- endif -%%}
{%%- endfor -%%}
{%%- if prompt.lists and not asked.whole -%%}
{%%- set lists = prompt.lists | map('join', ', ') | join('; ') -%%}
{{ raise_exception('The model was trained on whole lists; ask about units of one, in its order: ' ~ lists) }}
{%%- endif -%%}
{%%- set lines = asked.whole or asked.lines -%%}
{{- prompt.head ~ lines | join('\\n') -}}
{{- prompt.one if lines | length == 1 else prompt.many[0] ~ lines | length ~ prompt.many[1] -}}
{{- prompt.opening -}}
{%%- for line in lines -%%}
{{ '%(mark)s' if line in asked.lines else '' }}%(neutral)s{{ '' if loop.last else prompt.separator }}
{%%- endfor -%%}
"""


def decision_files(processor) -> dict[str, str]:
    """What makes `pipeline("decision")` answer questions about Action Units with a model, several in one forward pass.

    A `noul` question asks whether a unit is present and a `score` question, with six criteria, for its level. The name
    of the question, or its instructions, is a code such as `AU12`, or the instructions describe a unit of your own.
    Where the model was trained on whole lists, those asked about have to be in one of them, in its order, and the
    whole list is asked about; questions of a task that it was not trained on are refused. The answers' digits are
    neutral, as for `recognize(readout="parallel")`.

    Args:
        processor ([`AuLlavaProcessor`]): Writes prompts and answers.

    Returns:
        `dict[str, str]`: Contents of the files `decision.json` and `decision_template.jinja`.

    Example:

    >>> from au_llava import AuLlavaProcessor, default_checkpoint
    >>> sorted(decision_files(AuLlavaProcessor.from_pretrained(default_checkpoint())))
    ['decision.json', 'decision_template.jinja']
    """
    prompts, labels, temperature = {}, {}, {}
    first, second = select("AU1,AU2")
    for kind, task in DECISION_TASKS.items():
        grammar, texts = processor.grammar(task, [first]), get_task(task).texts

        def apart(tokens: list[int]) -> str:
            return _SPLIT.join(["", *(processor.tokenizer.decode([token]) for token in tokens), ""])

        one, many = processor.prompt(task, [first]), processor.prompt(task, [first, second])
        head, tail = one.split(first.line())
        known = processor.trained_lists
        strange = f"The model was not trained to answer {kind} questions. It was trained on {', '.join(known)} alone."
        prompts[kind] = {
            "untrained": strange if known and task not in known else "",
            "head": head,
            "one": tail,
            "many": many.split(second.line())[1].split("2", 1),
            "opening": apart(grammar.opening),
            "separator": apart(grammar.separator),
            "options": len(texts),
            "lists": [] if task in processor.free_tasks else known.get(task, []),
        }
        labels[kind] = list(texts)
        temperature[kind] = processor.calibration.get(task, {}).get("temperature", 1.0)
    settings = {"labels": labels, "noul_options": ["false", "true"], "temperature": temperature}
    template = _DECISION_TEMPLATE % {
        "units": json.dumps({code: unit.line() for code, unit in CATALOGUE.items()}, indent=1, ensure_ascii=False),
        "prompts": json.dumps(prompts, indent=1, ensure_ascii=False),
        "mark": _MARK,
        "neutral": processor.tokenizer.decode([grammar.neutral]),
    }
    return {"decision.json": json.dumps(settings, indent=2) + "\n", "decision_template.jinja": template}


def write_decision_files(processor, folder: str | Path) -> None:
    """Write [`decision_files`] into a folder; again whenever the processor's calibration has changed."""
    for name, text in decision_files(processor).items():
        draft = Path(folder, f".{name}.{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, Path(folder, name))
