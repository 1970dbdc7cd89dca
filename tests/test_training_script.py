"""train_sft.py as people run it: from a recipe to a folder, through the real parser, on tiny weights."""

import copy
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import RepositoryNotFoundError, httpx
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import evaluate_au
import push_to_hub
import train_sft
from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.adapters import assemble, check_push, ever_seen, make_card, never_seen, trained_on
from au_llava.arguments import LORA_TARGETS, read_arguments
from au_llava.datasets_scripts.instructions import FEATURES, instruct, make_row
from au_llava.datasets_scripts.sources import Source, draw_people
from au_llava.trainer import check_space, full_disk_told, is_disk_full, last_checkpoint
from evaluation.data import read_set


# A recipe in small: tiny weights, drawn pictures of eight people, everything seeded.
RECIPE = """
held_out: 0.25
lora: both
output_dir: {folder}/run
num_train_epochs: 2
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
gradient_checkpointing: false
learning_rate: 0.01
bf16: false
use_cpu: true
logging_steps: 1
eval_strategy: steps
eval_steps: 2
save_steps: 2
save_total_limit: 2
report_to: none
disable_tqdm: true
"""


def draw_rows(count=12, **changes):
    """Pictures whose brightness tells the labels, of six people."""
    rows = []
    for number in range(count):
        shade = Image.effect_noise((224, 224), 20).point(lambda v, n=number: v // 2 + 100 * (n % 2)).convert("RGB")
        labels = {"AU1": float(number % 2), "AU6": float("nan"), "AU12": 1.0}
        origin = {"dataset": "drawn", "subject": f"p{number % 6}", "sequence": "s", "frame": number}
        rows.append(make_row(shade, labels, "detection", instruct(labels, "detection"), **origin) | changes)
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer, processor):
    """An AU-LLaVA of two layers a tower, in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(copy.deepcopy(tokenizer)).save_pretrained(folder)
    calibrated = copy.deepcopy(processor)
    calibrated.calibration = {"detection": {"temperature": 2.0, "thresholds": {"AU1": 0.1}}}
    calibrated.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, tiny):
    data = tmp_path / "data"
    data.mkdir()
    draw_rows().to_parquet(data / "train-00000.parquet")
    text = RECIPE.format(folder=tmp_path) + f"model: {tiny}\ntrain_data: ['{data}']\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def run(recipe, monkeypatch):
    """Run the script in this process, with more options on its command line."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["train_sft.py", "--config", str(recipe), *map(str, options)])
        train_sft.main()
        return recipe.parent / "run"

    return run


def losses(folder: Path) -> dict[int, float]:
    """Training losses by step, as the last checkpoint remembers them."""
    history = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def crops(processor, count=2):
    pictures = [Image.linear_gradient("L").rotate(90 * number).resize((224, 224)) for number in range(count)]
    return processor(images=pictures, task="detection", action_units="AU1,AU12")


def test_a_run_says_what_it_does_and_leaves_an_adapter_that_merges_exactly(run, capsys, tiny):
    folder = run("--merge", "--load_best_model_at_end", "--metric_for_best_model", "score", "--max_steps", 4)
    told = capsys.readouterr().out
    assert "multi_modal_projector 1,056 / 1,056" in told and "together " in told
    assert "Samples: drawn detection, train: 8" in told and "Samples: drawn detection, validation: 4" in told
    assert "Steps: 4 of 2 samples on 1 process(es)." in told
    assert f"Saved an adapter to {folder}" in told and f'model="{folder}-merged"' in told

    state = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())
    answered = {entry["step"]: entry["eval_score"] for entry in state["log_history"] if "eval_score" in entry}
    assert list(answered) == [2, 4] and state["best_metric"] == max(answered.values())
    assert all(0 <= entry["eval_detection_f1"] <= 1 for entry in state["log_history"] if "eval_loss" in entry)

    # The adapter, the merged model and what was trained give the same logits.
    processor = AuLlavaProcessor.from_pretrained(f"{folder}-merged")
    inputs = crops(processor)
    with torch.no_grad():
        merged = AuLlavaForConditionalGeneration.from_pretrained(f"{folder}-merged").eval()(**inputs).logits
        adapted = AuLlavaForConditionalGeneration.from_pretrained(folder).eval()(**inputs).logits
        start = AuLlavaForConditionalGeneration.from_pretrained(tiny).eval()(**inputs).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    assert (start - merged).abs().max() > 1e-2
    assert processor.trained_lists == {"detection": [["AU1", "AU12"]]} and processor.free_tasks == []
    assert processor.calibration == {}  # the base's

    for place in (folder, Path(f"{folder}-merged")):
        names = {path.name for path in place.iterdir() if path.is_file()}
        assert {"README.md", "action_units.py", "modeling_au_llava.py", "pipeline_au_llava.py"} <= names
        assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))} - {"training_args.bin"}
        card = (place / "README.md").read_text()
        assert "num_train_epochs: 2" in card and "| drawn | detection | train | 8 |" in card
        assert "transformers 5." in card and "python train_sft.py --config" in card
        assert f'AutoModel.from_pretrained("{place}"' in card and f"output_dir: {folder}\n" in card


LOAD = """
import json, sys
sys.modules["au_llava"] = None  # as on a machine where the package is not installed
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
crop = Image.linear_gradient("L").resize((224, 224))
inputs = processor(images=crop, task="detection", action_units="AU1,AU12")
answer = model.recognize(**inputs, grammar=processor.grammar("detection", "AU1,AU12"))
pipe = pipeline("facial-action-units", model=sys.argv[1], trust_remote_code=True)
units = pipe(crop, action_units="AU1,AU12", detector="none")[0]["action_units"]
print("RESULT" + json.dumps([answer.expected_values[0].tolist(), [unit["expected_value"] for unit in units.values()]]))
"""


