"""Iteration laws from measurements: of iterations, or of whole requests.

Coefficients are kept at or above 0: a negative one is an artefact of the fit, and would make some batch take no time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from scipy.optimize import least_squares, minimize, nnls

from pilotage.engine.serving import serve
from pilotage.world.llm import LLMServer, Profile
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import SpecError
from pilotage.world.tokens import Requests

TERMS: Final = ("base_s", "prefill_s", "sequence_s", "context_s", "square_s", "cross_s")
_SMALLEST: Final = 1e-15  # stands for 0 where logarithms are taken
_SHIFT: Final = 10.0  # SciPy's steps are relative, and would vanish at 0


def _law(coefficients: np.ndarray) -> IterationLaw:
    """Of as many terms as there are coefficients; the others are 0."""
    terms = dict(zip(TERMS, map(float, coefficients), strict=False))
    return msgspec.convert({"kind": "iteration"} | terms, IterationLaw)


def errors(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Relative errors: mean, median, 95th percentile and largest."""
    relative = np.abs(found / wanted - 1)
    p50, p95 = np.percentile(relative, [50, 95])
    return {
        "mape": float(relative.mean()), "p50": float(p50), "p95": float(p95), "max": float(relative.max())
    }  # fmt: skip


def fit_iterations(batches: np.ndarray, seconds: np.ndarray) -> tuple[IterationLaw, dict[str, float]]:
    """The law that fits measured iterations best, by relative least squares, and its errors on them.

    `batches` has shape (n, 4): prefill tokens, sequences that decode, context tokens, sum of squared chunks; or (n, 5),
    then with the sum of chunks times tokens before them, which the sixth term of the law is for.
    """
    if (
        batches.ndim != 2
        or batches.shape[1] not in (4, 5)
        or len(batches) != len(seconds)
        or len(seconds) < 5
    ):
        raise SpecError(
            f"batches of shape {batches.shape} for {len(seconds)} times; valid: (n, 4) or (n, 5) with n of at least 5"
        )
    if not (np.all(np.isfinite(seconds)) and np.all(seconds > 0) and np.all(batches >= 0)):
        raise SpecError("iterations must take positive, finite times, and counts must not be negative")
    terms = np.column_stack([np.ones(len(seconds)), batches]) / seconds[:, None]
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-300)
    law = _law(nnls(terms / scale, np.ones(len(seconds)))[0] / scale)
    return law, errors(np.array([law.seconds(*row) for row in batches]), seconds)


def fit_regimes(batches: np.ndarray, seconds: np.ndarray) -> tuple[IterationLaw, dict[str, float]]:
    """The same with a law of its own for iterations that only decode, and the errors of both together.

    Where no iteration does both, decodes beside a prefill are taken to cost what they cost by themselves.
    """
    prefills = batches[:, 0] > 0
    decode, _ = fit_iterations(batches[~prefills], seconds[~prefills])
    law, _ = fit_iterations(batches[prefills], seconds[prefills])
    if not (batches[prefills, 1] > 0).any():
        law = law.replace(sequence_s=decode.sequence_s, context_s=decode.context_s)
    found = [(law if p else decode).seconds(*row) for p, row in zip(prefills, batches, strict=True)]
    return law.replace(decode=decode), errors(np.array(found), seconds)


def fit_requests(
    server: LLMServer,
    requests: Requests,
    ttft_s: np.ndarray,
    e2el_s: np.ndarray,
    start: IterationLaw,
    *,
    used: np.ndarray | None = None,
    replicas: int = 1,
    evaluations: int = 40,
) -> IterationLaw:
    """The law under which the engine reproduces measured requests best.

    All requests are served. Of those that are `used` (a mask; None: all) the logarithms of E2EL are compared request by
    request, and those of TTFT and TPOT in ascending order: to which iteration a request comes just in time is chance.
    The first five coefficients, and the sixth where `start` has one, move by factors from `start`, towards which those
    are held, by very little, on which the measurements do not depend.
    """
    used = np.ones(len(requests), bool) if used is None else used
    free = 6 if start.cross_s else 5
    origin = np.log(np.maximum(start.vector[:free], _SMALLEST))
    later = np.maximum(requests.output_tokens - 1, 1)[used]

    def seen(ttft: np.ndarray, e2el: np.ndarray) -> np.ndarray:
        ttft, e2el = ttft[used], e2el[used]
        tpot = (e2el - ttft) / later
        return np.log(np.r_[np.sort(ttft), np.sort(np.maximum(tpot, 1e-9)), e2el])

    wanted = seen(ttft_s, e2el_s)

    def residuals(shifted: np.ndarray) -> np.ndarray:
        moved = shifted - _SHIFT
        found = serve(server, _law(np.exp(origin + moved)), requests, replicas=replicas)
        off = (seen(found.ttft_s, found.e2el_s) - wanted) / np.sqrt(len(wanted))
        return np.r_[off, 0.0003 * moved]

    bounds = (_SHIFT - 6, _SHIFT + 6)
    near = least_squares(
        residuals, np.full(free, _SHIFT), diff_step=0.01, bounds=bounds, max_nfev=evaluations
    ).x  # derivatives over steps of a tenth: nearer, and chance is all that is seen
    best = minimize(
        lambda x: float(np.sum(residuals(x) ** 2)), near, method="Nelder-Mead", bounds=[bounds] * free,
        options={"maxfev": 10 * evaluations, "initial_simplex": near + 0.1 * np.vstack([np.zeros(free), np.eye(free)])},
    ).x  # fmt: skip
    return _law(np.exp(origin + best - _SHIFT))


def as_toml(fields: dict[str, Any], name: str = "") -> str:
    """Nested dictionaries of plain values as TOML, below the table `name`; None is left out."""
    tables: list[str] = []

    def table(name: str, fields: dict[str, Any]) -> None:
        lines = [f"[{name}]"] if name else []
        inner = {}
        for key, value in fields.items():
            if isinstance(value, dict):
                inner[f"{name}.{key}" if name else key] = value
            elif value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
        tables.append("\n".join(lines))
        for full, value in inner.items():
            table(full, value)

    table(name, fields)
    return "\n\n".join(filter(None, tables)) + "\n"


def save_profile(profile: Profile, path: Path) -> None:
    """Writes a profile as `world.llm.load_profile` reads it, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(as_toml(msgspec.to_builtins(profile)))
    part.replace(path)
