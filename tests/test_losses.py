import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from PIL import Image
from test_training import layout, make_trainer  # noqa: F401 (a fixture)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaProcessor
from au_llava.action_units import select
from au_llava.datasets_scripts.collator import QuestionCollator
from au_llava.datasets_scripts.instructions import Question, instruct, make_row
from au_llava.losses import AnswerTargets, AnswerTrainer, answer_loss, presence, soft_digits_table
from au_llava.shared_prefix import SharedPrefixTrainer


def row(task: str, codes: str, values: list[float]) -> dict:
    image = Image.effect_noise((224, 224), 50).convert("RGB")
    labels = {unit.code: value for unit, value in zip(select(codes), values, strict=True)}
    return make_row(
        image, labels, task, instruct(labels, task), dataset="drawn", subject="a", sequence="", frame=0
    )  # fmt: skip


@pytest.fixture
def mixed():
    """Rows of three tasks, with answers of three lengths."""
    return [
        row("detection", "AU1,AU6,AU12", [0, 1, 0]),
        row("intensity", "FEAFA1,FEAFA2", [0.39, 1.0]),
        row("intensity_level", "AU1,AU2,AU4,AU12", [0, 5, 3, 2]),
        row("detection", "AU1,AU6,AU12", [1, 1, 1]),
    ]


def collator(processor, **settings) -> QuestionCollator:
    targets = AnswerTargets(processor, **settings) if settings else None
    return QuestionCollator(
        DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True), targets=targets
    )


@pytest.fixture
def batch_of(processor):
    return lambda rows, **settings: collator(processor, **settings)(copy.deepcopy(rows))


def test_a_soft_level_is_a_normal_curve_and_detection_stays_hard(processor):
    grammar = processor.grammar("intensity_level", "disfa")
    digits = grammar.value_tokens[:, 0]
    table = soft_digits_table(grammar, digits, 0.1)
    expected = torch.tensor([0.0002, 0.1065, 0.7866, 0.1065, 0.0002])
    torch.testing.assert_close(table[3, 0, 1:], expected, atol=2e-4, rtol=0)
    grammar = processor.grammar("detection", "bp4d")
    torch.testing.assert_close(
        soft_digits_table(grammar, grammar.value_tokens[:, 0], 0.1)[:, 0], torch.eye(2), atol=1e-6, rtol=0
    )


def test_each_digit_of_a_decimal_gets_its_share_of_the_curve(processor):
    grammar = processor.grammar("intensity", "feafa")
    candidates = grammar.value_tokens.unique()
    table = soft_digits_table(grammar, candidates, 0.05)
    curve = torch.exp(-((torch.arange(101) - 39) ** 2) / (2 * 5.0**2))
    curve /= curve.sum()
    tokens = processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    place = {token: int((candidates == token).nonzero()) for token in tokens}
    for digit, token in enumerate(tokens):
        tenth = curve[10 * digit : 10 * digit + 10].sum()
        torch.testing.assert_close(table[39, 2, place[token]], tenth, atol=1e-6, rtol=1e-4)
        hundredth = curve[30 + digit] / curve[30:40].sum()
        torch.testing.assert_close(table[39, 3, place[token]], hundredth, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(table.sum(-1), torch.ones(101, 4))
    # Without softening every target is the label's own token.
    assert torch.equal(candidates[soft_digits_table(grammar, candidates, 0).argmax(-1)], grammar.value_tokens)


def test_at_the_defaults_the_loss_is_the_plain_one(tokenizer, layout, mixed, tmp_path):  # noqa: F811
    results, rights = [], []
    for kind, settings in ((SFTTrainer, {}), (AnswerTrainer, {"format_weight": 1.0})):
        model = tiny_model(copy.deepcopy(tokenizer)).train()
        trainer = make_trainer(kind, model, layout, mixed, tmp_path)
        batch = collator(layout, **settings)(copy.deepcopy(mixed))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(80))
        loss.backward()
        results.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
        with torch.no_grad():  # a model that says a comma here and there
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(",")] *= 100
            trainer.compute_loss(trainer.model, batch)
        rights.append(trainer._metrics["train"]["mean_token_accuracy"][-1])
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    assert 0 < rights[0] == pytest.approx(rights[1])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_mean_over_processes_is_that_over_all_their_words(tokenizer, layout, mixed, tmp_path, monkeypatch):  # noqa: F811
    model = tiny_model(copy.deepcopy(tokenizer)).train()
    trainer = make_trainer(AnswerTrainer, model, layout, mixed, tmp_path)

    def loss(words: torch.Tensor | None) -> torch.Tensor:
        return trainer.compute_loss(trainer.model, collator(layout)(copy.deepcopy(mixed)), num_items_in_batch=words)

    alone, own = loss(torch.tensor(80)), loss(None)
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    torch.testing.assert_close(loss(torch.tensor(80)), 4 * alone)
    torch.testing.assert_close(loss(None), own)


