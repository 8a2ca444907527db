"""Means over seeds, and paired differences with their intervals."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t

from .records import Record

CONFIDENCE = 0.95
BySeed = Mapping[tuple[str, int], float]  # by base and seed


class Summary(NamedTuple):
    """The mean and standard deviation of accuracies over seeds, in percent. ``deviation`` is None for one seed."""

    mean: float
    deviation: float | None
    seeds: int


class Difference(NamedTuple):
    """The difference of two methods, paired by seed: its mean in points, and the ends of its interval by Student's t,
    None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """The conclusion from the interval, in words."""
        if self.low is None:
            return "one seed"
        return "above" if self.low > 0 else "below" if self.high < 0 else "not apart"


def by_seed(records: Sequence[Record], measure: str = "report") -> dict[tuple[str, int], float]:
    """The accuracy of each run by base and seed.

    Raises:
        ValueError: two runs have the same base and seed.
    """
    found: dict[tuple[str, int], float] = {}
    for record in records:
        place = record.base, record.run.seed
        if place in found:
            raise ValueError(f"two results of seed {record.run.seed}: {record.run.name}")
        if (value := record.found["accuracy"][measure]) is not None:
            found[place] = value
    return found


def summary(values: BySeed) -> Summary | None:
    """The mean and deviation, or None without accuracies."""
    found = list(values.values())
    if not found:
        return None
    return Summary(mean(found), stdev(found) if len(found) > 1 else None, len(found))


def difference(one: BySeed, other: BySeed) -> Difference | None:
    """The difference over the seeds that both have on the same base, or None without such seeds."""
    paired = [one[place] - other[place] for place in one if place in other]
    if not paired:
        return None
    middle = mean(paired)
    if len(paired) == 1:
        return Difference(middle, None, None, 1)
    reach = float(t.ppf(0.5 + CONFIDENCE / 2, len(paired) - 1)) * stdev(paired) / len(paired) ** 0.5
    return Difference(middle, middle - reach, middle + reach, len(paired))
