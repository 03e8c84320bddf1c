"""The legacy configuration files of docs/migrating.md load as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harpcaller.config import Address
from harpcaller.config import load as load_dispatcher
from harpd.config.settings import load as load_harpd

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()


def file_of_page(kind: str, directory: Path) -> Path:
    [text] = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = directory / "file"
    path.write_text(text)
    return path


def test_legacy_dispatcher_file_loads(tmp_path: Path) -> None:
    config = load_dispatcher(file_of_page("toml", tmp_path))
    assert config.ignored == ("log_handlers", "erlang")
    assert config.listen == (Address(None, 3502),)
    assert (config.max_age, config.max_exec_time, config.host_db_refresh) == (None, 600.0, 900.0)
    assert config.host_db_script == Path("/etc/harpcaller/update-hosts")


@pytest.mark.parametrize("path", ["/etc/harpd/lib", "[/etc/harpd/lib]", "{append: [/etc/harpd/lib]}"])
def test_legacy_harpd_file_loads(tmp_path: Path, path: str) -> None:
    file = file_of_page("yaml", tmp_path)
    file.write_text(file.read_text().replace("path: /etc/harpd/lib", f"path: {path}"))
    settings = load_harpd(file)
    assert (settings.network.address, settings.network.port) == ("127.0.0.1", 4306)
    assert settings.network.certfile == "/etc/harpd/harpd.cert.pem"
    assert settings.authentication["module"] == "harpd.auth.inconfig"
