"""The example of the migration guide."""

import importlib.util
import pathlib
import re

import pytest

pytest.importorskip("sklearn")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    path = ROOT / "examples" / "migrate_digits.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_runs(example, capsys, monkeypatch):
    assert example.main(["--smoke", "--seeds", "3", "4"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| ([a-z][\w, -]+) \| ([\d.]+) ±", printed, re.M))
    assert list(rows) == example.STAGES
    before, migrated, _, tuned, folded = map(float, rows.values())
    assert before == migrated and tuned == folded
    assert "1 seed(s)" in printed and "seed 3" in printed and "seed 4" not in printed

    monkeypatch.setattr(example, "LARGEST_GAP", 0.0)
    monkeypatch.setattr(example, "run", lambda seed, options: (STAGES, [1.0, 0.0]))
    STAGES = dict.fromkeys(example.STAGES, (0.5, 1.0, 1.0))
    assert example.main(["--smoke"]) == 1
    assert "changed the outputs" in capsys.readouterr().err


def test_the_data_are_split_by_the_seed(example):
    (x, y), (x_test, y_test) = example.digits(1)
    assert x.shape == (1257, 8, 8) and x_test.shape == (540, 8, 8)
    assert x.min() >= 0.0 and x.max() == 1.0 and len(y) == 1257
    assert min((y_test == label).sum() for label in range(10)) >= 50
    assert (example.digits(2)[0][1] != y).any() and (example.digits(1)[0][1] == y).all()


def test_the_guide_names_its_options(example):
    """Every option in a command of the guide exists."""
    text = (ROOT / "docs" / "migrate.md").read_text()
    commands = re.findall(r"python examples/migrate_digits\.py(.*)", text)
    assert commands
    source = (ROOT / "examples" / "migrate_digits.py").read_text()
    for command in commands:
        for option in re.findall(r"--[\w-]+", command):
            assert f'add("{option}"' in source
