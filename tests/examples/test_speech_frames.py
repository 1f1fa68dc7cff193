"""The frames of spoken digits: data, features, a run, a restart.

The recordings are tones, one frequency for each digit.
"""

import itertools
import json
import wave
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

SPEAKERS = ("ann", "bob", "eve")
INDICES = (0, 4, 5, 17)
DURATIONS = ("seconds", "cpu_seconds")


@pytest.fixture(scope="module")
def example(paper):
    return paper("speech_frames")


@pytest.fixture(scope="module")
def digits(paper):
    return paper("spoken_digits")


@pytest.fixture(scope="module")
def splicing(paper):
    return paper("digit_strings")


def frequency(digit):
    """Of its tone: in the middle of a mel band, three bands from the next."""
    mels = np.linspace(mel(20), mel(4_000), 42)[1:-1]
    return 700 * (np.exp(mels[band(digit)] / 1127) - 1)


def band(digit):
    return 5 + 3 * digit


def mel(hertz):
    return 1127 * np.log(1 + np.asarray(hertz) / 700)


def write_wav(path, samples, channels=1, width=2, rate=8_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten digits by three speakers, two of each for development."""
    folder = tmp_path_factory.mktemp("fsdd") / "recordings"
    folder.mkdir()
    for speaker, name in enumerate(SPEAKERS):
        for digit in range(10):
            for index in INDICES:
                count = 900 + 350 * speaker + 40 * digit + 3 * index
                turns = frequency(digit) / 8_000 * np.arange(count)
                tone = (6_000 * np.sin(2 * np.pi * turns)).astype("<i2")
                write_wav(folder / f"{digit}_{name}_{index}.wav", tone)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """The same folder, to be spoiled."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


@pytest.fixture(scope="module")
def recordings(digits, folder):
    return digits.read_recordings(folder, partial=True)


@pytest.fixture(scope="module")
def strings(splicing, recordings):
    return splicing.splice_strings(recordings, 2, np.random.default_rng(3))


def parse(example, folder, output, *arguments):
    return example.parse_arguments(
        [
            *("--smoke", "--data-dir", str(folder), "--passes", "1"),
            *("--output-dir", str(output), *arguments),
        ]
    )


def names(recordings):
    return {(r.digit, r.speaker, r.index) for r in recordings}


def test_all_recordings_are_read(digits, folder, recordings):
    expected = {(d, s, i) for d in range(10) for s in SPEAKERS for i in INDICES}
    assert len(recordings) == 120 and names(recordings) == expected
    above = digits.read_recordings(folder.parent, partial=True)
    assert names(above) == expected
    one = recordings[-1]
    assert (one.digit, one.speaker, one.index) == (9, "eve", 5)
    turns = frequency(9) / 8_000 * np.arange(900 + 700 + 360 + 15)
    assert one.samples.dtype == np.float32
    # 16 bits, cut off: less than one step.
    np.testing.assert_allclose(
        one.samples, 6_000 / 2**15 * np.sin(2 * np.pi * turns), rtol=0, atol=2.0**-15
    )


def test_a_folder_without_the_data_is_refused(digits, folder, tmp_path):
    expected = "(?s)--data-dir must hold .*Cannot use {}: {}.*Get it from https://"
    missing = tmp_path / "missing"
    with pytest.raises(SystemExit, match=expected.format(missing, "there is no such")):
        digits.read_recordings(missing)
    for partial in (False, True):
        with pytest.raises(
            SystemExit, match=expected.format(tmp_path, "it has 0 WAV files")
        ):
            digits.read_recordings(tmp_path, partial)
    with pytest.raises(
        SystemExit, match=expected.format(folder, "it has 120 WAV files")
    ):
        digits.read_recordings(folder)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("1_ann.wav", {}, r"its name is not \{digit\}_\{speaker\}_\{index\}.wav"),
        ("11_ann_1.wav", {}, "its name is not"),
        ("1_ann_1.wav", {"rate": 16_000}, "channels 1, bits 16, sample rate 16000"),
        ("1_ann_1.wav", {"channels": 2}, "channels 2, bits 16, sample rate 8000"),
        ("1_ann_1.wav", {"width": 1}, "channels 1, bits 8, sample rate 8000"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name, options, reason, digits, copied):
    write_wav(copied / name, np.zeros(400, "<i2"), **options)
    with pytest.raises(SystemExit, match=f"Cannot use {copied / name}: {reason}"):
        digits.read_recordings(copied, partial=True)


def test_a_file_that_is_cut_off_is_refused(digits, copied):
    path = copied / "3_bob_4.wav"
    whole = path.read_bytes()
    for content, reason in (
        (whole[:1_044], "it has 1000 bytes of sound for 1382 samples"),
        (whole[:20], ".+"),
        (b"", ".+"),
        (b"RIFF, but not sound", ".+"),
    ):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"Cannot use {path}: {reason}. Get it"):
            digits.read_recordings(copied, partial=True)
    write_wav(path, np.zeros(0, "<i2"))
    with pytest.raises(SystemExit, match=f"Cannot use {path}: .*for 0 samples"):
        digits.read_recordings(copied, partial=True)


