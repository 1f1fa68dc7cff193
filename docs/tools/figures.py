"""Draws the figures of docs/mathematics.md and monitoring.md, in docs/figures/.

The timesteps of the figures come from the package, not from this script.
"""

import argparse
import contextlib
import os
import pathlib
import re
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

from keras_bnrnn import SequenceBatchNorm
from keras_bnrnn.frames import Frames

FOLDER = pathlib.Path(__file__).parents[1] / "figures"
PADDING = "#dddddd"
COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860"]
# The same file for the same picture.
plt.rcParams["svg.hashsalt"] = "keras_bnrnn"
plt.rcParams["svg.fonttype"] = "none"  # text stays text: small files
plt.rcParams["font.size"] = 9


def timesteps(mask, backwards=False):
    """Returns the timestep of each frame, (B, T), as a layer counts it; -1: padding."""
    rows, columns = mask.shape
    frames = Frames(ops.convert_to_tensor(mask), backwards, time_major=False)
    places = ops.convert_to_tensor(np.tile(np.arange(columns)[:, None], (rows, 1, 1)))
    places = ops.convert_to_numpy(frames.arrange(ops.cast(places, "float32")))[..., 0]
    found = np.full(mask.shape, -1)
    for row, length in enumerate(mask.sum(axis=1)):
        for t in range(length):
            found[row, int(places[row, t])] = t
    return found


def draw_grid(axes, values, colours, title):
    """Draws one square for each frame, with its timestep."""
    for (row, column), t in np.ndenumerate(values):
        colour = PADDING if t < 0 else colours(t)
        square = plt.Rectangle((column, row), 0.92, 0.92, color=colour, linewidth=0)
        axes.add_patch(square)
        if t >= 0:
            axes.text(
                column + 0.46,
                row + 0.48,
                str(t),
                color="white",
                ha="center",
                va="center",
            )
    axes.set_xlim(-0.1, values.shape[1])
    axes.set_ylim(values.shape[0], -0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=10)


def statistics(path):
    mask = np.arange(6) < np.array([6, 3, 5, 4])[:, None]
    values = timesteps(mask)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.6))
    draw_grid(left, values, lambda t: COLOURS[0], 'statistics="sequence"')
    draw_grid(right, values, lambda t: COLOURS[t], 'statistics="frame"')
    save(figure, path)


def compaction(path):
    mask = np.array(
        [
            [1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1],
            [1, 0, 1, 1, 0, 1],
            [1, 1, 1, 1, 1, 1],
        ],
        bool,
    )
    lengths = mask.sum(axis=1)
    inside = np.where(np.arange(6) < lengths[:, None], np.arange(6), -1)
    figure, grids = plt.subplots(1, 3, figsize=(7.2, 2.1))
    titles = ("the data, forwards", "the data, backwards", "inside the layer")
    values = (timesteps(mask), timesteps(mask, backwards=True), inside)
    for axes, title, shown in zip(grids, titles, values, strict=True):
        draw_grid(axes, shown, lambda t: COLOURS[t], title)
    save(figure, path)


def moving_average(path, steps=300):
    """Measures the part of the initial mean in the average of batches of mean 1."""
    norm = SequenceBatchNorm(momentum=0.99, center=False, scale=False)
    batch = np.array([[[0.0], [2.0]]], "float32")  # mean 1; the initial mean is 0
    left = []
    for _ in range(steps):
        norm(batch, training=True)
        left.append(1.0 - float(ops.convert_to_numpy(norm.moving_mean)[0]))
    k = np.arange(1, steps + 1)
    figure, axes = plt.subplots(figsize=(5.6, 2.8))
    axes.plot(k, 0.99**k, color=COLOURS[1], label="constant weight, 1 - momentum")
    axes.plot(k, left, color=COLOURS[0], label="SequenceBatchNorm")
    axes.set_xlabel("training steps")
    axes.set_ylabel("part of the initial values")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def monitoring(path):
    """Runs the program of docs/monitoring.md, and draws what it measured."""
    page = (FOLDER.parent / "monitoring.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        names = {}
        exec(compile(program, "docs/monitoring.md", "exec"), names)
    figure = names["plot_normalization"](names["monitor"])
    figure.savefig(path, dpi=90, metadata={"Software": None})


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


FIGURES = {
    "statistics.svg": statistics,
    "compaction.svg": compaction,
    "moving_average.svg": moving_average,
    "monitoring.png": monitoring,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=FOLDER,
        help="folder for the figures (default %(default)s)",
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(args.output_dir / name)


if __name__ == "__main__":
    main()
