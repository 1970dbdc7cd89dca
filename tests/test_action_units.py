import itertools
import math
from types import SimpleNamespace

import pytest

from au_llava.action_units import (
    CATALOGUE,
    PRESETS,
    TASKS,
    ActionUnit,
    describe,
    known,
    other_sides,
    parse_answer,
    select,
    write_answer,
)


def test_presets_are_the_published_lists():
    numbers = {name: [int(code.lstrip("AUFE")) for code in codes] for name, codes in PRESETS.items()}
    assert numbers["bp4d"] == [1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24]
    assert numbers["disfa"] == [1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26]
    assert numbers["disfa8"] == [1, 2, 4, 6, 9, 12, 25, 26]
    assert numbers["feafa"] == list(range(1, 25))
    assert all(code in CATALOGUE for codes in PRESETS.values() for code in codes)


def test_facs_and_feafa_codes_never_mix():
    assert all(code.startswith("FEAFA") for code in PRESETS["feafa"])
    assert CATALOGUE["AU12"].name == "Lip Corner Puller"
    assert CATALOGUE["FEAFA12"].name == "Left Lip Corner Pull"


def test_feafa_mirror_is_the_published_permutation():
    published = [1, 0, 3, 2, 5, 4, 7, 6, 8, 10, 9, 12, 11, 14, 13, *range(15, 24)]
    codes = list(PRESETS["feafa"])
    assert [codes.index(CATALOGUE[code].mirrored().code) for code in codes] == published


def test_the_other_side_of_a_user_unit_is_found_by_what_it_says():
    left = ActionUnit("WL", "Left Wink", "the left eye closes", "left eyelids", side="left")
    right = ActionUnit("WR", "Right Wink", "the right eye closes", "right eyelids", side="right")
    assert other_sides([left, *select("AU12"), right]) == [2, 1, 0] and other_sides([left]) == [-1]
    left = ActionUnit("WL", "LEFT wink", "closes the LEFT eye", "eye", ("left orbicularis oculi",))
    right = ActionUnit("WR", "RIGHT wink", "closes the RIGHT eye", "eye", ("right orbicularis oculi",))
    assert other_sides([left, right]) == [1, 0] and other_sides([left]) == [-1]


def test_mirroring_swaps_the_wording_of_a_user_unit_and_is_its_own_inverse():
    wink = ActionUnit("WINK", "Left Wink", "the left eye closes", "left eyelids", side="left")
    assert wink.mirrored() == ActionUnit("WINK", "Right Wink", "the right eye closes", "right eyelids", side="right")
    for unit in [wink, *CATALOGUE.values()]:
        assert unit.mirrored().mirrored() == unit


@pytest.mark.parametrize("task", TASKS)
def test_description_has_the_papers_three_parts(task):
    units = select(None, task)
    lines = describe(task).splitlines()
    assert lines[0].startswith("Task: ")
    assert lines[1] == "Action Units:"
    assert len(lines) == len(units) + 3
    for line, unit in zip(lines[2:-1], units, strict=True):
        assert line.startswith(f"{unit.code} {unit.name}")
        assert unit.action in line and unit.region in line
    assert lines[-1].startswith(f"Output format: an array of {len(units)} numbers")


def test_tasks_differ_only_in_the_first_and_last_part():
    texts = [describe(task, "bp4d").splitlines() for task in TASKS]
    for one, other in itertools.combinations(texts, 2):
        assert one[1:-1] == other[1:-1]
        assert one[0] != other[0] and one[-1] != other[-1]


def test_relations_and_user_units_enter_the_description():
    wink = ActionUnit("WINK", "Wink", "one eye closes", "eyelids")
    text = describe("detection", ["AU12", wink], relations="AU6 often comes with AU12.")
    assert "WINK Wink: one eye closes. Look at the eyelids." in text
    assert "AU6 often comes with AU12." in text


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("[0, 2]", "detection"),
        ("[0]", "detection"),
        ("[0, 1, 1]", "detection"),
        ("0, 1", "detection"),
        ("[0, 6]", "intensity_level"),
        ("[0.5, 1]", "intensity_level"),
        ("[0.5, 1.01]", "intensity"),
        ("[nan, 0.10]", "intensity"),
        ("[0, 1] and more", "detection"),
        ("[[0, 1]]", "detection"),
        ("", "detection"),
    ],
)
def test_wrong_answers_are_refused(text, task):
    with pytest.raises(ValueError, match=r"answer"):
        parse_answer(text, task, select("AU1,AU2"))


@pytest.mark.parametrize("value", [math.nan, -0.01, 1.01, math.inf])
def test_impossible_labels_are_refused_by_name(value):
    with pytest.raises(ValueError, match="AU2"):
        write_answer([0.0, value], "intensity", select("AU1,AU2"))


def test_unknown_labels_are_left_out_of_the_question():
    values, units = known([1, math.nan, 0], select("AU1,AU2,AU4"))
    assert values == [1, 0] and [unit.code for unit in units] == ["AU1", "AU4"]


def test_selection_accepts_presets_strings_lists_and_units():
    wink = ActionUnit("WINK", "Wink", "one eye closes", "eyelids")
    assert [unit.code for unit in select("au1, AU12")] == ["AU1", "AU12"]
    assert len(select("FEAFA")) == 24
    assert len(select(None, "intensity_level")) == 12
    assert [unit.code for unit in select(["AU1", wink])] == ["AU1", "WINK"]
    assert select(["bp4d"]) == select("bp4d") and len(select("bp4d, AU25")) == len(select(["bp4d", "AU25"])) == 13
    other = SimpleNamespace(**vars(wink))  # as of the class that came with a model from the Hub
    assert select(other) == select([other]) == [wink]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("AU99", "Unknown Action Unit 'AU99'.*bp4d"),
        (["AU1", "AU1"], "more than once: AU1"),
        ([6, 12], "Unknown Action Unit 6; accepted: AU1"),
        ("bp4d,AU12", "more than once: AU12"),
        ([], "empty"),
        ("", "empty"),
    ],
)
def test_bad_selections_say_what_is_accepted(choice, message):
    with pytest.raises(ValueError, match=message):
        select(choice)


def test_unknown_task_says_what_is_accepted():
    with pytest.raises(ValueError, match="'smile'.*detection, intensity_level, intensity"):
        describe("smile")


@pytest.mark.parametrize(
    "fields",
    [("A B", "n", "a", "r"), ("", "n", "a", "r"), ("X", " ", "a", "r"), ("X", "n", "a", "r", (), "top")],
)
def test_user_units_are_checked(fields):
    with pytest.raises(ValueError, match="ActionUnit"):
        ActionUnit(*fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"muscles": "zygomaticus major"}, "muscles is 'zygomaticus major'; give a tuple of names"),
        ({"action": "one eye\ncloses"}, "line break or <image>; leave it out"),
        ({"region": "<image>"}, "line break or <image>; leave it out"),
    ],
)
def test_a_user_unit_cannot_spoil_the_description(fields, told):
    with pytest.raises(ValueError, match=told):
        ActionUnit(**{"code": "X", "name": "n", "action": "a", "region": "r"} | fields)
