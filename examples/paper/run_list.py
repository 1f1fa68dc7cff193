"""The runs behind docs/experiments.md."""

import dataclasses
import json
import pathlib
import shlex

LOGS = pathlib.Path(__file__).parents[2] / "docs" / "experiments"
SPEECH = ("--passes", "1", "--layers", "5", "--units", "32")


@dataclasses.dataclass(frozen=True)
class Run:
    """A program of this folder with its arguments.

    Attributes:
        name: Name of the log, docs/experiments/NAME.json.
        group: Group of the run, such as "figure1".
        script: Name of the program, without .py.
        arguments: Command line without --output-dir and --data-dir.
        data: Folder in --data-dir that the program reads. `None`: it needs no data.
    """

    name: str
    group: str
    script: str
    arguments: tuple
    data: str | None = None

    @property
    def command(self):
        return shlex.join(
            ["python", f"examples/paper/{self.script}.py", *self.arguments]
        )


def runs():
    """Returns all runs in the order in which `make experiments` makes them."""
    return [
        *language_models(),
        *speech(),
        *grid(),
        *digits(),
    ]


def language_models():
    def model(size, normalize, *more, group="figure2", suffix=""):
        return Run(
            f"language_model-{size}-{normalize}{suffix}",
            group,
            "language_model",
            ("--size", size, "--normalize", normalize, "--no-export", *more),
            data="ptb",
        )

    yield from (model("small", normalize) for normalize in ("none", "input"))
    yield model("small", "joint", *("--epochs", "4"), group="joint")
    yield model(
        *("small", "input", "--statistics", "sequence", "--epochs", "2"),
        group="statistics",
        suffix="-sequence",
    )
    for normalize in ("none", "input"):
        yield model("medium", normalize, "--hours", "1")


def speech():
    def run(group, normalize, seed, *more, suffix=""):
        return Run(
            f"speech-{normalize}{suffix}-{seed}",
            group,
            "speech_frames",
            (*SPEECH, "--normalize", normalize, "--seed", str(seed), *more),
            data="fsdd",
        )

    for seed in (1, 2, 3):
        for normalize in ("none", "input"):
            yield run("figure1", normalize, seed)
    yield run("statistics", "input", 1, "--statistics", "frame", suffix="-frame")
    yield run("joint", "joint", 1)
    for seed in (1, 2, 3):
        for normalize in ("none", "input"):
            more = ("--split", "speaker")
            yield run("speakers", normalize, seed, *more, suffix="-speakers")


def grid():
    """Learning rate x momentum x batch size, around those of the other speech runs."""
    for learning_rate in ("2.6e-4", "7.8e-4", "2.3e-3"):
        for momentum in ("0.5", "0.9"):
            for batch_size in ("32", "64"):
                for normalize in ("none", "input"):
                    yield Run(
                        f"grid-{learning_rate}-{momentum}-{batch_size}-{normalize}",
                        "figure3",
                        "speech_frames",
                        (
                            *("--passes", "1", "--layers", "2", "--units", "32"),
                            *("--epochs", "10", "--learning-rate", learning_rate),
                            *("--momentum", momentum, "--batch-size", batch_size),
                            *("--normalize", normalize),
                        ),
                        data="fsdd",
                    )


def digits():
    for seed in (1, 2, 3, 4, 5):
        for name, arguments in {
            "none": ("--normalize", "none"),
            "input": ("--normalize", "input"),
            "frame": ("--normalize", "input", "--statistics", "frame"),
            "joint": ("--normalize", "joint"),
        }.items():
            yield Run(
                f"digits-{name}-{seed}",
                "digits",
                "sequential_digits",
                (*arguments, "--seed", str(seed)),
            )


def is_published(run, folder=LOGS):
    """Returns whether the folder has a log of this run with the same command."""
    path = folder / f"{run.name}.json"
    if not path.exists():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["command"] == run.command
