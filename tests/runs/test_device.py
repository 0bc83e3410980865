from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from preceptor.errors import ConfigError
from preceptor.runs import device as device_module
from preceptor.runs.device import choose_device, exact_matmul_precision, parse_dtype, peak_memory_mib, set_threads


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_devices_of_this_machine() -> None:
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"device cup is not available \(did you mean 'cpu'\?\); here: auto, cpu"):
        choose_device("cup")
    with pytest.raises(ConfigError, match=r"device cuda:99 is not available.*; here: auto, cpu"):
        choose_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_missing_gpu_is_not_replaced_by_the_cpu() -> None:
    with pytest.raises(ConfigError, match="device cuda is not available"):
        choose_device("cuda")


@pytest.mark.gpu
def test_gpu() -> None:
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda:0")
    torch.zeros(1 << 20, device="cuda")
    assert peak_memory_mib(torch.device("cuda:0")) >= 4


def test_dtypes() -> None:
    assert parse_dtype("bfloat16") is parse_dtype("bf16") is torch.bfloat16
    assert parse_dtype("fp32") is torch.float32
    with pytest.raises(
        ConfigError, match=r"dtype 'flot32' is not known \(did you mean 'float32'\?\); allowed: float32, fp32"
    ):
        parse_dtype("flot32")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_threads(2) == torch.get_num_threads() == 2
    monkeypatch.setattr(device_module, "_num_cores", lambda: 8)
    assert set_threads() == torch.get_num_threads() == 2, "many cores: torch's own choice stays"
    monkeypatch.setattr(device_module, "_num_cores", lambda: 3)
    assert set_threads() == torch.get_num_threads() == 2, "three are many already"
    monkeypatch.setattr(device_module, "_num_cores", lambda: 2)
    assert set_threads() == torch.get_num_threads() == 1
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        set_threads(0)


@pytest.mark.skipif(sys.platform != "linux", reason="is about Linux's accounting")
def test_peak_memory_of_the_process() -> None:
    block = torch.ones(2**26)  # 256 MiB, every page of it touched
    with_block = peak_memory_mib(torch.device("cpu"))
    assert block.nbytes / 2**20 < with_block
    del block
    # The most so far, not what is held now; the kernel's count is off by some pages a core.
    assert peak_memory_mib(torch.device("cpu")) > with_block - 16
    assert peak_memory_mib(torch.device("cpu")) == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, rel=0.02
    )


@pytest.mark.skipif(sys.platform != "linux", reason="is about Linux's accounting")
def test_peak_memory_leaves_out_the_parents() -> None:
    """A process that holds 2 GiB starts one that holds torch alone (0.3 GiB), as ``preceptor doctor`` starts a run."""
    child = "import torch; from preceptor.runs.device import peak_memory_mib as p; print(p(torch.device('cpu')))"
    parent = (
        f"import subprocess, sys; held = b'1' * 2**31; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    said = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True).stdout
    assert 50 < float(said) < 1_500


def test_the_faster_matmul_setting_is_taken_only_at_equal_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a kernel that is exact under both settings, and one that rounds to bfloat16 under ``medium``."""
    before = torch.get_float32_matmul_precision()
    exact = torch.Tensor.__matmul__

    def always_exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return exact(left.double(), right.double()).to(left.dtype)

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return always_exact(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", always_exact)
    assert exact_matmul_precision(torch.device("cpu")) == "medium"
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert exact_matmul_precision(torch.device("cpu")) == "highest"
    assert torch.get_float32_matmul_precision() == before
