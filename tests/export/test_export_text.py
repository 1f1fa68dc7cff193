"""The signatures `text` and `generate`: against plain Keras, and without Keras."""

import builtins
import collections
import doctest
import functools
import gc
import json
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text as tf_text
from helpers import randomize

import keras_bnrnn
from keras_bnrnn.export.saved_model.served_model import ServedModel
from keras_bnrnn.export.text import TextFrontEnd, text_signatures

END = "<eos>"
WORDS = [END, "the", "cat", "sat", "on", "mat", "a", "dog", "."]
TEXTS = ["the cat sat", "", "a dog sat on the mat .", "The zebra", " mat"]


@pytest.fixture(autouse=True)
def seeded():
    """Not here: TensorFlow drops SentencePiece models, which are kept, as it is seeded.

    Every weight comes from a generator with a seed of its own.
    """


@pytest.fixture(autouse=True, scope="module")
def forget_cases():
    """Before a test of another file, which seeds; this file may come again after it."""
    yield
    case.cache_clear()
    gc.collect()  # a model that goes later takes a new one of the same name along


def word_tokenizer(**arguments):
    return keras.layers.TextVectorization(
        vocabulary=WORDS, **{"standardize": "lower", "ragged": True, **arguments}
    )


def byte_pair_tokenizer(**arguments):
    merges = ["c a", "ca t", "s at", "a t", "s a", "sa t", "Ġ c", "Ġc at"]
    pieces = [*map(chr, range(33, 127)), "Ġ", END]
    pieces += [merge.replace(" ", "") for merge in merges] + ["sat"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary["~"] = len(vocabulary) + 3  # some have gaps
    return keras_hub.tokenizers.BytePairTokenizer(
        vocabulary, merges, unsplittable_tokens=[END], **arguments
    )


@functools.cache
def sentence_pieces():
    sentences = ["the cat sat on a mat", "a dog sat on the cat", "the dog ate ham"]
    data = tf.data.Dataset.from_tensor_slices(sentences * 20)
    return keras_hub.tokenizers.compute_sentence_piece_proto(data, vocabulary_size=19)


PIECES = ["[PAD]", "[UNK]", END, *WORDS[1:], "##s", "##at", "##o", "do"]
FRONT_ENDS = {
    "words": lambda: TextFrontEnd(word_tokenizer(), end_token=END),
    "words_without_end": lambda: TextFrontEnd(
        word_tokenizer(), start_token=2, max_tokens=60
    ),
    "scripts": lambda: TextFrontEnd(
        word_tokenizer(split=tf_text.UnicodeScriptTokenizer().tokenize, ragged=False),
        end_token=END,
    ),
    "characters": lambda: TextFrontEnd(
        keras.layers.TextVectorization(
            vocabulary=[*"abcdehmnostT "],
            split="character",
            standardize=None,
            ragged=True,
        ),
        start_token=1,
    ),
    "word_pieces": lambda: TextFrontEnd(
        keras_hub.tokenizers.WordPieceTokenizer(PIECES, lowercase=True), end_token=END
    ),
    "sentence_pieces": lambda: TextFrontEnd(
        keras_hub.tokenizers.SentencePieceTokenizer(proto=sentence_pieces())
    ),
    "byte_pairs": lambda: TextFrontEnd(byte_pair_tokenizer(), end_token=END),
    "bytes": lambda: TextFrontEnd(
        keras_hub.tokenizers.ByteTokenizer(lowercase=False),
        end_token=256,
        vocabulary_size=257,
    ),
    "code_points": lambda: TextFrontEnd(
        keras_hub.tokenizers.UnicodeCodepointTokenizer(vocabulary_size=300),
        start_token=2,
    ),
}


def language_model(size, rng, layers=1):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            keras.layers.Embedding(size, 6),
            keras_bnrnn.BNLSTM(7, statistics="frame", return_sequences=True),
            *[keras.layers.GRU(5, return_sequences=True)][: layers - 1],
            keras.layers.Dense(size, name="logits"),
        ]
    )
    for layer in model.layers:
        randomize(layer, rng)
    return model


def signatures_of(model, front_end, causal=True):
    return text_signatures(
        ServedModel(keras_bnrnn.fold(model)), front_end, causal=causal
    )


