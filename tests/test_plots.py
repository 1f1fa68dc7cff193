"""`keras_bnrnn.plots`: the lines are the measurements of the callbacks."""

import importlib
import sys

import numpy as np
import pytest

import keras_bnrnn.plots
from keras_bnrnn import NormalizationMonitor, Recalibrate
from keras_bnrnn.plots import plot_normalization, plot_recalibration

pyplot = pytest.importorskip("matplotlib.pyplot")


def recorded(rng, layers, epochs=(0, 2, 4), gates="zrh"):
    """Callbacks with random records, as `fit` leaves them."""

    def record():
        found = {}
        for key in ("mean_gap", "variance_gap", "gamma"):
            least, mean, most = np.sort(rng.uniform(0.01, 2.0, 3)).tolist()
            found |= {f"{key}/min": least, f"{key}/mean": mean, f"{key}/max": most}
        for gate in gates:
            found[f"saturated/{gate}"] = float(rng.uniform(0.0, 1.0))
        return found

    monitor = NormalizationMonitor(np.zeros((2, 3, 4)))
    monitor.history = {e: {name: record() for name in layers} for e in epochs}
    recalibrate = Recalibrate(np.zeros((2, 3, 4)))
    recalibrate.changes = {
        epoch: {
            name: {"mean": rng.uniform(0.1, 1), "variance": rng.uniform(0.1, 1)}
            for name in layers
        }
        for epoch in epochs
    }
    return monitor, recalibrate


def lines(axes):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def values(records, layer, key):
    return [records[epoch][layer][key] for epoch in sorted(records)]


def test_normalization(rng, tmp_path):
    monitor, _ = recorded(rng, ["lower", "upper"])
    figure = plot_normalization(monitor)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert len(figure.axes) == 6
    keys = ["mean_gap/mean", "variance_gap/mean", "gamma/mean"]
    keys += [f"saturated/{gate}" for gate in "zrh"]
    for axes, key in zip(figure.axes, keys, strict=True):
        assert lines(axes) == [
            ([1, 3, 5], values(monitor.history, name, key))
            for name in ("lower", "upper")
        ]
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel()
    # The bands end at the largest and, of gamma, at the smallest value.
    for name, band in zip(("lower", "upper"), figure.axes[2].collections, strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == max(values(monitor.history, name, "gamma/max"))
        assert heights.min() == min(values(monitor.history, name, "gamma/min"))
    assert pyplot.get_fignums() == []  # the figure is not in its global state
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lower", "upper"]


def test_recalibration(rng):
    _, callback = recorded(rng, ["lower", "upper"], epochs=(1,))
    figure = plot_recalibration(callback)
    for axes, key in zip(figure.axes, ("mean", "variance"), strict=True):
        assert lines(axes) == [
            ([2], values(callback.changes, name, key)) for name in ("lower", "upper")
        ]
        assert axes.get_yscale() == "log"


def test_many_layers_differ_and_other_values_are_drawn(rng, tmp_path):
    names = [f"layer_{i}" for i in range(24)]
    monitor, callback = recorded(rng, names, gates="")
    monitor.history[2]["layer_3"]["mean_gap/mean"] = float("nan")
    del monitor.history[4]["layer_5"]
    callback.changes = {0: {name: {"mean": 0.0, "variance": 0.0} for name in names}}
    figure = plot_normalization(monitor)
    styles = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
    assert len(styles) == len(names)
    for drawn in (figure, plot_recalibration(callback)):
        drawn.savefig(tmp_path / "figure.png")


def test_refused_callbacks(rng):
    monitor, callback = recorded(rng, ["rnn"])
    with pytest.raises(ValueError, match=r"must be a `Recalibrate`.*NormalizationMon"):
        plot_recalibration(monitor)
    with pytest.raises(ValueError, match=r"must be a `NormalizationMonitor`.*Recalib"):
        plot_normalization(callback)
    with pytest.raises(ValueError, match=r"have acted.*fit.*`changes` is empty"):
        plot_recalibration(Recalibrate(np.zeros((2, 3, 4))))
    with pytest.raises(ValueError, match=r"have acted.*fit.*`history` is empty"):
        plot_normalization(NormalizationMonitor(np.zeros((2, 3, 4))))


def test_matplotlib_is_missing(rng, monkeypatch):
    monitor, _ = recorded(rng, ["rnn"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.reload(keras_bnrnn.plots)  # needs no matplotlib
    with pytest.raises(ImportError, match=r"plot_normalization.*keras-bnrnn\[plots\]"):
        plot_normalization(monitor)
