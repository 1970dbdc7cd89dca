import copy
import json
import logging

import pytest
import torch
from conftest import tiny_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BitImageProcessorPil,
    BloomConfig,
    CLIPVisionConfig,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    MambaConfig,
    MobileNetV2Config,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PixtralVisionConfig,
    Qwen2Config,
    ResNetConfig,
    SamVisionConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaModel, AuLlavaProcessor
from au_llava.modeling_au_llava import moved


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SQUARE = {"image_size": 224, "patch_size": 56}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


def prompt(model, batch=2, patches=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (batch, 12), generator=generator)
    image = torch.full((batch, patches), model.config.image_token_id)
    pixels = torch.randn(batch, 3, 224, 224, generator=generator)
    ids = torch.cat([words[:, :4], image, words[:, 4:]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_the_papers_pair_has_the_published_size():
    with torch.device("meta"):
        model = AuLlavaForConditionalGeneration(AuLlavaConfig())
    assert sum(weight.numel() for weight in model.parameters()) == 7_046_982_656
    assert sum(weight.numel() for weight in model.model.vision_tower.parameters()) == 304_368_640
    assert sum(weight.numel() for weight in model.model.multi_modal_projector.parameters()) == 4_198_400


def test_classes_are_llavas():
    assert issubclass(AuLlavaModel, LlavaModel)
    assert issubclass(AuLlavaForConditionalGeneration, LlavaForConditionalGeneration)


def test_config_takes_objects_and_dicts_and_round_trips(tmp_path):
    objects = AuLlavaConfig(vision_config=Dinov2Config(hidden_size=48), text_config=LlamaConfig(hidden_size=64))
    dicts = AuLlavaConfig(
        vision_config={"model_type": "dinov2", "hidden_size": 48},
        text_config={"model_type": "llama", "hidden_size": 64},
    )
    assert objects.to_dict() == dicts.to_dict()
    objects.save_pretrained(tmp_path)
    assert AuLlavaConfig.from_pretrained(tmp_path).to_dict() == objects.to_dict()


@pytest.mark.parametrize(
    ("vision", "patches"),
    [
        (Dinov2Config(**VISION, **SQUARE), 16),
        (Dinov2WithRegistersConfig(**VISION, **SQUARE, num_register_tokens=4), 16),
        (CLIPVisionConfig(**VISION, **SQUARE), 16),
        (SiglipVisionConfig(**VISION, **SQUARE), 16),
        (ConvNextV2Config(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1]), 49),
        (DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1]), 49),
        (SwinConfig(embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]), 49),
        (MobileNetV2Config(depth_multiplier=0.25), 49),
        (Dinov2Config(**VISION, image_size=518, patch_size=56), 16),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_any_vision_encoder_gives_its_patches_only(vision, patches):
    model = AuLlavaForConditionalGeneration.from_backbones(vision, LlamaConfig(**TEXT))
    features = model.get_image_features(torch.randn(2, 3, 224, 224)).pooler_output
    assert [tuple(patch.shape) for patch in features] == [(patches, 32)] * 2
    assert model(**prompt(model, patches=patches)).logits.shape == (2, 12 + patches, 100)


@pytest.mark.parametrize("kind", [CLIPVisionConfig, SiglipVisionConfig, ViTConfig])
def test_an_encoder_of_another_picture_size_gets_it(kind):
    vision = kind(**VISION, image_size=336, patch_size=56)
    model = AuLlavaForConditionalGeneration.from_backbones(vision, LlamaConfig(**TEXT))
    assert model.config.image_seq_length == len(model.get_image_features(torch.randn(1, 3, 336, 336)).pooler_output[0])
    assert model.config.image_seq_length == 36


def test_swin_for_larger_pictures_keeps_its_windows():
    vision = SwinConfig(embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, image_size=384, window_size=12)
    model = AuLlavaForConditionalGeneration.from_backbones(vision, LlamaConfig(**TEXT))
    assert model.config.image_seq_length == model.count_patches(384) == 144


