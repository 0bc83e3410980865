"""What every test gets: real data or a skip, no network but loopback, no credentials, one thread, checked shapes."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read before any library looks: nothing may phone home, and no figure needs a display.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
if os.environ.get("PRECEPTOR_TEST_DATA"):
    # Tests change directory and start processes elsewhere, so a relative path would come to mean something else.
    os.environ["PRECEPTOR_TEST_DATA"] = str(Path(os.environ["PRECEPTOR_TEST_DATA"]).resolve())

CREDENTIALS = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "HF_TOKEN", "WANDB_API_KEY")


def pytest_configure() -> None:
    """Check the shapes written in the signatures of the mathematics on every call that a test makes."""
    from jaxtyping import install_import_hook

    install_import_hook("preceptor.objectives", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    import torch

    torch.set_num_threads(1)  # the last bits of a sum depend on the number of threads
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real articles and models that ``PRECEPTOR_TEST_DATA`` names; the test is skipped without it."""
    folder = os.environ.get("PRECEPTOR_TEST_DATA")
    if not folder:
        pytest.skip("needs real articles and models: set PRECEPTOR_TEST_DATA to their folder")
    path = Path(folder)
    assert path.is_dir(), f"PRECEPTOR_TEST_DATA must be a folder, got {folder}"
    return path


def _is_loopback(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    """Behave as a machine without a network: other names do not resolve, other addresses cannot be reached."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refused(self: socket.socket, address: Any) -> bool:
        return self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0])

    def offline_connect(self: socket.socket, address: Any) -> None:
        if refused(self, address):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        connect(self, address)

    def offline_connect_ex(self: socket.socket, address: Any) -> int:
        return errno.ENETUNREACH if refused(self, address) else connect_ex(self, address)

    def offline_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_loopback(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", offline_connect)
        patch.setattr(socket.socket, "connect_ex", offline_connect_ex)
        patch.setattr(socket, "getaddrinfo", offline_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can spend anyone's money or act under anyone's name."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
