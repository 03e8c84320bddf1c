"""Wheels made of installed packages, so that `pip install` of the project needs no network."""

from __future__ import annotations

import tomllib
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["make_wheels"]

#: Files that an installer adds to a package.
_ADDED = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}


def make_wheels(project: Path, directory: Path) -> None:
    """Make a wheel of each installed package that building and running the project needs.

    Args:
        project: the project; its pyproject.toml lists the needed packages.
        directory: where the wheels go.
    """
    described = tomllib.loads((project / "pyproject.toml").read_text())
    name = canonicalize_name(described["project"]["name"])
    optional = described["project"]["optional-dependencies"].values()
    pending = [*described["build-system"]["requires"], *(text for extra in optional for text in extra)]
    done = {name}
    while pending:
        requirement = Requirement(pending.pop())
        if canonicalize_name(requirement.name) in done or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        done.add(canonicalize_name(requirement.name))
        found = distribution(requirement.name)
        _make_wheel(found, directory)
        pending += found.requires or []


def _make_wheel(package: Distribution, directory: Path) -> None:
    tags = [line.split()[1] for line in (package.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
    name = canonicalize_name(package.metadata["Name"]).replace("-", "_")
    members = [
        path
        for path in package.files or []
        if ".." not in path.parts and "__pycache__" not in path.parts and path.name not in _ADDED
    ]
    (record,) = (path for path in package.files or [] if path.name == "RECORD" and ".dist-info" in path.parent.name)
    with zipfile.ZipFile(directory / f"{name}-{package.version}-{tags[0]}.whl", "w") as wheel:
        for path in members:
            wheel.write(str(path.locate()), str(path))
        wheel.writestr(str(record), "".join(f"{path},,\n" for path in [*members, record]))