def test_the_bias_of_a_language_modelling_head_is_kept(tmp_path):
    vision, language = Dinov2Config(**VISION, **SQUARE), PhiConfig(**TEXT)
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    again = AuLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**prompt(again)).logits, model(**prompt(model)).logits)


def test_dinov2_features_are_the_normalised_patch_tokens():
    model = AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), LlamaConfig(**TEXT))
    pixels = torch.randn(1, 3, 224, 224)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    expected = projector(tower(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected[0])
    assert isinstance(projector, torch.nn.Linear)


@pytest.mark.parametrize(
    "language", [LlamaConfig(**TEXT), Qwen2Config(**TEXT, num_key_value_heads=2), GPTNeoXConfig(**TEXT),
                 GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, tie_word_embeddings=False)],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_any_language_model_generates(language):
    model = AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), language)
    inputs = prompt(model)
    new = model.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert new.shape == (2, inputs["input_ids"].shape[1] + 5)
    assert model(**inputs).logits.shape[-1] == 100


def test_a_language_model_with_a_state_is_refused():
    with pytest.raises(ValueError, match="mamba keeps a state in place of keys and values"):
        mamba = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99)
        AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), mamba)


def test_a_language_model_that_keeps_or_reads_something_else_is_refused():
    vision = Dinov2Config(**VISION, **SQUARE)
    convolving = Lfm2Config(**TEXT, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="lfm2 cannot be the language model"):
        AuLlavaForConditionalGeneration.from_backbones(vision, convolving)
    text = Gemma3TextConfig(**TEXT, num_key_value_heads=2)
    seeing = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**VISION, **SQUARE))
    with pytest.raises(ValueError, match="gemma3 has an encoder of its own"):
        AuLlavaForConditionalGeneration.from_backbones(vision, seeing)
    wrapped = BartConfig(d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=99)
    forgetful = OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=99)
    for language in (wrapped, forgetful):
        with pytest.raises(ValueError, match=f"{language.model_type} cannot be the language model"):
            AuLlavaForConditionalGeneration.from_backbones(vision, language)


def test_an_encoder_that_hides_patches_is_refused():
    with pytest.raises(ValueError, match="vit_mae cannot be the vision tower.* Of 16 patches .* tells 5"):
        AuLlavaForConditionalGeneration.from_backbones(ViTMAEConfig(**VISION, **SQUARE), LlamaConfig(**TEXT))


def test_an_encoder_that_wants_more_than_a_picture_or_tells_of_it_elsewhere_is_refused():
    naflex = Siglip2VisionConfig(**VISION, patch_size=56)
    with pytest.raises(ValueError, match="siglip2_vision_model cannot be the vision tower, which is given square"):
        AuLlavaForConditionalGeneration.from_backbones(naflex, LlamaConfig(**TEXT))
    pixtral = PixtralVisionConfig(**VISION, **SQUARE)
    with pytest.raises(ValueError, match="pixtral cannot be the vision tower.* Of 2 pictures the vision tower"):
        AuLlavaForConditionalGeneration.from_backbones(pixtral, LlamaConfig(**TEXT))
    sam = SamVisionConfig(**VISION, **SQUARE, output_channels=16)
    with pytest.raises(ValueError, match="sam_vision_model has a hidden_size of 32, but tells 16 numbers of each"):
        AuLlavaForConditionalGeneration.from_backbones(sam, LlamaConfig(**TEXT))


def test_an_encoder_inside_another_model_is_refused_and_not_made_up(tmp_path):
    llava = LlavaConfig(vision_config=CLIPVisionConfig(**VISION, **SQUARE), text_config=LlamaConfig(**TEXT))
    LlavaForConditionalGeneration(llava).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} keeps no weights where clip_vision_model looks for them; give"):
        AuLlavaForConditionalGeneration.from_backbones(str(tmp_path), LlamaConfig(**TEXT))


