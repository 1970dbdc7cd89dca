"""What holds for every input, whatever it is: hypothesis draws tasks, units, values, pictures and texts."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from au_llava import AuLlavaProcessor, FacialActionUnitPipeline
from au_llava.action_units import (
    CATALOGUE,
    PRESETS,
    TASKS,
    ActionUnit,
    describe,
    get_task,
    parse_answer,
    select,
    write_answer,
)
from au_llava.datasets_scripts.csv_labels import read_csv
from au_llava.datasets_scripts.instructions import Question, instruct
from au_llava.face_alignment import align, find_faces, open_image


def examples(count: int):
    """How many; the machine's speed of the moment is no property."""
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=health)


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
own_units = st.builds(ActionUnit, code=words.map("OWN{}".format), name=words, action=words, region=words)
unit_lists = st.lists(
    st.one_of(st.sampled_from(sorted(CATALOGUE)).map(CATALOGUE.get), own_units),
    min_size=1,
    max_size=30,
    unique_by=lambda unit: unit.code,
)
tasks = st.sampled_from(sorted(TASKS))


@st.composite
def labelled(draw) -> tuple[str, list[ActionUnit], list[float]]:
    """A task, units, and a value of the task's range for each."""
    task, units = draw(tasks), draw(unit_lists)
    low, *_, high = get_task(task).values
    return task, units, draw(st.lists(st.floats(low, high), min_size=len(units), max_size=len(units)))


@examples(40)
@given(labelled())
def test_an_answer_is_read_as_it_was_written(case):
    task, units, values = case
    text = write_answer(values, task, units)
    read, step = parse_answer(text, task, units), get_task(task).values[1]
    assert all(abs(a - b) <= step / 2 + 1e-9 for a, b in zip(read, values, strict=True))
    assert write_answer(read, task, units) == text
    for more in (text[:-1], text + ",", text.replace("]", ", 0]"), text[1:]):
        with pytest.raises(ValueError):
            parse_answer(more, task, units)


@examples(40)
@given(st.text(max_size=60), tasks, unit_lists)
def test_text_is_an_answer_or_one_error(text, task, units):
    try:
        values = parse_answer(text, task, units)
    except ValueError as error:
        assert str(error)
    else:
        assert write_answer(values, task, units) == "".join(text.split()).replace(",", ", ")


@examples(40)
@given(tasks, unit_lists)
def test_the_description_tells_every_unit_once_and_in_order(task, units):
    lines = describe(task, units).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [unit.code for unit in units]
    count = "1 number " if len(units) == 1 else f"{len(units)} numbers "
    assert count in lines[-1]


@examples(40)
@given(st.one_of(st.text(max_size=40), st.lists(st.one_of(st.text(max_size=8), own_units), max_size=5)))
def test_a_selection_is_units_or_one_error(asked):
    try:
        units = select(asked)
    except ValueError as error:
        assert str(error)
    else:
        assert units and len({unit.code for unit in units}) == len(units)


@examples(40)
@given(labelled(), st.floats(0, 1), st.booleans(), st.integers(0, 9), st.data())
def test_a_question_never_asks_about_what_is_unknown(case, share, shuffle, seed, data):
    task, units, values = case
    unknown = data.draw(st.sets(st.integers(0, len(units) - 1), max_size=len(units) - 1))
    labels = {unit: math.nan if place in unknown else values[place] for place, unit in enumerate(units)}
    sample = instruct(
        labels, task, question=Question(shuffle=shuffle, subset=share), generator=np.random.default_rng(seed)
    )
    asked = [line.split()[0] for line in sample["prompt"][0]["content"].splitlines()[2:-1]]
    truth = {unit.code: value for unit, value in labels.items()}
    assert asked and len(set(asked)) == len(asked) and not any(math.isnan(truth[code]) for code in asked)
    expected = write_answer([truth[code] for code in asked], task, [u for c in asked for u in units if u.code == c])
    assert sample["completion"][0]["content"] == expected


modes = st.sampled_from(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
                         "I", "I;16", "I;16B", "F"))  # fmt: skip
sides = st.integers(1, 70)
dtypes = st.sampled_from(("bool", "u1", "u2", ">u2", "u4", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "U3", "O"))


@examples(40)
@given(modes, sides, sides, st.integers(0, 255))
def test_a_picture_of_any_mode_opens_as_rgb(mode, width, height, value):
    image = Image.new(mode, (width, height), value if len(Image.new(mode, (1, 1)).getbands()) == 1 else None)
    if mode == "F" and 1.1 < value <= 4:  # neither 0 to 1 nor 0 to 255
        with pytest.raises(ValueError, match="floats from 0 to 1"):
            open_image(image)
        return
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (width, height))


@examples(50)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=2),
    st.lists(st.sampled_from((0, 1, 2, 3, 4, 5)), max_size=2),
    dtypes,
    st.sampled_from((0, 1, 0.5, 255, 256, 65535, 70000, -1, math.nan, math.inf)),
)
def test_an_array_is_a_picture_or_one_error(place, channels, dtype, value):
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            array = np.full((*place, *channels), value).astype(dtype)
    except (ValueError, OverflowError):
        return  # numpy has no such array
    try:
        opened = open_image(array)
    except ValueError as error:
        assert "array" in str(error)
    else:
        assert opened.mode == "RGB" and opened.size == array.shape[1::-1]


