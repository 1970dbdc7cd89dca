"""The synthetic faces: exact labels, exact alignment, and files that do not depend on how they were made."""

import dataclasses
import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from au_llava.action_units import CATALOGUE, PRESETS
from au_llava.datasets_scripts.synthetic_faces.__main__ import main
from au_llava.datasets_scripts.synthetic_faces.builder import SAMPLE, SyntheticFaces, labels_of
from au_llava.datasets_scripts.synthetic_faces.expression import (
    ACTIONS,
    FACS_CODES,
    FEAFA_CODES,
    LEVEL_EDGES,
    OTHER_RECIPES,
    RECIPES,
    SIDED,
    expression_of_unit,
    facs_intensities,
    feafa_intensities,
    level,
    occurrence,
    personal_style,
)
from au_llava.datasets_scripts.synthetic_faces.layout import IDENTITIES, VERSION, split_size
from au_llava.datasets_scripts.synthetic_faces.mesh import load_head
from au_llava.datasets_scripts.synthetic_faces.renderer import pose_mesh, render
from au_llava.datasets_scripts.synthetic_faces.sampler import (
    EXCLUSIONS,
    SEED,
    _image_generators,
    draw_parts,
    identity_of,
    render_sample,
    sample_activations,
)
from au_llava.datasets_scripts.synthetic_faces.scene import TEMPLATE, Scene, similarity
from au_llava.datasets_scripts.synthetic_faces.variation import MAKE
from au_llava.datasets_scripts.synthetic_faces.writer import write_split
from au_llava.face_alignment import FIVE_POINTS, align


# Where in a crop (rows, columns) each unit must change the picture.
BROWS, EYES, NOSE = (50, 95, 55, 170), (78, 112, 55, 170), (90, 140, 80, 145)
MOUTH, LOWER_FACE = (130, 190, 70, 155), (120, 224, 50, 175)
REGIONS = {
    **dict.fromkeys(("AU1", "AU2", "AU4", "FEAFA5", "FEAFA6", "FEAFA7", "FEAFA8"), BROWS),
    **dict.fromkeys(("AU5", "AU6", "AU7", "AU43", "FEAFA1", "FEAFA2", "FEAFA3", "FEAFA4"), EYES),
    **dict.fromkeys(("AU9", "FEAFA24"), NOSE),
    **dict.fromkeys(("AU26", "AU27", "FEAFA9", "FEAFA10", "FEAFA11", "FEAFA18", "FEAFA23"), LOWER_FACE),
}


@pytest.fixture(scope="module")
def person():
    """Someone without glasses or fringe."""
    return identity_of(31, "validation")


@pytest.fixture(scope="module")
def rest_crop(person):
    return draw(person, {}).image.astype(float)


@pytest.fixture(scope="module")
def expressions():
    return [sample_activations(_image_generators(index, "train", SEED)[0]) for index in range(4000)]


def draw(person, activations, **scene):
    return render(person, activations, Scene(noise=0.0, **scene), np.random.default_rng(0))


def test_an_image_depends_on_its_arguments_alone():
    first = render_sample(3, "test")
    render_sample(4, "test")
    again = render_sample(3, "test")
    assert (first.rendering.image == again.rendering.image).all()
    assert (first.rendering.flow == again.rendering.flow).all()
    assert first.activations == again.activations
    other_take = render_sample(3 + IDENTITIES["test"], "test")
    assert other_take.identity_name == first.identity_name
    assert (other_take.identity.vertices == first.identity.vertices).all()
    assert (other_take.rendering.image != first.rendering.image).any()
    assert (render_sample(3, "test", seed=1).rendering.image != first.rendering.image).any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Unknown split 'dev'; accepted: train"):
        render_sample(0, "dev")
    with pytest.raises(ValueError, match="Image 4000 of split 'test': it has images 0 to 3999"):
        render_sample(4000, "test")


