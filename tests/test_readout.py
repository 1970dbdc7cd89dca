import copy
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from threading import get_ident

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import Dinov2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, set_seed
from undecided import TASKS, generated, inputs_for, undecided_model

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
from au_llava.grammar_au_llava import ValueReader
from au_llava.readout_au_llava import PREFIXES


@pytest.fixture(scope="module")
def model(tokenizer):
    return undecided_model(tokenizer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("units", ["AU12", "AU12,AU1,AU25", "bp4d", "feafa"])
@pytest.mark.parametrize("layout", ["image_first", "text_first"])
def test_recognition_equals_constrained_greedy_generation(model, processor, task, units, layout):
    processor = type(processor)(
        processor.image_processor, processor.tokenizer, patch_size=processor.patch_size, prompt_layout=layout
    )
    grammar, inputs = processor.grammar(task, units), inputs_for(processor, task, units)
    answer = model.recognize(**inputs, grammar=grammar)
    assert torch.equal(answer.sequences, generated(model, inputs, grammar))
    assert answer.forwards <= grammar.count * grammar.width + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("readout", ["exact", "parallel"])
@pytest.mark.parametrize("task", TASKS)
def test_recognition_on_a_gpu_equals_that_on_the_processor(model, processor, task, readout):
    """Not every operation of the processor exists on a GPU: a scatter of booleans does not."""
    grammar, inputs = processor.grammar(task, "bp4d"), inputs_for(processor, task, "bp4d")
    wanted = model.recognize(**inputs, grammar=grammar, readout=readout)
    found = copy.deepcopy(model).cuda().recognize(**inputs.to("cuda"), grammar=grammar, readout=readout)
    torch.testing.assert_close(found.distributions.cpu(), wanted.distributions, atol=1e-3, rtol=0)


def test_answers_vary_so_that_the_comparison_means_something(model, processor):
    grammar = processor.grammar("intensity", "feafa")
    answer = model.recognize(**inputs_for(processor, "intensity", "feafa", count=4), grammar=grammar)
    assert len(answer.values.unique()) > 10
    assert answer.forwards > 2


@pytest.mark.parametrize("task", TASKS)
def test_batched_answers_equal_single_ones(model, processor, task):
    grammar, inputs = processor.grammar(task, "disfa"), inputs_for(processor, task, "disfa", count=4)
    together = model.recognize(**inputs, grammar=grammar)
    for row in range(4):
        alone = model.recognize(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}, grammar=grammar)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        torch.testing.assert_close(alone.distributions[0], together.distributions[row], atol=1e-4, rtol=0)


