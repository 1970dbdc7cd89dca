"""Stage 1 of the default checkpoint: give the small vision encoder its own start on rendered faces.

The paper begins with an encoder pretrained elsewhere. This one learns from what only a renderer knows: every muscle
activation, the screen displacement between a face's neutral and present shape in each patch, and landmark positions.

    python -m checkpoint.pretrain --data_dir data/synthetic data/other --output_dir runs/encoder
    python -m checkpoint.pretrain --data_dir data/synthetic --output_dir runs/longer --encoder . --learning_rate 8e-4

Writes the encoder alone, as a folder that `AutoModel` loads. Resumes from its last epoch when started again. The
second command goes on from the encoder of a finished AU-LLaVA, or from one that lies by itself; with
`--depths 2 3 5 2` from a deeper one that sees the same. With `--minutes 8` it trains for so long, on faces that may
still be in the making: each epoch begins with a look for new files.
"""

import argparse
import copy
import io
import json
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModel,
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
from checkpoint.begun import Course, begin, version_of
from checkpoint.muon import make_optimizers
from checkpoint.rate import set_rate


MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
DEVIATION = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
CROP = 224  # pixels along a side of a face crop
# The encoder sees the middle of it, 160 of 224 pixels a side, in which brows and mouth of 99 in 100 faces lie, neither
# enlarged nor reduced. A face fills half of its crop, and what is around it says nothing.
SIZE, VIEW = 160, 5 / 7
LABELS = ["facs", "feafa", "levels"]
FEWEST = 300  # steps of an epoch while the first of many faces are being made
FIRST = 4096  # faces that the heads of an encoder that knows something already begin from
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
    if limit:
        before = np.cumsum([0] + [pq.read_metadata(file).num_rows for file in files])
        files = [file for file, first in zip(files, before, strict=False) if first < limit]
    with ThreadPoolExecutor() as pool:  # most of the time is JPEG's
        parts = list(tqdm(pool.map(read_shard, files), desc="reading shards", unit="file", total=len(files)))
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])[:limit]) for name in parts[0]}


def read_shard(file: Path) -> dict[str, np.ndarray]:
    """One of the files of [`read_shards`]."""
    rows: dict[str, list[np.ndarray]] = {"images": [], "units": [], "flow": [], "landmarks": []}
    for row in pq.read_table(file, columns=["image", "flow", "landmarks", *LABELS]).to_pylist():
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            rows["images"].append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        rows["units"].append(units_of(row))
        flow = np.frombuffer(row["flow"], np.float16).reshape(16, 16, 2).transpose(2, 0, 1)
        rows["flow"].append(flow.astype(np.float32) / (CROP / 2))
        rows["landmarks"].append(np.array(row["landmarks"], np.float32).reshape(68, 2) / (CROP / 2) - 1)
    return {name: np.stack(values) for name, values in rows.items()}


def units_of(row: dict) -> np.ndarray:
    """What a face does, `(70,)`: its FACS units and FEAFA's, 0 to 1, and its FACS units' levels as parts of 5."""
    return np.array(row["facs"] + row["feafa"] + [level / 5 for level in row["levels"]], np.float32)


def mirrored_units() -> torch.Tensor:
    """Column order of `units` after a left-right flip: FACS units stay, FEAFA's left and right ones change places."""
    codes = list(PRESETS["feafa"])
    swapped = [codes.index(unit.mirrored().code) for unit in select("feafa")]
    return torch.cat([torch.arange(FACS), FACS + torch.tensor(swapped), torch.arange(FACS + 24, UNITS)])


