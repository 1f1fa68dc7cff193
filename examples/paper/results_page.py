"""The results page, docs/experiments.md, from the published logs."""

import run_list
from comparisons import (
    JOINT,
    STATISTICS,
    best_of_three,
    catching_up,
    grid_points,
)
from logs import seeds
from options import LABELS
from tables import spread, table
from task_sections import section_language, section_speakers, section_speech
from verdicts import verdicts

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


def results_page(logs):
    sections = [
        INTRODUCTION,
        *(verdicts(logs), section_language(logs), section_speech(logs)),
        *(section_speakers(logs), section_grid(logs), section_joint(logs)),
        *(section_statistics(logs), section_catching_up(logs)),
        section_conditions(logs),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


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


def section_conditions(logs):
    groups = {}
    for run in run_list.runs():
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
