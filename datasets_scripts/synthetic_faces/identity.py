"""A person who does not exist: shape of the head, skin, hair, what he or she wears, and a personal way of moving."""

import colorsys
from dataclasses import dataclass

import numpy as np

from . import accessories, skin
from .expression import personal_style
from .mesh import load_head


# Ends of the names of opposite targets, which one signed number drives.
OPPOSITES = (("-incr", "-decr"), ("-up", "-down"), ("-in", "-out"), ("-forward", "-backward"), ("-convex", "-concave"))
# Parts whose targets change the face less plausibly when they are pushed far.
SUBTLE_PARTS = ("ears", "neck", "head")
RACES = ("african", "asian", "caucasian")


@dataclass
class Identity:
    """One person; everything here stays the same from image to image.

    Attributes:
        vertices (`np.ndarray`): (V, 3) base vertices of the face at rest.
        neutral (`np.ndarray`): (S, 3) the same, smoothed.
        race (`dict`): share of each ethnic variant, which says nothing about `tone`.
        masculine, age, tone (`float`): 0 to 1 (age: 20 to 80 years; tone: lightest to darkest).
        albedo (`np.ndarray`): (512, 512, 3) painted skin; `relief` (512, 512) its pores.
        palette (`np.ndarray`): (6, 3) linear colours: lips, hair, clothes, iris, frame of the glasses, mean skin.
        surface (`np.ndarray`): (6,) gloss, iris radius, pupil share, lip strength, collar height, whether ears are
            covered.
        hair (`np.ndarray`): (256, 512, 2) see [`skin.hair_map`]; `hair_thickness` in decimetres.
        wrinkling (`np.ndarray`): own strength of every furrow; `age_lines` what shows of them at rest.
        shell, frame, lenses (`tuple` or `None`): meshes of [`accessories`].
        style (`dict`): see [`expression.personal_style`].
        sculpt (`np.ndarray` or `None`): (V, 3) how much further than usual each vertex moves in each direction.
    """

    vertices: np.ndarray
    neutral: np.ndarray
    race: dict[str, float]
    masculine: float
    age: float
    tone: float
    albedo: np.ndarray
    relief: np.ndarray
    palette: np.ndarray
    surface: np.ndarray
    hair: np.ndarray
    hair_thickness: float
    wrinkling: np.ndarray
    age_lines: np.ndarray
    shell: tuple | None
    frame: tuple | None
    lenses: tuple | None
    style: dict[str, dict[str, float]]
    sculpt: np.ndarray | None = None

    @property
    def skin_group(self) -> str:
        """`light`, `medium` or `dark`."""
        return ("light", "medium", "dark")[min(int(self.tone * 3), 2)]

    @property
    def gender_group(self) -> str:
        """`feminine` or `masculine`: which shapes dominate the face."""
        return "masculine" if self.masculine > 0.5 else "feminine"

    @property
    def age_group(self) -> str:
        """`young` (to 40 years), `middle` (to 60) or `old`."""
        return "young" if self.age < 1 / 3 else "middle" if self.age < 2 / 3 else "old"


