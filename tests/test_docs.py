"""The documentation is true: its commands run, its links lead somewhere, and it names everything there is.

A fenced block of `sh`, `bash` or `python` is run, unless its first line says `# needs ...`. Blocks of one page share a
folder and, in Python, their names. What is not run has at least to be a command that exists.
"""

import io
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
from conftest import ROOT
from PIL import Image
from trl import SFTConfig

from au_llava.__main__ import main, parser
from au_llava.action_units import CATALOGUE, TASKS
from au_llava.arguments import AuLlavaArguments


PAGES = [path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages whose commands other tests run: in the checkout itself, or for minutes.
ELSEWHERE = {"README.md": "tests/test_packaging.py, test_hub.py", "docs/own_data.md": "tests/test_own_data.py"}
HERE = [page for page in PAGES if page not in ELSEWHERE]


def blocks(page: str) -> list[tuple[str, str]]:
    """The languages and texts of a page's commands."""
    found = FENCE.findall((ROOT / page).read_text())
    return [(language, text) for language, text in found if language in ("sh", "bash", "python")]


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones joined, without remarks."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages' commands speak of."""
    path = tmp_path_factory.mktemp("reader")
    with Image.open(ROOT / "examples/smile.jpg") as picture:
        for name in ("portrait.jpg", "photos/a.jpg", "more/b/c.png", "crops/d.jpg"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            picture.resize((160, 160)).save(path / name)
    film = cv2.VideoWriter(str(path / "talk.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (120, 120))
    for _ in range(5):
        film.write(cv2.resize(cv2.imread(str(path / "portrait.jpg")), (120, 120)))
    film.release()
    return path


def run_line(line: str, folder: str, monkeypatch) -> None:
    *feed, command = line.split(" | ")
    if feed:
        listed = subprocess.run(shlex.split(feed[0]), capture_output=True, text=True, check=True).stdout
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    name, *arguments = shlex.split(command)
    assert name == "au-llava", f"{line}: say what it needs, or teach this test to run it"
    assert main(arguments if arguments[0] == "describe" else [*arguments, "--model", folder]) == 0, line
    if "--output" in arguments:
        assert Path(arguments[arguments.index("--output") + 1]).is_file()


@pytest.fixture(scope="module")
def ran():
    """The lines that were run: once for all pages is enough."""
    return set()


@pytest.mark.parametrize("page", HERE)
def test_a_page_s_blocks_run(page, place, folder, ran, monkeypatch, capsys):
    monkeypatch.chdir(place)
    names: dict = {}
    for number, (language, text) in enumerate(blocks(page), 1):
        if text.startswith("# needs "):
            continue
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), names)
        else:
            for line in commands(text):
                # What torchrun does is tested in test_cli.py: test_two_processes_make_the_table_of_one.
                if line not in ran and not line.startswith("torchrun "):
                    run_line(line, folder, monkeypatch)
                    ran.add(line)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_exists(page):
    for language, text in blocks(page):
        for line in commands(text) if language != "python" else ():
            assert exists(shlex.split(line)), f"{page}: {line}"


def exists(words: list[str]) -> bool:
    """Whether a command names a program, module, file or make target that there is, with options it takes."""
    for place, word in enumerate(words):
        if word == "-m":
            return takes(words[place + 1], words[place + 2 :])
    name, *arguments = words
    if name == "au-llava":
        return takes("au_llava", arguments)
    if name in ("python", "accelerate", "torchrun"):
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        files = [word for word in words if word.endswith((".py", ".yaml"))]
        return all((ROOT / file).is_file() for file in files) and knows(ROOT / words[script], words[script:])
    if name == "make":
        return all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in arguments)
    return name in ("find", "srun", "pip", "git", "mkdir", "hf")


def takes(module: str, arguments: list[str]) -> bool:
    if module == "au_llava":
        parser().parse_args(arguments[: arguments.index("|")] if "|" in arguments else arguments)
        return True
    found = find_spec(module)
    if found and found.submodule_search_locations:
        found = find_spec(f"{module}.__main__")
    return found is not None and knows(Path(found.origin), arguments)


def knows(script: Path, words: list[str]) -> bool:
    """Whether a script's source names each option; of `train_sft.py` the fields, of data sets those that all share."""
    if script.name == "train_sft.py":
        known = {f"--{field.name}" for kind in (AuLlavaArguments, SFTConfig) for field in fields(kind)} | {"--config"}
    else:
        text = script.read_text() + (ROOT / "datasets_scripts/preparation.py").read_text()
        known = set(re.findall(r'"(--\w+)"', text))
    return {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "program", ["train_sft.py --lora llm", "evaluate_au.py --model .", "-m baselines.linear_head"]
)
def test_an_option_that_there_is_not_is_found(program):
    assert exists(["python", *program.split()]) and not exists(["python", *program.split(), "--colour"])


def test_links_and_pictures_lead_somewhere():
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text())
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith("http"):
                file, _, heading = target.partition("#")
                aim = (ROOT / page).parent / file if file else ROOT / page
                assert aim.exists(), f"{page}: {target}"
                assert not heading or heading in anchors(aim), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text()
    names = {Path(page).name for page in PAGES} - {"README.md"}
    assert {name for name in names if f"({name})" not in index} == set()


def test_every_unit_and_task_has_its_picture():
    page = (ROOT / "docs/units.md").read_text()
    for name in [*CATALOGUE, *TASKS]:
        assert f"`{name}`" in page
    for unit in CATALOGUE.values():
        assert f"**{unit.name}**" in page and unit.region in page
    for picture in (ROOT / "docs/units").iterdir():
        with Image.open(picture) as opened:
            assert f"units/{picture.name}" in page and opened.width > 200
    assert page.count("![") == len(CATALOGUE) + len(TASKS)
    assert sum(path.stat().st_size for path in (ROOT / "docs/units").iterdir()) < 600_000


def test_every_command_and_option_is_documented():
    page = "".join((ROOT / name).read_text() for name in PAGES)
    [commands] = [action.choices for action in parser()._actions if action.choices]
    for name, command in commands.items():
        assert f"au-llava {name}" in page
        for action in command._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option in page, option
    for script in ("evaluate_au.py", "push_to_hub.py"):
        for option in re.findall(r'add_argument\(\s*"(--\w+)"', (ROOT / script).read_text()):
            assert re.search(rf"{option}\b", page), f"{script} {option}"