def test_the_data_set_is_downloaded_once(digits, folder, tmp_path, monkeypatch):
    archive = tmp_path / "v1.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.glob("*_ann_*.wav"):
            file.write(path, f"free-spoken-digit-dataset-1/recordings/{path.name}")
    get_file = keras.utils.get_file

    def in_folder(*args, **kwargs):
        return get_file(*args, cache_dir=tmp_path / "keras", **kwargs)

    monkeypatch.setattr(keras.utils, "get_file", in_folder)
    monkeypatch.setattr(digits, "URL", archive.as_uri())
    assert len(digits.read_recordings(digits.download(), partial=True)) == 40
    archive.unlink()
    assert len(digits.read_recordings(digits.download(), partial=True)) == 40


def test_a_download_that_fails_says_what_to_do(digits, monkeypatch):
    def fail(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    with pytest.raises(SystemExit, match=r"URL fetch failure.*https://.*--data-dir"):
        digits.download()


def test_the_official_split(digits, recordings):
    parts = digits.split(recordings)
    train, dev = names(parts["train"]), names(parts["dev"])
    assert not train & dev and train | dev == names(recordings)
    assert {index for _, _, index in dev} == {0, 4}
    assert {index for _, _, index in train} == {5, 17}


@pytest.mark.parametrize(
    ("held_out", "expected"), [(None, {"bob", "eve"}), (["ann"], {"ann"})]
)
def test_no_speaker_is_in_both_parts(held_out, expected, digits, recordings):
    parts = digits.split(recordings, held_out, by="speaker")
    train, dev = names(parts["train"]), names(parts["dev"])
    assert len(train) + len(dev) == 120 and train | dev == names(recordings)
    assert {speaker for _, speaker, _ in dev} == expected
    assert {speaker for _, speaker, _ in train} == set(SPEAKERS) - expected


@pytest.mark.parametrize("held_out", [["joe"], ["ann", "joe"], list(SPEAKERS)])
def test_speakers_to_hold_out_must_be_some(held_out, digits, recordings):
    received = f"some, not all, of ann, bob, eve. Received: {' '.join(held_out)}"
    with pytest.raises(SystemExit, match=f"--held-out must be {received}"):
        digits.split(recordings, held_out, by="speaker")


def test_a_part_without_a_recording_is_refused(digits, recordings):
    late = [r for r in recordings if r.index >= 5]
    with pytest.raises(SystemExit, match=r"--split official.*the part 'dev' of the 60"):
        digits.split(late)


def test_digits_that_a_speaker_never_says_are_named(example, digits, recordings):
    def require(recordings, *arguments):
        arguments = example.parse_arguments(["--data-dir", "data", *arguments])
        parts = digits.split(recordings, arguments.held_out, arguments.split)
        digits.require_every_digit(parts, recordings, arguments)

    require(recordings)
    require(recordings, "--split", "speaker")
    gone = [r for r in recordings if (r.digit, r.speaker) != (7, "bob")]
    gone = [r for r in gone if (*r[:2], r.index in (0, 4)) != (2, "eve", True)]
    with pytest.raises(SystemExit, match=r"'train'. Missing in data: 7 by bob$"):
        require(gone)
    with pytest.raises(SystemExit, match=r"'dev'. Missing in data: 7 by bob$"):
        require(gone, "--split", "speaker")
    eve = [r for r in gone if r.speaker != "bob"]
    with pytest.raises(SystemExit, match=r"'dev'. Missing in data: 2 by eve$"):
        require(eve)
    require(eve, "--split", "speaker", "--held-out", "eve")


def spans(classes):
    """`(class, start, stop)` of all that is not silence."""
    edges = np.flatnonzero(np.diff(classes)) + 1
    bounds = [0, *edges, len(classes)]
    pairs = itertools.pairwise(bounds)
    return [(classes[a], a, b) for a, b in pairs if classes[a]]


def test_each_recording_stands_in_one_string_of_a_pass(recordings, strings):
    spoken = []
    for string in strings:
        words = spans(string.classes)
        assert 3 <= len(words) <= 7
        assert len(string.samples) == len(string.classes)
        for label, start, stop in words:
            spoken.append((label - 1, string.speaker, stop - start))
        # 50 to 450 ms.
        bounds = [0, *(edge for _, *pair in words for edge in pair)]
        bounds.append(len(string.classes))
        pauses = np.diff(bounds)[::2]
        assert len(pauses) == len(words) + 1
        assert pauses.min() >= 400 and pauses.max() <= 3_600
    expected = [(r.digit, r.speaker, len(r.samples)) for r in recordings]
    assert sorted(spoken) == sorted(2 * expected)


def test_the_string_holds_the_recording_and_a_gain(recordings, strings):
    by_length = {(1 + r.digit, len(r.samples)): r.samples for r in recordings}
    gains = []
    for string in strings:
        for label, start, stop in spans(string.classes):
            word = by_length[label, stop - start]
            heard = string.samples[start:stop]
            gain = np.vdot(heard, word) / np.vdot(word, word)
            # What is left is noise of 1e-3, below six deviations.
            np.testing.assert_allclose(heard, gain * word, rtol=0, atol=6e-3)
            gains.append(20 * np.log10(gain))
        silence = string.samples[string.classes == 0]
        assert 0.8e-3 < silence.std() < 1.2e-3 and abs(silence).max() < 6e-3
    # 6 dB each way; the noise moves a gain by some hundredths.
    assert -6.1 < min(gains) < -4 and 4 < max(gains) < 6.1


def test_strings_depend_on_their_seed_alone(splicing, recordings):
    def spliced(seed):
        return splicing.splice_strings(recordings, 1, np.random.default_rng(seed))

    one, same, other = spliced(1), spliced(1), spliced(2)
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)
        np.testing.assert_array_equal(a.classes, b.classes)
    assert [len(s.samples) for s in one] != [len(s.samples) for s in other]


