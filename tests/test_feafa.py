import math
import os

import pytest
from dataset_trees import feafa_tree, save, shade, write_auw

from au_llava.action_units import PRESETS
from au_llava.datasets_scripts import csv_labels, disfa
from au_llava.datasets_scripts.csv_labels import CsvLabels, read_csv
from au_llava.datasets_scripts.feafa import PARTS, Feafa, find_recordings, in_random_test, main, read_auw
from au_llava.datasets_scripts.sources import Source


@pytest.fixture
def tree(tmp_path):
    return feafa_tree(tmp_path / "FEAFA")


def load(tree, tmp_path, name="paper", **options):
    builder = Feafa(
        config_name=name, data_dir=str(tree), cache_dir=str(tmp_path / "cache"), detector="none", **options
    )
    builder.download_and_prepare()
    return builder.as_dataset()


def test_folds_hold_each_of_the_127_videos_and_27_people_once():
    videos = [f"PV{n:03d}" for n in range(1, 128)]
    assert sorted(subject for part in PARTS for subject in part) == videos + sorted(disfa.SUBJECTS)
    assert [sum(subject.startswith("PV") for subject in part) for part in PARTS] == [42, 42, 43]


def test_a_label_file_holds_24_values(tmp_path):
    problems, values = [], [n / 100 for n in range(24)]
    assert read_auw(write_auw(tmp_path / "1.auw", values, "  \r\n\r\n"), problems).tolist() == values
    assert read_auw(write_auw(tmp_path / "2.auw", [1.000001] + [0] * 23), problems)[0] == 1 and not problems


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.5 " * 23, ":1: [23] numbers by line; one line of 24 is needed"),
        ("0.5 " * 24 + "\n" + "0.5 " * 24, ":1: [24, 24] numbers by line"),
        ("0.5 " * 23 + "1.01", ":1: 1.01 is not in 0 to 1"),
        ("0.5 " * 23 + "-0.2", ":1: -0.2 is not in 0 to 1"),
        ("\n" + "0.5 " * 23 + "nan", ":2: nan is not in 0 to 1"),
        ("0.5 " * 23 + "x", ":1: could not convert string to float: 'x'"),
        ("", ": no lines"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, complaint):
    path, problems = tmp_path / "00000001.auw", []
    path.write_text(text)
    assert read_auw(path, problems) is None
    assert len(problems) == 1 and problems[0].startswith(f"{path}{complaint}")


def test_labels_and_pictures_are_paired_wherever_they_lie(tree):
    found = {recording.sequence: recording for recording in find_recordings(tree)}
    assert list(found) == ["PV001", "PV003", "PV008"]
    assert found["PV001"].numbers == tuple(range(10)) and found["PV001"].left_out == ()
    assert [round(shade(image)) for _, image, _ in found["PV001"].pictures()] == list(range(10, 110, 10))
    assert found["PV008"].images[0].name == "3.png"
    assert found["PV003"].numbers == (0,) and found["PV003"].left_out == ((1, "no picture"), (2, "no label"))


def test_folders_that_are_links_are_read_once_and_one_video_by_itself(tree, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "videos").symlink_to(tree)
    (linked / "again").symlink_to(tree)
    (tree / "FEAFA-A" / "back").symlink_to(tree)
    numbers = {recording.sequence: recording.numbers for recording in find_recordings(tree)}
    assert {recording.sequence: recording.numbers for recording in find_recordings(linked)} == numbers
    [video] = find_recordings(tree / "FEAFA-A" / "PV001.output")
    assert (video.sequence, video.numbers) == ("PV001", numbers["PV001"])


def test_the_picture_beside_the_label_comes_first_and_others_are_not_chosen_from(tree):
    save(tree / "copies" / "PV001" / "00000004.png", 222)
    save(tree / "copies" / "PV008" / "00000003.png", 222)
    found = {recording.sequence: recording for recording in find_recordings(tree)}
    assert found["PV001"].images[4].parent.name == "PV001.output"
    assert found["PV008"].numbers == () and found["PV008"].left_out[0][1].startswith("2 pictures: ")


def test_a_video_without_any_label_is_told(tree):
    save(tree / "FEAFA-A" / "PV002.output" / "00000004.jpg", 40)
    found = {recording.sequence: recording for recording in find_recordings(tree)}
    assert found["PV002"].numbers == () and found["PV002"].left_out == ((4, "no label"),)


