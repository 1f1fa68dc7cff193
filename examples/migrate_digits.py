"""Migrates a trained LSTM to batch normalisation, and fine-tunes it.

The program trains a stock LSTM to classify scikit-learn's images of digits. The 8 rows
of an image are the timesteps. `normalize_model` makes a batch-normalised copy. Both
models train for the same number of further epochs, with new optimizers of the same
settings. The normalised model is folded to stock layers at the end. The program prints
the test accuracy and the losses of each stage, as means over several seeds, and the
largest difference of the outputs before and after each conversion. This takes a few
minutes.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_bnrnn

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(
        f"error: {error} (the examples need `pip install 'keras-bnrnn[examples]'`)"
    ) from error

STAGES = ["stock, trained", "migrated", "stock, trained on", "migrated, fine-tuned"]
STAGES.append("migrated, fine-tuned, folded")
LARGEST_GAP = 1e-4  # of probabilities computed in float32 by two models


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--units", type=int, default=64, help="units of the LSTM (default: 64)")
    add("--epochs", type=int, default=10, help="before the migration (default: 10)")
    add("--more-epochs", type=int, default=10, help="after it (default: 10)")
    add("--learning-rate", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    add("--batch-size", type=int, default=32, help="rows of a batch (default: 32)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: 1-5)")
    add("--smoke", action="store_true", help="4 units, one seed, 1 epoch: a trial")
    options = parser.parse_args(argv)
    if options.smoke:
        options.units, options.seeds = 4, options.seeds[:1]
        options.epochs = options.more_epochs = 1

    results, gaps = [], []
    for seed in options.seeds:
        measured, differences = run(seed, options)
        results.append([measured[stage] for stage in STAGES])
        gaps.append(differences)
        accuracies = ", ".join(f"{s} {measured[s][0]:.4f}" for s in STAGES)
        print(f"seed {seed}: test accuracy: {accuracies}")
    report(np.array(results), np.array(gaps))
    if np.max(gaps) > LARGEST_GAP:
        print("error: a conversion changed the outputs", file=sys.stderr)
        return 1
    return 0


def run(seed, options):
    """Trains, migrates and trains on.

    Returns:
        Dict from each of `STAGES` to the test accuracy, test loss and training loss.
        List of the largest difference of the outputs before and after the migration,
        and before and after folding.
    """
    train, test = digits(seed)
    keras.utils.set_random_seed(seed)
    stock = build_model(options)
    fit(stock, train, options, options.epochs, seed)
    measured = {STAGES[0]: evaluate(stock, train, test)}

    normalized = keras_bnrnn.normalize_model(stock, train[0], verbose=0)
    measured[STAGES[1]] = evaluate(normalized, train, test)
    differences = [gap(stock, normalized, test[0])]
    for model, stage in ((stock, STAGES[2]), (normalized, STAGES[3])):
        compile_model(model, options)  # a new optimizer for both
        fit(model, train, options, options.more_epochs, seed + 1)
        if model is normalized:
            keras_bnrnn.recalibrate(normalized, train[0], verbose=0)
        measured[stage] = evaluate(model, train, test)

    folded = keras_bnrnn.fold(normalized)
    measured[STAGES[4]] = evaluate(folded, train, test)
    differences.append(gap(normalized, folded, test[0]))
    return measured, differences


def digits(seed):
    """Returns training and test data: images (N, 8, 8) in [0, 1] and labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype("float32") / 16.0
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.3, random_state=seed, stratify=labels
    )
    return (x, y), (x_test, y_test)


def build_model(options):
    model = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.LSTM(options.units, return_sequences=True),
            keras.layers.LSTM(options.units),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    compile_model(model, options)
    return model


def compile_model(model, options):
    optimizer = keras.optimizers.Adam(options.learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])


def fit(model, data, options, epochs, seed):
    keras.utils.set_random_seed(seed)  # both models see the batches in one order
    model.fit(*data, batch_size=options.batch_size, epochs=epochs, verbose=0)


def evaluate(model, train, test):
    """Returns test accuracy, test loss and training loss."""
    test_loss, accuracy = model.evaluate(*test, batch_size=256, verbose=0)
    train_loss, _ = model.evaluate(*train, batch_size=256, verbose=0)
    return accuracy, test_loss, train_loss


def gap(one, other, x):
    return np.max(np.abs(one.predict(x, verbose=0) - other.predict(x, verbose=0)))


def report(results, gaps):
    """Prints means and deviations over the seeds, as a table of Markdown."""
    seeds = len(results)
    print(f"\nMean and standard deviation of {seeds} seed(s)\n")
    print("| model | test accuracy | test loss | training loss |")
    print("|---|---|---|---|")
    for number, stage in enumerate(STAGES):
        means = results[:, number].mean(axis=0)
        deviations = results[:, number].std(axis=0, ddof=1 if seeds > 1 else 0)
        cells = [f"{m:.4f} ± {d:.4f}" for m, d in zip(means, deviations, strict=True)]
        print(f"| {stage} | {' | '.join(cells)} |")
    wins = int(np.sum(results[:, 3, 0] > results[:, 2, 0]))
    print(f"\nFine-tuned above trained on in test accuracy: {wins} of {seeds} seed(s)")
    migration, folding = gaps.max(axis=0)
    print(
        f"Largest difference of outputs: migration {migration:.1e}, fold {folding:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
