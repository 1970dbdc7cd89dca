"""The stages that make the default checkpoint, on a tiny model and the committed faces."""

import argparse
import copy
import json
import sys
from concurrent.futures import Future

import pyarrow.parquet as pq
import pytest
import torch
from conftest import killed, tiny_model
from torch import nn
from transformers import LlamaConfig, ResNetConfig, ResNetModel
from transformers.models.llama.modeling_llama import LlamaMLP

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import TASKS
from au_llava.datasets_scripts.synthetic_faces.builder import SAMPLE, labels_of
from au_llava.datasets_scripts.synthetic_faces.expression import FACS_CODES
from au_llava.losses import soft_digits_table
from checkpoint import cost, estimates, language, mean, practice, pretrain, publish, reading
from checkpoint.estimates import Glance, train_estimates
from checkpoint.muon import Muon, layer_weights, make_optimizers
from checkpoint.practice import encode, practise, versions
from checkpoint.pretrain import (
    LABELS,
    MEAN,
    SIZE,
    UNITS,
    VIEW,
    augment,
    deepen,
    middle,
    mirrored_units,
    read_shards,
    units_of,
)
from checkpoint.questions import ALONE, LISTS, Question, lifelike, trained_lists
from checkpoint.reading import append_reader, gates_of, refit, train_reader, wake


TINY_RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1], layer_type="basic")


@pytest.fixture
def text_first(tokenizer):
    return AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56, prompt_layout="text_first")


@pytest.fixture(scope="module")
def rows():
    (file,) = SAMPLE.glob("*.parquet")
    return pq.read_table(file, columns=[*LABELS, "occurrences"]).slice(0, 8).to_pylist()


@pytest.mark.parametrize("task", list(TASKS))
def test_questions_are_those_of_the_processor(model, text_first, rows, task):
    question = Question(text_first, task, TASKS[task].preset)
    answers = question.write(question.labels(rows[:2]))
    user, labels = text_first.messages(task), [labels_of(row, task) for row in rows[:2]]
    texts = [TASKS[task].write(known[unit.code]) for known in labels for unit in question.units]
    assert texts[: len(question.units)] == text_first.tokenizer.decode(answers[0])[2:].split("]")[0].split(", ")

    pictures = torch.randn(2, 3, 224, 224)
    prompt = text_first.apply_chat_template(user, add_generation_prompt=True).replace("<image>", "<image>" * 16)
    ids = torch.tensor(text_first.tokenizer(prompt, add_special_tokens=False)["input_ids"]).expand(2, -1)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, answers], 1), pixel_values=pictures).logits
        image = torch.stack(model.get_image_features(pictures).pooler_output)
        state = question.put(model.model.language_model, image, answers).last_hidden_state
    length = answers.shape[1]
    torch.testing.assert_close(model.lm_head(state)[:, -length:], whole[:, -length:], atol=1e-4, rtol=1e-4)


def test_smiles_and_raised_cheeks_mostly_come_together():
    def face(cheeks, smile):
        return {"facs": [cheeks if code == "AU6" else smile if code == "AU12" else 0.5 for code in FACS_CODES]}

    together, neither, faint = face(0.5, 0.5), face(0.0, 0.0), face(0.0, 0.2)
    smile_alone, cheeks_alone = face(0.1, 0.4), face(0.2, 0.1)
    torch.manual_seed(0)
    kept = lifelike([together, neither, faint] + 500 * [smile_alone] + 500 * [cheeks_alone])
    assert kept[:3].tolist() == [0, 1, 2] and len(kept.unique()) == len(kept)
    for first in (3, 503):
        assert ((kept >= first) & (kept < first + 500)).float().sum() / 500 == pytest.approx(ALONE, abs=0.06)


def test_what_was_asked_is_known_afterwards(text_first):
    lists = trained_lists()
    assert {task: len(known) for task, known in lists.items()} == {
        "detection": 1, "intensity_level": 1, "intensity": 2
    }  # fmt: skip
    text_first.trained_lists = lists
    for code, place in (("AU12", 1), ("FEAFA3", 0)):
        ((_, asked),) = text_first.questions("intensity", code)
        assert [unit.code for unit in asked] == lists["intensity"][place]


