"""The list of runs behind the results page, how they are made, and the page itself."""

import importlib
import json
import pathlib
import re
import statistics

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def experiments(paper):
    return paper("experiments")


@pytest.fixture(scope="module")
def figures(paper):
    return paper("figures")


@pytest.fixture(scope="module")
def comparisons(paper):
    return paper("comparisons")


@pytest.fixture(scope="module")
def run_list(paper):
    return paper("run_list")


def row(epoch, loss, seconds=2.0):
    names = ("loss", "frame_cross_entropy", "frame_error_rate", "perplexity")
    return {
        "epoch": epoch,
        "cpu_seconds": seconds,
        **dict.fromkeys(names, loss),
        **{f"val_{name}": loss + 1 for name in names},
    }


def publish(
    experiments,
    folder,
    run,
    losses,
    seconds=2.0,
    stopped=False,
    dev=None,
    dev_recalibrated=None,
):
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"frame_cross_entropy": 0.5, "frame_error_rate": 0.25}
    rows = [row(n, loss, seconds) for n, loss in enumerate(losses, 1)]
    if stopped:
        # 400 updates an epoch, half of the last one: 8 means of 50 in a whole one.
        for number, part in enumerate(rows, 1):
            part["iterations"] = 400 * number
            part["losses"] = [part["loss"]] * 8
        rows[-1] |= {"iterations": 400 * number - 200, "part": 0.5}
        rows[-1]["losses"] = rows[-1]["losses"][:4]
    record = {
        "name": run.name,
        "command": run.command,
        "machine": {"processor": "abacus", "cores": 1, "versions": "1", "date": "now"},
        "configuration": {"timesteps": 2},
        "epochs": rows,
        "results": {
            "dev": dev or metrics,
            "dev_recalibrated": dev_recalibrated or metrics,
            **{n: {"test": 123} for n in ("none", "input", "joint")},
        },
    }
    (folder / f"{run.name}.json").write_text(experiments.as_json(record))
    return record


# A program in the place of an example: it writes what `training.fit` writes.
PROGRAM = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(arguments["--output-dir"]) / "input"
folder.mkdir(exist_ok=True)
configuration = {"data": arguments["--data-dir"]}
(folder / "configuration.json").write_text(json.dumps(configuration))
with (folder / "log.jsonl").open("a") as log:
    log.write(json.dumps({"epoch": 1, "loss": 1 / 3, "losses": [2 / 3]}) + "\\n")
if "--fail" in arguments:
    sys.exit("it went wrong")
