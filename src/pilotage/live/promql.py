"""From the feature table to few PromQL queries that ask for many services at once, whatever their names are.

A template measures one service: `sum(rate(requests_total{service='$service'}[$window]))`. Where `$service` stands only
inside aggregations, they are made to group by service, so that one expression answers for all; else the expression
is repeated for each. `$window` is the window of rates, `$scrape` four scrape intervals (the shortest window that always
has a rate), `$slo` (`$slo_ms`) the objective in seconds (milliseconds), which has to be the bound of a bucket.

Label values are quoted here and nowhere else, in one pass over each template: no name of a service can become PromQL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from pilotage.control.policy import FEATURES, INDEX
from pilotage.world.spec import Spec, SpecError, closest, decode, read_toml

PLACEHOLDERS: Final = ("service", "window", "scrape", "slo", "slo_ms")
SHIPPED: Final = Path(__file__).with_name("metrics.toml")
_QUOTED = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
_SELECTOR: Final = re.compile(rf"([a-zA-Z_:][\w:]*)\{{((?:[^{{}}\"']|{_QUOTED})*)\}}")
_AGGREGATION: Final = re.compile(r"\b(sum|min|max|avg|count)\s*(?:by\s*\(([^()]*)\)\s*)?\(")
_OF_SERVICE: Final = re.compile(r"(\w+)\s*=\s*(?:'\$service'|\"\$service\")")
_BUCKET: Final = re.compile(r"\ble\s*=\s*(?:'\$slo(?:_ms)?'|\"\$slo(?:_ms)?\")")
_PLACEHOLDER: Final = re.compile(r"\$(\w+)")
_LABEL: Final = re.compile(r"[a-zA-Z_]\w*")


class Measured(Spec, frozen=True, kw_only=True):
    """What a serving system calls what the feature table measures: templates of features (none: not measured)."""

    about: str = ""
    features: dict[str, str] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A service as metrics know it: the value of the label that names it, and its objective."""

    label: str
    slo_s: float


def templates(system: str, changed: Mapping[str, str]) -> dict[str, str]:
    """The template of every feature that is measured: of a shipped mapping or a TOML file, with changes.

    A feature whose template is empty is not measured. Raises SpecError for what is no template.
    """
    path = Path(system) if system.endswith(".toml") else SHIPPED
    raw = read_toml(path, "a file of PromQL templates")
    if path == SHIPPED:
        if system not in raw:
            raise SpecError(f"metrics {system!r} are not known; {closest(system, raw)}; or give a .toml file")
        raw = raw[system]
    found = {f.name: f.promql for f in FEATURES} if system == "pilotage" else {}
    found |= decode(raw, Measured, f"{path}").features | dict(changed)
    for name, text in found.items():
        if name not in INDEX:
            raise SpecError(f"PromQL for feature {name!r}, which does not exist; {closest(name, INDEX)}")
        _check(name, text)
    return {name: text for name, text in found.items() if text}


def _check(name: str, text: str) -> None:
    for placeholder in _PLACEHOLDER.findall(text):
        if placeholder not in PLACEHOLDERS:
            raise SpecError(
                f"PromQL of {name}: ${placeholder} is not a placeholder; {closest(placeholder, PLACEHOLDERS)}"
            )
    if text and not _OF_SERVICE.search(text):
        raise SpecError(
            f"PromQL of {name}: {text!r} does not select a service; valid: a matcher as service='$service'"
        )
    if len(re.findall(r"\$service\b", text)) != len(_OF_SERVICE.findall(text)):
        raise SpecError(f"PromQL of {name}: $service may only stand as a label's value: service='$service'")
    if len(re.findall(r"\$slo(?:_ms)?\b", text)) != len(_BUCKET.findall(text)):
        raise SpecError(f"PromQL of {name}: $slo may only stand as le='$slo' or le='$slo_ms'")


