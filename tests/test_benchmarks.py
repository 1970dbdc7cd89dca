import argparse
import copy
import csv
import json

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from PIL import Image
from skimage.data import astronaut
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, LlamaConfig

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import PRESETS, TASKS
from au_llava.arguments import LORA_TARGETS
from benchmarks import memory, photographs, training


RECIPES = ROOT / "recipes/accelerate"


@pytest.fixture
def config():
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=28, use_mask_token=False
    )
    language = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    return AuLlavaConfig(vision_config=vision, text_config=language, image_token_index=3, image_seq_length=64)


def launch(name: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file."""
    args = launch_command_parser().parse_args(["--config_file", str(RECIPES / f"{name}.yaml"), "train_sft.py"])
    args.nondefault = []  # as on a command line without further options
    return _validate_launch_command(args)[0]


def test_accelerate_reads_every_launch_file():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == ["ddp", "fsdp2", "zero2", "zero3"]
    for path in RECIPES.glob("*.yaml"):
        args = launch(path.stem)
        kind = {"multi_gpu": args.multi_gpu, "use_fsdp": args.use_fsdp, "use_deepspeed": args.use_deepspeed}
        wanted = {"ddp": "multi_gpu", "fsdp2": "use_fsdp"}.get(path.stem, "use_deepspeed")
        assert [name for name, chosen in kind.items() if chosen] == [wanted]
        assert (args.mixed_precision, args.num_processes) == ("bf16", 8)
    assert [launch(name).zero_stage for name in ("zero2", "zero3")] == [2, 3]


def test_fsdp_shards_by_layers_that_the_paper_pair_has():
    environment = prepare_multi_gpu_env(launch("fsdp2"))
    assert environment["FSDP_VERSION"] == "2" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    with torch.device("meta"):
        model = AuLlavaForConditionalGeneration(AuLlavaConfig())
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")) <= kinds


def test_operations_are_those_of_the_textbook(config):
    batch, text, answer = 2, 30, 7
    length = text + 64 + answer
    wide, deep = 64, 3
    linear = 2 * batch * length * deep * (4 * wide**2 + 3 * wide * 160)
    scores = 4 * batch * deep * length**2 * wide
    eyes = 2 * batch * 65 * 2 * (4 * 32**2 + 2 * 32 * 128) + 4 * batch * 2 * 65**2 * 32
    ends = 2 * batch * 64 * 32 * wide + 2 * batch * answer * wide * 100  # projector, head on the answer
    patches = 2 * batch * 64 * 32 * 3 * 28**2  # pixels get no gradient, so twice and not three times
    expected = 3 * (linear + scores + eyes + ends) + 2 * patches
    assert training.flops(config, False, batch, text, answer, shared=False) == expected


def test_frozen_weights_take_no_gradient_and_shared_text_is_counted_once(config):
    full, lora = (training.flops(config, way, 4, 60, 7, shared=False) for way in (False, True))
    assert 0.6 < lora / full < 0.85
    shared = [training.flops(config, True, batch, 60, 7, shared=True) for batch in (1, 2, 3)]
    assert shared[1] - shared[0] == shared[2] - shared[1] < 0.65 * lora / 4


def test_the_meta_device_tells_real_memory(config, tmp_path):
    """The estimate, the same count on real tensors, and torch's own allocator agree."""
    shape = {"batch": 4, "text": 60, "answer": 7}
    estimate = memory.activations(memory.build(copy.deepcopy(config), False, False, torch.float32), **shape)
    real = copy.deepcopy(config)
    real._attn_implementation = "sizes_only"
    model = AuLlavaForConditionalGeneration(real).train()
    counted = memory.activations(model, **shape)
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        memory.step(model, **shape)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert estimate == pytest.approx(counted, rel=0.02)
    assert estimate == pytest.approx(peak, rel=0.1)


def test_checkpointing_and_a_shared_text_save_memory(config):
    shape = {"batch": 4, "text": 60, "answer": 7}
    plain = memory.activations(memory.build(copy.deepcopy(config), True, False), **shape)
    assert memory.activations(memory.build(copy.deepcopy(config), True, True), **shape) < 0.7 * plain
    assert memory.activations(memory.build(copy.deepcopy(config), True, False), **shape, shared=True) < 0.8 * plain


def test_what_the_papers_pair_holds_at_rest():
    sizes = memory.Sizes.of(memory.build(AuLlavaConfig(), True, False))
    assert sizes.learnt == 14_159_872 and sizes.frozen + sizes.learnt - 9_961_472 - 4_198_400 == 7_046_982_656
    held = {name: memory.held(sizes, name, "single", 1) for name in ("lora", "qlora")}
    assert 14e9 < held["lora"] < 14.5e9 and 4.5e9 < held["qlora"] < 5.5e9
    full = memory.Sizes.of(memory.build(AuLlavaConfig(), False, False))
    assert full.frozen == 0 and memory.held(full, "full", "single", 1) == 18 * 7_046_982_656
    shares = [memory.held(full, "full", name, 8) for name in ("fsdp2", "zero2", "zero3")]
    assert all(share < 32e9 for share in shares)


def test_training_is_measured(tmp_path):
    """The paper's way, with LoRA on bfloat16 weights and patches of 14 pixels, on a small model."""
    args = argparse.Namespace(pair="paper", batch=2, steps=2, workers=0, processor_time=False)
    config, processor = training.make_pair("tiny")
    with pytest.raises(ValueError, match="The processor writes 25 image tokens, and the model makes 64"):
        training.measure(training.WAYS[0], args, config, AuLlavaProcessor.from_pretrained(ROOT), "cpu", "", {})
    config.vision_config.patch_size, config.image_seq_length, processor.patch_size = 14, 256, 14
    way, counted = next(way for way in training.WAYS if way.name == "text first, shared prefix"), {}
    row = training.measure(way, args, config, processor, "cpu", str(tmp_path), counted)
    assert row["samples_per_second"] > 0 and row["memory_bytes"] > 1e6
    assert row["flops_per_sample"] / row["flops_per_second"] == pytest.approx(1 / row["samples_per_second"])
    assert [shape[0] for shape in counted] == [True] and list(counted.values())[0] == 2 * row["flops_per_sample"]
    assert training.matmul_rate("cpu", torch.float32) > 1e8


@pytest.mark.parametrize("pair", ["tiny", "default", "paper"])
def test_a_pair_is_measured_with_the_pictures_that_it_sees(pair):
    config, processor = training.make_pair(pair)
    assert processor.image_tokens == config.image_seq_length and processor.image_token_id == config.image_token_id
    if pair == "paper":  # counting 7 billion takes long
        return
    sides = [
        training.flops(config, False, 1, 20, 5, False, side)
        for side in (processor.image_processor.crop_size["height"], 2 * processor.image_processor.crop_size["height"])
    ]
    assert sides[1] > 1.5 * sides[0]


def test_fsdp_takes_lora_on_bfloat16_weights(config, process_group):
    """As the launch file shards: frozen weights in bfloat16 and trained ones in float32 lie in one layer."""
    names = launch("fsdp2").fsdp_transformer_layer_cls_to_wrap.split(",")
    model = get_peft_model(
        AuLlavaForConditionalGeneration(config).to(torch.bfloat16),
        LoraConfig(r=2, target_modules=LORA_TARGETS["both"], modules_to_save=["multi_modal_projector"]),
    )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    assert len(layers) == 2 + 3
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    ids = torch.full((2, 80), 5)
    ids[:, :64] = config.image_token_id
    model(input_ids=ids, pixel_values=torch.randn(2, 3, 224, 224), labels=ids.clamp(max=99)).loss.backward()
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(weight.grad.dtype == torch.float32 for weight in learnt.values())
    assert any(weight.grad.full_tensor().abs().max() > 0 for name, weight in learnt.items() if "lora_B" in name)


def test_answers_about_photographs_are_held_against_labels(tmp_path, monkeypatch, capsys, model, processor):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.fromarray(astronaut()).save(tmp_path / "astronaut.png")
    head = ["file", "x", "y", *photographs.COLUMNS]
    lines = [["astronaut.png", "220", "120", *"110001111"], ["astronaut.png", "20", "20", *"000000000"]]
    (tmp_path / "labels.csv").write_text("\n".join(map(",".join, [head, *lines])) + "\n")
    words = ["--folder", tmp_path, "--labels", tmp_path / "labels.csv", "--model", tmp_path / "model"]
    monkeypatch.setattr("sys.argv", ["photographs.py", *map(str, words), "--detector", "cascade", "--json"])
    photographs.main()
    said = capsys.readouterr().out
    assert "2 faces in 1 photographs, of which 1 were not found" in said
    found = json.loads(said.splitlines()[-1])["scores"]
    assert {own["faces"] for own in found.values()} == {1} and found["AU12"]["present"] == 1

    (tmp_path / "astronaut.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 1 files, as astronaut.png"):
        photographs.main()

    rows = [{"AU25": label} for label in ("1", "1", "0", "0", "", "1")]
    levels = [(3, 3.2), (1, 1.4), (2, 1.9), (0, 0.1), (5, 5.0)]
    told = [[{}, {"AU25": {"value": value, "expected_value": mean}}, {}] for value, mean in levels]
    own = photographs.score("AU25", rows, [*told, None])
    counts = {"faces": 4, "present": 2, "found": 1, "false alarms": 1}
    assert own == counts | {"f1": pytest.approx(0.5), "roc_auc": pytest.approx(0.75)}


def test_the_labels_of_photographs_fit_the_questions():
    lines = list(csv.DictReader(photographs.LABELS.open()))
    assert len(lines) == 73 and all(line[column] in ("", "0", "1") for line in lines for column in photographs.COLUMNS)
    for task, units, least in photographs.COLUMNS.values():
        assert set(units) <= set(PRESETS[TASKS[task].preset]) and least in TASKS[task].values


@pytest.mark.slow
def test_the_quick_benchmark_ends_in_json(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["training.py", "--quick", "--json", "--ways", "text first"])
    training.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["way"] for row in rows] == ["text first", "text first, shared prefix"]
