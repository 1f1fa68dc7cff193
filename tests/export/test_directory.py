"""Finding versions in a model's directory, and publishing versions and files."""

import os

import pytest

from keras_bnrnn.export.directory import (
    VersionExistsError,
    find_versions,
    publish_file,
    publish_version,
    unfinished_name,
)

# No process has this id: Linux ends below 2**22.
DEAD = 2**22 + 1


def test_find_versions(tmp_path):
    for name in ("10", "9", "007", "-1", "1.5", "v2", "٣", str(2**63), ".unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_bytes(b"a file")
    assert list(find_versions(tmp_path).items()) == [
        (7, tmp_path / "007"),
        (9, tmp_path / "9"),
        (10, tmp_path / "10"),
    ]
    with pytest.raises(OSError):
        find_versions(tmp_path / "none")


def test_publish_version(tmp_path):
    directory = tmp_path / "models" / "m"

    def write(path):
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"whole")

    assert publish_version(directory, None, write) == directory / "1"
    (directory / "4").write_bytes(b"a file takes the number as well")
    assert publish_version(directory, None, write) == directory / "5"
    assert publish_version(directory, 0, write) == directory / "0"
    with pytest.raises(VersionExistsError, match="version=5"):
        publish_version(directory, 5, write)
    assert sorted(os.listdir(directory)) == ["0", "1", "4", "5"]


def test_publish_file(tmp_path):
    path = tmp_path / "model.onnx"
    for pid, left in ((DEAD, False), (os.getpid(), True)):
        other = tmp_path / unfinished_name(pid, ".onnx")
        other.write_bytes(b"half")
        publish_file(path, True, lambda unfinished: unfinished.write_bytes(b"whole"))
        assert path.read_bytes() == b"whole"
        assert other.exists() == left
    other.unlink()

    def fail(unfinished):
        assert unfinished.suffix == ".onnx"
        unfinished.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_file(path, True, fail)
    with pytest.raises(FileExistsError, match="`overwrite=True` replaces it"):
        publish_file(path, False, lambda unfinished: unfinished.write_bytes(b"new"))
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"whole"
