"""The command line: what goes in, what comes out, and what is left when something goes wrong."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pyarrow import parquet
from skimage.data import astronaut

from au_llava.__main__ import main
from au_llava.action_units import PRESETS, TASKS, describe, select
from au_llava.demo import ASTRONAUT, pictures
from au_llava.face_alignment import open_image
from au_llava.inputs import described, expand
from au_llava.journal import Journal
from au_llava.photos import load_pipeline, provenance
from au_llava.tables import openface_columns, write_table


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three pictures, two of them below a folder, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("in/a.png", "in/sub/b.jpg", "in/sub/c.JPEG")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((200, 240)).save(name)
    return ["in/a.png", "in/sub/b.jpg", "in/sub/c.JPEG"]


@pytest.fixture
def au(folder, capsys):
    """Run `au-llava` here; its exit code, standard output and standard error."""

    def run(*arguments, model=folder, detector="none"):
        code = main([*arguments, "--model", model, "--detector", detector])
        return code, *capsys.readouterr()

    return run


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_describe_prints_the_text_description(capsys):
    assert main(["describe", "--task", "intensity", "--action-units", "FEAFA1,FEAFA2"]) == 0
    assert capsys.readouterr().out == describe("intensity", "FEAFA1,FEAFA2") + "\n"


def test_a_level_that_is_a_mean_is_a_real_number_in_every_table(au, photos, folder):
    shutil.copytree(folder, "model")
    place = Path("model", "processor_config.json")
    own = {"calibration": {"intensity_level": {"decision": "mean"}}}
    place.write_text(json.dumps(json.loads(place.read_text()) | own))
    for name in ("t.parquet", "t.jsonl"):
        au("recognize", photos[0], "--task", "intensity_level", "--output", name, model="model")
    (found,) = parquet.read_table("t.parquet").to_pylist()
    assert found == json.loads(Path("t.jsonl").read_text())
    level = found["AU12_intensity_level"]
    assert level == found["AU12_intensity_level_expected"] != int(level)


def test_openface_calls_a_mean_present_or_absent(tmp_path):
    chosen = openface_columns([("detection", select("AU1,AU2"))])
    face = {"file": "a.png", "status": "ok", "face": 1, "AU1_detection": 0.73, "AU2_detection": 0.27}
    for name, read in (("t.csv", None), ("t.parquet", parquet.read_table)):
        write_table(tmp_path / name, [face, {"file": "b.png", "status": "no face"}], chosen, {})
        if read:
            assert read(tmp_path / name).column("AU01_c").to_pylist() == [1, None]
            assert read(tmp_path / name).column("AU02_c").to_pylist() == [0, None]
        else:
            assert (tmp_path / name).read_text().splitlines()[1].startswith("1,0,0.0,,1,1,0,")


@pytest.mark.parametrize("command", [[], ["recognize"], ["demo"], ["describe"], ["doctor"]])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0 and "exit codes" in capsys.readouterr().out


def test_a_table_to_read(au, photos):
    code, out, _ = au("recognize", photos[0], "--task", "all")
    assert code == 0
    lines = out.strip().splitlines()
    assert lines[0] == "in/a.png, face 1 of 1, the whole picture"
    asked = {unit.code for task in TASKS for unit in select(None, task)}
    assert {line.split()[0] for line in lines[2:]} == asked
    assert re.search(
        r"^AU12 +Lip Corner Puller +(yes|no ) \([01]\.\d\d\) +[0-5] \([0-5]\.\d\d\) +\.$", out, re.MULTILINE
    )
    assert re.search(r"^FEAFA9 +Jaw Drop +\. +\. +[01]\.\d\d \([01]\.\d\d\)$", out, re.MULTILINE)


def test_all_formats_hold_what_the_pipeline_answers(au, folder, photos):
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert (
            au("recognize", "in", "--task", "intensity_level", "--action-units", "AU1,AU12", "--output", name)[0] == 0
        )
    lines = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert lines == parquet.read_table("t.parquet").to_pylist()
    assert [{k: "" if v is None else str(v) for k, v in line.items()} for line in lines] == read("t.csv")

    answers = load_pipeline(folder)(photos, task="intensity_level", action_units="AU1,AU12", detector="none")
    assert [line["file"] for line in lines] == photos
    for line, [face] in zip(lines, answers, strict=True):
        assert line["status"] == "ok" and line["face"] == 1 and line["box_x0"] is None
        for code, unit in face["action_units"].items():
            assert line[f"{code}_intensity_level"] == unit["value"]
            assert line[f"{code}_intensity_level_probability"] == pytest.approx(unit["probability"], abs=1e-4)
            assert line[f"{code}_intensity_level_expected"] == pytest.approx(unit["expected_value"], abs=1e-4)


def test_answers_in_one_pass(au, folder, photos):
    assert au("recognize", photos[0], "--task", "intensity", "--readout", "parallel", "--output", "t.jsonl")[0] == 0
    [line] = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    answers = {}
    for readout in ("exact", "parallel"):
        [face] = load_pipeline(folder)(photos[0], task="intensity", detector="none", readout=readout)
        answers[readout] = [unit["expected_value"] for unit in face["action_units"].values()]
    means = [line[f"FEAFA{number}_intensity_expected"] for number in range(1, 25)]
    assert means == pytest.approx(answers["parallel"], abs=1e-4) and means != pytest.approx(answers["exact"], abs=1e-4)
    about = json.loads(Path("t.jsonl.columns.json").read_text())["produced by"]
    assert about["read-out"] == "parallel" and about["mirror images"] == "not asked about"


def test_mirror_images_are_asked_about_on_demand(au, folder, photos):
    said = {}
    for option in ("--mirror", "--no-mirror"):
        assert au("recognize", photos[0], "--task", "intensity", option, "--output", "t.jsonl")[0] == 0
        said[option] = json.loads(Path("t.jsonl").read_text())["FEAFA1_intensity_expected"]
        [face] = load_pipeline(folder)(photos[0], task="intensity", detector="none", mirror=option == "--mirror")
        assert said[option] == pytest.approx(face["action_units"]["FEAFA1"]["expected_value"], abs=1e-4)
    assert said["--mirror"] != pytest.approx(said["--no-mirror"], abs=1e-3)


def test_every_column_is_described(au, photos):
    au("recognize", photos[0], "--task", "all", "--output", "t.parquet")
    told = json.loads(Path("t.parquet.columns.json").read_text())
    schema = parquet.read_schema("t.parquet")
    assert [column["name"] for column in told["columns"]] == schema.names
    assert [column["type"].replace("float64", "double") for column in told["columns"]] == [
        str(t) for t in schema.types
    ]
    by_name = {column["name"]: column for column in told["columns"]}
    assert by_name["AU12_intensity_level"]["range"] == "0 to 5"
    assert by_name["FEAFA3_intensity"]["range"] == "0.00 to 1.00"
    assert "Lip Corner Puller" in by_name["AU12_detection"]["description"]
    assert by_name["time"]["unit"] == "second" and by_name["box_x0"]["unit"] == "pixel"
    assert "transformers" in told["produced by"]["versions"] and len(told["produced by"]["weights SHA-256"]) == 16
    assert schema.field("time").metadata[b"unit"] == b"second"


def test_thresholds_are_told_where_the_model_has_them(folder, monkeypatch):
    pipe = load_pipeline(folder)
    assert not any("probability" in name for name in provenance(pipe, "none"))
    monkeypatch.setattr(pipe.processor, "calibration", {"detection": {"thresholds": {"AU1": 0.3228, "AU12": 0.4}}})
    told = provenance(pipe, "none")["present from a probability of"]
    assert told == "AU1 0.32, AU12 0.40; other units 0.50"


def test_bad_inputs_are_reported_and_lose_nothing(au, photos):
    Path("in/broken.png").write_bytes(Path("in/a.png").read_bytes()[:300])
    Path("in/zero.jpg").touch()
    Path("nothing").mkdir()
    code, _, err = au("recognize", "in", "missing.png", "nothing", "*.tiff", "--output", "t.csv")
    assert code == 1
    rows = {row["file"]: row for row in read("t.csv")}
    failed = {"in/broken.png", "in/zero.jpg", "missing.png", "nothing", "*.tiff"}
    assert set(rows) == failed | set(photos)
    for name, row in rows.items():
        assert (row["status"], name in row["error"]) == (("failed", True) if name in failed else ("ok", False))
        assert name not in failed or name in err
    assert all(rows[name]["AU12_detection"] in ("0", "1") for name in photos)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_is_no_text_is_told_by_its_bytes(folder, photos, capfd):
    Path(os.fsdecode(b"in/m\xfcller.png")).write_bytes(Path("in/a.png").read_bytes())
    for name in (b"in/z\xfc.mp4", b"in/zero\xfc.jpg"):
        Path(os.fsdecode(name)).touch()
    common = ["--model", folder, "--detector", "none"]
    for output in ("t.csv", "t.jsonl", "t.parquet"):
        assert main(["recognize", "in", "--overlay", "drawn", "--output", output, *common]) == 1
    found = parquet.read_table("t.parquet").to_pylist()
    assert [(row["file"], row["status"]) for row in found] == [
        ("in/a.png", "ok"), (r"in/m\udcfcller.png", "ok"), ("in/sub/b.jpg", "ok"), ("in/sub/c.JPEG", "ok"),
        (r"in/zero\udcfc.jpg", "failed"), (r"in/z\udcfc.mp4", "failed"),
    ]  # fmt: skip
    assert r"in/zero\udcfc.jpg: no picture" in found[4]["error"] and r"in/z\udcfc.mp4: no video" in found[5]["error"]
    assert [row["file"] for row in read("t.csv")] == [row["file"] for row in found]
    assert Path("drawn", os.fsdecode(b"m\xfcller.png.png")).is_file()
    assert main(["recognize", os.fsdecode(b"in/m\xfcller.png"), *common]) == 0
    assert r"in/m\udcfcller.png, face 1" in capfd.readouterr().out


def test_a_picture_without_a_face_is_no_failure(au, photos):
    Image.new("RGB", (120, 120), "#7f7f7f").save("grey.png")
    code, out, _ = au("recognize", "grey.png", detector="cascade")
    assert code == 0 and out == "grey.png: no face found\n\n"
    au("recognize", "grey.png", "--output", "t.csv", detector="cascade")
    [row] = read("t.csv")
    assert row["status"] == "no face" and row["face"] == "" and row["AU12_detection"] == ""


def test_a_real_photograph(au, photos):
    Image.fromarray(astronaut()).save("astronaut.png")
    code, out, _ = au("recognize", "astronaut.png", "--max-faces", "1", "--overlay", "drawn", "--output", "-",
                      detector="cascade")  # fmt: skip
    row = json.loads(out)
    x0, y0, x1, y1 = (row[f"box_{side}"] for side in ("x0", "y0", "x1", "y1"))
    assert code == 0 and x0 < 224 < x1 and y0 < 110 < y1 and x1 - x0 < 200
    with Image.open("drawn/astronaut.png.png") as drawn:
        assert drawn.width == 560 and drawn.height > 700


def test_inputs_are_found_everywhere_once(photos, monkeypatch):
    Path("in/.hidden.png").touch()
    Path("in/notes.txt").touch()
    Path("in/drawn").mkdir()
    Path("in/drawn/a.png").touch()
    assert expand(["in"], Path("in/drawn")) == photos
    assert expand(["in"], Path("in/drawn").absolute()) == photos
    absolute = [str(Path(name).absolute()) for name in photos]
    assert expand([str(Path("in").absolute())], Path("in/drawn")) == absolute
    assert expand(["in/**/*.jp*g", "in/a.png", "in/a.png"]) == ["in/sub/b.jpg", "in/a.png"]
    assert expand(["in/**/a.png", "i*/s*"], Path("in/drawn")) == photos
    for folder in ("in", ".", "in/sub"):
        with pytest.raises(
            ValueError, match=re.escape(f"--overlay {folder} holds all of in/s*; name another folder.")
        ):
            expand(["in/s*"], Path(folder))
    with pytest.raises(ValueError, match="--overlay in holds all of in; name another folder"):
        expand(["in"], Path("in"))
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/a.png\n\n  in/sub\nhttps://example.org/x?y=1\n"))
    )
    assert expand(["-"]) == [*photos, "https://example.org/x?y=1"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/a.png\ncaf\xe9.jpg\n"), encoding="utf-8"))
    assert expand(["-"]) == ["in/a.png", os.fsdecode(b"caf\xe9.jpg")], "a name that is no UTF-8"
    with pytest.raises(ValueError, match="An input is an empty text"):
        expand([""])


def test_what_is_passed_over_is_told_by_its_ending(au, photos, capsys):
    for name in ("notes.txt", "sub/more.TXT", "IMG_1.CR3", "README", ".hidden.doc", ".git/config"):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).touch()
    assert expand(["in", "in/sub", "in/a.png"]) == photos
    told = "Passed over, for their endings are not those of pictures or videos: 2 .txt, 1 "
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1
    assert sorted(err[len(told) - 2 : -2].split(", ")) == ["1 .cr3", "1 without an ending"]
    assert au("recognize", *photos)[2] == "" and told in au("recognize", "in")[2]


def test_a_folder_that_cannot_be_read_is_told(photos, monkeypatch, capsys):
    scan = os.scandir

    def refused(path):  # as to anybody but root, whom permissions do not stop
        if str(path) == "in/sub":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert expand(["in"]) == ["in/a.png"]
    assert capsys.readouterr().err == "Passed over, for it cannot be read: in/sub (Permission denied).\n"


def test_a_phone_s_heic_is_told_how_to_be_read(au, photos):
    ftyp = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    Path("in/IMG_1.HEIC").write_bytes(ftyp)
    shutil.copy(photos[0], "in/named.heif")  # only its name is wrong
    code, _, err = au("recognize", "in", "--output", "t.csv")
    assert code == 1 and "Passed over" not in err
    rows = {row["file"]: row for row in read("t.csv")}
    assert rows["in/IMG_1.HEIC"]["error"] == "in/IMG_1.HEIC: HEIC cannot be read; convert it to JPEG."
    assert len(rows) == 5 and [name for name, row in rows.items() if row["status"] == "failed"] == ["in/IMG_1.HEIC"]


def test_what_the_command_wrote_is_no_input(photos):
    for name in ("in/t.csv.clip.mp4.detection.png", "in/sub/t.parquet.day/clip.mp4.intensity_level.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert expand(["in"]) == expand(["in/**/*.png", "in/**/*.jp*g", "in/**/*.JP*G"]) == photos


def test_overlays_of_an_earlier_job_are_no_inputs(photos, capsys):
    Path("in/drawn/sub").mkdir(parents=True)
    for name in ("a.png.png", "sub/b.jpg.png", "sub/talk.MP4.mp4"):
        Path("in/drawn", name).touch()
    assert expand(["in"]) == photos
    assert capsys.readouterr().err == "Passed over, for they are named like overlays, as in/drawn/a.png.png: 3.\n"
    assert expand(["in/**/*.png"]) == photos[:1]
    assert capsys.readouterr().err == "Passed over, for they are named like overlays, as in/drawn/a.png.png: 2.\n"
    assert expand(["in/drawn/a.png.png"]) == ["in/drawn/a.png.png"]
    names = ["in/drawn/a.png.png", "in/drawn/sub/b.jpg.png", "in/drawn/sub/talk.MP4.mp4"]
    assert expand(["in/drawn"]) == names and capsys.readouterr().err == ""  # someone calls pictures so


def test_hidden_folders_are_left_out_and_linked_ones_entered(photos):
    for folder in (".thumbs", "elsewhere"):
        Path(folder).mkdir()
        Image.new("RGB", (50, 50)).save(f"{folder}/e.jpg")
    Path(".thumbs").rename("in/.thumbs")
    Path("in/linked").symlink_to("../elsewhere")
    Path("in/sub/round").symlink_to("..")  # no walk without an end
    Path("in/gone.jpg").symlink_to("nowhere.jpg")
    Path("in/again").symlink_to("sub")  # nothing that is not taken anyway
    a, *below = photos
    assert expand(["in"]) == [a, "in/gone.jpg", "in/linked/e.jpg", *below]


def test_folders_and_addresses_are_told_from_files(au, photos):
    Path("in/frames.jpg").mkdir()
    Path("in/sub").rename("in/frames.jpg/day2")
    Image.new("RGB", (50, 50)).save("in/frames.jpg/0001.jpg")
    below = ["in/frames.jpg/0001.jpg", "in/frames.jpg/day2/b.jpg", "in/frames.jpg/day2/c.JPEG"]
    assert expand(["in"]) == ["in/a.png", *below] and expand(["in/f*"]) == below
    code, _, err = au("recognize", "https://example.org/talk.mp4", "--output", "t.csv")
    assert code == 2 and "https://example.org/talk.mp4: videos are not fetched; download it" in err


def test_each_input_has_a_place_of_its_own(photos, monkeypatch):
    monkeypatch.chdir("in/sub")
    names = ["b.jpg", "../a.png", "../sub/../sub_b.jpg", "http://x.org/a?b=1", "http://x.org/a_b=1"]
    assert [one.place for one in described(names).values()] == [
        "sub/b.jpg", "a.png", "sub_b.jpg", "http%3A%2F%2Fx.org%2Fa%3Fb%3D1", "http%3A%2F%2Fx.org%2Fa_b%3D1"
    ]  # fmt: skip
    signed = [f"http://x.org/a.jpg?signature={letter * 300}" for letter in "ab"]
    places = {f"{one.place}.png" for one in described(signed).values()}
    assert len(places) == 2 and max(map(len, places)) < 255
    many = [f"{number % 100}/{number}.png" for number in range(20_000)]
    begun = time.monotonic()
    assert [one.place for one in described(many).values()] == many and time.monotonic() - begun < 5


def test_overlays_of_equal_names_do_not_meet(au, photos):
    Image.new("RGB", (50, 50)).save("in/sub/a.png")
    Image.new("RGB", (50, 50)).save("in/sub/a.jpg")
    assert au("recognize", "in", "--overlay", "drawn", "--output", "t.csv")[0] == 0
    drawn = {str(path.relative_to("drawn")) for path in Path("drawn").rglob("*.png")}
    assert drawn == {"a.png.png", "sub/a.png.png", "sub/a.jpg.png", "sub/b.jpg.png", "sub/c.JPEG.png"}


def test_one_input_s_overlay_may_be_a_file(au, photos):
    assert au("recognize", photos[0], "--overlay", "seen.jpg", "--output", "t.csv")[0] == 0
    with Image.open("seen.jpg") as drawn:
        assert drawn.width == 560
    code, _, err = au("recognize", "in", "--overlay", "seen.jpg", "--output", "t.csv")
    assert code == 2 and "3 inputs; name a folder" in err
    code, _, err = au("recognize", photos[0], "--overlay", "seen.mp4", "--output", "u.csv")
    assert code == 2 and "--overlay seen.mp4: for in/a.png name a folder, or a file in .jpg" in err


def test_what_cannot_be_drawn_costs_no_answer(au, photos):
    Path("drawn/a.png.png").mkdir(parents=True)
    code, _, err = au("recognize", "in", "--overlay", "drawn", "--output", "t.csv")
    assert code == 1 and "au-llava: in/a.png: not drawn (" in err and "3 inputs, 0 failed, 1 not drawn" in err
    assert [row["status"] for row in read("t.csv")] == ["ok"] * 3 and Path("drawn/sub/b.jpg.png").is_file()
    assert au("recognize", photos[0], "--overlay", "drawn")[:2] == (1, au("recognize", photos[0])[1])


def test_an_overlay_never_takes_its_input_s_place(au, photos):
    before = Path(photos[0]).read_bytes()
    for name in (photos[0], str(Path(photos[0]).absolute())):
        code, _, err = au("recognize", photos[0], "--overlay", name, "--output", "t.csv")
        assert code == 2 and f"--overlay {name} is the input, which would be lost" in err
    assert Path(photos[0]).read_bytes() == before


def test_a_job_that_goes_on_draws_what_is_missing(au, photos, monkeypatch):
    Path("in/sub/broken.png").touch()
    Path("drawn/a.png.png/x").mkdir(parents=True)
    asked = ("in", "--overlay", "drawn", "--output", "t.csv", "--batch-size", "1")
    stop_before_the_table(monkeypatch, au, *asked)
    shutil.rmtree("drawn/a.png.png")
    code, _, err = au("recognize", *asked)
    assert code == 1 and "4 inputs, 1 failed:" in err, "the broken one"
    assert sorted(path.name for path in Path("drawn").rglob("*.png")) == ["a.png.png", "b.jpg.png", "c.JPEG.png"]
    assert [row["file"] for row in read("t.csv")] == [photos[0], *photos[1:2], "in/sub/broken.png", photos[2]]


def test_openface_columns(au, photos):
    code, out, err = au("recognize", photos[0], "--openface", "--action-units", "AU1,AU12,FEAFA3", "--output", "-")
    row = json.loads(out)
    assert code == 0
    assert list(row)[:9] == [
        "frame",
        "face_id",
        "timestamp",
        "confidence",
        "success",
        "AU01_r",
        "AU12_r",
        "AU01_c",
        "AU12_c",
    ]
    assert row["frame"] == 1 and row["face_id"] == 0 and row["success"] == 1
    assert row["AU12_c"] in (0, 1) and 0 <= row["AU12_r"] <= 5
    assert "AU12_r = AU12_intensity_level_expected" in err and "FEAFA3 (detection)" in err
    assert len(json.loads(au("recognize", photos[0], "--openface", "--output", "-")[1])) == 12 + 12 + 12

    code, _, err = au("recognize", photos[0], "--openface", "--task", "intensity")
    assert code == 2 and "--task intensity" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--action-units", "AU99"], "AU99"),
        (["--action-units", "AU1,AU1"], "more than once"),
        (["--output", "t.xlsx"], ".parquet"),
        (["--output", "folder.csv"], "folder.csv: there is a folder of this name"),
        (["--evidence", "attention"], "--overlay"),
        (["--detector", "magic"], "magic"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--device", "gpu"], "au-llava: device 'gpu' cannot be used (Expected one of cpu"),
        (["--model", "in"], "config.json"),
        (["--model", "other"], "'llama'"),
    ],
)
def test_wrong_usage_is_told_in_one_line(photos, folder, capsys, arguments, told):
    Path("folder.csv").mkdir()
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "llama"}')
    assert main(["recognize", photos[0], "--model", folder, "--detector", "none", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("au-llava: ") and err.count("\n") == 1
    assert not list(Path().glob("t.*"))


@pytest.mark.parametrize("arguments", [["--task", "smile"], ["--batch-size", "0"], []])
def test_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recognize", *arguments])
    assert stop.value.code == 2


def test_a_port_is_one(capsys):
    with pytest.raises(SystemExit):
        main(["app", "--port", "99999"])
    assert "invalid port from 1 to 65535 value: '99999'" in capsys.readouterr().err


def test_damaged_weights_are_one_clear_error(au, photos, folder, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in Path(folder).iterdir():
        data = path.read_bytes()
        (bad / path.name).write_bytes(data[:1000] if path.suffix == ".safetensors" else data)
    code, _, err = au("recognize", photos[0], model=str(bad))
    assert code == 2 and str(bad) in err and err.count("\n") == 1


def start(folder, *arguments, **pipes):
    command = [
        sys.executable,
        "-m",
        "au_llava",
        "recognize",
        "in",
        "--model",
        folder,
        "--detector",
        "none",
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A test run in the background of a shell would hand down that interrupts are ignored.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **pipes)


def test_an_interrupted_job_goes_on_and_ends_with_the_same_table(au, folder, photos):
    for index in range(400):
        Image.new("RGB", (60, 60), (index % 256, 90, 20)).save(f"in/sub/{index:03d}.png")
    job = start(folder, "--task", "all", "--output", "t.jsonl", "--batch-size", "1")
    journal = Path("t.jsonl.partial")
    until = time.monotonic() + 300
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 3) and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=300)
    assert job.returncode == 130 and "goes on from there" in err and "Traceback" not in err
    assert sorted(path.name for path in Path().glob("*t.jsonl*")) == ["t.jsonl.partial"]
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 403

    for path in sorted(Path("in/sub").glob("*.png"))[10:]:  # fewer are enough from here on
        if path.name.encode() not in journal.read_bytes():
            path.unlink()
    code, _, err = au("recognize", "in", "--task", "all", "--output", "t.jsonl", "--batch-size", "1")
    assert code == 0 and f"{done} of" in err and not journal.exists()
    assert au("recognize", "in", "--task", "all", "--output", "u.jsonl", "--batch-size", "1")[0] == 0
    assert sorted(Path("t.jsonl").read_text().splitlines()) == sorted(Path("u.jsonl").read_text().splitlines())


def stop_before_the_table(monkeypatch, au, *arguments):
    """Run a job to its last step but the table, so that it leaves its journal."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("au_llava.recognize.write_table", interrupted)
        assert au("recognize", *arguments)[0] == 130