def test_the_words_left_over_make_strings_too(splicing, rng):
    for left in range(1, 60):
        counts = []
        while sum(counts) < left:
            counts.append(splicing.words_of_string(left - sum(counts), rng))
        assert sum(counts) == left
        assert left < 3 or (min(counts) >= 3 and max(counts) <= 7), left


def test_the_class_of_a_frame_is_what_is_heard_in_it(splicing, strings):
    for string in strings[:12]:
        utterance = splicing.to_frames(string)
        assert len(utterance.features) == 1 + (len(string.samples) - 200) // 80
        assert utterance.classes.shape == (len(utterance.features),)
        loudest = utterance.features[:, :40].argmax(axis=1)
        starts = 80 * np.arange(len(loudest))
        within = np.zeros(len(loudest), bool)
        for label, start, stop in spans(string.classes):
            centred = (starts + 100 >= start) & (starts + 100 < stop)
            assert np.all(utterance.classes[centred] == label)
            within |= centred
            # The tone fills at least half of the window.
            np.testing.assert_array_equal(loudest[centred], band(label - 1))
        assert np.all(utterance.classes[~within] == 0)
        # 18 dB and more between a tone at its faintest and noise, as energy.
        energy = utterance.features[:, 40]
        assert energy[within].min() > energy[~within].mean() + 2


