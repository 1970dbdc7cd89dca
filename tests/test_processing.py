import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil, SiglipImageProcessorPil

from au_llava import AuLlavaProcessor
from au_llava.action_units import TASKS, ActionUnit, describe, get_task, select, write_answer
from au_llava.recognition_au_llava import Recognition


VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8))


def test_prompt_is_the_vicuna_layout_with_the_image_first(processor):
    assert processor.prompt("detection", "AU1,AU2") == VICUNA.format(question=describe("detection", "AU1,AU2"))


def test_text_first_puts_the_image_after_the_description(processor):
    other = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    assert other.prompt("detection", "AU1").endswith(f"{describe('detection', 'AU1')}\n<image> ASSISTANT:")


def test_answer_and_end_token_follow_the_prompt(processor):
    messages = processor.messages("detection", "AU1")
    messages.append({"role": "assistant", "content": "[1]"})
    whole = processor.apply_chat_template(messages)
    assert whole == processor.prompt("detection", "AU1") + " [1]</s>"


def test_a_system_message_replaces_the_default(processor):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == "<s>Be brief. USER: Hello ASSISTANT:"


def test_chats_with_and_without_a_picture_share_a_batch(processor, picture):
    text = {"type": "text", "text": "Hello"}
    chats = [
        [{"role": "user", "content": content}] for content in ([text], [{"type": "image", "image": picture}, text])
    ]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, processor_kwargs={"padding": True})
    assert [row.count(processor.image_token_id) for row in inputs["input_ids"]] == [0, 16]
    assert len(inputs["pixel_values"]) == 1


@pytest.mark.parametrize("task", TASKS)
def test_image_and_task_become_model_inputs(processor, picture, task):
    inputs = processor(images=[picture, picture], task=task)
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


def test_detection_is_the_default_task(processor, picture):
    assert torch.equal(
        processor(images=picture)["input_ids"], processor(images=picture, task="detection")["input_ids"]
    )


def test_batches_are_left_padded(processor, picture):
    texts = [processor.prompt("detection", units) for units in ("AU1", "bp4d")]
    inputs = processor(images=[picture, picture], text=texts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][0, -1] == 1
    assert inputs["attention_mask"][1].all()


def test_every_kind_of_picture_gives_the_same_tensor(processor, picture):
    colour = processor(images=picture)["pixel_values"]
    torch.testing.assert_close(processor(images=np.asarray(picture))["pixel_values"], colour)
    torch.testing.assert_close(processor(images=picture.convert("RGBA"))["pixel_values"], colour)
    grey = picture.convert("L")
    expected = processor(images=grey.convert("RGB"))["pixel_values"]
    torch.testing.assert_close(processor(images=grey)["pixel_values"], expected)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    torch.testing.assert_close(processor(images=sixteen)["pixel_values"], expected, atol=0.02, rtol=0)
    for mode in ("CMYK", "P", "1", "LA"):
        assert processor(images=picture.convert(mode))["pixel_values"].shape == (1, 3, 224, 224)


def test_tensors_give_what_pictures_give(processor, picture):
    expected = processor(images=picture)["pixel_values"]
    whole = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    unit = whole / 255  # as torchvision's ToTensor makes it
    over = torch.where(unit == 1, 1.004, unit)  # as resizing makes it
    for tensor in (whole, whole.float(), unit, over, unit.movedim(0, -1), unit.bfloat16(), whole.bfloat16()):
        found = processor(images=tensor)["pixel_values"]
        torch.testing.assert_close(found, expected, atol=0.02 if tensor.dtype == torch.bfloat16 else 1e-6, rtol=0)
    for ready in (unit, unit.movedim(0, -1).numpy()):
        for unscaled in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
            torch.testing.assert_close(processor(images=ready, **unscaled)["pixel_values"], expected)
    grey = processor(images=np.array(picture)[..., 0])["pixel_values"]
    assert torch.equal(processor(images=whole[0])["pixel_values"], grey)
    clear = torch.cat([whole, torch.zeros_like(whole[:1])])  # an alpha channel of 0
    white = processor(images=Image.new("RGB", (224, 224), "white"))["pixel_values"]
    assert torch.equal(processor(images=clear)["pixel_values"], white)
    with pytest.raises(ValueError, match=r"shape \(.*; give \(height, width\)"):
        processor(images=whole[None, None])
    for stack in (torch.stack([unit, unit]), np.stack([np.asarray(picture)] * 2)):
        inputs = processor(images=stack)
        assert torch.equal(inputs["pixel_values"], torch.cat([expected, expected])) and len(inputs["input_ids"]) == 2