results = {"epochs": [], "test": 5}
(folder.parent / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def programs(experiments, tmp_path, monkeypatch, run_list):
    """Two runs of that program: one that ends and one that fails."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(experiments, "HERE", tmp_path)

    def run(name, *arguments):
        return run_list.Run(name, "group", "program", arguments, "ptb")

    found = [
        run("good", "--size", "small"),
        run("bad", "--fail", "1"),
    ]
    monkeypatch.setattr(experiments, "runs", lambda: found)
    return found


def start(experiments, tmp_path, *arguments):
    return experiments.main(
        [
            *("--data-dir", "data", "--output-dir", str(tmp_path / "runs")),
            *("--log-dir", str(tmp_path / "logs"), *arguments),
        ]
    )


def test_runs_are_made_and_published_once(
    experiments, programs, tmp_path, capsys, run_list
):
    assert start(experiments, tmp_path) == 1  # for one fails
    printed = capsys.readouterr()
    assert "2 runs, 2 of them to be made" in printed.out
    assert "bad: failed with 1; see" in printed.err
    assert "it went wrong" in (tmp_path / "runs" / "bad" / "output.txt").read_text()
    logs = tmp_path / "logs"
    assert {path.name for path in logs.iterdir()} == {"good.json"}
    record = json.loads((logs / "good.json").read_text())
    assert record["command"] == "python examples/paper/program.py --size small"
    assert record["configuration"] == {"data": "data/ptb"}
    assert record["epochs"] == [{"epoch": 1, "loss": 0.333333, "losses": [0.666667]}]
    assert record["results"] == {"test": 5}
    assert set(record["machine"]) == {"processor", "cores", "versions", "date"}

    assert start(experiments, tmp_path, "good") == 0
    assert "1 runs, 0 of them to be made" in capsys.readouterr().out
    programs[0] = run_list.Run("good", "group", "program", ("--size", "large"))
    start(experiments, tmp_path, "--list", "good")
    assert "1 runs, 1 of them to be made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing"],
            "names must be those of runs or of .*figure1.* Received: nothing",
        ),
        (["--jobs", "0"], "--jobs: must be at least 1. Received: 0"),
        (["--jobs", "4096"], "--jobs must be at most the .* Received: 4096"),
    ],
)
def test_arguments_are_refused_by_name(arguments, message, experiments, capsys):
    with pytest.raises(SystemExit):
        experiments.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_each_run_is_a_command_that_its_example_takes(experiments):
    names = [run.name for run in experiments.runs()]
    assert len(set(names)) == len(names)
    parsed = {}
    for run in experiments.runs():
        module = importlib.import_module(run.script)
        parsed[run.name] = module.parse_arguments(list(run.arguments))
    # The other speech runs are a point of the grid.
    for name in ("grid-7.8e-4-0.5-64-input", "speech-input-1"):
        point = parsed[name]
        settings = point.learning_rate, point.momentum, point.batch_size
        assert settings == (7.8e-4, 0.5, 64)
    assert parsed["grid-2.3e-3-0.9-32-none"].normalize == "none"
    assert parsed["speech-joint-1"].normalize == "joint"
    assert parsed["speech-input-frame-1"].statistics == "frame"
    assert parsed["language_model-small-input"].normalize == ["input"]


@pytest.fixture
def docs(experiments, tmp_path):
    """Logs of all runs: normalised ones are at the baseline's best at half its time."""
    folder = tmp_path / "docs" / "experiments"
    curves = {
        "none": [4.0, 3.0, 2.5, 2.0],
        "input": [3.0, 2.0, 1.5, 1.0],
        "joint": [4.5, 4.0, 3.5, 3.0],
        "frame": [3.5, 3.0, 2.5, 2.2],
    }
    for run in experiments.runs():
        kind = next(k for k in ("joint", "frame", "input", "none") if k in run.name)
        stopped = "medium" in run.name
        losses = curves[kind][: 2 if run.name.endswith("medium-none") else 4]
        publish(experiments, folder, run, losses, stopped=stopped)
    return folder.parent


def test_figures_and_page_are_made_of_the_logs(figures, docs, capsys):
    assert figures.main(["--docs-dir", str(docs)]) == 0
    drawn = {path.name for path in (docs / "figures").iterdir()}
    assert drawn == {f"{name}.png" for name in figures.FIGURES}
    for path in (docs / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    page = (docs / "experiments.md").read_text()
    for name in drawn:
        assert f"(figures/{name})" in page
    # Two epochs of 2 s instead of four, each of five seeds.
    assert "| digits, pixel by pixel | 5 | 2 ± 0 | 4.0 ± 0.0 | 2.0 ± 0.0 |" in page
    assert "0.50 ± 0.00 | 5 of 5 |" in page
    assert "| small | LSTM | 4 | 2.0 / 3.0 | 123.0 |" in page
    # The baseline was at update 600 after two rows of 2 s, with a loss of 3 over the
    # two timesteps; normalised, after one of 400 updates and half of another.
    assert "| medium | LSTM | 1.50 | 4.0 | 123.0 | 600 | 4.5 | 0 |" in page
    assert "| medium | BNLSTM | 3.50 | 2.0 | 123.0 | 600 | 2.7 | 0 |" in page
    assert "| medium | LSTM | 2" not in page
    assert "without a log" not in page


def test_what_is_not_there_is_said(figures, experiments, docs, capsys):
    for path in (docs / "experiments").iterdir():
        if not path.name.startswith("digits"):
            path.unlink()
    figures.main(["--docs-dir", str(docs)])
    page = (docs / "experiments.md").read_text()
    assert "figure1_speech: its runs are not there yet" in capsys.readouterr().out
    assert "figures/figure1" not in page and "figures/figure4_joint.png" in page
    assert (
        "Runs without a log: all 4 of figure2; " in page and "all 24 of figure3" in page
    )
    for path in (docs / "experiments").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match="make experiments"):
        figures.main(["--docs-dir", str(docs)])


def test_a_baseline_that_is_never_met_is_said(figures, experiments, docs, comparisons):
    for run in experiments.runs():
        if run.name.startswith("digits-input"):
            publish(experiments, docs / "experiments", run, [3.0, 2.5])
    logs = figures.read_logs(docs / "experiments")
    rows, ratios = comparisons.catching_up(logs)
    assert ratios["digits, pixel by pixel"] == [None] * 5
    assert ratios["speech, 5 x 32 each way"] == [0.5, 0.5, 0.5]
    (digits,) = (cells for cells in rows if cells[0].startswith("digits"))
    assert digits[-3:] == ["never", "never", "0 of 5"]


def test_logs_of_other_arguments_do_not_count(figures, experiments, docs):
    run = experiments.runs()[0]
    path = docs / "experiments" / f"{run.name}.json"
    path.write_text(path.read_text().replace("--size small", "--size large"))
    assert run.name not in figures.read_logs(docs / "experiments")


def test_the_page_is_that_of_its_logs(figures):
    logs = figures.read_logs(DOCS / "experiments")
    page = (DOCS / "experiments.md").read_text(encoding="utf-8")
    assert page == figures.results_page(logs)
    for name, draw in figures.FIGURES.items():
        figure = draw(logs)
        assert (figure is not None) == (DOCS / "figures" / f"{name}.png").exists()
        if figure is not None:
            figures.plt.close(figure)


def test_recalibration_on_new_speakers_is_said_as_it_came(
    figures, experiments, docs, paper
):
    def speakers(none, input_, recalibrated):
        """Each a list of three cross-entropies; error rates are a tenth of them."""

        def metrics(value):
            return {"frame_cross_entropy": value, "frame_error_rate": value / 10}

        for run in experiments.runs():
            if run.group == "speakers":
                seed = int(run.name[-1]) - 1
                values = none if "none" in run.name else input_
                publish(
                    *(experiments, docs / "experiments", run, [1.0]),
                    dev=metrics(values[seed]),
                    dev_recalibrated=metrics(recalibrated[seed]),
                )
        logs = figures.read_logs(docs / "experiments")
        return paper("task_sections").section_speakers(logs)

    section = speakers([0.7, 0.9, 1.1], [1.0, 1.0, 1.3], [0.8, 0.6, 0.7])
    assert "| 1 | 0.700 / 0.070 | 1.000 / 0.100 | 0.800 / 0.080 |" in section
    means = (
        "| mean ± sd | 0.900 ± 0.200 / 0.090 ± 0.020 | 1.100 ± 0.173 / 0.110 ± 0.017 "
        "| 0.700 ± 0.100 / 0.070 ± 0.010 |"
    )
    assert means in section
    assert (
        "lowers the cross-entropy of BNLSTM in 3 of 3 seeds, from 1.100 ± 0.173 to "
        "0.700 ± 0.100 in the mean. The recalibrated BNLSTM is better than the LSTM "
        "(0.900 ± 0.200) in 2 of 3 seeds, and better than the LSTM at its best epoch "
        "in 3 of 3." in section
    )
    section = speakers([0.7, 0.9, 1.1], [1.0, 1.0, 1.3], [1.2, 0.95, 1.3])
    assert "BNLSTM in 1 of 3 seeds" in section and "in 0 of 3 seeds, and" in section
    assert section in figures.results_page(figures.read_logs(docs / "experiments"))


def test_the_large_model_is_a_command_and_no_run(figures, experiments, docs):
    assert not any("large" in run.command for run in experiments.runs())
    page = figures.results_page(figures.read_logs(docs / "experiments"))
    (command,) = re.findall("^python (examples/.* --size large .*)$", page, re.M)
    script, *arguments = command.split()
    module = importlib.import_module(pathlib.Path(script).stem)
    parsed = module.parse_arguments(arguments)
    assert (parsed.size, parsed.epochs) == ("large", 55)
    assert parsed.normalize == ["none", "input"]


def verdict_of(figures, docs, task, claim):
    """The cells of verdict and figures in that task's row under that claim."""
    page = figures.results_page(figures.read_logs(docs / "experiments"))
    (section,) = (x for x in re.split("\n##+ ", page) if x.startswith(claim))
    (line,) = (x for x in section.splitlines() if x.startswith(f"| {task} |"))
    return line.strip("| ").split(" | ")[1:]


FASTER = "Normalising the input-to-hidden term speeds up training"
VALIDATION = "Validation is no better with the input-to-hidden term normalised"
JOINT = "Normalising the hidden-to-hidden term as well does not help training"


def republish(experiments, docs, losses, **options):
    """Replaces the log of each run that `losses` names."""
    for run in experiments.runs():
        if run.name in losses:
            folder = docs / "experiments"
            publish(experiments, folder, run, losses[run.name], **options)


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        (0, "confirmed: faster in 5 of 5 seeds"),
        (2, "**mixed**: faster in 3 of 5 seeds"),
        (5, "**contradicted**: not faster in 5 of 5 seeds"),
    ],
)
def test_verdict_on_speed_counts_seeds(slow, expected, figures, experiments, docs):
    names = [f"digits-input-{seed}" for seed in range(1, slow + 1)]
    # At the baseline's best after the same two epochs, of 5 s: 10 s against 8.
    republish(experiments, docs, {n: [3.0, 2.0] for n in names}, seconds=5.0)
    verdict, text = verdict_of(figures, docs, "digits, pixel by pixel", FASTER)
    assert verdict == expected
    mean = {0: "0.50 ± 0.00", 2: "0.80 ± 0.41", 5: "1.25 ± 0.00"}[slow]
    assert (
        text == f"BNLSTM reaches the LSTM's best training value in {mean} of its time"
    )


