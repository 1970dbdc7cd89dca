"""Muscle actions: what each one does to the mesh and the skin, and the labels that follow from it.

An expression is a dictionary from action to activation, 0 to 1. Actions of one side end in `_left` or `_right` (the
subject's). All three kinds of labels come from this one dictionary, so they can never contradict each other.
"""

import numpy as np


# Actions that each side of the face can do alone, and those that both sides always do together.
SIDED = (
    "inner_brow_raise", "outer_brow_raise", "brow_lower", "upper_lid_raise", "cheek_raise", "lid_tighten",
    "eye_close", "nose_wrinkle", "upper_lip_raise", "corner_pull", "dimple", "corner_depress", "lower_lip_depress",
    "lip_stretch",
)  # fmt: skip
BILATERAL = (
    "chin_raise", "pucker", "funnel", "lip_tighten", "lip_press", "lips_part", "jaw_drop", "upper_lip_suck",
    "lower_lip_suck", "jaw_left", "jaw_right", "jaw_thrust", "cheek_puff", "lips_seal",
)  # fmt: skip
ACTIONS = tuple(f"{name}_{side}" for name in SIDED for side in ("left", "right")) + BILATERAL

# Mesh targets of each action at activation 1. {Side} and {side} become Left/Right and left/right; `expr/~/` targets
# exist in three ethnic variants that are mixed like the person's face.
RECIPES: dict[str, dict[str, float]] = {
    "inner_brow_raise": {"fu/browInnerUp{Side}": 1.35},
    "outer_brow_raise": {"fu/browOuterUp{Side}": 1.4},
    "brow_lower": {"fu/browDown{Side}": 1.0},
    "upper_lid_raise": {"fu/eyeWide{Side}": 1.0},
    "cheek_raise": {"fu/cheekSquint{Side}": 1.0, "cheek/{s}-cheek-trans-up": 0.35, "cheek/{s}-cheek-volume-incr": 0.2,
                    "eyes/{s}-eye-bag-incr": 0.35},
    "lid_tighten": {"fu/eyeSquint{Side}": 1.15},
    "eye_close": {"fu/eyeBlink{Side}": 1.0},
    "nose_wrinkle": {"fu/noseSneer{Side}": 0.8, "fu/mouthUpperUp{Side}": 0.2, "expr/~/nose-{side}-elevation": 1.5,
                     "expr/~/nose-{side}-dilatation": 0.4},
    "upper_lip_raise": {"fu/mouthUpperUp{Side}": 1.0, "expr/~/nose-{side}-dilatation": 0.25},
    "corner_pull": {"fu/mouthSmile{Side}": 0.85},
    "dimple": {"fu/mouthDimple{Side}": 1.1, "mouth/mouth-dimples-in{Side}": 1.2},
    "corner_depress": {"fu/mouthFrown{Side}": 1.0, "mouth/mouth-angles-down{Side}": 0.5},
    "lower_lip_depress": {"fu/mouthLowerDown{Side}": 1.0},
    "lip_stretch": {"fu/mouthStretch{Side}": 0.7, "expr/~/mouth-retraction{Side}": 0.7},
    "chin_raise": {"fu/mouthShrugLower": 1.0, "fu/mouthShrugUpper": 0.15},
    "pucker": {"fu/mouthPucker": 1.0},
    "funnel": {"fu/mouthFunnel": 1.0},
    "lip_tighten": {"fu/mouthPucker": 0.33, "fu/mouthRollUpper": 0.35, "fu/mouthRollLower": 0.42,
                    "mouth/mouth-upperlip-height-decr": 0.5, "mouth/mouth-lowerlip-height-decr": 0.5,
                    "mouth/mouth-lowerlip-volume-decr": 0.5},
    "lip_press": {"fu/mouthPressLeft": 0.45, "fu/mouthPressRight": 0.45,
                  "fu/mouthRollUpper": 0.55, "fu/mouthRollLower": 0.65,
                  "mouth/mouth-upperlip-volume-decr": 0.5, "mouth/mouth-lowerlip-volume-decr": 0.6},
    "lips_part": {"expr/~/mouth-parling": 1.15, "fu/mouthLowerDownLeft": 0.3, "fu/mouthLowerDownRight": 0.3},
    "jaw_drop": {"fu/jawOpen": 0.9},
    "lips_seal": {},  # keeps the lips closed while the jaw drops; see targets()
    "upper_lip_suck": {"fu/mouthRollUpper": 1.0},
    "lower_lip_suck": {"fu/mouthRollLower": 1.0},
    "jaw_left": {"fu/jawLeft": 1.3},
    "jaw_right": {"fu/jawRight": 1.3},
    "jaw_thrust": {"fu/jawForward": 1.3, "chin/chin-prognathism-incr": 0.5},
    "cheek_puff": {"fu/cheekPuff": 1.0},
}  # fmt: skip

