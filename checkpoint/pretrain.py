"""Stage 1 of the default checkpoint: give the small vision encoder its own start on rendered faces.

The paper begins with an encoder pretrained elsewhere. This one learns from what only a renderer knows: every muscle
activation, the screen displacement between a face's neutral and present shape in each patch, and landmark positions.

    python -m checkpoint.pretrain --data_dir data/synthetic --output_dir runs/encoder
    python -m checkpoint.pretrain --data_dir data/synthetic --output_dir runs/longer --encoder . --learning_rate 8e-4

Writes the encoder alone, as a folder that `AutoModel` loads. Resumes from its last epoch when started again. The
second command goes on from the encoder of a finished AU-LLaVA.
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
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from au_llava import AuLlavaForConditionalGeneration
from au_llava.action_units import PRESETS, select


MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
DEVIATION = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
CROP = 224  # pixels along a side of a face crop
# The encoder sees the middle of it, 160 of 224 pixels a side, in which brows and mouth of 99 in 100 faces lie, neither
# enlarged nor reduced. A face fills half of its crop, and what is around it says nothing.
SIZE, VIEW = 160, 5 / 7
LABELS = ["facs", "feafa", "levels"]
FACS = 23
UNITS = FACS + 24 + FACS  # FACS units, FEAFA's, and FACS units again as levels, in which faint actions count for more


def read_shards(files: list[Path], limit: int | None = None) -> dict[str, torch.Tensor]:
    """Decode shards that `python -m au_llava.datasets_scripts.synthetic_faces` wrote into memory.

    Returns:
        `dict`: `images` `(n, 3, 224, 224)` uint8; `units` `(n, 70)`, as [`units_of`] gives them; `flow`
        `(n, 2, 16, 16)`, the displacement from the face at rest, and `landmarks` `(n, 68, 2)`, both as parts of half
        the picture's side.
    """
    if not files:
        raise FileNotFoundError("No Parquet shards of rendered faces; render them first (docs/synthetic_faces.md).")
    rows: dict[str, list[np.ndarray]] = {"images": [], "units": [], "flow": [], "landmarks": []}
    for file in tqdm(files, desc="reading shards", unit="file"):
        for row in pq.read_table(file, columns=["image", "flow", "landmarks", *LABELS]).to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                rows["images"].append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
            rows["units"].append(units_of(row))
            flow = np.frombuffer(row["flow"], np.float16).reshape(16, 16, 2).transpose(2, 0, 1)
            rows["flow"].append(flow.astype(np.float32) / (CROP / 2))
            rows["landmarks"].append(np.array(row["landmarks"], np.float32).reshape(68, 2) / (CROP / 2) - 1)
        if limit and len(rows["images"]) >= limit:
            break
    return {name: torch.from_numpy(np.stack(values[:limit])) for name, values in rows.items()}


def units_of(row: dict) -> np.ndarray:
    """What a face does, `(70,)`: its FACS units and FEAFA's, 0 to 1, and its FACS units' levels as parts of 5."""
    return np.array(row["facs"] + row["feafa"] + [level / 5 for level in row["levels"]], np.float32)


def mirrored_units() -> torch.Tensor:
    """Column order of `units` after a left-right flip: FACS units stay, FEAFA's left and right ones change places."""
    codes = list(PRESETS["feafa"])
    swapped = [codes.index(unit.mirrored().code) for unit in select("feafa")]
    return torch.cat([torch.arange(FACS), FACS + torch.tensor(swapped), torch.arange(FACS + 24, UNITS)])


