"""The published logs of runs, read from docs/experiments/."""

import json
import math
import statistics

import run_list
import run_log

WINDOW = 4  # number of means to average, so that noisy curves are readable


def read_logs(folder):
    """Returns a dict from name to `Log`, for the runs with a log."""
    logs = {}
    for run in run_list.runs():
        if run_list.is_published(run, folder):
            text = (folder / f"{run.name}.json").read_text(encoding="utf-8")
            logs[run.name] = Log(json.loads(text))
    return logs


class Log:
    """A published run.

    Args:
        record: The dict that `experiments.publish` writes.
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
        """Returns the first epoch at which the metric is at most `value`, or `None`."""
        epochs = (row["epoch"] for row in self.rows if row[metric] <= value)
        return next((int(epoch) for epoch in epochs), None)

    def cpu_seconds(self, epoch):
        """Returns the CPU seconds of training up to the end of an epoch."""
        return sum(row["cpu_seconds"] for row in self.rows if row["epoch"] <= epoch)

    @property
    def stopped(self):
        """Whether `--hours` ended the run before its last epoch."""
        return "part" in self.rows[-1]

    @property
    def ends(self):
        """The end of each row in epochs; the last one may be a fraction."""
        return [row["epoch"] - 1 + row.get("part", 1) for row in self.rows]

    def within(self, timesteps):
        """The course of training within the epochs of a run with `--hours`.

        Returns:
            List of `(updates, cpu_seconds, perplexity)`, one for each mean over
            `run_log.BATCHES_A_MEAN` updates, all counted from the start.
        """
        points, updates, seconds = [], 0, 0.0
        for row in self.rows:
            there = row["iterations"] - updates
            for number, loss in enumerate(row["losses"], 1):
                batches = number * run_log.BATCHES_A_MEAN
                points.append(
                    (
                        updates + batches,
                        seconds + row["cpu_seconds"] * batches / there,
                        math.exp(loss / timesteps),
                    )
                )
            updates, seconds = row["iterations"], seconds + row["cpu_seconds"]
        return points


def seeds(logs, prefix):
    """The logs PREFIX-1, PREFIX-2, ... that are there, or the only one, PREFIX."""
    if prefix in logs:
        return [logs[prefix]]
    found, seed = [], 1
    while f"{prefix}-{seed}" in logs:
        found.append(logs[f"{prefix}-{seed}"])
        seed += 1
    return found


def limited(logs, size):
    """Whether `--hours` ended a run of a language model's size."""
    names = (f"language_model-{size}-{n}" for n in ("none", "input"))
    return any(logs[name].stopped for name in names if name in logs)


def smoothed(log):
    """`Log.within`, with perplexities averaged over the last `WINDOW` means."""
    points = log.within(log.record["configuration"]["timesteps"])
    for last in range(WINDOW, len(points) + 1):
        logarithms = [math.log(value) for *_, value in points[last - WINDOW : last]]
        yield (*points[last - 1][:2], math.exp(statistics.mean(logarithms)))
