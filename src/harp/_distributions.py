"""The error for a missing name, which explains an environment with another project's package of the name `harp`."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: The distribution that installs this package.
_OWN = "harpcaller"


def missing_name(module: str, paths: Iterable[str], name: str) -> AttributeError | ImportError:
    """Return the error for a name that a package of ours, in these directories, does not have."""
    is_module = any(os.path.exists(os.path.join(path, name + end)) for path in paths for end in ("", ".py"))
    # hasattr() and the import of a module expect this error.
    error = AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
    return error if is_module or name.startswith("_") else explain_mixture(error) or error


def explain_mixture(error: Exception) -> ImportError | None:
    """Return an error that names other distributions with a package `harp`; None if there are no others."""
    from importlib.metadata import distributions

    others = {
        found.name
        for found in distributions()
        if found.name != _OWN and any(file.parts[0] == "harp" for file in found.files or ())
    }
    if not others:
        return None
    names = ", ".join(sorted(others))
    return ImportError(
        f"{error}: the distributions {_OWN} and {names} both have a Python package 'harp', so that one environment "
        "cannot have both. Use a virtual environment for each; or run "
        f"'pip uninstall {names.replace(',', '')}' and then 'pip install --force-reinstall {_OWN}'"
    )
