"""Published results to stand beside ours: Tables II to IV of the AU-LLaVA paper (arXiv 2409.08444), errors marked.

F1 is given in percent there and as a fraction here. A row's `printed` average is kept even where it is wrong; the mean
of its own columns stands beside it.
"""

from dataclasses import dataclass

from au_llava.action_units import PRESETS


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Args:
        method (`str`): As the paper names it.
        scores (`dict[str, float]`): By Action Unit.
        printed (`float`): The average as printed.
        note (`str`): What is known to be wrong with it; empty if nothing.
    """

    method: str
    scores: dict[str, float]
    printed: float
    note: str = ""

    @property
    def mean(self) -> float:
        """The mean of the row's own columns."""
        return sum(self.scores.values()) / len(self.scores)


def _table(units, rows: dict, notes: dict[str, str], scale: float = 1.0) -> tuple[PublishedRow, ...]:
    return tuple(
        PublishedRow(
            method,
            {unit: round(value / scale, 4) for unit, value in zip(units, values, strict=True)},
            round(printed / scale, 4),
            notes.get(method, ""),
        )
        for method, (printed, values) in rows.items()
    )


_AVERAGE = "the printed average does not follow from the columns"
_BP4D = _table(
    PRESETS["bp4d"],
    {
        "LSVM": (35.3, (23.2, 22.8, 23.1, 27.2, 47.1, 77.2, 63.7, 64.3, 18.4, 33.0, 19.4, 20.7)),
        "DRML": (48.3, (36.4, 41.8, 43.0, 55.0, 67.0, 66.3, 65.8, 54.1, 33.2, 48.0, 31.7, 30.0)),
        "DSIN": (58.9, (51.7, 40.4, 56.0, 76.1, 73.5, 79.9, 85.4, 62.7, 37.3, 62.9, 38.8, 41.6)),
        "EAC": (55.9, (39.0, 35.2, 48.6, 76.1, 72.9, 81.9, 86.2, 58.8, 37.5, 59.1, 35.9, 35.8)),
        "SRERL": (62.1, (46.9, 45.3, 55.6, 77.1, 78.4, 83.5, 87.6, 53.9, 53.2, 63.9, 47.1, 53.3)),
        "JAA": (62.4, (53.8, 47.8, 58.2, 78.5, 75.8, 82.7, 88.2, 63.7, 43.3, 61.8, 45.6, 49.9)),
        "AU-LLaVA (paper)": (60.3, (58.2, 45.9, 61.9, 78.6, 75.6, 87.8, 90.5, 59.0, 32.4, 62.5, 30.5, 40.3)),
    },
    {
        "LSVM": _AVERAGE,
        "DRML": _AVERAGE,
        "EAC": _AVERAGE,
        "SRERL": "other papers print 0.639 for AU14 and 0.522 for AU15, which gives 0.629",
        "AU-LLaVA (paper)": "the text claims the best AU2, but JAA's 0.478 is higher",
    },
    scale=100,
)
_DISFA = _table(
    PRESETS["disfa8"],
    {
        "LSVM": (21.8, (10.8, 10.0, 21.8, 15.7, 11.5, 70.4, 12.0, 22.1)),
        "DRML": (26.7, (17.3, 17.7, 37.4, 29.0, 10.7, 37.7, 38.5, 20.1)),
        "DSIN": (53.6, (42.4, 39.0, 68.4, 28.6, 46.8, 70.8, 90.4, 42.2)),
        "EAC": (48.5, (41.5, 26.4, 66.4, 50.7, 80.5, 89.3, 88.9, 15.6)),
        "SRERL": (55.9, (45.7, 47.8, 59.6, 47.1, 45.6, 73.5, 84.3, 43.6)),
        "JAA": (56.0, (43.7, 46.2, 56.0, 41.4, 44.7, 69.6, 88.3, 58.4)),
        "AU-LLaVA (paper)": (52.5, (52.0, 59.2, 44.4, 30.8, 22.3, 66.1, 90.8, 54.6)),
    },
    {
        "DRML": _AVERAGE,
        "EAC": f"{_AVERAGE}; the error is copied through the literature",
        "JAA": "the ECCV 2018 model, while the BP4D row is the IJCV 2021 model, whose result on DISFA is 0.635",
        "AU-LLaVA (paper)": "present means a level above 2 here, and of at least 2 in the rows above",
    },
    scale=100,
)
_FEAFA = _table(
    PRESETS["feafa"][::2],
    {
        "DRML": (0.549, (0.156, 0.052, 0.102, 0.063, 0.045, 0.022, 0.066, 0.054, 0.053, 0.056, 0.045, 0.04)),
        "JAA": (0.056, (0.128, 0.042, 0.085, 0.059, 0.045, 0.022, 0.067, 0.046, 0.045, 0.048, 0.045, 0.033)),
        "RA-UWML": (0.048, (0.098, 0.041, 0.058, 0.051, 0.043, 0.022, 0.062, 0.05, 0.038, 0.045, 0.043, 0.029)),
        "AU-LLaVA (paper)": (
            0.011,
            (0.024, 0.006, 0.012, 0.011, 0.01, 0.007, 0.014, 0.012, 0.012, 0.01, 0.008, 0.005),
        ),
    },
    {
        "DRML": f"{_AVERAGE}: a misprint, ten times too large",
        "AU-LLaVA (paper)": "frames of one video are in training and test set; answering 0 always gives about 0.061",
    },
)

# By data set and task: the score that the table gives, and its rows.
PUBLISHED: dict[tuple[str, str], tuple[str, tuple[PublishedRow, ...]]] = {
    ("bp4d", "detection"): ("f1", _BP4D),
    ("disfa", "detection"): ("f1", _DISFA),
    ("feafa", "intensity"): ("mae", _FEAFA),
}