def test_a_job_that_goes_on_takes_no_rows_of_other_pictures(au, photos, monkeypatch):
    output = str(Path("t.jsonl").absolute())
    stop_before_the_table(monkeypatch, au, "in", "--output", output)
    Image.new("RGB", (80, 90), "#aa7733").save("in/sub/b.jpg")  # another picture of this name
    code, _, err = au("recognize", "in", "--output", output)
    assert code == 0 and "2 of 3 inputs were done before" in err
    replaced = Path(output).read_text()
    stop_before_the_table(monkeypatch, au, "in", "--output", output)
    Path("elsewhere/in").mkdir(parents=True)
    monkeypatch.chdir("elsewhere")
    Image.new("RGB", (80, 90), "#3377aa").save("in/a.png")
    code, _, err = au("recognize", "in", "--output", output)
    assert code == 0 and "done before" not in err
    other = Path(output).read_text()
    assert au("recognize", "in", "--output", "u.jsonl")[0] == 0 and Path("u.jsonl").read_text() == other
    monkeypatch.chdir("..")
    assert au("recognize", "in", "--output", "u.jsonl")[0] == 0 and Path("u.jsonl").read_text() == replaced


def test_two_jobs_of_one_output_lose_no_table(au, photos, monkeypatch):
    add, whole = Journal.add, []

    def meanwhile(journal, rows):
        add(journal, rows)
        if not whole:
            whole.append("begun")
            whole[:] = [au("recognize", "in", "--output", "t.csv")[0], Path("t.csv").read_text()]

    monkeypatch.setattr(Journal, "add", meanwhile)
    code, _, err = au("recognize", "in", "--output", "t.csv")
    assert code == 2 and "t.csv.partial lost 3 of 3 finished inputs: another job with this output" in err
    assert whole == [0, Path("t.csv").read_text()] and len(read("t.csv")) == 3


