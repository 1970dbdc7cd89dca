"""The small language model that the default checkpoint starts from: random weights and a tokenizer of our own.

python -m checkpoint.language --output_dir runs/language
"""

import argparse

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

from checkpoint.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 5 // 2,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            max_position_embeddings=4096,
            **ends,
        )
    )
    # An answer of 24 intensities takes 146 tokens.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=160, **ends)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