def reference_energies(samples):
    """41 log energies in float64, with no TensorFlow."""
    count = 1 + (len(samples) - 200) // 80
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    frames = np.stack([samples[80 * t : 80 * t + 200] for t in range(count)])
    power = np.abs(np.fft.rfft(frames.astype("float64") * window, 512)) ** 2
    edges = np.linspace(mel(20), mel(4_000), 42)
    bins = mel(np.arange(257) * 8_000 / 512)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0, np.minimum(rising, falling))  # (257, 40)
    assert np.all(weights.sum(axis=0) > 0.3)  # no band falls between two bins
    energies = np.concatenate([power @ weights, power.sum(1, keepdims=True)], axis=1)
    return np.log(energies + 1e-8)


def test_features_are_those_of_numpy(splicing, strings, rng):
    samples = strings[0].samples + 0.1 * rng.standard_normal(
        len(strings[0].samples), "float32"
    )
    static = reference_energies(samples)
    silent = np.zeros_like(samples)
    string = splicing.String("ann", samples, strings[0].classes)
    features = splicing.to_frames(string).features
    assert features.shape == (len(static), 123) and features.dtype == np.float32
    # A float32 transform errs by 1e-7 of the loudest bin, and the faintest band is
    # some 1e-4 of it: 1e-3 of that band.
    np.testing.assert_allclose(features[:, :41], static, rtol=0, atol=1e-3)

    def slopes(values):
        slopes = np.empty_like(values)
        last = len(values) - 1
        for t in range(len(values)):
            slopes[t] = sum(
                k * (values[min(t + k, last)] - values[max(t - k, 0)]) for k in (1, 2)
            )
        return slopes / (2 * (1 + 4))

    np.testing.assert_allclose(features[:, 41:82], slopes(static), rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        features[:, 82:], slopes(slopes(static)), rtol=0, atol=1e-3
    )
    assert np.all(np.isfinite(splicing.log_energies(silent)))


def test_differences_of_a_ramp_are_its_slope(splicing):
    ramp = np.arange(10.0)[:, None] * [2.0, -0.5] + [5.0, 1.0]
    slopes = splicing.differences(ramp)
    # float64, a dozen roundings.
    np.testing.assert_allclose(slopes[2:-2], np.tile([2.0, -0.5], (6, 1)), rtol=1e-14)
    # The first frame stands in for those before it: (1 + 2 * 2) / 10 of the slope.
    np.testing.assert_allclose(slopes[0], [1.0, -0.25], rtol=1e-14)
    assert splicing.differences(ramp[:1]).tolist() == [[0, 0]]


def test_features_are_normalised_by_the_training_frames(example, folder, tmp_path):
    loaded = example.load(parse(example, folder, tmp_path))
    assert 8 <= len(loaded["train"]) <= 20 and 8 <= len(loaded["dev"]) <= 12
    frames = np.concatenate([u.features for u in loaded["train"]]).astype("float64")
    # float32 features: 1e-7 each.
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(axis=0), 1, rtol=1e-6)
    dev = np.concatenate([u.features for u in loaded["dev"]])
    assert abs(dev.mean(axis=0)).max() < 0.5 and abs(dev.mean(axis=0)).max() > 1e-3
    for utterance in loaded["train"] + loaded["dev"]:
        assert abs(utterance.features).max(axis=1).min() > 1e-2  # never a mask


@pytest.fixture
def utterances(splicing, rng):
    """Strings of 20 to 260 frames, each frame by its first feature known."""
    return [
        splicing.Utterance(
            rng.normal(size=(count, 123)).astype("float32"),
            rng.integers(0, 11, count).astype("int32"),
        )
        for count in (150, 20, 260, 99, 100, 101, 35, 64, 200, 77, 41)
    ]


def key(features):
    return round(float(features[0, 0]), 4), len(features)