# The same actions as other artists sculpted them: MakeHuman's own expression units, where there is one. (Their
# lids do not meet halfway to another artist's, so closing the eye is left out.) The standard split shows none of them
# but those in the recipes above: lips that part or stretch, the nose.
OTHER_RECIPES: dict[str, dict[str, float]] = {
    "inner_brow_raise": {"expr/~/eyebrows-{side}-inner-up": 1.35},
    "outer_brow_raise": {"expr/~/eyebrows-{side}-extern-up": 1.0},
    "brow_lower": {"expr/~/eyebrows-{side}-down": 1.0},
    "upper_lid_raise": {"expr/~/eye-{side}-opened-up": 1.0},
    "lid_tighten": {"expr/~/eye-{side}-slit": 0.55},
    "nose_wrinkle": {"expr/~/nose-{side}-elevation": 1.5, "expr/~/nose-{side}-dilatation": 0.4,
                     "expr/~/eyebrows-{side}-down": 0.4, "expr/~/mouth-elevation{Side}": 0.3},
    "upper_lip_raise": {"expr/~/mouth-elevation{Side}": 0.9},
    "corner_pull": {"expr/~/mouth-corner-puller{Side}": 1.1},
    "corner_depress": {"expr/~/mouth-depression{Side}": 0.9},
    "lower_lip_depress": {"expr/~/mouth-depression-retraction{Side}": 0.6},
    "lip_stretch": {"expr/~/mouth-retraction{Side}": 1.4},
    "pucker": {"expr/~/mouth-pursing": 0.8},
    "funnel": {"expr/~/mouth-protusion": 0.9},
    "jaw_drop": {"expr/~/mouth-open": 0.8},
}  # fmt: skip

# Furrows of each action at activation 1 (names of skin.wrinkle_bank).
WRINKLES: dict[str, dict[str, float]] = {
    "inner_brow_raise": {"forehead_inner": 1.0},
    "outer_brow_raise": {"forehead_outer_{side}": 1.0},
    "brow_lower": {"glabella": 1.0},
    "cheek_raise": {"crow_feet_{side}": 1.0, "cheek_bag_{side}": 0.8},
    "lid_tighten": {"lower_lid_{side}": 0.9},
    "nose_wrinkle": {"nose_side_{side}": 1.2, "nose_root": 0.8, "nasolabial_{side}": 0.4},
    "upper_lip_raise": {"nasolabial_{side}": 0.7},
    "corner_pull": {"nasolabial_{side}": 0.8},
    "dimple": {"dimple_{side}": 0.9},
    "corner_depress": {"marionette_{side}": 1.0},
    "chin_raise": {"chin_boss": 1.0, "chin_fold": 1.0},
    "lip_tighten": {"lip_lines": 0.7},
    "pucker": {"lip_lines": 0.9},
}

