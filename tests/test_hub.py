"""Loading from a folder as from the Hub: a fresh process, another directory, the package not importable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


LOAD = """
import json, sys
sys.modules["au_llava"] = None  # as on a machine where the package is not installed
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, saved = sys.argv[1:]
crop = Image.linear_gradient("L").resize((224, 224)).convert("RGB")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
other = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
[(_, asked)] = processor.questions("intensity", "AU6,AU12")  # the whole list that it was trained on, if it was
grammar = processor.grammar("intensity", asked)
inputs = processor(images=crop, task="intensity", action_units=asked)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
[values] = model.recognize(**inputs, grammar=grammar).values.tolist()
values = {unit.code: round(value, 2) for unit, value in zip(asked, values, strict=True)}
pipe = pipeline("facial-action-units", model=folder, trust_remote_code=True)
faces = pipe(crop, task="intensity", action_units="AU6,AU12", detector="none")
plain = pipe(crop, task="intensity", action_units="AU6,AU12", detector="none", mirror=False, calibrated=False)
found = {code: unit["value"] for code, unit in plain[0]["action_units"].items()}
assert found == {code: values[code] for code in ("AU6", "AU12")}
chat = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
text = chat(text=[{"role": "user", "content": [{"type": "image", "image": crop}, {"type": "text", "text": "AUs?"}]}],
            generate_kwargs={"max_new_tokens": 3, "do_sample": False}, return_full_text=False)[0]["generated_text"]
pipe.save_pretrained(saved)
print("RESULT" + json.dumps({"config": type(config).__name__, "model": type(model).__name__, "faces": faces,
                             "processor": type(processor).__name__, "text": text}))
"""
AGAIN = """
import json, sys
sys.modules["au_llava"] = None
from PIL import Image
from transformers import pipeline

crop = Image.linear_gradient("L").resize((224, 224)).convert("RGB")
pipe = pipeline("facial-action-units", model=sys.argv[1], trust_remote_code=True)
faces = pipe(crop, task="intensity", action_units="AU6,AU12", detector="none")
print("RESULT" + json.dumps({"faces": faces}))
"""


def run(script: str, cwd: Path, *arguments: object) -> dict:
    """Run a script in a fresh process whose remote-code cache is empty."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("source", ["saved", "repository"])
def test_every_door_opens_without_the_package(source, folder, tmp_path):
    result = run(LOAD, tmp_path, folder if source == "saved" else ROOT, tmp_path / "again")
    assert result["config"] == "AuLlavaConfig"
    assert result["model"] == "AuLlavaForConditionalGeneration"
    assert result["processor"] == "AuLlavaProcessor"
    assert isinstance(result["text"], str)
    (face,) = result["faces"]
    assert face["box"] is None and face["task"] == "intensity"
    assert list(face["action_units"]) == ["AU6", "AU12"]
    # A folder written by `pipe.save_pretrained` answers the same.
    assert run(AGAIN, tmp_path, tmp_path / "again")["faces"] == result["faces"]


def test_a_saved_folder_holds_code_weights_and_no_pickle(folder):
    names = {path.name for path in Path(folder).iterdir()}
    assert {
        "action_units.py",
        "answers_au_llava.py",
        "chat_template.jinja",
        "config.json",
        "configuration_au_llava.py",
        "evidence_au_llava.py",
        "face_alignment.py",
        "decision.json",
        "decision_template.jinja",
        "generation_config.json",
        "grammar_au_llava.py",
        "model.safetensors",
        "modeling_au_llava.py",
        "pipeline_au_llava.py",
        "processing_au_llava.py",
        "processor_config.json",
        "readout_au_llava.py",
        "recognition_au_llava.py",
        "templates_au_llava.py",
        "tokenizer.json",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_loading_a_missing_or_wrong_folder_is_one_clear_error(tmp_path):
    from transformers import BertConfig, pipeline

    from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration

    with pytest.raises(OSError, match="nowhere"):
        AuLlavaForConditionalGeneration.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    for kind in (AuLlavaConfig, AuLlavaForConditionalGeneration):
        with pytest.raises(OSError, match=r"empty holds no config\.json; give a folder that save_pretrained wrote"):
            kind.from_pretrained(tmp_path / "empty")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert: its config.json says model_type 'bert', not 'au_llava'; give an AU-L"):
        AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "bert")
    with pytest.raises((OSError, ValueError), match=r"nowhere|config\.json"):
        pipeline("facial-action-units", model=str(tmp_path / "nowhere"), trust_remote_code=True)


def test_hub_files_import_only_what_every_user_has():
    import ast

    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
    for name in ("action_units", "configuration_au_llava", "face_alignment", "modeling_au_llava", "pipeline_au_llava",
                 "processing_au_llava", "readout_au_llava", "recognition_au_llava", "grammar_au_llava",
                 "templates_au_llava", "answers_au_llava", "evidence_au_llava", "backbones_au_llava"):  # fmt: skip
        source = (ROOT / f"{name}.py").read_text()
        for node in ast.parse(source).body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2 and (node.level == 0 or "." not in node.module), f"{name}: {ast.unparse(node)}"
                modules = [] if node.level else [node.module]
            assert {module.split(".")[0] for module in modules} <= allowed, name
    for name in ("configuration_au_llava", "modeling_au_llava", "processing_au_llava"):
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 300, name