def test_words_are_scored_at_the_answers_alone(tokenizer, layout, mixed, tmp_path):  # noqa: F811
    model, places = tiny_model(copy.deepcopy(tokenizer)).train(), []
    trainer = make_trainer(AnswerTrainer, model, layout, mixed, tmp_path)
    trainer.model.lm_head.register_forward_hook(lambda head, given, scores: places.append(scores.shape[1]))
    batch = DataCollatorForVisionLanguageModeling(layout, completion_only_loss=True)(copy.deepcopy(mixed))
    first = int((batch["labels"] != -100).any(0).int().argmax())
    trainer.compute_loss(trainer.model, batch).backward()
    assert places == [batch["labels"].shape[1] - first + 1]
    assert places[0] < first


def test_the_nearer_digit_costs_less():
    logits = torch.zeros(1, 1, 6)
    table, tokens = torch.tensor([[[0.0, 0.1, 0.8, 0.1, 0.0, 0.0]]]), torch.arange(6)
    labels, weights = torch.tensor([[2]]), torch.ones(1, 1)
    costs = [answer_loss(logits + 5 * (tokens == said), labels, weights, table, tokens).item() for said in range(6)]
    assert costs[2] < costs[3] < costs[4]


def test_format_tokens_count_less_and_the_total_stays(batch_of, mixed, processor):
    plain, light = (batch_of(mixed, format_weight=weight) for weight in (1.0, 0.1))
    for number, line in enumerate(plain["labels"]):
        learnt = line != -100
        assert (plain["token_weights"][number] == learnt.float()).all()
        weights = light["token_weights"][number]
        torch.testing.assert_close(weights.sum(), learnt.sum().float())
        digits = torch.isin(line, torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789"))))
        assert weights[digits].unique().numel() == 1 == weights[learnt & ~digits].unique().numel()
        torch.testing.assert_close(weights[learnt & ~digits][0] * 10, weights[digits][0])


def test_rare_units_count_more_and_their_mean_weight_is_one(batch_of):
    rows = [row("detection", "AU1,AU2", [int(number == 0), int(number < 5)]) for number in range(10)]
    shares = presence(rows)
    assert shares == {("detection", "AU1"): 0.1, ("detection", "AU2"): 0.5}
    batch = batch_of(rows, rare_weight=1.0, shares=shares)
    digits = batch["soft_targets"].any(-1)
    first, second = batch["token_weights"][digits].view(10, 2).T
    torch.testing.assert_close(first[0], torch.tensor(5.0))  # half of the unit's weight on its one present label
    torch.testing.assert_close(first[1:], torch.full((9,), 5 / 9))
    torch.testing.assert_close(second, torch.ones(10))
    torch.testing.assert_close(batch["token_weights"][~digits & (batch["labels"] != -100)].unique(), torch.ones(1))


def test_a_handful_of_labels_does_not_rule_the_training(batch_of):
    batch = batch_of([row("detection", "AU1", [1])], rare_weight=1.0, shares={("detection", "AU1"): 1e-4})
    torch.testing.assert_close(batch["token_weights"].max(), torch.tensor(0.5 / 0.01))  # as of a hundredth


def test_targets_follow_shuffled_and_partial_questions(processor):
    labels = [0.12 * number for number in range(8)]
    rows = [row("intensity", ",".join(f"FEAFA{number}" for number in range(1, 9)), labels) for _ in range(2)]
    targets = AnswerTargets(processor)
    np.random.seed(0)
    collate = QuestionCollator(
        DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True),
        question=Question(shuffle=True, subset=0.5),
        targets=targets,
    )
    for _ in range(4):
        batch = collate(copy.deepcopy(rows))
        digits = batch["soft_targets"].any(-1)
        assert torch.equal(targets.candidates[batch["soft_targets"][digits].argmax(-1)], batch["labels"][digits])


@pytest.mark.parametrize("kind", [AnswerTrainer, SharedPrefixTrainer])
def test_training_with_every_setting_learns(tokenizer, processor, mixed, tmp_path, kind):
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    trainer = make_trainer(
        kind, tiny_model(copy.deepcopy(tokenizer)), own, mixed, tmp_path, max_steps=6, learning_rate=5e-3
    )
    trainer.data_collator = collator(own, soft_digits=0.1, rare_weight=0.5, format_weight=0.2, shares=presence(mixed))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert 0 <= history[-1]["mean_token_accuracy"] <= 1


@pytest.mark.parametrize("settings", [{"soft_digits": 2.0}, {"rare_weight": -1}, {"format_weight": -0.1},
                                      {"rare_weight": 0.5}, {"soft_digits": float("nan")}])  # fmt: skip
def test_settings_out_of_range_are_named(processor, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AnswerTargets(processor, **settings)


def test_a_cut_answer_is_refused(processor, batch_of, mixed):
    batch = batch_of(mixed)
    answers = [("detection", select("AU1,AU6"), [0, 1])] * 4
    with pytest.raises(ValueError, match="answer tokens"):
        AnswerTargets(processor)(batch["labels"], answers)