class Unsteady(SimpleHTTPRequestHandler):
    """A server of the current folder, which can be out of order."""

    up = False
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.up:
            super().do_GET()
        else:
            self.send_error(503)

    def log_message(self, *_):
        pass


def test_what_failed_is_tried_again_alone(au, photos, monkeypatch):
    Path("in/zero.png").touch()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unsteady)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Unsteady, "asked", asked := [])
    address = f"http://127.0.0.1:{server.server_port}/in/sub"
    names = ("in", f"{address}/b.jpg", f"{address}/c.JPEG", "--output", "t.csv", "--batch-size", "2")
    opened = []
    monkeypatch.setattr("au_llava.recognize.open_image", lambda name: opened.append(name) or open_image(name))
    try:
        stop_before_the_table(monkeypatch, au, *names)
        monkeypatch.setattr(Unsteady, "up", True)
        opened.clear()
        code, _, err = au("recognize", *names)
        assert opened == ["in/zero.png", f"{address}/b.jpg", f"{address}/c.JPEG"]
        assert code == 1 and "3 of 6 inputs were done before; tried again, for they failed: 3." in err
        assert "6 inputs, 1 failed: t.csv" in err and asked == ["/in/sub/b.jpg", "/in/sub/c.JPEG"] * 2
    finally:
        server.shutdown()
        server.server_close()
    rows = read("t.csv")
    assert [(row["file"], row["status"]) for row in rows] == [
        (photos[0], "ok"), (photos[1], "ok"), (photos[2], "ok"), ("in/zero.png", "failed"),
        (f"{address}/b.jpg", "ok"), (f"{address}/c.JPEG", "ok"),
    ]  # fmt: skip
    assert [float(row["AU12_detection_expected"]) for row in rows[-2:]] == pytest.approx(
        [float(row["AU12_detection_expected"]) for row in rows[1:3]], abs=1e-4
    )


