import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava.action_units import ActionUnit, parse_answer, select
from au_llava.datasets_scripts.augmentation import NOTHING, Augmentation
from au_llava.datasets_scripts.instructions import (
    FEATURES,
    FreshSamples,
    Question,
    instruct,
    learn_relations,
    lists_in,
    make_row,
    mix,
)


LEVELS = {"AU1": 0.0, "AU4": 3.0, "AU12": 5.0, "AU25": float("nan")}


def rows(dataset: str, task: str, labels: dict, count: int) -> Dataset:
    sample = instruct(labels, task)
    origin = {"dataset": dataset, "subject": "S", "sequence": "S_1"}
    image = Image.new("RGB", (8, 8))
    return Dataset.from_list(
        [make_row(image, labels, task, sample, frame=frame, **origin) for frame in range(count)], features=FEATURES
    )


def asked(sample: dict) -> list[str]:
    """The codes that the prompt lists, in order."""
    return [line.split()[0] for line in sample["prompt"][0]["content"].splitlines() if ": the " in line]


def test_prompt_and_completion_are_messages_with_plain_text():
    sample = instruct(LEVELS, "intensity_level")
    assert sample["completion"] == [{"role": "assistant", "content": "[0, 3, 5]"}]
    assert sample["prompt"][0]["role"] == "user" and isinstance(sample["prompt"][0]["content"], str)


def test_unknown_labels_are_left_out_of_the_question():
    assert asked(instruct(LEVELS, "intensity_level")) == ["AU1", "AU4", "AU12"]
    assert asked(instruct(LEVELS, "intensity_level", ["AU25", "AU6", "AU4"])) == ["AU4"]
    with pytest.raises(ValueError, match="AU25 has a known label"):
        instruct(LEVELS, "intensity_level", ["AU25"])


@pytest.mark.parametrize("question", [Question(shuffle=True), Question(subset=1), Question(True, 0.5)])
def test_any_question_asks_for_the_values_of_the_units_it_names(question):
    labels = {f"FEAFA{index}": index / 100 for index in range(1, 25)}
    generator, seen = np.random.default_rng(0), []
    for _ in range(200):
        sample = instruct(labels, "intensity", question=question, generator=generator)
        codes = asked(sample)
        answer = parse_answer(sample["completion"][0]["content"], "intensity", select(codes))
        assert answer == [labels[code] for code in codes]
        seen.append(codes)
    inorder = sum(codes == sorted(codes, key=lambda code: int(code[5:])) for codes in seen)
    complete = sum(len(codes) == 24 for codes in seen)
    assert (inorder < 50) if question.shuffle else (inorder == 200)
    # A subset may still be complete by chance, once in 24.
    assert complete == 200 if not question.subset else 0 < complete < 200 * (1 - question.subset) + 30


def test_chance_needs_a_generator_and_repeats_with_its_seed():
    question = Question(shuffle=True, subset=0.5)
    with pytest.raises(ValueError, match="generator"):
        instruct(LEVELS, "intensity_level", question=question)
    first, again = (
        instruct(LEVELS, "intensity_level", question=question, generator=np.random.default_rng(7)) for _ in range(2)
    )
    assert first == again


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="AU12.*5"):
        instruct({"AU12": 5}, "detection")


def test_relations_are_conditional_frequencies_among_known_labels():
    nan = math.nan
    # AU6 is active in four frames with known AU12, three of which show AU12; AU12 never goes with AU4.
    labels = np.array(
        [[2, 2, 0], [3, 5, 0], [2, 4, 0], [2, 0, 3], [2, nan, 0], [0, 0, 2], [0, 1, 4], [1, 0, 0]], dtype=float
    )
    relations = learn_relations(labels, ["AU6", "AU12", "AU4"], active_from=2)
    told = {link[:2]: link[2:] for link in relations.links}
    phi = np.corrcoef((labels >= 2)[[0, 1, 2, 3, 5, 6, 7]].T)
    assert told["AU12", "AU6"] == pytest.approx((1.0, phi[0, 1]))
    assert told["AU12", "AU4"] == pytest.approx((0.0, phi[1, 2]))
    prompt = instruct({"AU12": 1, "AU6": 1}, "detection", question=Question(relations=relations))["prompt"]
    assert "when AU12 is active, AU6 is active in 100 % of frames" in prompt[0]["content"]
    assert "AU4" not in prompt[0]["content"]


def test_relations_need_a_column_for_each_code():
    with pytest.raises(ValueError, match="give \\(frames, 2\\)"):
        learn_relations(np.zeros((5, 3)), ["AU1", "AU2"], 1)


def labelled(counts: dict[str, int], codes: list[str], task: str = "detection") -> list[dict]:
    """Rows without pictures: by the codes that are unknown in them, with blanks between, how many."""
    rows = []
    for unknown, count in counts.items():
        labels = [math.nan if code in unknown.split() else 1.0 for code in codes]
        rows += [{"task": task, "action_units": codes, "labels": labels}] * count
    return rows


