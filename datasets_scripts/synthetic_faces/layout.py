"""What the data set looks like: the standard split and the columns of its files. Nothing here can draw."""

from datasets import Features, Image, List, Value

from .expression import ACTIONS, FACS_CODES, FEAFA_CODES


# Raise it whenever pixels, geometry or labels of an image change: shards of two versions are never mixed in one
# folder.
VERSION = "1.0.0"
LICENSE = "CC0-1.0"
IMAGES_PER_IDENTITY = 5
# Identities of each split. Image i of a split shows identity i modulo that number, so any first part of a split is a
# fair sample of all its people. A person's seed names the split, hence no person is in two splits.
IDENTITIES = {"train": 8000, "validation": 400, "test": 800}
SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}

FEATURES = Features({
    "image": Image(),
    "facs": List(Value("float32"), length=len(FACS_CODES)),  # intensity 0 to 1, in the order of FACS_CODES
    "levels": List(Value("int8"), length=len(FACS_CODES)),  # 0 to 5
    "occurrences": List(Value("int8"), length=len(FACS_CODES)),  # 0 or 1
    "feafa": List(Value("float32"), length=len(FEAFA_CODES)),  # intensity 0 to 1, FEAFA1 to FEAFA24
    "activations": List(Value("float32"), length=len(ACTIONS)),  # in the order of ACTIONS
    "landmarks": List(Value("float32"), length=136),  # 68 times x, y in crop pixels
    "points": List(Value("float32"), length=10),  # the five alignment points, x, y in crop pixels
    "pose": List(Value("float32"), length=3),  # yaw, pitch, roll in degrees
    "flow": Value("binary"),  # (16, 16, 2) float16: shift from rest in crop pixels; read it with np.frombuffer
    "identity": Value("string"),
    "skin": Value("string"),
    "gender": Value("string"),
    "age": Value("string"),
    "index": Value("int32"),
})  # fmt: skip


def split_size(split: str) -> int:
    """Number of images of `train`, `validation` or `test`."""
    return IDENTITIES[split] * IMAGES_PER_IDENTITY
