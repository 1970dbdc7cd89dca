"""Pictures must show the numbers: bars as long as the values, boxes where the faces are."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from au_llava.action_units import TASKS, select
from au_llava.drawing import (
    ACTIVE,
    FACE_COLOURS,
    INACTIVE,
    INK,
    TRACK,
    answer_text,
    draw_bars,
    draw_evidence,
    draw_face_map,
    draw_faces,
    draw_sheet,
    is_active,
)
from au_llava.tables import text_table


def face(task, expected, box=(40, 50, 140, 160), **more):
    """A pipeline's entry whose units all have the expected value, 0 to 1 of the task's range."""
    chosen = TASKS[task]
    units = {
        unit.code: {
            "name": unit.name,
            "value": chosen.number(float(chosen.write(share * chosen.values[-1]))),
            "probability": 0.5,
            "expected_value": share * chosen.values[-1],
        }
        for unit, share in zip(select(None, task), np.resize(expected, 24), strict=False)
    }
    return {"box": box and list(box), "score": 0.9, "task": task, "action_units": units, **more}


def pixels(image, colour):
    return (np.asarray(image) == ImageColor.getrgb(colour)).all(-1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("width", [240, 560, 1200])
def test_bars_are_as_long_as_the_expected_values(task, width):
    shares = [0, 0.25, 0.75, 1]
    image = draw_bars(face(task, shares)["action_units"], task, width)
    assert image.width == width
    active, inactive, track = (pixels(image, colour) for colour in (ACTIVE, INACTIVE, TRACK))
    length = np.maximum(active.sum(1), inactive.sum(1))
    full = length.max()
    rows = [length[start] for start in np.flatnonzero(np.diff((length > 0).astype(int)) == 1) + 1]
    expected = np.resize(shares, len(select(None, task)))
    assert np.allclose(np.array(rows) / full, expected, atol=2 / full)
    assert (track | active | inactive).any(1).sum() > len(rows)


@pytest.mark.parametrize("task", TASKS)
def test_means_are_drawn_as_numbers(task):
    highest = TASKS[task].values[-1]
    unit = {"name": "A", "value": 0.437 * highest, "probability": None, "expected_value": 0.437 * highest}
    slight = unit | {"value": 0.001 * highest, "expected_value": 0.001 * highest}
    assert answer_text(unit, task) == f"{0.437 * highest:.2f}"
    assert is_active(unit, task) == (task != "detection") and not is_active(slight, task)
    assert is_active(unit | {"threshold": 0.4}, "detection")
    entry = {"box": [0, 0, 90, 90], "score": None, "task": task, "action_units": {"AU1": unit, "AU2": slight}}
    drawn = draw_bars(entry["action_units"], task)
    assert pixels(drawn, ACTIVE).any() == (task != "detection")
    draw_sheet(Image.new("RGB", (100, 100)), [entry])
    draw_face_map(entry["action_units"], task)
    assert f"{0.437 * highest:.2f} (" in text_table([entry])


def test_an_intensity_is_drawn_as_it_is_answered_and_a_trace_is_not_called_active():
    unit = {"name": "A", "value": 0.4, "probability": 0.1, "expected_value": 0.15}
    trace = unit | {"value": 0.04}
    drawn = [draw_bars({"AU1": one}, "intensity") for one in (unit, trace)]
    lengths = [max(pixels(image, colour).sum(1).max() for colour in (ACTIVE, INACTIVE)) for image in drawn]
    assert lengths[0] / lengths[1] == pytest.approx(10, rel=0.1)
    assert pixels(drawn[0], ACTIVE).any() and not pixels(drawn[1], ACTIVE).any()


def test_only_an_active_unit_has_a_coloured_bar():
    absent, present = (draw_bars(face("detection", [share])["action_units"], "detection") for share in (0.49, 0.51))
    assert not pixels(absent, ACTIVE).any() and pixels(absent, INACTIVE).any()
    assert not pixels(present, INACTIVE).any() and pixels(present, ACTIVE).any()


def test_a_line_stands_where_a_unit_is_called_present():
    units = face("detection", [0.9])["action_units"]
    plain = np.asarray(draw_bars(units, "detection"))
    left, right = np.flatnonzero((pixels(plain, ACTIVE) | pixels(plain, TRACK)).sum(0) > 12 * 5)[[0, -1]]
    for limit in (0.2, 0.6):
        image = draw_bars({code: unit | {"threshold": limit} for code, unit in units.items()}, "detection")
        changed = (np.asarray(image) != plain).any(-1)[:, left : right + 1]
        (columns,) = np.flatnonzero(changed.sum(0) > 12 * 5).reshape(1, -1)
        assert len(columns) and np.allclose(columns / (right - left), limit, atol=0.01)


def test_a_line_with_two_ends_spans_the_interval():
    units = face("intensity", [0.4])["action_units"]
    plain = np.asarray(draw_bars(units, "intensity"))
    left, right = np.flatnonzero((pixels(plain, ACTIVE) | pixels(plain, TRACK)).sum(0) > 12 * 5)[[0, -1]]
    image = draw_bars({code: unit | {"interval": [0.25, 0.75]} for code, unit in units.items()}, "intensity")
    changed = pixels(np.asarray(image), INK) & ~pixels(plain, INK)
    columns = np.flatnonzero(changed[:, left : right + 1].sum(0) >= len(units)) / (right - left)
    assert np.allclose([columns.min(), columns.max()], [0.25, 0.75], atol=0.01)


def test_answers_read_as_people_write_them():
    assert answer_text({"value": 0}, "detection") == "absent"
    assert answer_text({"value": 1}, "detection") == "present"
    assert answer_text({"value": 3}, "intensity_level") == "3"
    assert answer_text({"value": 0.5}, "intensity") == "0.50"


def test_a_long_or_foreign_name_stays_inside_its_column():
    units = face("intensity", [0.5])["action_units"]
    units["FEAFA1"]["name"] = "Lächeln " * 40
    long = np.asarray(draw_bars(units, "intensity"))
    units["FEAFA2"]["name"] = "W" * 400
    start = pixels(long, ACTIVE).any(0).argmax()
    assert np.array_equal(long[:, start:], np.asarray(draw_bars(units, "intensity"))[:, start:])


def test_boxes_stand_where_the_faces_are_and_the_photograph_is_not_written_to():
    photo = Image.new("RGB", (400, 300), "#808080")
    faces = [face("detection", [1.0]), face("detection", [0.0], (250, 100, 330, 200))]
    drawn = draw_faces(photo, faces)
    assert drawn.size == photo.size and photo.getcolors() == [(400 * 300, (128, 128, 128))]
    changed = (np.asarray(drawn) != 128).any(-1)
    for x, y in [(41, 100), (139, 100), (90, 51), (251, 150), (329, 150)]:
        assert changed[y, x]
    assert not changed[75:155, 50:130].any() and not changed[205:, 260:].any()  # no unit is active in the second face
    assert changed[165, 60]  # the first face's codes stand under its box


def test_a_face_keeps_the_colour_of_its_id():
    photo = Image.new("RGB", (400, 300))
    alone = draw_faces(photo, [face("detection", [0.0], id=3)])
    third = draw_faces(photo, [face("detection", [0.0], id=1), face("detection", [0.0], id=3)])
    assert np.array_equal(np.asarray(alone), np.asarray(third))


def test_a_picture_that_is_a_face_gets_a_frame_around_it():
    drawn = np.asarray(draw_faces(Image.new("L", (224, 224)), [face("detection", [1.0], None)]))
    assert drawn.shape == (224, 224, 3) and drawn[100, 0].any() and drawn[100, 223].any()


@pytest.mark.parametrize("size", [(100, 80), (3000, 500)])
def test_a_sheet_holds_every_face_and_task(size):
    answers = [[face(task, [1.0], (5, 5, 60, 60)), face(task, [0.0], (50, 5, 90, 60))] for task in TASKS]
    sheet = draw_sheet(Image.new("RGB", size, "black"), *answers, bars_width=300)
    assert sheet.width == max(size[0], 900)
    assert pixels(sheet, ACTIVE).sum() > 40 * 300


def test_a_sheet_without_faces_is_the_photograph():
    assert draw_sheet(Image.new("RGB", (600, 80)), []).size == (600, 80)


def test_boxes_and_codes_can_be_read_on_a_small_picture():
    entry = face("detection", [0, 1], box=(12, 13, 34, 40))
    large = entry | {"box": [10 * side for side in entry["box"]]}
    small = Image.new("RGB", (48, 48), "black")
    expected = draw_faces(small.resize((480, 480)), [large])
    assert (np.asarray(draw_sheet(small, [entry], bars_width=480))[:480] == np.asarray(expected)).all()


@pytest.mark.parametrize(("units", "width"), [({}, 400), ("all", 100)])
def test_bars_need_room_and_units(units, width):
    units = units and face("detection", [1.0])["action_units"]
    with pytest.raises(ValueError, match="240"):
        draw_bars(units, "detection", width)


def with_evidence(entry, **cells):
    """The entry with all evidence of each unit named in one (row, column)."""
    for code, place in cells.items():
        maps = np.zeros((16, 16))
        maps[place] = 1
        entry["action_units"][code]["evidence"] = maps.tolist()
    return entry


def redness(picture):
    red, green, blue = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
    return red - (green + blue) / 2


def test_evidence_is_drawn_where_it_lies():
    answers = with_evidence(face("detection", [1.0]), AU1=(2, 13), AU2=(12, 3))
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224), dtype=np.uint8))
    picture = redness(draw_evidence(grey, answers["action_units"], "detection", 640))
    assert picture.shape == (190, 640)  # one row of tiles of 160 pixels, with their names above
    for left, (row, column) in ((0, (2, 13)), (160, (12, 3))):
        tile = picture[30:, left : left + 160]
        y, x = np.unravel_index(tile.argmax(), tile.shape)
        assert (y // 10, x // 10) == (row, column)
        far = np.ones((16, 16), bool)
        far[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = False
        assert tile[np.kron(far, np.ones((10, 10), bool))].max() < 5 < tile.max()
    assert (picture[:, 320:] == 0).all()  # units without evidence have no tile


def test_without_an_active_unit_the_highest_are_shown():
    answers = with_evidence(
        face("intensity", np.linspace(0, 0.004, 24)), **{f"FEAFA{n}": (0, 0) for n in range(1, 25)}
    )
    crop = Image.new("RGB", (224, 224))
    assert draw_evidence(crop, answers["action_units"], "intensity", 400).height < 140
    with pytest.raises(ValueError, match="return_evidence"):
        draw_evidence(crop, face("detection", [1.0])["action_units"], "detection")


def test_a_sheet_shows_the_evidence_where_there_are_crops():
    crop, plain = Image.new("RGB", (224, 224)), face("detection", [1.0])
    without = draw_sheet(crop, [plain], crops=[crop])
    shown = draw_sheet(crop, [with_evidence(plain, AU1=(5, 5))], crops=[crop])
    assert shown.size == (without.width, without.height + 140 + 26)
    assert draw_sheet(crop, [plain]).size == without.size


def test_a_face_map_colours_the_places_of_the_units_by_their_values():
    units = face("intensity", [0.0])["action_units"]
    units["FEAFA12"]["value"], units["FEAFA2"]["value"] = 1.0, 0.5
    picture = np.asarray(draw_face_map(units, "intensity", 560)).astype(float)
    scale, top = 336 / 224, round(1.9 * 14)

    def at(x, y):
        return picture[round(top + y * scale), round(x * scale)]

    full, white = np.array(ImageColor.getrgb(ACTIVE)), 255.0
    assert np.allclose(at(142, 153), full, atol=3)  # the subject's left mouth corner lies on the right
    assert np.allclose(at(82, 153), white)
    assert np.allclose(at(84, 92), (full + white) / 2, atol=3) and np.allclose(at(140, 92), white)
    own = units | {"WINK": {"name": "Wink", "value": 1, "expected_value": 1.0}}
    assert draw_face_map(own, "intensity", 560).width == 560
    with pytest.raises(ValueError, match="240"):
        draw_face_map(units, "intensity", 100)
    assert FACE_COLOURS[0] != ACTIVE  # evidence and values cannot be mistaken for one another


@pytest.mark.parametrize("width", [240, 560])
def test_a_long_code_is_cut_before_the_bars(width):
    smile = face("intensity_level", [0.4])["action_units"]["AU12"]
    short, long = (draw_bars({code: smile}, "intensity_level", width) for code in ("M" * 14, "M" * 80))
    assert np.array_equal(np.asarray(short), np.asarray(long))