def augment(
    batch: dict[str, torch.Tensor], generator: torch.Generator, strength: float = 1.0
) -> dict[str, torch.Tensor]:
    """Change faces with their labels: place, shape, light, colour and sharpness; and cover random boxes.

    Args:
        batch (`dict`): As [`read_shards`] gives it, on the generator's device.
        strength (`float`, defaults to 1): How much and how often; with 0 faces are mirrored, and otherwise as in use.

    Returns:
        `dict`: The same, with `images` `(n, 3, 160, 160)` normalised, and `flipped` `(n,)`, whether left is right now.
    """
    n, device = len(batch["images"]), generator.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator, device=device).mul_(high - low).add_(low)

    def hills(channels: int, few: int, side: int) -> torch.Tensor:
        """Smooth random fields, `(n, channels, side, side)`, of few hills along a side."""
        coarse = torch.randn(n, channels, few, few, generator=generator, device=device)
        smooth = nn.functional.interpolate(coarse, size=(side // 4, side // 4), mode="bicubic", align_corners=True)
        return nn.functional.interpolate(smooth, size=(side, side), mode="bilinear", align_corners=True)

    flipped = uniform(0, 1) < 0.5
    sign = torch.where(flipped, -1.0, 1.0)
    angle, scale = strength * uniform(-0.17, 0.17), VIEW * (1 + strength * uniform(-0.1, 0.1))
    shift = strength * uniform(-0.08, 0.08, 2)
    # Where each point of the new picture comes from: turned and scaled, then shifted, then mirrored.
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    mirror = torch.stack([sign, torch.ones_like(sign)], 1)
    where = torch.cat([turn * scale[:, None, None], shift[:, :, None]], 2) * mirror[:, :, None]
    back = turn.transpose(1, 2) / scale[:, None, None]
    # And a face of a slightly other shape: smooth shifts of a pixel or two, far below those that an action makes.
    warp = hills(2, 5, SIZE) * uniform(0, 0.014 * strength, 1, 1, 1)

    def moved(picture: torch.Tensor, side: int) -> torch.Tensor:
        grid = nn.functional.affine_grid(where, [n, picture.shape[1], side, side], align_corners=False)
        here = nn.functional.interpolate(warp, size=(side, side), mode="bilinear", antialias=side < SIZE)
        return nn.functional.grid_sample(picture, grid + here.permute(0, 2, 3, 1), align_corners=False)

    flow = torch.einsum("nab,nbhw->nahw", back, moved(batch["flow"], 16) * mirror[:, :, None, None])
    landmarks = torch.einsum("nab,npb->npa", back, batch["landmarks"] * mirror[:, None] - shift[:, None])
    # The warp is in the old picture's coordinates, mirrored ones where the face is.
    shifted = nn.functional.grid_sample(warp, landmarks[:, None], align_corners=False, padding_mode="border")[:, :, 0]
    landmarks = landmarks - torch.einsum("nab,npb->npa", back, shifted.transpose(1, 2) * mirror[:, None])
    return {
        "images": repaint(moved(batch["images"].float().div_(255), SIZE), uniform, hills, strength)
        .sub_(MEAN.to(device))
        .div_(DEVIATION.to(device)),
        "units": torch.where(flipped[:, None], batch["units"][:, mirrored_units().to(device)], batch["units"]),
        "flow": flow,
        "landmarks": landmarks,
        "flipped": flipped,
    }


def repaint(images: torch.Tensor, uniform: Callable, hills: Callable, strength: float) -> torch.Tensor:
    """Other light, colours and sharpness, noise, and covered boxes.

    Args:
        images (`torch.Tensor` of shape `(n, 3, 160, 160)`): 0 to 1.
        uniform (`Callable`): From lowest and highest value and a shape to random numbers `(n, *shape)`.
        hills (`Callable`): From channels, number of hills and side to smooth random fields.
        strength (`float`): As of [`augment`].

    Returns:
        `torch.Tensor`: the same shape, 0 to 1.
    """
    one = (1, 1, 1)

    def some(share: float) -> torch.Tensor:
        """Which pictures something happens to."""
        return (uniform(0, 1) < share * strength).nonzero()[:, 0]

    # Light as none of the lamps gave it: brighter here, darker there; or all large differences of brightness gone.
    images = images * (uniform(0, 0.35 * strength, *one) * (uniform(0, 1, *one) < 0.5) * hills(1, 4, SIZE)).exp()
    rows = some(0.1)
    coarse = nn.functional.interpolate(images[rows].mean(1, keepdim=True), size=(10, 10), mode="area")
    around = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(min=0.05)
    images[rows] *= 0.5 / around
    deep = (1 + strength * uniform(-1.2, 0.6, *one)).clamp(min=0)
    images = torch.lerp(images.mean(1, keepdim=True), images, deep)
    grey, contrast = images.mean((2, 3), keepdim=True), 1 + strength * uniform(-0.5, 0.5, *one)
    colour = (1 + strength * uniform(-0.35, 0.3, *one)) * (1 + strength * uniform(-0.2, 0.2, 3, 1, 1))
    bright = strength * uniform(-0.1, 0.1, *one)
    images = images * (contrast * colour) + (grey * (1 - contrast) * colour + bright)
    images = images.clamp_(0.001, 1).pow_((strength * uniform(-0.4, 0.4, *one)).exp())
    # Out of focus, enlarged from few pixels, or sharpened
    for few in (2, 3, 4):
        rows = some(0.1 / (few - 1))
        reduced = nn.functional.avg_pool2d(images[rows], few)
        images[rows] = nn.functional.interpolate(reduced, size=(SIZE, SIZE), mode="bilinear")
    near = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(near, images, (1 + strength * uniform(-1.5, 2.5, *one)).clamp(min=0.5))
    images = images.addcmul_(uniform(-1.73, 1.73, 3, SIZE, SIZE), uniform(0, 0.06 * strength, *one))
    place = torch.arange(SIZE, device=images.device)
    boxes = uniform(0, 1, *one) < 0.3 * strength
    for shape in ((1, SIZE, 1), (1, 1, SIZE)):  # rows, then columns
        first, length = uniform(0, SIZE, *one), uniform(10, 60, *one)
        boxes = boxes & (place.view(shape) >= first) & (place.view(shape) < first + length)
    return torch.where(boxes, uniform(0, 1, 3, 1, 1), images).clamp(0, 1)


def middle(images: torch.Tensor) -> torch.Tensor:
    """Renders `(n, 3, 224, 224)` uint8 as the encoder sees them in use: `(n, 3, 160, 160)`, normalised."""
    edge = round((1 - VIEW) * CROP / 2)
    seen = images[:, :, edge : CROP - edge, edge : CROP - edge].float() / 255
    seen = nn.functional.interpolate(seen, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (seen - MEAN.to(seen.device)) / DEVIATION.to(seen.device)


def make_encoder(architecture: str) -> PreTrainedModel:
    """A small encoder with random weights: 25 (`resnet`) or 100 (`dinov2`) image tokens from 160 x 160 pixels."""
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
            num_hidden_layers=10,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=16,
            use_mask_token=False,
        )
    )


def encoder_of(folder: str) -> PreTrainedModel:
    """The encoder that lies in a folder by itself, or that of an AU-LLaVA, in 32 bits."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.model.vision_tower if isinstance(model, AuLlavaForConditionalGeneration) else model


def write_encoder(encoder: PreTrainedModel, folder: str | Path) -> None:
    """Write an encoder, and the processor that shows it a crop as it has learnt to see it."""
    encoder.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": round(SIZE / VIEW)},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN.flatten().tolist(),
        image_std=DEVIATION.flatten().tolist(),
    ).save_pretrained(folder)


def deepen(encoder: ResNetModel, depths: list[int]) -> ResNetModel:
    """The same encoder with more blocks a stage; the new ones pass on what they get, and learn from there.

    Args:
        encoder (`ResNetModel`): With blocks of the kind `basic`.
        depths (`list[int]`): Blocks of each stage, at least as many as it has.

    Raises:
        ValueError: Fewer blocks, or another number of stages.
    """
    if len(depths) != len(encoder.config.depths) or any(
        more < few for more, few in zip(depths, encoder.config.depths, strict=True)
    ):
        raise ValueError(f"depths is {depths}; it must be at least {encoder.config.depths}, stage by stage.")
    config = copy.deepcopy(encoder.config)
    config.depths = depths
    deeper = ResNetModel(config)
    new = deeper.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    for name in new:
        if name.endswith("layer.1.normalization.weight"):  # of a block's last norm, before what it got is added
            nn.init.zeros_(deeper.get_parameter(name))
    return deeper


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether 16 bits are faster here: on a GPU, and on processors that multiply them; elsewhere tenfold slower."""
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(device: torch.device) -> torch.autocast:
    """In which products are of 16 bits where that is faster."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_in_bfloat16(device))


def image_tokens(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the language model will see: patches, `(batch, tokens, width)`, without a class token."""
    features = encoder(pixel_values.contiguous(memory_format=torch.channels_last)).last_hidden_state
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, 1:]