def test_batches_hold_each_string_once_and_nothing_but_padding_else(
    splicing, utterances
):
    by_key = {key(u.features): u for u in utterances}
    seen, widths = [], []
    for features, classes, weights in splicing.batches(utterances, 4):
        assert features.shape[:2] == classes.shape == weights.shape
        widths.append(features.shape[1])
        for x, y, w in zip(
            features.numpy(), classes.numpy(), weights.numpy(), strict=True
        ):
            count = int(w.sum())
            utterance = by_key[key(x[:count])]
            np.testing.assert_array_equal(x[:count], utterance.features)
            np.testing.assert_array_equal(y[:count], utterance.classes)
            assert np.all(w[:count] == 1)
            assert not x[count:].any() and not y[count:].any() and not w[count:].any()
            seen.append(count)
    assert seen == sorted(len(u.classes) for u in utterances)
    assert widths == [100, 200, 300]


def test_training_batches_are_drawn_anew_in_each_epoch(example, splicing, utterances):
    order = example.training.EpochOrder(len(utterances), seed=1)
    data = splicing.training_batches(utterances, 3, order)
    assert data.cardinality() == 3  # 11 strings

    def drawn(epoch):
        order.on_epoch_begin(epoch)
        batches = [tuple(np.sum(w, axis=1).astype(int)) for *_, w in data]
        assert [len(batch) for batch in batches] == [3, 3, 3]
        lengths = [length for batch in batches for length in batch]
        assert len(set(lengths)) == 9 and lengths == sorted(lengths)
        return batches

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(epoch)) for epoch in range(6)}) > 1


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.slow(but=["input"])
@pytest.mark.parametrize("normalize", ["none", "input"])
def test_metrics_are_of_valid_frames_alone(
    normalize, example, splicing, utterances, folder
):
    arguments = parse(example, folder, "unused", "--normalize", normalize)
    arguments.layers = 1
    model = example.build_model(arguments)
    model.get_layer("logits").kernel.assign(
        keras.random.normal((16, 11), stddev=4.0, seed=1)
    )
    received = model.evaluate(
        splicing.batches(utterances, 4), verbose=0, return_dict=True
    )
    entropies, errors = [], []
    # Traced once for all lengths.
    shape = (1, None, utterances[0].features.shape[1])
    infer = tf.function(
        lambda x: model(x, training=False),
        input_signature=[tf.TensorSpec(shape, utterances[0].features.dtype)],
    )
    for utterance in utterances:
        # By itself, no padding there.
        logits = infer(utterance.features[None]).numpy()[0]
        rows = np.arange(len(logits))
        log_probabilities = log_softmax(logits.astype("float64"))
        entropies.append(-log_probabilities[rows, utterance.classes])
        errors.append(logits.argmax(axis=-1) != utterance.classes)
    entropies_of_frames = np.concatenate(entropies)
    assert entropies_of_frames.std() > 0.5  # or a wrong mean would be right too
    # float32 through a layer and a sum of a thousand: 1e-5.
    assert received["frame_cross_entropy"] == pytest.approx(
        entropies_of_frames.mean(), rel=1e-5
    )
    assert received["frame_error_rate"] == pytest.approx(
        np.concatenate(errors).mean(), rel=1e-6
    )
    assert received["loss"] == pytest.approx(
        np.mean([e.sum() for e in entropies]), rel=1e-5
    )