def test_a_rotated_photograph_is_set_upright(processor, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = processor(images=picture.transpose(Image.Transpose.ROTATE_270))["pixel_values"]
    torch.testing.assert_close(processor(images=str(tmp_path / "turned.png"))["pixel_values"], upright)


@pytest.mark.parametrize("task", TASKS)
def test_grammar_writes_what_the_tokenizer_writes(processor, task):
    units = select("feafa")
    grammar = processor.grammar(task, units)
    values = torch.randint(len(grammar.values), (24,), generator=torch.Generator().manual_seed(0))
    tokens = grammar.template()
    tokens[grammar.slots()] = grammar.value_tokens[values]
    answer = write_answer(grammar.values[values].tolist(), task, units)
    completion = f" {answer}</s>"
    assert tokens.tolist() == processor.tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(grammar)


def test_a_tokenizer_that_joins_digits_is_refused(processor):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[", "]", ",", "0", "1", "2", "3", "4", "5", "1.00", "</s>", "<image>", "<unk>", "."]
    joined = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    joined.pre_tokenizer = pre_tokenizers.Split(",", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="</s>", unk_token="<unk>")
    other = AuLlavaProcessor.from_backbones(None, tokenizer)
    with pytest.raises(ValueError, match="each digit is a token"):
        other.grammar("intensity", "feafa")


def test_reading_names_the_values(processor):
    recognition = Recognition(
        sequences=torch.zeros(1, 1, dtype=torch.long),
        values=torch.tensor([[1.0, 0.0]]),
        probabilities=torch.tensor([[0.75, 0.5]]),
        expected_values=torch.tensor([[0.75, 0.25]]),
        distributions=torch.zeros(1, 2, 2),
        forwards=1,
    )
    wink = ActionUnit("WINK", "Wink", "one eye closes", "eyelids")
    assert processor.read(recognition, "detection", ["AU12", wink]) == [
        {
            "AU12": {
                "name": "Lip Corner Puller", "value": 1, "probability": 0.75, "expected_value": 0.75, "threshold": 0.5,
            },
            "WINK": {"name": "Wink", "value": 0, "probability": 0.5, "expected_value": 0.25, "threshold": 0.5},
        }
    ]  # fmt: skip
    rated = replace(recognition, distributions=torch.zeros(1, 2, 6))
    (levels,) = processor.read(rated, "intensity_level", ["AU12", wink])
    (means,) = processor.read(recognition.decide("mean", torch.tensor([0.0, 1.0])), "detection", ["AU12", wink])
    assert not any("threshold" in unit for unit in [*levels.values(), *means.values()])


def test_calibration_moves_probabilities_and_thresholds_and_is_stored(processor, tmp_path):
    own = AuLlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=56,
        calibration={"detection": {"temperature": 2.0, "thresholds": {"AU12": 0.7}}},
    )  # fmt: skip
    own.save_pretrained(tmp_path)
    own = AuLlavaProcessor.from_pretrained(tmp_path)
    present = torch.tensor([[0.8, 0.8]])
    recognition = Recognition(
        sequences=torch.zeros(1, 1, dtype=torch.long), values=torch.ones(1, 2), probabilities=present,
        expected_values=present, distributions=torch.stack([1 - present, present], -1), forwards=1,
    )  # fmt: skip
    (units,) = own.read(recognition, "detection", "AU6,AU12")
    softer = 0.8**0.5 / (0.8**0.5 + 0.2**0.5)  # two thirds: above AU6's usual half, below AU12's 0.7
    assert [unit["value"] for unit in units.values()] == [1, 0]
    assert [unit["threshold"] for unit in units.values()] == [0.5, 0.7]
    assert [unit["expected_value"] for unit in units.values()] == pytest.approx([softer, softer], abs=1e-5)
    assert [unit["probability"] for unit in units.values()] == pytest.approx([softer, 1 - softer], abs=1e-5)
    (plain,) = own.read(recognition, "detection", "AU6,AU12", calibrated=False)
    assert [unit["value"] for unit in plain.values()] == [1, 1]
    assert [unit["threshold"] for unit in plain.values()] == [0.5, 0.5]
    other = replace(recognition, distributions=torch.zeros(1, 2, 101))
    assert own.read(other, "intensity", "FEAFA1,FEAFA2")[0]["FEAFA1"]["probability"] == pytest.approx(0.8)


