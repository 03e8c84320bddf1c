"""Another project's package `harp` in the same environment: the error names the distributions and the cure."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import harp
import harp.protocol

CURE = (
    "the distributions harpcaller and harp-protocol both have a Python package 'harp', so that one environment cannot "
    "have both. Use a virtual environment for each; or run 'pip uninstall harp-protocol' and then "
    "'pip install --force-reinstall harpcaller'"
)


def environment(directory: Path, *, ours: bool, files: dict[str, str]) -> Path:
    """Make a directory of packages with another distribution, and our package before it if it is in the same place."""
    if ours:
        shutil.copytree(Path(harp.__file__).parent, directory / "harp", ignore=shutil.ignore_patterns("__pycache__"))
    about = directory / "harp_protocol-0.5.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: harp-protocol\nVersion: 0.5.0\n")
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def run(program: str, *paths: Path) -> str:
    """Run a program with these directories of packages; return the last line of its error output."""
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}; {program}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("from harp.protocol import HarpMessage", "harp.protocol"),
        ("from harp.protocol import open_device", "harp.protocol"),
        ("from harp import device", "harp"),
        ("import harp; harp.HarpMessage", "harp"),
    ],
)
def test_missing_name_of_other_project_is_explained(tmp_path: Path, program: str, module: str) -> None:
    """Ours is found first: for example, it is installed from its sources."""
    files = {"harp/protocol/__init__.py": "class HarpMessage: pass", "harp/device/__init__.py": ""}
    other = environment(tmp_path, ours=False, files=files)
    name = program.split()[-1].rpartition(".")[2]
    found = run(program, Path(harp.__file__).parents[1], other)
    assert found == f"ImportError: module {module!r} has no attribute {name!r}: {CURE}"


def test_replaced_file_is_explained(tmp_path: Path) -> None:
    other = environment(tmp_path, ours=True, files={"harp/protocol/__init__.py": "import missing_numbers"})
    found = run("import harp; harp.HarpCaller", other)
    assert found == f"ImportError: No module named 'missing_numbers': {CURE}"


def test_working_mixture_works(tmp_path: Path) -> None:
    other = environment(tmp_path, ours=True, files={"harp/protocol/__init__.py": "", "harp/data.py": ""})
    assert (
        run("import harp; harp.HarpCaller('h'); from harp.protocol import dispatcher; from harp import data", other)
        == ""
    )


def test_missing_name_without_other_project_is_plain() -> None:
    for package in (harp, harp.protocol):
        assert not hasattr(package, "HarpMessage")
        assert not hasattr(package, "_private")
    assert run("from harp import HarpMessage", Path(harp.__file__).parents[1]).startswith(
        "ImportError: cannot import name 'HarpMessage' from 'harp'"
    )
