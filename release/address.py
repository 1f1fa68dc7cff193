"""Writes the address of the repository into every file that has it: `make links`.

The address is `Repository` in pyproject.toml. The notebooks have it in their Colab
badges and in the cells that clone the repository. README.md has it in its links and
images, since pages elsewhere, such as that of a package index, show README.md without
the files beside it; and in its `git clone`. CITATION.cff has it as `repository-code`.

As long as the address has the placeholder OWNER, the links of README.md stay relative,
and CITATION.cff has no `repository-code`.
"""

import argparse
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
BRANCH = "main"
PLACEHOLDER = "OWNER/"
NAME = r"[\w.-]+/[\w.-]+"
CLONE = "git clone <this repository> && cd keras_bnrnn"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit with status 1 if a file has another address",
    )
    arguments = parser.parse_args(argv)
    repository = repository_of(ROOT / "pyproject.toml")
    differ = 0
    for path, rewrite in files(ROOT):
        text = path.read_text(encoding="utf-8")
        changed = rewrite(text, repository)
        differ += changed != text
        if not arguments.check:
            path.write_text(changed, encoding="utf-8")
        verb = "to be written" if arguments.check else "written"
        print(f"{path.name}: links {'unchanged' if changed == text else verb}")
    return int(arguments.check and differ > 0)


def repository_of(project):
    """The repository's owner and name, such as `someone/keras_bnrnn`.

    Args:
        project: Path of pyproject.toml.

    Raises:
        SystemExit: If `Repository` is no address on GitHub, from which Colab and the
            notebooks read.
    """
    urls = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["urls"]
    address = urls["Repository"]
    match = re.fullmatch(rf"https://github\.com/({NAME})", address)
    if match is None:
        raise SystemExit(
            "error: `Repository` in pyproject.toml must be https://github.com/OWNER/"
            f"NAME. Received: {address}"
        )
    return match[1]


def files(root):
    """Lists the files that have the address, each with the function that writes it."""
    notebooks = sorted((root / "examples").glob("*.ipynb"))
    return [
        *((path, write_notebook) for path in notebooks),
        (root / "README.md", write_readme),
        (root / "CITATION.cff", write_citation),
    ]


def write_notebook(text, repository):
    """Writes the repository into a notebook's Colab badge and clone command.

    Args:
        text: str, the content of the file.
        repository: str, owner and name.

    Returns:
        str, the new content.
    """
    return re.sub(
        rf"(colab\.research\.google\.com/github/){NAME}(/blob/)"
        rf"|(git clone --quiet --depth 1 https://github\.com/){NAME}",
        lambda m: f"{m[1] or m[3]}{repository}{m[2] or ''}",
        text,
    )


def write_readme(text, repository):
    """Makes the links and images of README.md absolute, or relative without an owner.

    Args, Returns: As in `write_notebook`. Links within the page stay as they are.
    """
    text = relative(text)
    if repository.startswith(PLACEHOLDER):
        return text
    name = repository.partition("/")[2]
    clone = f"git clone https://github.com/{repository} && cd {name}"
    text = text.replace(CLONE, clone)

    files = f"https://github.com/{repository}/blob/{BRANCH}/"
    images = f"https://raw.githubusercontent.com/{repository}/{BRANCH}/"

    def absolute(match):
        target = match[2]
        base = images if target.endswith((".png", ".svg")) else files
        return f"{match[1]}{base}{target})"

    return outside_of_code(RELATIVE, absolute, text)


def relative(text):
    """Makes the links and images of a page that lead into a repository relative."""
    places = rf"raw\.githubusercontent\.com/{NAME}|github\.com/{NAME}/blob"
    pattern = rf"(\]\()https://(?:{places})/{BRANCH}/"
    text = outside_of_code(pattern, lambda m: m[1], text)
    return re.sub(
        rf"^git clone https://github\.com/{NAME} .*$", CLONE, text, flags=re.M
    )


# The target of a Markdown link or image that is a path.
RELATIVE = r"(\]\()(?!#|\w+:)([^)\s]+)\)"


def outside_of_code(pattern, replace, text):
    """Does `re.sub` everywhere but in fenced blocks of code."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(pattern, replace, part) for part in parts[::2]]
    return "".join(parts)


def write_citation(text, repository):
    """Writes `repository-code` of CITATION.cff, or removes it without an owner.

    Args, Returns: As in `write_notebook`.
    """
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.M)
    if repository.startswith(PLACEHOLDER):
        return text
    line = f'repository-code: "https://github.com/{repository}"\n'
    return re.sub(r"^(?=license: )", line, text, count=1, flags=re.M)


if __name__ == "__main__":
    sys.exit(main())
