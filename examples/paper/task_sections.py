"""Sections of the results page on the language models and on speech."""

import run_log
from comparisons import SIZES, at_equal_updates, recalibrated_speakers
from logs import WINDOW, limited, seeds
from options import LABELS
from tables import spread, table

LARGE = (
    "The large model would take days on a CPU and has no run here. On a GPU, this "
    "command trains it with and without normalisation, 55 epochs each:\n\n"
    "```\npython examples/paper/language_model.py --size large --no-export\n```\n\n"
    "`--size medium` trains the medium model in full."
)
METRICS = ("frame_cross_entropy", "frame_error_rate")


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
        f"{WINDOW * run_log.BATCHES_A_MEAN} of these updates, which read the same "
        "text in both runs, and the minutes that all of them took.\n\n"
        + table(
            [
                *("size", "layer", "epochs in the hour", "validation", "test"),
                *("updates", "training", "minutes"),
            ],
            rows,
        )
    )


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
