"""Stage 1 of the default checkpoint: give the small vision encoder its own start on rendered faces.

The paper begins with an encoder pretrained elsewhere. This one learns from what only a renderer knows: every muscle
activation, the screen displacement between a face's neutral and present shape in each patch, and landmark positions.

    python -m checkpoint.pretrain --data_dir data/synthetic/train --output_dir runs/encoder

Writes the encoder alone, as a folder that `AutoModel` loads. Resumes from its last epoch when started again.
"""

import argparse
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import (
    BitImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from au_llava.action_units import PRESETS, select


MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def read_shards(data_dir: str, limit: int | None = None) -> dict[str, np.ndarray]:
    """Decode the training shards that `python -m au_llava.datasets_scripts.synthetic_faces` wrote into memory.

    Returns:
        `dict`: `images` `(n, 224, 224, 3)` uint8; `units` `(n, facs + feafa)` activations 0 to 1; `flow` `(n, 256, 2)`
        and `landmarks` `(n, 136)` in pixels.
    """
    files = sorted(Path(data_dir).glob("train-*.parquet"))
    if not files:
        raise FileNotFoundError(f"No train-*.parquet in {data_dir}; render them first (docs/synthetic_faces.md).")
    rows: dict[str, list[np.ndarray]] = {"images": [], "units": [], "flow": [], "landmarks": []}
    for file in tqdm(files, desc="reading shards", unit="file"):
        for row in pq.read_table(file, columns=["image", "facs", "feafa", "flow", "landmarks"]).to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                rows["images"].append(np.asarray(image.convert("RGB")))
            rows["units"].append(np.array(row["facs"] + row["feafa"], np.float32))
            rows["flow"].append(np.frombuffer(row["flow"], np.float16).reshape(256, 2))
            rows["landmarks"].append(np.array(row["landmarks"], np.float32))
        if limit and len(rows["images"]) >= limit:
            break
    return {name: np.stack(values[:limit]) for name, values in rows.items()}


def mirrored_units(facs: int) -> torch.Tensor:
    """Column order of `units` after a left-right flip: FACS units stay, FEAFA's left and right ones change places."""
    codes = list(PRESETS["feafa"])
    swapped = [codes.index(unit.mirrored().code) for unit in select("feafa")]
    return torch.cat([torch.arange(facs), facs + torch.tensor(swapped)])


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary light and colour, and cover a random box, in a batch `(batch, 3, 224, 224)` of values 0 to 1."""
    batch = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    images = images * uniform(0.7, 1.3, 1, 1, 1) * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    corners = (uniform(0, 224, 2)).int().tolist()
    sizes = uniform(20, 60, 2).int().tolist()
    hide = (uniform(0, 1) < 0.2).tolist()
    for image, (top, left), (height, width), hidden in zip(images, corners, sizes, hide, strict=True):
        if hidden:
            image[:, top : top + height, left : left + width] = torch.rand(3, 1, 1, generator=generator)
    return images.clamp(0, 1)


def make_encoder(architecture: str) -> PreTrainedModel:
    """A small encoder with random weights: 16 (`convnextv2`) or 256 (`dinov2`) image tokens from 224 x 224 pixels."""
    if architecture == "convnextv2":
        config = ConvNextV2Config(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 6, 2], patch_size=7, image_size=224)
        config.hidden_size = config.hidden_sizes[-1]  # what every other encoder calls its width
        return ConvNextV2Model(config)
    return Dinov2Model(
        Dinov2Config(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, image_size=224, use_mask_token=False)
    )


class Pretrainer(nn.Module):
    """The encoder with three linear heads that are thrown away afterwards."""

    def __init__(self, encoder: PreTrainedModel, units: int):
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            tokens = self.tokens(torch.zeros(1, 3, 224, 224))
        self.side = math.isqrt(tokens.shape[1])
        self.units = nn.Linear(tokens.shape[2], units)
        self.landmarks = nn.Linear(tokens.shape[2], 136)
        self.flow = nn.Linear(tokens.shape[2], 2 * (16 // self.side) ** 2)

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the language model will see: patches, `(batch, tokens, width)`, without a class token."""
        features = self.encoder(pixel_values).last_hidden_state
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, 1:]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.tokens(pixel_values)
        pooled = tokens.mean(1)
        return self.units(pooled), self.flow(tokens), self.landmarks(pooled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--architecture", choices=["convnextv2", "dinov2"], default="convnextv2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "state.pt"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    data = read_shards(args.data_dir, args.limit)
    images, units = data["images"], torch.from_numpy(data["units"])
    flow = torch.tensor(data["flow"].astype(np.float32))
    model = Pretrainer(make_encoder(args.architecture), units.shape[1]).to(device)
    side, cells = model.side, 16 // model.side
    # One row a token, holding the displacement of the 14-pixel cells inside it.
    flow = flow.view(-1, side, cells, side, cells, 2).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    landmarks = torch.tensor(data["landmarks"]) / 112 - 1
    centre, spread = units.mean(0), units.std(0).clamp(min=1e-3)
    flow_spread = flow.std()
    flipped_units = mirrored_units(units.shape[1] - 24)
    # Mirrored patches: columns of the grid reversed, cells inside a patch reversed, and x displacement negated.
    mirror = torch.arange(side * side).view(side, side).flip(1).flatten()
    cell_mirror = torch.arange(cells * cells * 2).view(cells, cells, 2).flip(1).flatten()
    sign = torch.tensor([-1.0, 1.0]).repeat(cells * cells)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = len(images) // args.batch_size
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps * args.epochs), steps * args.epochs)
    first_epoch = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch = state["epoch"]

    for epoch in range(first_epoch, args.epochs):
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(images), generator=generator)
        totals = torch.zeros(3)
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", mininterval=5)
        for step in bar:
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
            flip = torch.rand(len(rows), generator=generator) < 0.5
            batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
            unit_target = torch.where(flip[:, None], units[rows][:, flipped_units], units[rows])
            flow_target = flow[rows]
            flow_target = torch.where(
                flip[:, None, None], flow_target[:, mirror][..., cell_mirror] * sign, flow_target
            )
            batch = (augment(batch, generator) - MEAN) / DEVIATION
            with torch.autocast(device.type, dtype=torch.bfloat16):
                unit_guess, flow_guess, landmark_guess = (out.float() for out in model(batch.to(device)))
            unit_loss = (unit_guess - ((unit_target - centre) / spread).to(device)).pow(2).mean()
            flow_loss = ((flow_guess - flow_target.to(device)) / flow_spread).pow(2).mean()
            # Flipping would also have to exchange landmark numbers; the unflipped half of the batch teaches enough.
            landmark_error = (landmark_guess - landmarks[rows].to(device)).pow(2).mean(1)
            landmark_loss = (landmark_error * ~flip.to(device)).mean() / landmarks.var()
            loss = unit_loss + flow_loss + 0.5 * landmark_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            totals += torch.stack([unit_loss, flow_loss, landmark_loss]).detach().cpu()
            if step % 20 == 0:
                parts = (totals / (step + 1)).tolist()
                bar.set_postfix(units=f"{parts[0]:.3f}", flow=f"{parts[1]:.3f}", landmarks=f"{parts[2]:.4f}")
        log = {"epoch": epoch + 1, **dict(zip(("units", "flow", "landmarks"), (totals / steps).tolist(), strict=True))}
        with (output / "log.jsonl").open("a") as file:
            file.write(json.dumps(log) + "\n")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)
    model.encoder.save_pretrained(output)
    side = {"height": 224, "width": 224}
    BitImageProcessorPil(size={"shortest_edge": 224}, crop_size=side).save_pretrained(output)


if __name__ == "__main__":
    main()
