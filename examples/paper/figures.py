"""Figures and results page from the logs in docs/experiments/: `make figures`.

It trains nothing. A run without a log is left out of its figure and named on the page.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import experiments
import training

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    raise SystemExit(training.missing(error)) from error

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COLORS = {"none": "tab:gray", "input": "tab:blue", "joint": "tab:orange"}
LABELS = {"none": "LSTM", "input": "BNLSTM", "joint": "BNLSTM joint"}
SIZES = ("small", "medium")


class Log:
    """A published run.

    Args:
        record: What `experiments.publish` wrote.
    """

    def __init__(self, record):
        self.record = record
        self.name, self.rows = record["name"], record["epochs"]
        self.results = record["results"]

    def __getitem__(self, metric):
        return [row[metric] for row in self.rows]

    def best(self, metric):
        return min(self[metric])

    def reaches(self, metric, value):
        """The number of the first epoch at which the metric is at most that."""
        epochs = (row["epoch"] for row in self.rows if row[metric] <= value)
        return next((int(epoch) for epoch in epochs), None)

    def cpu_seconds(self, epoch):
        """CPU seconds of training up to the end of an epoch."""
        return sum(row["cpu_seconds"] for row in self.rows if row["epoch"] <= epoch)

    @property
    def stopped(self):
        """Whether `--hours` ended the run before its last epoch."""
        return "part" in self.rows[-1]

    @property
    def ends(self):
        """Epochs from the start to the end of each row: the last may be cut short."""
        return [row["epoch"] - 1 + row.get("part", 1) for row in self.rows]

    def within(self, timesteps):
        """The course of training within the epochs of a run with `--hours`.

        Returns:
            List of `(updates, cpu_seconds, perplexity)`, one for each mean over
            `training.BATCHES_A_MEAN` updates, all counted from the start.
        """
        points, updates, seconds = [], 0, 0.0
        for row in self.rows:
            there = row["iterations"] - updates
            for number, loss in enumerate(row["losses"], 1):
                batches = number * training.BATCHES_A_MEAN
                points.append(
                    (
                        updates + batches,
                        seconds + row["cpu_seconds"] * batches / there,
                        math.exp(loss / timesteps),
                    )
                )
            updates, seconds = row["iterations"], seconds + row["cpu_seconds"]
        return points


def read_logs(folder):
    """Dict from name to `Log`, of the listed runs that have a log."""
    logs = {}
    for run in experiments.runs():
        if experiments.is_published(run, folder):
            text = (folder / f"{run.name}.json").read_text(encoding="utf-8")
            logs[run.name] = Log(json.loads(text))
    return logs


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


def limited(logs, size):
    """Whether `--hours` ended a run of a language model's size."""
    names = (f"language_model-{size}-{n}" for n in ("none", "input"))
    return any(logs[name].stopped for name in names if name in logs)


WINDOW = 4  # means; as many as make a noisy curve of text readable


def smoothed(log):
    """`Log.within`, with perplexities averaged over the last `WINDOW` means."""
    points = log.within(log.record["configuration"]["timesteps"])
    for last in range(WINDOW, len(points) + 1):
        logarithms = [math.log(value) for *_, value in points[last - WINDOW : last]]
        yield (*points[last - 1][:2], math.exp(statistics.mean(logarithms)))


def figure3(logs):
    """The grid of learning rate, momentum and batch size: training cross-entropy."""
    points = {}
    for run in experiments.grid():
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


FIGURES = {
    "figure1_speech": figure1,
    "figure2_language_model": figure2,
    "figure3_grid": figure3,
    "figure4_joint": figure4,
    "figure5_statistics": figure5,
}


