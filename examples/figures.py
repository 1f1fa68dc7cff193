"""Figures and results page from the logs in docs/experiments/: `make figures`.

Nothing is trained. What a log is missing for is left out of its figure and named on
the page.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import experiments
import matplotlib
import training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = pathlib.Path(__file__).parent.parent / "docs"
COLORS = {"none": "tab:gray", "input": "tab:blue", "joint": "tab:orange"}
LABELS = {"none": "LSTM", "input": "BNLSTM", "joint": "BNLSTM joint"}
SIZES = ("small", "medium")
# The best training and validation figures of Laurent et al., as recalled.
RECALLED_PERPLEXITIES = {
    "small": ((78.5, 119.2), (62.5, 120.9)),
    "medium": ((49.1, 89.0), (41.0, 90.6)),
}
RECALLED_SPEECH = {"none": (0.95, 1.11, 0.28, 0.33), "input": (0.73, 1.19, 0.22, 0.34)}


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
        """Of training, up to the end of an epoch."""
        return sum(row["cpu_seconds"] for row in self.rows if row["epoch"] <= epoch)

    @property
    def stopped(self):
        """Whether its hours were over before its epochs."""
        return "part" in self.rows[-1]

    @property
    def ends(self):
        """Epochs from the start to the end of each row: the last may be cut short."""
        return [row["epoch"] - 1 + row.get("part", 1) for row in self.rows]

    def within(self, timesteps):
        """How training went between the ends of epochs, of a run that had hours.

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
    """Dict from name to `Log` of what is published of today's list of runs."""
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
    """Training whole, validation dashed."""
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
    """Training as it went, validation where an epoch ended or was cut short."""
    points = [(seconds / 60, value) for _, seconds, value in smoothed(log)]
    axes.plot(*zip(*points, strict=True), color=color, label=f"{label}, training")
    minutes = [log.cpu_seconds(row["epoch"]) / 60 for row in log.rows]
    axes.plot(
        *(minutes, log["val_perplexity"], "o--"),
        **{"color": color, "label": f"{label}, validation"},
    )
    axes.grid(alpha=0.3)


def limited(logs, size):
    """Whether a run of a language model's size was stopped after its hours."""
    names = (f"language_model-{size}-{n}" for n in ("none", "input"))
    return any(logs[name].stopped for name in names if name in logs)


WINDOW = 4  # means; as many as make a noisy curve of text readable


def smoothed(log):
    """`within`, each perplexity that of the last `WINDOW` means together."""
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
            papers = (rate, momentum, batch) == ("7.8e-4", "0.5", "64")
            axes.set_title(
                title + (" (the paper's)" if papers else ""),
                fontsize=9,
                fontweight="bold" if papers else "normal",
            )
        row[0].set_ylabel("nats a frame")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    panels[0][0].legend(fontsize=8)
    return figure


