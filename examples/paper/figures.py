"""Figures and results page from the logs in docs/experiments/: `make figures`.

The program trains nothing. A run without a log is left out of its figure, and the page
names it.
"""

import argparse
import pathlib
import sys

import options
import run_list
from comparisons import JOINT, SIZES, STATISTICS
from logs import limited, read_logs, seeds, smoothed
from options import LABELS
from results_page import results_page

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    raise SystemExit(options.missing(error)) from error

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COLORS = {"none": "tab:gray", "input": "tab:blue", "joint": "tab:orange"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--docs-dir", type=pathlib.Path, default=DOCS, help="(default: docs/)"
    )
    docs = parser.parse_args(argv).docs_dir
    logs = read_logs(docs / "experiments")
    if not logs:
        raise SystemExit(
            f"{docs / 'experiments'} has no log of a run: `make experiments` makes them"
        )
    (docs / "figures").mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw(logs)
        if figure is None:
            print(f"{name}: its runs are not there yet")
            continue
        path = docs / "figures" / f"{name}.png"
        # No date or version in it: the same logs, the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(f"{name}: {path}")
    page = docs / "experiments.md"
    page.write_text(results_page(logs), encoding="utf-8")
    print(f"Results: {page}")
    return 0


def figure1(logs):
    """Speech: cross-entropy and error rate, all seeds, the first one with a label."""
    if "speech-none-1" not in logs or "speech-input-1" not in logs:
        return None
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {
        "frame_cross_entropy": "cross-entropy, nats a frame",
        "frame_error_rate": "error rate of frames",
    }
    for axes, (metric, title) in zip(both, titles.items(), strict=True):
        for normalize in ("none", "input"):
            for log in seeds(logs, f"speech-{normalize}"):
                style = {"lw": 1.8} if log.name.endswith("-1") else {"alpha": 0.3}
                label = LABELS[normalize] if log.name.endswith("-1") else "_"
                curves(axes, log, metric, label, COLORS[normalize], **style)
        axes.set(xlabel="epoch", ylabel=title)
    both[0].legend()
    return figure


def figure2(logs):
    """The language models, a panel for each size."""
    sizes = [
        size
        for size in SIZES
        if all(f"language_model-{size}-{n}" in logs for n in ("none", "input"))
    ]
    if not sizes:
        return None
    figure, panels = plt.subplots(
        *(1, len(sizes)),
        **{"figsize": (1.5 + 4.2 * len(sizes), 4.2), "squeeze": False},
        layout="constrained",
    )
    for axes, size in zip(panels[0], sizes, strict=True):
        stopped = limited(logs, size)
        for normalize in ("none", "input"):
            log = logs[f"language_model-{size}-{normalize}"]
            label, color = LABELS[normalize], COLORS[normalize]
            if stopped:
                by_minutes(axes, log, label, color)
            else:
                curves(axes, log, "perplexity", label, color)
        perplexities(axes)
        axes.set(xlabel="minutes of one core" if stopped else "epoch", title=size)
    panels[0][0].set_ylabel("perplexity per word")
    panels[0][0].legend()
    return figure


def figure3(logs):
    """The grid of learning rate, momentum and batch size: training cross-entropy."""
    points = {}
    for run in run_list.grid():
        rate, momentum, batch, normalize = run.name.removeprefix("grid-").rsplit("-", 3)
        points.setdefault((momentum, batch), {})[rate, normalize] = run.name
    if not all(name in logs for names in points.values() for name in names.values()):
        return None
    rates = list(dict.fromkeys(rate for rate, _ in next(iter(points.values()))))
    figure, panels = plt.subplots(
        *(len(points), len(rates)),
        **{"figsize": (3.6 * len(rates), 2.5 * len(points))},
        **{"sharex": True, "sharey": True, "layout": "constrained"},
    )
    for row, ((momentum, batch), names) in zip(panels, points.items(), strict=True):
        for axes, rate in zip(row, rates, strict=True):
            for normalize in ("none", "input"):
                log = logs[names[rate, normalize]]
                curves(
                    *(axes, log, "frame_cross_entropy"),
                    *(LABELS[normalize], COLORS[normalize]),
                )
            title = f"rate {rate}, momentum {momentum}, batch {batch}"
            axes.set_title(title, fontsize=9)
        row[0].set_ylabel("nats a frame")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    panels[0][0].legend(fontsize=8)
    return figure


def figure4(logs):
    """Hidden-to-hidden normalisation, compared with the other two layers."""
    tasks = {}
    for title, (name, metric) in JOINT.items():
        first = {n: seeds(logs, name.format(n))[:1] for n in LABELS}
        if all(first.values()):
            tasks[title] = {n: log for n, (log,) in first.items()}, metric
    if not tasks:
        return None
    figure, panels = plt.subplots(
        *(1, len(tasks)),
        **{"figsize": (1 + 4 * len(tasks), 4), "squeeze": False},
        layout="constrained",
    )
    for axes, (title, (shown, metric)) in zip(panels[0], tasks.items(), strict=True):
        for normalize, log in shown.items():
            curves(axes, log, metric, LABELS[normalize], COLORS[normalize])
        axes.set(xlabel="epoch", title=title)
        axes.set_ylabel(
            {"perplexity": "perplexity per word", "loss": "cross-entropy, nats"}.get(
                metric, "nats a frame"
            )
        )
        if metric == "perplexity":
            axes.set_xlim(0.8, len(shown["joint"].rows) + 0.2)
            perplexities(axes)
    panels[0][0].legend(fontsize=8)
    return figure


def figure5(logs):
    """Frame-wise statistics, compared with sequence-wise ones."""
    tasks = {}
    for title, (*both, metric) in STATISTICS.items():
        first = [seeds(logs, name)[:1] for name in both]
        if all(first):
            tasks[title] = [log for (log,) in first], metric
    if not tasks:
        return None
    figure, panels = plt.subplots(
        *(1, len(tasks)),
        **{"figsize": (1 + 4.5 * len(tasks), 4), "squeeze": False},
        layout="constrained",
    )
    for axes, (title, (both, metric)) in zip(panels[0], tasks.items(), strict=True):
        for log, label, color in zip(
            both, ("sequence-wise", "frame-wise"), ("tab:blue", "tab:red"), strict=True
        ):
            curves(axes, log, metric, label, color)
        axes.set(xlabel="epoch", ylabel="cross-entropy, nats", title=title)
    panels[0][0].legend()
    return figure


def curves(axes, log, metric, label, color, **style):
    """Draws training as a solid line and validation as a dashed one."""
    epochs = log.ends
    axes.plot(epochs, log[metric], color=color, label=f"{label}, training", **style)
    axes.plot(
        *(epochs, log[f"val_{metric}"], "--"),
        **{"color": color, "label": f"{label}, validation", **style},
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def by_minutes(axes, log, label, color):
    """Draws training over time, and validation at the end of each epoch."""
    points = [(seconds / 60, value) for _, seconds, value in smoothed(log)]
    axes.plot(*zip(*points, strict=True), color=color, label=f"{label}, training")
    minutes = [log.cpu_seconds(row["epoch"]) / 60 for row in log.rows]
    axes.plot(
        *(minutes, log["val_perplexity"], "o--"),
        **{"color": color, "label": f"{label}, validation"},
    )
    axes.grid(alpha=0.3)


def perplexities(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


FIGURES = {
    "figure1_speech": figure1,
    "figure2_language_model": figure2,
    "figure3_grid": figure3,
    "figure4_joint": figure4,
    "figure5_statistics": figure5,
}


if __name__ == "__main__":
    sys.exit(main())