def quoted(text: str) -> str:
    """A PromQL string that is exactly this text."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    plain = "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f'"{plain}"'


def any_of(texts: Sequence[str]) -> str:
    """A PromQL string with the regular expression that matches just these texts, whole."""
    return quoted("|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text) for text in texts))


@dataclass(frozen=True, slots=True)
class Question:
    """The expression of a feature for all subjects: its result has the label `service`. `sources` are the series that
    it is computed from, as (metric, label that names the service)."""

    expression: str
    sources: tuple[tuple[str, str], ...]


def question(
    template: str, subjects: Sequence[Subject], matchers: Mapping[str, str], window_s: float, scrape_s: float
) -> Question:
    """One question for all subjects. `matchers` are further labels, and their values, that every series must have."""
    narrow = "".join(f",{label}={quoted(value)}" for label, value in matchers.items())
    text = _SELECTOR.sub(lambda m: f"{m[1]}{{{m[2]}{narrow}}}", template) if narrow else template
    text, grouped = _by_service(text)
    lengths = {"window": f"{max(1, round(window_s))}s", "scrape": f"{max(1, round(4 * scrape_s))}s"}

    def filled(mine: Sequence[Subject]) -> str:
        names = any_of([one.label for one in mine])

        # one pass: what is put in is not looked at again
        def put(m: re.Match[str]) -> str:
            if m["label"]:
                return f"{m['label']}=~{names}"
            if m["le"]:
                slo = mine[0].slo_s * (1000 if m["le"] == "slo_ms" else 1)
                return f"le=~{any_of(_bounds(slo))}"
            return lengths[m["length"]]

        return _FILL.sub(put, text)

    if not grouped:
        parts = [(f"label_replace({filled([one])},", one) for one in subjects]
        expression = " or ".join(
            f'{part} "service", {quoted(_replacement(one.label))}, "", "")' for part, one in parts
        )
    elif _BUCKET.search(text):
        by_slo: dict[float, list[Subject]] = {}
        for one in subjects:
            by_slo.setdefault(one.slo_s, []).append(one)
        expression = " or ".join(f"({filled(mine)})" for mine in by_slo.values())
    else:
        expression = filled(subjects)
    return Question(expression, tuple(dict.fromkeys(_sources(template))))


_FILL: Final = re.compile(
    r"(?P<label>\w+)\s*=\s*(?:'\$service'|\"\$service\")|\ble\s*=\s*['\"]\$(?P<le>slo|slo_ms)['\"]"
    r"|\$(?P<length>window|scrape)\b"
)


def age_of(source: tuple[str, str], subjects: Sequence[Subject], matchers: Mapping[str, str]) -> str:
    """The age of the newest sample of a metric, per service."""
    metric, label = source
    narrow = "".join(f",{name}={quoted(value)}" for name, value in matchers.items())
    series = f"timestamp({metric}{{{label}=~{any_of([one.label for one in subjects])}{narrow}}})"
    return f"time() - max by (service) ({_renamed(series, label)})"


def together(named: Mapping[str, str]) -> str:
    """One expression for many: each is answered with its name in the label `asked`, and the server's time as `now`."""
    parts = {"now": "vector(time())"} | dict(named)
    return " or ".join(
        f'label_replace({text}, "asked", {quoted(name)}, "", "")' for name, text in parts.items()
    )


# --- the parts of a template ---------------------------------------------------------------------------------
def _by_service(text: str) -> tuple[str, bool]:
    """The template with its aggregations grouped by service, and whether that is all that selects one."""
    out, at, grouped = "", 0, True
    while found := _AGGREGATION.search(text, at):
        end = _closing(text, found.end() - 1)
        inner = text[found.end() : end]
        label = _OF_SERVICE.search(inner)
        grouped = grouped and not _OF_SERVICE.search(text[at : found.start()])
        out += text[at : found.start()]
        if label:
            by = ", ".join(["service", *filter(None, [found[2] and found[2].strip()])])
            nested, _ = _by_service(inner)
            out += f"{found[1]} by ({by}) ({_renamed(inner, label[1]) if nested == inner else nested})"
        else:
            out += text[found.start() : end + 1]
        at = end + 1
    return out + text[at:], grouped and not _OF_SERVICE.search(text[at:])


def _renamed(series: str, label: str) -> str:
    """Series with the label that names the service copied to `service`."""
    return series if label == "service" else f'label_replace({series}, "service", "$1", "{label}", "(.*)")'


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for part in re.finditer(rf"{_QUOTED}|[()]", text[opening:]):
        depth += {"(": 1, ")": -1}.get(part[0], 0)
        if depth == 0:
            return opening + part.start()
    raise SpecError(f"PromQL {text!r}: a parenthesis is not closed")


def _sources(template: str) -> Iterator[tuple[str, str]]:
    for metric, inside in _SELECTOR.findall(template):
        label = _OF_SERVICE.search(inside)
        if label:  # every histogram has a count, which is one series instead of one per bucket
            yield re.sub("_bucket$", "_count", metric), label[1]


def _bounds(slo: float) -> list[str]:
    """How the bound of a histogram bucket may be written: as 1 or 1.0."""
    return list(dict.fromkeys([f"{slo:.12g}", repr(float(f"{slo:.12g}"))]))


def _replacement(text: str) -> str:
    """Text as a replacement in label_replace, where $ would refer to a group."""
    return text.replace("$", "$$")


def check_labels(matchers: Mapping[str, str]) -> None:
    """Refuses names that are no labels."""
    for name in matchers:
        if not _LABEL.fullmatch(name):
            raise SpecError(f"label {name!r}: not a label's name; valid: letters, digits and _, as namespace")
