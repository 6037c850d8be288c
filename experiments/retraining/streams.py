"""Matrices of errors recorded on real labelled streams: every past version on every later batch.

The protocol is fixed: consecutive batches; the version of a batch is a histogram gradient boosting classifier fitted
on the four batches before; entry [s, t] is how many answers of batch t the version of batch s gets wrong. The probe
is a decision tree of depth 5, fitted in milliseconds on the last four batches whose labels have come.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

WINDOW = 4
# file, batch size, columns that are neither inputs nor the label
STREAMS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "elec2": ("elec2.csv.gz", 500, ()),
    "noaa": ("noaa_weather.csv.gz", 180, ()),
    "insects": ("insects_gradual_balanced_rows0-9659.csv.gz", 100, ()),
    "ozone": ("ozone.csv.gz", 25, ()),
    "employment": ("employment_ma.csv.gz", 3000, ("id", "year", "prediction", "predicted_probability")),
    "sea": ("", 1000, ()),
}


def labelled(name: str, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of shape (rows, inputs) and labels as numbers, in order of time."""
    file, _, dropped = STREAMS[name]
    if name == "sea":
        return sea(100_000)
    path = data / "drift" / file
    frame = pd.read_csv(path, header=None if name == "insects" else 0).drop(columns=list(dropped))
    inputs = frame.iloc[:, :-1].apply(lambda c: c if c.dtype.kind in "fi" else pd.factorize(c)[0])
    return inputs.to_numpy(float), pd.factorize(frame.iloc[:, -1])[0]


def sea(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four concepts in sequence, a tenth of the labels wrong (Street & Kim, KDD 2001)."""
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(0, 10, (rows, 3))
    limits = np.repeat([8.0, 9.0, 7.0, 9.5], -(-rows // 4))[:rows]
    labels = (inputs[:, 0] + inputs[:, 1] <= limits).astype(int)
    wrong = rng.random(rows) < 0.1
    return inputs, np.where(wrong, 1 - labels, labels)


def wrong(
    model: ClassifierMixin, inputs: np.ndarray, labels: np.ndarray, learn: slice, judge: slice
) -> np.ndarray:
    """Which answers a model gets wrong that has learned from some rows, where one class is enough; shape (rows,)."""
    if len(np.unique(labels[learn])) > 1:
        return model.fit(inputs[learn], labels[learn]).predict(inputs[judge]) != labels[judge]
    return labels[judge] != labels[learn][0]


def row_of(inputs: np.ndarray, labels: np.ndarray, size: int, version: int) -> np.ndarray:
    """What the version of one batch gets wrong on its own and every later batch."""
    begin, end = version * size, (version + WINDOW) * size
    model = HistGradientBoostingClassifier(
        max_iter=40, max_leaf_nodes=15, min_samples_leaf=10, random_state=0
    )
    return wrong(model, inputs, labels, slice(begin, end), slice(end, None)).reshape(-1, size).sum(axis=1)


def probe_of(name: str, data: Path, work: Path, delay: int, offset: int = 0) -> np.ndarray:
    """What the probe gets wrong on every batch of the matrix, int64 of shape (batches,), kept in `work`."""
    kept = work / f"probe-{name}-{offset}-{delay}.npy"
    if kept.is_file():
        return np.load(kept)
    inputs, labels = labelled(name, data)
    inputs, labels, size = inputs[offset:], labels[offset:], STREAMS[name][1]
    out = np.zeros(len(labels) // size - WINDOW, np.int64)
    for t in range(len(out)):
        model = RandomForestClassifier(10, max_depth=10, min_samples_leaf=5, random_state=0)
        begin, end = max(t - delay, 0), t + WINDOW
        learn = slice(begin * size, (begin + WINDOW) * size)
        out[t] = wrong(model, inputs, labels, learn, slice(end * size, (end + 1) * size)).sum()
    return _kept(kept, out)


def _kept(path: Path, values: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npy")
    np.save(part, values)
    part.replace(path)
    return values


def errors_of(name: str, data: Path, work: Path, offset: int = 0) -> np.ndarray:
    """The matrix of a stream whose first `offset` rows are left out, kept in `work`."""
    kept = work / f"errors-{name}-{offset}.npy"
    if kept.is_file():
        return np.load(kept)
    inputs, labels = labelled(name, data)
    size = STREAMS[name][1]
    rows = (len(labels) - offset) // size * size
    inputs, labels = inputs[offset : offset + rows], labels[offset : offset + rows]
    batches = rows // size - WINDOW
    matrix = np.zeros((batches, batches), np.int64)
    for version in range(batches):
        matrix[version, version:] = row_of(inputs, labels, size, version)
    return _kept(kept, matrix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("results/retraining/work"))
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(partial(errors_of, data=options.data, work=options.work), STREAMS)
        for name, matrix in zip(STREAMS, found, strict=True):
            size = STREAMS[name][1]
            print(
                name,
                len(matrix),
                f"{matrix[0].mean() / size:.3f} {np.diag(matrix).mean() / size:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