def generate(signatures, prompts, max_tokens=8, temperature=0.0, seed=0):
    rows = len(prompts)
    answer = signatures["generate"](
        tf.constant(prompts, tf.string),
        tf.constant(np.broadcast_to(max_tokens, rows), tf.int32),
        tf.constant(np.broadcast_to(temperature, rows), tf.float32),
        tf.constant(np.broadcast_to(seed, rows), tf.int32),
    )
    return [text.decode() for text in answer["text"].numpy()]


@functools.cache
def case(kind):
    """A front end, a model, its signatures, and the oracle's ids and logits."""
    return Case(FRONT_ENDS[kind](), np.random.default_rng(7), 1 + (kind == "words"))


class Case:
    def __init__(self, front_end, rng, layers):
        self.front_end = front_end
        self.model = language_model(front_end.size, rng, layers)
        self.signatures = signatures_of(self.model, front_end)
        self._logits = tf.function(
            lambda ids: self.model(ids, training=False),
            input_signature=[tf.TensorSpec([1, None], tf.int32)],
        )
        self.ids = ids_of(front_end)

    def logits(self, ids):
        """Logits (T, V), float64, for one row of ids."""
        return self._logits(tf.constant([ids])).numpy()[0].astype("float64")

    def greedy(self, ids, count):
        """The likeliest ids to follow, each by a call on all those before."""
        new = []
        for _ in range(count):
            logits = self.logits([self.front_end.start_id, *ids, *new])[-1]
            logits[never_of(self.front_end)] = -np.inf
            new.append(int(logits.argmax()))
            if new[-1] == self.front_end.end_id:
                return new[:-1]
        return new


