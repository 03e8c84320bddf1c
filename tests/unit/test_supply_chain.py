"""What an installation consists of: locked versions, hashes, the bill of materials."""

from __future__ import annotations

import re
import tomllib

from support.sbom import ROOT, locked_packages, make_sbom

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    found = {re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements}
    return {match[0].lower() for match in found if match and match[0] != "harpcaller"}


def test_run_lock_has_every_dependency_with_hashes() -> None:
    locked = locked_packages()
    extras = [name for extra in PROJECT["project"]["optional-dependencies"].values() for name in extra]
    assert names([*extras, *PROJECT["build-system"]["requires"]]) <= set(locked)
    assert all(hashes for _, hashes in locked.values())


def test_run_lock_has_the_tested_versions() -> None:
    tested = {name: version for name, (version, _) in locked_packages(ROOT / "requirements.lock").items()}
    assert {name: version for name, (version, _) in locked_packages().items()}.items() <= tested.items()


def test_sbom_lists_the_locked_packages() -> None:
    sbom = make_sbom()
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    listed = {component["name"]: component for component in sbom["components"]}
    assert {name: component["version"] for name, component in listed.items()} == {
        name: version for name, (version, _) in locked_packages().items()
    }
    assert listed["msgspec"]["purl"] == f"pkg:pypi/msgspec@{listed['msgspec']['version']}"
    assert listed["msgspec"]["licenses"]
    assert listed["msgspec"]["properties"][0]["value"] in (ROOT / "requirements-run.lock").read_text()
    assert sbom["dependencies"][0]["dependsOn"] == [component["bom-ref"] for component in sbom["components"]]