def draw_identity(rng: np.random.Generator) -> Identity:
    """Make a person from a random number generator."""
    head = load_head()
    race = dict(zip(RACES, rng.dirichlet([0.45] * 3), strict=True))
    masculine = float(np.clip(rng.beta(0.4, 0.4), 0, 1))
    age = float(rng.beta(1.0, 1.4))
    tone = float(rng.uniform(0, 1))
    vertices = head.vertices.copy()
    _shape(rng, head, vertices, race, masculine, age)
    neutral = head.smooth(vertices)

    hair_colour = _hair_colour(rng, tone, age)
    albedo, base = skin.paint_skin(rng, tone, masculine, hair_colour)
    wear = rng.choice(["hair", "long hair", "bald", "hat", "scarf"], p=_wear_chances(masculine))
    cloth = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.03, 0.7)))
    cover = cloth if wear in ("hat", "scarf") else hair_colour
    hair, thickness = _hair(rng, wear, masculine, age)
    shell, rise = None, float((neutral - head.rest)[head.landmarks[36:48], 1].mean())
    if wear == "long hair":
        shell = accessories.hair_shell(rng, neutral, head.ears, rise, rng.uniform(5.4, 6.7), rng.uniform(0.95, 1.3))
    elif wear == "scarf":
        shell = accessories.hair_shell(rng, neutral, head.ears, rise, 5.2, rng.uniform(0.85, 1.05))
    frame = lenses = None
    if rng.random() < 0.2:
        frame, lenses = accessories.glasses(rng, neutral, head.landmarks)

    lips = base * np.array([0.95, 0.58, 0.58]) * rng.uniform(0.75, 1.0)
    if masculine < 0.5 and rng.random() < 0.35:  # lipstick
        stick = colorsys.hsv_to_rgb(rng.uniform(0.93, 1.0), rng.uniform(0.5, 0.85), rng.uniform(0.2, 0.6))
        lips = 0.4 * lips + 0.6 * np.array(stick)
    iris = skin.IRIS_COLOURS[rng.choice(6, p=[0.35, 0.25, 0.12, 0.1, 0.12, 0.06]) if tone < 0.5 else rng.choice(2)]
    metal = np.array([0.4, 0.35, 0.25]) * rng.uniform(0.3, 1.5)
    plastic = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.005, 0.2)))
    palette = np.stack(
        [lips, cover, cloth, iris * rng.uniform(0.7, 1.3), metal if rng.random() < 0.35 else plastic, base]
    )
    covered_ears = float(wear == "scarf" or (wear == "hat" and rng.random() < 0.5))
    surface = [rng.uniform(0.08, 0.4), rng.uniform(0.40, 0.48), rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.95),
               rng.uniform(5.3, 6.0), covered_ears]  # fmt: skip
    names = list(skin.wrinkle_bank())
    age_lines = np.full(len(names), max(age - 0.3, 0) * 0.5) * rng.uniform(0.3, 1.3, len(names))
    return Identity(
        vertices=vertices, neutral=neutral, race=race, masculine=masculine, age=age, tone=tone, albedo=albedo,
        relief=skin.pores(rng), palette=palette.astype(np.float32), surface=np.array(surface, np.float32), hair=hair,
        hair_thickness=thickness, wrinkling=np.exp(rng.normal(0, 0.35, len(names))) * (0.45 + 0.6 * age),
        age_lines=age_lines, shell=shell, frame=frame, lenses=lenses, style=personal_style(rng),
    )  # fmt: skip


def _shape(rng, head, vertices, race, masculine, age) -> None:
    """Mould `vertices` in place: ethnic, sex, age and weight targets, then many small local ones, then asymmetry."""
    sexes, ages = {"male": masculine, "female": 1 - masculine}, {"young": 1 - age, "old": age}
    for origin, share in race.items():
        for sex, x in sexes.items():
            for years, y in ages.items():
                head.add(vertices, f"macro/{origin}-{sex}-{years}", share * x * y)
    heavy = float(np.clip(rng.normal(0, 0.45), -0.9, 0.9))
    weight = ("maxweight", heavy) if heavy > 0 else ("minweight", -heavy)
    for sex, x in sexes.items():
        for years, y in ages.items():
            head.add(vertices, f"macro/universal-{sex}-{years}-averagemuscle-{weight[0]}", x * y * weight[1])
    drawn: dict[str, float] = {}
    pairs, singles, shapes = identity_targets()
    for more, less in pairs:
        both_sides = more.replace("/l-", "/").replace("/r-", "/")
        if both_sides not in drawn:
            spread = 0.2 if more.startswith(SUBTLE_PARTS) else 0.27
            drawn[both_sides] = float(np.clip(rng.normal(0, spread), -0.7, 0.7))
        weight = drawn[both_sides] + rng.normal(0, 0.05)
        head.add(vertices, more if weight > 0 else less, abs(weight))
    head.add(vertices, shapes[rng.integers(len(shapes))], rng.uniform(0, 0.6))
    for name in singles:
        if rng.random() < 0.3:
            head.add(vertices, name, abs(rng.normal(0, 0.12)))


