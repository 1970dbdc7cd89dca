"""Stage 2 of the default checkpoint: join the pretrained encoder and a language model with random weights.

    python -m checkpoint.assemble --encoder runs/encoder --data_dir data/synthetic --output_dir runs/start

The projector starts from the heads of the pretraining, scaled to the same spread. With a random one, what tells one
face from another is a small part of each image token, and a language model that begins from nothing does not find it.
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, set_seed

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from checkpoint.pretrain import SIZE, VIEW, middle, read_shards
from checkpoint.tokenizer import train_tokenizer


@torch.no_grad()
def start_projector(model: AuLlavaForConditionalGeneration, heads: dict, images: torch.Tensor) -> None:
    """Let the first dimensions of each image token be what the pretraining's heads read from it.

    Args:
        heads (`dict`): Weights of the pretrainer, with `units`, `flow` and `landmarks`.
        images (`torch.Tensor` of shape `(batch, 3, 160, 160)`): Normalised faces to measure means and spreads on.
    """
    rows = torch.cat([heads[f"{name}.weight"] for name in ("units", "flow", "landmarks")])
    projector = model.model.multi_modal_projector
    projector.weight.zero_()
    projector.bias.zero_()
    projector.weight[: len(rows)] = rows[: len(projector.weight)]
    tokens = torch.cat([torch.stack(model.get_image_features(part).pooler_output) for part in images.split(32)])
    spread = tokens.mean(1).std(0).clamp(min=1e-3)  # from face to face, which is what matters
    projector.weight /= spread[:, None]
    projector.bias.copy_(-tokens.mean((0, 1)) / spread)


@torch.no_grad()
def start_language_model(model: AuLlavaForConditionalGeneration, images: torch.Tensor) -> None:
    """Let one attention head of the first layer look at the image alone, and pass on what the heads read from it.

    An image is 25 tokens among some 500 of text, so attention that begins evenly spread hardly sees it. Two spare
    dimensions mark image and text; a query of text meets a key of image in the pair of dimensions that rotary position
    embedding turns the least. What is passed on is about as loud as a word: louder, it drowns which unit is asked for.
    """
    projector, layer = model.model.multi_modal_projector, model.model.language_model.layers[0].self_attn
    size, read = layer.head_dim, min(layer.head_dim, len(projector.weight) - 2)
    text, image = len(projector.weight) - 2, len(projector.weight) - 1
    features = torch.stack(model.get_image_features(images[:64]).pooler_output)
    scale = features.pow(2).mean().sqrt()
    projector.weight[[text, image]] = 0
    projector.bias[text], projector.bias[image] = 0, 3 * scale
    words = model.get_input_embeddings().weight
    words.mul_(10)
    words[:, text], words[:, image] = 4 * words.std(), 0
    for part, marker in ((layer.q_proj, text), (layer.k_proj, image)):
        part.weight[size // 2 - 1] = 0
        part.weight[size // 2 - 1, marker] = 3.2
    layer.v_proj.weight[:size] = 0
    layer.o_proj.weight[:, :size] = 0
    layer.v_proj.weight[:read, :read] = torch.eye(read) * scale * 0.3
    layer.o_proj.weight[:read, :read] = torch.eye(read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = train_tokenizer()
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 5 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=4096,
        **ends,
    )
    model = AuLlavaForConditionalGeneration.from_backbones(args.encoder, language, tokenizer=tokenizer)
    # An answer of 24 intensities takes 146 tokens.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=160, **ends)
    images = middle(read_shards(sorted(Path(args.data_dir).glob("train-*.parquet")), 500)["images"])
    model.config.image_seq_length = len(model.eval().get_image_features(images[:1]).pooler_output[0])
    side = round(model.config.image_seq_length**0.5)
    heads = torch.load(f"{args.encoder}/state.pt", weights_only=True)["model"]
    start_projector(model, heads, images)
    start_language_model(model, images)
    model.save_pretrained(args.output_dir)
    processor = AuLlavaProcessor.from_backbones(
        args.encoder, tokenizer, patch_size=SIZE // side, prompt_layout="text_first", view=VIEW
    )
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
