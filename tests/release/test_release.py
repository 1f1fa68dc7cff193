"""The scripts of release/, the workflow that runs them, and the pages about a release.

The scripts download packages, so no test here runs them as a whole: `.ci/run` does.
"""

import inspect
import io
import pathlib
import re
import sys
import tarfile
import tomllib
import zipfile

import pytest

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("keras_bnrnn", "keras_bnrnn_cli", "keras_bnrnn_client")


def wheel(path, without=(), more=()):
    names = [f"{p}/{name}" for p in PACKAGES for name in ("__init__.py", "py.typed")]
    names += ["keras_bnrnn/layers/lstm.py"]
    names += [
        f"keras_bnrnn-0.1.0.dist-info/{name}"
        for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")
    ]
    with zipfile.ZipFile(path / "a.whl", "w") as file:
        for name in [n for n in names if n not in without] + list(more):
            file.writestr(name, "")
    return path / "a.whl"


def test_a_whole_wheel_passes(release, tmp_path):
    release("check").check_wheel(wheel(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "keras_bnrnn/py.typed",
        "keras_bnrnn_client/py.typed",
        "keras_bnrnn-0.1.0.dist-info/licenses/LICENSE",
    ],
)
def test_a_wheel_must_have(name, release, tmp_path):
    check = release("check")
    with pytest.raises(check.CheckError, match=f"must have .*{name}"):
        check.check_wheel(wheel(tmp_path, without=[name]))


@pytest.mark.parametrize(
    "name", ["tests/conftest.py", "keras_bnrnn/notes.txt", "keras_bnrnn/a.pyc", "b.py"]
)
def test_a_wheel_must_not_have(name, release, tmp_path):
    check = release("check")
    with pytest.raises(check.CheckError, match=f"only modules.*{name}"):
        check.check_wheel(wheel(tmp_path, more=[name]))


SDIST = [
    *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
    *("SECURITY.md", "pyproject.toml", "Makefile", "requirements.txt"),
    *("tests/conftest.py", "keras_bnrnn/py.typed"),
]


def sdist(path, names):
    with tarfile.open(path / "a.tar.gz", "w:gz") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(f"keras_bnrnn-0.1.0/{name}"), io.BytesIO())
    return path / "a.tar.gz"


def test_the_files_of_a_source_distribution(release, tmp_path):
    check = release("check")
    check.check_sdist(sdist(tmp_path, SDIST))
    with pytest.raises(check.CheckError, match=r"must have \['SECURITY.md'\]"):
        check.check_sdist(sdist(tmp_path, set(SDIST) - {"SECURITY.md"}))
    with pytest.raises(check.CheckError, match=r"must not have \['tests/a.pyc'\]"):
        check.check_sdist(sdist(tmp_path, [*SDIST, "tests/a.pyc"]))


def test_the_first_steps_of_the_readme(release):
    check = release("check")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, program = check.first_steps(readme)
    assert command == "pip install .\n"
    compile(program, "README.md", "exec")
    assert "model.fit(" in program and "BNLSTM(" in program
    with pytest.raises(check.CheckError, match=r"README\.md must have a block"):
        check.first_steps("```python\n1\n```\n")


def test_every_extra_is_checked(release):
    check = release("check")
    assert set(check.RUNS) == set(PROJECT["project"]["optional-dependencies"])
    assert set(check.LIGHT) <= set(check.RUNS)
    for code in (*check.RUNS.values(), *check.FAILS.values()):
        compile(code, "check.py", "exec")


def test_a_command_that_fails_is_shown(release, tmp_path):
    environments = release("environments")
    environment = object.__new__(environments.Environment)
    environment.folder = tmp_path
    code = "import os; print(os.getcwd(), 'PYTHONPATH' in os.environ)"
    assert environment.run([sys.executable, "-c", code]) == f"{tmp_path} False\n"
    with pytest.raises(environments.CheckError, match=r"(?s)failed with status 3.*why"):
        environment.run("echo why; exit 3", shell=True)


