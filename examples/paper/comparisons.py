"""Comparisons of published runs, for the figures and the results page."""

import run_list
from logs import limited, seeds, smoothed
from options import LABELS
from tables import spread

SIZES = ("small", "medium")
JOINT = {
    "language model, small": ("language_model-small-{}", "perplexity"),
    "speech, new strings": ("speech-{}", "frame_cross_entropy"),
    "digits, pixel by pixel": ("digits-{}", "loss"),
}
STATISTICS = {
    "speech, new strings": (
        *("speech-input", "speech-input-frame"),
        "frame_cross_entropy",
    ),
    "digits, pixel by pixel": ("digits-input", "digits-frame", "loss"),
}


def catching_up(logs):
    """Finds when the normalised model reaches the baseline's best training value.

    Returns:
        List of rows of a table, and a dict from each task to the ratio of CPU times of
        each seed. The ratio is `None` if the normalised model never reaches the value.
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


def grid_points(logs):
    """Dict from (rate, momentum, batch) to the last training cross-entropies."""
    points = {}
    for run in run_list.grid():
        *point, normalize = run.name.removeprefix("grid-").rsplit("-", 3)
        if run.name in logs:
            found = points.setdefault(tuple(point), {})
            found[normalize] = logs[run.name]["frame_cross_entropy"][-1]
    return {
        point: (found["none"], found["input"])
        for point, found in points.items()
        if len(found) == 2
    }


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