def test_the_list_that_most_rows_ask_about_stands_first():
    codes = ["AU1", "AU6", "AU7", "AU12"]

    def found(**counts):
        return lists_in(Dataset.from_list(labelled(counts, codes)))["detection"]

    # One unknown label in a thousand rows makes no list.
    assert found(**{"AU1": 1, "": 999}) == [codes]
    assert found(**{"AU7": 10, "": 989, "AU1": 1}) == [codes, ["AU1", "AU6", "AU12"]]
    assert found(**{"AU7": 600, "": 400}) == [["AU1", "AU6", "AU12"], codes]
    # As many rows each: the longer list, then by codes, whichever comes first among the rows.
    equal = {"AU1 AU12": 1, "AU12": 1, "AU1": 1}
    ranked = [["AU1", "AU6", "AU7"], ["AU6", "AU7", "AU12"], ["AU6", "AU7"]]
    assert found(**equal) == found(**dict(reversed(equal.items()))) == ranked


def test_lists_are_counted_by_task_and_one_is_always_kept():
    codes = [f"FEAFA{number}" for number in range(1, 9)]
    single = {" ".join(code for bit, code in enumerate(codes) if number >> bit & 1): 1 for number in range(1, 202)}
    many = labelled(single, codes, "intensity")  # 201 combinations, none of them in a row of a hundred
    few = labelled({"": 1}, ["AU12"], "intensity_level")  # less than a hundredth of all rows, and all of its task
    assert lists_in(Dataset.from_list(many + few)) == {
        "intensity": [codes[:7]],
        "intensity_level": [["AU12"]],
    }


def test_mixture_keeps_rows_whole_and_follows_the_weights():
    parts = [
        rows("bp4d", "detection", {"AU1": 1.0, "AU2": math.nan}, 60),
        rows("disfa", "intensity_level", {"AU25": 4.0}, 60),
        rows("feafa", "intensity", {"FEAFA9": 0.35}, 60),
    ]
    mixed = mix(parts, weights=[2, 1, 1], seed=3)
    counts = {name: mixed["dataset"][:100].count(name) for name in ("bp4d", "disfa", "feafa")}
    assert 38 <= counts["bp4d"] <= 62 and 14 <= counts["disfa"] <= 36
    assert all(set(zip(mixed["dataset"], mixed["frame"], strict=True)) >= {(n, f) for f in range(60)} for n in counts)
    bp4d = next(row for row in mixed if row["dataset"] == "bp4d")
    assert bp4d["labels"][0] == 1 and math.isnan(bp4d["labels"][1]) and bp4d["action_units"] == ["AU1", "AU2"]
    assert next(row for row in mixed if row["dataset"] == "feafa")["completion"][0]["content"] == "[0.35]"
    assert mix(parts, weights=[2, 1, 1], seed=3)["frame"] == mixed["frame"]
    with pytest.raises(ValueError, match="weight"):
        mix(parts, weights=[1, 0, 1])


def test_fresh_samples_mirror_the_labels_and_the_wording():
    wink = ActionUnit("WINK", "Left Wink", "the left eye closes", "left eyelids", side="left")
    labels = {"FEAFA1": 0.9, "FEAFA2": 0.1, wink: 1.0}
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 3), (255, 255, 255))
    row = make_row(
        image, labels, "intensity", instruct(labels, "intensity"),
        dataset="own", subject="S", sequence="S", frame=4,
    )  # fmt: skip
    plain = Dataset.from_list([row], features=FEATURES)
    flipped = plain.with_transform(FreshSamples(type(NOTHING)(**vars(NOTHING) | {"flip": 1.0}), action_units=[wink]))[
        0
    ]
    assert flipped["labels"] == [0.1, 0.9, 1.0] and flipped["action_units"] == ["FEAFA1", "FEAFA2", "WINK"]
    assert "WINK Right Wink: the right eye closes. Look at the right eyelids." in flipped["prompt"][0]["content"]
    assert flipped["completion"][0]["content"] == "[0.10, 0.90, 1.00]" and flipped["frame"] == 4
    assert flipped["images"][0].getpixel((7, 3)) == (255, 255, 255)


def test_fresh_samples_follow_numpys_global_seed():
    fresh = rows("disfa", "intensity_level", {f"AU{au}": 1.0 for au in (1, 2, 4, 5, 6, 9, 12)}, 3).with_transform(
        FreshSamples(question=Question(shuffle=True))
    )
    np.random.seed(5)
    first = fresh[:]["prompt"]
    second = fresh[:]["prompt"]
    np.random.seed(5)
    assert fresh[:]["prompt"] == first != second


def test_rows_are_what_trl_trains_on(processor):
    """The loss lies on the answer and its end token alone."""
    data = rows("bp4d", "detection", {"AU6": 1.0, "AU7": math.nan, "AU12": 0.0}, 2)
    data = data.map(lambda row: {"images": [Image.new("RGB", (224, 224))]}, features=FEATURES)
    for batch in (data[:], data.with_transform(FreshSamples(Augmentation()))[:]):
        collate = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)
        tensors = collate([dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)])
        trained = tensors["labels"][tensors["labels"] != -100].reshape(2, -1)
        eos = processor.tokenizer.eos_token
        assert [text.strip() for text in processor.tokenizer.batch_decode(trained)] == ["[1, 0]" + eos] * 2
        assert tensors["pixel_values"].shape == (2, 3, 224, 224)