def test_the_oldest_and_the_newest_versions(release):
    matrix = release("matrix")
    oldest = matrix.pins_of(PROJECT, "oldest")
    assert {"tensorflow==2.20.*", "keras==3.12.*"} <= set(oldest)
    newest = matrix.pins_of(PROJECT, "newest")
    assert newest == PROJECT["project"]["dependencies"]
    assert len(oldest) == len(newest)
    project = {"project": {"dependencies": ["keras~=3.12"]}}
    with pytest.raises(matrix.CheckError, match=r"Received: keras~=3\.12"):
        matrix.pins_of(project, "oldest")


def test_the_tests_of_the_matrix_exist(release):
    assert all((ROOT / name).exists() for name in release("matrix").TESTS)


def test_a_missing_python_is_an_error_unless_skipped(release, monkeypatch, capsys):
    matrix = release("matrix")
    monkeypatch.setattr(matrix, "find_interpreter", lambda version: None)
    assert matrix.main(["--python", "3.12"]) == 1
    assert "failed: Python 3.12" in capsys.readouterr().err
    assert matrix.main(["--skip-missing"]) == 0
    assert capsys.readouterr().out.count("not installed") == 3


@pytest.mark.parametrize("status, found", [(0, True), (127, False)])
def test_an_interpreter_that_does_not_run_is_missing(
    status, found, release, tmp_path, monkeypatch
):
    """A shim of pyenv ends with status 127 if its version is not selected."""
    shim = tmp_path / "python3.99"
    shim.write_text(f"#!/bin/sh\nexit {status}\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = release("matrix").find_interpreter("3.99")
    assert path == (str(shim) if found else None)


def test_the_workflow_runs_the_scripts_on_each_python(release):
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    axes = jobs["matrix"]["strategy"]["matrix"]
    assert axes["python"] == release("matrix").supported_pythons(PROJECT)
    assert axes["versions"] == list(release("matrix").SETS)
    commands = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    assert len(commands) == len(jobs)
    for command in commands:
        assert (ROOT / command.removeprefix("python ").split()[0]).exists(), command


def test_the_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Laurent", "Pereyra", "Brakel", "Zhang", "Bengio"]
    assert paper["url"].endswith("1510.01378") and paper["year"] == 2016


def test_the_commands_of_the_contributing_page_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)", page)) == targets - {"clean"}


def test_the_limits_on_the_security_page():
    """Those of the code, which the page names."""
    pytest.importorskip("starlette")
    from keras_bnrnn_client import ServingClient, front

    from keras_bnrnn.local_server import ModelServer, grpc_service, predict, server

    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters}

    assert defaults(ModelServer)["max_request_bytes"] == 64 * 1024**2
    assert defaults(ModelServer)["host"] == "127.0.0.1"
    assert defaults(front.make_front)["max_request_bytes"] == 64 * 1024**2
    assert defaults(front.make_front)["threads"] == 256
    assert defaults(ServingClient)["timeout"] == 10.0
    assert defaults(ServingClient)["max_response_bytes"] == 64 * 1024**2
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    for text in (
        "by default 64 MiB",
        "127.0.0.1 unless `--host` is given",
        "(64 MiB by default) and the number of concurrent requests: 256 run",
        "by default 10 seconds",
        f"over gRPC | {grpc_service._THREADS}; others wait",
        f"{predict._MAX_ERROR_LENGTH} characters",
        f"{server._GRACE_SECONDS} seconds",
        f"with {server._MAX_CONNECTIONS} or more",
        f"{server._MAX_HEADER_BYTES // 1024} KiB; headers",
        f"| {server._BODY_SECONDS} seconds, then 408",
        f"| {server._IDLE_SECONDS} seconds, then",
    ):
        assert text in page, text


def test_a_checkout_without_git_is_copied_alike(tmp_path, monkeypatch, release):
    environments = release("environments")
    if not (environments.ROOT / ".git").exists():
        pytest.skip("this is no clone")

    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*")}

    def fail(*arguments, **options):
        raise FileNotFoundError("git")

    tracked = files(environments.copy_of_checkout(tmp_path / "tracked"))
    monkeypatch.setattr(environments.subprocess, "run", fail)
    found = files(environments.copy_of_checkout(tmp_path / "found"))
    # A working tree may have files that are not committed yet.
    assert tracked <= found
    assert not {".git", ".venv", "build"} & {path.parts[0] for path in found}