def test_a_slash_at_the_end_of_output_dir_changes_nothing(run, tmp_path):
    run("--output_dir", f"{tmp_path}/mine/", "--max_steps", 1, "--eval_strategy", "no", "--merge")
    assert sorted(path.name for path in tmp_path.glob("*mine*")) == ["mine", "mine-merged"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_loads_in_a_fresh_process_elsewhere(run, tmp_path, dtype):
    folder = run("--max_steps", 2, "--dtype", dtype, "--bf16", dtype == "bfloat16")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answered, piped = json.loads(done.stdout.split("RESULT")[1])
    model, processor = (
        AuLlavaForConditionalGeneration.from_pretrained(folder),
        AuLlavaProcessor.from_pretrained(folder),
    )
    inputs = processor(images=Image.linear_gradient("L").resize((224, 224)), task="detection", action_units="AU1,AU12")
    here = model.eval().recognize(**inputs, grammar=processor.grammar("detection", "AU1,AU12"))
    np.testing.assert_allclose(answered, here.expected_values[0].tolist(), atol=1e-5)
    np.testing.assert_allclose(piped, answered, atol=1e-5)


class Stop(TrainerCallback):
    """Ends a run in the middle of a step, as a kill would, but within this process."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [(), pytest.param(("--shared_prefix", "--lora", "null"), marks=pytest.mark.slow)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(run, monkeypatch, options):
    """With all that is drawn: augmentation, order and parts of the questions, dropout; in the second epoch."""
    chance = ("--shuffle", "--subset", 0.5, "--lora_dropout", 0.2, "--limit", 8, "--eval_strategy", "no", *options)
    folder = run(*chance, "--held_out", 0, "--save_steps", 8)
    whole, weights = losses(folder), load_file(next(folder.glob("*model.safetensors")))
    assert len(whole) == 8
    processor = AuLlavaProcessor.from_pretrained(folder)
    assert processor.trained_lists == {"detection": [["AU1", "AU12"]]} and processor.free_tasks == ["detection"]
    folder.rename(folder.parent / "whole")

    create = train_sft.AnswerTrainer.__init__

    def stopped(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.add_callback(Stop(7))

    with monkeypatch.context() as patch:
        patch.setattr(train_sft.AnswerTrainer, "__init__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(*chance, "--held_out", 0, "--save_steps", 5)
    assert last_checkpoint(folder).endswith("-5")
    resumed = losses(run(*chance, "--held_out", 0, "--save_steps", 8, "--resume"))
    assert resumed.keys() == whole.keys()
    assert [round(value, 4) for value in resumed.values()] == [round(value, 4) for value in whole.values()]
    # A loss hardly tells of weights that were not restored; the weights do.
    torch.testing.assert_close(load_file(next(folder.glob("*model.safetensors"))), weights, atol=1e-5, rtol=0)


def test_a_run_that_is_done_stays_as_it_is(run):
    options = ("--max_steps", 2, "--lr_scheduler_type", "constant", "--eval_strategy", "no")
    weights = load_file(run(*options) / "adapter_model.safetensors")
    folder = run(*options, "--merge")
    assert last_checkpoint(folder).endswith("-2")
    torch.testing.assert_close(load_file(folder / "adapter_model.safetensors"), weights, atol=0, rtol=0)


def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(run):
    plain = ("--eval_strategy", "no", "--lr_scheduler_type", "linear", "--warmup_steps", 0)
    run("--max_steps", 2, "--learning_rate", 1e-2, *plain)
    folder = run("--max_steps", 4, "--learning_rate", 1e-4, *plain)
    history = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: float(entry["learning_rate"]) for entry in history if "learning_rate" in entry}
    # Linear: what a run of so many steps has at each step.
    assert rates == pytest.approx({1: 1e-2, 2: 5e-3, 3: 5e-5, 4: 2.5e-5}, rel=1e-3)
    run("--max_steps", 6, "--learning_rate", 1e-4, "--weight_decay", 0.5, *plain)
    groups = torch.load(Path(last_checkpoint(folder), "optimizer.pt"), weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}


@pytest.mark.parametrize("rows", [5, 7])
def test_a_last_batch_of_any_size_is_learnt_with_weights(run, recipe, rows):
    draw_rows(rows).to_parquet(recipe.parent / "data" / "train-00000.parquet")
    more = ("--held_out", 0, "--eval_strategy", "no", "--num_train_epochs", 1)
    folder = run(
        "--format_weight", 0.5, "--per_device_train_batch_size", 4, "--logging_steps", 1, *more, "--save_steps", 1
    )
    assert list(losses(folder)) == [1, 2]


def test_validation_asks_as_users_ask(run, monkeypatch):
    asked = []
    recognize = AuLlavaForConditionalGeneration.recognize

    def noted(self, *args, **how):
        asked.append((how["grammar"].count, how["mirror"]))
        return recognize(self, *args, **how)

    monkeypatch.setattr(AuLlavaForConditionalGeneration, "recognize", noted)
    run("--max_steps", 2)
    assert set(asked) == {(2, False)}  # AU6 is unknown everywhere, and so in no list


def test_a_grey_picture_is_augmented_as_any_other(run, recipe):
    grey = draw_rows().map(lambda row: {"images": [row["images"][0].convert("L")]})
    grey.to_parquet(recipe.parent / "data" / "train-00000.parquet")
    assert len(losses(run("--max_steps", 2, "--augment", "true"))) == 2


def test_the_best_checkpoint_of_a_full_training_comes_back_whole(run):
    """The answers of tiny weights score alike, so the first checkpoint is the best, and more steps follow it."""
    best = ("--load_best_model_at_end", "--metric_for_best_model", "score", "--learning_rate", 1e-4, "--max_steps", 8)
    folder = run("--lora", "null", *best)
    state = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"])
    assert chosen.name != "checkpoint-8"
    kept, last = (load_file(place / "model.safetensors") for place in (chosen, folder / "checkpoint-8"))
    ended = load_file(folder / "model.safetensors")
    assert all(torch.equal(ended[name], weight) for name, weight in kept.items())
    assert any("attention.attention.query" in name and not torch.equal(last[name], kept[name]) for name in kept)


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    for step, state in ((4, '{"epoch": 0.5}'), (10, '{"epoch": 0.'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"cut off")
        if state:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_full_disk_is_one_clear_message_and_the_run_goes_on_afterwards(run, tmp_path, monkeypatch):
    full = tmp_path / "run" / "checkpoint-4"
    full.mkdir(parents=True)
    (full / "scheduler.pt").symlink_to("/dev/full")  # a device that says "no space left" to every writer
    with pytest.raises(OSError, match="The disk is full. Free some space") as caught:
        run("--max_steps", 4)
    assert is_disk_full(caught.value)
    assert last_checkpoint(tmp_path / "run").endswith("-2")

    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        run("--no_resume")
    (full / "scheduler.pt").unlink()
    # What is left to do is done, and then, with the same checkpoints, what a full disk kept from being merged.
    run("--max_steps", 4)
    assert (run("--max_steps", 4, "--merge").parent / "run-merged" / "model.safetensors").is_file()
    usage = shutil.disk_usage(full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    with pytest.raises(OSError, match="only 0.0 GB are free"):
        run("--max_steps", 400, "--save_total_limit", 50)


def test_a_run_goes_on_with_what_it_was_begun_with(run, tmp_path, tiny):
    few = ("--max_steps", 2, "--eval_strategy", "no")
    run(*few)
    for option, value in (("--soft_digits", 0.1), ("--model", shutil.copytree(tiny, tmp_path / "other"))):
        with pytest.raises(
            ValueError, match=f"run was begun with {option[2:]} .*, and now it is .*another output_dir"
        ):
            run(*few, option, value)
    data = tmp_path / "data" / "train-00000.parquet"
    draw_rows(labels=[0.0, 1.0, 0.0]).to_parquet(data)
    with pytest.raises(ValueError, match="run was begun with train_data's rows"):
        run(*few)
    draw_rows().to_parquet(data)
    run("--max_steps", 3, "--eval_limit", 4, "--merge")


def test_a_recipe_s_eval_limit_of_null_asks_all(recipe):
    for limit, expected in (("1", 1), ("null", 4)):  # two people are held out, with two pictures each
        recipe.write_text(recipe.read_text() + f"eval_limit: {limit}\n")
        arguments, _ = read_arguments(["--config", str(recipe)])
        assert len(train_sft.read_rows(arguments)[1]) == expected


def test_sources_mix_by_weight(recipe, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    draw_rows(4, dataset="other").to_parquet(few / "train-0.parquet")
    text = recipe.read_text().replace(f"{tmp_path / 'data'}'", f"{tmp_path / 'data'}', '{few}'") + "held_out: 0\n"
    for weights, expected in (("[]", {"drawn": 12, "other": 4}), ("[1, 3]", {"drawn": 12, "other": 36})):
        recipe.write_text(f"{text}weights: {weights}\n")
        rows, *_ = train_sft.read_rows(read_arguments(["--config", str(recipe)])[0])
        counts = {name: rows["dataset"][:].count(name) for name in expected}
        assert all(expected[name] / 2 <= counts[name] <= 2 * expected[name] for name in expected), counts
        assert set(zip(rows["dataset"][:], rows["frame"][:], strict=True)) >= {("drawn", 11), ("other", 3)}
    for wrong, told in (("[1]", r"weights \[1.*\] for 2 data"), ("[1, -1]", "positive weight"), ("2", "list of num")):
        recipe.write_text(f"{text}weights: {wrong}\n")
        with pytest.raises(ValueError, match=told):
            train_sft.read_rows(read_arguments(["--config", str(recipe)])[0])


def test_a_base_of_other_parts_is_refused(tmp_path, tokenizer, processor):
    vision, language, base = tmp_path / "vision", tmp_path / "language", tmp_path / "run-base"
    tiny_model(copy.deepcopy(tokenizer)).model.vision_tower.save_pretrained(vision)
    processor.image_processor.save_pretrained(vision)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(language)
    tokenizer.save_pretrained(language)
    assemble(base, str(vision), str(language))
    assemble(base, str(vision), str(language))
    with pytest.raises(ValueError, match="run-base was begun with prompt_layout 'image_first', and now it is 'text_"):
        assemble(base, str(vision), str(language), prompt_layout="text_first")
    with pytest.raises(ValueError, match="run-base was begun with language"):
        assemble(base, str(vision), "lmsys/vicuna-7b-v1.5")


def write_text(path):
    with path.open("w") as file:
        file.write("much")


def save_tensor(path):
    torch.save(torch.zeros(9), path)


@pytest.mark.parametrize("write", [write_text, save_tensor])
def test_every_writer_tells_alike_of_a_full_disk(write):
    with pytest.raises(OSError, match="The disk is full.*runs/mine"), full_disk_told("runs/mine"):
        write(Path("/dev/full"))
    with pytest.raises(KeyError), full_disk_told("runs/mine"):
        raise KeyError("not about disks")


@pytest.mark.parametrize(
    ("settings", "checkpoints"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 5}, 5),
        ({"save_steps": 30}, 4),  # after 30, 60, 90 and 100 steps
        ({"save_steps": 0.2}, 5),
        ({"save_steps": 10, "save_total_limit": 2}, 3),
        ({"save_steps": 10, "save_total_limit": 1}, 2),
        ({"save_steps": 10, "save_total_limit": 1, "load_best_model_at_end": True, "eval_strategy": "steps",
          "eval_steps": 10}, 3),
    ],
)  # fmt: skip
def test_room_is_asked_for_all_that_will_lie_there_at_a_time(tmp_path, monkeypatch, settings, checkpoints):
    training = TrainingArguments(str(tmp_path / "run"), use_cpu=True, **settings)
    numbers = {"steps": 100, "weights": 1000, "learnt": 100, "merged": 7}
    needed = 4 * (checkpoints * 1200 + 1000) + 7
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    check_space(training, **numbers)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 10))
    with pytest.raises(OSError, match="are free for it"):
        check_space(training, **numbers)
    (tmp_path / "run" / "checkpoint-30").mkdir()
    (tmp_path / "run" / "checkpoint-30" / "model.safetensors").write_bytes(bytes(10))
    check_space(training, **numbers)  # a resumed run writes over what it left


def test_a_loss_that_is_no_number_ends_the_run(run, tmp_path, monkeypatch):
    compute, steps = train_sft.AnswerTrainer.compute_loss, []

    def poisoned(self, *args, **kwargs):
        steps.append(1)
        return compute(self, *args, **kwargs) * (float("nan") if len(steps) == 4 else 1)

    monkeypatch.setattr(train_sft.AnswerTrainer, "compute_loss", poisoned)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 4"):
        run("--eval_strategy", "no", "--held_out", 0)
    saved = load_file(Path(last_checkpoint(tmp_path / "run"), "adapter_model.safetensors"))
    assert all(weight.isfinite().all() for weight in saved.values())


def test_rows_that_cannot_be_trained_on_are_refused_before_training(run, recipe):
    data, rows = recipe.parent / "data" / "train-00000.parquet", draw_rows(2)
    rows.remove_columns("labels").to_parquet(data)
    with pytest.raises(ValueError, match="data: no column labels; there are: images, prompt"):
        run()
    draw_rows(2, labels=[0.0, 1.0, 9.0]).to_parquet(data)
    with pytest.raises(ValueError, match=r"AU12=9.0, but detection takes 0 .* or 1 .*, and NaN for unknown"):
        run()
    draw_rows(2, labels=[0.0, 1.0, 0.5]).to_parquet(data)
    with pytest.raises(ValueError, match=r"AU12=0.5, but detection takes 0"):
        run()
    for labels, codes in (([math.nan] * 3, ["AU1", "AU6", "AU12"]), ([0.0, 1.0, 1.0], ["AU1", "AU1", "AU12"])):
        draw_rows(2, labels=labels, action_units=codes).to_parquet(data)
        with pytest.raises(ValueError, match="give each unit once, and leave out rows of which no label is known"):
            run()
    draw_rows(2, action_units=["au1", "AU6", "AU99"]).to_parquet(data)
    with pytest.raises(ValueError, match="data: unknown Action Unit 'au1', 'AU99'; accepted: AU1, "):
        run()
    data.unlink()
    with pytest.raises(FileNotFoundError, match="No Parquet shards in"):
        run()


def test_rows_come_from_the_split_that_is_asked_for(tmp_path):
    draw_rows(4).to_parquet(tmp_path / "first.parquet")
    [rows] = Source(str(tmp_path)).rows()
    assert len(rows) == 4
    draw_rows(2).to_parquet(tmp_path / "test-00000.parquet")
    with pytest.raises(FileNotFoundError, match="split 'train'"):
        Source(str(tmp_path)).rows()
    (tmp_path / "first.parquet").rename(tmp_path / "train-00000.parquet")
    assert [len(Source(f"{tmp_path}{split}").rows("validation")[0]) for split in ("?split=test", "?split=train")] == [
        2,
        4,
    ]
    with pytest.raises(FileNotFoundError, match="split 'validation'"):  # never the training rows
        Source(str(tmp_path)).rows("validation")
    synthetic = Source("synthetic:?config_name=detection")
    with pytest.raises(
        ValueError, match=r"no rows in the split 'validation'; it has: test \(300 rows\). Name another"
    ):
        synthetic.rows("validation")
    for name in "ab":
        Image.new("RGB", (224, 224)).save(tmp_path / f"{name}.png")
    (tmp_path / "own.csv").write_text("image,subject,AU12\na.png,anna,1\nb.png,ben,0\n")
    own = Source(f"csv:{tmp_path / 'own.csv'}?crops_dir={tmp_path / 'crops'}&detector=none")
    with pytest.raises(ValueError, match="Leave eval_data out, and keep some of the training people .* with held_out"):
        own.rows("validation")
    (tmp_path / "one.csv").write_text("image,subject,AU12\na.png,anna,1\n")
    with pytest.raises(ValueError, match=r"test \(0 rows\)\. Give the csv pictures of people"):
        Source(f"csv:{tmp_path / 'one.csv'}?crops_dir={tmp_path / 'one'}&detector=none").rows("test")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("detection", "'detection' is no question; give task:preset or task:codes, as in detection:bp4d"),
        ("smiles:bp4d", "with one of the tasks detection, intensity_level, intensity"),
        ("detection:AU3", "Unknown Action Unit 'AU3'"),
        ("detection:FEAFA9", "The synthetic faces have no detection label for FEAFA9; they have: AU1, "),
    ],
)
def test_a_question_that_rendered_faces_cannot_be_asked_is_named(question, message):
    with pytest.raises(ValueError, match=message):
        Source("synthetic:?split=test").rows(questions=[question])


def test_rows_of_any_form_become_rows_to_train_on(tmp_path):
    """Without FEATURES a path is a text, a frame is of 64 bits, and there may be more columns."""
    Image.new("L", (224, 224)).save(tmp_path / "face.png")
    labels = {"AU1": 1.0, "AU12": float("nan")}
    origin = {"dataset": "mine", "subject": "anna", "sequence": "a", "frame": 1, "camera": "left"}
    row = make_row(str(tmp_path / "face.png"), labels, "detection", instruct(labels, "detection"), **origin)
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    [rows] = Source(str(tmp_path)).rows()
    assert rows.features == FEATURES and rows[0]["images"][0].size == (224, 224)


def test_a_processor_of_another_model_is_refused(run, tmp_path, tiny, processor):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=28)
    own.save_pretrained(other)
    with pytest.raises(ValueError, match=r"its processor writes 64 image tokens .* expects 16"):
        run("--model", other)


def test_who_was_held_out_is_in_no_source_and_remembered(run, tmp_path):
    [person] = draw_people([draw_rows()], 0.2)["drawn"]
    (tmp_path / "more").mkdir()
    draw_rows(4, subject=person).to_parquet(tmp_path / "more" / "train-0.parquet")
    few = ("--max_steps", 1, "--eval_strategy", "no", "--merge", "--save_steps", 1)
    folder = run("--train_data", tmp_path / "data", tmp_path / "more", "--held_out", 0.2, *few)
    card = (folder / "README.md").read_text()
    assert "| drawn | detection | train | 10 |" in card and "| drawn | detection | validation | 6 |" in card
    for place in (folder, tmp_path / "run-merged", folder / "checkpoint-1"):
        assert json.loads((place / "held_out.json").read_text()) == {"drawn": [person]}
        learnt = json.loads((place / "trained_on.json").read_text())["drawn"]
        assert person not in learnt and {person, *learnt} == set(draw_rows()["subject"])


def test_who_is_held_out_of_disfa_is_not_trained_on_in_feafa():
    """Part B of FEAFA is of DISFA's videos; 4 of these 18 people are drawn in the one, and 15 of 75 in the other."""
    people = {"disfa": [f"SN{n:03d}" for n in range(18)]}
    people["feafa"] = people["disfa"][3:] + [f"PV{n:03d}" for n in range(60)]
    sets = {name: Dataset.from_dict({"dataset": [name] * len(some), "subject": some}) for name, some in people.items()}
    held_out = draw_people(sets.values(), 0.2)
    for name, rows in sets.items():
        assert set(held_out[name]) == {*held_out["disfa"], *held_out["feafa"]} & {*people[name]}
        assert {*draw_people([rows], 0.2)[name]} <= {*held_out[name]}  # whom evaluate_au.py --calibrate fits to


def test_a_model_that_is_trained_on_forgets_nobody_it_has_seen(tmp_path):
    (tmp_path / "README.md").write_text(make_card("base", [], False, ["bp4d", "disfa", "feafa"], None, "", [], ""))
    (tmp_path / "held_out.json").write_text('{"bp4d": ["F001", "M001"], "disfa": ["SN001"]}')
    trained = {("bp4d", "M001"), ("bp4d", "F002"), ("own", "anna"), ("feafa", "PV001")}
    drawn = {"bp4d": ["F003"], "own": ["ben"], "feafa": ["PV002"]}
    # The base was trained on F003, and who of FEAFA was held out of it is not known.
    seen = {"bp4d": ["F001"], "disfa": ["SN001"], "feafa": [], "own": ["ben"]}
    assert never_seen(str(tmp_path), trained, drawn) == seen
    assert ever_seen(str(tmp_path), {("bp4d", "F002"), ("bp4d", "F001")}) == {"bp4d": ["F001", "F002"]}
    (tmp_path / "trained_on.json").write_text('{"bp4d": ["F002", "M003"], "disfa": ["SN002"]}')
    learnt = {"bp4d": ["F002", "M001", "M003"], "disfa": ["SN002"], "feafa": ["PV001"], "own": ["anna"]}
    assert ever_seen(str(tmp_path), trained) == learnt
    # Now it is known that the base has not seen F003; of FEAFA nobody was noted as held out.
    assert never_seen(str(tmp_path), trained, drawn) == seen | {"bp4d": ["F001", "F003"]}


def test_options_that_contradict_each_other_are_refused(run):
    with pytest.raises(ValueError, match="set dataloader_persistent_workers to false"):
        run("--dataloader_persistent_workers", "--dataloader_num_workers", 1)
    with pytest.raises(ValueError, match="no one to validate on: give held_out or eval_data"):
        run("--held_out", 0)
    with pytest.raises(ValueError, match="Unknown lora 'vision'; accepted: both, encoder, llm"):
        run("--lora", "vision")
    with pytest.raises(ValueError, match="freeze is for training without LoRA"):
        run("--freeze", "vision_tower")
    with pytest.raises(ValueError, match="loss_type is 'dft', and would do nothing or harm: the loss is a cross"):
        run("--loss_type", "dft")
    with pytest.raises(ValueError, match="router_aux_loss_coef is 0.01, and would do nothing or harm"):
        run("--router_aux_loss_coef", 0.01)
    with pytest.raises(ValueError, match=r"freeze names 'head', .* its parts: .*, language_model, lm_head"):
        run("--lora", "null", "--freeze", "head")
    every = ("vision_tower", "language_model", "multi_modal_projector")
    with pytest.raises(ValueError, match="freeze names vision_tower, .* leaves nothing to train; name less"):
        run("--lora", "null", "--freeze", *every)
    with pytest.raises(ValueError, match="lora encoder finds no self-attention in the vision_tower of .*; give other"):
        run("--lora", "encoder", "--model", ROOT)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("held_out", -0.5, "held_out is -0.5; give a share, 0 to 1"),
        ("subset", 2, "subset is 2.0; give a share"),
        ("limit", 0, "limit is 0; give 1 or more"),
        ("resume_from_checkpoint", "x", "a run goes on from its output_dir by itself"),
        ("save_only_model", "true", "no run goes on from a checkpoint without its optimizer"),
        ("data_seed", 3, "seed says in what order rows are drawn"),
        ("label_smoothing_factor", 0.1, "soft_digits spreads labels"),
        ("completion_only_loss", "false", "the loss is on answers alone"),
        ("train_sampling_strategy", "sequential", "rows are drawn in random order"),
        ("pad_to_multiple_of", 64, "as long as their longest"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(run, option, value, told):
    with pytest.raises(ValueError, match=told):
        run(f"--{option}", value)


def test_what_is_frozen_stays_and_what_is_trained_is_told(run, tiny, capsys):
    folder = run("--lora", "null", "--freeze", "vision_tower", "language_model", "--eval_strategy", "no")
    told = capsys.readouterr().out
    assert re.search(r"language_model 0 / [\d,]+; lm_head 0 / [\d,]+; together ([\d,]+) trained", told)
    before, after = (
        AuLlavaForConditionalGeneration.from_pretrained(name).state_dict() for name in (tiny, last_checkpoint(folder))
    )
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}


def test_stored_in_16_bits_weights_are_trained_in_32(run, tiny, tmp_path):
    model = AuLlavaForConditionalGeneration.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AuLlavaProcessor.from_pretrained(tiny).save_pretrained(tmp_path / "half")
    folder = run("--model", tmp_path / "half", "--lora", "null", "--bf16", "false", "--eval_strategy", "no")
    dtypes = {w.dtype for w in load_file(Path(last_checkpoint(folder), "model.safetensors")).values()}
    assert dtypes == {torch.float32}


def test_an_encoder_of_larger_pictures_gets_a_processor_that_fits(tmp_path, tokenizer):
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=336, patch_size=56
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(
        tmp_path / "vision"
    )
    text = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    assemble(tmp_path / "base", str(tmp_path / "vision"), str(tmp_path / "language"))
    model = AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    processor = AuLlavaProcessor.from_pretrained(tmp_path / "base")
    inputs = processor(images=Image.new("RGB", (224, 224)), task="detection", action_units="AU1")
    assert processor.image_tokens == model.config.image_seq_length == 36 and model(**inputs).logits.shape[0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_data: [a\n", "The recipe cannot be read"),
        ("just words", "must contain a YAML mapping"),
        ("train_data: data/mine\noutput_dir: x", "train_data is 'data/mine'; give a list"),
        ("train_data: [a]\noutput_dir: x\nlearnin_rate: 1", "learnin_rate"),
    ],
)
def test_a_broken_recipe_is_one_clear_message(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_arguments(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--bf16", "false"])


def test_a_recipe_behind_an_equals_sign_is_told_how_to_be_written():
    with pytest.raises(ValueError, match="=recipes/smoke.yaml is not understood; write --config recipes/smoke.yaml"):
        read_arguments(["--config=recipes/smoke.yaml"])


def test_a_share_that_is_null_in_a_recipe_is_none_of_them(recipe):
    recipe.write_text(recipe.read_text() + "subset: null\nrare_weight: null\n")
    arguments, _ = read_arguments(["--config", str(recipe)])
    assert (arguments.subset, arguments.rare_weight) == (0, 0)


def test_a_token_never_comes_into_a_card(run, recipe, monkeypatch):
    plain = recipe.read_text()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    recipe.write_text(plain + "env: {HF_TOKEN: hf_secret}\n")
    with pytest.raises(ValueError, match="The recipe holds your Hub token"):
        run()
    recipe.write_text(plain)
    with pytest.raises(ValueError, match="use `hf auth login` or HF_TOKEN") as told:
        read_arguments(["--config", str(recipe), "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(told.value)
    recipe.write_text(recipe.read_text() + "hub_token: hf_secret\n")
    with pytest.raises(ValueError, match="hub_token would be written into the model card"):
        read_arguments(["--config", str(recipe)])
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--train_data", "csv:a.csv?task=detection&detector=none"])
    command = "python train_sft.py --train_data 'csv:a.csv?task=detection&detector=none'"
    assert command in make_card("run", [], False, [], None, "", [], "")


def parse(name, *options):
    """A recipe, read as the script reads it."""
    # The machine of the tests need not have what the recipe is for.
    off = ["--use_cpu", "true", "--bf16", "false"]
    return read_arguments(["--config", str(ROOT / "recipes" / f"{name}.yaml"), *off, *options])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_parses_and_says_what_it_is_for(name):
    arguments, training = parse(name)
    assert (ROOT / "recipes" / f"{name}.yaml").read_text().startswith("# ")
    assert arguments.train_data and training.output_dir.startswith("runs/")
    assert arguments.lora in (None, *LORA_TARGETS)
    assert not (arguments.shared_prefix and training.gradient_checkpointing)
    assert bool(arguments.eval_data or arguments.held_out) == (training.eval_strategy != "no")
    if training.load_best_model_at_end:
        assert training.metric_for_best_model == "score" and training.greater_is_better


@pytest.mark.parametrize("metric", ["intensity_level_mae", "eval_intensity_mae"])
def test_the_best_checkpoint_by_an_error_is_the_one_with_the_least(metric):
    assert parse("smoke", "--metric_for_best_model", metric)[1].greater_is_better is False


@pytest.mark.parametrize("name", ["paper_bp4d", "paper_disfa", "paper_feafa"])
def test_the_papers_recipes_hold_the_papers_settings(name):
    arguments, training = parse(name)
    assert (arguments.vision, arguments.language) == ("facebook/dinov2-large", "lmsys/vicuna-7b-v1.5")
    assert (arguments.lora, arguments.lora_r) == ("both", 8)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 16)
    assert (training.num_train_epochs, training.learning_rate, training.weight_decay) == (5, 5e-4, 0.05)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.03)
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    for left_open in ("lora_alpha: 16", "lora_dropout: 0.05", "optim: adamw_torch", "max_grad_norm: 1.0"):
        assert f"{left_open}  # ours" in text
    # Table I's ablation
    assert [parse(name, "--lora", towers)[0].lora for towers in ("encoder", "llm")] == ["encoder", "llm"]


def test_the_smoke_recipe_runs(run, monkeypatch, tmp_path):
    """The repository's own recipe and checkpoint, a few samples of each question."""
    monkeypatch.chdir(ROOT)
    few = ("--limit", 2, "--eval_limit", 1, "--max_steps", 1, "--eval_steps", 1, "--save_steps", 1)
    folder = tmp_path / "smoke"
    options = ["--config", "recipes/smoke.yaml", "--output_dir", folder, *few, "--per_device_train_batch_size", 2]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, options)])
    train_sft.main()
    state = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())
    (answered,) = [entry for entry in state["log_history"] if "eval_score" in entry]
    assert {"eval_detection_f1", "eval_intensity_level_mae", "eval_intensity_mae", "eval_loss"} <= answered.keys()


