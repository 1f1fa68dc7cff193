"""The paper's language models on Penn Treebank, with and without normalisation.

The models are the small, medium and large word-level LSTMs of Zaremba, Sutskever and
Vinyals, "Recurrent Neural Network Regularization" (arXiv 1409.2329), which Laurent et
al. normalised. Training is their gradient descent with their schedule: each row of a
batch continues the text of the same row of the batch before, and the states are carried
over.

The program trains a model for each value of --normalize, prints perplexities, computes
exact population statistics, and writes the perplexities of the validation and test
text to results.json. It exports the last model, folded into stock layers, with
signatures that take text. After a kill, a restart continues the run and ends with the
same curve.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import options
import penn_treebank
import training
from zaremba_models import SIZES, build_model, copy_weights

import keras_bnrnn

MODEL_NAME = "language_model"
CONFIGURATION = {  # the arguments that training depends on
    *("size", "statistics", "units", "timesteps", "learning_rate", "dropout"),
    *("batch_size", "vocabulary_size", "seed", "smoke"),
}


def main(argv=None):
    arguments = parse_arguments(argv)
    output = pathlib.Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    texts = penn_treebank.read(arguments.data_dir or penn_treebank.download())
    if arguments.smoke:
        texts = {part: sentences[:150] for part, sentences in texts.items()}
    vocabulary = penn_treebank.Vocabulary.of(
        texts["train"], arguments.vocabulary_size, output
    )
    tokens = {part: vocabulary.encode(text) for part, text in texts.items()}
    print(
        "Tokens: "
        + ", ".join(f"{part} {len(ids):,}" for part, ids in tokens.items())
        + f"; {vocabulary.size:,} types"
    )

    results = {}
    for normalize in arguments.normalize:
        keras.utils.set_random_seed(arguments.seed)
        model = build_model(vocabulary.size, normalize, arguments)
        rows = train(model, normalize, tokens, arguments)
        results[normalize] = evaluate(model, normalize, tokens, arguments)
    training.write_results(output, results)
    if not arguments.no_export:
        provenance = {
            "perplexity": results[normalize],
            "epochs": rows,
            "arguments": vars(arguments),
        }
        export(model, normalize, vocabulary, provenance, arguments)
    return 0


def parse_arguments(argv):
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="model size (default: small)")
    add(
        "--normalize",
        choices=options.LABELS,
        nargs="+",
        default=["none", "input"],
        help="normalised terms, one model for each; none: keras.layers.LSTM "
        "(default: none input)",
    )
    options.add_statistics(
        parser,
        default="frame",
        note="; sequence-wise statistics include the words to predict",
    )
    add(
        "--data-dir",
        help="folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt (default: "
        "downloaded)",
    )
    options.add_run(parser, output_dir="runs/language_model", epochs=None)
    add("--units", type=options.positive, help="units of a layer (default: by size)")
    add(
        "--timesteps",
        type=options.positive,
        help="words in a row of a batch (default: by size)",
    )
    add(
        "--learning-rate",
        type=options.positive_float,
        help="first learning rate (default: by size)",
    )
    add(
        "--dropout",
        type=options.fraction,
        help="dropout rate between layers (default: by size)",
    )
    options.add_batch_size(parser, unit="rows of text", default=20)
    add(
        "--vocabulary-size",
        type=options.positive,
        default=10_000,
        help="number of words to keep (default: 10000)",
    )
    add("--no-export", action="store_true", help="train and evaluate only")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.epochs = arguments.epochs or 1
        arguments.units, arguments.batch_size = 8, 8
    for name in ("epochs", "units", "timesteps", "learning_rate", "dropout"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(SIZES[arguments.size], name))
    return arguments


class Perplexity(keras.callbacks.Callback):
    """Adds the perplexity per word to the logs of an epoch."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps

    def on_epoch_end(self, epoch, logs=None):
        for prefix in ("", "val_"):
            loss = logs[f"{prefix}loss"] / self.timesteps
            logs[f"{prefix}perplexity"] = float(np.exp(loss))


