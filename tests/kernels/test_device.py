"""What this machine is said to have."""

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from tilewise.domain.device import DeviceKind, check_device_key
from tilewise.domain.errors import DeviceError
from tilewise.domain.software import Software
from tilewise.kernels import device as devices
from tilewise.kernels.backends import BACKENDS


@pytest.mark.parametrize("name", ["cuda:99", "cuda:256", "tpu", "", "meta", "cpu:1", "cuda:-1", "CUDA"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"no device '{name}'.*expected auto or one of cpu"):
        devices.select(name)


def test_select_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.select() == devices.select("auto") == devices.select("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"no device 'cuda' on this machine: expected auto or one of cpu$"):
        devices.select("cuda")


def test_select_takes_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a job has set its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert devices.select() == devices.select("cuda") == torch.device("cuda:3")
    assert devices.select("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="cpu, cuda:0, cuda:1, cuda:2, cuda:3"):
        devices.select("cuda:4")


def test_this_cpu() -> None:
    found = devices.describe(torch.device("cpu"))
    assert found.kind is DeviceKind.CPU
    assert found.units == torch.get_num_threads()
    assert found.arch.startswith(f"{os.uname().machine}.")
    assert found.capability == found.shared_memory == 0
    assert found.memory_gib * 2**30 >= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert check_device_key(found.key).endswith(f".{found.units}t")


def test_a_cpu_has_the_threads_that_torch_computes_with_now() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = devices.describe(torch.device("cpu"))
        torch.set_num_threads(2)
        two = devices.describe(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert (one.units, two.units) == (1, 2)
    assert one.key != two.key


@pytest.mark.parametrize(
    ("machine", "torchs", "features", "isa"),
    [
        ("x86_64", "AVX512", "", "avx512"),
        ("x86_64", "AVX2", "", "avx2"),
        ("x86_64", "DEFAULT", "", "sse2"),
        ("aarch64", "DEFAULT", "fp asimd", "neon"),
        ("aarch64", "SVE256", "fp asimd sve", "sve"),
        ("riscv64", "DEFAULT", "", "scalar"),
    ],
)
def test_the_widest_vectors(
    machine: str, torchs: str, features: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_cpuinfo", lambda: {"Features": features, "model name": "Some CPU @ 3.2 GHz"})
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    described = devices._cpu.__wrapped__(2)
    assert described.arch.rpartition(".")[2] == isa
    assert described.key == f"some-cpu-3-2-ghz.{isa}.2t"


def test_lowered_vectors_are_another_device() -> None:
    """Measurements of code that torch does not run here by itself must not pass for this machine's."""
    program = """
import torch
from tilewise.kernels.device import describe
print(describe(torch.device("cpu")).arch)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    # other machines have one set of vectors in torch
    expected = "x86_64.sse2" if os.uname().machine == "x86_64" else devices.describe(torch.device("cpu")).arch
    assert done.stdout.strip() == expected


def test_a_device_of_another_kind() -> None:
    with pytest.raises(DeviceError, match="expected a cpu or cuda device, got meta"):
        devices.describe(torch.device("meta"))


class NVMLError(Exception):
    pass


def fake_nvml(**functions: Any) -> Any:
    def refuse(*_: object) -> None:
        raise NVMLError("not supported")

    names = ("ClockInfo", "PowerUsage", "Temperature", "EnforcedPowerLimit", "ComputeRunningProcesses")
    refusing: dict[str, Any] = {f"nvmlDeviceGet{name}": refuse for name in names}
    known = {f"nvml{name}": function for name, function in functions.items()}
    return SimpleNamespace(NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, **{**refusing, **known})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU whose driver tells its memory and power draw, and refuses everything else, as in a virtual machine."""
    nvml = fake_nvml(
        DeviceGetMemoryInfo=lambda _: SimpleNamespace(total=143771 << 20), DeviceGetPowerUsage=lambda _: 123_456
    )

    @contextmanager
    def opened() -> Iterator[Any]:
        yield nvml

    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 << 30,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, uuid="1234",
    )  # fmt: skip
    monkeypatch.setattr(devices, "_nvml", opened)
    monkeypatch.setattr(devices, "_handle", lambda *_: "handle")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    devices._cuda.cache_clear()
    yield properties
    devices._cuda.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_hides_its_power_limit() -> None:
    found = devices.describe(torch.device("cuda:0"))
    assert found.key == "nvidia-h200.sm90.141g"
    assert found.capability == 90
    assert found.shared_memory == 232448


def test_a_slice_of_a_gpu(gpu: Any) -> None:
    gpu.name, gpu.total_memory = "NVIDIA H200 MIG 3g.71gb", 70 << 30
    found = devices.describe(torch.device("cuda:0"))
    assert found.name == "NVIDIA H200"
    assert found.key == "nvidia-h200.sm90.70g.mig-3g-71gb"


@pytest.mark.usefixtures("gpu")
def test_telemetry_leaves_out_what_a_gpu_does_not_tell() -> None:
    assert devices.telemetry(torch.device("cuda:0")) == devices.Telemetry(power_w=123.456)
    assert devices.telemetry(torch.device("cpu")) == devices.Telemetry()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("gone", ["_nvml", "_handle"])
def test_telemetry_of_a_driver_that_tells_nothing(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> NoReturn:
        raise DeviceError("NVML does not start") if gone == "_nvml" else NVMLError("not found")

    monkeypatch.setattr(devices, gone, raises)
    assert devices.telemetry(torch.device("cuda:0")) == devices.Telemetry()


# software


def test_software_of_a_cpu() -> None:
    found = devices.software(DeviceKind.CPU)
    assert found.torch == str(torch.__version__)
    assert type(found.torch) is str  # torch's own type calls 2.13 and 2.13.0 equal
    assert (found.triton, found.cuda, found.driver, found.cudnn) == (None, None, None, None)
    assert set(dict(found.kernels)) == {
        "cpu_tiled", "flash", "flash_cute", "flex", "plain", "sdpa",
        "triton_backward", "triton_decode", "triton_forward", "hopper_backward", "hopper_forward",
    }  # fmt: skip
    assert Software.parse(found.key) == found


TILED = {"triton_backward", "triton_forward", "hopper_backward", "hopper_forward"}
HOPPER = {"hopper_backward", "hopper_forward"}


@pytest.mark.parametrize(
    ("backend", "kernels", "libraries"),
    [
        ("cpu_tiled", {"cpu_tiled"}, {"torch"}),
        ("sdpa", {"sdpa"}, {"torch"}),
        ("sdpa_math", {"sdpa"}, {"torch"}),
        ("plain", {"plain"}, {"torch"}),
        ("triton", TILED, set()),
        ("triton_decode", {"triton_decode"}, set()),
        ("flex", {"flex"}, {"torch"}),
        ("flex_cpu", {"flex"}, {"torch"}),
        ("flash", {"flash"}, {"torch"}),
        ("flash_cute", {"flash_cute"}, set()),
    ],
)
def test_what_each_backend_depends_on(backend: str, kernels: set[str], libraries: set[str]) -> None:
    found = devices.software(DeviceKind.CPU).for_backend(backend)
    assert set(dict(found.kernels)) == kernels
    names = [item.name for item in dataclasses.fields(found) if item.name != "kernels"]
    assert {name for name in names if getattr(found, name) is not None} == libraries


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_a_hash_of_its_source(backend: str) -> None:
    assert devices.software(DeviceKind.CPU).for_backend(backend).kernels


@pytest.mark.parametrize(
    ("changed", "kernels"),
    [
        ("backends/tiled_cpu.py", {"cpu_tiled"}),
        ("backends/plain.py", {"plain"}),
        ("reference.py", {"plain"}),
        ("backends/sdpa.py", {"sdpa"}),
        ("triton_kernels/common.py", TILED),
        ("triton_kernels/forward.py", TILED),
        ("triton_kernels/padding.py", TILED),
        ("triton_kernels/backward.py", {"triton_backward"}),
        ("triton_kernels/hopper_common.py", HOPPER),
        ("triton_kernels/hopper_forward.py", {"hopper_forward"}),
        ("triton_kernels/hopper_backward.py", {"hopper_backward"}),
        ("triton_kernels/bias.py", {"triton_backward"}),
        ("triton_kernels/decode.py", {"triton_decode"}),
        ("triton_kernels/combine.py", {"triton_decode"}),
        ("backends/flex.py", {"flex"}),
        ("backends/flash.py", {"flash"}),
        ("backends/flash_cute.py", {"flash_cute"}),
    ],
)
def test_a_changed_source_changes_its_hash_alone(
    changed: str, kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(devices.__file__).parent
    for source in folder.rglob("*.py"):
        target = tmp_path / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(devices, "__file__", str(tmp_path / "device.py"))
    before = dict(devices._kernel_hashes.__wrapped__())
    assert before == dict(devices._kernel_hashes())
    (tmp_path / changed).write_text((tmp_path / changed).read_text() + "# changed\n")
    after = dict(devices._kernel_hashes.__wrapped__())
    assert {name for name in before if before[name] != after[name]} == kernels
