import math

import numpy as np
import pytest
from dataset_trees import bp4d_tree, shade, write_occurrence

from au_llava.action_units import PRESETS, parse_answer, select
from au_llava.datasets_scripts.bp4d import (
    INTENSITY_UNITS,
    PARTS,
    PUBLISHED,
    SUBJECTS,
    Bp4d,
    find_recordings,
    main,
    read_intensity,
    read_occurrence,
)
from au_llava.datasets_scripts.builder import part_of_fold
from au_llava.datasets_scripts.disfa import Disfa
from au_llava.datasets_scripts.preparation import Settings, prepare


AU = PRESETS["bp4d"].index


@pytest.fixture
def tree(tmp_path):
    return bp4d_tree(tmp_path / "BP4D")


def load(tree, tmp_path, name="fold1", **options):
    builder = Bp4d(config_name=name, data_dir=str(tree), cache_dir=str(tmp_path / "cache"), detector="none", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_folds_hold_each_of_the_41_subjects_once():
    everyone = [f"F{n:03d}" for n in range(1, 24)] + [f"M{n:03d}" for n in range(1, 19)]
    assert sorted(subject for part in PARTS for subject in part) == everyone == list(SUBJECTS)
    assert [len(part) for part in PARTS] == [14, 14, 13]
    jaanet = [part_of_fold(f"fold{fold}", "jaanet") for fold in (1, 2, 3)]
    assert jaanet == [part_of_fold(f"fold{fold}", "megraphau") for fold in (3, 2, 1)] == [0, 1, 2]


def test_published_counts_add_up():
    for source, sums in {"JAANet": (50601, 50166, 45809), "ME-GraphAU, MDHR and FMAE": (50631, 50182, 46034)}.items():
        assert tuple(sum(PUBLISHED[source][subject] for subject in part) for part in PARTS) == sums


def test_code_9_is_unknown_and_other_columns_do_not_matter(tree):
    problems = []
    numbers, labels = read_occurrence(tree / "AUCoding" / "AU_OCC" / "M011_T1.csv", problems)
    assert numbers == [5, 6] and labels.shape == (2, 12) and not problems
    assert math.isnan(labels[0, AU("AU7")]) and np.nansum(labels[0]) == 0
    assert [PRESETS["bp4d"][i] for i in np.flatnonzero(labels[1])] == ["AU1", "AU24"]


def test_columns_go_by_name_and_without_a_header_by_position(tmp_path):
    path, problems = tmp_path / "F001_T1.csv", []
    path.write_text("\ufeff0, AU24, 23,17,15,14,12,10,7,6,4,2,1 \r\n\r\n7, 1,0,0,0,0,0,0,0,0,0,1,0\r\n , ,\r\n")
    numbers, labels = read_occurrence(path, problems)
    assert numbers == [7] and set(np.flatnonzero(labels[0])) == {AU("AU24"), AU("AU2")} and not problems
    cells = [0] * 25
    cells[0], cells[6], cells[24] = 31, 1, 9
    path.write_text(",".join(map(str, cells)) + "\n")
    numbers, labels = read_occurrence(path, problems)
    assert numbers == [31] and labels[0, AU("AU6")] == 1 and math.isnan(labels[0, AU("AU24")]) and not problems


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("4,0,0,0,0,0,0,2,0,0,0,0,0", ":4: '2' is none of 0, 1, 9"),
        ("4,0,0,0,nan,0,0,0,0,0,0,0,0", ":4: 'nan' is none of 0, 1, 9"),
        ("4,0,0,0,,0,0,0,0,0,0,0,0", ":4: '' is none of 0, 1, 9"),
        ("4,0,0,0", ":4: 4 cells; 13 are needed"),
        ("2,0,0,0,0,0,0,0,0,0,0,0,0", ":4: frame 2 stands there twice"),
        ("x,0,0,0,0,0,0,0,0,0,0,0,0", ":4: 'x' is no frame number; frames are counted from 1"),
        ("0,0,0,0,0,0,0,0,0,0,0,0,0", ":4: '0' is no frame number; frames are counted from 1"),
    ],
)
def test_damaged_lines_are_named_and_tell_nothing(tmp_path, line, complaint):
    path, problems = tmp_path / "F001_T1.csv", []
    good = ",0" * 12
    path.write_text(f"0,1,2,4,6,7,10,12,14,15,17,23,24\n1{good}\n2{good}\n{line}\n5{good}\n")
    numbers, labels = read_occurrence(path, problems)
    assert labels.shape == (len(numbers), 12) and set(numbers) <= {1, 2, 4, 5}
    assert [number for number, row in zip(numbers, labels, strict=True) if not np.isnan(row).all()] == [1, 2, 5]
    assert problems == [f"{path}{complaint}"]


def test_a_missing_column_or_an_empty_file_is_named(tmp_path):
    path, problems = tmp_path / "F001_T1.csv", []
    path.write_text("0,1,2,4,6,7,10,14,15,17,23\n1,0,0,0,0,0,0,0,0,0,0\n")
    assert read_occurrence(path, problems)[0] == []
    path.write_text("")
    assert read_occurrence(path, problems)[0] == []
    assert problems == [f"{path}:1: no column for AU 12, 24", f"{path}: no lines"]


