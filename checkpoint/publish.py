"""Last stage of the default checkpoint: put a trained model into the repository root, in half the bytes.

There it looks as often at each face as in practice, and is asked about the mirror image, too (docs/checkpoint.md).

python -m checkpoint.publish --model runs/checkpoint --output_dir .
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from checkpoint.practice import LOOKS


FILES = (
    "chat_template.jinja",
    "config.json",
    "decision.json",
    "decision_template.jinja",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", default=".")
    args = parser.parse_args()

    model = AuLlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16)
    model.config.looks = LOOKS
    processor = AuLlavaProcessor.from_pretrained(args.model)
    processor.mirror = True
    output = Path(args.output_dir)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # Stored in 16 bits, computed in 32: many processors multiply bfloat16 slowly.
        config = Path(folder) / "config.json"
        text = json.loads(config.read_text())
        text["dtype"] = text["vision_config"]["dtype"] = text["text_config"]["dtype"] = "float32"
        text["vision_config"].pop("_name_or_path", None)  # a folder of the training, which nobody else has
        config.write_text(json.dumps(text, indent=2) + "\n")
        for name in FILES:
            os.replace(Path(folder) / name, output / name)
    size = (output / "model.safetensors").stat().st_size
    print(f"{output / 'model.safetensors'}: {model.num_parameters():,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