def test_what_a_language_model_does_to_its_scores_is_told(caplog):
    granite = GraniteConfig(**TEXT, num_key_value_heads=2, logits_scaling=8.0)
    with caplog.at_level(logging.WARNING, logger="au_llava.backbones_au_llava"):
        AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), granite)
    assert "granite has logits_scaling=8.0, which is left out here" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="au_llava.backbones_au_llava"):
        mpt = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=99)  # its logit_scale is None
        AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), mpt)
    assert "left out" not in caplog.text


def test_from_backbones_hands_access_to_whatever_is_loaded(tmp_path, tokenizer, monkeypatch):
    vision, language, seen = str(tmp_path / "vision"), str(tmp_path / "language"), []
    Dinov2Model(Dinov2Config(**VISION, **SQUARE)).save_pretrained(vision)
    BitImageProcessorPil().save_pretrained(vision)
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)})).save_pretrained(language)
    tokenizer.save_pretrained(language)
    access = {"token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    for kind in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, AutoImageProcessor):

        def loaded(*args, load=kind.from_pretrained, name=kind.__name__, **kwargs):
            seen.append((name, {key: kwargs.get(key) for key in access}))
            return load(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", loaded)
    AuLlavaForConditionalGeneration.from_backbones(vision, language, **access)
    AuLlavaProcessor.from_backbones(vision, language, **access)
    assert {name for name, _ in seen} >= {"AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor"}
    assert [own for _, own in seen] == [access] * len(seen)
    # And what is made from a configuration needs none of it.
    AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), language, **access)


def test_from_backbones_takes_folders_and_keeps_their_weights(tmp_path, tokenizer):
    vision, text = Dinov2Config(**VISION, **SQUARE), LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)})
    encoder, language = Dinov2Model(vision), AutoModelForCausalLM.from_config(text)
    encoder.save_pretrained(tmp_path / "vision")
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    model = AuLlavaForConditionalGeneration.from_backbones(str(tmp_path / "vision"), str(tmp_path / "language"))
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    words = torch.randint(4, 90, (1, 9))
    torch.testing.assert_close(model(input_ids=words).logits, language(input_ids=words).logits)
    pixels = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


def test_backbones_that_are_stored_in_other_dtypes_join(tmp_path, tokenizer):
    vision, language = str(tmp_path / "vision"), str(tmp_path / "language")
    Dinov2Model(Dinov2Config(**VISION, **SQUARE)).save_pretrained(vision)
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).half().save_pretrained(language)
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language, copy.deepcopy(tokenizer))
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path / "joined")
    again = AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "joined")
    assert {weight.dtype for weight in again.parameters()} == {torch.float16}


OWN_ENCODER = """
from transformers import Dinov2Config, Dinov2Model

class OwnConfig(Dinov2Config):
    model_type = "own_encoder"

class OwnModel(Dinov2Model):
    config_class = OwnConfig
"""


def test_from_backbones_takes_an_encoder_with_code_of_its_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN_ENCODER)
    Dinov2Model(Dinov2Config(**VISION, **SQUARE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own_encoder", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    language = LlamaConfig(**TEXT)
    model = AuLlavaForConditionalGeneration.from_backbones(str(tmp_path), language, trust_remote_code=True)
    assert type(model.model.vision_tower).__name__ == "OwnModel"


def test_from_backbones_attends_as_it_is_told():
    backbones = Dinov2Config(**VISION, **SQUARE), LlamaConfig(**TEXT)
    model = AuLlavaForConditionalGeneration.from_backbones(*backbones, attn_implementation="eager")
    attentions = model(**prompt(model), output_attentions=True).attentions  # which no other tells
    assert [weights.shape for weights in attentions] == [(2, 2, 28, 28)] * 2
    assert model.model.vision_tower.config._attn_implementation == "eager"


def test_the_image_token_gets_a_row_of_its_own():
    model = AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), LlamaConfig(**TEXT))
    assert model.config.image_token_id == 99
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 100
    assert model.config.text_config.vocab_size == 100


