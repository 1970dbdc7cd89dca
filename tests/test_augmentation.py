import time
from dataclasses import fields, replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from au_llava.action_units import PRESETS, ActionUnit
from au_llava.datasets_scripts.augmentation import NOTHING, Augmentation, draw_sheet, main, mirror_labels


NAMES = [field.name for field in fields(Augmentation)]
# The order in which the 24 units of FEAFA stand after a flip, from 0.
FLIPPED = [1, 0, 3, 2, 5, 4, 7, 6, 8, 10, 9, 12, 11, 14, 13, 15, 16, 17, 18, 19, 20, 21, 22, 23]


@pytest.fixture
def face() -> Image.Image:
    """Smooth colours with a bright spot: every change can be seen in it."""
    y, x = np.mgrid[0:224, 0:224] / 223
    image = Image.fromarray((np.stack([60 + 120 * x, 90 + 60 * y, 140 - 80 * x * y], -1)).astype(np.uint8))
    image.paste((255, 255, 255), (50, 100, 60, 110))
    return image


def spot(image: Image.Image) -> np.ndarray:
    """Centre (x, y) of the bright spot."""
    y, x = np.nonzero(np.asarray(image).min(-1) > 225)
    return np.array([x.mean(), y.mean()])


def changed(image: Image.Image, seed: int = 0, **settings) -> Image.Image:
    return replace(NOTHING, **settings)(image, {"AU12": 1.0}, np.random.default_rng(seed))[0]


def test_flip_exchanges_the_left_and_right_units_of_feafa():
    labels = {code: float(index) for index, code in enumerate(PRESETS["feafa"])}
    assert list(mirror_labels(labels).values()) == FLIPPED
    assert list(mirror_labels(labels)) == list(labels)
    assert mirror_labels(mirror_labels(labels)) == labels


def test_flip_keeps_facs_labels_and_turns_own_units_round():
    wink = ActionUnit("WINK", "Left Wink", "the left eye closes", "left eyelids", side="left")
    turned = mirror_labels({"AU1": 0.0, wink: 1.0, "FEAFA12": 0.4})
    assert turned == {"AU1": 0.0, wink.mirrored(): 1.0, "FEAFA13": 0.4}
    assert wink.mirrored().action == "the right eye closes"


def test_picture_and_labels_flip_together(face):
    augment, generator = replace(NOTHING, flip=0.5), np.random.default_rng(1)
    flips = 0
    for _ in range(100):
        image, labels = augment(face, {"FEAFA1": 0.2, "FEAFA2": 0.8}, generator)
        flipped = spot(image)[0] > 112
        assert labels["FEAFA1"] == (0.8 if flipped else 0.2)
        flips += flipped
    assert 35 <= flips <= 65


@pytest.mark.parametrize("other", [{}, {"FEAFA2": float("nan")}])
def test_a_picture_is_not_flipped_where_other_units_would_be_asked_about(face, other):
    image, labels = replace(NOTHING, flip=1.0)(face, {"FEAFA1": 0.2, "AU12": 1.0, **other}, np.random.default_rng(0))
    assert np.array_equal(np.asarray(image), np.asarray(face)) and list(labels) == ["FEAFA1", "AU12", *other]


@pytest.mark.parametrize("name", NAMES)
def test_each_change_works_alone_and_is_off_at_zero(face, name):
    off = replace(NOTHING, **{name: 0.0})(face, {"AU12": 1.0}, np.random.default_rng(0))
    assert np.array_equal(np.asarray(off[0]), np.asarray(face)) and off[1] == {"AU12": 1.0}
    value = 1.0 if name in ("flip", "blur", "jpeg", "occlusion") else getattr(Augmentation(), name)
    one, again, other = (changed(face, seed, **{name: value}) for seed in (0, 0, 1))
    assert one.size == face.size and one.mode == "RGB"
    assert not np.array_equal(np.asarray(one), np.asarray(face))
    assert np.array_equal(np.asarray(one), np.asarray(again))
    if name != "flip":
        assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_the_picture_moves_by_the_amounts_that_are_set(face):
    centre, seeds = np.array([112, 112]), range(40)
    arm = spot(face) - centre
    shifts = np.array([spot(changed(face, seed, shift=0.05)) - spot(face) for seed in seeds]) / 224
    assert 0.045 < abs(shifts).max() < 0.052 and abs(shifts.mean()) < 0.02
    arms = np.array([spot(changed(face, seed, scale=0.1)) - centre for seed in seeds])
    ratio = np.linalg.norm(arms, axis=1) / np.linalg.norm(arm)
    assert 0.89 < ratio.min() < 0.93 and 1.07 < ratio.max() < 1.11
    arms = np.array([spot(changed(face, seed, rotation=10)) - centre for seed in seeds])
    turn = np.degrees(np.arctan2(arms[:, 1], arms[:, 0]) - np.arctan2(arm[1], arm[0]) + np.pi) % 360 - 180
    assert -10.5 < turn.min() < -8 and 8 < turn.max() < 10.5
    assert np.allclose(np.linalg.norm(arms, axis=1), np.linalg.norm(arm), atol=0.7)


def test_brightness_contrast_and_colour_do_what_they_say(face):
    before = np.asarray(face).astype(float)
    for seed in range(10):
        bright = np.asarray(changed(face, seed, brightness=0.2)).astype(float)
        inside = (before > 10) & (before < 200)
        ratio = bright[inside] / before[inside]
        assert ratio.min() > 0.78 and ratio.max() < 1.22 and ratio.std() < 0.02
        flat = np.asarray(changed(face, seed, contrast=0.3)).astype(float)
        grey = np.array([0.299, 0.587, 0.114])
        assert abs((flat @ grey).mean() - (before @ grey).mean()) < 1.5
    grey = Image.merge("RGB", [face.getchannel("R")] * 3)
    tints = [np.asarray(changed(grey, seed, colour=0.4)).astype(float).mean((0, 1)) for seed in range(10)]
    assert max(np.ptp(tint) for tint in tints) > 10


def test_occlusions_stay_small_and_the_original_untouched(face):
    before = np.asarray(face).copy()
    for seed in range(30):
        covered = (np.asarray(changed(face, seed, occlusion=1.0)) != before).any(-1)
        assert 0 < covered.mean() <= 0.0625
    assert np.array_equal(np.asarray(face), before)


def test_settings_out_of_range_are_refused():
    for settings in ({"flip": 1.5}, {"rotation": -1}, {"scale": 1}, {"blur": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Augmentation(**settings)


def test_augmentation_is_fast(face):
    augment, generator = Augmentation(), np.random.default_rng(0)
    start = time.process_time()
    for _ in range(100):
        augment(face, {"AU12": 1.0}, generator)
    assert (time.process_time() - start) / 100 < 0.006  # 1.7 ms measured on one core


def test_the_sheet_shows_every_change(face, tmp_path):
    sheet = draw_sheet(face)
    assert sheet.height == (len(NAMES) + 1) * 112
    face.save(tmp_path / "face.png")
    main(["--image", str(tmp_path / "face.png"), "--detector", "none", "--output", str(tmp_path / "sheet.jpg")])
    assert Image.open(BytesIO((tmp_path / "sheet.jpg").read_bytes())).size == sheet.size