def ids_of(front_end):
    """Function from a text to its ids, by the tokenizer as it is in `tf.data`."""

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string)])
    def tokenize(texts):
        ids = front_end.tokenizer(texts)
        return ids.to_tensor() if isinstance(ids, tf.RaggedTensor) else ids

    def ids(text):
        ids = [int(i) for i in tokenize(tf.constant([text, "cat"]))[0]]
        while ids and ids[-1] == 0:
            ids.pop()
        known = [i if 0 <= i < front_end.size else front_end.unknown_id for i in ids]
        return [i for i in known if i is not None]

    return ids


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def never_of(front_end):
    """What generation leaves out, worked out by hand for each kind."""
    never = {front_end.unknown_id, front_end.start_id} - {None}
    if not isinstance(front_end.tokenizer, OF_CHARACTERS):
        never.add(0)  # padding
    if isinstance(front_end.tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        known = front_end.tokenizer.vocabulary.values()
        never.update(set(range(front_end.size)) - set(known))
    return sorted(never - {front_end.end_id})


OF_CHARACTERS = (
    keras_hub.tokenizers.ByteTokenizer,
    keras_hub.tokenizers.UnicodeCodepointTokenizer,
    keras_hub.tokenizers.BytePairTokenizer,
)


some_kinds = pytest.mark.slow(but=["words", "word_pieces", "bytes"])
fewer_kinds = pytest.mark.slow(but=["words", "bytes"])


class TestTextOfALanguageModel:
    @some_kinds
    @pytest.mark.parametrize("kind", FRONT_ENDS)
    def test_log_probabilities_are_those_of_the_model(self, kind):
        this = case(kind)
        answer = this.signatures["text"](tf.constant(TEXTS))
        for row, text in enumerate(TEXTS):
            ids = this.ids(text)
            logits = this.logits([this.front_end.start_id, *ids])
            expected = [
                log_softmax(y)[i] for y, i in zip(logits[:-1], ids, strict=True)
            ]
            found = answer["log_probabilities"].numpy()[row]
            assert answer["lengths"].numpy()[row] == len(ids)
            np.testing.assert_allclose(found[: len(ids)], expected, atol=2e-5)
            assert not found[len(ids) :].any()
            perplexity = np.exp(-np.mean(expected)) if ids else 1.0
            np.testing.assert_allclose(
                answer["perplexity"].numpy()[row], perplexity, rtol=2e-5
            )

    @pytest.mark.slow
    def test_tokens_are_the_text_of_each(self):
        def tokens(kind):
            answer = case(kind).signatures["text"](["The cats", "dog ü", ""])
            return [[t.decode() for t in row] for row in answer["tokens"].numpy()]

        assert tokens("words")[0] == ["the", "[UNK]"]
        assert tokens("word_pieces")[0] == ["the", "cat", "##s"]
        assert tokens("bytes")[1] == [*"dog ", "\ufffd", "\ufffd", "", ""]
        assert tokens("byte_pairs")[0] == [*"The", " ", "cat", "s"]
        assert tokens("sentence_pieces")[2] == [""] * len(tokens("sentence_pieces")[0])

    def test_probabilities_do_as_well_as_logits(self):
        expected, model = case("words").signatures, case("words").model
        model = keras.models.clone_model(model)
        model.set_weights(case("words").model.get_weights())
        model.layers[-1].activation = keras.activations.softmax
        front_end = TextFrontEnd(word_tokenizer(), end_token=END, logits=False)
        found = signatures_of(model, front_end)
        np.testing.assert_allclose(
            found["text"](TEXTS)["log_probabilities"],
            expected["text"](TEXTS)["log_probabilities"],
            atol=1e-5,
        )
        assert generate(found, TEXTS) == generate(expected, TEXTS)

    @fewer_kinds
    @pytest.mark.parametrize("kind", FRONT_ENDS)
    def test_no_text_and_texts_of_nothing(self, kind):
        signatures = case(kind).signatures
        answer = signatures["text"](tf.constant([], tf.string))
        assert answer["perplexity"].shape == (0,)
        answer = signatures["text"](tf.constant(["", ""]))
        np.testing.assert_array_equal(answer["perplexity"], [1.0, 1.0])
        np.testing.assert_array_equal(answer["lengths"], [0, 0])
        assert generate(signatures, []) == []
        assert generate(signatures, ["", ""], max_tokens=0) == ["", ""]

    @fewer_kinds
    @pytest.mark.parametrize("kind", FRONT_ENDS)
    def test_bytes_that_are_not_utf8_harm_nobody(self, kind):
        signatures = case(kind).signatures
        texts = [b"\xff\xfe cat", b"the cat", b"\x00\x01 \xc3", b"a\xcc"]
        together, alone = (
            signatures["text"](tf.constant(t)) for t in (texts, texts[1:2])
        )
        np.testing.assert_allclose(
            together["perplexity"][1:2], alone["perplexity"], rtol=1e-5
        )
        for piece in together["tokens"].numpy().ravel():
            piece.decode("utf-8")
        found = generate(signatures, texts)
        assert found[1:2] == generate(signatures, texts[1:2])
        assert found[0].startswith("\ufffd\ufffd cat")


class TestGenerate:
    @fewer_kinds
    @pytest.mark.parametrize("kind", FRONT_ENDS)
    def test_greedy_is_a_loop_over_the_whole_prefix(self, kind):
        this, counts = case(kind), [6, 8, 0, 3, 7]
        found = generate(this.signatures, TEXTS, counts)
        ids = [this.ids(text) for text in TEXTS]
        new = [this.greedy(*asked) for asked in zip(ids, counts, strict=True)]
        assert [len(n) for n in new] != [0] * 5
        text_of = tf.function(
            this.signatures["generate"].codec.text,
            input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)],
        )
        heads = text_of(tf.ragged.constant(ids, tf.int32)).numpy()
        wholes = text_of(
            tf.ragged.constant([i + n for i, n in zip(ids, new, strict=True)], tf.int32)
        ).numpy()
        for text, head, whole, answer in zip(TEXTS, heads, wholes, found, strict=True):
            tail = whole.decode().removeprefix(head.decode())
            assert answer in (text + tail, text.rstrip() + tail)

    def test_the_prompt_stays_as_it_was_written(self):
        signatures = case("words_without_end").signatures
        prompts = ["The  ZEBRA sat", "the cat ", "", "a\n"]
        found = generate(signatures, prompts, 2)
        assert found[0].startswith("The  ZEBRA sat ")
        assert len(found[0].split(" ")) == 6
        assert found[1].startswith("the cat ")
        assert len(found[1].split(" ")) == 4
        assert len(found[2].split(" ")) == 2
        assert found[3].startswith("a ") and len(found[3].split(" ")) == 3
        assert generate(signatures, prompts, 0) == prompts

    def test_it_ends_before_the_end_token(self):
        signatures = case("words").signatures
        texts = generate(signatures, [""] * 64, 200, 2.0, range(64))
        sizes = [len(text.split()) for text in texts]
        assert min(sizes) < max(sizes) < 200
        assert END not in " ".join(texts)

    def test_unknown_start_and_padding_never_come(self, rng):
        model = language_model(len(WORDS) + 2, rng)
        logits = model.layers[-1]
        bias = logits.bias.numpy()
        bias[:3] = 30.0  # padding, unknown and start are by far the likeliest
        logits.bias.assign(bias)
        signatures = signatures_of(model, TextFrontEnd(word_tokenizer(), start_token=2))
        for temperature in (0.0, 1.0, np.inf):
            (text,) = generate(signatures, [""], 40, temperature, 3)
            assert len(text.split()) == 40
            assert set(text.split()) <= set(WORDS[1:])

    def test_a_model_wider_than_its_tokenizer(self, rng):
        front_end = TextFrontEnd(word_tokenizer(), end_token=END, vocabulary_size=16)
        signatures = signatures_of(language_model(16, rng), front_end)
        texts = generate(signatures, [""] * 20, 30, 5.0, range(20))
        assert set(" ".join(texts).split()) == set(WORDS[1:])

    def test_rows_do_not_know_of_each_other(self):
        signatures = case("words_without_end").signatures
        prompts = ["the cat", "", "a dog sat on the mat .", "on"]
        counts, temperatures, seeds = (
            [9, 4, 12, 30],
            [1.0, 0.5, 3.0, 0.0],
            [5, 5, -7, 0],
        )
        together = generate(signatures, prompts, counts, temperatures, seeds)
        assert together == generate(signatures, prompts, counts, temperatures, seeds)
        for i in range(4):
            alone = generate(
                signatures, prompts[i : i + 1], counts[i], temperatures[i], seeds[i]
            )
            assert alone == together[i : i + 1]
        assert len(set(generate(signatures, [""] * 20, 12, 1.0, range(20)))) == 20

    @pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
    def test_frequencies_are_softmax_of_logits_over_temperature(self, temperature):
        this, count = case("words"), 4000
        texts = generate(
            this.signatures, ["the cat"] * count, 1, temperature, range(count)
        )
        found = collections.Counter(text.removeprefix("the cat") for text in texts)
        found = np.array(
            [found[f" {word}" if word else ""] for word in ["", *WORDS[1:]]]
        )
        assert found.sum() == count
        logits = this.logits([2, *this.ids("the cat")])[-1] / temperature
        expected = count * np.exp(log_softmax(logits[2:]))  # neither "" nor "[UNK]"
        assert expected.min() > 3
        # 8 degrees of freedom: beyond 31.8 in one of 10,000 trials.
        assert ((found - expected) ** 2 / expected).sum() < 31.8

    def test_a_second_token_is_drawn_independently(self, rng):
        front_end = TextFrontEnd(word_tokenizer(), start_token=2)
        model = language_model(front_end.size, rng)
        kernel, bias = model.layers[-1].get_weights()
        model.layers[-1].set_weights([0 * kernel, 0 * bias])  # 8 words, as likely
        texts = generate(
            signatures_of(model, front_end), [""] * 6400, 2, 1, range(6400)
        )
        pairs = [tuple(text.split()) for text in texts]
        found = np.array([pairs.count((a, b)) for a in WORDS[1:] for b in WORDS[1:]])
        assert found.sum() == 6400
        # 63 degrees of freedom: beyond 112 in one of 10,000 trials.
        assert ((found - 100.0) ** 2 / 100).sum() < 112

    def test_arguments_out_of_range_count_as_the_nearest(self):
        signatures = case("words_without_end").signatures
        found = generate(signatures, ["the"] * 3, [-3, 60, 10**9], 0.0)
        assert found[0] == "the"
        assert found[1] == found[2]
        assert len(found[1].split()) == 61
        found = generate(signatures, ["the"] * 3, 5, [-1.0, np.nan, 0.0], [1, 2, 3])
        assert len(set(found)) == 1
        found = generate(signatures, ["the"] * 2, 5, [1e-30, np.inf], [1, 2])
        assert found[0] == generate(signatures, ["the"], 5)[0]

    def test_batch_sizes_must_agree(self):
        signatures = case("words_without_end").signatures
        message = r"`max_tokens` must have the shape \(B,\), with the B of `prompt`"
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            signatures["generate"](
                tf.constant(["a", "b"]), [1], tf.constant([0.0, 0.0]), [1, 2]
            )

    def test_each_token_costs_one_step(self, rng):
        """Twice the prompt is one chunk more, not a prefix more for each token."""
        served = ServedModel(keras_bnrnn.fold(language_model(len(WORDS) + 2, rng)))
        front_end = TextFrontEnd(word_tokenizer(), start_token=2)
        part = text_signatures(served, front_end, True)["generate"]
        frames = []
        advance = served.advance

        def counting(inputs, lengths, states):
            frames.append(inputs["ids"].shape[1])
            return advance(inputs, lengths, states)

        served.advance = counting
        part._model._served = served
        part.__call__.get_concrete_function()
        assert frames == [None, 1]  # the prompt, and the loop's body


