"""The distributions: what they hold and what they say of themselves."""

import email
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = (
    ".github",
    "benchmarks",
    "docs",
    "examples",
    "keras_bnrnn",
    "keras_bnrnn_cli",
)
FOLDERS += ("release", "serving", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml")
FILES += ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")
FILES += ("mkdocs.yml", "requirements.txt")
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")


@pytest.fixture(autouse=True)
def seeded():
    """No Keras session needs to be cleared."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the sources, and the sdist and the wheel that were built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    # What must stay out: exported models and compiled files.
    shutil.rmtree(source / "serving/models", ignore_errors=True)
    expected = {
        str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()
    }
    for name in ("serving/models/speech/1/saved_model.pb", "tests/a.pyc"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    code = (
        "from setuptools import build_meta\n"
        f"build_meta.build_sdist({str(folder)!r})\n"
        f"build_meta.build_wheel({str(folder)!r})\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return expected, sdist, wheel


def test_the_source_distribution_holds_what_its_tests_need(built):
    expected, sdist, _ = built
    with tarfile.open(sdist) as file:
        names = {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == expected


def test_the_wheel_holds_the_packages(built):
    expected, _, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    client = {
        name.removeprefix("serving/client/")
        for name in expected
        if name.startswith("serving/client/")
    }
    assert "keras_bnrnn_client/py.typed" in client
    packages = {name for name in expected if name.startswith("keras_bnrnn")}
    assert names == packages | client


def test_the_metadata(built):
    with zipfile.ZipFile(built[2]) as file:
        (folder,) = {
            name.partition("/")[0] for name in file.namelist() if ".dist-info/" in name
        }
        metadata = email.message_from_bytes(file.read(f"{folder}/METADATA"))
        licence = file.read(f"{folder}/licenses/LICENSE")
        scripts = file.read(f"{folder}/entry_points.txt").decode()
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["License"] is None
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier")
    # PEP 639 allows no classifier beside the expression.
    assert not [name for name in classifiers if name.startswith("License")]
    pythons = [name.rpartition(" ")[2] for name in classifiers if ":: 3." in name]
    assert pythons == ["3.11", "3.12", "3.13"]
    assert "keras-bnrnn = keras_bnrnn_cli:main" in scripts


def test_pins_allow_the_versions_of_the_requirements():
    """The versions that were tried: those of requirements.txt, and TensorFlow 2.20."""
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += extra
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {name.lower().replace("_", "-"): v for name, v in pinned.items()}
    oldest = {
        "tensorflow": "2.20.0",
        "keras": "3.12.4",
        "tensorflow-serving-api": "2.20.0",
        "tensorflow-text": "2.20.1",
        "keras-hub": "0.25.1",
    }
    for text in declared:
        requirement = requirements.Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name == "keras-bnrnn":
            continue
        assert requirement.marker is None, text
        for version in {pinned[name], oldest.get(name, pinned[name])}:
            assert requirement.specifier.contains(version), f"{text}: {version}"