class TextFromItsStart(keras.callbacks.Callback):
    """Resets the states of stateful layers before each reading of a text."""

    def on_epoch_begin(self, epoch, logs=None):
        self._reset()

    def on_test_begin(self, logs=None):
        self._reset()

    def _reset(self):
        for layer in self.model.layers:
            if getattr(layer, "stateful", False):
                layer.reset_states()


def train(model, normalize, tokens, arguments):
    """Trains the model by the schedule of its size.

    Returns:
        The log's rows, a dict for each epoch.
    """
    print(f"\n{options.LABELS[normalize]}: {model.count_params():,} weights")
    size = SIZES[arguments.size]

    def learning_rate(epoch):
        decays = max(epoch + 1 - size.constant_epochs, 0)
        return arguments.learning_rate * size.decay**decays

    rows = training.fit(
        model,
        batches(tokens["train"], arguments),
        batches(tokens["valid"], arguments),
        folder=pathlib.Path(arguments.output_dir) / normalize,
        epochs=arguments.epochs,
        seed=arguments.seed,
        configuration={
            **{name: getattr(arguments, name) for name in sorted(CONFIGURATION)},
            "normalize": normalize,
            "text": {part: len(ids) for part, ids in tokens.items()},
        },
        callbacks=[
            keras.callbacks.LearningRateScheduler(learning_rate),
            TextFromItsStart(),
            Perplexity(arguments.timesteps),
        ],
        hours=arguments.hours,
    )
    columns = {"perplexity": "train perplexity", "val_perplexity": "valid perplexity"}
    training.print_table(rows, columns, "20.1f")
    return rows


def batches(ids, arguments):
    return penn_treebank.batches(ids, arguments.batch_size, arguments.timesteps)


def evaluate(model, normalize, tokens, arguments):
    """Evaluates the model with exact population statistics.

    Returns:
        Dict from `valid` and `test` to the perplexity of that text.
    """
    from_its_start = TextFromItsStart()
    if normalize != "none":
        data, part = batches(tokens["train"], arguments), "the training text"
        if normalize == "joint":
            # Its statistics depend on themselves and take dozens of passes.
            data = data.take(max(int(data.cardinality()) // 10, 1))
            part = f"a tenth of {part}"
        print(f"Exact population statistics of {part}")
        from_its_start.set_model(model)
        from_its_start.on_test_begin()
        moved = keras_bnrnn.recalibrate(model, data)
        for name, by in moved.items():
            print(
                f"  {name}: means moved by up to {by['mean']:.2f} standard deviations"
            )
    perplexities = {}
    for part in ("valid", "test"):
        loss = model.evaluate(
            batches(tokens[part], arguments), callbacks=[from_its_start], verbose=0
        )
        perplexities[part] = float(np.exp(loss / arguments.timesteps))
        print(f"Perplexity of the {part} text: {perplexities[part]:.1f}")
    return perplexities


def export(model, normalize, vocabulary, provenance, arguments):
    """Exports the folded model with signatures that take text."""
    served = build_model(vocabulary.size, normalize, arguments, stateful=False)
    copy_weights(model, served)
    folder = pathlib.Path(arguments.output_dir) / MODEL_NAME
    version = keras_bnrnn.export_saved_model(
        served,
        folder,
        text_front_end=keras_bnrnn.export.TextFrontEnd(
            vocabulary,
            start_token=vocabulary.end,
            end_token=vocabulary.end,
            unknown_token=vocabulary.unknown,
            vocabulary_size=vocabulary.size,
            detokenize=vocabulary.detokenize,
        ),
        provenance=provenance,
    )
    print(f"\nExported, folded into stock layers: {version}")
    print(f"To serve it: keras-bnrnn serve {MODEL_NAME}={folder}")


if __name__ == "__main__":
    sys.exit(main())
