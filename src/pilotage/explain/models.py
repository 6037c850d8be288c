"""What a served model looks at, version by version: mean sizes of Shapley values, kept as metrics of the version.

    with track("fraud", versions) as training:
        ...
        for name, sizes in summary(predictor(model), sample, background).items():
            training.metric(ATTRIBUTION + name, sizes)

`pilotage compare` then shows how the attention of two versions differs (`live.compare`). A model is a function from a
table (columns of one length) to numbers: a scikit-learn estimator or an ONNX file by `predictor`, or any other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pilotage.control.shift import ATTRIBUTION, Table
from pilotage.explain.attribution import attribute
from pilotage.explain.choice import Choice

__all__ = ["ATTRIBUTION", "predictor", "summary"]

Predict = Callable[[Table], np.ndarray]


def predictor(model: Any) -> Predict:
    """A model's output as one number per row: the probability of the last class, or what a regressor says.

    `model` is a scikit-learn estimator, which is given a data frame, or the path of an ONNX file with one input of
    numbers, of shape (rows, columns). Raises ValueError for anything else.
    """
    if isinstance(model, (str, Path)):
        return _onnx(Path(model))
    if hasattr(model, "predict_proba"):
        return lambda table: np.asarray(model.predict_proba(_frame(table)))[:, -1]
    if hasattr(model, "predict"):
        return lambda table: np.asarray(model.predict(_frame(table)), float)
    raise ValueError(
        f"{type(model).__name__}: has neither predict_proba nor predict; give a model or an ONNX file"
    )


def _frame(table: Table) -> Any:
    import pandas as pd

    return pd.DataFrame(dict(table))


def _onnx(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (wants,) = session.get_inputs()
    kind = np.float64 if "double" in wants.type else np.float32

    def predict(table: Table) -> np.ndarray:
        rows = np.column_stack([np.asarray(column, kind) for column in table.values()])
        found = session.run(None, {wants.name: rows})[-1]
        if isinstance(found, list):  # scikit-learn's converters give a dictionary of probabilities per row
            return np.array([list(one.values())[-1] for one in found], float)
        found = np.asarray(found, float)
        return found if found.ndim == 1 else found[:, -1]

    return predict


class Row(Choice):
    """A model's output for one row, against a background of other rows; every column is a player."""

    unit = "output"

    def __init__(self, predict: Predict, table: Table) -> None:
        self._predict, self._table = predict, {name: np.asarray(column) for name, column in table.items()}
        self.names, self.units = tuple(self._table), ("",) * len(self._table)
        numbers = [column if column.dtype.kind in "iuf" else np.full(len(column), np.nan)
                   for column in self._table.values()]  # fmt: skip
        self.shown = np.column_stack(numbers).astype(float)

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        if blend < 1.0:
            raise ValueError(f"blend {blend}: rows of a table are not mixed; valid: 1")
        columns = {name: column[picks[:, k]] for k, (name, column) in enumerate(self._table.items())}
        return np.asarray(self._predict(columns), float)


def summary(
    predict: Predict, sample: Table, background: Table, *, most: int = 200, seed: int = 0
) -> dict[str, np.ndarray]:
    """Sizes of every column's Shapley value, one per row of the sample (of at most `most` rows, drawn at random).

    Exact for up to ten columns, else by permutations. Both tables have the same columns; raises ValueError if not, or
    if one is empty.
    """
    if list(sample) != list(background):
        raise ValueError(
            f"columns of the sample {list(sample)} and of the background {list(background)} differ"
        )
    lengths = [len(np.asarray(next(iter(table.values())))) if table else 0 for table in (sample, background)]
    if min(lengths) == 0:
        raise ValueError("the sample or the background is empty; give at least a row of each")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(lengths[0])[:most]
    found = []
    for row in rows:
        both = {
            name: np.concatenate([np.asarray(sample[name])[row : row + 1], np.asarray(background[name])])
            for name in sample
        }
        found.append(np.abs(attribute(Row(predict, both), seed=seed).phi))
    return dict(zip(sample, np.array(found).T, strict=True))