def test_verdict_on_speed_of_a_baseline_that_is_not_met(figures, experiments, docs):
    task = "digits, pixel by pixel"
    republish(experiments, docs, {"digits-input-1": [3.0, 2.5]})
    verdict, text = verdict_of(figures, docs, task, FASTER)
    assert verdict == "**mixed**: faster in 4 of 5 seeds"
    assert text.endswith("0.50 ± 0.00 of its time, in 4 of 5 seeds")
    republish(experiments, docs, {f"digits-input-{n}": [3.0, 2.5] for n in range(1, 6)})
    verdict, text = verdict_of(figures, docs, task, FASTER)
    assert verdict == "**contradicted**: not faster in 5 of 5 seeds"
    assert text == "BNLSTM never reaches the LSTM's best training value"


def test_verdict_on_the_first_hour(figures, experiments, docs):
    task = "language model, medium, first hour"
    verdict, text = verdict_of(figures, docs, task, FASTER)
    assert verdict == "confirmed: faster (one run)"
    assert text == (
        "training perplexity 2.718 with, 4.482 without after 600 updates, in 0.75 of "
        "the time"
    )
    worse = {"language_model-medium-input": [5.0, 4.0, 4.0]}
    republish(experiments, docs, worse, stopped=True)
    verdict, _ = verdict_of(figures, docs, task, FASTER)
    assert verdict == "**contradicted**: not faster (one run)"


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        (0, "confirmed: ahead in 12 of 12 settings"),
        (3, "**mixed**: ahead in 9 of 12 settings"),
        (12, "**contradicted**: not ahead in 12 of 12 settings"),
    ],
)
def test_verdict_on_the_grid(behind, expected, figures, experiments, docs, run_list):
    names = [run.name for run in run_list.grid() if run.name.endswith("-input")]
    republish(experiments, docs, {name: [3.0, 2.5] for name in names[:behind]})
    verdict, text = verdict_of(figures, docs, "speech, grid of settings", FASTER)
    assert verdict == expected
    least, most = 0.5 if behind < 12 else 1.25, 1.25 if behind else 0.5
    assert text.endswith(f"is {least:.2f} to {most:.2f} of that without")


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("speech, new strings", ["speech-input-1", "speech-input-2", "speech-input-3"]),
        ("speech, new speakers", [f"speech-input-speakers-{n}" for n in (1, 2, 3)]),
        ("language model, small", ["language_model-small-input"]),
    ],
)
def test_verdict_on_validation(task, names, figures, experiments, docs):
    # Better with it in the logs of `docs`, 2 against 3: the opposite of the claim.
    counted = "in 3 of 3 seeds" if len(names) == 3 else "(one run)"
    verdict, text = verdict_of(figures, docs, task, VALIDATION)
    assert verdict == f"**contradicted**: better {counted}"
    assert re.match(r"best validation [a-z-]+ 2( ± 0)? with, 3( ± 0)? without$", text)
    republish(experiments, docs, {names[0]: [3.0, 2.5]})
    if len(names) == 3:
        verdict, _ = verdict_of(figures, docs, task, VALIDATION)
        assert verdict == "**mixed**: no better in 1 of 3 seeds"
    # No better: the same will do.
    republish(experiments, docs, {name: [3.0, 2.0] for name in names})
    verdict, _ = verdict_of(figures, docs, task, VALIDATION)
    assert verdict == f"confirmed: no better {counted}"