# Targets that may mix into an action of one person more than into that of another, by part of the face.
NEIGHBOURS: dict[str, tuple[str, ...]] = {
    "brow": ("fu/browInnerUp{Side}", "fu/browOuterUp{Side}", "fu/browDown{Side}"),
    "eye": ("fu/eyeSquint{Side}", "fu/cheekSquint{Side}"),
    "nose": ("fu/mouthUpperUp{Side}", "expr/~/nose-{side}-dilatation", "fu/cheekSquint{Side}"),
    "corner": ("fu/mouthStretch{Side}", "fu/mouthDimple{Side}", "fu/mouthUpperUp{Side}", "fu/mouthLowerDown{Side}"),
    "lips": ("fu/mouthPucker", "fu/mouthShrugUpper", "fu/mouthShrugLower", "fu/mouthRollLower"),
}
PART_OF_ACTION = {
    "inner_brow_raise": "brow", "outer_brow_raise": "brow", "brow_lower": "brow",
    "cheek_raise": "eye", "lid_tighten": "eye", "nose_wrinkle": "nose", "upper_lip_raise": "nose",
    "corner_pull": "corner", "dimple": "corner", "corner_depress": "corner", "lower_lip_depress": "corner",
    "lip_stretch": "corner", "chin_raise": "lips", "lip_tighten": "lips", "lip_press": "lips", "pucker": "lips",
    "funnel": "lips", "jaw_drop": "lips",
}  # fmt: skip

FACS_CODES = (
    "AU1", "AU2", "AU4", "AU5", "AU6", "AU7", "AU9", "AU10", "AU12", "AU14", "AU15", "AU16", "AU17", "AU18", "AU20",
    "AU22", "AU23", "AU24", "AU25", "AU26", "AU27", "AU28", "AU43",
)  # fmt: skip
FEAFA_CODES = tuple(f"FEAFA{number}" for number in range(1, 25))

# FACS scores intensity A to E: trace, slight, marked, severe, maximum, "C" and "D" covering more of the range than the
# others (Ekman, Friesen and Hager, 2002). An activation of at least LEVEL_EDGES[k] has DISFA level k + 1.
LEVEL_EDGES = (0.06, 0.16, 0.30, 0.58, 0.86)
# Present in the sense of BP4D from level B on: a trace cannot be seen in a crop of 224 pixels.
OCCURRENCE_LEVEL = 2
# Of the jaw's full way, AU26 (jaw drop) has reached its maximum at JAW_DROP_FULL, where AU27 (mouth stretch) begins.
JAW_DROP_FULL = 0.55
# Targets whose weight stays below 1: beyond it, lids and cheeks would cut into what lies behind. Of others it is 1.6.
FULL_AT_ONE = ("fu/eyeBlink", "fu/mouthSmile", "fu/jawOpen", "fu/mouthRoll", "expr/~/mouth-open")


def split_side(action: str) -> tuple[str, dict[str, str]]:
    """An action's base name, and what stands for {Side}, {side} and {s} in its recipe."""
    base, _, side = action.rpartition("_")
    if base in SIDED:
        return base, {"Side": side.capitalize(), "side": side, "s": side[0]}
    return action, {}


