import argparse
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import ImageOps

from au_llava import AuLlavaProcessor, default_checkpoint
from au_llava.datasets_scripts.augmentation import NOTHING
from au_llava.datasets_scripts.instructions import FEATURES, instruct, make_row, relations_in
from baselines import linear_head, tuning
from benchmarks import comparisons
from evaluation.data import read_set


def scores(first: float) -> dict[str, float]:
    return {f"{task} {title}": first for task, kinds in comparisons.SCORES.items() for title, _, _ in kinds}


def test_a_difference_within_the_noise_of_seeds_is_not_marked():
    results = {
        "the recipe": [scores(0.50), scores(0.52)],
        "a little other": [scores(0.52), scores(0.54)],
        "much more": [scores(0.80), scores(0.82)],
    }
    # Each pair of seeds spreads by 0.02, a deviation of 0.0141; two means of two differ by chance by up to 0.0283.
    assert comparisons.noise(results)["detection F1"] == pytest.approx(0.0283, abs=1e-4)
    lines = comparisons.table(results).splitlines()
    assert "better" not in lines[3] and "worse" not in lines[3]
    assert lines[4].count("**better**") == 4 and lines[4].count("**worse**") == 2  # more error is worse
    assert "0.028" in lines[5]


def test_one_seed_alone_says_nothing():
    assert "better" not in comparisons.table({"the recipe": [scores(0.1)], "other": [scores(0.9)]})


def test_a_stored_run_is_not_repeated_and_not_taken_for_another(tmp_path):
    settings = dict.fromkeys(comparisons.ASKED, 1)
    args = argparse.Namespace(output=str(tmp_path), **settings)
    way = list(comparisons.WAYS)[2]
    folder = tmp_path / "2-1"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"settings": settings, "scores": scores(0.25)}))
    assert comparisons.run(way, 1, args) == scores(0.25)
    args.steps = 2
    with pytest.raises(ValueError, match="another --output"):
        comparisons.run(way, 1, args)


def test_a_recipe_that_changed_is_another(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    recipe = tmp_path / "recipe.yaml"
    words = f"comparisons --start {tmp_path} --recipe {recipe} --ways 1 --seeds 0 --output {tmp_path}/out"
    words += " --data synthetic:?split=test --limit 2 --test_limit 2"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(comparisons, "train", lambda *_: [])  # what is stored with the scores is asked about
    for learning_rate in (1, 2):
        recipe.write_text(f"learning_rate: {learning_rate}")
        with nullcontext() if learning_rate == 1 else pytest.raises(ValueError, match="give another --output"):
            comparisons.main()
    recipe.write_text("learning_rate: 1")
    monkeypatch.setattr(comparisons, "digest_rows", lambda rows: "of others")  # as when faces have come
    with pytest.raises(ValueError, match="give another --output"):
        comparisons.main()


def test_a_model_is_scored_on_rendered_faces():
    rows = comparisons.read_rows("synthetic:?split=test", ("detection:AU6,AU12", "intensity:FEAFA1"), 3)
    found = comparisons.score(default_checkpoint(), rows, None)
    assert found.keys() == {"detection F1", "detection ROC-AUC", "intensity MAE", "intensity ICC"}
    assert all(np.isfinite(value) for value in found.values()) and 0 <= found["intensity MAE"] <= 1


def test_the_start_is_turned_around(tmp_path):
    folder = comparisons.turn_around(str(default_checkpoint()), tmp_path / "turned")
    prompt = AuLlavaProcessor.from_pretrained(folder).prompt("detection", "AU6")
    assert prompt.index("<image>") < prompt.index("AU6") and (tmp_path / "turned/model.safetensors").is_file()


def test_every_way_is_made_of_the_recipes_fields():
    from au_llava.arguments import AuLlavaArguments

    fields = AuLlavaArguments.__dataclass_fields__
    for options in comparisons.WAYS.values():
        assert all(name.removeprefix("--") in fields for name in options[::2])
    assert (ROOT / "recipes/comparison.yaml").is_file()


def test_relations_are_pooled_over_tasks():
    from datasets import Dataset

    rows = []
    for number in range(40):
        smile = number % 2
        for task, top in (("detection", 1.0), ("intensity_level", 3.0)):
            labels = {"AU6": top * smile, "AU12": top * smile, "AU4": float(number % 4 == 0)}
            origin = {"dataset": "made", "subject": "", "sequence": "", "frame": number}
            rows.append(make_row(None, labels, task, instruct(labels, task), **origin) | {"images": []})
    found = relations_in(Dataset.from_list(rows, features=FEATURES))
    assert found.links[0][:3] == ("AU6", "AU12", 1.0) or found.links[0][:3] == ("AU12", "AU6", 1.0)


def one_face(**labels: float):
    """A rendered face of which some intensities alone are asked."""
    units, values = {"intensity": list(labels)}, {"intensity": np.array([[*labels.values()]])}
    return replace(read_set("synthetic", limit=1), units=units, labels=values)


def test_a_linear_head_joins_both_sides_only_where_both_are_asked():
    face = one_face(FEAFA1=0.0, FEAFA12=0.0, FEAFA13=0.0, FEAFA24=0.0)
    heads = {"intensity": [0.1, 0.4, 0.6, 0.9]}  # these, whatever is in the picture
    (table,) = linear_head.tables(face, heads, np.zeros((1, 4)), np.zeros((1, 4)))
    np.testing.assert_allclose(table["expected_values"].to_pylist(), [[0.1, 0.5, 0.5, 0.9]])


def test_no_face_is_flipped_if_that_asks_about_other_units(monkeypatch):
    monkeypatch.setattr(tuning, "Augmentation", lambda flip: NOTHING)

    def drawn(face) -> list[tuple[bool, torch.Tensor]]:
        """Whether the face was flipped, and its labels, of some draws."""
        plain, found = face.pictures([0])[0].convert("RGB"), []
        for seed in range(8):
            (image,), labels = tuning.augmented(face, [0], np.random.default_rng(seed))
            assert image in (plain, ImageOps.mirror(plain))
            found.append((image != plain, labels[0]))
        return found

    assert not any(flipped for flipped, _ in drawn(one_face(FEAFA1=0.1, FEAFA12=0.2, FEAFA13=0.8)))
    found = drawn(one_face(FEAFA1=np.nan, FEAFA12=0.2, FEAFA13=0.8))
    assert {flipped for flipped, _ in found} == {True, False}
    for flipped, labels in found:
        wanted = torch.tensor([np.nan, 0.8, 0.2] if flipped else [np.nan, 0.2, 0.8], dtype=torch.float32)
        torch.testing.assert_close(labels, wanted, equal_nan=True)
