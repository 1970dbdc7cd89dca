"""How a model that was just trained is scored."""

import re
import shlex
from urllib.parse import parse_qsl

from au_llava.datasets_scripts.sources import Source


# Options of a source that evaluate_au.py refuses, for its own options say who is asked what.
SETTLED = ("split", "config_name", "fold", "task", "threshold", "action_units")


def score_command(model: str, train_data: list[str]) -> str:
    """The command that scores a model on the test people of its data set, or on rendered faces if that is not one set.

    Args:
        model (`str`): Folder.
        train_data (`list[str]`): The sources that it was trained on.

    Example:

    >>> score_command("runs/mine", ["disfa:data/disfa?config_name=fold2&naming=megraphau"]).partition(" --dataset ")[2]
    "disfa --data_dir 'data/disfa?naming=megraphau' --fold 2 --output runs/mine-scores"
    """
    command = ["python", "evaluate_au.py", "--model", model]
    own = [source for source in map(Source, train_data) if source.name not in ("", "synthetic")]
    # Of BP4D, evaluate_au.py asks detection alone.
    own = [source for source in own if source.name != "bp4d" or "task=intensity_level" not in source.text]
    # And of DISFA what is present from the level 2 on, or by the paper's protocol from 3.
    own = [source for source in own if source.name != "disfa" or not re.search("threshold=[145]", source.text)]
    if len(own) == 1:
        name, place = own[0].name, own[0].text.removeprefix(f"{own[0].name}:")
        folder, _, query = place.partition("?")
        settled, options = ("split",) if name == "csv" else SETTLED, dict(parse_qsl(query))
        kept = "&".join(pair for pair in query.split("&") if pair.partition("=")[0] not in settled)
        command += ["--dataset", name, "--data_dir", f"{folder}?{kept}" if kept else folder]
        config = options.get("config_name", "")
        if config == "paper" or options.get("threshold") == "3":
            command += ["--protocol", "paper"]
        if config == "subject":
            command += ["--fold", options.get("fold", "1")]
        elif config.startswith("fold"):
            command += ["--fold", config.removeprefix("fold")]
    return shlex.join([*command, "--output", f"{model}-scores"])