def test_another_option_does_no_harm_to_an_unfinished_job(au, photos, monkeypatch):
    stop_before_the_table(monkeypatch, au, "in", "--output", "t.csv")
    kept = Path("t.csv.partial").read_bytes()
    for option, told in (
        (("--action-units", "AU12"), "(detection 'AU1 "),
        (("--overlay", "drawn"), "overlay None"),
    ):
        code, _, err = au("recognize", "in", "--output", "t.csv", *option)
        assert code == 2 and told in err and "delete t.csv.partial*" in err and err.count("\n") == 1
        assert Path("t.csv.partial").read_bytes() == kept
    code, _, err = au("recognize", "in", "--output", "t.csv")
    assert code == 0 and "3 of 3 inputs were done before" in err


def test_the_detector_that_is_used_is_told(au, photos):
    assert au("recognize", photos[0], "--output", "t.csv", detector="auto")[0] == 0
    told = json.loads(Path("t.csv.columns.json").read_text())["produced by"]["detector"]
    assert told == "cascade" or Path(told).is_file()


def test_a_reader_that_leaves_early_is_no_error_to_shout_about(folder, photos):
    for index in range(20):
        Image.new("RGB", (60, 60), (index, 90, 20)).save(f"in/{index}.png")
    job = start(folder, "--output", "-", "--batch-size", "1", stdout=subprocess.PIPE)
    assert json.loads(job.stdout.readline())["status"] == "ok"
    job.stdout.close()
    assert job.wait(timeout=300) == 1
    assert "Traceback" not in job.stderr.read()


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path, settings = tmp_path / "j", {"model": "ü"}
    journal = Journal(path, settings)
    journal.add({"a": [{"status": "ok", "x": 1}, {"status": "ok", "x": 2}]})
    journal.add({"bé": [{"status": "failed"}]})
    journal.close()
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Journal(path, settings)
        assert again.done == set(["a", "bé"][: max(0, sum(end <= cut for end in ends) - 1)])
        assert again.failed == again.done - {"a"}
        again.add({"c": [{"status": "ok", "x": 3}]})
        assert [row.get("x") for row in again.rows(["a", "c"])] == ([1, 2] if "a" in again.done else []) + [3]
        again.close()
    path.write_bytes(whole[: ends[1]] + b"\0" * 20 + b"\n" + whole[ends[1] :])  # as a power failure leaves it
    again = Journal(path, settings)
    assert again.done == {"a"} and path.read_bytes() == whole[: ends[1]]
    with pytest.raises(ValueError, match=r"other settings \(model 'ü', now 'other'; fps None, now 2\).*delete .*j\*"):
        Journal(path, {"model": "other", "fps": 2})
    assert path.read_bytes() == whole[: ends[1]]


