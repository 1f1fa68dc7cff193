"""`make links`: the address of the repository, from pyproject.toml into every file."""

import pathlib
import re
import shutil

import pytest

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[2]
PLACEHOLDER = "https://github.com/OWNER/keras_bnrnn"


@pytest.fixture
def address(release, tmp_path, monkeypatch):
    """The module, for a copy of the files that it writes."""
    module = release("address")
    (tmp_path / "examples").mkdir()
    for path, _ in module.files(ROOT):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    set_address(tmp_path, PLACEHOLDER)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    # The placeholder may be replaced in the checkout: the tests start from it.
    assert module.main([]) == 0
    return module


def set_address(folder, url):
    project = f"[project.urls]\nRepository = '{url}'"
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")


def texts(address, folder):
    return {p.name: p.read_text(encoding="utf-8") for p, _ in address.files(folder)}


def targets(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_files_of_the_checkout_have_the_address(release, capsys):
    assert release("address").main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["someone/bn_rnn", "a-1/b.c"])
def test_links_follow_the_address(address, name, tmp_path, capsys):
    before = texts(address, tmp_path)
    url = f"https://github.com/{name}"
    set_address(tmp_path, url)
    assert address.main(["--check"]) == 1
    assert texts(address, tmp_path) == before
    assert address.main([]) == 0
    assert capsys.readouterr().out.count("links written\n") == len(before)
    after = texts(address, tmp_path)

    for file, text in after.items():
        if not file.endswith(".ipynb"):
            continue
        badge = f"colab.research.google.com/github/{name}/blob/main/examples/{file})"
        assert badge in text
        assert f"!git clone --quiet --depth 1 {url} source" in text
        assert text.count(name) == 2  # nothing else has the address

    readme, relative = after["README.md"], targets(before["README.md"])
    files, images = (
        f"{url}/blob/main/",
        f"https://raw.githubusercontent.com/{name}/main/",
    )
    for old, new in zip(relative, targets(readme), strict=True):
        if old.startswith(("https://", "#")):
            assert new == old
        else:
            assert new == (images if old.endswith(".png") else files) + old
            assert (ROOT / old.partition("#")[0]).exists()
    assert sum(target.startswith(images) for target in targets(readme)) >= 2
    assert sum(target.startswith(files) for target in targets(readme)) >= 10
    assert f"\ngit clone {url} && cd {name.partition('/')[2]}\n" in readme

    assert yaml.safe_load(after["CITATION.cff"])["repository-code"] == url

    assert address.main([]) == 0
    assert "links written" not in capsys.readouterr().out
    set_address(tmp_path, PLACEHOLDER)
    assert address.main([]) == 0
    assert texts(address, tmp_path) == before


def test_without_an_owner_the_readme_has_no_absolute_links(address, tmp_path):
    found = texts(address, tmp_path)
    assert "OWNER" not in found["README.md"]
    assert not [t for t in targets(found["README.md"]) if "github" in t]
    assert "repository-code" not in yaml.safe_load(found["CITATION.cff"])


def test_blocks_of_code_and_other_links_stay(address):
    page = (
        "[a](b.md#c) ![d](e.png) [f](#g) [h](https://i.org/j) [![k](l.png)](m.md)\n"
        "```sh\n[n](o.md)\n```\n"
    )
    assert address.write_readme(page, "p/q") == (
        "[a](https://github.com/p/q/blob/main/b.md#c) "
        "![d](https://raw.githubusercontent.com/p/q/main/e.png) [f](#g) "
        "[h](https://i.org/j) "
        "[![k](https://raw.githubusercontent.com/p/q/main/l.png)]"
        "(https://github.com/p/q/blob/main/m.md)\n"
        "```sh\n[n](o.md)\n```\n"
    )


@pytest.mark.parametrize(
    "url", ["https://example.com/a/b", "https://github.com/a", "git@github.com:a/b"]
)
def test_an_address_that_colab_cannot_read_is_refused(url, address, tmp_path):
    set_address(tmp_path, url)
    with pytest.raises(SystemExit, match=f"`Repository`.* Received: {re.escape(url)}"):
        address.main([])