@torch.no_grad()
def fit_linear(layer: nn.Linear, given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Let a layer make `wanted` `(rows, outputs)` of `given` `(rows, inputs)`, by least squares."""
    given = nn.functional.pad(given.float(), (0, 1), value=1.0)
    ridge = 1e-3 * len(given) * torch.eye(given.shape[1], device=given.device)
    found = torch.linalg.solve(given.T @ given + ridge, given.T @ wanted).T
    layer.weight.copy_(found[:, :-1])
    layer.bias.copy_(found[:, -1])


class Pretrainer(nn.Module):
    """The encoder with three linear heads; the projector of the assembled model starts from them.

    Args:
        encoder (`PreTrainedModel`): Whose image tokens are read.
        data (`dict`, *optional*): As [`read_shards`] gives it; guesses are scaled to its means and spreads.
    """

    def __init__(self, encoder: PreTrainedModel, data: dict[str, torch.Tensor]):
        super().__init__()
        self.encoder = encoder.eval()
        with torch.no_grad():
            tokens = image_tokens(self.encoder, torch.zeros(1, 3, SIZE, SIZE))
        self.side = math.isqrt(tokens.shape[1])
        self.units = nn.Linear(tokens.shape[2], UNITS)
        self.landmarks = nn.Linear(tokens.shape[2], 136)
        self.fine = round(16 / self.side)  # displacements along a side of each token's part of the picture
        self.flow = nn.Linear(tokens.shape[2], 2 * self.fine**2)
        for head in (self.units, self.landmarks, self.flow):
            nn.init.zeros_(head.weight)  # so that heads that know nothing yet do not disturb an encoder that does
        self.register_buffer("centre", data["units"].mean(0))
        self.register_buffer("spread", data["units"].std(0).clamp(min=1e-3))
        self.register_buffer("flow_spread", data["flow"].std())
        self.register_buffer("landmark_spread", data["landmarks"].std())

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Units `(batch, 70)`, displacements `(batch, 2, side, side)`, landmarks `(batch, 68, 2)`, of variance 1."""
        tokens = image_tokens(self.encoder, pixel_values)
        pooled = tokens.mean(1)
        cells = self.flow(tokens).view(len(tokens), self.side, self.side, 2, self.fine, self.fine)
        flow = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return self.units(pooled), flow, self.landmarks(pooled).view(-1, 68, 2)

    def wanted(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What [`forward`] is to give for a batch of [`augment`]."""
        side = self.side * self.fine
        flow = nn.functional.interpolate(batch["flow"], (side, side), mode="bilinear")
        units = (batch["units"] - self.centre) / self.spread
        return units, flow / self.flow_spread, batch["landmarks"] / self.landmark_spread

    def losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(3,)`: mean squared errors of units, displacements and landmarks in a batch of [`augment`]."""
        with autocast(batch["images"].device):
            guesses = self(batch["images"])
        pairs = zip(guesses, self.wanted(batch), strict=True)
        units, flow, landmarks = ((guess.float() - right).pow(2).flatten(1).mean(1) for guess, right in pairs)
        # A flip would also exchange landmark numbers; the unflipped half of the batch teaches enough.
        return torch.stack([units.mean(), flow.mean(), (landmarks * ~batch["flipped"]).mean()])

    @torch.no_grad()
    def fit_heads(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Start the heads from linear fits to what the encoder tells already, on batches of [`augment`].

        Muon's steps are as long under heads that say nothing yet, and would lead an encoder away from what it knows.
        """
        seen, rows = [], []
        for batch in batches:
            with autocast(batch["images"].device):
                seen.append(image_tokens(self.encoder, batch["images"]).float())
            rows.append((*self.wanted(batch), ~batch["flipped"]))
        tokens = torch.cat(seen)
        units, flow, landmarks, straight = (torch.cat(column) for column in zip(*rows, strict=True))
        cells = flow.unflatten(3, (self.side, self.fine)).unflatten(2, (self.side, self.fine))
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.flow.out_features)
        fit_linear(self.units, tokens.mean(1), units)
        fit_linear(self.flow, tokens.flatten(0, 1), cells)
        fit_linear(self.landmarks, tokens.mean(1)[straight], landmarks[straight].flatten(1))

    @torch.no_grad()
    def correlation(self, faces: dict[str, torch.Tensor]) -> float:
        """Of the guesses with the labels, the mean over all units, for faces as they are seen in use."""
        parts = faces["images"].split(50)
        guess = torch.cat([self(middle(part.to(self.centre.device)))[0].float().cpu() for part in parts])
        pairs = zip(guess.T, faces["units"].T, strict=True)
        return float(np.nanmean([torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]))


class Faces:
    """The training faces of some folders, on a device; more of them may come while others are learnt from."""

    def __init__(self, folders: list[str], device: torch.device, workers: int, limit: int | None):
        self.folders, self.device, self.limit = [Path(folder) for folder in folders], device, limit
        self.read: set[Path] = set()
        self.pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
        self.coming: list[Future] = []
        self.data: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.data["images"])

    def __getitem__(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: values[rows] for name, values in self.data.items()}

    def look(self) -> None:
        """Read the files that are new; with a pool, take what it has read of those of earlier looks."""
        files = [file for folder in self.folders for file in sorted(folder.glob("train-*.parquet"))]
        fresh = [file for file in files if file not in self.read]
        if self.data and (self.limit or not (fresh or self.coming)):
            return
        self.read |= set(fresh)
        if self.pool and (fresh or self.coming) and not self.limit:
            self.coming += [self.pool.submit(read_shards, [file]) for file in fresh]
            done = [some for some in self.coming if some.done() or not self.data]
            self.coming = [some for some in self.coming if some not in done]
            parts = [some.result() for some in done]
        else:  # a limit counts over all files, and that there are none is said there
            parts = [read_shards(fresh, self.limit)]
        known = [self.data] if self.data else []
        known += [{name: values.to(self.device) for name, values in part.items()} for part in parts]
        self.data = {name: torch.cat([some[name] for some in known]) for name in known[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, nargs="+", help="folders of faces; all are learnt from")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--minutes", type=float, help="train for so long instead, on faces as they are rendered")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        default=[1.0],
        help="of the changes made to faces, at the start and, where two are given, at the end; 0: none but mirrored",
    )
    parser.add_argument("--architecture", choices=["resnet", "dinov2"], help="of random weights; resnet by default")
    parser.add_argument("--encoder", help="an encoder or an AU-LLaVA to go on from; else random weights")
    parser.add_argument("--depths", type=int, nargs=4, help="more blocks in each of its stages than it has")
    parser.add_argument("--freeze", nargs="*", default=[], help="parts of it that stay as they are: embedder ...")
    parser.add_argument("--workers", type=int, default=1, help="processes that read faces")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.depths and not args.encoder:
        parser.error(f"--depths {args.depths} is for an encoder that goes on learning; name it with --encoder")
    if args.encoder and args.architecture:
        parser.error(f"--architecture {args.architecture}: that of --encoder {args.encoder} stays; leave one out")
    args.architecture = args.architecture or "resnet"
    if len(args.strength) > 2:
        parser.error(f"--strength {args.strength}: one, or one at the start and one at the end")

    set_seed(args.seed)
    output = begin(  # more faces may come to these folders
        args.output_dir,
        faces=[str(Path(folder).resolve()) for folder in args.data_dir],
        encoder=version_of(Path(args.encoder, "model.safetensors")) if args.encoder else args.architecture,
        depths=args.depths,
        seed=args.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True

    faces = Faces(args.data_dir, device, args.workers, args.limit)
    faces.look()
    unseen = {}
    for folder in args.data_dir:
        if seen := sorted(Path(folder).glob("validation-*.parquet")):
            unseen[folder] = read_shards(seen, 500)
    if args.encoder:
        encoder = encoder_of(args.encoder)
        encoder.config.image_size = SIZE
        encoder = deepen(encoder, args.depths) if args.depths else encoder
    else:
        encoder = make_encoder(args.architecture)
    frozen = [encoder.get_submodule(name).requires_grad_(False) for name in args.freeze]
    model = Pretrainer(encoder, faces.data).to(device, memory_format=torch.channels_last)

    optimizers = make_optimizers(encoder, list(model.parameters()), args.learning_rate)
    course = Course(output / "state.pt", {"model": model}, optimizers)
    epoch, before, began = course.at.get("epoch", 0), course.at.get("minutes", 0.0), time.monotonic()
    if args.encoder and not epoch:
        generator = torch.Generator(device).manual_seed(1000 * args.seed + 999)
        some = torch.randperm(len(faces), generator=generator, device=device)[:FIRST].split(args.batch_size)
        model.fit_heads(augment(faces[rows], generator, args.strength[0]) for rows in tqdm(some, desc="heads"))

    def minutes() -> float:
        return before + (time.monotonic() - began) / 60

    def progress(part: float = 0.0) -> float:
        """Share of the epochs or of the time that is done, `part` of an epoch being a part of this one."""
        return minutes() / args.minutes if args.minutes else (epoch + part) / args.epochs

    while progress() < 1:
        faces.look()
        generator = torch.Generator(device).manual_seed(1000 * args.seed + epoch)
        steps = max(len(faces) // args.batch_size, FEWEST if args.minutes else 1)
        rounds = math.ceil(steps * args.batch_size / len(faces))
        order = torch.cat([torch.randperm(len(faces), generator=generator, device=device) for _ in range(rounds)])
        totals = torch.zeros(3, device=device)
        model.train()
        for part in frozen:
            part.eval()
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}", unit="step", mininterval=5)
        for step in bar:
            # The rate depends on the share that is done, so that a run may go on with more faces than it began with.
            done = progress(step / steps)
            if step and done >= 1:
                break
            set_rate(optimizers, args.learning_rate, done, 0.03)
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            strength = args.strength[0] + done * (args.strength[-1] - args.strength[0])
            losses = model.losses(augment(faces[rows], generator, strength))
            model.zero_grad()
            (losses * torch.tensor([1.0, 0.5, 0.5], device=device)).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            for optimizer in optimizers:
                optimizer.step()
            totals += losses.detach()
            if step % 20 == 0:
                parts = (totals / (step + 1)).tolist()
                bar.set_postfix(units=f"{parts[0]:.3f}", flow=f"{parts[1]:.3f}", landmarks=f"{parts[2]:.4f}")
        epoch += 1
        log = {"epoch": epoch, "minutes": round(minutes(), 2), "faces": len(faces)}
        log |= dict(zip(("units", "flow", "landmarks"), (totals / (step + 1)).tolist(), strict=True))
        model.eval()
        log["validation_correlation"] = {folder: model.correlation(some) for folder, some in unseen.items()}
        with (output / "log.jsonl").open("a") as file:
            file.write(json.dumps(log) + "\n")
        course.keep(epoch=epoch, minutes=minutes())
    write_encoder(model.encoder, output)


if __name__ == "__main__":
    main()
