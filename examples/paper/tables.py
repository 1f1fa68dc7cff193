"""Markdown tables and their figures."""

import statistics


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, form="{:.3g}", deviation="{:.1g}"):
    """Mean and standard deviation over seeds, or the value of a single seed."""
    mean = form.format(statistics.mean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {deviation.format(statistics.stdev(values))}"