def identity_targets():
    """Local targets: pairs of opposites, single asymmetries, and whole shapes of the head."""
    names = load_head().target_names
    local = [
        name
        for name in names
        if name.split("/")[0] not in ("fu", "macro", "expr") and not name.endswith(("Left", "Right"))
    ]
    pairs = []
    for name in local:
        for more, less in OPPOSITES:
            other = name.removesuffix(more) + less
            if name.endswith(more) and other in names:
                pairs.append((name, other))
    paired = {name for pair in pairs for name in pair}
    singles = [name for name in local if name.startswith("asym/")]
    shapes = [name for name in local if name.startswith("head/") and name not in paired]
    return pairs, singles, shapes


def _hair_colour(rng, tone, age) -> np.ndarray:
    colour = skin.HAIR_COLOURS[rng.choice(6, p=[0.28, 0.26, 0.2, 0.13, 0.08, 0.05]) if tone < 0.5 else rng.choice(2)]
    grey = skin.smoothstep(0.4, 0.95, age + rng.normal(0, 0.12))
    colour = colour * (1 - grey) + grey * skin.HAIR_COLOURS[6 + int(rng.random() < 0.5)]
    if rng.random() < 0.03:  # dyed
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), 0.7, 0.4))
    return (colour * rng.uniform(0.75, 1.25)).astype(np.float32)


def _wear_chances(masculine) -> list[float]:
    """Chances of short hair, long hair, a bald head, a hat, a head scarf."""
    return [0.68, 0.10, 0.12, 0.08, 0.02] if masculine > 0.5 else [0.34, 0.46, 0.02, 0.08, 0.10]


def _hair(rng, wear, masculine, age):
    """The hair map of what grows or lies on the skull, and its thickness."""
    angle = np.linspace(-np.pi, np.pi, skin.HAIR_COLUMNS, dtype=np.float32)
    front = rng.normal(8.0, 0.07) if wear in ("hair", "long hair", "bald") else rng.uniform(7.68, 7.95)
    recede = max(0.0, rng.normal(0.04, 0.06)) + (0.12 * age if masculine > 0.5 else 0)
    temple, sideburn = rng.uniform(7.5, 7.7), rng.uniform(6.95, 7.35)
    stations = [0.0, 0.35, 0.62, 0.95, 1.22, 1.42, 1.62, 2.05, np.pi]
    heights = [front, front + 0.3 * recede, front + recede, temple + 0.12, temple - 0.12, sideburn, 7.3, 6.75, 6.55]
    if wear in ("hat", "scarf"):
        heights = [front, front, front - 0.02, front - 0.08, front - 0.15, 7.5, 7.35, 7.2, 6.9]
    hairline = np.interp(np.abs(angle), stations, heights)
    softness, ragged, thickness = rng.uniform(0.06, 0.16), rng.uniform(0.0, 0.05), rng.uniform(0.04, 0.2)
    if wear == "bald":
        only_a_ring_is_left = 2.0 * skin.smoothstep(1.4, 1.0, np.abs(angle))
        hairline = hairline + (3.0 if rng.random() < 0.5 else only_a_ring_is_left)
        thickness = 0.02
    elif wear in ("hat", "scarf"):
        softness, ragged, thickness = 0.02, 0.0, rng.uniform(0.05, 0.14)
    elif masculine > 0.5 and rng.random() < 0.4:  # cropped
        softness, thickness = rng.uniform(0.12, 0.22), rng.uniform(0.01, 0.04)
    elif rng.random() < 0.35:  # fringe, parted somewhere or straight
        part, reach = rng.uniform(-0.9, 0.9), rng.uniform(0.1, 0.42)
        opening = skin.smoothstep(0.05, 0.5, np.abs(angle - part)) if rng.random() < 0.7 else 1.0
        hairline = hairline - reach * opening * skin.smoothstep(1.2, 0.75, np.abs(angle))
        ragged, softness = rng.uniform(0.03, 0.12), rng.uniform(0.03, 0.1)
    return skin.hair_map(rng, hairline.astype(np.float32), softness, ragged), float(thickness)