def test_verdict_on_hidden_to_hidden(figures, experiments, docs):
    for task, count in {
        "language model, small": 1,
        "speech, new strings": 1,
        "digits, pixel by pixel": 5,
    }.items():
        counted = "in 5 of 5 seeds" if count == 5 else "(one run)"
        verdict, text = verdict_of(figures, docs, task, JOINT)
        assert verdict == f"confirmed: no better than the LSTM {counted}"
        spread = " ± 0" if count == 5 else ""
        assert text.split(" ", 3)[-1] == (
            f"3{spread} with both terms, 1{spread} with input-to-hidden alone, "
            f"2{spread} without, in 4 epochs"
        )
    page = figures.results_page(figures.read_logs(docs / "experiments"))
    assert "BNLSTM joint trains worse than BNLSTM" in page
    assert "in 7 of 7 comparisons." in page
    assert "they come from a tenth of the training text" in page
    # Ahead of the plain layer in the epochs that all three have, though not at last.
    better = {"speech-joint-1": [2.9, 2.8], "digits-joint-4": [1.5]}
    republish(experiments, docs, better)
    verdict, text = verdict_of(figures, docs, "speech, new strings", JOINT)
    assert verdict == "**contradicted**: better than the LSTM (one run)"
    assert text.endswith("3 without, in 2 epochs")
    verdict, _ = verdict_of(figures, docs, "digits, pixel by pixel", JOINT)
    assert verdict == "**mixed**: no better than the LSTM in 4 of 5 seeds"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([9.0, 1.0], "sequence-wise validation is better."), ([1.0, 9.0], "not better.")],
)
def test_sequence_wise_language_model(losses, expected, figures, experiments, docs):
    """After the same number of epochs, whatever came before or later."""
    republish(experiments, docs, {"language_model-small-input-sequence": losses})
    page = figures.results_page(figures.read_logs(docs / "experiments"))
    (line,) = (x for x in page.splitlines() if x.startswith("In a language model,"))
    assert line.endswith(expected)
    assert "2.0 / 3.0 with frame-wise" in line


