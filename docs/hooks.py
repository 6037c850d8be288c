"""What the site shows beside the pages in `docs/` (a hook of MkDocs; see `mkdocs.yml`).

The README, the changelog, and the READMEs of `envs`, `experiments` and `results` are pages as they stand; any other
file of the repository that a page links to is copied. Links keep the form they have in the repository, and are turned
to where the site has the file. `{{ name }}` on a line of its own is filled in from the program.
"""

from __future__ import annotations

import json
import posixpath
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
BESIDE = (*MOVED, "envs/README.md", "experiments/README.md", "results/README.md")
HOME = {there: here for here, there in MOVED.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
WIDTH, HEIGHT = 900, 58  # of a drawing, and of one of its rows
FILLED = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)


def in_repository(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    return HOME.get(uri) or (f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri)


def placed(path: str) -> str:
    """Where the site has a file of the repository."""
    return MOVED.get(path) or path.removeprefix("docs/")


def linked(uri: str, text: str) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for _, target, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), target))
        if (ROOT / path).is_file():
            yield path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in BESIDE:
        files.append(File.generated(config, placed(path), abs_src_path=str(ROOT / path)))
    for page in list(files.documentation_pages()):
        for path in linked(page.src_uri, page.content_string):
            if files.get_file_from_path(placed(path)) is None:
                files.append(File.generated(config, placed(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(here)

    def turned(match: re.Match[str]) -> str:
        opening, target, rest = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(here)), target))
        if not (ROOT / path).is_file():
            return match[0]
        return opening + posixpath.relpath(placed(path), folder or ".") + rest

    return LINK.sub(turned, FILLED.sub(lambda match: CONTENTS[match[1]](), markdown))


# --- contents that come from the program --------------------------------------------------------------------
def commands() -> str:
    """Every command with its arguments and options."""
    import typer.main
    from typer.cli import get_docs_for_click

    from pilotage.cli import app

    command = typer.main.get_command(app)
    with command.make_context("pilotage", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="pilotage")
    return text.partition("\n")[2]  # without its title


def measurements() -> str:
    """Every feature of an observation."""
    from pilotage.control.policy import FEATURES

    lines = ["| feature | unit | what it is | PromQL |", "|---|---|---|---|"]
    for one in FEATURES:
        query = one.promql.replace("|", "\\|")
        lines.append(f"| `{one.name}` | {one.unit} | {one.meaning} | `{query}` |")
    return "\n".join(lines)


def scenario() -> str:
    from pilotage.scenario import json_schema

    return described(json_schema())


def policies() -> str:
    from pilotage.control.scaling import Scaling

    return described(msgspec.json.schema(Scaling))


def steering() -> str:
    from pilotage.live.steer_config import SteerConfig

    return described(msgspec.json.schema(SteerConfig))


def imports() -> str:
    """What imports what in the package, as a drawing: a row for each layer of the contract, a line for each import.

    ValueError if one leads up.
    """
    import grimp

    def part(module: str) -> str:
        name = module.split(".")[1] if "." in module else module
        return "cli_*" if name.startswith("cli_") else name

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    rows = [list(dict.fromkeys(part(name.strip()) for name in row.split("|"))) for row in contract["layers"]]
    place = {
        name: (WIDTH * (k + 0.5) / len(row), HEIGHT * (down + 0.5))
        for down, row in enumerate(rows)
        for k, name in enumerate(row)
    }
    graph = grimp.build_graph("pilotage", exclude_type_checking_imports=True)
    pairs = {
        (part(module), part(other))
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
    }
    lines = sorted((a, b) for a, b in pairs if a != b and a in place and b in place)
    if up := [(a, b) for a, b in lines if place[a][1] >= place[b][1]]:
        raise ValueError(f"imports that do not lead down: {up}")
    drawn = []
    for (x, y), (u, v) in ((place[a], place[b]) for a, b in lines):
        drawn.append(
            f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + 58:.0f} {u:.0f} {v - 58:.0f} {u:.0f} {v:.0f}"/>'
        )
    for name, (x, y) in place.items():
        wide = 7.2 * len(name) + 16
        drawn.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y - 13:.0f}" width="{wide:.0f}" height="26" rx="5"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}">{name}</text>'
        )
    style = (
        ".imports path{fill:none;stroke:currentColor;stroke-opacity:.3}"
        ".imports rect{fill:var(--md-default-bg-color);stroke:currentColor}"
        ".imports text{fill:currentColor;font:12px monospace;text-anchor:middle}"
    )
    said = f"{len(lines)} imports between {len(place)} parts of the package; every line leads down"
    return (
        f"<div><style>{style}</style>"
        f'<svg class="imports" role="img" aria-label="{said}" viewBox="0 0 {WIDTH} {HEIGHT * len(rows)}">'
        f"{''.join(drawn)}</svg></div>"
    )


def described(schema: dict[str, Any]) -> str:
    """A JSON schema of msgspec in words: a section for each structure, with its fields."""
    parts = []
    for name, one in schema["$defs"].items():
        if "properties" not in one:
            continue
        tags = {key: p["enum"][0] for key, p in one["properties"].items() if len(p.get("enum", ())) == 1}
        title = next(iter(tags.values()), name)
        parts.append(f"## {title} {{#{name.lower()}}}")
        parts.append(one.get("description", ""))
        rows = [
            f"| `{field}` | {kind(of)} | {default(of, field in one.get('required', ()))} |"
            for field, of in one["properties"].items()
        ]
        parts.append("\n".join(["| field | | if it is left out |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def default(of: dict[str, Any], required: bool) -> str:
    if required:
        return "must be given"
    value = of.get("default")
    if value is None or value in ((), [], {}):
        return ""
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 60 else "its defaults"


def kind(of: dict[str, Any]) -> str:
    """What a value may be."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in of:
        return " or ".join(f"`{value}`" for value in of["enum"])
    if "anyOf" in of:
        return " or ".join(kind(one) for one in of["anyOf"] if one.get("type") != "null")
    if of.get("type") == "array":
        if "prefixItems" in of:
            return f"list of {len(of['prefixItems'])} values"
        return f"list of {kind(of['items'])}" if of.get("items") else "list"
    if of.get("type") == "object":
        inner = of.get("additionalProperties")
        return f"table of {kind(inner)}" if isinstance(inner, dict) and inner else "table"
    words = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {of[key]:g}" for key, sign in signs.items() if key in of)
    return words.get(of.get("type", ""), "value") + (f", {bounds}" if bounds else "")


CONTENTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "imports": imports,
    "measurements": measurements,
    "policies": policies,
    "scenario": scenario,
    "steering": steering,
}
