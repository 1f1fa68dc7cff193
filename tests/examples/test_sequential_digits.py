"""The pixel-by-pixel digits: data, a trial run, a restart."""

import json

import keras
import numpy as np
import pytest
import sklearn.datasets

PARTS = ("train", "dev", "test")
DURATIONS = ("seconds", "cpu_seconds")


@pytest.fixture(scope="module")
def example(paper):
    return paper("sequential_digits")


@pytest.fixture(scope="module")
def data(paper):
    return paper("handwritten_digits")


@pytest.fixture
def arrays(rng):
    """MNIST's arrays, 24 training images and 5 to test on."""
    arrays = {}
    for part, count in (("train", 24), ("test", 5)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 10, count, dtype=np.uint8)
    return arrays


def run(example, output, *arguments):
    code = example.main(["--smoke", "--output-dir", str(output), *arguments])
    assert code == 0
    return json.loads((output / "results.json").read_text())


def without_durations(rows):
    return [{k: v for k, v in row.items() if k not in DURATIONS} for row in rows]


def rows_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def in_order(pixels):
    return np.array(sorted(map(tuple, pixels.reshape(len(pixels), -1))))


def test_each_digit_is_in_one_part(data):
    parts = data.small(seed=1)
    assert [len(parts[part].labels) for part in PARTS] == [1197, 300, 300]
    together = np.concatenate([parts[part].pixels for part in PARTS])
    images = sklearn.datasets.load_digits().images
    np.testing.assert_array_equal(in_order(together), in_order(images) / 16)


def test_each_part_has_its_share_of_each_class(data):
    parts = data.small(seed=1)
    share = np.bincount(sklearn.datasets.load_digits().target) / 1797
    for pixels, labels in parts.values():
        assert len(pixels) == len(labels)
        # Rounded once for the test images, once more for the others.
        counts = np.bincount(labels)
        np.testing.assert_allclose(counts, share * len(labels), rtol=0, atol=1.5)


def test_the_split_is_by_the_seed(data):
    one, same, other = (data.small(seed) for seed in (1, 1, 2))
    for part in PARTS:
        np.testing.assert_array_equal(one[part].pixels, same[part].pixels)
        np.testing.assert_array_equal(one[part].labels, same[part].labels)
        assert np.any(one[part].pixels != other[part].pixels)


def test_pixels_come_row_by_row_and_keep_their_label(data):
    digits = sklearn.datasets.load_digits()
    numbers = {tuple(image.ravel()): n for n, image in enumerate(digits.images)}
    pixels, labels = data.small(seed=1)["dev"]
    assert pixels.shape == (300, 64, 1) and pixels.dtype == np.float32
    assert pixels.min() == 0 and pixels.max() == 1
    for sequence, label in zip(pixels, labels, strict=True):
        number = numbers[tuple(sequence[:, 0] * 16)]
        assert digits.target[number] == label
    image = np.arange(12.0).reshape(1, 3, 4)
    np.testing.assert_array_equal(data.sequences(image)[0, :, 0], np.arange(12))


def test_permute_has_one_order_for_all_parts(example):
    def load(*arguments):
        return example.load(example.parse_arguments(list(arguments)))

    plain, permuted, other = load(), load("--permute"), load("--permute")
    order = np.random.default_rng(1).permutation(64)
    assert sorted(order) == list(range(64)) and np.any(order != np.arange(64))
    for part in PARTS:
        np.testing.assert_array_equal(
            permuted[part].pixels, plain[part].pixels[:, order]
        )
        np.testing.assert_array_equal(permuted[part].labels, plain[part].labels)
        np.testing.assert_array_equal(permuted[part].pixels, other[part].pixels)


def test_mnist_is_read_from_a_folder(data, arrays, tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays)
    parts = data.mnist(tmp_path)
    images = {
        "train": arrays["x_train"][:20],
        "dev": arrays["x_train"][20:],  # a sixth of 24
        "test": arrays["x_test"],
    }
    labels = {
        "train": arrays["y_train"][:20],
        "dev": arrays["y_train"][20:],
        "test": arrays["y_test"],
    }
    for part in PARTS:
        pixels = parts[part].pixels
        assert pixels.shape == (len(images[part]), 784, 1)
        assert pixels.min() >= 0 and pixels.max() <= 1
        # float32: one rounding.
        np.testing.assert_allclose(
            pixels[:, :, 0], images[part].reshape(-1, 784) / 255, rtol=1e-6
        )
        np.testing.assert_array_equal(parts[part].labels, labels[part])


def test_mnist_is_downloaded_by_keras(data, arrays, monkeypatch):
    published = (
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
    )
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: published)
    assert [len(data.mnist()[part].labels) for part in PARTS] == [20, 4, 5]

    def fail():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    with pytest.raises(SystemExit, match=r"URL fetch failure.*npz.*--data-dir"):
        data.mnist()