@examples(12)
@given(st.integers(1, 3000), st.integers(1, 40), st.booleans(), st.sampled_from(("none", "cascade")))
def test_a_crop_has_one_size_however_odd_the_picture(long, short, upright, detector):
    image = Image.new("RGB", (short, long) if upright else (long, short), "gray")
    faces = find_faces(image, detector)
    assert len(faces) == (detector == "none")
    assert all(face.crop.size == (224, 224) and face.crop.mode == "RGB" for face in faces)


@examples(40)
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=4, max_size=6))
def test_points_make_a_crop_or_one_error(points):
    try:
        crop = align(Image.new("RGB", (64, 48), "gray"), points)
    except ValueError as error:
        assert "make no face" in str(error)
    else:
        assert crop.size == (224, 224) and len(points) == 5


cells = st.one_of(st.sampled_from(("", "0", "1", "2", "0.5", "NaN", "-1", "train", "test", "x")), words)


@examples(40)
@given(st.lists(st.lists(cells, min_size=3, max_size=5), max_size=6), tasks)
def test_a_csv_gives_rows_in_range_and_tells_the_others(tmp_path, lines, task):
    path = tmp_path / "labels.csv"
    table = [["image", "AU1", "FEAFA2", "frame"], *lines]
    path.write_text("\n".join(",".join(line) for line in table), encoding="utf-8")
    problems: list[str] = []
    codes, rows = read_csv(path, task, problems)
    assert codes == ["AU1", "FEAFA2"]
    filled = sum(any(cell.strip() for cell in line) for line in lines)
    assert len(rows) + len(problems) == filled
    low, *_, high = get_task(task).values
    assert all(math.isnan(value) or low <= value <= high for row in rows for value in row["labels"])
    assert all(problem.startswith(f"{path}:") for problem in problems)


@pytest.fixture(scope="module")
def pipe(tokenizer):
    processor = AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56)
    return FacialActionUnitPipeline(tiny_model(copy.deepcopy(tokenizer)), processor=processor, device="cpu")


@examples(6)
@given(tasks, st.lists(st.sampled_from(sorted(CATALOGUE)), min_size=1, max_size=24, unique=True), st.integers(1, 3))
def test_every_answer_is_allowed_and_its_numbers_agree(pipe, task, codes, count):
    crops = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(count)]
    answers = pipe(crops, task=task, action_units=codes, detector="none")
    allowed = get_task(task).values
    for (face,) in answers:
        assert list(face["action_units"]) == codes
        for unit in face["action_units"].values():
            assert unit["value"] in allowed and 1 / len(allowed) - 1e-6 <= unit["probability"] <= 1 + 1e-6
            assert allowed[0] - 1e-6 <= unit["expected_value"] <= allowed[-1] + 1e-6
    assert [
        pipe(crop, task=task, action_units=codes, detector="none")[0]["action_units"].keys() for crop in crops
    ] == [face["action_units"].keys() for (face,) in answers]


GOOD = st.sampled_from((Image.new("RGB", (30, 40)), np.zeros((5, 9), np.uint8), Image.new("I;16", (8, 8))))
BAD = st.sampled_from(("nowhere.png", np.zeros((2, 2, 7)), np.zeros(0), np.full((3, 3), math.nan), b"no picture"))


@examples(8)
@given(st.lists(st.one_of(GOOD, BAD), max_size=6), st.integers(1, 4))
def test_a_bad_picture_never_takes_the_good_ones_along(pipe, pictures, size):
    results = pipe(pictures, task="detection", action_units="AU12", detector="none", batch_size=size)
    assert len(results) == len(pictures)
    for picture, result in zip(pictures, results, strict=True):
        try:
            open_image(picture)
        except (OSError, ValueError):
            assert set(result) == {"error"} and result["error"]
        else:
            assert result[0]["action_units"]["AU12"]["value"] in (0, 1)


@examples(8)
@given(tasks, st.sampled_from(sorted(PRESETS)), st.integers(1, 3), modes, sides)
def test_the_processor_gives_one_shape_for_any_crop(processor, task, preset, count, mode, side):
    inputs = processor(images=[Image.new(mode, (side, 2 * side))] * count, task=task, action_units=preset)
    assert inputs["pixel_values"].shape == (count, 3, 224, 224) and torch.isfinite(inputs["pixel_values"]).all()
    images = (inputs["input_ids"] == processor.image_token_id).sum(1)
    assert images.tolist() == [processor.image_tokens] * count


@examples(20)
@given(st.binary(max_size=200))
def test_bytes_are_a_picture_or_one_error(content):
    for given_bytes in (content, b"\x89PNG\r\n\x1a\n" + content, b"\xff\xd8\xff" + content, b"GIF89a" + content):
        with pytest.raises(ValueError, match="bytes"):
            open_image(given_bytes)
    buffer = io.BytesIO()
    Image.new("L", (3, 4)).save(buffer, "PNG")
    assert open_image(buffer.getvalue() + content).size == (3, 4)