def test_a_folder_that_cannot_be_read_is_told(tree, monkeypatch, capsys):
    scan, closed = os.scandir, str(tree / "FEAFA-A" / "PV003.output")

    def refused(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [recording.sequence for recording in find_recordings(tree)] == ["PV001", "PV008"]
    assert capsys.readouterr().err == f"Passed over, for it cannot be read: {closed} (Permission denied).\n"


def test_parts_a_and_b(tree, tmp_path):
    assert [recording.sequence for recording in find_recordings(tree, "B")] == ["SN010"]
    assert len(find_recordings(tree, "AB")) == 4
    with pytest.raises(ValueError, match="part 'C'"):
        find_recordings(tree, "C")
    with pytest.raises(FileNotFoundError, match="PV001.output"):
        find_recordings(tree / "pictures")


def test_crops_of_part_b_say_which_option_takes_them(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save(tree / "FEAFA-B" / "SN002.output" / "00000007.jpg", 60)
    write_auw(tree / "FEAFA-B" / "SN002.output" / "00000007.auw", [0.5] * 24)
    write_auw(tree / "FEAFA-B" / "SN013.output" / "00000007.auw", [0.5] * 24)
    save(tree / "FEAFA-B" / "SN013.output" / "00000007.jpg", 60)
    main(["--data_dir", str(tree), "--output_dir", str(tmp_path / "b"), "--part", "B", "--detector", "none",
          "--workers", "1"])  # fmt: skip
    source = f"feafa:{tmp_path / 'b'}?config_name=subject"
    with pytest.raises(ValueError, match=r"train \(0 rows\), test \(0 rows\). Give options .* FEAFA's part=B"):
        Source(source).rows()
    assert [len(Source(f"{source}&part=B").rows(split)[0]) for split in ("train", "test")] == [1, 2]


def test_all_problems_are_raised_at_once_or_left_out_on_purpose(tree):
    bad = write_auw(tree / "FEAFA-A" / "PV001.output" / "00000002.auw", [2.0] * 24)
    twice = write_auw(tree / "again" / "PV001.output" / "00000005.auw", [0.0] * 24)
    write_auw(tree / "FEAFA-A" / "PV128.output" / "00000000.auw", [0.0] * 24)
    with pytest.raises(ValueError) as error:
        find_recordings(tree)
    assert f"{bad}:1: 2 is not in 0 to 1" in str(error.value) and "PV128 is no sequence" in str(error.value)
    assert f"{twice}: a second label file" in str(error.value) and "3 problem(s)" in str(error.value)
    assert len(find_recordings(tree, skip_bad_labels=True)) == 3
    kept = find_recordings(tree, skip_bad_labels=True)[0]
    assert kept.numbers == (0, 1, 3, 4, 6, 7, 8, 9) and (2, "damaged label") in kept.left_out


def test_the_random_split_is_four_to_one_and_fixed():
    tested = [in_random_test(f"PV{n // 500:03d}", n % 500) for n in range(20_000)]
    assert 0.19 < sum(tested) / len(tested) < 0.21
    assert tested != [in_random_test(f"PV{n // 500:03d}", n % 500, seed=1) for n in range(20_000)]


def test_rows_of_the_papers_split(tree, tmp_path):
    data = load(tree, tmp_path)
    rows = {(row["sequence"], row["frame"]): (split, row) for split in data for row in data[split]}
    assert len(rows) == 12 and all(
        split == ("test" if in_random_test(*key) else "train") for key, (split, _) in rows.items()
    )
    row = rows["PV001", 7][1]
    assert row["action_units"] == list(PRESETS["feafa"]) and row["labels"] == [0.7] * 24
    assert row["completion"][0]["content"] == "[" + ", ".join(["0.70"] * 24) + "]"
    assert (row["dataset"], row["task"], round(shade(row["images"][0]))) == ("feafa", "intensity", 80)


def test_subjects_are_in_one_split_only(tree, tmp_path):
    tested = [set(load(tree, tmp_path, "subject", fold=fold, part="AB")["test"]["subject"]) for fold in (1, 2, 3)]
    assert tested == [{"PV008", "SN010"}, {"PV003"}, {"PV001"}]
    with pytest.raises(ValueError, match="no fold 4"):
        load(tree, tmp_path, "subject", fold=4)
    with pytest.raises(ValueError, match="Unknown part 'b' of FEAFA.; accepted: A, B, AB"):
        load(tree, tmp_path, "subject", part="b")


def test_prepared_parts_can_be_told_apart_later(tree, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--data_dir", str(tree), "--output_dir", str(out), "--detector", "none", "--workers", "1", "--part", "AB"])
    said = capsys.readouterr().out
    assert "FEAFA+: 230184 frames; here 13 (-230171). PV: 99356 there, 12 here (-99344); SN: 130828 there, 1" in said
    for part, count in {"A": 12, "B": 1, "AB": 13}.items():
        builder = Feafa(config_name="paper", crops_dir=str(out), cache_dir=str(tmp_path / "cache"), part=part)
        builder.download_and_prepare()
        assert sum(split.num_examples for split in builder.info.splits.values()) == count


def test_a_csv_of_ones_own(tmp_path):
    for name, value in {"a1": 40, "a2": 80, "b1": 120}.items():
        save(tmp_path / "faces" / f"{name}.png", value)
    csv = tmp_path / "labels.csv"
    csv.write_text(
        "image,subject,split,AU1,AU12\r\nfaces/a1.png,anna,train,0,1\r\nfaces/a2.png,anna,train,1,\r\n"
        "faces/b1.png,ben,test,1,1\r\nfaces/gone.png,ben,test,0,0\r\n"
    )

    def load_csv(**options):
        builder = CsvLabels(
            data_dir=str(csv), cache_dir=str(tmp_path / "cache"), crops_dir=str(tmp_path / "crops"), detector="none",
            **options,
        )  # fmt: skip
        builder.download_and_prepare()
        return builder.as_dataset()

    data = load_csv()
    assert [row["completion"][0]["content"] for row in data["train"]] == ["[0, 1]", "[1]"]
    assert math.isnan(data["train"][1]["labels"][1]) and data["test"]["subject"][:] == ["ben"]
    assert '"no file' in (tmp_path / "crops" / "manifest.json").read_text()
    # Other splits of the same pictures make other rows.
    csv.write_text(csv.read_text().replace("anna,train", "anna,test").replace("ben,test", "ben,train"))
    assert load_csv()["train"]["subject"][:] == ["ben"]
    csv.write_text("image,AU1,AU99\nfaces/a1.png,0,1\n")
    with pytest.raises(ValueError, match=r"labels.csv:1: the header .*AU99"):
        load_csv()
    csv.write_text("image,AU1\nfaces/a1.png,0.5\nfaces/a2.png,1,1\nfaces/b1.png,1\nfaces/b1.png,2\n")
    with pytest.raises(ValueError, match=r"3 problem(?s:.)*:2: '0.5' is no value of detection"):
        load_csv()


def test_a_csv_from_other_programs(tmp_path):
    """R quotes every text and writes NA; spreadsheets of some countries put semicolons between cells."""
    csv, problems = tmp_path / "labels.csv", []
    csv.write_text('"image","subject","AU1","AU12"\n"faces, all/a.png","anna",1,\n"b ""B"".png", "ben" ,0,1\n')
    codes, rows = read_csv(csv, "detection", problems)
    assert codes == ["AU1", "AU12"] and not problems
    assert [(row["image"].name, row["subject"]) for row in rows] == [("a.png", "anna"), ('b "B".png', "ben")]
    assert rows[0]["image"].parent.name == "faces, all" and math.isnan(rows[0]["labels"][1])
    csv.write_text("image,AU1\na.png,NA\n")
    read_csv(csv, "detection", problems)
    assert len(problems) == 1 and "labels.csv:2: 'NA' is no value of detection" in problems[0]
    assert "leave the cell empty where it is unknown" in problems[0]
    csv.write_text("image;AU1\na.png;1\n")
    read_csv(csv, "detection", problems)
    assert len(problems) == 2 and "with commas between them" in problems[1]
    csv.write_text('image,AU1\n"' + "a" * 200_000 + ",1\n")  # more than a cell, or a file's name, may hold
    [recording] = csv_labels.find_recordings(csv)
    assert not recording.images and recording.left_out[0][1].startswith("no file")


def test_a_csv_needs_no_more_than_pictures_and_labels(tmp_path):
    csv, name = tmp_path / "labels.csv", "/".join(["\u8868\u60c5" * 10] * 3)
    save(tmp_path / name / "1.png", 40)
    save(tmp_path / name / "2.png", 80)
    csv.write_text(f"image,AU1\n{name}/1.png,0\n{name}/2.png,1\n", encoding="utf-8")
    main = ["--data_dir", str(csv), "--detector", "none", "--workers", "1", "--output_dir"]
    csv_labels.main([*main, str(tmp_path / "pictures")])
    names = [path.name for path in (tmp_path / "pictures" / "data").iterdir()]
    assert len(set(names)) == 2 and all(len(name) < 140 for name in names)
    csv.write_text(f"image,sequence,AU1\n{name}/1.png,film,0\n{name}/2.png,film,1\n", encoding="utf-8")
    csv_labels.main([*main, str(tmp_path / "film")])
    assert [path.name for path in (tmp_path / "film" / "data").iterdir()] == ["film-00000.parquet"]


def test_two_people_may_have_recordings_of_one_name(tmp_path):
    csv, lines = tmp_path / "labels.csv", ["image,subject,sequence,frame,split,AU1"]
    for value, (name, split) in enumerate({"anna": "train", "ben": "test", "cleo": "train"}.items()):
        for sequence, frame in (("T1", 1), ("T1", 2), ("T2", 1), ("T2", 2)):
            save(tmp_path / sequence / f"{name}{frame}.png", 40 + 80 * value)
            lines.append(f"{sequence}/{name}{frame}.png,{name},{sequence},{frame},{split},1")
    csv.write_text("\n".join([*lines, "dan.png,dan,T3,1,train,0"]))
    save(tmp_path / "dan.png", 250)
    builder = CsvLabels(data_dir=str(csv), cache_dir=str(tmp_path / "cache"), detector="none")
    builder.download_and_prepare()
    data = builder.as_dataset()
    assert {(row["subject"], row["images"][0].getpixel((9, 9))[0]) for row in data["train"]} == {
        ("anna", 40), ("cleo", 200), ("dan", 250)
    }  # fmt: skip
    assert (len(data["train"]), len(data["test"])) == (9, 4) and set(data["test"]["subject"]) == {"ben"}
    assert set(data["train"]["sequence"]) == {"anna/T1", "anna/T2", "cleo/T1", "cleo/T2", "T3"}


def test_nobody_is_in_both_splits_and_no_frame_stands_twice(tmp_path):
    csv = tmp_path / "labels.csv"
    csv.write_text("image,subject,split,AU1\na.png,anna,train,0\nb.png,ben,train,0\nc.png,anna,test,1\n")
    for skip in (False, True):
        with pytest.raises(ValueError, match="labels.csv: anna in the splits train and test"):
            csv_labels.find_recordings(csv, skip_bad_labels=skip)
    csv.write_text("image,subject,frame,AU1\na.png,anna,7,0\nb.png,ben,7,0\nc.png,anna,7,1\n")
    with pytest.raises(ValueError, match="labels.csv:4: frame 7 of anna stands there twice"):
        csv_labels.find_recordings(csv)
    recording, _ = csv_labels.find_recordings(csv, skip_bad_labels=True)
    assert "a.png" in recording.left_out[0][1] and len(recording.left_out) == 1, "the first of the two stays"
    csv.write_text("image,AU1\na.png,7\na.png,1\n")  # the first cannot be read
    (recording,) = csv_labels.find_recordings(csv, skip_bad_labels=True)
    assert len(recording.left_out) == 1 and "no file" in recording.left_out[0][1]
    csv.write_text("image,subject,split,AU1\na.png,anna,train,0\n./a.png,ben,test,1\n,cleo,train,1\n")
    with pytest.raises(ValueError, match=r"csv:3: ./a.png stands in line 2, too(?s:.*)csv:4: the cell of `image` is"):
        csv_labels.find_recordings(csv)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"image,age,AU1\na.png,31,0\n", r"1 problem(?s:.*)needs `image` .* may be there, too; leave out 'age'"),
        (b",image,AU1\n0,a.png,0\n", r"leave out ''$"),
        ("image,AU1\nGr\xfcn.png,0\n".encode("cp1252"), r"1 problem(?s:.*)is not written in UTF-8 .*; save it so$"),
        (None, r"1 problem(?s:.*)labels.csv: cannot be read .*No such file"),
    ],
)
def test_a_csv_that_cannot_be_read_is_one_problem(tmp_path, content, told):
    csv = tmp_path / "labels.csv"
    if content is not None:
        csv.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        csv_labels.find_recordings(csv)


def test_an_unknown_task_is_no_fault_of_the_csv(tmp_path):
    (tmp_path / "labels.csv").write_text("image,AU1\na.png,0\n")
    with pytest.raises(ValueError, match="^Unknown task 'guess'"):
        csv_labels.find_recordings(tmp_path / "labels.csv", task="guess")


def test_about_a_fifth_of_a_csvs_people_is_tested(tmp_path):
    csv, splits = tmp_path / "labels.csv", {}
    for people in (*range(1, 9), 200):  # none of the first eight is drawn
        csv.write_text("image,subject,AU1\n" + "".join(f"{n}.png,p{n // 2},0\n" for n in range(2 * people)))
        _, rows = read_csv(csv, "detection", [])
        splits[people] = {row["subject"]: row["split"] for row in rows}
        assert all(row["split"] == splits[people][row["subject"]] for row in rows)
    assert [list(own.values()).count("test") for own in splits.values()] == [0, 1, 1, 1, 1, 1, 1, 1, 37]
    csv.write_text("image,subject,AU1\n" + "".join(f"{n}.png,p{n},0\n" for n in range(50, 150)))
    assert {row["subject"]: row["split"] for row in read_csv(csv, "detection", [])[1]}.items() < splits[200].items()
