"""The wheel works away from the checkout, and the README's snippets do what they say."""

import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


USE = """
import pathlib, sys
import au_llava
from PIL import Image
from transformers import pipeline
from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor

home = pathlib.Path(au_llava.__file__).parent
assert home == pathlib.Path(sys.argv[1], "au_llava"), home
assert au_llava.default_checkpoint() == str(home)
model = AuLlavaForConditionalGeneration.from_pretrained(au_llava.default_checkpoint())
processor = AuLlavaProcessor.from_pretrained(au_llava.default_checkpoint())
pipe = pipeline("facial-action-units", model=model, processor=processor)
faces = pipe(home / "examples" / "smile.jpg", task="intensity", detector="none")
assert len(faces[0]["action_units"]) == 24
from au_llava.datasets_scripts.instructions import instruct
from au_llava.drawing import draw_faces
print("works")
"""


def run(command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_wheel_works_outside_the_checkout(tmp_path):
    built = run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("au_llava-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert not [name for name in archive.namelist() if name.endswith((".pt", ".onnx"))]
    used = run([sys.executable, "-c", USE, str(tmp_path / "site")], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert used.returncode == 0, used.stderr[-3000:]
    assert "works" in used.stdout


def snippets() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if block.startswith("from transformers")]


def test_the_readmes_snippets_run(tmp_path):
    code = snippets()
    assert len(code) == 2
    done = run([sys.executable, "-c", "\n".join(code)], ROOT, HF_MODULES_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Lip Corner Puller" in done.stdout and "'AU6'" in done.stdout


def test_the_model_card_is_valid():
    from huggingface_hub import ModelCard

    card = ModelCard.load(ROOT / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    assert {"facebook/dinov2-large", "lmsys/vicuna-7b-v1.5"} <= set(card.data.base_model)
    assert "arxiv:2409.08444" in card.data.tags


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_names_the_make_targets(target):
    assert f"make {target}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_a_make_variable_has_one_meaning():
    names = re.findall(r"^(?:define )?([A-Z]+)(?: *[:?]?=|$)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "RUNS" in names and "FLOORS" in names
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_a_checkpoint_goes_on_without_making_anew_what_later_stages_began_with(tmp_path):
    (tmp_path / "installed").touch()
    told = {"VENV": tmp_path, "RUN": "echo", "RUNS": tmp_path, "TARGET": tmp_path / "published", "FAST": "false"}
    command = ["make", "-s", "checkpoint", *(f"{name}={value}" for name, value in told.items())]

    def stages() -> list[str]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return re.findall(r"-m (?:checkpoint|baselines)\.(\w+)", done.stdout)

    (tmp_path / "again").mkdir()  # which the stage of this name makes
    first = stages()
    assert first.count("reading") == 2 and first.count("publish") == 1
    for name in ("start", "reading", "again"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "processor_config.json").touch()
    assert stages() == [stage for stage in first if stage not in ("assemble", "reading", "publish")]


def test_the_tree_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 45e6
    assert (ROOT / "model.safetensors").stat().st_size <= 30e6
