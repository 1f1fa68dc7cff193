"""Verdicts on the claims of the paper: a section of the results page."""

from comparisons import (
    JOINT,
    SIZES,
    at_equal_updates,
    best_of_three,
    catching_up,
    grid_points,
)
from logs import limited, seeds
from tables import spread, table


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