class TestTask:
    def test_outputs_are_those_of_the_model(self, rng):
        ids = keras.Input((None,), dtype="int64", name="ids")
        x = keras.layers.Embedding(len(WORDS) + 2, 6)(ids)
        frames = keras.layers.Bidirectional(
            keras_bnrnn.BNLSTM(5, return_sequences=True), name="frames"
        )(x)
        model = keras.Model(ids, {"tags": frames, "label": keras.layers.LSTM(3)(x)})
        for layer in model.layers:
            randomize(layer, rng)
        tokenizer = word_tokenizer(ragged=False)
        (name,) = signatures = signatures_of(model, tokenizer, causal=False)
        assert name == "text"
        answer = signatures["text"](tf.constant(TEXTS))
        assert sorted(answer) == ["label", "tags"]
        for row, text in enumerate(TEXTS):
            ids = ids_of(TextFrontEnd(tokenizer))(text)
            if not ids:
                assert not answer["tags"][row].numpy().any()
                continue
            expected = model(np.array([ids]), training=False)
            np.testing.assert_allclose(
                answer["label"][row], expected["label"][0], atol=1e-5
            )
            np.testing.assert_allclose(
                answer["tags"][row, : len(ids)], expected["tags"][0], atol=1e-5
            )
            assert not answer["tags"][row, len(ids) :].numpy().any()

    def test_a_fixed_number_of_timesteps(self, rng):
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32", name="ids"),
                keras.layers.Embedding(len(WORDS) + 2, 6),
                keras_bnrnn.BNGRU(5, name="state"),
            ]
        )
        for layer in model.layers:
            randomize(layer, rng)
        tokenizer = word_tokenizer()
        text = signatures_of(model, tokenizer, causal=False)["text"]
        found = text(tf.constant(["a dog sat on the mat", "the cat sat on"]))["state"]
        ids = [
            ids_of(TextFrontEnd(tokenizer))(t)[:4]
            for t in ("a dog sat on", "the cat sat on")
        ]
        np.testing.assert_allclose(found, model(np.array(ids)), atol=1e-5)