def test_more_padding_changes_nothing(
    example, splicing, utterances, folder, monkeypatch
):
    arguments = parse(example, folder, "unused")
    arguments.layers = 1
    model = example.build_model(arguments)

    # Traced once for all lengths.
    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, 123), tf.float32),
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None, None), tf.float32),
        ]
    )
    def differentiate(features, classes, weights):
        with tf.GradientTape() as tape:
            logits = model(features, training=True)
            loss = model.compute_loss(features, classes, logits, weights)
        variables = [v.value for v in model.trainable_variables]
        return loss, tape.gradient(loss, variables)

    def step():
        features, classes, weights = next(iter(splicing.batches(utterances, 11)))
        loss, gradients = differentiate(features, classes, weights)
        return features.shape[1], float(loss), [g.numpy() for g in gradients]

    width, loss, gradients = step()
    monkeypatch.setattr(splicing, "LENGTHS", 350)
    wider, same_loss, same_gradients = step()
    assert (width, wider) == (300, 350)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, same_gradients, strict=True):
        # float32 sums over a thousand frames, of terms that cancel.
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * abs(one).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "--layers: must be at least 1. Received: 0"),
        (("--learning-rate", "0"), "--learning-rate: must be above 0. Received: 0"),
        (("--clip-norm", "nan"), "--clip-norm: must be above 0. Received: nan"),
        (("--momentum", "1"), "--momentum: must be in [0, 1). Received: 1"),
        (("--passes", "0"), "--passes: must be at least 1. Received: 0"),
        (
            ("--optimizer", "adam", "--nesterov"),
            "--nesterov is for --optimizer sgd. Received: --optimizer adam",
        ),
        (
            ("--optimizer", "adam", "--momentum", "0.9"),
            "--momentum is for --optimizer sgd. Received: --optimizer adam",
        ),
        (
            ("--held-out", "theo", "ann"),
            "--held-out is for --split speaker. Received: theo ann",
        ),
    ],
)
def test_arguments_are_refused_by_name(arguments, message, example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(list(arguments))
    assert message in capsys.readouterr().err


def test_arguments_reach_model_and_optimizer(example):
    def build(*arguments):
        arguments = [*("--layers", "3", "--units", "4"), *arguments]
        return example.build_model(example.parse_arguments(arguments))

    model = build("--statistics", "frame")
    assert model.input_shape == (None, None, 123)
    layers = [la for la in model.layers if isinstance(la, keras.layers.Bidirectional)]
    assert [la.forward_layer.units for la in layers] == [4, 4, 4]
    assert {la.backward_layer.statistics for la in layers} == {"frame"}
    assert {la.forward_layer.normalize for la in layers} == {"input"}
    sgd = model.optimizer
    assert isinstance(sgd, keras.optimizers.SGD)
    assert float(sgd.learning_rate) == pytest.approx(7.8e-4)
    assert (sgd.momentum, sgd.nesterov, sgd.global_clipnorm) == (0.5, False, 1_000)
    sgd = build("--momentum", "0", "--clip-norm", "3").optimizer
    assert (sgd.momentum, sgd.global_clipnorm) == (0, 3)
    assert build("--nesterov").optimizer.nesterov
    model = build("--optimizer", "adam", "--normalize", "none")
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert model.optimizer.global_clipnorm == 1_000
    assert type(model.layers[1].forward_layer) is keras.layers.LSTM


def test_a_batch_larger_than_the_data_is_refused(example, folder, tmp_path):
    arguments = parse(example, folder, tmp_path)
    arguments.batch_size = 33
    with pytest.raises(SystemExit, match=r"--batch-size.*training.*Received: 33"):
        example.load(arguments)


def rows_of(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").open()]
    return [{k: v for k, v in row.items() if k not in DURATIONS} for row in rows]


def assert_same(received, expected):
    """Dicts of figures. Threads may sum in another order: 1e-6."""
    assert received.keys() == expected.keys()
    for name, value in expected.items():
        assert received[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_that_was_not_stopped(
    example, folder, tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def run(output, epochs):
        arguments = parse(example, folder, output, "--epochs", epochs)
        arguments.layers = 1
        rows = example.run(arguments)
        return rows, json.loads((output / "results.json").read_text())

    rows, expected = run(whole, "2")
    run(stopped, "1")
    _, received = run(stopped, "2")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert expected["epochs"] == rows
    for one, other in zip(rows_of(stopped), rows_of(whole), strict=True):
        assert_same(one, other)
    for part in ("train", "dev"):
        assert_same(received[part], expected[part])
    for row in rows:
        for prefix in ("", "val_"):
            assert 0 < row[f"{prefix}frame_error_rate"] < 1
            # Untrained: about log 11 = 2.4.
            assert 1 < row[f"{prefix}frame_cross_entropy"] < 4
    assert rows[1]["frame_cross_entropy"] < rows[0]["frame_cross_entropy"]

    printed = capsys.readouterr().out
    assert "Recalibrating 1/1" in printed and "nats a frame, frame error" in printed
    configuration = json.loads((whole / "configuration.json").read_text())
    assert configuration["normalize"] == "input" and configuration["momentum"] == 0.5
    assert not {"output_dir", "data_dir", "epochs"} & set(configuration)


def main(example, folder, output, *arguments):
    code = example.main(
        [
            *("--smoke", "--data-dir", str(folder), "--passes", "1"),
            *("--output-dir", str(output), "--epochs", "1", *arguments),
        ]
    )
    assert code == 0
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
def test_a_run_of_the_stock_layer(example, folder, tmp_path, capsys):
    results = main(example, folder, tmp_path, "--normalize", "none")
    # Nothing is recalibrated: the last epoch's validation, again. float32: 1e-5.
    for name, value in results["dev"].items():
        assert results["epochs"][0][f"val_{name}"] == pytest.approx(value, rel=1e-5)
    assert "Recalibrating" not in capsys.readouterr().out


def one_layer(example, folder, output, *arguments):
    arguments = parse(example, folder, output, *arguments)
    arguments.layers = 1
    return arguments, example.load(arguments), example.build_model(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["true", "random"])
def test_new_speakers_are_recalibrated_on_features_alone(
    labels, example, folder, tmp_path, rng
):
    arguments, utterances, model = one_layer(
        example, folder, tmp_path, "--split", "speaker"
    )
    trained = {weight.path: weight.numpy() for weight in model.trainable_weights}
    if labels == "random":
        for number, utterance in enumerate(utterances["dev"]):
            classes = rng.integers(0, 11, len(utterance.classes)).astype("int32")
            utterances["dev"][number] = utterance._replace(classes=classes)
    results = example.evaluate(model, utterances, arguments)
    assert list(results) == ["train", "dev", "dev_recalibrated"]
    assert results["dev_recalibrated"].keys() == results["dev"].keys()
    assert results["dev_recalibrated"] != pytest.approx(results["dev"], rel=1e-3)

    # One layer: the statistics are those of W x over the frames of the dev strings.
    frames = np.concatenate([u.features for u in utterances["dev"]]).astype("float64")
    bidirectional = model.layers[1]
    for layer in (bidirectional.forward_layer, bidirectional.backward_layer):
        projected = frames @ layer.cell.kernel.numpy().astype("float64")
        norm = layer.cell.input_norm
        # float32 sums over some thousands of frames.
        for received, expected in (
            (norm.moving_mean, projected.mean(axis=0)),
            (norm.moving_variance, projected.var(axis=0)),
        ):
            np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    for weight in model.trainable_weights:
        np.testing.assert_array_equal(weight, trained[weight.path])


@pytest.mark.slow
def test_only_normalised_models_are_recalibrated_and_on_new_speakers(
    example, folder, tmp_path
):
    for options in (("--split", "speaker", "--normalize", "none"), ()):
        arguments, utterances, model = one_layer(example, folder, tmp_path, *options)
        results = example.evaluate(model, utterances, arguments)
        assert list(results) == ["train", "dev"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--normalize", "joint"),
        ("--statistics", "frame", "--optimizer", "adam"),
        ("--split", "speaker", "--held-out", "bob", "--nesterov"),
    ],
    ids=" ".join,
)
def test_other_runs(arguments, example, folder, tmp_path):
    results = main(example, folder, tmp_path, *arguments)
    assert ("dev_recalibrated" in results) == ("speaker" in arguments)
    for part in results.keys() - {"epochs"}:
        assert np.isfinite(list(results[part].values())).all()


@pytest.mark.slow
def test_it_learns(example, folder, tmp_path):
    """Tones are easy: at the end most frames are right, words included."""
    arguments = parse(example, folder, tmp_path, "--optimizer", "adam")
    arguments.epochs, arguments.learning_rate = 30, 0.02
    rows = example.run(arguments)
    assert rows[-1]["val_frame_error_rate"] < 0.2
