"""Prices and shapes of cloud machines, from files in the formats of the price tables that karpenter and others publish.

AWS: `instance_type`, `vcpu`, `mem_mib`, `gpu_count`, `gpu_mem_mib` and one column of dollars per region
(`usd_per_h_us_east_1`). Azure: `sku`, `vcpu`, `mem_mb`, `gpu`, `usd_per_h_REGION`, or rows of `region, sku, usd_per_h`.
GCE: rows of `table, item, usd_per_h` (`instancePrices`, or `preemptiblePrices` for spot).
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

from pilotage.world.pools import Resources
from pilotage.world.spec import Name, Spec, SpecError, closest


class PriceOf(Spec, frozen=True, kw_only=True):
    """Where a pool's price is looked up: a file, a machine type, a region where the file has several, or GCE's spot."""

    path: str
    instance_type: Name | str
    region: str | None = None
    spot: bool = False

    def look_up(self, folder: Path) -> tuple[float, Resources | None]:
        """Dollars per hour, and what a node has where the file says it."""
        path = folder / self.path
        rows = _rows(path)
        columns = list(rows[0]) if rows else []
        key = next((name for name in ("instance_type", "sku", "item") if name in columns), None)
        if key is None:
            raise SpecError(f"{path}: no price table; valid: a column instance_type, sku or item")
        if key == "item":
            table = "preemptiblePrices" if self.spot else "instancePrices"
            rows = [row for row in rows if row["table"] == table]
        elif self.spot:
            raise SpecError(f"{path}: has no spot prices; give the price yourself (price_usd_per_hour)")
        if "region" in columns:
            regions = {row["region"] for row in rows}
            if self.region not in regions:
                raise SpecError(f"{path}: no region {self.region!r}; {closest(self.region or '', regions)}")
            rows = [row for row in rows if row["region"] == self.region]
        mine = [row for row in rows if row[key] == self.instance_type]
        if not mine:
            raise SpecError(
                f"{path}: no machine {self.instance_type!r}; {_near(self.instance_type, [r[key] for r in rows])}"
            )
        row = mine[0]
        column = "usd_per_h"
        if column not in row:
            priced = [name for name in row if name.startswith("usd_per_h_")]
            wanted = f"usd_per_h_{(self.region or priced[0].removeprefix('usd_per_h_')).replace('-', '_')}"
            if wanted not in priced:
                raise SpecError(f"{path}: no region {self.region!r}; {closest(wanted, priced)}")
            column = wanted
        if not row[column]:
            raise SpecError(
                f"{path}: {self.instance_type!r} has no price there; give price_usd_per_hour yourself"
            )
        return float(row[column]), _shape(row)


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: the {len(known)} of the table"


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read: {error}; give a price table") from None
    return list(csv.DictReader(io.StringIO(text)))


def _shape(row: dict[str, str]) -> Resources | None:
    cpu, memory = row.get("vcpu"), row.get("mem_mib") or row.get("mem_mb")
    if not cpu or not memory:
        return None
    return Resources(
        cpu=float(cpu),
        memory_gib=float(memory) / 1024,
        gpus=float(row.get("gpu_count") or row.get("gpu") or 0),
        gpu_memory_gib=float(row.get("gpu_mem_mib") or 0) / 1024,
    )