def start(command, folder, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


KILL = """
import os, signal
import train_sft

step, steps = SFTTrainer.training_step, []

def killed(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    steps.append(loss)
    if len(steps) == 10:
        os.kill(os.getpid(), signal.SIGKILL)  # the gradients are there, and the optimizer has not stepped
    return loss

SFTTrainer.training_step = killed
train_sft.main()
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(run, recipe, tmp_path):
    chance = ["--shuffle", "--subset", "0.5", "--lora_dropout", "0.2", "--num_train_epochs", "3"]
    whole = losses(run(*chance, "--output_dir", tmp_path / "whole") and tmp_path / "whole")
    killed = start(["-c", KILL, "--config", recipe, *chance], tmp_path)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert last_checkpoint(tmp_path / "run").endswith("-8")
    done = start(["train_sft.py", "--config", recipe, *chance, "--resume"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Going on from {tmp_path / 'run'}/checkpoint-8." in done.stdout
    resumed = losses(tmp_path / "run")
    assert len(whole) == 12 and resumed.keys() == whole.keys()
    assert [round(value, 4) for value in resumed.values()] == [round(value, 4) for value in whole.values()]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(run, recipe, tmp_path):
    plain = ["--augment", "false", "--lora_dropout", "0"]
    one = run(*plain, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one") and tmp_path / "one"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train_sft.py"]
    done = start([*command, "--config", recipe, *plain], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Steps: 4 of 4 samples on 2 process(es)." in done.stdout
    two = tmp_path / "run"
    assert losses(one).keys() == losses(two).keys()
    np.testing.assert_allclose(list(losses(one).values()), list(losses(two).values()), atol=1e-4)
    histories = [
        [entry for entry in json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())["log_history"]
         if "eval_score" in entry] for folder in (one, two)
    ]  # fmt: skip
    assert len(histories[0]) == 2
    for single, double in zip(*histories, strict=True):
        assert single["eval_detection_f1"] == double["eval_detection_f1"]


def test_what_may_go_to_the_hub():
    check_push(["drawn"], public=True, licence=None, base=None)
    check_push(["bp4d"], public=False, licence=None, base="me/base")
    check_push(["bp4d"], public=True, licence="BP4D agreement, consent of 1 May 2026", base=None)
    with pytest.raises(ValueError, match=r"trained on BP4D, FEAFA .* --public_licence"):
        check_push(["bp4d", "feafa", "own"], public=True, licence=None, base=None)


def test_a_card_written_by_hand_names_its_data_sets_too(tmp_path):
    for text in ("bp4d", "BP4D", "[own, BP4D]"):
        (tmp_path / "README.md").write_text(f"---\ndatasets: {text}\n---\n# A model\n")
        with pytest.raises(ValueError, match="trained on BP4D fall under"):
            check_push(trained_on([], str(tmp_path)), public=True, licence=None, base=None)


def test_a_push_is_refused_before_the_training(run, recipe, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"{tiny} is a folder that nobody else has"):
        run("--push_to_hub", "--hub_model_id", "me/tiny")
    draw_rows(dataset="disfa").to_parquet(recipe.parent / "data" / "train-00000.parquet")
    with pytest.raises(ValueError, match="trained on DISFA"):
        run("--push_to_hub", "--hub_model_id", "me/tiny", "--merge", "--hub_private_repo", "false")
    # What the weights have seen goes with them, whatever they are trained on next.
    draw_rows().to_parquet(recipe.parent / "data" / "train-00000.parquet")
    seen = tmp_path / "seen"
    shutil.copytree(tiny, seen)
    (seen / "README.md").write_text(make_card("seen", [], False, ["disfa"], None, "", [], ""))
    public = ("--push_to_hub", "--hub_model_id", "me/tiny", "--lora", "null", "--hub_private_repo", "false")
    with pytest.raises(ValueError, match="trained on DISFA"):
        run("--model", seen, *public)
    card = make_card("seen", [], False, ["disfa"], "consent of 1 May 2026", "", [], "")
    assert "license_name: research-only" in card and "Published under: consent of 1 May 2026." in card


def test_a_private_push_to_a_public_repository_is_refused_before_the_training(run, tmp_path, monkeypatch):
    names, public = [], SimpleNamespace(private=False)
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "model_info", lambda self, name: names.append(name) or public)
    with pytest.raises(ValueError, match=r"me/tiny is public; give .*--hub_private_repo false\) .*--hub_model_id"):
        run("--push_to_hub", "--hub_model_id", "me/tiny", "--merge")
    with pytest.raises(ValueError, match="me/run-merged is public"):  # where the result would go without a name
        run("--push_to_hub", "--merge")
    assert names == ["me/tiny", "me/run-merged"] and not list((tmp_path / "run").glob("*"))


def test_a_push_without_a_token_is_refused_before_the_training(run, tmp_path, monkeypatch):
    def unknown(self, name):  # what the Hub tells whom it does not know
        raise RepositoryNotFoundError("401", response=httpx.Response(401, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(HfApi, "model_info", unknown)
    monkeypatch.setattr(train_sft, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token of the Hub; run `hf auth login`"):
        run("--push_to_hub", "--hub_model_id", "me/tiny", "--merge")
    assert not list((tmp_path / "run").glob("*"))


def test_a_public_push_of_restricted_weights_has_the_licence_once_in_its_card(run, recipe, monkeypatch, capsys):
    rows, cards = draw_rows(dataset="disfa"), []
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(train_sft, "read_rows", lambda arguments: (rows, None, {}))

    def upload(stage, repo_id, public, revision, *rest):
        cards.append((stage / "README.md").read_text())
        return SimpleNamespace(commit_url=f"{repo_id}, {public}, {revision}")

    monkeypatch.setattr(push_to_hub, "ask", lambda stage: [])
    monkeypatch.setattr(push_to_hub, "upload", upload)
    few = ("--max_steps", 1, "--eval_strategy", "no", "--merge")
    source = ("--train_data", "disfa:data/disfa?config_name=fold{fold}", "--fold", 2)
    public = ("--push_to_hub", "--hub_model_id", "me/tiny", "--hub_private_repo", "false", "--hub_revision", "dev")
    folder = run(*few, *source, *public, "--public_licence", "consent of 1 May 2026")
    assert cards[0].count("Published under: consent of 1 May 2026.") == 1
    told = capsys.readouterr().out
    assert "Pushed: me/tiny, True, dev\n" in told
    score = f"python evaluate_au.py --model {folder}-merged --dataset disfa --data_dir data/disfa --fold 2 --output "
    assert f"Score it: {score}{folder}-merged-scores\n" in told


@pytest.mark.parametrize(
    ("train_data", "asked"),
    [
        (["bp4d:data/bp4d?config_name=fold3&naming=megraphau"], "bp4d data/bp4d?naming=megraphau 3"),
        (["synthetic:", "disfa:d?task=detection&threshold=2&action_units=disfa8&config_name=fold1"], "disfa d 1"),
        (["disfa:d?config_name=fold1&task=detection&threshold=3"], "disfa d paper 1"),
        (["disfa:d?config_name=fold1&task=detection&threshold=4"], ""),
        (["feafa:d?part=B&config_name=subject&fold=2"], "feafa d?part=B 2"),
        (["feafa:d?config_name=paper&seed=1"], "feafa d?seed=1 paper"),
        (["csv:my.csv?task=intensity&split=train&crops_dir=d/e"], "csv my.csv?task=intensity&crops_dir=d/e"),
        (["csv:my.csv"], "csv my.csv"),
        (["synthetic:data/synthetic", "data/rows"], ""),
        (["bp4d:d?config_name=fold1", "disfa:d?config_name=fold1"], ""),
        (["bp4d:d?config_name=fold1&task=intensity_level"], ""),
    ],
)
def test_a_model_is_scored_on_the_data_set_of_its_training(train_data, asked, monkeypatch):
    """By a command that evaluate_au.py takes, and with a place that it takes."""
    command = shlex.split(train_sft.score_command("runs/a b", train_data))
    assert command[:2] == ["python", "evaluate_au.py"]
    monkeypatch.setattr(sys, "argv", command[1:])
    args = evaluate_au.arguments()
    assert (args.model, args.output) == ("runs/a b", "runs/a b-scores")
    if not asked:
        assert args.dataset == "synthetic" and "--data_dir" not in command
        return
    said = [args.dataset, args.data_dir, "paper" * (args.protocol == "paper"), str(args.fold or "")]
    assert " ".join(filter(None, said)) == asked
    with pytest.raises((FileNotFoundError, ValueError), match=r"prepare the crops first|my.csv: cannot be read"):
        read_set(args.dataset, args.data_dir, protocol=args.protocol, fold=args.fold)


@pytest.mark.slow
def test_a_training_ends_on_the_hub(recipe, tmp_path):
    from hub_server import Hub

    with Hub() as hub:
        options = ["--config", recipe, "--max_steps", "2", "--merge", "--push_to_hub", "--hub_model_id", "me/tiny"]
        done = start(["train_sft.py", *options], tmp_path, **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        repository = hub.repositories["model", "me/tiny"]
        assert repository.private
        files = repository.find("main").files
        names, card = set(files), files["README.md"].content.decode()
    assert 'AutoModel.from_pretrained("me/tiny"' in card
    assert {"README.md", "config.json", "model.safetensors", "modeling_au_llava.py", "processor_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt"))}


@pytest.mark.slow
def test_four_bit_weights_train_and_merge(run, tokenizer, processor, tmp_path, monkeypatch):
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit
    base, found = tmp_path / "base", {}
    tiny_model(copy.deepcopy(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(base)  # blocks of 64
    processor.save_pretrained(base)
    create = train_sft.AnswerTrainer.__init__

    def look(self, *args, **kwargs):
        create(self, *args, **kwargs)
        for name, part in self.core().model.named_children():
            found[name] = sum(isinstance(module, quantised) for module in part.modules())

    monkeypatch.setattr(train_sft.AnswerTrainer, "__init__", look)
    half = ("--dtype", "bfloat16", "--bf16", "true")
    folder = run("--model", base, "--load_in_4bit", *half, "--max_steps", 4, "--merge")
    assert found == {"vision_tower": 0, "multi_modal_projector": 0, "language_model": 2 * 7}
    assert all(np.isfinite(list(losses(folder).values())))
    merged = AuLlavaForConditionalGeneration.from_pretrained(f"{folder}-merged")
    # The base's own weights, not the 4-bit ones
    assert merged.dtype == torch.float32 and not any(isinstance(module, quantised) for module in merged.modules())