def test_intervals_lie_around_answers_where_a_calibration_tells_them(processor, monkeypatch):
    fitted = {"temperature": 1.0, "margins": {"AU1": [0.06, 0.2], "AU4": [0.1, 0.25]}}
    monkeypatch.setattr(processor, "calibration", {"intensity": fitted})
    grid = torch.tensor(get_task("intensity").values)
    values = torch.tensor([[0.0, 0.5, 0.9], [0.01, 0.5, 0.0]])
    recognition = Recognition(
        sequences=torch.zeros(2, 1, dtype=torch.long), values=values, probabilities=values, expected_values=values,
        distributions=(grid == values[..., None]).float(), forwards=1,
    )  # fmt: skip

    def told(recognition, **how):
        faces = processor.read(recognition, "intensity", "AU1,AU2,AU4", **how)
        return [[unit.get("interval") for unit in face.values()] for face in faces]

    assert told(recognition) == [[[0.0, 0.06], None, [0.65, 1.0]], [[0.0, 0.21], None, [0.0, 0.1]]]
    nothing = [[None] * 3] * 2
    assert told(recognition, calibrated=False) == nothing
    assert told(recognition.decide("median", grid)) == nothing, "they were fitted to other answers"
    monkeypatch.setattr(
        processor, "calibration", {"intensity_level": {"decision": "median", "margins": {"AU1": [1, 2]}}}
    )
    levels = torch.tensor(get_task("intensity_level").values)
    recognition.values, recognition.distributions = torch.full((1, 1), 4.0), (levels == 4.0).float().view(1, 1, 6)
    (face,) = processor.read(recognition, "intensity_level", "AU1")
    assert face["AU1"]["interval"] == [2, 5] and isinstance(face["AU1"]["interval"][0], int)
    (asked,) = processor.read(recognition.decide("median", levels), "intensity_level", "AU1")
    assert asked["AU1"]["interval"] == [2, 5], "medians are what they were fitted to"


def test_an_interval_grows_to_the_more_probable_side_until_it_holds_enough():
    levels = torch.tensor(get_task("intensity_level").values)
    shares = torch.tensor([[[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], [0.05, 0.1, 0.2, 0.4, 0.15, 0.1]]])
    recognition = Recognition(
        sequences=torch.zeros(1, 1, dtype=torch.long), values=torch.tensor([[0.0, 3.0]]), probabilities=shares[..., 0],
        expected_values=shares @ levels, distributions=shares, forwards=1,
    )  # fmt: skip
    wanted = {0.3: [[0, 0], [3, 3]], 0.6: [[0, 1], [2, 3]], 0.74: [[0, 2], [2, 4]], 1.01: [[0, 5], [0, 5]]}
    for mass, ends in wanted.items():
        assert recognition.intervals({"mass": mass}, ["AU1", "AU2"], levels).tolist() == [ends]


