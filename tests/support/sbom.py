"""Print the software bill of materials of an installation: CycloneDX 1.6, as JSON.

    ./dev sbom > harp.cdx.json

It lists the packages of requirements-run.lock with their hashes, and their licenses where they are installed here.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import harp

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-run.lock"
_PACKAGE = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def locked_packages(lock: Path = LOCK) -> dict[str, tuple[str, list[str]]]:
    """Return the packages of a lock file: version and SHA-256 hashes by name."""
    text = lock.read_text()
    starts = [*_PACKAGE.finditer(text)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {
        start[1]: (start[2], _HASH.findall(text, start.end(), end)) for start, end in zip(starts, ends, strict=True)
    }


def make_sbom() -> dict[str, Any]:
    """Return the bill of materials."""
    components = [_component(name, *locked) for name, locked in locked_packages().items()]
    own = {"type": "application", "bom-ref": "harpcaller", "name": "harpcaller", "version": harp.__version__}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**own, "licenses": [{"license": {"id": "MIT"}}]}},
        "components": components,
        "dependencies": [{"ref": "harpcaller", "dependsOn": [component["bom-ref"] for component in components]}],
    }


def _component(name: str, version: str, hashes: list[str]) -> dict[str, Any]:
    purl = f"pkg:pypi/{name.lower()}@{version}"
    component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    # An artifact of each platform has its own hash; the component as a whole has none.
    properties = [{"name": "harp:artifact-sha256", "value": value} for value in hashes]
    if license_text := _license(name):
        component["licenses"] = [{"license": {"name": license_text}}]
    return {**component, "properties": properties}


def _license(name: str) -> str | None:
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    classifiers = [line for line in about.get_all("Classifier", []) if line.startswith("License :: OSI Approved :: ")]
    found = next((str(about[key]) for key in ("License-Expression", "License") if key in about), "")
    if 0 < len(found) < 100:
        return found
    return str(classifiers[0]).rpartition(" :: ")[2] if classifiers else None


if __name__ == "__main__":
    json.dump(make_sbom(), sys.stdout, indent=1)
    print()