def test_another_make_looks_and_moves_otherwise_with_the_same_labels():
    usual, other = render_sample(3, "test"), render_sample(3, "test", varied=1.0)
    assert other.activations == usual.activations and other.facs == usual.facs and other.feafa == usual.feafa
    assert (other.rendering.image != usual.rendering.image).any()
    assert (other.rendering.image == render_sample(3, "test", varied=1.0).rendering.image).all()
    assert (other.identity.vertices == usual.identity.vertices).all()
    # Lids meet as they did, since a half-open eye would be no closed one; a chin drops by another way.
    head = load_head()
    shut, gaping = {"eye_close_left": 1.0, "eye_close_right": 1.0}, {"jaw_drop": 1.0}
    person, plain = other.identity, dataclasses.replace(other.identity, sculpt=None)
    lids = head.landmarks[[37, 38, 40, 41, 43, 44, 46, 47]]
    np.testing.assert_allclose(pose_mesh(person, shut)[lids], pose_mesh(plain, shut)[lids], atol=0.003)
    chin = head.landmarks[8]
    assert np.abs(pose_mesh(person, gaping)[chin] - pose_mesh(plain, gaping)[chin]).max() > 0.01


def test_in_another_make_skin_takes_part():
    people = [draw_parts(index, "train", varied=1.0).identity for index in range(8)]
    usual = [draw_parts(index, "train").identity for index in range(8)]

    def gap(makes, activations, above, below):
        points = [pose_mesh(person, activations)[load_head().landmarks] for person in makes]
        return np.mean([mesh[above, 1].mean() - mesh[below, 1].mean() for mesh in points])

    raised = {"cheek_raise_left": 1.0, "cheek_raise_right": 1.0}
    lids = [37, 38, 43, 44], [40, 41, 46, 47]
    assert gap(people, raised, *lids) < 0.9 * gap(usual, raised, *lids)
    # From the nose to the upper lip: parted lips bare teeth that a long upper lip would hide.
    lip = [33], [50, 51, 52]
    assert gap(people, {"lips_part": 1.0}, *lip) < gap(usual, {"lips_part": 1.0}, *lip) - 0.01


def test_other_artists_sculpt_the_same_actions():
    """One side moves alone, and held lips stay closed, whoever sculpted the action; but not alike."""
    person, head = identity_of(3, "test"), load_head()
    theirs = dataclasses.replace(
        person, style=personal_style(np.random.default_rng(0), recipes=RECIPES | OTHER_RECIPES), sculpt=None
    )

    def moved(who, activations):
        return (pose_mesh(who, activations) - pose_mesh(who, {}))[head.landmarks]

    across = head.rest[head.landmarks, 0]  # to the person's left
    inner, lower = [61, 62, 63], [67, 66, 65]
    for base in set(OTHER_RECIPES) & set(SIDED):
        far = np.linalg.norm(moved(theirs, {base + "_left": 1.0}), axis=1)
        assert far[across > 0.1].max() > max(0.008, 4 * far[across < -0.1].max()), base
    for action in OTHER_RECIPES:
        both = {f"{action}_{side}": 1.0 for side in ("left", "right")} if action in SIDED else {action: 1.0}
        assert np.abs(moved(theirs, both) - moved(person, both)).max() > 0.005, action
    dropped = {"jaw_drop": 0.25}
    held = pose_mesh(theirs, dropped | {"lips_seal": 1.0})[head.landmarks]
    open_ = pose_mesh(theirs, dropped)[head.landmarks]
    gaps = [np.abs(mesh[inner] - mesh[lower])[:, 1].mean() for mesh in (held, open_)]
    assert 3 * gaps[0] < gaps[1]


def test_a_share_of_another_make():
    scenes = [draw_parts(index, "train", varied=0.5).scene for index in range(12)]
    usual = [draw_parts(index, "train").scene for index in range(12)]
    assert 2 <= sum(one.contrast != other.contrast for one, other in zip(scenes, usual, strict=True)) <= 10


def test_standard_split_has_disjoint_people():
    assert {split: split_size(split) for split in IDENTITIES} == {"train": 40000, "validation": 2000, "test": 4000}
    people = {split: [identity_of(k, split) for k in range(6)] for split in IDENTITIES}
    shapes = {person.vertices.tobytes() for group in people.values() for person in group}
    assert len(shapes) == 18


