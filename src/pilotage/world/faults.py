"""What interrupts nodes: the spot market, and zones that go down."""

from __future__ import annotations

import csv
import difflib
import gzip
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np

from pilotage.world import traces
from pilotage.world.spec import Name, NonNegative, Positive, Spec, SpecError, closest

Window = tuple[float, float]  # [start_s, end_s); the method that gives one says on which clock
# what becomes of replicas whose node was told to go; see `scenario.Placement`
AtNotice = Literal["drain", "replace-first"]

MONTH_H: Final = 730.5
WEEK_S: Final = 7 * 86400.0

# The middle of each band of the advisor: the share of the instances that were taken back within a month.
# The last band is open; that 25 % stands for it is an assumption.
BANDS: Final = {"<5%": 0.025, "5-10%": 0.075, "10-15%": 0.125, "15-20%": 0.175, ">20%": 0.25}


class Market(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """How a spot market takes nodes back. Markets that read a table raise SpecError where it does not serve."""

    def interruptions_per_hour(self, data: Path | None) -> float:
        """The rate at which a running node is interrupted, the same for all nodes and times."""
        return 0.0

    def saving(self, data: Path | None) -> float:
        """The share by which nodes are cheaper than the pool's price; negative where they are dearer."""
        return 0.0

    def closed_s(
        self, zone: str, start_s: float, end_s: float, data: Path | None, notice_s: float = 0.0
    ) -> list[Window]:
        """The times in [start_s, end_s) at which a zone gives no nodes and takes back all, in order, disjoint.

        Those that begin up to `notice_s` later are given as well, as far as they are known: their notice comes before.
        All times are seconds on the traffic's clock, on which a run starts at the scenario's `start_h`.
        """
        return []

    def check_zones(self, zones: Sequence[str]) -> None:
        """Raises SpecError where the market does not say what happens in one of a pool's zones."""


class Hazard(Market, frozen=True, kw_only=True, tag="hazard"):
    """Interruptions at a constant rate per node; the pool's price is the spot price."""

    per_hour: NonNegative

    def interruptions_per_hour(self, data: Path | None) -> float:
        return self.per_hour


class Advisor(Market, frozen=True, kw_only=True, tag="advisor"):
    """Saving and interruption band of an instance type from AWS's Spot Instance Advisor; the pool's price is
    the on-demand price.

    The table at `path` below the data directory has the columns `region`, `instance_type`,
    `savings_pct_vs_ondemand` and `monthly_interruption_freq` (a key of BANDS). A band is "the rate at which
    Spot has reclaimed capacity during the trailing month"; its middle p is taken as the probability that
    an instance which runs for the whole month is taken back in it, so that the hazard per hour is
    -ln(1 - p) / 730.5. Most instances run for less than a month, so this is a low estimate: what was recorded of
    scarce GPUs (see `availability`) lies far above it.
    """

    region: str
    instance_type: str
    path: str = "spot/aws_spot_advisor_linux_2025-07.csv.gz"

    def interruptions_per_hour(self, data: Path | None) -> float:
        return -math.log1p(-self._entry(data)[1]) / MONTH_H

    def saving(self, data: Path | None) -> float:
        return self._entry(data)[0]

    def _entry(self, data: Path | None) -> tuple[float, float]:
        """Saving, and probability of an interruption within a month."""
        file = traces.find(self.path, data)
        regions = _advice(*_version(file))
        if self.region not in regions:
            raise SpecError(f"{file}: no region {self.region!r}; {closest(self.region, regions)}")
        types = regions[self.region]
        if self.instance_type not in types:
            near = difflib.get_close_matches(self.instance_type, types, n=1)
            raise SpecError(
                f"{file}: no instance type {self.instance_type!r} in region {self.region!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"valid: the {len(types)} types of that region")
            )
        return types[self.instance_type]


class Availability(Market, frozen=True, kw_only=True, tag="availability"):
    """A recorded series of when a spot node could be had in a zone; the pool's price is the spot price.

    While a zone's series says 0, the zone gives no nodes and all its nodes are taken back. The table at `path`
    below the data directory holds runs of equal values: its columns are those of SkyPilot's traces in
    run-length form, `campaign`, `zone_gpu` (the name of a series), `start_s`, `duration_s` and `available` (0 or
    1). `series` says for each of the pool's zones which series of the `campaign` stands for it. Time 0 of the
    campaign is time 0 of the traffic's clock. Between two runs the state of the earlier one holds, as
    a probe that failed tells nothing new; before the first and after the last run nothing is known, and a
    scenario that reaches there is refused.
    """

    path: str
    campaign: str
    series: dict[Name, str]

    def closed_s(
        self, zone: str, start_s: float, end_s: float, data: Path | None, notice_s: float = 0.0
    ) -> list[Window]:
        self.check_zones((zone,))
        file, name = traces.find(self.path, data), self.series[zone]
        campaigns = _runs(*_version(file))
        if self.campaign not in campaigns:
            raise SpecError(f"{file}: no campaign {self.campaign!r}; {closest(self.campaign, campaigns)}")
        all_series = campaigns[self.campaign]
        if name not in all_series:
            raise SpecError(
                f"{file}: no series {name!r} in campaign {self.campaign!r}; {closest(name, all_series)}"
            )
        begin_s, finish_s, closed = all_series[name]
        if not begin_s <= start_s <= end_s <= finish_s:
            raise SpecError(
                f"{file}: series {name!r} of campaign {self.campaign!r} covers {begin_s:.6g} s to {finish_s:.6g} s "
                f"({finish_s / 3600:.4g} h), not the run from {start_s:.6g} s to {end_s:.6g} s "
                f"({end_s / 3600:.4g} h); valid: start and start plus horizon within what it covers"
            )
        end_s += notice_s
        return [(max(a, start_s), min(b, end_s)) for a, b in closed if a < end_s and b > start_s]

    def check_zones(self, zones: Sequence[str]) -> None:
        for zone in zones:
            if zone not in self.series:
                raise SpecError(
                    f"availability: no series for zone {zone!r}; give one in `series`, which has: "
                    f"{', '.join(sorted(self.series)) or 'nothing'}"
                )


class Spot(Spec, frozen=True, kw_only=True):
    """A spot market: nodes are taken back `notice_s` after they were told.

    From the notice on a node takes no new replicas, and those it has are ordered anew elsewhere. They drain, at once or
    when they have been replaced (`scenario.Placement.at_notice`), but so that `grace_s` are left to finish in, as far
    as the notice is that long (30 s: Kubernetes' terminationGracePeriodSeconds). What still executes when the node goes
    is retried or lost, as the service says.
    """

    market: Hazard | Advisor | Availability
    notice_s: NonNegative = 120.0
    grace_s: NonNegative = 30.0


class Outage(Spec, frozen=True, kw_only=True):
    """A zone that is down from `start_h` after the start of a run, for `duration_h`: its nodes die without
    notice, and it gives no new ones."""

    zone: Name
    start_h: NonNegative
    duration_h: Positive


class RandomOutages(Spec, frozen=True, kw_only=True):
    """Outages of every zone at random: a Poisson process of `per_zone_per_week`, of exponential duration.

    All zones are up when a run starts.
    """

    per_zone_per_week: Positive
    mean_duration_h: Positive

    def windows(
        self, rng: np.random.Generator, zones: Sequence[str], horizon_s: float
    ) -> dict[str, list[Window]]:
        """For each zone the outages that begin in [0, horizon_s), in order, disjoint, in seconds since the start
        of the run. The last may end after the horizon. A longer horizon only adds outages."""
        # drawn for all zones together, in the order of time: else a longer horizon would change what one zone
        # leaves of the generator to the next
        windows: dict[str, list[Window]] = {zone: [] for zone in zones}
        mean_gap_s = WEEK_S / (self.per_zone_per_week * len(zones))
        start_s = rng.exponential(mean_gap_s)
        while start_s < horizon_s:
            down = windows[zones[int(rng.integers(len(zones)))]]
            end_s = start_s + rng.exponential(self.mean_duration_h * 3600)
            if down and start_s <= down[-1][1]:
                down[-1] = (down[-1][0], max(down[-1][1], end_s))
            else:
                down.append((start_s, end_s))
            start_s += rng.exponential(mean_gap_s)
        return windows


# --- tables ----------------------------------------------------------------------------------------------
def _version(file: Path) -> tuple[Path, int, int]:
    """What a cached table depends on."""
    stat = file.stat()
    return file, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def _advice(file: Path, mtime_ns: int, size: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Region -> instance type -> (saving, probability of an interruption within a month)."""
    columns = ("region", "instance_type", "savings_pct_vs_ondemand", "monthly_interruption_freq")
    regions: dict[str, dict[str, tuple[float, float]]] = {}
    for place, (region, kind, saving_pct, band) in _rows(file, columns):
        if band not in BANDS:
            raise SpecError(f"{place}: monthly_interruption_freq {band!r}; valid: {', '.join(BANDS)}")
        saving = _number(place, "savings_pct_vs_ondemand", saving_pct) / 100
        if saving > 1:
            raise SpecError(f"{place}: savings_pct_vs_ondemand {saving_pct!r}; valid: at most 100")
        if kind in regions.setdefault(region, {}):
            raise SpecError(f"{place}: {kind!r} occurs twice in region {region!r}; give one row for each")
        regions[region][kind] = (saving, BANDS[band])
    return regions


@lru_cache(maxsize=8)
def _runs(
    file: Path, mtime_ns: int, size: int
) -> dict[str, dict[str, tuple[float, float, tuple[Window, ...]]]]:
    """Campaign -> series -> (first known time, end of what is known, the times at which nothing was available)."""
    columns = ("campaign", "zone_gpu", "start_s", "duration_s", "available")
    series: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    for place, (campaign, name, start, duration, available) in _rows(file, columns):
        start_s, duration_s = _number(place, "start_s", start), _number(place, "duration_s", duration)
        if start_s < 0 or duration_s <= 0:
            raise SpecError(
                f"{place}: start_s {start_s:g}, duration_s {duration_s:g}; valid: a start of at least 0 and a "
                "positive duration"
            )
        if available not in {"0", "1"}:
            raise SpecError(f"{place}: available {available!r}; valid: 0 (no node to be had) or 1")
        runs = series.setdefault((campaign, name), [])
        if runs and start_s < runs[-1][1]:
            raise SpecError(
                f"{place}: series {name!r} has a run from {start_s:g} s, before the end of the one above it at "
                f"{runs[-1][1]:g} s; give the runs of a series in order, without overlap"
            )
        runs.append((start_s, start_s + duration_s, available == "0"))
    campaigns: dict[str, dict[str, tuple[float, float, tuple[Window, ...]]]] = {}
    for (campaign, name), runs in series.items():
        closed: list[Window] = []
        for k, (start_s, end_s, shut) in enumerate(runs):
            until_s = runs[k + 1][0] if k + 1 < len(runs) else end_s  # over a gap the state holds
            if shut and closed and closed[-1][1] == start_s:
                closed[-1] = (closed[-1][0], until_s)
            elif shut:
                closed.append((start_s, until_s))
        campaigns.setdefault(campaign, {})[name] = (runs[0][0], runs[-1][1], tuple(closed))
    return campaigns


def _rows(file: Path, columns: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """File and line, and the cells of the columns, for every row of a CSV table."""
    if not file.name.endswith(traces.TABLE):
        raise SpecError(f"{file}: not a table; valid: {', '.join(traces.TABLE)}")
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8", newline="")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8", newline="")
        ) as text:
            lines = csv.reader(text)
            rows = [(f"{file}:{lines.line_num}", row) for row in lines if row]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{file}: cannot be read ({error}); give an intact file") from None
    if len(rows) < 2:
        raise SpecError(f"{file}: empty table; give a header and at least one row")
    header = [name.strip() for name in rows[0][1]]
    if missing := [name for name in columns if name not in header]:
        raise SpecError(f"{file}: no column {missing[0]!r}; it has: {', '.join(header)}")
    at = [header.index(name) for name in columns]
    for place, row in rows[1:]:
        if len(row) != len(header):
            raise SpecError(f"{place}: {len(row)} cells; valid: {len(header)}, one for each column")
    return [(place, [row[k].strip() for k in at]) for place, row in rows[1:]]


def _number(place: str, column: str, cell: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(f"{place}: {column} {cell!r} is not a finite number; give numbers only")
    return number