def test_the_page_quotes_no_figure_of_the_paper(figures, docs):
    page = figures.results_page(figures.read_logs(docs / "experiments"))
    assert "https://arxiv.org/abs/1510.01378" in page
    assert "recalled" not in page and "the paper's |" not in page


def test_the_guide_has_the_figures_of_the_logs(figures, comparisons):
    """Each figure of docs/when_it_helps.md that an experiment gave."""
    logs = figures.read_logs(DOCS / "experiments")
    guide = " ".join((DOCS / "when_it_helps.md").read_text(encoding="utf-8").split())

    def best(prefix, metric):
        found = comparisons.seeds(logs, prefix)
        return statistics.mean(log.best(metric) for log in found)

    def end(prefix, part="dev"):
        found = comparisons.seeds(logs, prefix)
        return [log.results[part]["frame_cross_entropy"] for log in found]

    def best_of_three(task):
        return comparisons.best_of_three(logs, *comparisons.JOINT[task])

    def said(sentence):
        assert sentence in guide

    mean = statistics.mean
    dev = [best(f"speech-{n}", "val_frame_cross_entropy") for n in ("input", "none")]
    said("({:.2f} nats a frame against {:.2f})".format(*dev))
    _, ratios = comparisons.catching_up(logs)
    said(f"in {mean(ratios['speech, 5 x 32 each way']):.2f} of its time")
    digits = ratios["digits, pixel by pixel"]
    said(f"best training loss in {mean(digits):.2f} of the time on average")
    assert sum(ratio < 1 for ratio in digits) == 4
    said("faster in four of five seeds")
    points = comparisons.grid_points(logs).values()
    said(f"in {sum(bn < none for none, bn in points)} of {len(points)} settings")
    grid = [bn / none for none, bn in points]
    said(f"{min(grid):.2f} to {max(grid):.2f} of that without")
    medium = [logs[f"language_model-medium-{n}"] for n in ("input", "none")]
    hour = [log["val_perplexity"][-1] for log in medium]
    said("{:.0f} with normalisation and of {:.0f} without".format(*hour))

    small = [logs[f"language_model-small-{n}"] for n in ("input", "none")]
    training = [log.best("perplexity") for log in small]
    said("falls to {:.0f} with normalisation and to {:.0f} without".format(*training))
    validation = [log.best("val_perplexity") for log in small]
    said("is {:.0f} with normalisation and {:.0f} without".format(*validation))
    assert small[0].reaches("val_perplexity", validation[0]) == 5
    said(f"rises to {max(small[0]['val_perplexity'][5:]):.0f} after it")

    before, plain = end("speech-input-speakers"), end("speech-none-speakers")
    after = end("speech-input-speakers", "dev_recalibrated")
    said(f"{mean(before):.2f} nats a frame after the last epoch, {mean(plain):.2f} for")
    said(
        f"brings the normalised model to {mean(after):.2f}, lower in each of the three"
    )
    moved = [f"{b:.2f} to {a:.2f}" for b, a in zip(before, after, strict=True)]
    said(f"({', '.join(moved)})")
    assert sum(a < n for a, n in zip(after, plain, strict=True)) == 2
    said("(plain: {:.2f}, {:.2f} and {:.2f})".format(*plain))

    _, digits = best_of_three("digits, pixel by pixel")
    said(f"({mean(digits['joint']):.2f} nats at best, {mean(digits['none']):.2f} with")
    _, speech = best_of_three("speech, new strings")
    speech = {n: mean(values) for n, values in speech.items()}
    said("({joint:.2f} against {none:.2f})".format(**speech))
    said("normalisation alone ({input:.2f})".format(**speech))
    _, language = best_of_three("language model, small")
    language = {n: mean(values) for n, values in language.items()}
    said("is {joint:.0f}, against {none:.0f} without".format(**language))
    said("and {input:.0f} with input-to-hidden".format(**language))

    leak, fair = (
        logs[f"language_model-small-input{suffix}"].rows[1]
        for suffix in ("-sequence", "")
    )
    said(
        f"validation perplexity of {leak['val_perplexity']:.0f} after two epochs, "
        f"against {fair['val_perplexity']:.0f}"
    )
    said(f"({leak['perplexity']:.0f} against {fair['perplexity']:.0f})")
    frame, sequence = (best(f"digits-{n}", "val_loss") for n in ("frame", "input"))
    said(f"is {frame:.2f} nats with frame-wise statistics and {sequence:.2f} with")