def perplexities(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def seeds(logs, prefix):
    """The logs PREFIX-1, PREFIX-2, ... that are there, or the only one, PREFIX."""
    if prefix in logs:
        return [logs[prefix]]
    found, seed = [], 1
    while f"{prefix}-{seed}" in logs:
        found.append(logs[f"{prefix}-{seed}"])
        seed += 1
    return found


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, form="{:.3g}", deviation="{:.1g}"):
    """Mean and standard deviation over seeds, or the value of a single seed."""
    mean = form.format(statistics.mean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {deviation.format(statistics.stdev(values))}"


def catching_up(logs):
    """When the normalised model reaches the baseline's best training value.

    Returns:
        List of rows of a table, and for each task the ratio of CPU times of each seed,
        `None` for a seed whose normalised model never gets there.
    """
    tasks = {
        "speech, 5 x 32 each way": (
            *(seeds(logs, "speech-none"), seeds(logs, "speech-input")),
            "frame_cross_entropy",
        ),
        "digits, pixel by pixel": (
            *(seeds(logs, "digits-none"), seeds(logs, "digits-input"), "loss"),
        ),
        **{
            f"language model, {size}": (
                *([logs[n] for n in [f"language_model-{size}-none"] if n in logs],),
                *([logs[n] for n in [f"language_model-{size}-input"] if n in logs],),
                "perplexity",
            )
            for size in SIZES
            if not limited(logs, size)
        },
    }
    rows, ratios = [], {}
    for task, (baselines, normalised, metric) in tasks.items():
        pairs = list(zip(baselines, normalised, strict=False))
        if not pairs:
            continue
        best, epochs, caught, of_seeds = [], [], [], []
        for baseline, other in pairs:
            least = baseline.best(metric)
            epoch, there = baseline.reaches(metric, least), other.reaches(metric, least)
            best.append(least)
            epochs.append(epoch)
            if there is None:
                of_seeds.append(None)
                continue
            caught.append(there)
            of_seeds.append(other.cpu_seconds(there) / baseline.cpu_seconds(epoch))
        ratios[task] = of_seeds
        times = [ratio for ratio in of_seeds if ratio is not None]
        rows.append(
            [
                *(task, len(pairs), spread(best), spread(epochs, "{:.1f}", "{:.1f}")),
                spread(caught, "{:.1f}", "{:.1f}") if caught else "never",
                spread(times, "{:.2f}", "{:.2f}") if times else "never",
                f"{len(times)} of {len(pairs)}",
            ]
        )
    return rows, ratios


def results_page(logs):
    sections = [
        INTRODUCTION,
        *(verdicts(logs), section_language(logs), section_speech(logs)),
        *(section_speakers(logs), section_grid(logs), section_joint(logs)),
        *(section_statistics(logs), section_catching_up(logs)),
        section_conditions(logs),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


INTRODUCTION = """\
# The paper's experiments, run again

Laurent, Pereyra, Brakel, Zhang and Bengio,
[*Batch Normalized Recurrent Neural Networks*](https://arxiv.org/abs/1510.01378), train
LSTMs on the Wall Street Journal corpus and on Penn Treebank, with and without batch
normalisation. This page repeats their experiments with this package, at a size that two
CPU cores can train. The speech data are others, the speech models are smaller, and the
largest language model has no run. The page therefore compares directions, not figures.

`make experiments` makes the runs: some four hours on two cores. It makes each run once
and continues an interrupted one. `make figures` draws the figures and writes this page
from the logs in [experiments/](experiments/). Each log names its command.

LSTM is `keras.layers.LSTM`. BNLSTM normalises the input-to-hidden term, and BNLSTM
joint the sum of both terms: `BN(W x_t + U h_{t-1})`."""


def at_equal_updates(logs):
    """Compares two runs with `--hours` after the updates of the slower one.

    Returns:
        Dict from size to the number of updates and, by normalisation, the training
        perplexity over the last ones up to there, and the seconds until then.
    """
    found = {}
    for size in SIZES:
        names = {n: f"language_model-{size}-{n}" for n in ("none", "input")}
        if not limited(logs, size) or not all(n in logs for n in names.values()):
            continue
        curves = {
            normalize: {
                updates: (value, seconds)
                for updates, seconds, value in smoothed(logs[name])
            }
            for normalize, name in names.items()
        }
        last = max(set(curves["none"]) & set(curves["input"]))
        found[size] = last, {n: curve[last] for n, curve in curves.items()}
    return found


def section_limited(logs):
    rows = []
    for size, (updates, ends) in at_equal_updates(logs).items():
        for normalize, (value, seconds) in ends.items():
            log = logs[f"language_model-{size}-{normalize}"]
            rows.append(
                [
                    *(size, LABELS[normalize], f"{log.ends[-1]:.2f}"),
                    f"{log['val_perplexity'][-1]:.1f}",
                    f"{log.results[normalize]['test']:.1f}",
                    *(f"{updates:,}", f"{value:.1f}", f"{seconds / 60:.0f}"),
                ]
            )
    if not rows:
        return None
    return (
        "The runs of the next table trained for **one hour on one core**; full "
        "training would take about half a day each. Validation and test perplexity are "
        "those at the end of the hour. The last three columns compare both layers "
        "after the same number of updates: as many as the slower layer made in its "
        "hour. They give the training perplexity over the last "
        f"{WINDOW * training.BATCHES_A_MEAN} of these updates, which read the same "
        "text in both runs, and the minutes that all of them took.\n\n"
        + table(
            [
                *("size", "layer", "epochs in the hour", "validation", "test"),
                *("updates", "training", "minutes"),
            ],
            rows,
        )
    )


def section_language(logs):
    rows = []
    for size in SIZES:
        if limited(logs, size):
            continue
        for normalize in ("none", "input"):
            log = logs.get(f"language_model-{size}-{normalize}")
            if log is None:
                continue
            rows.append(
                [
                    *(size, LABELS[normalize], len(log.rows)),
                    f"{log.best('perplexity'):.1f} / {log.best('val_perplexity'):.1f}",
                    f"{log.results[normalize]['test']:.1f}",
                ]
            )
    if not rows:
        return None
    limited_ones = section_limited(logs)
    return (
        "## Language models on Penn Treebank\n\n"
        "![Perplexity by epoch](figures/figure2_language_model.png)\n\n"
        "The models are those of Zaremba, Sutskever and Vinyals, with their training "
        "schedule. Statistics are frame-wise, because sequence-wise statistics include "
        "the words that the model is to predict. The table gives the best training and "
        "the best validation perplexity of all epochs. The training perplexity is the "
        "mean over an epoch, while the weights change. The test perplexity belongs to "
        "the last epoch, with exact population statistics of the training text.\n\n"
        + table(["size", "layer", "epochs", "training / validation", "test"], rows)
        + (f"\n\n{limited_ones}" if limited_ones else "")
        + f"\n\n{LARGE}"
    )


LARGE = (
    "The large model would take days on a CPU and has no run here. On a GPU, this "
    "command trains it with and without normalisation, 55 epochs each:\n\n"
    "```\npython examples/paper/language_model.py --size large --no-export\n```\n\n"
    "`--size medium` trains the medium model in full."
)


METRICS = ("frame_cross_entropy", "frame_error_rate")


def section_speech(logs):
    rows = []
    for part, suffix in (("new strings", ""), ("new speakers", "-speakers")):
        for normalize in ("none", "input"):
            found = seeds(logs, f"speech-{normalize}{suffix}")
            if not found:
                continue
            best = [
                spread([log.best(prefix + metric) for log in found])
                for metric in METRICS
                for prefix in ("", "val_")
            ]
            last = [
                spread([log.results["dev"][metric] for log in found])
                for metric in METRICS
            ]
            rows.append(
                [
                    *(part, LABELS[normalize], len(found), len(found[0].rows)),
                    f"{best[0]} / {best[1]}",
                    f"{best[2]} / {best[3]}",
                    f"{last[0]}, {last[1]}",
                ]
            )
    if not rows:
        return None
    return (
        "## Frames of speech\n\n"
        "![Cross-entropy and error by epoch](figures/figure1_speech.png)\n\n"
        "The Wall Street Journal corpus is licensed and not available here. The task "
        "here is of the same kind but far easier: strings of three to seven digits, "
        "spliced from recordings of the Free Spoken Digit Dataset. A model names one "
        "of 11 classes for each frame, from 123 log-mel features. It has five "
        "bidirectional layers of **32 units each way**, and an epoch reads every "
        "recording once. Training is stochastic gradient descent at rate 7.8e-4, "
        "momentum 0.5, batches of 64. Statistics are sequence-wise. The development "
        "strings are either new strings of the training speakers, or strings of two "
        "speakers that training leaves out. The figure shows the new strings, with "
        "seeds 2 and 3 as faint lines.\n\n"
        + table(
            [
                *("dev", "layer", "seeds", "epochs"),
                "best cross-entropy, training / dev",
                *(
                    "best error rate, training / dev",
                    "dev after the last epoch, exact statistics",
                ),
            ],
            rows,
        )
    )


def section_speakers(logs):
    """Whether recalibration on unlabelled strings of new speakers helps."""
    pairs = recalibrated_speakers(logs)
    if not pairs:
        return None
    columns = {
        "LSTM": [none.results["dev"] for none, _ in pairs],
        "BNLSTM, training speakers' statistics": [bn.results["dev"] for _, bn in pairs],
        "BNLSTM, recalibrated on the new speakers": [
            bn.results["dev_recalibrated"] for _, bn in pairs
        ],
    }
    rows = [
        [
            seed,
            *(
                " / ".join(f"{found[seed - 1][metric]:.3f}" for metric in METRICS)
                for found in columns.values()
            ),
        ]
        for seed in range(1, len(pairs) + 1)
    ]
    means = {
        title: [
            spread([one[metric] for one in found], "{:.3f}", "{:.3f}")
            for metric in METRICS
        ]
        for title, found in columns.items()
    }
    if len(pairs) > 1:
        rows.append(["mean ± sd", *(" / ".join(mean) for mean in means.values())])
    plain, before, after = (
        [one["frame_cross_entropy"] for one in found] for found in columns.values()
    )
    (lstm, _), (bn, _), (recalibrated, _) = means.values()
    lower = sum(a < b for a, b in zip(after, before, strict=True))
    below = sum(a < n for a, n in zip(after, plain, strict=True))
    best = [none.best("val_frame_cross_entropy") for none, _ in pairs]
    below_best = sum(a < n for a, n in zip(after, best, strict=True))
    return (
        "## New speakers: recalibration without labels\n\n"
        "Can a normalised model adapt to speakers that it has not heard? "
        "`recalibrate(model, strings)` replaces the population statistics of the "
        "training strings by those of the new speakers' strings. It changes no trained "
        "weight and reads no label. The statistics come from the strings that the "
        "model is then evaluated on, those of both held-out speakers together. The "
        "LSTM has no such statistics and is not adapted. The table gives cross-entropy "
        "in nats a frame / error rate on the development strings after the last "
        "epoch.\n\n"
        + table(["seed", *columns], rows)
        + "\n\nRecalibration on the new speakers lowers the cross-entropy of BNLSTM in "
        f"{lower} of {len(pairs)} seeds, from {bn} to {recalibrated} in the mean. "
        f"The recalibrated BNLSTM is better than the LSTM ({lstm}) in {below} of "
        f"{len(pairs)} seeds, and better than the LSTM at its best epoch in "
        f"{below_best} of {len(pairs)}."
    )


def recalibrated_speakers(logs):
    """Pairs of logs by speaker, plain and normalised, one for each seed."""
    return [
        (none, bn)
        for none, bn in zip(
            seeds(logs, "speech-none-speakers"),
            seeds(logs, "speech-input-speakers"),
            strict=False,
        )
        if "dev_recalibrated" in bn.results
    ]


def section_grid(logs):
    points = grid_points(logs)
    if not points:
        return None
    rows = [
        [rate, momentum, batch, f"{none:.3f}", f"{bn:.3f}", f"{none / bn:.2f}"]
        for (rate, momentum, batch), (none, bn) in points.items()
    ]
    return (
        "## Speech over a grid of learning rate, momentum and batch size\n\n"
        "![Curves of the grid](figures/figure3_grid.png)\n\n"
        "Two bidirectional layers of 32 units each way, ten epochs, one seed. The "
        "table gives the training cross-entropy of the tenth epoch.\n\n"
        + table(
            ["rate", "momentum", "batch", "LSTM", "BNLSTM", "ratio"],
            rows,
        )
    )


def grid_points(logs):
    """Dict from (rate, momentum, batch) to the last training cross-entropies."""
    points = {}
    for run in experiments.grid():
        *point, normalize = run.name.removeprefix("grid-").rsplit("-", 3)
        if run.name in logs:
            found = points.setdefault(tuple(point), {})
            found[normalize] = logs[run.name]["frame_cross_entropy"][-1]
    return {
        point: (found["none"], found["input"])
        for point, found in points.items()
        if len(found) == 2
    }


JOINT = {
    "language model, small": ("language_model-small-{}", "perplexity"),
    "speech, new strings": ("speech-{}", "frame_cross_entropy"),
    "digits, pixel by pixel": ("digits-{}", "loss"),
}


def section_joint(logs):
    rows, worse, compared = [], 0, 0
    for task, (name, metric) in JOINT.items():
        epochs, best = best_of_three(logs, name, metric)
        if not epochs:
            continue
        _, validation = best_of_three(logs, name, f"val_{metric}")
        pairs = list(zip(best["joint"], best["input"], strict=True))
        worse += sum(joint > alone for joint, alone in pairs)
        compared += len(pairs)
        cells = [f"{spread(best[n])} / {spread(validation[n])}" for n in LABELS]
        title = "perplexity" if metric == "perplexity" else "cross-entropy"
        rows.append([task, title, len(best["joint"]), epochs, *cells])
    if not rows:
        return None
    text = (
        "## Hidden-to-hidden normalisation\n\n"
        "![Curves of the three](figures/figure4_joint.png)\n\n"
        "The table gives the best training / validation value within the epochs that "
        "all three layers have. The figure shows the first seed.\n\n"
        + table(["task", "value", "seeds", "epochs", *LABELS.values()], rows)
        + "\n\nBNLSTM joint trains worse than BNLSTM, which normalises the "
        f"input-to-hidden term alone, in {worse} of {compared} comparisons."
    )
    language = logs.get("language_model-small-joint")
    if language:
        text += (
            "\n\nThe exact statistics of BNLSTM joint depend on themselves and take "
            "dozens of passes. For the language model they come from a tenth of the "
            f"training text. The test perplexity after {len(language.rows)} epochs is "
            f"{language.results['joint']['test']:.1f} with them."
        )
    return text


def best_of_three(logs, name, metric):
    """The best of each layer in as many epochs as all three layers have.

    Returns:
        The number of epochs and a dict from `normalize` to the best values of the
        seeds that all three layers have. 0 and an empty dict if there are none.
    """
    found = {n: seeds(logs, name.format(n)) for n in LABELS}
    count = min(len(of_layer) for of_layer in found.values())
    if not count:
        return 0, {}
    found = {n: of_layer[:count] for n, of_layer in found.items()}
    epochs = min(len(log.rows) for of_layer in found.values() for log in of_layer)
    return epochs, {
        n: [min(log[metric][:epochs]) for log in of_layer]
        for n, of_layer in found.items()
    }


STATISTICS = {
    "speech, new strings": (
        *("speech-input", "speech-input-frame"),
        "frame_cross_entropy",
    ),
    "digits, pixel by pixel": ("digits-input", "digits-frame", "loss"),
}


def section_statistics(logs):
    rows = []
    for task, (*both, metric) in STATISTICS.items():
        pairs = list(zip(*(seeds(logs, name) for name in both), strict=False))
        if pairs:
            cells = [
                " / ".join(
                    spread([log.best(prefix + metric) for log in of_kind])
                    for prefix in ("", "val_")
                )
                for of_kind in zip(*pairs, strict=True)
            ]
            rows.append([task, len(pairs), *cells])
    text = "## Frame-wise against sequence-wise statistics\n\n"
    if rows:
        text += (
            "![Curves of both](figures/figure5_statistics.png)\n\n"
            "The table gives the best training / validation cross-entropy. The figure "
            "shows the first seed.\n\n"
            + table(["task", "seeds", "sequence-wise", "frame-wise"], rows)
        )
    leak = logs.get("language_model-small-input-sequence")
    if leak and "language_model-small-input" in logs:
        frame_wise = logs["language_model-small-input"]
        epochs = min(len(leak.rows), len(frame_wise.rows))
        fair, last = frame_wise.rows[epochs - 1], leak.rows[epochs - 1]
        better = (
            "better"
            if last["val_perplexity"] < fair["val_perplexity"]
            else "not better"
        )
        text += (
            "\n\nIn a language model, the sequence-wise statistics of a training batch "
            "include the words that the model is to predict. Its training perplexity "
            "is therefore no fair measure. Validation uses population statistics, "
            "which come from the training text alone. "
            f"After {epochs} epochs the small model has a training / validation "
            f"perplexity of {fair['perplexity']:.1f} / {fair['val_perplexity']:.1f} "
            f"with frame-wise statistics and of {last['perplexity']:.1f} / "
            f"{last['val_perplexity']:.1f} with sequence-wise ones. In this one run "
            f"sequence-wise validation is {better}."
        )
    return text if rows or leak else None


def section_catching_up(logs):
    rows, _ = catching_up(logs)
    if not rows:
        return None
    return (
        "## Epochs and time until the baseline's best training value\n\n"
        "The training value is cross-entropy, or perplexity for language models. The "
        "baseline is the LSTM. Figures are mean ± standard deviation over seeds. Time "
        "is CPU time of training on one core, relative to the time that the baseline "
        "takes to its best value.\n\n"
        + table(
            [
                *("task", "seeds", "baseline's best", "its epoch"),
                *("BNLSTM reaches it in epoch", "relative time", "seeds that reach it"),
            ],
            rows,
        )
    )


def verdicts(logs):
    """A verdict on each claim of the paper, for each task."""
    claims = {
        "Normalising the input-to-hidden term speeds up training": (
            *claims_of_speed(logs),
        ),
        "Validation is no better with the input-to-hidden term normalised": (
            *claims_of_validation(logs),
        ),
        "Normalising the hidden-to-hidden term as well does not help training": (
            *claims_of_joint(logs),
        ),
    }
    tables = [
        f"### {claim}\n\n" + table(["task", "verdict", "figures"], rows)
        for claim, rows in claims.items()
        if rows
    ]
    if not tables:
        return None
    return (
        "## Verdicts on the paper's claims\n\n"
        "The headings below are the claims of the paper's abstract, which makes them "
        "for speech and language models. The digits are a further task. Layers are "
        "compared seed by seed. *Confirmed*: the claim is true in every seed. *Mixed*: "
        "it is true in some seeds. *Contradicted*: it is true in none.\n\n"
        + "\n\n".join(tables)
    )


def verdict(agrees, true, false, where="seeds"):
    """One word, and what the comparisons show.

    Args:
        agrees: For each comparison, whether the claim is true in it.
        true: What a comparison shows in which the claim is true, such as "faster".
        false: The opposite.
        where: What the comparisons are.
    """
    count, agreeing = len(agrees), sum(agrees)
    counted = f"in {agreeing or count} of {count} {where}" if count > 1 else "(one run)"
    if agreeing == count:
        return f"confirmed: {true} {counted}"
    if agreeing:
        return f"**mixed**: {true} {counted}"
    return f"**contradicted**: {false} {counted}"


def claims_of_speed(logs):
    for task, ratios in catching_up(logs)[1].items():
        times = [ratio for ratio in ratios if ratio is not None]
        figures = "BNLSTM never reaches the LSTM's best training value"
        if times:
            figures = (
                "BNLSTM reaches the LSTM's best training value in "
                f"{spread(times, '{:.2f}', '{:.2f}')} of its time"
            )
            if len(times) < len(ratios):
                figures += f", in {len(times)} of {len(ratios)} seeds"
        agrees = [ratio is not None and ratio < 1 for ratio in ratios]
        yield task, verdict(agrees, "faster", "not faster"), figures
    for size, (updates, ends) in at_equal_updates(logs).items():
        (none, none_s), (bn, bn_s) = ends["none"], ends["input"]
        yield (
            f"language model, {size}, first hour",
            verdict([bn < none], "faster", "not faster"),
            f"training perplexity {bn:.4g} with, {none:.4g} without after "
            f"{updates:,} updates, in {bn_s / none_s:.2f} of the time",
        )
    points = grid_points(logs)
    if points:
        ahead = [bn < none for none, bn in points.values()]
        ratios = [bn / none for none, bn in points.values()]
        yield (
            "speech, grid of settings",
            verdict(ahead, "ahead", "not ahead", "settings"),
            "training cross-entropy after ten epochs with normalisation is "
            f"{min(ratios):.2f} to {max(ratios):.2f} of that without",
        )


def claims_of_validation(logs):
    tasks = {
        "speech, new strings": ("speech-{}", "val_frame_cross_entropy"),
        "speech, new speakers": ("speech-{}-speakers", "val_frame_cross_entropy"),
        "digits, pixel by pixel": ("digits-{}", "val_loss"),
        **{
            f"language model, {size}": (f"language_model-{size}-{{}}", "val_perplexity")
            for size in SIZES
            if not limited(logs, size)
        },
    }
    for task, (name, metric) in tasks.items():
        pairs = zip(
            *(seeds(logs, name.format(n)) for n in ("none", "input")), strict=False
        )
        best = [(none.best(metric), bn.best(metric)) for none, bn in pairs]
        if best:
            without, with_it = zip(*best, strict=True)
            title = "perplexity" if "perplexity" in metric else "cross-entropy"
            yield (
                task,
                verdict([bn >= none for none, bn in best], "no better", "better"),
                f"best validation {title} {spread(with_it)} with, "
                f"{spread(without)} without",
            )


def claims_of_joint(logs):
    for task, (name, metric) in JOINT.items():
        epochs, best = best_of_three(logs, name, metric)
        if epochs:
            agrees = [
                joint >= none
                for joint, none in zip(best["joint"], best["none"], strict=True)
            ]
            title = "perplexity" if metric == "perplexity" else "cross-entropy"
            yield (
                task,
                verdict(agrees, "no better than the LSTM", "better than the LSTM"),
                f"best training {title} {spread(best['joint'])} with both terms, "
                f"{spread(best['input'])} with input-to-hidden alone, "
                f"{spread(best['none'])} without, in {epochs} epochs",
            )


def section_conditions(logs):
    groups = {}
    for run in experiments.runs():
        groups.setdefault(run.group, []).append(run.name)
    missing = []
    for group, names in groups.items():
        absent = [name for name in names if name not in logs]
        if len(absent) == len(names):
            missing.append(f"all {len(names)} of {group}")
        elif absent:
            missing.append(f"of {group} {', '.join(absent)}")
    machines = {
        "; ".join(f"{v} core" if k == "cores" else v for k, v in machine.items())
        for machine in (log.record["machine"] for log in logs.values())
    }
    text = "## Conditions\n\n" + "\n".join(f"- {m}" for m in sorted(machines))
    if missing:
        text += f"\n- Runs without a log: {'; '.join(missing)}."
    return text


if __name__ == "__main__":
    sys.exit(main())
