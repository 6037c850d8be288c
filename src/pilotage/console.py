"""What every command prints in the same way: one JSON object, or one line about what is wrong."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any, NoReturn

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def fail(message: str, code: int) -> NoReturn:
    """Ends the process: 1 for a run that failed, 2 for bad input, 3 for a verification that failed."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def print_json(value: Any) -> None:
    """JSON on stdout; what is unknown (NaN) is null, as JSON has no NaN."""
    print(json.dumps(_known(value), indent=2, allow_nan=False))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _known(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
