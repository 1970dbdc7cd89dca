"""The benchmark that draws test faces otherwise: what changes, what does not, and that every condition is scored."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from au_llava.action_units import PRESETS
from benchmarks import shortcuts


def test_faces_are_drawn_otherwise_and_scored(model, processor, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["--model", tmp_path / "model", "--pictures", 1, "--output", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", ["shortcuts.py", *map(str, command)])
    shortcuts.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = said["results"]
    assert list(said["action_units"]["other sculpts"]["detection"]) == list(PRESETS["bp4d"])
    names = [shortcuts.PLAIN, *shortcuts.CONDITIONS, shortcuts.GREY]
    assert list(results) == names
    assert all(results[shortcuts.PLAIN][task]["changed"] == 0 for task in shortcuts.SCORES)
    assert all(set(found) == {*shortcuts.SCORES[task], "changed"} for task, found in results["no furrows"].items())

    rows = {
        name: pq.read_table(tmp_path / "out" / shortcuts.folder_name(name) / "test-00000.parquet").to_pylist()[0]
        for name in names
    }
    shown = {name: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int) for name, row in rows.items()}
    plain = shown[shortcuts.PLAIN]
    for name in names[1:]:
        moved = name in ("another scene", "another style", "other sculpts")
        same = ("facs", "feafa", "levels", "identity", "index") + ("landmarks",) * (not moved)
        assert all(rows[name][column] == rows[shortcuts.PLAIN][column] for column in same), name
        assert (shown[name] != plain).any(), name
    behind, face = (slice(0, 60), slice(194, 224)), (slice(80, 160), slice(80, 144))
    for name in ("another background", "plain background"):
        difference = np.abs(shown[name] - plain)
        assert 3 * difference[face].mean() < difference[behind].mean(), name
    assert np.abs(shown["no furrows"] - plain)[behind].mean() < 5  # the face alone has changed
    assert (shown[shortcuts.GREY].std(-1) < 1).all()
    # Lit from one side the halves of the face differ; lit from everywhere they hardly do.
    gaps = {
        name: abs(picture[100:150, 70:100].mean() - picture[100:150, 124:154].mean())
        for name, picture in shown.items()
    }
    assert gaps["no shading"] < 5 < 20 < gaps[shortcuts.PLAIN]