def test_a_file_that_is_not_there_or_no_archive_is_refused(data, tmp_path):
    path = tmp_path / "mnist.npz"
    expected = r"(?s)x_train and x_test.*{}: {}.*https://.*mnist.npz"
    with pytest.raises(SystemExit, match=expected.format(path, ".*No such file")):
        data.mnist(tmp_path)
    for content in (b"", b"PK\x03\x04 cut off", b"text"):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=expected.format(path, ".+")):
            data.mnist(tmp_path)
    with path.open("wb") as file:  # an array by itself
        np.save(file, np.zeros(3))
    with pytest.raises(SystemExit, match=expected.format(path, "it is one array")):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("y_test", None, "y_test is missing; it has x_test, x_train, y_train"),
        (
            *("x_train", np.zeros((24, 784), np.uint8)),
            r"x_train is uint8 of shape \(24, 784\)",
        ),
        (
            *("x_test", np.zeros((5, 28, 28), np.float32)),
            r"x_test is float32 of shape \(5, 28, 28\)",
        ),
        ("x_train", np.zeros((0, 28, 28), np.uint8), "x_train has 0 images"),
        (
            *("y_train", np.zeros(23, np.uint8)),
            r"y_train is uint8 of shape \(23,\) for 24 images",
        ),
        ("y_test", np.zeros(5), r"y_test is float64 of shape \(5,\)"),
        ("y_test", np.array([0, 1, 2, 3, 10]), "y_test has values from 0 to 10"),
    ],
)
def test_arrays_that_are_not_mnists_are_refused(
    name, value, found, data, arrays, tmp_path
):
    arrays[name] = value
    np.savez(
        tmp_path / "mnist.npz", **{k: v for k, v in arrays.items() if v is not None}
    )
    with pytest.raises(SystemExit, match=rf"{tmp_path / 'mnist.npz'}: {found}"):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-dir", "data"), "--data-dir is for --mnist. Received: data"),
        (("--learning-rate", "0"), "--learning-rate: must be above 0. Received: 0"),
        (("--units", "0"), "--units: must be at least 1. Received: 0"),
        (("--layer", "rnn"), "invalid choice: 'rnn'"),
    ],
)
def test_arguments_are_refused_by_name(arguments, message, example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(list(arguments))
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(example):
    arguments = example.parse_arguments(["--batch-size", "1198"])
    with pytest.raises(SystemExit, match=r"--batch-size.*1197 .*Received: 1198"):
        example.load(arguments)


def test_a_run_of_the_stock_layer(example, tmp_path, capsys):
    results = run(
        example, tmp_path / "out", *("--normalize", "none"), *("--epochs", "1")
    )
    assert [row["epoch"] for row in results["epochs"]] == [1]
    for part in ("dev", "test"):
        assert 0 <= results[part]["accuracy"] <= 1
        # Logits of an untrained layer of 8 units are near 0: log 10 = 2.3.
        assert 2 < results[part]["loss"] < 3
    # Nothing is recalibrated: the last epoch's validation, again. float32: 1e-5.
    assert results["dev"]["loss"] == pytest.approx(
        results["epochs"][0]["val_loss"], rel=1e-5
    )
    printed = capsys.readouterr().out
    assert "train 256, dev 256, test 256; 64 timesteps" in printed
    assert "dev accuracy" in printed and "Recalibrating" not in printed


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_that_was_not_stopped(
    example, tmp_path, monkeypatch, capsys
):
    recalibrated = []
    recalibrate = example.keras_bnrnn.recalibrate

    def spy(model, data, **kwargs):
        recalibrated.append(data)
        return recalibrate(model, data, **kwargs)

    monkeypatch.setattr(example.keras_bnrnn, "recalibrate", spy)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(example, whole, "--epochs", "2")
    run(example, stopped, "--epochs", "1")
    received = run(example, stopped, "--epochs", "2")

    rows = rows_of(whole / "log.jsonl")
    # 256 images in batches of 64: not an update more.
    assert [row["iterations"] for row in rows] == [4, 8]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(rows[0])
    assert without_durations(rows) == without_durations(rows_of(stopped / "log.jsonl"))
    assert without_durations(expected["epochs"]) == without_durations(rows)
    assert (received["dev"], received["test"]) == (expected["dev"], expected["test"])

    train = example.load(example.parse_arguments(["--smoke"]))["train"]
    assert len(recalibrated) == 3
    for data in recalibrated:
        np.testing.assert_array_equal(data, train.pixels)
    assert "Recalibrating 1/1: recurrent" in capsys.readouterr().out

    configuration = json.loads((whole / "configuration.json").read_text())
    assert configuration["normalize"] == "input"
    assert not {"output_dir", "data_dir", "epochs"} & set(configuration)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--normalize", "joint"),
        ("--normalize", "input", "--statistics", "frame"),
        ("--layer", "gru", "--permute"),
        ("--layer", "simple_rnn", "--optimizer", "rmsprop"),
        ("--layer", "gru", "--normalize", "none"),
    ],
    ids=" ".join,
)
def test_other_runs(arguments, example, tmp_path):
    results = run(example, tmp_path / "out", *arguments, "--epochs", "1")
    assert np.isfinite([results[part]["loss"] for part in ("dev", "test")]).all()


@pytest.mark.slow
def test_a_run_on_mnist(example, arrays, tmp_path):
    for name in ("x_train", "y_train"):
        arrays[name] = np.tile(arrays[name], (4,) + (1,) * (arrays[name].ndim - 1))
    np.savez(tmp_path / "mnist.npz", **arrays)
    folder = ("--mnist", "--data-dir", str(tmp_path))
    results = run(example, tmp_path / "out", *folder, "--epochs", "1")
    assert np.isfinite(results["test"]["loss"])