def test_label_kinds_agree(expressions):
    for activations in expressions[:1500]:
        facs, feafa = facs_intensities(activations), feafa_intensities(activations)
        assert tuple(facs) == FACS_CODES and tuple(feafa) == FEAFA_CODES == PRESETS["feafa"]
        assert all(0 <= value <= 1 for value in (*facs.values(), *feafa.values()))
        for code, units in {
            "AU4": ("FEAFA5", "FEAFA6"), "AU5": ("FEAFA3", "FEAFA4"), "AU9": ("FEAFA24",), "AU10": ("FEAFA19",),
            "AU12": ("FEAFA12", "FEAFA13"), "AU16": ("FEAFA20",), "AU17": ("FEAFA21",), "AU18": ("FEAFA22",),
            "AU20": ("FEAFA14", "FEAFA15"), "AU28": ("FEAFA16", "FEAFA17"),
        }.items():  # fmt: skip
            assert facs[code] == max(feafa[unit] for unit in units), code
        assert facs["AU43"] == min(feafa["FEAFA1"], feafa["FEAFA2"])
        assert (facs["AU26"] > 0) == (feafa["FEAFA9"] > 0)
        assert max(facs["AU1"], facs["AU2"]) >= max(feafa["FEAFA7"], feafa["FEAFA8"])
        if "lips_seal" not in activations:
            assert facs["AU25"] >= 0.5 * facs["AU26"]


def test_levels_rise_and_occurrence_begins_at_b():
    values = np.linspace(0, 1, 501)
    levels = [level(value) for value in values]
    assert levels == sorted(levels) and set(levels) == set(range(6))
    assert [level(edge) for edge in LEVEL_EDGES] == [1, 2, 3, 4, 5]
    assert [occurrence(value) for value in values] == [int(value >= 2) for value in levels]


def test_a_unit_is_shown_at_the_asked_intensity():
    for code in FACS_CODES + FEAFA_CODES:
        assert code in CATALOGUE
        for intensity in (0.0, 0.5, 1.0):
            activations = expression_of_unit(code, intensity)
            assert set(activations) <= set(ACTIONS)
            labels = facs_intensities(activations) | feafa_intensities(activations)
            assert labels[code] == pytest.approx(intensity), code


def test_rare_units_are_frequent_enough_to_learn(expressions):
    present = np.mean([[occurrence(v) for v in facs_intensities(a).values()] for a in expressions], 0)
    present = dict(zip(FACS_CODES, present, strict=True))
    for code in {*PRESETS["bp4d"], *PRESETS["disfa"]}:
        assert 0.1 < present[code] < 0.37, (code, present[code])
    shown = np.mean([[v > 0.1 for v in feafa_intensities(a).values()] for a in expressions], 0)
    assert (shown > 0.045).all(), dict(zip(FEAFA_CODES, shown, strict=True))
    still = np.mean([all(v < 0.06 for k, v in facs_intensities(a).items() if k != "AU43") for a in expressions])
    assert 0.06 < still < 0.13
    one_sided = [a for a in expressions if "corner_pull_left" in a or "corner_pull_right" in a]
    lone = np.mean([min(a.get("corner_pull_left", 0), a.get("corner_pull_right", 0)) == 0 for a in one_sided])
    assert 0.08 < lone < 0.2


def test_no_impossible_pairs(expressions):
    for activations in expressions:
        shown = {name.removesuffix("_left").removesuffix("_right") for name, v in activations.items() if v > 0.3}
        for pair in EXCLUSIONS:
            assert not set(pair) <= shown or pair == ("eye_close", "lid_tighten")  # a blink comes at any time


def test_the_template_is_the_one_for_photographs():
    assert np.allclose(TEMPLATE, FIVE_POINTS)


def test_crops_are_aligned_like_photographs(person):
    drawing = draw(person, {}, yaw=10.0, pitch=4.0, roll=12.0)
    fit = similarity(drawing.points.astype(float), TEMPLATE)
    assert np.allclose(fit, [[1, 0, 0], [0, 1, 0]], atol=0.01)  # already the best fit: nothing is left to move
    again = align(Image.fromarray(drawing.image), drawing.points.tolist())
    assert np.abs(np.asarray(again, float) - drawing.image)[20:-20, 20:-20].mean() < 2.0


def test_similarity_is_exact_and_never_mirrors():
    angle, points = np.radians(30), np.array([[0, 0], [4, 0], [1, 3], [2, 2.0]])
    turn = 1.7 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert np.allclose(similarity(points, points @ turn.T + [5, -2]), np.column_stack([turn, [5, -2]]))
    assert np.linalg.det(similarity(points, points * [-1, 1])[:, :2]) > 0


@pytest.mark.parametrize("code", FACS_CODES + FEAFA_CODES)
def test_every_unit_changes_its_region(person, rest_crop, code):
    top, bottom, left, right = REGIONS.get(code, MOUTH)
    change = np.abs(draw(person, expression_of_unit(code, 1.0)).image - rest_crop).mean(-1)
    assert change[top:bottom, left:right].mean() > 0.5