def targets(activations: dict[str, float], style: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mesh targets of an expression.

    Args:
        activations (`dict`): action to activation, 0 to 1.
        style (`dict`): a person's own recipe for each action (see [`personal_style`]).

    Returns:
        `dict`: target to weight; `expr/~/` stands for the mix of ethnic variants.
    """
    weights: dict[str, float] = {}
    for action, activation in activations.items():
        for target, weight in style[action].items():
            weights[target] = weights.get(target, 0.0) + activation * weight
    seal = activations.get("lips_seal", 0.0)
    if seal:  # which is sculpted for one of the two artists' jaws
        weights["fu/jawOpen"] = weights.get("fu/jawOpen", 0.0) + weights.pop("expr/~/mouth-open", 0.0)
        weights["fu/mouthClose"] = seal * weights["fu/jawOpen"]
    for target, weight in weights.items():
        limit = 1.0 if target.startswith(FULL_AT_ONE) else 1.6
        weights[target] = float(np.clip(weight, -0.5, limit))
    return weights


def personal_style(
    rng, spread: float = 1.0, company: dict | None = None, recipes: dict[str, dict[str, float]] = RECIPES
) -> dict[str, dict[str, float]]:
    """How one person performs each action: an own amplitude, an own share of each target and a trace of neighbours.

    Without this, one fixed displacement would stand for each label, and a model would learn just that displacement.
    `spread` says how much persons differ, as a multiple of the usual; `company` names, for some actions, further
    targets and the largest weight that a person may give them; `recipes` is what each action is made of.
    """
    style = {}
    for base in (*SIDED, *BILATERAL):
        gain = float(np.clip(np.exp(rng.normal(0, 0.15 * spread)), 0.7**spread, 1.3**spread))
        recipe = {
            target: weight * gain * float(rng.uniform(1 - 0.2 * spread, 1 + 0.2 * spread))
            for target, weight in recipes[base].items()
        }
        neighbours = NEIGHBOURS.get(PART_OF_ACTION.get(base, ""), ())
        for target in rng.permutation(len(neighbours))[:2]:
            recipe.setdefault(neighbours[target], float(rng.normal(0, 0.07 * spread)))
        for target, most in (company or {}).get(base, {}).items():
            recipe[target] = recipe.get(target, 0.0) + float(rng.uniform(0, most))
        if base == "eye_close":  # lids that do not meet would be no closed eye
            recipe = dict(RECIPES[base])
        for side in ("left", "right"):
            action = f"{base}_{side}" if base in SIDED else base
            style[action] = {}
            for target, weight in recipe.items():
                fields = [side] if base in SIDED or "{" not in target else ["left", "right"]
                for name in fields:
                    style[action][target.format(Side=name.capitalize(), side=name, s=name[0])] = weight
    return style


def furrows(activations: dict[str, float]) -> dict[str, float]:
    """Strength of each furrow, 0 to about 1.3, by name of [`skin.wrinkle_bank`]."""
    strengths: dict[str, float] = {}
    for action, activation in activations.items():
        base, fields = split_side(action)
        for pattern, weight in WRINKLES.get(base, {}).items():
            name = pattern.format(**fields)
            strengths[name] = max(strengths.get(name, 0.0), activation * weight)
    return strengths


def facs_intensities(activations: dict[str, float]) -> dict[str, float]:
    """Intensity of every AU of [`FACS_CODES`], 0 to 1. Of two sides the stronger one counts, as in FACS scoring."""

    def one(action):
        return activations.get(action, 0.0)

    def both(action):
        return max(one(action + "_left"), one(action + "_right"))

    jaw = one("jaw_drop")
    drop = min(jaw / JAW_DROP_FULL, 1.0)
    # Whatever draws the lips apart adds to the gap; lips held together over a dropped jaw, or pressed, leave none.
    closed = (
        (1 - one("lips_part"))
        * (1 - drop)
        * (1 - 0.5 * both("upper_lip_raise"))
        * (1 - 0.5 * both("lower_lip_depress"))
    )
    closed *= (1 - 0.5 * one("funnel")) * (1 - 0.2 * both("nose_wrinkle"))
    part = (1 - closed) * (1 - one("lips_seal")) * (1 - one("lip_press"))
    return {
        "AU1": both("inner_brow_raise"),
        "AU2": both("outer_brow_raise"),
        "AU4": both("brow_lower"),
        "AU5": both("upper_lid_raise"),
        "AU6": both("cheek_raise"),
        "AU7": both("lid_tighten"),
        "AU9": both("nose_wrinkle"),
        "AU10": both("upper_lip_raise"),
        "AU12": both("corner_pull"),
        "AU14": both("dimple"),
        "AU15": both("corner_depress"),
        "AU16": both("lower_lip_depress"),
        "AU17": one("chin_raise"),
        "AU18": one("pucker"),
        "AU20": both("lip_stretch"),
        "AU22": one("funnel"),
        "AU23": one("lip_tighten"),
        "AU24": one("lip_press"),
        "AU25": part,
        "AU26": drop,
        "AU27": max(jaw - JAW_DROP_FULL, 0.0) / (1 - JAW_DROP_FULL),
        "AU28": max(one("upper_lip_suck"), one("lower_lip_suck")),
        "AU43": min(one("eye_close_left"), one("eye_close_right")),
    }


def feafa_intensities(activations: dict[str, float]) -> dict[str, float]:
    """The 24 units of FEAFA, 0 to 1; left and right are the subject's. A raised brow is the mean of its two ends."""

    def one(action):
        return activations.get(action, 0.0)

    def both(action):
        return max(one(action + "_left"), one(action + "_right"))

    values = []
    for action in ("eye_close", "upper_lid_raise", "brow_lower"):
        values += [one(action + "_left"), one(action + "_right")]
    values += [(one("inner_brow_raise" + side) + one("outer_brow_raise" + side)) / 2 for side in ("_left", "_right")]
    values += [one("jaw_drop"), one("jaw_left"), one("jaw_right")]
    for action in ("corner_pull", "lip_stretch"):
        values += [one(action + "_left"), one(action + "_right")]
    values += [one("upper_lip_suck"), one("lower_lip_suck"), one("jaw_thrust"), both("upper_lip_raise")]
    values += [both("lower_lip_depress"), one("chin_raise"), one("pucker"), one("cheek_puff"), both("nose_wrinkle")]
    return dict(zip(FEAFA_CODES, values, strict=True))


# Which actions show a unit. Two sides are meant where a side is not named.
SHOWN_BY: dict[str, tuple[str, ...]] = {
    "AU1": ("inner_brow_raise",), "AU2": ("outer_brow_raise",), "AU4": ("brow_lower",), "AU5": ("upper_lid_raise",),
    "AU6": ("cheek_raise",), "AU7": ("lid_tighten",), "AU9": ("nose_wrinkle",), "AU10": ("upper_lip_raise",),
    "AU12": ("corner_pull",), "AU14": ("dimple",), "AU15": ("corner_depress",), "AU16": ("lower_lip_depress",),
    "AU17": ("chin_raise",), "AU18": ("pucker",), "AU20": ("lip_stretch",), "AU22": ("funnel",),
    "AU23": ("lip_tighten",), "AU24": ("lip_press",), "AU25": ("lips_part",), "AU26": ("jaw_drop",),
    "AU27": ("jaw_drop",), "AU28": ("upper_lip_suck", "lower_lip_suck"), "AU43": ("eye_close",),
    "FEAFA1": ("eye_close_left",), "FEAFA2": ("eye_close_right",), "FEAFA3": ("upper_lid_raise_left",),
    "FEAFA4": ("upper_lid_raise_right",), "FEAFA5": ("brow_lower_left",), "FEAFA6": ("brow_lower_right",),
    "FEAFA7": ("inner_brow_raise_left", "outer_brow_raise_left"),
    "FEAFA8": ("inner_brow_raise_right", "outer_brow_raise_right"), "FEAFA9": ("jaw_drop",),
    "FEAFA10": ("jaw_left",), "FEAFA11": ("jaw_right",), "FEAFA12": ("corner_pull_left",),
    "FEAFA13": ("corner_pull_right",), "FEAFA14": ("lip_stretch_left",), "FEAFA15": ("lip_stretch_right",),
    "FEAFA16": ("upper_lip_suck",), "FEAFA17": ("lower_lip_suck",), "FEAFA18": ("jaw_thrust",),
    "FEAFA19": ("upper_lip_raise",), "FEAFA20": ("lower_lip_depress",), "FEAFA21": ("chin_raise",),
    "FEAFA22": ("pucker",), "FEAFA23": ("cheek_puff",), "FEAFA24": ("nose_wrinkle",),
}  # fmt: skip


def expression_of_unit(code: str, intensity: float) -> dict[str, float]:
    """Activations that show one unit of [`FACS_CODES`] or [`FEAFA_CODES`] at an intensity of 0 to 1.

    >>> expression_of_unit("AU12", 0.5)
    {'corner_pull_left': 0.5, 'corner_pull_right': 0.5}
    """
    if code == "AU26":
        intensity = intensity * JAW_DROP_FULL
    elif code == "AU27":
        intensity = intensity and JAW_DROP_FULL + intensity * (1 - JAW_DROP_FULL)
    activations = {}
    for action in SHOWN_BY[code]:
        sides = [f"{action}_left", f"{action}_right"] if action in SIDED else [action]
        activations |= dict.fromkeys(sides, intensity)
    return activations


def level(intensity: float) -> int:
    """DISFA level 0 to 5 of an intensity 0 to 1.

    >>> [level(x) for x in (0.0, 0.06, 0.2, 0.5, 0.6, 1.0)]
    [0, 1, 2, 3, 4, 5]
    """
    return sum(intensity >= edge for edge in LEVEL_EDGES)


def occurrence(intensity: float) -> int:
    """Presence in the sense of BP4D, 0 or 1, of an intensity 0 to 1."""
    return int(level(intensity) >= OCCURRENCE_LEVEL)