def test_prompts_of_different_lengths_share_a_batch(model, processor):
    """Questions about different units of equal number differ in length; left padding must not change answers."""
    grammar = processor.grammar("detection", "AU1,AU2")
    images = list(torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
    prompts = [processor.prompt("detection", units) for units in ("AU1,AU2", "AU4,FEAFA12")]
    settings = {"do_rescale": False, "return_tensors": "pt", "padding": True, "add_special_tokens": False}
    together = model.recognize(**processor(images=images, text=prompts, **settings), grammar=grammar)
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = model.recognize(**processor(images=[image], text=[prompt], **settings), grammar=grammar)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        torch.testing.assert_close(alone.probabilities[0], together.probabilities[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_values_and_probabilities_are_consistent(model, processor, task):
    grammar, inputs = processor.grammar(task, "bp4d"), inputs_for(processor, task, "bp4d")
    answer = model.recognize(**inputs, grammar=grammar)
    allowed = grammar.values
    assert torch.isin(answer.values, allowed).all()
    torch.testing.assert_close(answer.distributions.sum(-1), torch.ones(3, 12))
    picked = (answer.values[..., None] == allowed).float().argmax(-1, keepdim=True)
    torch.testing.assert_close(answer.distributions.gather(-1, picked).squeeze(-1), answer.probabilities)
    torch.testing.assert_close(answer.distributions @ allowed, answer.expected_values)
    if task != "intensity":  # one free token a value: the answer is the most probable value
        assert torch.equal(answer.distributions.argmax(-1, keepdim=True), picked)


def test_prompts_of_one_length_that_differ_are_each_read(model, tokenizer):
    processor = AuLlavaProcessor.from_backbones(
        None, copy.deepcopy(tokenizer), patch_size=56, prompt_layout="text_first"
    )
    grammar, inputs = processor.grammar("intensity", "feafa"), inputs_for(processor, "intensity", "feafa", count=2)
    inputs["input_ids"][1, 5:9] = inputs["input_ids"][1, 9:13].clone()
    together = model.recognize(**inputs, grammar=grammar)
    alone = model.recognize(**{name: tensor[1:] for name, tensor in inputs.items()}, grammar=grammar)
    torch.testing.assert_close(together.distributions[1:], alone.distributions, atol=1e-5, rtol=0)


def test_single_token_distribution_is_the_models_own_softmax(model, processor):
    grammar, inputs = processor.grammar("detection", "AU12"), inputs_for(processor, "detection", "AU12", count=1)
    answer = model.recognize(**inputs, grammar=grammar)
    opening = torch.tensor([grammar.opening])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + len(grammar.opening), dtype=torch.long)
    ids = torch.cat([inputs["input_ids"], opening], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[0, -1]
    expected = logits[grammar.value_tokens[:, 0]].softmax(0)
    torch.testing.assert_close(answer.distributions[0, 0], expected, atol=1e-5, rtol=0)


def test_after_other_digits_than_those_chosen_nothing_is_known(processor):
    grammar = processor.grammar("intensity", "AU1,AU12")
    size = (2, len(grammar), 1 + int(grammar.value_tokens.max()))
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    reader = ValueReader(grammar, logits.device)
    written, read = reader.choose(logits)
    found = reader.distribution(read, written)
    for row, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = torch.ones(len(grammar.values))
        for value, tokens in enumerate(grammar.value_tokens):
            for place, slot in enumerate(grammar.slots()[number]):
                alike = (grammar.value_tokens[:, :place] == tokens[:place]).all(1)
                rivals = grammar.value_tokens[alike, place].unique()
                chances = torch.full((len(rivals),), 1 / len(rivals))
                if torch.equal(tokens[:place], written[row, number, :place]):
                    chances = logits[row, slot, rivals].softmax(-1)
                expected[value] *= chances[rivals == tokens[place]].item()
        torch.testing.assert_close(found[row, number], expected)


def test_a_right_draft_is_verified_in_one_pass_and_a_wrong_one_changes_nothing(model, processor):
    grammar, inputs = processor.grammar("intensity", "feafa"), inputs_for(processor, "intensity", "feafa")
    plain = model.recognize(**inputs, grammar=grammar)
    right = model.recognize(**inputs, grammar=grammar, draft=plain.sequences)
    assert right.forwards == 1
    assert torch.equal(right.sequences, plain.sequences)
    torch.testing.assert_close(right.distributions, plain.distributions, atol=1e-4, rtol=0)
    cut_off = plain.sequences.clone()
    cut_off[:, -1] = 0
    for draft in (plain.sequences.flip(0), cut_off, torch.zeros_like(cut_off)):
        assert torch.equal(model.recognize(**inputs, grammar=grammar, draft=draft).sequences, plain.sequences)
    with pytest.raises(ValueError, match=r"shape \(3, 9\); give an answer for each prompt: \(3, 146\)"):
        model.recognize(**inputs, grammar=grammar, draft=plain.sequences[:, :9])


@pytest.mark.parametrize("layout", ["image_first", "text_first"])
def test_a_reused_prefix_changes_nothing(model, processor, layout):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout=layout)
    grammar = own.grammar("intensity_level", "disfa")
    for seed in range(2):  # the second batch finds the first one's prefix
        inputs = inputs_for(own, "intensity_level", "disfa", seed=seed)
        said = []
        handle = model.lm_head.register_forward_hook(lambda *args, said=said: said.append(args[2]))
        plain, reused = (model.recognize(**inputs, grammar=grammar, reuse_prefix=reuse) for reuse in (False, True))
        handle.remove()
        assert torch.equal(plain.sequences, reused.sequences)
        torch.testing.assert_close(plain.distributions, reused.distributions, atol=1e-5, rtol=0)
        assert len(said) == plain.forwards + reused.forwards
        for ours, theirs in zip(said[: plain.forwards], said[plain.forwards :], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_prefixes_are_forgotten_when_weights_change_and_are_few(model, processor):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    changing = copy.deepcopy(model)

    def answer(units="bp4d"):
        return changing.recognize(**inputs_for(own, "detection", units), grammar=own.grammar("detection", units))

    before = answer()
    with torch.no_grad():
        changing.model.language_model.layers[0].self_attn.v_proj.weight.mul_(-1)
    after = answer()
    fresh = copy.deepcopy(changing)
    fresh._prefixes = None
    expected = fresh.recognize(**inputs_for(own, "detection", "bp4d"), grammar=own.grammar("detection", "bp4d"))
    assert not torch.allclose(before.distributions, after.distributions)
    torch.testing.assert_close(after.distributions, expected.distributions, atol=1e-5, rtol=0)
    for code in ("AU1", "AU2", "AU4", "AU5", "AU6", "AU7"):
        answer(code)
    assert len(changing._prefixes[1]) == PREFIXES
    assert answer().distributions.dtype == torch.float32
    changing.to(torch.bfloat16)
    assert answer().distributions.isfinite().all()


def test_a_change_of_a_single_number_is_noticed(model, processor):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    question = {**inputs_for(own, "detection", "bp4d"), "grammar": own.grammar("detection", "bp4d")}
    changing = copy.deepcopy(model)
    changing.recognize(**question)
    with torch.no_grad():
        changing.get_input_embeddings().weight[int(question["input_ids"][0, 0]), 1] += 100
    after = changing.recognize(**question).distributions
    fresh = changing.recognize(**question, reuse_prefix=False).distributions
    torch.testing.assert_close(after, fresh, atol=1e-5, rtol=0)


def test_an_adapter_switched_off_or_on_is_noticed(model, processor):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    question = {**inputs_for(own, "detection", "bp4d"), "grammar": own.grammar("detection", "bp4d")}
    config = LoraConfig(target_modules=["v_proj"], init_lora_weights=False, inference_mode=True)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    tuned = adapted.recognize(**question).distributions
    with adapted.disable_adapter():
        base = adapted.recognize(**question).distributions
    torch.testing.assert_close(base, model.recognize(**question).distributions, atol=1e-5, rtol=0)
    assert not torch.allclose(base, tuned, atol=1e-3)
    torch.testing.assert_close(adapted.recognize(**question).distributions, tuned, atol=1e-5, rtol=0)


def test_a_text_computed_under_autocast_is_not_used_outside_of_it(model, processor):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    question = {**inputs_for(own, "detection", "bp4d"), "grammar": own.grammar("detection", "bp4d")}
    with torch.autocast("cpu", torch.bfloat16):
        model.recognize(**question)
    after = model.recognize(**question).distributions
    fresh = model.recognize(**question, reuse_prefix=False).distributions
    torch.testing.assert_close(after, fresh, atol=1e-5, rtol=0)


def fused_step(model):
    """As Trainer does by default: PyTorch does not count this as a change of the weights."""
    for weight in model.model.language_model.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(model.model.language_model.parameters(), lr=0.1, fused=True).step()


def scaled_data(model):
    for weight in model.model.language_model.parameters():
        weight.data.mul_(-1)


def scaled_adapter(model):
    for part in model.modules():
        if hasattr(part, "lora_A"):
            part.scale_layer(3.0)


@pytest.mark.parametrize("change", [fused_step, scaled_data, scaled_adapter])
def test_a_text_is_computed_anew_however_the_weights_change(model, processor, change):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    question = {**inputs_for(own, "detection", "bp4d"), "grammar": own.grammar("detection", "bp4d")}
    config = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    changing = get_peft_model(copy.deepcopy(model), config).eval().get_base_model()
    before = changing.recognize(**question).distributions
    change(changing)
    after = changing.recognize(**question).distributions
    assert not torch.allclose(after, before, atol=1e-4)
    fresh = changing.recognize(**question, reuse_prefix=False).distributions
    torch.testing.assert_close(after, fresh, atol=1e-5, rtol=0)


def test_threads_take_turns(model, processor):
    """Evidence switches how the model attends, and a cache of fixed size is kept: no other call may run meanwhile."""
    question = {**inputs_for(processor, "intensity", "feafa"), "grammar": processor.grammar("intensity", "feafa")}
    passes = []

    def slowly(*_):
        passes.append(get_ident())
        time.sleep(0.02)

    handle = model.model.language_model.register_forward_pre_hook(slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: model.recognize(**question, reuse_prefix=False), range(2))
    handle.remove()
    assert first.forwards > 1 and torch.equal(first.distributions, second.distributions)
    assert [len(list(some)) for _, some in groupby(passes)] == [first.forwards, second.forwards]


def test_a_model_made_in_inference_mode_answers(model, processor):
    question = {**inputs_for(processor, "detection", "AU12"), "grammar": processor.grammar("detection", "AU12")}
    with torch.inference_mode():
        made = copy.deepcopy(model)
    assert torch.equal(made.recognize(**question).values, model.recognize(**question).values)


def check_equal_but_for_near_ties(model, inputs, grammar):
    """Passes of other lengths sum in another order: bfloat16's 8 bits then round a logit up or down."""
    answer, expected = model.recognize(**inputs, grammar=grammar), generated(model, inputs, grammar)
    assert torch.isin(answer.values, grammar.values).all()
    torch.testing.assert_close(answer.distributions.sum(-1), torch.ones_like(answer.values))
    for row, (ours, theirs) in enumerate(zip(answer.sequences, expected, strict=True)):
        differs = (ours != theirs).nonzero().flatten().tolist()
        if model.dtype == torch.float32:
            assert not differs
        if differs:
            place = differs[0]  # what follows another digit may be anything
            seen = torch.cat([inputs["input_ids"][row], theirs[:place]])[None]
            with torch.no_grad():
                logits = model(input_ids=seen, pixel_values=inputs["pixel_values"][row : row + 1]).logits[0, -1]
            pair = logits[torch.stack([ours[place], theirs[place]])].float()
            step = 2.0**-7 * pair.abs().max()  # at most the distance of neighbouring bfloat16 numbers
            assert pair.diff().abs() <= 4 * step


@pytest.mark.parametrize("task", TASKS)
def test_in_bfloat16_an_answer_differs_from_generation_only_where_two_digits_nearly_tie(model, processor, task):
    half = copy.deepcopy(model).to(torch.bfloat16)
    check_equal_but_for_near_ties(half, inputs_for(processor, task, "feafa"), processor.grammar(task, "feafa"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_trained_weights_answer_as_they_would_generate(task, dtype):
    model = AuLlavaForConditionalGeneration.from_pretrained(default_checkpoint(), dtype=dtype).eval()
    processor = AuLlavaProcessor.from_pretrained(default_checkpoint())
    inputs = dict(processor(images=sorted((ROOT / "examples").glob("*.jpg")), task=task))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    check_equal_but_for_near_ties(model, inputs, processor.grammar(task))


def test_rows_take_no_more_passes_in_company_than_alone(model, processor):
    grammar, inputs = processor.grammar("intensity", "disfa"), inputs_for(processor, "intensity", "disfa", count=12)
    alone = [
        model.recognize(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}, grammar=grammar).forwards
        for row in range(12)
    ]
    assert len(set(alone)) > 1
    assert model.recognize(**inputs, grammar=grammar).forwards == max(alone)


@pytest.mark.parametrize("layout", ["image_first", "text_first"])
@pytest.mark.parametrize("task", TASKS)
def test_static_shapes_change_nothing(model, processor, layout, task):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout=layout)
    grammar = own.grammar(task, "disfa")
    for seed in range(2):  # the second batch finds the first one's cache
        inputs = inputs_for(own, task, "disfa", seed=seed)
        plain = model.recognize(**inputs, grammar=grammar)
        static = model.recognize(**inputs, grammar=grammar, static_shapes=True)
        assert torch.equal(plain.sequences, static.sequences) and plain.forwards == static.forwards
        torch.testing.assert_close(plain.distributions, static.distributions, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "window"), [(MistralConfig, 64), (Gemma3TextConfig, 64), (Gemma3TextConfig, 4096)])
def test_layers_with_a_sliding_window_answer_as_they_would_generate(model, processor, tokenizer, kind, window):
    """Passes go back to an earlier token, which a cache of the window alone has forgotten."""
    set_seed(0)
    language = kind(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, sliding_window=window, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind is Gemma3TextConfig:
        language.layer_types = ["sliding_attention", "full_attention"]
    vision = copy.deepcopy(model.config.vision_config)
    own = AuLlavaForConditionalGeneration.from_backbones(vision, language, copy.deepcopy(tokenizer)).eval()
    with torch.no_grad():
        for weight in own.model.language_model.layers.parameters():
            weight.mul_(3)
    grammar, inputs = processor.grammar("intensity", "AU1,AU2"), inputs_for(processor, "intensity", "AU1,AU2")
    expected = generated(own, inputs, grammar)
    answers = [own.recognize(**inputs, grammar=grammar, **how) for how in ({}, {"static_shapes": True})]
    for answer in answers:
        assert torch.equal(answer.sequences, expected) and answer.forwards > 1
    torch.testing.assert_close(answers[0].distributions, answers[1].distributions, atol=1e-5, rtol=0)
    maps = own.recognize(**inputs, grammar=grammar, return_evidence=True).evidence
    assert maps.shape == (3, 2, 16, 16) and maps.isfinite().all()


@pytest.mark.slow
def test_static_shapes_are_compiled_for_the_first_batch_only(model, processor):
    from torch._dynamo.testing import CompileCounter

    compiled, counter = copy.deepcopy(model), CompileCounter()
    compiled.model.language_model.forward = torch.compile(
        compiled.model.language_model.forward, backend=counter, dynamic=False
    )
    grammar, frames = processor.grammar("intensity", "feafa"), []
    for seed in range(3):
        inputs = inputs_for(processor, "intensity", "feafa", seed=seed)
        plain = model.recognize(**inputs, grammar=grammar)
        answer = compiled.recognize(**inputs, grammar=grammar, static_shapes=True)
        assert torch.equal(plain.sequences, answer.sequences)
        frames.append(counter.frame_count)
    assert answer.forwards > 2 and frames[0] == frames[-1]


def test_a_processor_of_another_model_is_refused(model, processor):
    grammar, inputs = processor.grammar("detection", "AU12"), inputs_for(processor, "detection", "AU12", count=1)
    inputs["pixel_values"] = torch.rand(1, 3, 280, 280)
    with pytest.raises(ValueError, match=r"\[16\] image tokens.*\[25\] patches"):
        model.recognize(**inputs, grammar=grammar)


def test_more_tokens_than_a_language_model_has_places_for_are_one_clear_error(processor, tokenizer):
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=56)
    inputs, grammar = inputs_for(processor, "detection", "AU12", count=1), processor.grammar("detection", "AU12")
    needed = inputs["input_ids"].shape[1] + len(grammar) - 1  # nothing is asked of the last token

    def joined(language):
        return AuLlavaForConditionalGeneration.from_backbones(vision, language, copy.deepcopy(tokenizer))

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    joined(GPT2Config(**size, n_positions=needed)).recognize(**inputs, grammar=grammar)
    # which has no table
    joined(LlamaConfig(**size, max_position_embeddings=needed - 1)).recognize(**inputs, grammar=grammar)
    short = joined(GPT2Config(**size, n_positions=needed - 1))
    told = rf"{needed} tokens long, but gpt2 has places for {needed - 1}; ask about"
    with pytest.raises(ValueError, match=told):
        short.recognize(**inputs, grammar=grammar)
    short.generate(**inputs, max_new_tokens=len(grammar) - 1)
    with pytest.raises(ValueError, match=told):
        short.generate(**inputs, min_new_tokens=len(grammar), max_new_tokens=len(grammar))