@pytest.mark.parametrize("code", [code for code in FEAFA_CODES if CATALOGUE[code].side != "both"])
def test_sides_are_the_subjects(person, code):
    head = load_head()
    moved = (pose_mesh(person, expression_of_unit(code, 1.0)) - pose_mesh(person, {}))[head.skin]
    sign = 1 if CATALOGUE[code].side == "left" else -1  # +x is the subject's left, the right side of the image
    if code in ("FEAFA10", "FEAFA11"):
        assert sign * moved[:, 0].sum() > 0.9 * np.abs(moved[:, 0]).sum()
    else:
        distance, own_side = np.linalg.norm(moved, axis=1), sign * head.rest[head.skin, 0] > 0
        assert distance[own_side].sum() > 5 * distance[~own_side].sum()


def test_motion_field(person):
    assert not draw(person, {}).flow.any()
    dropped = draw(person, expression_of_unit("AU26", 1.0))
    assert dropped.flow.shape == (16, 16, 2) and dropped.flow.dtype == np.float16
    assert dropped.flow[12, 8, 1] > 8  # the chin goes down
    assert not dropped.flow[0, 0].any()  # nothing but background there
    slid = draw(person, expression_of_unit("FEAFA10", 1.0))
    assert slid.flow[13, 6:10, 0].mean() > 2  # to the subject's left: to the right in the image
    assert not draw(person, {}, yaw=20.0, roll=10.0).flow.any()


def test_landmarks_lie_where_their_names_say(person):
    points = draw(person, {}).landmarks
    assert points.shape == (68, 2) and ((points > 0) & (points < 224)).all()
    assert (np.diff(points[:17, 0]) > 0).all() and points[8, 1] == points[:17, 1].max()  # jaw: image left to right
    assert points[17:27, 1].max() < points[36:48, 1].min() < points[30, 1] < points[48:68, 1].min()
    blink = draw(person, expression_of_unit("AU43", 1.0)).landmarks
    opening = [np.abs(p[[37, 38, 43, 44], 1] - p[[41, 40, 47, 46], 1]).mean() for p in (points, blink)]
    assert opening[1] < 0.6 * opening[0]
    wide = draw(person, expression_of_unit("AU26", 1.0)).landmarks
    assert wide[66, 1] - wide[62, 1] > points[66, 1] - points[62, 1] + 8


def test_smoothing_keeps_weights_and_symmetry():
    head = load_head()
    assert np.allclose(head.smooth(np.ones((len(head.vertices), 1))), 1, atol=1e-5)
    left, right = head.rest[head.landmarks[45]], head.rest[head.landmarks[36]]
    assert np.allclose(left * [-1, 1, 1], right, atol=0.02) and left[0] > 0


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = write_split(tmp_path / "whole", "test", limit=4, images_per_shard=2, workers=2)
    write_split(tmp_path / "resumed", "test", limit=3, images_per_shard=2)  # leaves the second shard half done
    (tmp_path / "resumed" / ".test-00001.parquet.1").write_bytes(b"what a kill leaves behind")
    kept = (tmp_path / "resumed" / "test-00000.parquet").stat().st_mtime_ns
    resumed = write_split(tmp_path / "resumed", "test", limit=4, images_per_shard=2)
    assert [path.name for path in resumed] == ["test-00000.parquet", "test-00001.parquet"]
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]
    assert resumed[0].stat().st_mtime_ns == kept
    resumed[1].write_bytes(whole[1].read_bytes()[:-9])  # cut by a full disk
    write_split(tmp_path / "resumed", "test", limit=4, images_per_shard=2)
    assert resumed[1].read_bytes() == whole[1].read_bytes()
    with pytest.raises(ValueError, match="other settings .seed.*empty --output_dir"):
        write_split(tmp_path / "resumed", "test", limit=4, images_per_shard=2, seed=1)
    with pytest.raises(ValueError, match="other settings .make, varied.*empty --output_dir"):
        write_split(tmp_path / "resumed", "test", limit=4, images_per_shard=2, varied=0.5)
    write_split(tmp_path / "varied", "test", limit=1, varied=1.0, quick=True)
    manifest = tmp_path / "varied" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"make": {MAKE}', f'"make": {MAKE - 1}'))
    with pytest.raises(ValueError, match="other settings .make.; give an empty"):  # as an older version drew them
        write_split(tmp_path / "varied", "test", limit=2, varied=1.0, quick=True)
    with pytest.raises(ValueError, match="varied is 2"):
        write_split(tmp_path / "resumed", "test", limit=4, images_per_shard=2, varied=2)