@pytest.mark.parametrize(
    "language",
    [
        LlamaConfig(**TEXT, tie_word_embeddings=True),
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99),
        BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=99),
        OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=16),  # embeddings narrower than the layers
    ],
    ids=lambda config: config.model_type,
)
def test_tied_embeddings_stay_tied(tmp_path, language):
    model = AuLlavaForConditionalGeneration.from_backbones(Dinov2Config(**VISION, **SQUARE), language).eval()
    model.lm_head.weight.data.normal_()  # small ones would hide which weights are used
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AuLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again(**prompt(again)).logits, model(**prompt(model)).logits)


def test_a_model_whose_core_was_saved_alone_is_still_opened_whole(model, tmp_path):
    for part, name in ((model.model, "core"), (model, "whole")):
        part.save_pretrained(tmp_path / name)
        opened = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]["AutoModel"]
        assert opened == f"modeling_au_llava.{type(part).__name__}"


def test_saving_and_loading_changes_no_weight(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = AuLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(model, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = prompt(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # An attention key bias shifts all scores of a query alike, so its gradient is zero but for rounding.
    assert [name for name in without if "key.bias" not in name and "k_proj.bias" not in name] == []


def test_cached_and_uncached_generation_agree(model):
    inputs = prompt(model)
    settings = {"do_sample": False, "max_new_tokens": 8}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    assert torch.equal(cached, model.generate(**inputs, **settings, cache_implementation="static"))


def test_attention_implementations_agree(model, tmp_path):
    model.save_pretrained(tmp_path)
    logits = [
        AuLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name)(**prompt(model)).logits
        for name in ("sdpa", "eager")
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_an_encoder_that_does_not_attend_is_not_told_how_to(tmp_path):
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1] * 4)
    AuLlavaForConditionalGeneration.from_backbones(vision, LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    model = AuLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="bogus"):
        AuLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="bogus")


def test_dtype_and_device_map_are_honoured(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = AuLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    inputs = prompt(half)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    assert half(**inputs).logits.isfinite().all()


def test_image_matters(tokenizer):
    model = tiny_model(copy.deepcopy(tokenizer))
    inputs = prompt(model)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.allclose(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


def test_a_frozen_encoder_keeps_its_batch_norms():
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    vision.hidden_size = 16
    language = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language)
    means = [module.running_mean for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [mean.clone() for mean in means]
    model.model.vision_tower.requires_grad_(False)
    model.train().get_image_features(torch.randn(4, 3, 64, 64))
    assert model.model.multi_modal_projector.training
    assert all(map(torch.equal, means, before))
    model.model.vision_tower.requires_grad_(True)
    model.train().get_image_features(torch.randn(4, 3, 64, 64))
    assert not any(map(torch.equal, means, before))


def test_more_looks_are_averaged_in_use_and_left_out_in_training(model):
    pictures, looks = torch.randn(2, 3, 224, 224), [[1, 0], [1.05, 4], [1.05, -4]]

    def patches():
        with torch.no_grad():
            return torch.stack(model.get_image_features(pictures).pooler_output)

    once, each = patches(), []
    for look in looks:
        model.config.looks = [look]
        each.append(patches())
    assert torch.equal(each[0], once) and not torch.allclose(each[1], each[2], atol=1e-3)
    model.config.looks = looks
    torch.testing.assert_close(patches(), torch.stack(each).mean(0), atol=1e-5, rtol=0)
    assert torch.equal(model.train().get_image_features(pictures).pooler_output[0].detach(), once[0])


def test_a_moved_picture_is_enlarged_and_turned():
    picture = torch.arange(64.0).view(1, 1, 8, 8)
    torch.testing.assert_close(moved(picture, 1, 90), picture.rot90(dims=(2, 3)), atol=1e-3, rtol=0)
    block = torch.zeros(1, 1, 32, 32)
    block[..., 12:20, 12:20] = 1
    assert moved(block, 2, 0).sum().item() == pytest.approx(4 * block.sum().item(), rel=0.05)
    assert moved(block.bfloat16(), 2, 3).dtype == torch.bfloat16
