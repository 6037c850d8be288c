"""Compiled code is kept in a folder that is named after its sources: all of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pilotage.engine
from pilotage.engine import _llm_names, _names

ENGINE = Path(pilotage.engine.__file__).parent


def sources_of(*names: str) -> set[str]:
    """Some modules of the engine and all that they import of it, at whatever remove."""
    found, left = set(), set(names)
    while left:
        found.add(name := left.pop())
        for node in ast.walk(ast.parse((ENGINE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pilotage.engine"):
                inner = node.module.split(".")[2:]
                named = inner[:1] or [alias.name for alias in node.names]
                left |= {one for one in named if (ENGINE / f"{one}.py").is_file()} - found
    return found


def test_the_folder_is_named_after_all_that_kernels_are_made_of():
    assert {"replicas", "allocation", "router"} < sources_of("kernel") <= set(_names)
    assert sources_of("llm_ticks", "batching") <= {*_names, *_llm_names}