def test_quick_images_show_a_person_after_another(tmp_path):
    (path,) = write_split(tmp_path, "test", limit=6, quick=True)
    rows = pq.read_table(path).to_pylist()
    assert [row["index"] for row in rows] == [0, 800, 1600, 2400, 3200, 1]
    assert [row["identity"] for row in rows] == ["test-00000"] * 5 + ["test-00001"]
    usual = render_sample(800, "test")
    with Image.open(io.BytesIO(rows[1]["image"]["bytes"])) as image:
        quick = np.asarray(image, float)
    assert rows[1]["facs"] == pytest.approx(list(usual.facs.values()))
    np.testing.assert_allclose(np.reshape(rows[1]["landmarks"], (68, 2)), usual.rendering.landmarks, atol=1e-3)
    # Drawn with jagged edges, it is the same picture.
    assert 0 < np.abs(quick - usual.rendering.image).mean() < 8
    with pytest.raises(ValueError, match="quick"):
        write_split(tmp_path, "test", limit=6)


def test_command(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--split", "validation", "--workers", "1", "--limit"]
    assert main([*arguments, "1"]) == 0
    assert "validation: 1 images of 1 people" in capsys.readouterr().out
    assert main([*arguments, "0"]) == 2
    assert "limit is 0; split 'validation' has 1 to 2000 images." in capsys.readouterr().err


def test_sample_is_the_beginning_of_the_test_split():
    (path,) = SAMPLE.glob("*.parquet")
    assert path.stat().st_size <= 4_000_000
    table = pq.read_table(path)
    assert table.num_rows == 300
    assert table["identity"].to_pylist() == [f"test-{k:05d}" for k in range(300)]
    row, sample = table.slice(7, 1).to_pylist()[0], render_sample(7, "test")
    assert np.allclose(row["facs"], list(sample.facs.values())) and row["levels"] == list(sample.levels.values())
    assert row["occurrences"] == list(sample.occurrences.values())
    assert np.allclose(row["landmarks"], sample.rendering.landmarks.ravel(), atol=0.01)
    stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])), float)
    # Another machine may round differently and JPEG loses a little; a changed renderer would differ by far more.
    assert np.abs(stored - sample.rendering.image).mean() < 6, (
        f"raise layout.VERSION ({VERSION}) and make the sample anew"
    )


def test_builder_gives_images_or_questions(tmp_path):
    faces = SyntheticFaces(cache_dir=str(tmp_path))
    faces.download_and_prepare()
    rows = faces.as_dataset("test")
    assert len(rows) == 300 and rows[0]["image"].size == (224, 224)
    for task, preset in (("detection", "bp4d"), ("intensity_level", "disfa"), ("intensity", "feafa")):
        builder = SyntheticFaces(config_name=task, cache_dir=str(tmp_path))
        builder.download_and_prepare()
        question = builder.as_dataset("test")[5]
        assert tuple(question["action_units"]) == PRESETS[preset] and question["task"] == task
        known = labels_of(rows[5], task)
        assert question["labels"] == pytest.approx([known[code] for code in PRESETS[preset]])
        assert question["completion"][0]["content"].count(",") == len(PRESETS[preset]) - 1
        assert question["subject"] == "test-00005"


def test_builder_sees_new_shards(tmp_path):
    folder, cache = tmp_path / "shards", str(tmp_path / "cache")
    folder.mkdir()
    table = pq.read_table(next(SAMPLE.glob("*.parquet")))
    for shard, expected in ((0, 3), (1, 6)):
        pq.write_table(table.slice(3 * shard, 3), folder / f"train-{shard:05d}.parquet")
        builder = SyntheticFaces(
            config_name="intensity", data_dir=str(folder), cache_dir=cache, action_units="AU12,FEAFA12"
        )
        builder.download_and_prepare()
        assert len(builder.as_dataset("train")) == expected
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="render them with"):
        SyntheticFaces(data_dir=str(folder), cache_dir=cache).download_and_prepare()


def test_builder_names_units_without_labels(tmp_path):
    builder = SyntheticFaces(config_name="detection", cache_dir=str(tmp_path), action_units="AU12,FEAFA12")
    with pytest.raises(ValueError, match="no detection label for FEAFA12"):
        builder.download_and_prepare()