def test_processes_that_share_a_job_read_each_other_s_journals(tmp_path):
    path, settings = tmp_path / "j", {"model": 1}
    first, second = Journal(path, settings), Journal(path, settings, process=1)
    row = {"status": "ok"}
    first.add({"film": [row | {"x": 1}]}, done=False)
    second.add({"b": [row | {"x": 9}], "c": [{"status": "failed", "x": 8}]})
    first.close()
    second.close()
    # Another number of processes: the film goes on in another file, and what failed is done again.
    again = Journal(path, settings, process=2)
    assert again.done == {"b", "c"} and again.failed == {"c"}
    again.add({"film": [row | {"x": 2}]}, done=False)
    again.add({"film": []})
    again.add({"c": [row | {"x": 7}]})
    again.close()
    last = Journal(path, settings)
    assert last.done == {"b", "c", "film"} and not last.failed
    assert [found["x"] for found in last.rows(["film", "c", "nothing", "b"])] == [1, 2, 7, 9]
    with pytest.raises(ValueError, match="model 1, now 2"):
        Journal(path, {"model": 2})
    # Someone asked for less than the job that was stopped: what that one has done is not lost.
    assert last.remove(["film", "c"]) == 1 and path.is_file()
    last = Journal(path, settings)
    assert last.done == {"b", "c", "film"} and last.remove(["film", "c", "b", "more"]) == 0
    assert not list(tmp_path.iterdir())