def test_a_mirrored_face_has_its_sides_exchanged(text_first, rows):
    mirrored, units = mirrored_units(), torch.from_numpy(units_of(rows[0]))
    assert units.shape == (UNITS,) and torch.equal(units[mirrored][mirrored], units)
    places = Question(text_first, "intensity", "feafa").mirrored()
    assert torch.equal(places + 23, mirrored[23:47]) and places[:2].tolist() == [1, 0]  # left and right eye


def test_the_encoder_learns_from_what_it_will_see(tokenizer):
    """The middle of a crop: by the training's own cut, by the processor, and in the middle of augmented pictures."""
    faces = read_shards(sorted(SAMPLE.glob("test-*.parquet")), 2)
    assert faces["images"].shape == (2, 3, 224, 224)
    processor = AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56, view=VIEW)
    assert processor.view == pytest.approx(VIEW, abs=0.002) and processor.image_tokens == 16
    crops = [picture.permute(1, 2, 0).numpy() for picture in faces["images"]]
    used = processor(images=crops, task="detection")["pixel_values"]
    cut = middle(faces["images"])
    assert cut.shape == (2, 3, SIZE, SIZE)
    larger = nn.functional.interpolate(cut, size=used.shape[2:], mode="bilinear")
    assert (larger - used).abs().mean() < 0.1
    many = {name: values[:1].repeat_interleave(200, 0) for name, values in faces.items()}
    changed = augment(many, torch.Generator().manual_seed(0))
    assert changed["images"].shape == (200, 3, SIZE, SIZE) and changed["images"].min() >= (-MEAN / 0.225).min() - 0.1
    mean = changed["images"][~changed["flipped"]].mean(0)
    both = torch.stack([mean.flatten(), cut[0].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    same = augment(many, torch.Generator().manual_seed(0), strength=0.0)
    turned = same["flipped"][:, None, None, None]
    assert torch.allclose(same["images"], torch.where(turned, cut[:1].flip(3), cut[:1]), atol=0.01)


def test_an_encoder_learns_on_as_faces_come(tmp_path, monkeypatch):
    (file,) = SAMPLE.glob("*.parquet")
    faces, folders = pq.read_table(file), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    pq.write_table(faces.slice(0, 6), folders[0] / "train-00000.parquet")
    pq.write_table(faces.slice(6, 3), folders[0] / "validation-00000.parquet")
    # With four channels torch 2.13 crashes on some processors, in the gradient of filters in channels-last order.
    wider = ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic")
    monkeypatch.setattr(pretrain, "make_encoder", lambda architecture: ResNetModel(wider))
    strengths: list[float] = []

    def change(batch: dict, generator: torch.Generator, strength: float) -> dict:
        strengths.append(strength)
        return augment(batch, generator, strength)

    monkeypatch.setattr(pretrain, "augment", change)

    def run(*options: str) -> list[dict]:
        data = ["--data_dir", *map(str, folders), "--output_dir", str(tmp_path / "encoder"), "--batch_size", "2"]
        monkeypatch.setattr(sys, "argv", ["pretrain", *data, *options])
        strengths.clear()
        pretrain.main()
        return [json.loads(line) for line in (tmp_path / "encoder" / "log.jsonl").read_text().splitlines()]

    (first,) = run("--epochs", "1")
    assert first["faces"] == 6 and first["units"] > 0 and list(first["validation_correlation"]) == [str(folders[0])]
    pq.write_table(faces.slice(9, 4), folders[1] / "train-00000.parquet")
    assert strengths == [1.0] * 3
    resumed = run("--epochs", "2", "--strength", "0.8", "0.2")
    assert strengths == pytest.approx([0.5, 0.44, 0.38, 0.32, 0.26])  # the second half of the way from 0.8 to 0.2
    assert [(log["epoch"], log["faces"]) for log in resumed] == [(1, 6), (2, 10)]
    timed = run("--minutes", str(resumed[-1]["minutes"] + 0.02))  # about a second more
    assert len(timed) > 2 and all(log["units"] > 0 for log in timed)
    assert ResNetModel.from_pretrained(tmp_path / "encoder").config.hidden_sizes == wider.hidden_sizes
    with pytest.raises(ValueError, match="was begun with seed 0, and now it is 1. Give another output_dir"):
        run("--seed", "1")
    means = ["--encoders", str(tmp_path / "encoder"), str(tmp_path / "fresh"), "--output_dir", str(tmp_path / "mean")]
    ResNetModel(wider).save_pretrained(tmp_path / "fresh")
    monkeypatch.setattr(sys, "argv", ["mean", *means, "--shares", "0.75", "0.25"])
    mean.main()
    learnt, fresh, between = (
        pretrain.encoder_of(tmp_path / name).state_dict() for name in ("encoder", "fresh", "mean")
    )
    name = "encoder.stages.0.layers.0.layer.0.convolution.weight"
    torch.testing.assert_close(between[name], 0.75 * learnt[name] + 0.25 * fresh[name])
    going_on = ["--encoder", str(tmp_path / "mean"), "--epochs", "1", "--output_dir", str(tmp_path / "gone_on")]
    run(*going_on, "--learning_rate", "0")
    torch.testing.assert_close(pretrain.encoder_of(tmp_path / "gone_on").state_dict()[name], between[name])
    monkeypatch.setattr(sys, "argv", ["mean", *means, "--shares", "0.75", "0.3"])
    with pytest.raises(SystemExit):
        mean.main()
    wrong = ["--depths", "1", "1", "2", "1"], ["--encoder", ".", "--architecture", "dinov2"], ["--strength", *"111"]
    for contradiction in wrong:
        with pytest.raises(SystemExit):
            run(*contradiction)


def test_heads_of_an_encoder_that_knows_something_begin_from_linear_fits(monkeypatch):
    faces = read_shards(sorted(SAMPLE.glob("test-*.parquet")), 40)
    learner = pretrain.Pretrainer(ResNetModel(TINY_RESNET), faces)
    teacher = copy.deepcopy(learner)
    for head in (teacher.units, teacher.flow, teacher.landmarks):
        nn.init.normal_(head.weight)
    monkeypatch.setattr(learner, "wanted", lambda batch: teacher(batch["images"]))
    batch = augment(faces, torch.Generator().manual_seed(0))
    learner.fit_heads([{name: values[rows] for name, values in batch.items()} for rows in torch.arange(40).split(16)])
    with torch.no_grad():
        for said, right in zip(learner(batch["images"]), teacher(batch["images"]), strict=True):
            assert (said - right).pow(2).mean() < 0.03 * right.var()


def test_faces_that_were_being_read_are_taken_when_they_are(tmp_path):
    faces = pretrain.Faces([tmp_path], torch.device("cpu"), 1, None)
    ready, later, read = Future(), Future(), {"images": torch.zeros(2, 1)}
    ready.set_result(read)
    faces.pool = Pool([ready, later])
    (tmp_path / "train-00000.parquet").touch()
    faces.look()
    (tmp_path / "train-00001.parquet").touch()
    faces.look()
    assert len(faces) == 2
    later.set_result(read)
    faces.look()
    assert len(faces) == 4
    faces.look()
    assert len(faces) == 4


class Pool:
    """Gives what a test lays down, one after the other."""

    def __init__(self, results: list[Future]):
        self.results = results

    def submit(self, *_):
        return self.results.pop(0)


def test_a_deeper_encoder_sees_the_same_and_goes_on_learning():
    torch.manual_seed(0)
    encoder, pictures = ResNetModel(TINY_RESNET).eval(), torch.randn(2, 3, 64, 64)
    deeper = deepen(encoder, [2, 1, 3, 1])
    assert deeper.config.depths == [2, 1, 3, 1] and encoder.config.depths == [1, 1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(
            deeper.eval()(pictures).last_hidden_state, encoder(pictures).last_hidden_state, atol=1e-5, rtol=1e-5
        )
    deeper.train()(pictures).last_hidden_state.pow(2).sum().backward()
    added = deeper.encoder.stages[2].layers[2].layer[1].normalization
    assert added.weight.grad.abs().max() > 0
    for fewer in ([1, 1, 1, 0], [2, 2, 2]):
        with pytest.raises(ValueError, match="depths is"):
            deepen(encoder, fewer)


def test_filters_take_the_steps_of_the_matrices_that_they_are():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    matrix = nn.Parameter(convolution.weight.detach().permute(0, 2, 3, 1).reshape(4, 27).clone())
    matrix.grad = torch.randn(4, 27)
    convolution.weight.grad = matrix.grad.view(4, 3, 3, 3).permute(0, 3, 1, 2)
    Muon([convolution.weight], lr=0.1).step()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(convolution.weight.detach().permute(0, 2, 3, 1).reshape(4, 27), matrix.detach())
    with pytest.raises(ValueError, match="channels_last"):
        Muon([nn.Conv2d(3, 4, 3).weight], lr=0.1)


def test_every_weight_has_one_optimizer():
    model = nn.Sequential(ResNetModel(TINY_RESNET), nn.Linear(8, 2)).to(memory_format=torch.channels_last)
    model[0].embedder.requires_grad_(False)
    layers = layer_weights(model[0])
    assert len(layers) > 8 and all(weight.ndim == 4 for weight in layers)
    inner, others = make_optimizers(model[0], list(model.parameters()), lr=0.1)
    assert all(a is b for a, b in zip(inner.weights, layers, strict=True))
    rest = others.param_groups[0]["params"]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {id(weight) for weight in [*layers, *rest]} == {id(weight) for weight in trained}
    assert len(layers) + len(rest) == len(trained)


def test_a_refitted_projector_says_of_another_encoder_what_it_said_of_the_old_one():
    torch.manual_seed(0)
    projector, turn = nn.Linear(12, 20), torch.linalg.qr(torch.randn(12, 12)).Q
    before = torch.randn(300, 4, 12)
    wanted = projector(before)
    refit(projector, before, before @ turn + 1)
    torch.testing.assert_close(projector(before @ turn + 1), wanted, atol=0.02, rtol=0.02)


def test_a_projector_can_be_refitted_to_more_tokens():
    torch.manual_seed(0)
    projector = nn.Linear(12, 20)
    slopes = torch.randn(300, 12, 2)

    def seen(side: int) -> torch.Tensor:
        """Pictures whose features change evenly from edge to edge, at the middles of `side` x `side` places."""
        middles = (torch.arange(side) + 0.5) / side
        grid = torch.stack(torch.meshgrid(middles, middles, indexing="ij"))
        return torch.einsum("pws,sab->pabw", slopes, grid).flatten(1, 2)

    wanted = projector(seen(6)).unflatten(1, (6, 6))[:, 1:5, 1:5]
    refit(projector, seen(3), seen(6))
    found = projector(seen(6)).unflatten(1, (6, 6))[:, 1:5, 1:5]
    assert (found - wanted).abs().mean() < 0.1 * wanted.std()


def test_practice_sees_faces_as_in_use_or_mirrored():
    torch.manual_seed(0)
    encoder, faces = ResNetModel(TINY_RESNET).eval(), read_shards(sorted(SAMPLE.glob("test-*.parquet")), 8)
    tokens, flipped = versions(encoder, faces, 2, seed=0)
    seen = middle(faces["images"])
    plain, mirrored = encode(encoder, seen), encode(encoder, seen.flip(3))
    assert tokens.shape == (2, *plain.shape) and 0 < flipped.sum() < flipped.numel()
    torch.testing.assert_close(tokens, torch.where(flipped[:, :, None, None], mirrored, plain), atol=1e-2, rtol=1e-2)
    assert (mirrored - plain).abs().max() > 0.1


def test_practice_learns_and_goes_on_as_if_never_stopped(model, text_first, rows, tmp_path, monkeypatch):
    tokens = torch.randn(2, len(rows), 16, 32).half()
    flipped = torch.tensor([[False] * len(rows), [True] * len(rows)])
    args = argparse.Namespace(steps=6, batch_size=4, learning_rate=1e-2, format_weight=1.0, seed=0)
    start = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(practice, "KEEP", 2)

    def run(name: str) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        practise(model, text_first, rows, tokens, flipped, args, tmp_path / name)
        return copy.deepcopy(model.state_dict())

    whole = run("whole.pt")
    with killed(monkeypatch, practice, step=4), pytest.raises(KeyboardInterrupt):
        run("stopped.pt")
    resumed = run("stopped.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    moved = {name.split(".")[1] for name in whole if not torch.equal(whole[name], start[name])}
    assert moved == {"language_model", "multi_modal_projector", "weight"}  # the encoder stays as it is


def test_a_one_before_the_point_does_not_make_up_for_what_follows_it(text_first):
    question = Question(text_first, "intensity", "disfa")
    table = soft_digits_table(question.grammar, question.letters, practice.SPREAD)
    digits = text_first.tokenizer.convert_tokens_to_ids(list("0123456789"))

    def loss_of(one: float, tenth: int) -> float:
        """Of an answer to 0.33: how probable a 1 before the point is, and which digit is written after it."""
        said = torch.full((1, 12, 3, len(text_first.tokenizer)), 1e-4)
        said[:, :, 0, digits[0]], said[:, :, 0, digits[1]] = 1 - one, one
        said[:, :, 1, digits[tenth]] = said[:, :, 2, digits[3]] = 1
        wanted = torch.full((1, 12), 33)
        return practice.value_loss(question, said.log(), wanted, table, torch.full((12,), 0.1)).item()

    assert loss_of(one=0.3, tenth=0) > loss_of(one=0.01, tenth=0) > loss_of(one=0.01, tenth=3)


def test_a_neuron_whose_gate_has_shut_speaks_of_its_unit_again():
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24))
    # Five units with three digits and five with one; each place has a mark of its own, and each unit its value's.
    values, marks, ways = (
        [torch.rand(200, 5), torch.rand(200, 5)],
        torch.eye(32)[:20].split([15, 5]),
        torch.eye(32)[20:],
    )
    entering = [
        4 * mark.view(5, -1, 32) + (right[:, :, None] * way)[:, :, None]
        for mark, right, way in zip(marks, values, ways[:10].split(5), strict=True)
    ]
    shut = 2 * 3 + 1  # the third unit's first digit after the point
    with torch.no_grad():
        mlp.gate_proj.weight[:20] = gates_of(entering)
        mlp.up_proj.weight[:20] = torch.cat([ways[:5].repeat_interleave(3, 0), ways[5:10]])
        inputs = torch.cat([places.flatten(1, 2) for places in entering], 1) @ mlp.gate_proj.weight[:20].T
        assert ((inputs > 0) == torch.eye(20).bool()).all()
        assert wake(mlp, entering, values) == 0
        mlp.gate_proj.weight[shut] *= -1
        before = mlp.gate_proj.weight.clone()
        assert wake(mlp, entering, values) == 1
        assert (mlp.gate_proj.weight != before).any(1).nonzero().flatten().tolist() == [shut]
        here = entering[0][:, 2, 1]
        said = nn.functional.silu(here @ mlp.gate_proj.weight[shut]) * (here @ mlp.up_proj.weight[shut])
    assert torch.corrcoef(torch.stack([said, values[0][:, 2]]))[0, 1] > 0.95


def test_estimates_learn_from_an_encoder_that_says_something_else(tokenizer, text_first, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = tiny_model(copy.deepcopy(tokenizer), hidden_size=128, intermediate_size=160, num_attention_heads=2)
    questions, many = [Question(text_first, *about) for about in LISTS], 160
    labels = [torch.randint(len(question.grammar.values), (many, len(question.units))) for question in questions]
    append_reader(model, questions, torch.randn(many, 16, 32), labels)
    said = torch.randn(many, 16, 32)
    feafa = questions[2].grammar.values[labels[2]]
    said[:, :, :24] += 3 * (feafa - feafa.mean(0))[:, None]  # now the image tells FEAFA's units
    layer, projector = model.model.language_model.layers[-1], model.model.multi_modal_projector
    found = []
    hook = layer.input_layernorm.register_forward_hook(lambda module, given, made: found.append(made))

    def told(of: int) -> torch.Tensor:
        """How well the head's estimates `(units,)` of a question agree with its labels."""
        question, first = questions[of], sum(len(before.units) for before in questions[:of])
        with torch.no_grad():
            question.put(model.model.language_model, projector(said), question.write(labels[of]))
        guess = found[-1][:, :16].mean(1) @ layer.self_attn.v_proj.weight[first : first + len(question.units)].T
        pairs = zip(guess.T, question.grammar.values[labels[of]].T, strict=True)
        return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])

    before, alone = told(2), found[-1][:, :16].mean(1)
    hook.remove()
    with torch.no_grad():  # many pictures in one sequence are seen as each by itself
        torch.testing.assert_close(Glance(model, questions[2])(said), alone, atol=1e-5, rtol=1e-4)
    trained = {"multi_modal_projector.weight", "multi_modal_projector.bias"}
    trained.add(f"language_model.layers.{len(model.model.language_model.layers) - 1}.self_attn.v_proj.weight")
    kept = copy.deepcopy(model.model.state_dict())
    for module in (estimates, cost):
        monkeypatch.setattr(module, "ROUND", (2, 0))
    operations = train_estimates(model, questions, said, labels, 40, tmp_path / "many.pt")
    hook = layer.input_layernorm.register_forward_hook(lambda module, given, made: found.append(made))
    assert before.mean() < 0.1 and told(2).mean() > 0.3
    hook.remove()
    changed = {name for name, weight in model.model.state_dict().items() if not torch.equal(weight, kept[name])}
    assert changed == trained
    assert operations == 5 * train_estimates(model, questions, said, labels, 8, tmp_path / "few.pt") > 0


def test_the_appended_layer_changes_nothing_until_it_learns(tokenizer, text_first, rows, tmp_path):
    model = tiny_model(copy.deepcopy(tokenizer), hidden_size=128, intermediate_size=160, num_attention_heads=2)
    tokens = torch.randn(len(rows), 16, 32)
    questions = [Question(text_first, *about) for about in LISTS]
    labels = [question.labels(rows) for question in questions]

    def said() -> list[torch.Tensor]:
        """Log-probabilities `(rows, length, vocabulary)` of each token of the right answers."""
        found = []
        with torch.no_grad():
            for question, own in zip(questions, labels, strict=True):
                image, answers = model.model.multi_modal_projector(tokens), question.write(own)
                state = question.put(model.model.language_model, image, answers).last_hidden_state
                found.append(model.lm_head(state[:, -answers.shape[1] - 1 : -1]).log_softmax(-1))
        return found

    def at_digits(answers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of these `(rows, units, digits, vocabulary)`, those of the free digits."""
        return [part[:, question.digits] for question, part in zip(questions, answers, strict=True)]

    def loss(answers: list[torch.Tensor]) -> float:
        right = [question.grammar.value_tokens[own][:, :, question.grammar.free()]
                 for question, own in zip(questions, labels, strict=True)]  # fmt: skip
        here = zip(at_digits(answers), right, strict=True)
        return sum(-part.gather(-1, own[..., None]).mean().item() for part, own in here)

    def form(answers: list[torch.Tensor]) -> float:
        """Share of brackets, commas and points that are the most probable token in their place."""
        right = []
        for question, part in zip(questions, answers, strict=True):
            wanted = question.grammar.template()
            hits = part.argmax(-1) == wanted
            hits[:, question.digits.flatten()] = False
            right.append(hits.sum() / (len(part) * (len(wanted) - question.digits.numel())))
        return sum(right).item() / len(right)

    before = said()
    append_reader(model, questions, tokens, labels)
    after = said()
    assert model.config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 3
    pairs = zip(at_digits(before), at_digits(after), strict=True)
    same = torch.cat([(one.argmax(-1) == two.argmax(-1)).flatten() for one, two in pairs])
    assert same.float().mean() > 0.95
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_reader(model, questions, tokens, labels, 40, tmp_path / "mlp.pt")
    learnt = said()
    assert loss(learnt) < loss(after) - 0.5
    assert form(after) < 0.2 and form(learnt) > 0.75
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    last = "model.language_model.layers.2."
    assert {name for name in changed if not name.startswith((f"{last}mlp", f"{last}post_attention_layernorm"))} == {
        "model.language_model.norm.weight", "lm_head.weight"
    }  # fmt: skip


def test_lessons_go_on_as_if_never_stopped(tokenizer, text_first, tmp_path, monkeypatch):
    tiny_model(copy.deepcopy(tokenizer), hidden_size=96).save_pretrained(tmp_path / "model")  # holds all units
    text_first.save_pretrained(tmp_path / "model")
    (sample,) = SAMPLE.glob("test-*.parquet")
    (tmp_path / "train-00000.parquet").symlink_to(sample)
    monkeypatch.setattr(language, "KEEP", 2)

    def run(name: str) -> dict[str, torch.Tensor]:
        made = ["--model", str(tmp_path / "model"), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["language", *made, "--steps", "3", "--batch_size", "4"])
        language.main()
        return AuLlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()

    whole = run("whole")
    with killed(monkeypatch, language, step=2), pytest.raises(KeyboardInterrupt):
        run("stopped")
    resumed = run("stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert {name.split(".")[1] for name in whole if not torch.equal(whole[name], start[name])} >= {"language_model"}


def test_reading_goes_on_as_if_never_stopped(tokenizer, text_first, tmp_path, monkeypatch):
    """In either of its trainings, on few faces; and not from what other options have left."""
    model = tiny_model(copy.deepcopy(tokenizer), hidden_size=128, intermediate_size=160, num_attention_heads=2)
    faces = tmp_path / "faces"
    faces.mkdir()
    (sample,) = SAMPLE.glob("test-*.parquet")
    (faces / "train-00000.parquet").symlink_to(sample)
    monkeypatch.setattr(estimates, "KEEP", 4)
    for module in (reading, cost):
        monkeypatch.setattr(module, "LISTS", LISTS[:2])  # whose answers are short
    for module in (estimates, cost):
        monkeypatch.setattr(module, "ROUND", (0, 1))

    def run(name: str, source: str, *options: str) -> dict[str, torch.Tensor]:
        made = ["--model", str(tmp_path / source), "--data_dir", str(faces), "--output_dir", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["reading", *made, "--limit", "80", "--batch_size", "16", *options])
        reading.main()
        return AuLlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()

    model.save_pretrained(tmp_path / "model")
    text_first.save_pretrained(tmp_path / "model")
    run("first", "model", "--epochs", "1")
    again = ["--again", "--steps", "6", "--epochs", "2"]
    whole = run("whole", "first", *again)
    for stage, at in ((estimates, {"step": 4}), (reading, {"epoch": 1})):
        with killed(monkeypatch, stage, **at), pytest.raises(KeyboardInterrupt):
            run("stopped", "first", *again)
        assert not (tmp_path / "stopped" / "model.safetensors").exists()
    resumed = run("stopped", "first", *again)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match="steps"):
        run("stopped", "first", "--again", "--steps", "8")


def test_what_is_published_looks_again_and_asks_about_both_sides(model, text_first, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "trained")
    text_first.save_pretrained(tmp_path / "trained")
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(
        sys, "argv", ["publish", "--model", str(tmp_path / "trained"), "--output_dir", str(tmp_path / "root")]
    )
    publish.main()
    assert "MB" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "root").iterdir()} == set(publish.FILES)
    again = type(model).from_pretrained(tmp_path / "root")
    assert again.dtype == torch.float32 and again.config.looks == publish.LOOKS
    assert AuLlavaProcessor.from_pretrained(tmp_path / "root").mirror
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float()), name