def test_intensities_are_read_with_or_without_a_header(tmp_path):
    path, problems = tmp_path / "F001_T1_AU06.csv", []
    for header in ("", "frame,AU06\n"):
        path.write_text(header + "1,0\n2,5\n3,9\n")
        numbers, levels = read_intensity(path, problems)
        assert numbers == [1, 2, 3] and levels[:2, 0].tolist() == [0, 5] and math.isnan(levels[2, 0])
    path.write_text("1,6\n2,5\n")
    numbers, levels = read_intensity(path, problems)
    assert numbers == [1, 2] and math.isnan(levels[0, 0]) and levels[1, 0] == 5
    assert problems == [f"{path}:1: '6' is none of 0, 1, 2, 3, 4, 5, 9"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("9,?", "'?' is none of 0, 1, 2, 3, 4, 5, 9"),
        ("9,-1", "'-1' is none of 0, 1, 2, 3, 4, 5, 9"),
        ("9,", "'' is none of 0, 1, 2, 3, 4, 5, 9"),
        ("9", "1 cells; 2 are needed"),
        (",3", "'' is no frame number; frames are counted from 1"),
        ("-9,3", "'-9' is no frame number; frames are counted from 1"),
    ],
)
def test_a_damaged_first_line_is_no_header(tmp_path, line, complaint):
    path, problems = tmp_path / "F001_T1_AU06.csv", []
    path.write_text(f"{line}\n10,3\n")
    numbers, levels = read_intensity(path, problems)
    assert numbers[-1] == 10 and levels[-1, 0] == 3 and np.isnan(levels[:-1]).all()
    assert problems == [f"{path}:1: {complaint}"]


def test_a_comma_at_the_end_of_each_line_costs_no_frame(tmp_path):
    path, problems = tmp_path / "F001_T1_AU06.csv", []
    for header in ("", "frame,AU06,\n"):
        path.write_text(header + "9,3,\n10,2,\n")
        numbers, levels = read_intensity(path, problems)
        assert numbers == [9, 10] and levels[:, 0].tolist() == [3, 2] and not problems


def test_frames_are_found_under_any_padding_and_missing_ones_reported(tree):
    found = {recording.sequence: recording for recording in find_recordings(tree)}
    assert list(found) == ["F001_T1", "F007_T8", "M007_T2", "M011_T1"]
    assert [path.name for path in found["F001_T1"].images] == ["009.jpg", "010.jpg", "011.jpg"]
    assert found["M007_T2"].numbers == (1, 3) and found["M007_T2"].left_out == ((2, "no picture in T2"),)
    assert found["M011_T1"].images[0].name == "5.jpg" and found["F007_T8"].images[0].name == "1200.jpg"
    assert [round(shade(image)) for _, image, _ in found["M007_T2"].pictures()] == [51, 53]


def test_two_pictures_of_one_frame_are_not_chosen_from(tree):
    folder = tree / "Sequences(2D+3D)" / "F001" / "T1"
    (folder / "0010.jpg").write_bytes((folder / "010.jpg").read_bytes())
    recording = find_recordings(tree)[0]
    assert recording.numbers == (9, 11) and recording.left_out == ((10, "2 pictures: 0010.jpg, 010.jpg"),)


def test_all_damaged_labels_are_raised_at_once_or_left_out_on_purpose(tree, capsys):
    first = write_occurrence(tree, "F001_T2", {1: {1: 3}, 2: {}})
    second = write_occurrence(tree, "F099_T1", {1: {}})
    with pytest.raises(ValueError) as error:
        find_recordings(tree)
    assert f"{first}:2: '3' is none of" in str(error.value) and f"{second}: F099 is none of" in str(error.value)
    assert "2 problem(s)" in str(error.value) and "skip_bad_labels" in str(error.value)
    left = {recording.sequence: recording for recording in find_recordings(tree, skip_bad_labels=True)}
    assert "F099_T1" not in left and len(left) == 5
    told = capsys.readouterr().err
    assert "2 problem(s) in the labels; what they are about is left out" in told
    assert f"{first}:2: '3' is none of" in told


def test_the_manifest_names_frames_with_damaged_labels(tree, tmp_path):
    write_occurrence(tree, "F001_T1", {9: {}, 10: {1: 3}, 11: {}})
    found = find_recordings(tree, skip_bad_labels=True)
    manifest, _ = prepare(found, tmp_path / "out", Settings("none"))
    assert {"sequence": "F001_T1", "why": "no known label", "frames": [10]} in manifest["left_out"]


def test_wrong_folders_and_tasks_are_refused(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="AUCoding/AU_OCC"):
        find_recordings(tmp_path)
    with pytest.raises(ValueError, match="no labels for task 'intensity'"):
        find_recordings(tree, "intensity")