def test_of_lines_in_several_files_those_of_the_last_run_count(tmp_path):
    path, settings = tmp_path / "j", {"model": 1}
    good, bad = {"status": "ok"}, {"status": "failed"}
    journal = Journal(path, settings, process=1)
    journal.add({"film": [good | {"x": 1}]}, done=False)
    journal.add({"film": [bad], "photo": [bad | {"x": 3}], "lost": [bad]})
    journal.close()
    # Read before the file of process 1, in which they failed.
    journal = Journal(path, settings)
    assert journal.take_back() == {"film", "photo", "lost"} and not journal.done and not journal.failed
    journal.add({"film": [good | {"x": 2}]}, done=False)
    journal.add({"photo": [good | {"x": 4}]})
    journal.close()
    journal = Journal(path, settings, process=2)
    assert journal.done == {"photo", "lost"} and journal.failed == {"lost"}
    assert [row["x"] for row in journal.rows(["film", "photo"])] == [1, 2, 4]
    assert journal.take_back() == {"lost"}
    journal.add({"film": []})
    journal.close()
    last = Journal(path, settings)
    assert last.done == {"film", "photo", "lost"} and last.failed == {"lost"}, "which was not done again"
    assert [row["x"] for row in last.rows(["film", "photo"])] == [1, 2, 4]


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(au, folder, photos):
    for index in range(30):
        Image.new("RGB", (60, 60), (8 * index, 90, 20)).save(f"in/sub/{index:03d}.png")
    film = cv2.VideoWriter("in/film.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for index in range(12):
        film.write(np.full((64, 96, 3), 20 * index, np.uint8))
    film.release()
    Path("in/zero.png").touch()
    assert au("recognize", "in", "--output", "one.csv")[0] == 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "au_llava", "recognize"]
    command = [*launch, "in", "--model", folder, "--detector", "none", "--output", "two.csv", "--overlay", "drawn"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300
    while len(list(Path().glob("two.csv.partial*"))) < 2 and job.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not Path("two.csv").exists() and len(list(Path().glob("two.csv.partial*"))) == 2
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 1  # for the broken picture
    assert Path("two.csv").read_text() == Path("one.csv").read_text()
    assert not list(Path().glob("*.partial*")) and len(list(Path("drawn").rglob("*.png"))) == 33


def test_demo_prints_tables_and_writes_one_self_contained_page(au, tmp_path):
    shown = pictures()
    assert len(shown) >= 4 and ASTRONAUT in shown
    code, out, err = au("demo", "--output", str(tmp_path / "demo"))
    assert code == 0 and "report.html" in err
    page = (tmp_path / "demo/report.html").read_text()
    for name in shown:
        assert f"{name}, face 1 of 1" in out and f"<h2>{name}</h2>" in page
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["report.html"]
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(|@import|<script""", page)
    assert len(links) == 1 + 2 * len(shown) and all(link.startswith("data:") for link in links)
    for task, preset in (("detection", "bp4d"), ("intensity_level", "disfa"), ("intensity", "feafa")):
        assert page.count(f"({preset.upper()}'s)") == len(shown)
        assert page.count('<th class="code" scope="row">FEAFA24<') == len(shown)
        assert describe(task).splitlines()[-1] in page
    rows = page.count('scope="row"')
    assert rows == len(shown) * sum(len(PRESETS[preset]) for preset in ("bp4d", "disfa", "feafa"))
    assert "weights SHA-256" in page and "transformers" in page


def test_doctor_tells_what_works_and_how_to_mend(au):
    code, out, _ = au("doctor")
    assert code == 0 and "48 answers to 3 questions" in out and "torch" in out
    code, out, _ = au("doctor", model="no/such/folder")
    assert code == 1 and "FAILED  model" in out and "save_pretrained" in out and "ok      faces" in out
    cascade = au("doctor", model="no/such/folder", detector="cascade")[1]
    assert "found in a photograph of one person. Set AU_LLAVA_SCRFD to an SCRFD .onnx file" in cascade


@pytest.mark.parametrize("there", ["opencv-python", "opencv-python-headless", None])
def test_doctor_is_content_with_either_opencv(au, monkeypatch, there):
    def version(name):
        if name.startswith("opencv") and name != there:
            raise PackageNotFoundError(name)
        return "5.0"

    monkeypatch.setattr("au_llava.doctor.version", version)
    out = au("doctor", model="no/such/folder")[1]
    found = [line.split() for line in out.splitlines() if "opencv" in line]
    assert found == [[there, "5.0"]] if there else "opencv-python    missing; mend: pip install opencv-python\n" in out


def test_doctor_says_what_the_web_page_lacks(au, monkeypatch):
    def version(name):
        if name == "gradio":
            raise PackageNotFoundError(name)
        return "5.0"

    monkeypatch.setattr("au_llava.doctor.version", version)
    out = au("doctor", model="no/such/folder")[1]
    assert 'gradio           missing; without it there is no web page: pip install "au-llava[app]"\n' in out