class TestByteTokenizersCache:
    def test_ids_are_those_of_keras_hub(self):
        """Its own in-graph tokenizer, with the cache, is the oracle."""
        texts = [
            "the cat sat",
            "",
            "cat cat  sat",
            f"a{END}cat",
            " 12345 it's\n\ncat's ",
        ]
        this = case("byte_pairs")
        ids = tf.function(
            lambda x: this.signatures["text"].codec.ids(x).to_tensor(-1),
            input_signature=[tf.TensorSpec([None], tf.string)],
        )
        found = [[int(i) for i in row if i >= 0] for row in ids(tf.constant(texts))]
        assert found == [this.ids(text) for text in texts]
        tokenizer = this.front_end.tokenizer
        assert found[3][1] == tokenizer.vocabulary[END]

    def test_nothing_grows(self):
        for part in case("byte_pairs").signatures.values():
            graph = part.__call__.get_concrete_function().graph.as_graph_def()
            ops = {n.op for n in graph.node}
            ops |= {n.op for f in graph.library.function for n in f.node_def}
            assert not {op for op in ops if "Insert" in op or "Mutable" in op}


LOADER = """
import importlib.util, json, pathlib, sys

# TensorFlow itself looks for Keras: there is none.
sys.modules.update(dict.fromkeys(["keras", "keras_hub", "tf_keras", "keras_bnrnn"]))
import tensorflow as tf

package = pathlib.Path(importlib.util.find_spec("tensorflow_text").origin).parent
for library in sorted((package / "python" / "ops").glob("*.so")):
    tf.load_op_library(str(library))
answers = {}
for folder, texts in json.load(sys.stdin).items():
    signatures = tf.saved_model.load(folder).signatures
    scores = signatures["text"](text=tf.constant(texts))
    answers[folder] = {
        "tokens": [[t.decode() for t in row] for row in scores["tokens"].numpy()],
        "perplexity": scores["perplexity"].numpy().tolist(),
    }
    if "generate" not in signatures:
        continue
    rows = len(texts)
    written = signatures["generate"](
        prompt=tf.constant(texts),
        max_tokens=tf.fill([rows], 6),
        temperature=tf.fill([rows], 1.0),
        seed=tf.range(rows),
    )
    answers[folder]["text"] = [t.decode() for t in written["text"].numpy()]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_saved_signatures_answer_without_keras(tmp_path):
    expected = {}
    for kind in FRONT_ENDS:
        signatures = dict(case(kind).signatures)
        if kind not in ("words", "sentence_pieces"):
            del signatures["generate"]  # made of the same tables
        root = tf.Module()
        root.parts = signatures
        concrete = {
            name: part.__call__.get_concrete_function()
            for name, part in signatures.items()
        }
        root.weights = [v for f in concrete.values() for v in f.graph.variables]
        tf.saved_model.save(root, str(tmp_path / kind), signatures=concrete)
        scores = signatures["text"](tf.constant(TEXTS))
        expected[str(tmp_path / kind)] = answer = {
            "tokens": [[t.decode() for t in row] for row in scores["tokens"].numpy()],
            "perplexity": scores["perplexity"].numpy(),
        }
        if "generate" in signatures:
            answer["text"] = generate(signatures, TEXTS, 6, 1.0, range(len(TEXTS)))
    run = subprocess.run(
        [sys.executable, "-c", LOADER],
        input=json.dumps(dict.fromkeys(expected, TEXTS)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers.keys() == expected.keys()
    for folder, answer in expected.items():
        found = answers[folder]
        assert found["tokens"] == answer["tokens"]
        assert found.get("text") == answer.get("text")
        np.testing.assert_allclose(found["perplexity"], answer["perplexity"], rtol=1e-5)


def test_export_with_a_front_end(tmp_path, rng):
    model = language_model(len(WORDS) + 2, rng)
    front_end = TextFrontEnd(word_tokenizer(), end_token=END)
    path = keras_bnrnn.export_saved_model(
        model, tmp_path / "words", text_front_end=front_end
    )
    loaded = tf.saved_model.load(str(path)).signatures
    expected = signatures_of(model, front_end)["text"](tf.constant(TEXTS))
    found = loaded["text"](text=tf.constant(TEXTS))
    assert sorted(found) == ["lengths", "log_probabilities", "perplexity", "tokens"]
    for name, value in expected.items():
        if name == "tokens":
            np.testing.assert_array_equal(found[name], value)
        else:
            np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5)
    assert "generate" in loaded


def test_docstring_example():
    names = {"keras": keras, "TextFrontEnd": TextFrontEnd}
    found = doctest.DocTestFinder().find(TextFrontEnd, "TextFrontEnd", globs=names)
    (test,) = (test for test in found if test.examples)
    assert doctest.DocTestRunner().run(test).failed == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tokenizer": "words"}, r"`tokenizer` .* tokenizer='words'"),
            ({"max_tokens": 0}, r"`max_tokens` .* max_tokens=0"),
            ({"max_tokens": True}, r"`max_tokens` .* max_tokens=True"),
            ({"max_tokens": None}, r"`max_tokens` .* max_tokens=None"),
            ({"vocabulary_size": -4}, r"`vocabulary_size` .* vocabulary_size=-4"),
            ({"logits": "yes"}, r"`logits` .* logits='yes'"),
            ({"detokenize": "join"}, r"`detokenize` .* detokenize='join'"),
            ({"start_token": "<s>"}, r"`start_token` .* start_token='<s>'"),
            ({"end_token": 11}, r"`end_token` .* below 11.* end_token=11"),
            ({"end_token": 1.0}, r"`end_token` .* end_token=1.0"),
            ({"unknown_token": -1}, r"`unknown_token` .* unknown_token=-1"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TextFrontEnd(**{"tokenizer": word_tokenizer(), **arguments})

    @pytest.mark.parametrize(
        ("front_end", "message"),
        [
            (word_tokenizer, r"`start_token` must be given.*TextVectorization"),
            (
                lambda: TextFrontEnd(
                    word_tokenizer(), start_token=2, vocabulary_size=9
                ),
                r"`start_token` is for language models.*start_token=2.*size=9",
            ),
            (
                lambda: TextFrontEnd(
                    tf_text.WhitespaceTokenizer().tokenize, vocabulary_size=11
                ),
                r"`tokenizer` must return integer ids of shape \(B, T\).*method",
            ),
            (
                lambda: word_tokenizer(output_mode="multi_hot", ragged=False),
                r"`tokenizer` must return token ids.*output_mode='multi_hot'",
            ),
            (
                lambda: TextFrontEnd(PythonTokenizer(), vocabulary_size=11),
                r"`tokenizer` must be made of TensorFlow operations.*PythonTokenizer",
            ),
            (
                lambda: TextFrontEnd(CallsPython(), vocabulary_size=11),
                r"`tokenizer` must not run Python.*CallsPython.*EagerPyFunc",
            ),
            (
                lambda: TextFrontEnd(GrowingTokenizer(), vocabulary_size=11),
                r"`tokenizer` must not.*GrowingTokenizer.*LookupTableInsertV2",
            ),
            (
                lambda: TextFrontEnd(
                    lambda x: tf.strings.unicode_decode(x, "UTF-8"),
                    start_token=3,
                    vocabulary_size=11,
                ),
                r"`detokenize` must be given.*detokenize=None",
            ),
        ],
    )
    def test_front_ends_that_do_not_fit(self, front_end, message, rng):
        model = language_model(len(WORDS) + 2, rng)
        with pytest.raises(ValueError, match=r"(?s)" + message):
            signatures_of(model, front_end())

    def test_a_start_token_for_a_model_that_sees_the_future(self, rng):
        model = language_model(len(WORDS) + 2, rng)
        front_end = TextFrontEnd(word_tokenizer(), end_token=END)
        with pytest.raises(ValueError, match=r"`end_token` is .*'<eos>'.*not causal"):
            signatures_of(model, front_end, causal=False)

    def test_a_tokenizer_that_adds_start_tokens_itself(self, rng):
        tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(
            proto=sentence_pieces(), add_bos=True
        )
        model = language_model(tokenizer.vocabulary_size(), rng)
        with pytest.raises(ValueError, match=r"SentencePieceTokenizer with add_bos=T"):
            signatures_of(model, tokenizer)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ([keras.Input((None, 3), name="x")], r"x: \(None, None, 3\) float32"),
            ([keras.Input((None,), name="x")], r"x: \(None, None\) float32"),
            (
                [keras.Input((None,), dtype="int32", name=name) for name in "ab"],
                r"a: \(None, None\) int32, b: \(None, None\) int32",
            ),
            (
                [keras.Input((None,), 3, dtype="int32", name="x")],
                r"x: \(3, None\) int32",
            ),
        ],
    )
    def test_models_that_do_not_take_ids(self, inputs, message):
        x = keras.layers.Concatenate(axis=1)(inputs) if len(inputs) > 1 else inputs[0]
        if len(x.shape) == 2:
            x = keras.layers.Embedding(11, 3)(x)
        model = keras.Model(inputs, keras.layers.LSTM(2)(x))
        with pytest.raises(ValueError, match=r"`text_front_end` needs.*" + message):
            signatures_of(model, word_tokenizer(), causal=False)

    def test_without_tensorflow_text(self, rng, monkeypatch):
        imported = builtins.__import__

        def fail(name, *args, **kwargs):
            if name == "tensorflow_text":
                raise ImportError("no such file")
            return imported(name, *args, **kwargs)

        front_end = FRONT_ENDS["word_pieces"]()
        model = language_model(front_end.size, rng)
        served = ServedModel(keras_bnrnn.fold(model))
        monkeypatch.setattr(builtins, "__import__", fail)
        message = (
            r"`TextFrontEnd` with WordPieceTokenizer .* no such file.*"
            r"pip install 'keras-bnrnn\[text\]'"
        )
        with pytest.raises(ImportError, match=message):
            text_signatures(served, front_end, True)


class PythonTokenizer:
    def __call__(self, texts):
        return tf.ragged.constant([[len(t) for t in x.split()] for x in texts.numpy()])


class CallsPython(tf.Module):
    def __call__(self, texts):
        ids = tf.py_function(lambda x: [[3]] * len(x), [texts], tf.int32)
        return tf.ensure_shape(ids, [None, None])


class GrowingTokenizer(tf.Module):
    def __init__(self):
        super().__init__()
        self.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, 1)

    def __call__(self, texts):
        words = tf.strings.split(texts)
        self.table.insert(words.flat_values, tf.ones_like(words.flat_values, tf.int64))
        ids = tf.reshape(self.table.lookup(words.flat_values), [-1])
        return words.with_flat_values(ids)
