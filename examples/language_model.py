"""A word-level language model with batch normalisation, from text to a served answer.

The program trains a two-layer LSTM without and with batch normalisation on the Python
language reference that every CPython ships. It prints and plots the perplexities,
computes exact population statistics, exports the normalised model, serves it on this
machine and sends it text. This takes a few minutes.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pydoc_data.topics

import keras
import numpy as np

import keras_bnrnn

try:
    import httpx
    import matplotlib
    import tensorflow_text

    from keras_bnrnn.local_server import ModelServer

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit(
        f"error: {error} (the examples need `pip install 'keras-bnrnn[examples]'`)"
    ) from error

SEED = 1
BATCH_SIZE, TIMESTEPS, LEARNING_RATE = 20, 20, 8e-3
MOST_WORDS = 3_000  # in the vocabulary; the others are unknown words
END = "eos"  # a token after each paragraph; no paragraph has this word
MODEL_NAME = "language_model"
SENTENCE = "If the expression is not empty, the value of the last item is returned."


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", default="runs/demo", help="(default: runs/demo)")
    add("--smoke", action="store_true", help="tiny model, little text: a short trial")
    arguments = parser.parse_args(argv)
    units, epochs = (8, 1) if arguments.smoke else (128, 5)
    output = pathlib.Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    train, valid = language_reference()
    if arguments.smoke:
        train, valid = train[:150], valid[:150]
    tokenizer = build_tokenizer(train)
    train, valid = (windows(encode(tokenizer, part)) for part in (train, valid))
    print(f"Words: {train[0].size:,} for training, {valid[0].size:,} for validation")

    perplexities = {}
    for layer in (keras.layers.LSTM, keras_bnrnn.BNLSTM):
        keras.utils.set_random_seed(SEED)
        model = build_model(layer, tokenizer.vocabulary_size(), units)
        print(f"\n{layer.__name__}: {model.count_params():,} weights")
        options = {"batch_size": BATCH_SIZE, "epochs": epochs, "verbose": 2}
        history = model.fit(*train, validation_data=valid, **options).history
        losses = {"training": history["loss"], "validation": history["val_loss"]}
        perplexities[layer.__name__] = {k: np.exp(v) for k, v in losses.items()}
        for part, values in perplexities[layer.__name__].items():
            print(f"{part} perplexity by epoch:", *(f"{v:.1f}" for v in values))
    plot(perplexities, output / "learning_curves.png")

    # Replaces the moving averages of training by the statistics of the whole text.
    keras_bnrnn.recalibrate(model, train[0], batch_size=BATCH_SIZE)
    perplexity = float(np.exp(model.evaluate(*valid, verbose=0)))
    print(f"Validation perplexity with exact population statistics: {perplexity:.1f}")

    # The export folds the normalisation into the weights of stock Keras layers.
    version = keras_bnrnn.export_saved_model(
        model,
        output / MODEL_NAME,
        text_front_end=keras_bnrnn.export.TextFrontEnd(tokenizer, end_token=END),
        provenance={"validation_perplexity": perplexity},
    )
    print(f"\nExported: {version}")
    served = {MODEL_NAME: output / MODEL_NAME}
    with ModelServer(served, port=0, grpc_port=None) as server:
        ask(f"{server.url}/v1/models/{MODEL_NAME}:predict")
    return 0


def language_reference():
    """Returns paragraphs for training and for validation, from different topics."""
    topics = sorted(pydoc_data.topics.topics)
    np.random.default_rng(SEED).shuffle(topics)
    cut = len(topics) // 10

    def paragraphs(names):
        text = "\n\n".join(pydoc_data.topics.topics[name] for name in names)
        return [p for p in text.split("\n\n") if p.strip()]

    return paragraphs(topics[cut:]), paragraphs(topics[:cut])


def build_tokenizer(paragraphs):
    """Returns a layer from text to the ids of words and punctuation marks."""
    tokenizer = keras.layers.TextVectorization(
        max_tokens=MOST_WORDS,
        standardize="lower",
        split=tensorflow_text.UnicodeScriptTokenizer().tokenize,
        ragged=True,
    )
    tokenizer.adapt([f"{paragraph} {END}" for paragraph in paragraphs])
    return tokenizer


def encode(tokenizer, paragraphs):
    """Returns one array with the ids of all paragraphs."""
    return tokenizer([f"{p} {END}" for p in paragraphs]).flat_values.numpy()


def windows(ids):
    """Returns words and the words that follow them, both of shape (windows, T)."""
    count = (len(ids) - 1) // (BATCH_SIZE * TIMESTEPS) * BATCH_SIZE
    used = count * TIMESTEPS
    return ids[:used].reshape(count, -1), ids[1 : used + 1].reshape(count, -1)


def build_model(layer, vocabulary_size, units):
    """Returns a compiled model from word ids to logits of the next word."""
    options = {"return_sequences": True}
    if layer is keras_bnrnn.BNLSTM:
        # Sequence-wise statistics would include the words to predict.
        options["statistics"] = "frame"
    model = keras.Sequential()
    model.add(keras.Input((None,), dtype="int32", name="ids"))
    model.add(keras.layers.Embedding(vocabulary_size, units))
    model.add(layer(units, **options))
    model.add(layer(units, **options))
    model.add(keras.layers.Dense(vocabulary_size, name="logits"))
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE, global_clipnorm=5.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def plot(perplexities, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, parts), color in zip(
        perplexities.items(), ("tab:gray", "tab:blue"), strict=True
    ):
        for (part, values), style in zip(parts.items(), ("-", "--"), strict=True):
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, style, color=color, label=f"{name}, {part}")
    axes.set(xlabel="epoch", ylabel="perplexity per word", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nLearning curves: {path}")


def ask(endpoint):
    """Scores a sentence and continues its first words, as any client would."""
    scores = predict(endpoint, "text", {"text": SENTENCE})
    for token, log_probability in zip(
        scores["tokens"], scores["log_probabilities"], strict=True
    ):
        print(f"  {token:<20} log-probability {log_probability:8.3f}")
    print(f"  perplexity {scores['perplexity']:.1f}")
    prompt = " ".join(scores["tokens"][:4])
    request = {"prompt": prompt, "max_tokens": 20, "temperature": 0.7, "seed": SEED}
    print(f"  {predict(endpoint, 'generate', request)}")


def predict(endpoint, signature, instance):
    """Sends one request of TensorFlow Serving's REST API and returns the answer."""
    body = {"signature_name": signature, "instances": [instance]}
    print(f"\ncurl -d '{json.dumps(body)}' {endpoint}")
    # `trust_env`: a proxy cannot reach 127.0.0.1 of this machine.
    response = httpx.post(endpoint, json=body, timeout=60, trust_env=False)
    if response.status_code != 200:
        raise SystemExit(f"error: the server answered {response.text}")
    return response.json()["predictions"][0]


if __name__ == "__main__":
    sys.exit(main())
