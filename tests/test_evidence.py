"""Where the model looked: on a model whose weights are set by hand, so that the right map is known."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, LlamaConfig

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, FacialActionUnitPipeline
from au_llava.action_units import select
from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces
from au_llava.photos import load_pipeline
from benchmarks.evidence import cells_of, compare, measure, summary


CELL = 14
GREY = (124, 116, 104)  # ImageNet's mean, which the normalisation turns into 0


def seeker(tokenizer, processor) -> AuLlavaForConditionalGeneration:
    """A model whose first answer is 1 if some patch is red and whose second answer is 1 if some patch is blue.

    The token before the first value and the one before the second ask different questions of the patches: the one
    attends to red ones, the other to blue ones. What they find decides between the tokens of 0 and 1.
    """
    vision = Dinov2Config(
        hidden_size=8, num_hidden_layers=0, num_attention_heads=1, image_size=224, patch_size=CELL,
        use_mask_token=False,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},  # the last places of a head hardly turn
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language, tokenizer=tokenizer).eval()
    grammar = processor.grammar("detection", "AU1,AU2")
    no, yes = grammar.value_tokens[:, 0]
    state = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}

    def place(name, *entries):
        [key] = [key for key in state if key.endswith(name)]
        for *index, value in entries:
            state[key][tuple(index)] = value

    for key in state:
        if "norm" in key and key.endswith("weight"):
            state[key][:] = 1
    # Patches: redness, blueness, and a constant that keeps the norm from blowing up what is almost grey; each with its
    # negative, so that the norm finds a mean of 0.
    for start, channel in ((0, 0), (2, 2)):
        for row, sign in ((start, 1.0), (start + 1, -1.0)):
            place("patch_embeddings.projection.weight", (row, channel, sign / CELL**2))
    place("patch_embeddings.projection.bias", (4, 4.0), (5, -4.0))
    place("multi_modal_projector.weight", (0, 0, 1.0), (1, 2, 1.0), (6, 4, 1.0))
    place("embed_tokens.weight", (grammar.opening[-1], 2, 1.0), (grammar.separator[-1], 3, 1.0))
    place("q_proj.weight", (3, 2, 40.0), (2, 3, 40.0))
    place("k_proj.weight", (3, 0, 1.0), (2, 1, 1.0))
    place("v_proj.weight", (0, 0, 1.0), (1, 1, 1.0))
    place("o_proj.weight", (4, 0, 5.0), (5, 1, 5.0))
    place("lm_head.weight", (no, 2, 24.0), (no, 3, 24.0), (yes, 4, 8.0), (yes, 5, 8.0))
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def seeking(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    processor = AuLlavaProcessor.from_backbones(None, tokenizer, patch_size=CELL, prompt_layout="text_first")
    return FacialActionUnitPipeline(seeker(tokenizer, processor), processor=processor)


def crop(**cells) -> Image.Image:
    """A grey crop with one cell (row, column) of each colour named."""
    pixels = np.full((224, 224, 3), GREY, np.uint8)
    for colour, (row, column) in cells.items():
        pixels[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)] = np.array(
            (255, *GREY[1:]) if colour == "red" else (*GREY[:2], 255)
        )
    return Image.fromarray(pixels)


def answers(pipe, image, method):
    [face] = pipe(image, action_units="AU1,AU2", detector="none", return_evidence=method)
    units = face["action_units"].values()
    return [unit["value"] for unit in units], [np.array(unit["evidence"]) for unit in units]


@pytest.mark.parametrize(
    ("method", "red", "blue"),
    [("attention", (3, 12), (10, 2)), ("attention", (10, 2), (3, 12)), ("occlusion", (15, 0), (6, 6))],
)
def test_each_answer_s_map_points_at_what_decided_it(seeking, method, red, blue):
    values, maps = answers(seeking, crop(red=red, blue=blue), method)
    assert values == [1, 1]
    rows, columns = np.mgrid[:16, :16]
    for cells, (row, column) in zip(maps, (red, blue), strict=True):
        assert cells.shape == (16, 16) and cells.min() >= 0 and cells.sum() == pytest.approx(1, abs=1e-3)
        # A window that touches the cell reaches two cells further.
        near = (abs(rows - row) <= 2) & (abs(columns - column) <= 2)
        assert cells[near].sum() > 0.99 and cells[row, column] == cells.max()
        assert method == "occlusion" or cells[row, column] > 0.9


def test_an_encoder_that_sees_the_middle_points_at_the_right_place_of_the_crop(seeking, tokenizer):
    half = AuLlavaProcessor.from_backbones(
        None, copy.deepcopy(tokenizer), patch_size=CELL, prompt_layout="text_first", view=0.5
    )
    pipe = FacialActionUnitPipeline(seeking.model, processor=half)
    values, [cells, _] = answers(pipe, crop(red=(5, 10), blue=(15, 15)), "attention")
    assert half.view == 0.5 and values == [1, 0]  # blue lies beyond what is seen
    assert cells.sum() == pytest.approx(1, abs=1e-3) and cells[5, 10] > 0.9
    assert (cells[:4] == 0).all() and (cells[:, 12:] == 0).all()


def test_where_nothing_matters_nothing_is_shown(seeking):
    question = {"task": "detection", "action_units": "AU1,AU2"}
    inputs, grammar = seeking.processor(images=crop(red=(8, 8)), **question), seeking.processor.grammar(**question)
    found = seeking.model.recognize(**inputs, grammar=grammar, readout="parallel", return_evidence="occlusion")
    [[red, blue]] = found.evidence
    assert found.values.tolist() == [[1, 0]]
    assert red[8, 8] == red.max() > 0 and not blue.any()
    # Attention has to go somewhere; but where all patches are alike none is evidence.
    assert not np.any(answers(seeking, crop(), "attention")[1])


@pytest.mark.parametrize("task", ["detection", "intensity"])
@pytest.mark.parametrize("readout", ["exact", "parallel"])
def test_evidence_changes_no_answer_and_a_batch_is_as_its_parts(model, processor, task, readout):
    noise = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    crops, grammar = [Image.fromarray(one) for one in noise], processor.grammar(task, "AU1,AU12")
    usual = model.model.language_model.config._attn_implementation
    maps = []
    for which in (crops, crops[:1], crops[1:]):
        inputs = processor(images=which, task=task, action_units="AU1,AU12")
        plain = model.recognize(**inputs, grammar=grammar, readout=readout)
        found = model.recognize(**inputs, grammar=grammar, readout=readout, return_evidence=True)
        assert plain.evidence is None and torch.equal(plain.distributions, found.distributions)
        maps.append(found.evidence)
    assert maps[0].shape == (2, 2, 16, 16) and torch.allclose(maps[0].sum((2, 3)), torch.ones(2, 2))
    assert torch.allclose(maps[0], torch.cat(maps[1:]), atol=1e-7)
    assert (maps[1] - maps[2]).abs().max() > 1e-5  # other pictures, other maps
    assert model.model.language_model.config._attn_implementation == usual
    # The tiny encoder has 4 x 4 patches: a cell of the map shows the patch that it lies in.
    blocks = model.recognize(**inputs, grammar=grammar, return_evidence=True).evidence.unflatten(2, (4, 4))
    assert torch.equal(blocks.amin(3), blocks.amax(3))


def test_unknown_evidence_is_told(model, processor):
    inputs = processor(images=Image.new("RGB", (224, 224)), task="detection")
    with pytest.raises(ValueError, match="accepted: attention, occlusion"):
        model.recognize(**inputs, grammar=processor.grammar("detection"), return_evidence="tea leaves")


def test_the_benchmark_tells_a_map_in_its_region_from_one_elsewhere():
    """Its numbers for maps of which the answer is known, and what chance gives for maps that know nothing."""
    units = select(None, "intensity_level")
    regions = {unit.code: cells_of(unit) for unit in units}
    codes = list(regions)
    perfect = {code: region / region.sum() for code, region in regions.items()}
    people = [compare(perfect, regions, codes) for _ in range(3)]
    right = {name: numbers[0] for name, numbers in summary(people).items()}
    assert right["peak"] > 0.85 and right["own"] == 1 and right["mass"] > 0.5 > 5 * right["area"]
    # Each unit's map in the place of another one, whose region is elsewhere.
    away = {code: next(o for o in codes if (regions[o] * regions[code]).sum() < 0.01) for code in codes}
    wrong = summary([compare({code: perfect[away[code]] for code in codes}, regions, codes)])
    assert wrong["peak"][0] < 0.05 and wrong["mass"][0] < 0.05
    random = np.random.default_rng(0)
    noise = [compare({code: random.dirichlet(np.ones(256)).reshape(16, 16) for code in codes}, regions, codes)
             for _ in range(60)]  # fmt: skip
    chance = summary(noise)
    for name, expected in (("peak", chance["area"][0]), ("mass", chance["area"][0]), ("own", 0.5)):
        assert chance[name][1] - 0.02 < expected < chance[name][2] + 0.02
    nothing = summary([compare(dict.fromkeys(codes, np.zeros((16, 16))), regions, codes)])
    assert nothing["own"][0] == 0.5 and nothing["mass"][0] == 0


@pytest.mark.slow
def test_on_rendered_faces_the_maps_lie_in_the_units_region_more_than_by_chance():
    builder = SyntheticFaces(config_name="faces")
    builder.download_and_prepare()
    faces = builder.as_dataset("test").select(range(24))
    numbers = summary(measure(load_pipeline(None), faces, "intensity_level", "attention"))
    share, least = numbers["mass"][:2]
    assert share > least > numbers["area"][0]
