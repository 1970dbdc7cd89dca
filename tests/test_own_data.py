"""docs/own_data.md from top to bottom, as its reader runs it: own pictures, crops, training, scores, recognition."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from PIL import Image

from au_llava import AuLlavaForConditionalGeneration
from au_llava.photos import load_pipeline, provenance


def blocks() -> list[tuple[str, str]]:
    text = (ROOT / "docs/own_data.md").read_text()
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if not code.startswith("# needs ")]


@pytest.mark.slow
def test_the_page_leads_from_pictures_to_a_model(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    said = []
    for language, code in blocks():
        for name in (
            "my_faces",
            "data/mine",
            "runs/mine",
            "mine.csv",
        ):  # the reader's folders; all else is the project's
            code = re.sub(rf"(?<![\w/]){name}", f"{tmp_path}/{name.replace('/', '_')}", code)
        words = ["python", "-c", code] if language == "python" else shlex.split(code.replace("\\\n", ""))
        start = {"python": [sys.executable], "au-llava": [sys.executable, "-m", "au_llava"]}[words[0]]
        done = subprocess.run([*start, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
        said.append(done.stdout)
    assert len(said) == 5
    assert "200 crops of 200 subjects" in said[1]
    assert "Samples: own intensity_level, train: 121" in said[2]
    assert "intensity_level: 49 pictures of 49 people, 5 Action Units" in said[3]
    stored = json.loads((tmp_path / "runs_mine-merged/processor_config.json").read_text())["calibration"]
    assert 0.5 <= stored["intensity_level"]["mass"] <= 1
    assert {"adapter_model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "runs_mine").iterdir()}
    table = (tmp_path / "mine.csv").read_text().splitlines()
    assert len(table) == 201 and "AU12_intensity_level" in table[0]


def test_an_adapter_recognises_by_its_folder_alone(tmp_path, model, processor):
    """As `au-llava recognize --model runs/mine` opens it: with the adapter's weights, and under its own name."""
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    crop, answers = Image.linear_gradient("L").convert("RGB").resize((224, 224)), []
    for folder, weights in (("base", "model.safetensors"), ("mine", "adapter_model.safetensors")):
        pipe = load_pipeline(str(tmp_path / folder), "cpu")
        told = provenance(pipe, "none")
        assert told["model"] == str(tmp_path / folder)
        digest = hashlib.sha256((tmp_path / folder / weights).read_bytes()).hexdigest()
        assert digest.startswith(told["weights SHA-256"])
        [face] = pipe(crop, task="detection", detector="none")
        answers.append([unit["probability"] for unit in face["action_units"].values()])
    assert answers[0] != answers[1]
    before = provenance(pipe, "none")
    processor.calibration = {"intensity_level": {"temperature": 1.5}}
    processor.save_pretrained(tmp_path / "mine")  # other answers come of it, so that no table may hold both kinds
    after = provenance(load_pipeline(str(tmp_path / "mine"), "cpu"), "none")
    changed = {name for name in after if before[name] != after[name]} - {"date"}
    processor.calibration = {}
    assert changed == {"settings SHA-256"}
    assert before["base"] == str(tmp_path / "base") and "base's weights SHA-256" in before
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"looks": [[1.05, 4.0]]}))
    looking = provenance(load_pipeline(str(tmp_path / "mine"), "cpu"), "none")
    assert {name for name in looking if looking[name] != after[name]} - {"date"} == {"base's settings SHA-256"}
    (tmp_path / "mine" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"the folder holds no config\.json"):
        load_pipeline(str(tmp_path / "mine"), "cpu")
