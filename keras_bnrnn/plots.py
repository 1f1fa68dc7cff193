"""Draws what the callbacks measured. It needs matplotlib, the extra `plots`."""

import math
import typing

from keras_bnrnn.callbacks import NormalizationMonitor, Recalibrate
from keras_bnrnn.extras import require_extra

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_normalization", "plot_recalibration"]

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"]
STYLES = ["-", "--", "-.", ":"]

PANEL = (3.4, 2.6)  # width and height in inches
COLUMNS = 3


def plot_recalibration(callback: Recalibrate) -> "Figure":
    """Draws how far the moving averages of training were from exact statistics.

    One panel has the largest change of a mean, in standard deviations, and one the
    largest relative change of a variance. Each layer has a line over the epochs. The
    axis is logarithmic.

    Args:
        callback: A `Recalibrate` that has acted in a call of `fit`.

    Returns:
        A `matplotlib.figure.Figure`, to be saved by `figure.savefig(path)`. It is not
        registered with `matplotlib.pyplot`.

    Raises:
        ValueError: If `callback` is of another class, or has not acted.
        ImportError: If matplotlib is not installed.

    Example:

    >>> from keras_bnrnn.plots import plot_recalibration
    >>> model = keras.Sequential([keras.Input((None, 8)), BNLSTM(4)])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 10, 8))
    >>> callback = Recalibrate(x)
    >>> history = model.fit(x, np.zeros((64, 4)), callbacks=[callback], verbose=0)
    >>> [axes.get_title("left") for axes in plot_recalibration(callback).axes]
    ['Change of the mean', 'Change of the variance']
    """
    require_extra("plot_recalibration", "plots", ["matplotlib"])
    records = _records(callback, Recalibrate, "changes")
    panels = [
        ("Change of the mean", "largest, standard deviations", "mean"),
        ("Change of the variance", "largest, relative", "variance"),
    ]
    figure, grid, layers = _prepare(records, len(panels))
    for axes, (title, label, key) in zip(grid, panels, strict=True):
        for layer, style in layers.items():
            axes.plot(*_series(records, layer, key), **style)
        _use_log_scale(axes)
        _label(axes, title, label)
    return figure


def plot_normalization(callback: NormalizationMonitor) -> "Figure":
    """Draws the gaps, gamma and the shares of saturated gates over the epochs.

    Two panels have the gaps between the statistics of the batch and the population
    statistics, with a logarithmic axis: a line for the mean over the features, and a
    band up to the largest. One panel has gamma: its mean, and a band from the smallest
    to the largest. Then each gate has a panel. Each layer has a colour. With more than
    seven layers there are no bands.

    Args:
        callback: A `NormalizationMonitor` that has acted in a call of `fit`.

    Returns:
        A `matplotlib.figure.Figure`, to be saved by `figure.savefig(path)`. It is not
        registered with `matplotlib.pyplot`.

    Raises:
        ValueError: If `callback` is of another class, or has not acted.
        ImportError: If matplotlib is not installed.

    Example:

    >>> from keras_bnrnn.plots import plot_normalization
    >>> model = keras.Sequential([keras.Input((None, 8)), BNGRU(4)])
    >>> model.compile("adam", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 10, 8))
    >>> monitor = NormalizationMonitor(x[:32])
    >>> history = model.fit(x, np.zeros((64, 4)), callbacks=[monitor], verbose=0)
    >>> for axes in plot_normalization(monitor).axes:
    ...     print(axes.get_title("left"))
    Gap of the mean
    Gap of the variance
    gamma
    Saturated: gate z
    Saturated: gate r
    Saturated: gate h
    """
    require_extra("plot_normalization", "plots", ["matplotlib"])
    from matplotlib.ticker import PercentFormatter

    records = _records(callback, NormalizationMonitor, "history")
    gates = dict.fromkeys(
        key.split("/")[1]
        for record in records.values()
        for measurements in record.values()
        for key in measurements
        if key.startswith("saturated/")
    )
    bands = [
        ("Gap of the mean", "standard deviations", "mean_gap", "mean"),
        ("Gap of the variance", "|ln(batch / population)|", "variance_gap", "mean"),
        ("gamma", "scale", "gamma", "min"),
    ]
    figure, grid, layers = _prepare(records, len(bands) + len(gates))
    for axes, (title, label, key, least) in zip(grid, bands, strict=False):
        for layer, style in layers.items():
            epochs, bottom = _series(records, layer, f"{key}/{least}")
            _, top = _series(records, layer, f"{key}/max")
            colour = style["color"]
            if len(layers) <= len(COLOURS):  # bands of more layers hide each other
                axes.fill_between(
                    epochs, bottom, top, color=colour, alpha=0.12, linewidth=0
                )
            axes.plot(*_series(records, layer, f"{key}/mean"), **style)
        if key != "gamma":
            _use_log_scale(axes)
        _label(axes, title, label)
    for axes, gate in zip(grid[len(bands) :], gates, strict=True):
        for layer, style in layers.items():
            axes.plot(*_series(records, layer, f"saturated/{gate}"), **style)
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _label(axes, f"Saturated: gate {gate}", "share of values")
    return figure


def _records(callback, kind, attribute):
    """Returns what a callback recorded, in the order of the epochs."""
    if not isinstance(callback, kind):
        raise ValueError(
            f"`callback` must be a `{kind.__name__}`. Received: callback={callback!r}"
        )
    records = getattr(callback, attribute)
    if not records:
        raise ValueError(
            "`callback` must have acted in an epoch: pass it to `model.fit` first. "
            f"Received: a `{kind.__name__}` whose `{attribute}` is empty"
        )
    return dict(sorted(records.items()))


def _series(records, layer, key):
    """Returns the epochs, counted from 1, and the values of a layer in them."""
    epochs = [epoch for epoch in records if key in records[epoch].get(layer, ())]
    values = [records[epoch][layer][key] for epoch in epochs]
    return [epoch + 1 for epoch in epochs], values


def _prepare(records, count):
    """Returns a figure with a legend, its axes, and the style of each layer's lines."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(name for record in records.values() for name in record))
    colours = COLOURS
    if len(names) > len(COLOURS):
        from matplotlib import colormaps

        # From the bottom layer to the top one, without the pale end.
        colours = [
            to_hex(colormaps["viridis"](0.92 * i / (len(names) - 1)))
            for i in range(len(names))
        ]
    # In one epoch a line has no length. Few epochs are seen better with markers.
    marker = "o" if len(records) <= 12 else None
    layers = {
        name: {
            "color": colours[i],
            "linestyle": STYLES[i % len(STYLES)] if len(names) > len(COLOURS) else "-",
            "marker": marker,
            "markersize": 3,
            "linewidth": 1.4,
        }
        for i, name in enumerate(names)
    }
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    longest = max(map(len, names))
    legend_columns = math.ceil(len(names) / 20)
    width = PANEL[0] * columns + legend_columns * (0.8 + 0.075 * longest)
    figure = Figure(figsize=(width, PANEL[1] * rows), layout="constrained")
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    lines = [Line2D([], [], label=name, **style) for name, style in layers.items()]
    figure.legend(
        handles=lines,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        title="layer",
        ncols=legend_columns,
    )
    return figure, grid, layers


def _use_log_scale(axes):
    """Sets a logarithmic axis, unless no value is above 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [value for line in axes.lines for value in line.get_ydata()]
    if any(value > 0 for value in values):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _label(axes, title, label):
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