def augment(batch: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Flip, turn, scale and shift faces with their labels, vary light and colour, and cover random boxes.

    Args:
        batch (`dict`): As [`read_shards`] gives it.

    Returns:
        `dict`: The same, with `images` `(n, 3, 160, 160)` normalised, and `flipped` `(n,)`, whether left is right now.
    """
    n = len(batch["images"])

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    flipped = uniform(0, 1) < 0.5
    sign = torch.where(flipped, -1.0, 1.0)
    angle, scale, shift = uniform(-0.17, 0.17), VIEW * uniform(0.9, 1.1), uniform(-0.08, 0.08, 2)
    # Where each point of the new picture comes from: turned and scaled, then shifted, then mirrored.
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    mirror = torch.stack([sign, torch.ones(n)], 1)
    where = torch.cat([turn * scale[:, None, None], shift[:, :, None]], 2) * mirror[:, :, None]
    back = turn.transpose(1, 2) / scale[:, None, None]

    def moved(picture: torch.Tensor, side: int) -> torch.Tensor:
        grid = nn.functional.affine_grid(where, [n, picture.shape[1], side, side], align_corners=False)
        return nn.functional.grid_sample(picture, grid, align_corners=False)

    flow = moved(batch["flow"], 16) * mirror[:, :, None, None]
    landmarks = batch["landmarks"] * mirror[:, None] - shift[:, None]
    images = moved(batch["images"].float() / 255, SIZE)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(0.5, 1.5, 1, 1, 1)
    middle = images.mean((2, 3), keepdim=True)
    images = (middle + (images - middle) * uniform(0.6, 1.4, 1, 1, 1)) * uniform(0.6, 1.4, 1, 1, 1)
    images = images * uniform(0.85, 1.15, 3, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    images = images + uniform(0, 0.04, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    corners, sizes = uniform(0, SIZE, 2).int().tolist(), uniform(10, 40, 2).int().tolist()
    for image, (top, left), (height, width), chance in zip(images, corners, sizes, uniform(0, 1), strict=True):
        if chance < 0.2:
            image[:, top : top + height, left : left + width] = torch.rand(3, 1, 1, generator=generator)
        elif chance < 0.4:  # out of focus or enlarged from few pixels
            few = nn.functional.avg_pool2d(image[None], 2 if chance < 0.3 else 3)
            image[:] = nn.functional.interpolate(few, size=(SIZE, SIZE), mode="bilinear")[0]
    return {
        "images": (images.clamp(0, 1) - MEAN) / DEVIATION,
        "units": torch.where(flipped[:, None], batch["units"][:, mirrored_units()], batch["units"]),
        "flow": torch.einsum("nab,nbhw->nahw", back, flow),
        "landmarks": torch.einsum("nab,npb->npa", back, landmarks),
        "flipped": flipped,
    }


def middle(images: torch.Tensor) -> torch.Tensor:
    """Renders `(n, 3, 224, 224)` uint8 as the encoder sees them in use: `(n, 3, 160, 160)`, normalised."""
    edge = round((1 - VIEW) * CROP / 2)
    seen = images[:, :, edge : CROP - edge, edge : CROP - edge].float() / 255
    return (nn.functional.interpolate(seen, size=(SIZE, SIZE), mode="bilinear", antialias=True) - MEAN) / DEVIATION


def make_encoder(architecture: str) -> PreTrainedModel:
    """A small encoder with random weights: 25 (`resnet`) or 256 (`dinov2`) image tokens from 160 x 160 pixels."""
    if architecture == "resnet":
        config = ResNetConfig(
            embedding_size=48, hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 2, 2], layer_type="basic"
        )
        config.image_size = SIZE
        config.hidden_size = config.hidden_sizes[-1]  # what every other encoder calls its width
        return ResNetModel(config)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=10,
            use_mask_token=False,
        )
    )


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether 16 bits are faster here: on a GPU, and on processors that multiply them; elsewhere tenfold slower."""
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def image_tokens(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the language model will see: patches, `(batch, tokens, width)`, without a class token."""
    features = encoder(pixel_values).last_hidden_state
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, 1:]


class Pretrainer(nn.Module):
    """The encoder with three linear heads; the projector of the assembled model starts from them."""

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder.eval()
        with torch.no_grad():
            tokens = image_tokens(self.encoder, torch.zeros(1, 3, SIZE, SIZE))
        self.side = math.isqrt(tokens.shape[1])
        self.units = nn.Linear(tokens.shape[2], UNITS)
        self.landmarks = nn.Linear(tokens.shape[2], 136)
        self.fine = 16 // self.side  # displacements along a side of each token's part of the picture
        self.flow = nn.Linear(tokens.shape[2], 2 * self.fine**2)
        for head in (self.units, self.landmarks, self.flow):
            nn.init.zeros_(head.weight)  # so that heads that know nothing yet do not disturb an encoder that does

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Units `(batch, 70)`, displacements `(batch, 2, 15, 15)`, landmarks `(batch, 68, 2)`, of variance 1."""
        tokens = image_tokens(self.encoder, pixel_values)
        pooled = tokens.mean(1)
        cells = self.flow(tokens).view(len(tokens), self.side, self.side, 2, self.fine, self.fine)
        flow = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return self.units(pooled), flow, self.landmarks(pooled).view(-1, 68, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--architecture", choices=["resnet", "dinov2"], default="resnet")
    parser.add_argument("--encoder", help="an AU-LLaVA whose encoder to go on from; else random weights")
    parser.add_argument("--freeze", nargs="*", default=[], help="parts of it that stay as they are: embedder ...")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "state.pt"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    data = read_shards(sorted(Path(args.data_dir).glob("train-*.parquet")), args.limit)
    seen = sorted(Path(args.data_dir).glob("validation-*.parquet"))
    unseen = read_shards(seen, 500) if seen else None
    if args.encoder:
        encoder = AuLlavaForConditionalGeneration.from_pretrained(args.encoder).model.vision_tower
        encoder.config.image_size = SIZE
    else:
        encoder = make_encoder(args.architecture)
    frozen = [encoder.get_submodule(name).requires_grad_(False) for name in args.freeze]
    model = Pretrainer(encoder).to(device, memory_format=torch.channels_last)
    centre, spread = data["units"].mean(0).to(device), data["units"].std(0).clamp(min=1e-3).to(device)
    flow_spread, landmark_spread = data["flow"].std().to(device), data["landmarks"].std().to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    steps = len(data["images"]) // args.batch_size
    first_epoch = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]

    for epoch in range(first_epoch, args.epochs):
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(data["images"]), generator=generator)
        totals = torch.zeros(3)
        model.train()
        for part in frozen:
            part.eval()
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", mininterval=5)
        for step in bar:
            # The rate depends on the share of epochs done, so that a run may go on with more faces than it began with.
            done = (epoch + step / steps) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(done / 0.03 + 0.01, (1 + math.cos(math.pi * done)) / 2)
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = augment({name: values[rows] for name, values in data.items()}, generator)
            batch = {name: values.to(device) for name, values in batch.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_in_bfloat16(device)):
                images = batch["images"].contiguous(memory_format=torch.channels_last)
                units, flow, landmarks = (guess.float() for guess in model(images))
            unit_loss = (units - (batch["units"] - centre) / spread).pow(2).mean()
            true_flow = nn.functional.interpolate(batch["flow"], flow.shape[2:], mode="bilinear")
            flow_loss = (flow - true_flow / flow_spread).pow(2).mean()
            # A flip would also exchange landmark numbers; the unflipped half of the batch teaches enough.
            error = (landmarks - batch["landmarks"] / landmark_spread).pow(2).mean((1, 2))
            landmark_loss = (error * ~batch["flipped"]).mean()
            loss = unit_loss + 0.5 * flow_loss + 0.5 * landmark_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            totals += torch.stack([unit_loss, flow_loss, landmark_loss]).detach().cpu()
            if step % 20 == 0:
                parts = (totals / (step + 1)).tolist()
                bar.set_postfix(units=f"{parts[0]:.3f}", flow=f"{parts[1]:.3f}", landmarks=f"{parts[2]:.4f}")
        log = {"epoch": epoch + 1, **dict(zip(("units", "flow", "landmarks"), (totals / steps).tolist(), strict=True))}
        if unseen:
            model.eval()
            with torch.no_grad():
                guess = torch.cat([model(middle(part).to(device))[0].cpu() for part in unseen["images"].split(50)])
            pairs = zip(guess.T, unseen["units"].T, strict=True)
            unit_correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
            log["validation_correlation"] = float(np.nanmean(unit_correlations))
        with (output / "log.jsonl").open("a") as file:
            file.write(json.dumps(log) + "\n")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)
    model.encoder.save_pretrained(output)
    side = {"height": SIZE, "width": SIZE}
    BitImageProcessorPil(
        size={"shortest_edge": round(SIZE / VIEW)},
        crop_size=side,
        image_mean=MEAN.flatten().tolist(),
        image_std=DEVIATION.flatten().tolist(),
    ).save_pretrained(output)


if __name__ == "__main__":
    main()
