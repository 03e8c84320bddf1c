"""Fixtures that many integration tests use."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.certificates import Certificates, server_files
from support.peers import Peer, server_context
from support.scripted import scripted_harpd
from support.shells import Shell, shell_of


@pytest.fixture(params=["sync", "aio"])
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    """The client library, synchronous and with asyncio."""
    with shell_of(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificate and key of a scripted harpd."""
    return server_files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls(files: Certificates) -> ssl.SSLContext:
    """The TLS context of a scripted harpd."""
    return server_context(files)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    """A scripted harpd: see `scripted_harpd` for its procedures."""
    with scripted_harpd(tmp_path) as peer:
        yield peer
