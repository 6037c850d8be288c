"""A policy's card: in words, for whoever has to decide whether to let it act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pilotage.control.bundle import Judged
from pilotage.control.guard import Guard
from pilotage.control.intake import Measured
from pilotage.control.policy import Policy


def card(
    name: str,
    policy: Policy,
    guard: Guard,
    rows: Sequence[Measured],
    judged: Sequence[Judged],
    provenance: Mapping[str, str | int | float | None],
    explanation: str,
) -> str:
    """Markdown: what it is, where it comes from, where it is good and where it is not, its limits, how it decides."""
    about = (type(policy).__doc__ or "").strip().partition("\n\n")[0]
    sections = {
        "What it is": " ".join(about.split()),
        "Where it comes from": _origin(provenance),
        "Where it is good, and where it is not": _record(judged),
        "What it does with bad measurements": _intake(rows),
        "Limits on what it may order": _limits(guard),
        "Why it decides as it does": explanation.strip()
        or "No explanation was made for this bundle; `pilotage explain` makes one.",
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    return f"# Policy `{name}`\n\n{text}\n"


def _origin(provenance: Mapping[str, str | int | float | None]) -> str:
    known = [f"- {key.replace('_', ' ')}: {value}" for key, value in provenance.items() if value is not None]
    return "\n".join(known) or "Nothing was noted."


def _record(judged: Sequence[Judged]) -> str:
    if not judged:
        return "It was not judged when this bundle was made."
    lines = []
    for one in sorted(judged, key=lambda j: -j.saving):
        sure = one.saving_low is not None and one.saving_high is not None
        clear = sure and not (one.saving_low or 0) <= 0 <= (one.saving_high or 0)
        verdict = "undecided" if not clear else "cheaper" if one.saving > 0 else "dearer"
        by = f"{100 * abs(one.saving):.1f} % {'less' if one.saving >= 0 else 'more'} than `{one.baseline}`"
        span = (
            f" (95 % interval of the saving: {100 * (one.saving_low or 0):.1f} to {100 * (one.saving_high or 0):.1f} %)"
            if sure
            else " (one run: no interval)"
        )
        late = "" if one.latency_p95_ms is None else f", 95th percentile {one.latency_p95_ms:.0f} ms"
        lines.append(
            f"- `{one.env}`: **{verdict}**. {one.total_usd:,.2f} dollars per run of {one.hours:g} h, {by}{span}; "
            f"{100 * one.attainment:.2f} % in time{late}; {one.runs} runs."
        )
    return "\n".join([*lines, "", "Elsewhere nothing is known: run it in shadow first."])


def _intake(rows: Sequence[Measured]) -> str:
    def named(which: Sequence[str]) -> str:
        return ", ".join(which) or "none"

    by = {how: [row.name for row in rows if row.missing == how] for how in ("accept", "last", "hold")}
    beyond = {how: [row.name for row in rows if row.beyond == how] for how in ("accept", "clip", "hold")}
    lines = [
        "A value that is missing, infinite or impossible, by feature:",
        f"- is taken as missing: {named(by['accept'])};",
        f"- is replaced by the last one that is known: {named(by['last'])};",
        f"- stops the decision (nothing changes): {named(by['hold'])}.",
        "",
        "A value beyond the range that was seen in the runs above, by feature:",
        f"- is used as it is, and said so: {named(beyond['accept'])};",
        f"- is clipped to the range: {named(beyond['clip'])};",
        f"- stops the decision: {named(beyond['hold'])}.",
        "",
        "Each such case is counted, and stands in the reason of the decision.",
    ]
    return "\n".join(lines)


def _limits(guard: Guard) -> str:
    def limit(value: int | None, otherwise: str) -> str:
        return otherwise if value is None else str(value)

    return "\n".join(
        [
            f"- replicas: at least {limit(guard.min_replicas, 'what the service says')}, at most "
            f"{limit(guard.max_replicas, 'what the service says')};",
            f"- per tick: at most {limit(guard.max_order, 'any number of')} ordered, "
            f"{limit(guard.max_release, 'any number of')} released;",
            f"- no decision while one of these is missing or older than {guard.stale_after_s:g} s: "
            f"{', '.join(guard.required) or 'none is required'}.",
        ]
    )