def test_presence_told_by_levels_has_their_temperature_where_no_threshold_was_fitted(processor, monkeypatch):
    fitted = {"intensity_level": {"temperature": 3.0}, "detection": {"thresholds": {"AU1": 0.4}}}
    monkeypatch.setattr(processor, "calibration", fitted)
    levels = torch.tensor([0.55, 0.0, 0.15, 0.15, 0.15, 0.0]).expand(1, 2, 6)
    zeros = torch.zeros(1, 2)
    answer = Recognition(
        sequences=zeros.long(), values=zeros, probabilities=levels[..., 0], expected_values=zeros,
        distributions=levels, forwards=1,
    )  # fmt: skip
    told = [processor.told(answer, "intensity_level", "detection", "AU1,AU2", calibrated=how) for how in (True, False)]
    softened = 3 * 0.15 ** (1 / 3) / (3 * 0.15 ** (1 / 3) + 0.55 ** (1 / 3))
    expected = torch.tensor([[0.45, softened], [0.45, 0.45]])
    torch.testing.assert_close(torch.cat([one.expected_values for one in told]), expected, atol=1e-3, rtol=0)
    assert torch.cat([one.values for one in told]).tolist() == [[0, 1], [0, 0]]


def test_saving_and_loading_keeps_everything(processor, picture, tmp_path):
    other = AuLlavaProcessor(
        processor.image_processor, copy.deepcopy(processor.tokenizer), patch_size=56, prompt_layout="text_first"
    )
    other.save_pretrained(tmp_path)
    again = AuLlavaProcessor.from_pretrained(tmp_path)
    assert again.prompt_layout == "text_first"
    for name, tensor in other(images=picture).items():
        assert torch.equal(tensor, again(images=picture)[name]), name


@pytest.mark.parametrize(
    ("source", "side"),
    [
        (ConvNextImageProcessorPil(size={"shortest_edge": 192}), 192),
        (SiglipImageProcessorPil(size={"height": 384, "width": 384}), 384),
        (CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}), 336),
    ],
    ids=["shortest edge", "square", "crop"],
)
def test_the_encoders_picture_size_is_taken_over(tokenizer, tmp_path, source, side):
    source.save_pretrained(tmp_path)
    own = AuLlavaProcessor.from_backbones(str(tmp_path), copy.deepcopy(tokenizer), patch_size=16)
    assert own.image_tokens == (side // 16) ** 2 and own.image_processor.image_mean == source.image_mean


def test_the_decision_files_are_uploaded_with_the_processor(processor, tmp_path, monkeypatch):
    uploaded = []
    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("transformers.processing_utils.hf_api", lambda: hub)
    monkeypatch.setattr(AuLlavaProcessor, "_upload_modified_files", lambda _, place, *__, **___: uploaded.extend(
        path.name for path in Path(place).iterdir()
    ))  # fmt: skip
    written = processor.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/au")
    assert {"decision.json", "decision_template.jinja", "processor_config.json", "tokenizer.json"} <= set(uploaded)
    assert written == [str(tmp_path / "processor_config.json")]


def test_bad_input_is_named(processor, picture):
    with pytest.raises(ValueError, match="'smile'.*detection"):
        processor(images=picture, task="smile")
    with pytest.raises(ValueError, match=r"Unknown task \['detection', 'intensity'\]"):
        processor(images=picture, task=["detection", "intensity"])
    with pytest.raises(ValueError, match="AU99"):
        processor(images=picture, action_units=["AU99"])
    with pytest.raises(ValueError, match="not both"):
        processor(images=picture, text="<image> what?", task="detection")
    for nothing in ([], (), np.zeros((0, 224, 224, 3), np.uint8), torch.zeros(0, 3, 224, 224)):
        with pytest.raises(ValueError, match="`images` holds no picture; give at least one"):
            processor(images=nothing)
    with pytest.raises(ValueError, match="'sideways'.*image_first, text_first"):
        AuLlavaProcessor(processor.image_processor, processor.tokenizer, prompt_layout="sideways")
