"""Augmentation of aligned face crops, on the fly, with Pillow and numpy alone.

It acts on a picture and its labels before the question is written, so that a flip can exchange left and right in both.

Example:

>>> import numpy as np
>>> from PIL import Image
>>> face = Image.new("RGB", (224, 224), "tan")
>>> mirror = replace(NOTHING, flip=1)
>>> mirror(face, {"FEAFA1": 0.9, "FEAFA2": 0.1}, np.random.default_rng(0))[1]
{'FEAFA1': 0.1, 'FEAFA2': 0.9}

Draw every step in one picture:

    python -m au_llava.datasets_scripts.augmentation --image examples/surprise.jpg --output docs/augmentation.jpg
"""

import argparse
import math
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps, ImageStat

from ..action_units import ActionUnit, select
from ..face_alignment import find_faces, open_image
from .instructions import Labels


# Rec. 601 luma, by which Pillow turns colour to grey.
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Random changes that leave the muscle actions as they are. Any of them is switched off by 0.

    The defaults are kept small where they could hide or imitate an action: crops are already aligned.

    Args:
        flip (`float`, *optional*, defaults to 0.5): Probability of a left-right flip, which exchanges the labels of
            left and right units. Where one of a pair is unknown the picture stays as it is, for the flip would ask
            about another unit.
        rotation (`float`, *optional*, defaults to 10): Largest turn, in degrees.
        scale (`float`, *optional*, defaults to 0.1): Largest growth or shrinking, as a part of the size.
        shift (`float`, *optional*, defaults to 0.05): Largest shift, as a part of the side.
        brightness (`float`, *optional*, defaults to 0.3): Largest change of brightness, as a part of it.
        contrast (`float`, *optional*, defaults to 0.3): Largest change of contrast, as a part of it.
        colour (`float`, *optional*, defaults to 0.4): Largest change of saturation, as a part of it; each colour
            channel's gain changes by up to a quarter of this.
        blur (`float`, *optional*, defaults to 0.2): Probability of a blur of 0.5 to 2 pixels.
        jpeg (`float`, *optional*, defaults to 0.3): Probability of JPEG compression at quality 20 to 80.
        occlusion (`float`, *optional*, defaults to 0.2): Probability of a patch over the face, with sides of 5 % to
            25 % of the picture's.

    Raises:
        ValueError: A setting is negative, a probability is above 1, or a part is 1 or more.
    """

    flip: float = 0.5
    rotation: float = 10.0
    scale: float = 0.1
    shift: float = 0.05
    brightness: float = 0.3
    contrast: float = 0.3
    colour: float = 0.4
    blur: float = 0.2
    jpeg: float = 0.3
    occlusion: float = 0.2

    def __post_init__(self):
        for field in fields(self):
            value, most = getattr(self, field.name), 180 if field.name == "rotation" else 1
            if not 0 <= value <= most or (field.name == "scale" and value == 1):
                raise ValueError(f"Augmentation {field.name} is {value!r}; give 0 (off) to {most}.")

    def __call__(
        self, image: Image.Image, labels: Labels, generator: np.random.Generator
    ) -> tuple[Image.Image, dict[str | ActionUnit, float]]:
        """Change one sample.

        Args:
            image (`PIL.Image.Image`): An aligned crop.
            labels (`Mapping[str | ActionUnit, float]`): Values by Action Unit or its code.
            generator (`np.random.Generator`): The only source of chance: the same state gives the same picture.

        Returns:
            The new picture, RGB and of the same size, and the labels that belong to it, in the same order where it can
            be.
        """
        image, labels = image.convert("RGB"), dict(labels)
        if generator.random() < self.flip and _known(mirrored := mirror_labels(labels)) == _known(labels):
            image, labels = ImageOps.mirror(image), mirrored
        image = self._move(image, generator)
        if generator.random() < self.occlusion:
            image = _occlude(image, generator)
        image = self._recolour(image, generator)
        if generator.random() < self.blur:
            image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.5, 2.0)))
        if generator.random() < self.jpeg:
            image = _compress(image, int(generator.integers(20, 81)))
        return image, labels

    def _move(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Rotation, scale and shift in one resampling; what comes in from outside is black, as in aligned crops."""
        if not (self.rotation or self.scale or self.shift):
            return image
        angle = math.radians(generator.uniform(-self.rotation, self.rotation))
        scale = 1 + generator.uniform(-self.scale, self.scale)
        dx, dy = generator.uniform(-self.shift, self.shift, 2) * image.size
        # Pillow asks where each pixel of the result comes from: undo the shift, then turn and scale about the centre.
        a, b = math.cos(angle) / scale, math.sin(angle) / scale
        x, y = image.width / 2, image.height / 2
        inverse = (a, b, x - a * (x + dx) - b * (y + dy), -b, a, y + b * (x + dx) - a * (y + dy))
        return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)

    def _recolour(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Brightness, contrast and colour as one linear map of RGB."""
        if not (self.brightness or self.contrast or self.colour):
            return image
        brightness = 1 + generator.uniform(-self.brightness, self.brightness)
        contrast = 1 + generator.uniform(-self.contrast, self.contrast)
        saturation = 1 + generator.uniform(-self.colour, self.colour)
        gains = 1 + generator.uniform(-self.colour, self.colour, 3) / 4
        # Saturation moves each pixel away from its grey; contrast away from the picture's mean grey.
        matrix = (saturation * np.eye(3) + (1 - saturation) * LUMA) * gains[:, None] * brightness * contrast
        grey = LUMA @ ImageStat.Stat(image).mean * brightness
        return image.convert("RGB", np.column_stack([matrix, np.full(3, (1 - contrast) * grey)]).ravel().tolist())


NOTHING = Augmentation(**{field.name: 0.0 for field in fields(Augmentation)})


def mirror_labels(labels: Labels) -> dict[str | ActionUnit, float]:
    """The labels of the picture flipped left to right: each value goes to its unit's mirror image.

    >>> mirror_labels({"FEAFA9": 0.5, "FEAFA10": 1.0, "FEAFA11": 0.0})
    {'FEAFA9': 0.5, 'FEAFA10': 0.0, 'FEAFA11': 1.0}
    """
    turned = {}
    for key, unit, value in zip(labels, select(list(labels)), labels.values(), strict=True):
        other = unit.mirrored()
        turned[other.code] = (other.code if isinstance(key, str) else other, value)
    # Units stand where they stood, so that a flip does not change the order of the question.
    codes = [unit.code for unit in select(list(labels))]
    order = [code for code in codes if code in turned] + [code for code in turned if code not in codes]
    return dict(turned[code] for code in order)


def _known(labels: Labels) -> set[str]:
    return {unit.code for unit, value in zip(select(list(labels)), labels.values(), strict=True) if value == value}


def _occlude(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Lay an ellipse or a rectangle of one colour and some noise over a small part of the face."""
    width, height = (int(side * generator.uniform(0.05, 0.25)) for side in image.size)
    left, top = int(generator.integers(image.width - width)), int(generator.integers(image.height - height))
    patch = generator.integers(0, 256, 3) + generator.normal(0, generator.uniform(0, 30), (height, width, 3))
    mask = Image.new("L", (width, height), 255)
    if generator.random() < 0.5:
        mask.paste(0, (0, 0, width, height))
        ImageDraw.Draw(mask).ellipse((0, 0, width - 1, height - 1), fill=255)
    image = image.copy()
    image.paste(Image.fromarray(patch.clip(0, 255).astype(np.uint8)), (left, top), mask)
    return image


def _compress(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def draw_sheet(image: Image.Image, columns: int = 6, seed: int = 0) -> Image.Image:
    """One row for each change alone, at its full range, and one for all together, each with `columns` draws."""
    settings = {field.name: replace(NOTHING, **{field.name: field.default}) for field in fields(Augmentation)}
    for name in ("flip", "blur", "jpeg", "occlusion"):  # the odds decide whether, not how much
        settings[name] = replace(NOTHING, **{name: 1.0})
    settings["all"] = Augmentation()
    side, name_width = 112, 84
    sheet = Image.new("RGB", (name_width + columns * side, len(settings) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, augment) in enumerate(settings.items()):
        draw.text((6, row * side + side // 2 - 6), name, fill="black", font_size=13)
        generator = np.random.default_rng(seed)
        for column in range(columns):
            changed, _ = augment(image, {"AU12": 0.0}, generator) if column else (image, None)
            sheet.paste(changed.resize((side, side)), (name_width + column * side, row * side))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw every augmentation of one face in one picture.")
    parser.add_argument("--image", type=Path, required=True, help="a photograph, or a crop with --detector none")
    parser.add_argument("--detector", default="auto", help="see face_alignment.py")
    parser.add_argument("--output", type=Path, default=Path("docs/augmentation.jpg"))
    chosen = parser.parse_args(arguments)
    faces = find_faces(open_image(chosen.image), chosen.detector, max_faces=1)
    if not faces:
        raise SystemExit(f"{chosen.image}: no face found; give another picture, or a crop with --detector none.")
    draw_sheet(faces[0].crop).save(chosen.output, quality=88)


if __name__ == "__main__":
    main()