def test_rows_of_a_fold(tree, tmp_path):
    data = load(tree, tmp_path)
    assert set(data["test"]["subject"]) == {"F001", "M007"} and set(data["train"]["subject"]) == {"F007", "M011"}
    frames = sorted(zip(data["test"]["sequence"], data["test"]["frame"], strict=True))
    assert frames == [("F001_T1", 9), ("F001_T1", 10), ("F001_T1", 11), ("M007_T2", 1), ("M007_T2", 3)]
    row = next(row for row in data["train"] if row["frame"] == 5)
    assert row["images"][0].size == (224, 224) and abs(shade(row["images"][0]) - 105) < 2
    assert row["action_units"] == list(PRESETS["bp4d"]) and math.isnan(row["labels"][AU("AU7")])
    assert (row["dataset"], row["task"], row["subject"], row["sequence"]) == ("bp4d", "detection", "M011", "M011_T1")
    question, answer = row["prompt"][0], row["completion"][0]
    assert question["role"] == "user" and "AU7 " not in question["content"] and "11 numbers" in question["content"]
    units = [unit for unit in select("bp4d") if unit.code != "AU7"]
    assert answer["role"] == "assistant" and parse_answer(answer["content"], "detection", units) == [0.0] * 11


def test_folds_by_the_other_naming_and_their_union(tree, tmp_path):
    tested = [set(load(tree, tmp_path, f"fold{fold}", naming="megraphau")["test"]["subject"]) for fold in (1, 2, 3)]
    assert tested == [{"F007"}, {"M011"}, {"F001", "M007"}]
    with pytest.raises(ValueError, match="Unknown naming"):
        load(tree, tmp_path, naming="eac")
    with pytest.raises(ValueError, match="one of fold1, fold2, fold3"):
        load(tree, tmp_path, None)


def test_intensity_levels_are_an_option(tree, tmp_path):
    data = load(tree, tmp_path, task="intensity_level")
    rows = {(row["sequence"], row["frame"]): row for split in data.values() for row in split}
    assert set(rows) == {("F001_T1", 9), ("F001_T1", 10), ("M007_T2", 1), ("M011_T1", 5), ("F007_T8", 1200)}
    row = rows["F001_T1", 9]
    assert row["action_units"] == list(INTENSITY_UNITS) and row["labels"][:4] == [3] * 4
    assert math.isnan(row["labels"][4]) and row["completion"][0]["content"] == "[3, 3, 3, 3]"


def test_the_cache_follows_labels_pictures_and_options(tree, tmp_path):
    def positives():
        return sum(sum(value == 1 for value in row["labels"]) for row in load(tree, tmp_path)["test"])

    assert positives() == 3 * 2 + 1
    write_occurrence(tree, "F001_T1", {n: {12: 1, 6: 1, 10: 1} for n in (9, 10, 11)})
    assert positives() == 3 * 3 + 1
    picture = tree / "Sequences(2D+3D)" / "M007" / "T2" / "0002.jpg"
    picture.write_bytes((picture.parent / "0001.jpg").read_bytes())
    assert positives() == 3 * 3 + 2
    assert len(load(tree, tmp_path, action_units="AU4")["test"][0]["labels"]) == 1
    with pytest.raises(ValueError, match="no labels for AU5"):
        load(tree, tmp_path, action_units="AU4,AU5")


def test_relations_come_from_training_subjects_only(tree, tmp_path):
    # AU6 and AU12 go together in F001, who is tested in fold 1 and trained on in fold 2.
    tested = load(tree, tmp_path, "fold1", relations=True)
    trained = load(tree, tmp_path, "fold2", relations=True)
    assert not any("when AU6 is active" in row["prompt"][0]["content"] for split in tested.values() for row in split)
    assert all("when AU6 is active" in row["prompt"][0]["content"] for split in trained.values() for row in split)


def test_the_command_prepares_and_says_how_counts_differ(tree, tmp_path, capsys):
    main(["--data_dir", str(tree), "--output_dir", str(tmp_path / "out"), "--detector", "none", "--workers", "1"])
    said = capsys.readouterr().out
    assert "8 crops of 4 subjects" in said
    assert "Left out: 1 frames of M007_T2: no picture in T2" in said
    assert "JAANet: 146576 frames; here 8 (-146568). F001: 3934 there, 3 here (-3931)" in said
    builder = Bp4d(config_name="fold3", crops_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert set(builder.as_dataset("test")["subject"]) == {"F007"}


def test_crops_of_another_task_or_data_set_are_refused(tree, tmp_path):
    prepare(find_recordings(tree), tmp_path / "out", Settings("none"))
    places = {"config_name": "fold1", "crops_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    for task in ("intensity_level", "detect"):
        with pytest.raises(ValueError, match=f"crops of bp4d with labels for detection.*for task '{task}'"):
            Bp4d(task=task, **places).download_and_prepare()
    with pytest.raises(ValueError, match="crops of bp4d .* rows of disfa"):
        Disfa(**places).download_and_prepare()