def figure4(logs):
    """The hidden-to-hidden normalisation beside the other two."""
    tasks = {
        title: (name, metric)
        for title, (name, metric) in JOINT.items()
        if all(name.format(normalize) in logs for normalize in LABELS)
    }
    if not tasks:
        return None
    figure, panels = plt.subplots(
        *(1, len(tasks)),
        **{"figsize": (1 + 4 * len(tasks), 4), "squeeze": False},
        layout="constrained",
    )
    for axes, (title, (name, metric)) in zip(panels[0], tasks.items(), strict=True):
        shown = {n: logs[name.format(n)] for n in LABELS}
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
    """Statistics of each timestep beside those of whole sequences."""
    tasks = {
        "speech": ("speech-input-1", "speech-input-frame-1", "frame_cross_entropy"),
        "digits, pixel by pixel": ("digits-input-1", "digits-frame-1", "loss"),
    }
    tasks = {k: v for k, v in tasks.items() if v[0] in logs and v[1] in logs}
    if not tasks:
        return None
    figure, panels = plt.subplots(
        *(1, len(tasks)),
        **{"figsize": (1 + 4.5 * len(tasks), 4), "squeeze": False},
        layout="constrained",
    )
    for axes, (title, names) in zip(panels[0], tasks.items(), strict=True):
        *both, metric = names
        for name, label, color in zip(
            both, ("sequence-wise", "frame-wise"), ("tab:blue", "tab:red"), strict=True
        ):
            curves(axes, logs[name], metric, label, color)
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
    """Mean and standard deviation over seeds; of a single one, the value."""
    mean = form.format(statistics.mean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {deviation.format(statistics.stdev(values))}"


def catching_up(logs):
    """When the normalised model is where the baseline gets at best, in training.

    Returns:
        List of rows of a table, and for each task the ratios of CPU time by seed
        (None where it never gets there).
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
        best, epochs, caught, times, reached = [], [], [], [], 0
        for baseline, other in pairs:
            least = baseline.best(metric)
            epoch, there = baseline.reaches(metric, least), other.reaches(metric, least)
            best.append(least)
            epochs.append(epoch)
            if there is not None:
                reached += 1
                caught.append(there)
                times.append(other.cpu_seconds(there) / baseline.cpu_seconds(epoch))
        ratios[task] = times if reached == len(pairs) else None
        rows.append(
            [
                *(task, len(pairs), spread(best), spread(epochs, "{:.1f}", "{:.1f}")),
                spread(caught, "{:.1f}", "{:.1f}") if caught else "never",
                spread(times, "{:.2f}", "{:.2f}") if times else "never",
                f"{reached} of {len(pairs)}",
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
LSTMs on the Wall Street Journal corpus and on Penn Treebank, with batch normalisation
of the input-to-hidden term and without. Here is what came when this package did the
same. `make experiments` makes the runs (many hours on two cores; each is made once, and
goes on where it was if it is interrupted), `make figures` draws the figures and writes
this page from the logs in [experiments/](experiments/), each of which names its
command. Figures of the paper are quoted as recalled: they were not checked against the
publication."""


def at_equal_updates(logs):
    """How far training was where the slower of two runs that had hours was stopped.

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
        for number, normalize in enumerate(("none", "input")):
            log = logs.get(f"language_model-{size}-{normalize}")
            if log is None:
                continue
            recalled = RECALLED_PERPLEXITIES[size][number]
            rows.append(
                [
                    *(size, LABELS[normalize], len(log.rows)),
                    f"{log.best('perplexity'):.1f} / {log.best('val_perplexity'):.1f}",
                    f"{log.results[normalize]['test']:.1f}",
                    "{:.1f} / {:.1f}".format(*recalled),
                ]
            )
    if not rows:
        return None
    limited_ones = section_limited(logs)
    return (
        "## Figure 2: language models on Penn Treebank\n\n"
        "![Perplexity by epoch](figures/figure2_language_model.png)\n\n"
        "The models of Zaremba, Sutskever and Vinyals, trained as they were; "
        "frame-wise statistics, for sequence-wise ones would see the words to come. "
        "Best training and validation perplexity of all epochs; the training figure is "
        "the mean over an epoch while the weights change. The test perplexity is that "
        "of the last epoch, with exact population statistics of the training text.\n\n"
        + table(
            [
                *("size", "layer", "epochs", "training / validation", "test"),
                "the paper's, recalled",
            ],
            rows,
        )
        + (f"\n\n{limited_ones}" if limited_ones else "")
        + f"\n\n{LARGE}"
    )


LARGE = (
    "The large model would take days on a CPU and has no run here. On a GPU, this "
    "command trains it with and without normalisation, 55 epochs each:\n\n"
    "```\npython examples/language_model.py --size large --no-export\n```\n\n"
    "`--size medium` trains the medium model in full."
)


METRICS = ("frame_cross_entropy", "frame_error_rate")


def section_speech(logs):
    rows = []
    for part, suffix in (("official", ""), ("by speaker", "-speakers")):
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
            recalled = RECALLED_SPEECH[normalize] if not suffix else ()
            rows.append(
                [
                    *(part, LABELS[normalize], len(found), len(found[0].rows)),
                    f"{best[0]} / {best[1]}",
                    f"{best[2]} / {best[3]}",
                    f"{last[0]}, {last[1]}",
                    "{} / {}, {} / {}".format(*recalled) if recalled else "-",
                ]
            )
    if not rows:
        return None
    return (
        "## Figure 1: frames of speech\n\n"
        "![Cross-entropy and error by epoch](figures/figure1_speech.png)\n\n"
        "The Wall Street Journal corpus is licensed and not here. The task of the same "
        "kind: strings of three to seven digits spliced from the Free Spoken Digit "
        "Dataset, 11 classes of frames, 123 log-mel features a frame, five "
        "bidirectional layers, stochastic gradient descent at rate 7.8e-4, momentum "
        "0.5, batches of 64. The layers are **32 units wide each way, not 250**, and "
        "every recording is heard once an epoch: what two cores can do. Sequence-wise "
        "statistics. Faint lines in the figure are further seeds. Numbers are not "
        "comparable with the paper's, whose corpus is far harder; directions are.\n\n"
        + table(
            [
                *("split", "layer", "seeds", "epochs"),
                "best cross-entropy, training / dev",
                *(
                    "best error rate, training / dev",
                    "dev at the end, exact statistics",
                ),
                "the paper's, recalled (WSJ)",
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
        "## Figure 3: learning rate x momentum x batch size\n\n"
        "![Curves of the grid](figures/figure3_grid.png)\n\n"
        "Two bidirectional layers of 32 units, ten epochs. Training cross-entropy of "
        "the tenth:\n\n"
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
    "speech": ("speech-{}-1", "frame_cross_entropy"),
    "digits, pixel by pixel": ("digits-{}-1", "loss"),
}


def section_joint(logs):
    rows = []
    for task, (name, metric) in JOINT.items():
        if not all(name.format(normalize) in logs for normalize in LABELS):
            continue
        epochs, best = best_of_three(logs, name, metric)
        validation = best_of_three(logs, name, f"val_{metric}")[1]
        cells = [f"{best[n]:.3g} / {validation[n]:.3g}" for n in LABELS]
        rows.append([task, metric.replace("_", " "), epochs, *cells])
    if not rows:
        return None
    return (
        "## The negative result: hidden-to-hidden\n\n"
        "![Curves of the three](figures/figure4_joint.png)\n\n"
        '`normalize="joint"` is `BN(W x_t + U h_{t-1})`. Best training / '
        "validation of as many epochs as all three have:\n\n"
        + table(["task", "of", "epochs", *LABELS.values()], rows)
    )


def best_of_three(logs, name, metric):
    """The number of epochs that all three layers have, and the best of each in them."""
    found = {n: logs[name.format(n)] for n in LABELS}
    epochs = min(len(log.rows) for log in found.values())
    return epochs, {n: min(log[metric][:epochs]) for n, log in found.items()}


def section_statistics(logs):
    rows = []
    pairs = {
        "speech": ("speech-input-1", "speech-input-frame-1", "frame_cross_entropy"),
        "digits, pixel by pixel": ("digits-input-1", "digits-frame-1", "loss"),
    }
    for task, (sequence, frame, metric) in pairs.items():
        if sequence in logs and frame in logs:
            cells = [
                f"{logs[n].best(metric):.3g} / {logs[n].best('val_' + metric):.3g}"
                for n in (sequence, frame)
            ]
            rows.append([task, *cells])
    text = "## Frame-wise against sequence-wise statistics\n\n"
    if rows:
        text += (
            "![Curves of both](figures/figure5_statistics.png)\n\n"
            "Best training / validation cross-entropy:\n\n"
            + table(["task", "sequence-wise", "frame-wise"], rows)
        )
    leak = logs.get("language_model-small-input-sequence")
    if leak and "language_model-small-input" in logs:
        epochs = len(leak.rows)
        fair = logs["language_model-small-input"].rows[epochs - 1]
        last = leak.rows[-1]
        text += (
            "\n\nIn a language model sequence-wise statistics take in the words that "
            f"are to be predicted. The small model after {epochs} epochs, training / "
            "validation perplexity: frame-wise "
            f"{fair['perplexity']:.1f} / {fair['val_perplexity']:.1f}, sequence-wise "
            f"{last['perplexity']:.1f} / {last['val_perplexity']:.1f}."
        )
    return text if rows or leak else None


def section_catching_up(logs):
    rows, _ = catching_up(logs)
    if not rows:
        return None
    return (
        "## Epochs and time until the baseline's best training criterion\n\n"
        "The criterion is training cross-entropy (perplexity for language models). "
        "Mean ± standard deviation over seeds; time is that of one core, training "
        "alone, against what the baseline took to its best.\n\n"
        + table(
            [
                *("task", "seeds", "baseline's best", "its epoch"),
                *("BNLSTM is there at epoch", "time, of the baseline's", "got there"),
            ],
            rows,
        )
    )


def verdicts(logs):
    """Where the paper's claims hold, where not, by how much."""
    lines = []

    def say(claim, holds, figures):
        lines.append([claim, "holds" if holds else "**does not hold**", figures])

    _, ratios = catching_up(logs)
    for task, times in ratios.items():
        if times is None:
            say(f"faster in training: {task}", False, "the baseline's best is not met")
        else:
            taken = spread(times, "{:.2f}", "{:.2f}")
            say(
                f"faster in training: {task}",
                max(times) < 1,
                f"the baseline's best after {taken} of its time",
            )
    for size, (updates, ends) in at_equal_updates(logs).items():
        (none, none_s), (bn, bn_s) = ends["none"], ends["input"]
        say(
            f"faster in training: language model, {size}, in the first hour",
            bn < none,
            f"training {bn:.4g} with it, {none:.4g} without, after {updates:,} updates "
            f"each; they took {bn_s / none_s:.2f} of the time",
        )
    validations = {
        "speech, new strings": ("speech-{}", "val_frame_cross_entropy"),
        "speech, new speakers": ("speech-{}-speakers", "val_frame_cross_entropy"),
        "digits, pixel by pixel": ("digits-{}", "val_loss"),
        **{
            f"language model, {size}": (f"language_model-{size}-{{}}", "val_perplexity")
            for size in SIZES
            if not limited(logs, size)
        },
    }
    for task, (name, metric) in validations.items():
        best = {
            n: [log.best(metric) for log in seeds(logs, name.format(n))]
            for n in ("none", "input")
        }
        if all(best.values()):
            say(
                f"does not generalise better by itself: {task}",
                statistics.mean(best["input"]) >= statistics.mean(best["none"]),
                f"best validation {spread(best['input'])} with it, "
                f"{spread(best['none'])} without",
            )
    points = grid_points(logs)
    if points:
        ahead = sum(bn < none for none, bn in points.values())
        say(
            "faster over the whole grid",
            ahead == len(points),
            f"ahead at {ahead} of {len(points)} points",
        )
    for task, (name, metric) in JOINT.items():
        if all(name.format(n) in logs for n in LABELS):
            epochs, best = best_of_three(logs, name, metric)
            say(
                f"hidden-to-hidden normalisation does not help: {task}",
                best["joint"] >= best["none"],
                f"best training {best['joint']:.3g} with it, {best['none']:.3g} "
                f"without any, {best['input']:.3g} with input-to-hidden alone, in "
                f"{epochs} epochs",
            )
    if not lines:
        return None
    return "## What holds\n\n" + table(["claim of the paper", "here", "figures"], lines)


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
