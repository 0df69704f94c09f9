"""One suite over every driver of virtual memory; the cases are in ``conformance.py``."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conformance
import pytest

HERE = Path(__file__).parent
#: The driver's numbers of what it refuses are not the host's signals.
FAULT = (-signal.SIGSEGV, -signal.SIGBUS, conformance.CUDA_FAULT)


@functools.cache
def fake_library(folder: Path) -> Path:
    """Build the library; the folder it is in."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc: the CUDA driver is not run over the fake libcuda.so.1")
    target = folder / "libcuda.so.1"
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-O1", "-o", target, HERE / "fake_libcuda.c", "-ldl"], check=True
    )
    return folder


@functools.cache
def has_bindings() -> bool:
    """Whether cuda-bindings is installed."""
    try:
        return importlib.util.find_spec("cuda.bindings.driver") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def has_device() -> bool:
    """Whether this machine has a CUDA driver with a device."""
    probe = "from avmp_vllm.backing.cuda_memory import CudaMemory; CudaMemory()"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


@pytest.fixture(params=conformance.DRIVERS)
def driver(request, tmp_path_factory) -> tuple[str, dict[str, str]]:
    """A driver, and the environment of the processes that use it."""
    name, environment = request.param, dict(os.environ)
    if "cuda" in name and not has_bindings():
        pytest.skip("no cuda-bindings: the CUDA driver is not tested")
    if name == "fake-cuda":
        folder = fake_library(tmp_path_factory.getbasetemp())
        environment["LD_LIBRARY_PATH"] = str(folder)
    if name == "cuda" and not has_device():
        pytest.skip("no CUDA device: the real driver is not tested")
    return name, environment


def run(driver: tuple[str, dict[str, str]], case: str) -> subprocess.CompletedProcess[str]:
    """Run a case in a process of its own."""
    name, environment = driver
    return subprocess.run(
        [sys.executable, str(HERE / "conformance.py"), name, case],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "case", [name for name in conformance.CASES if name not in conformance.FAULTS]
)
def test_holds(driver, case):
    done = run(driver, case)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", sorted(conformance.FAULTS))
def test_faults(driver, case):
    done = run(driver, case)
    assert done.returncode in FAULT, (done.returncode, done.stderr)


def test_kill_leaves_nothing(driver):
    """Half a GiB is back a moment after its holder is killed."""
    name, environment = driver
    child = subprocess.Popen(
        [sys.executable, str(HERE / "conformance.py"), name, "hold"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        held = available(name, child.pid)
        child.kill()
    for _ in range(50):
        if available(name, child.pid) - held > 400 << 20:
            break
        time.sleep(0.1)
    else:
        pytest.fail("half a GiB did not come back")
    assert not [file for file in os.listdir("/dev/shm") if "avmp" in file]


def available(name: str, pid: int) -> int:
    """Bytes that are free, by what counts the driver's memory best."""
    if name == "cuda":
        query = [
            "nvidia-smi",
            "--query-gpu=memory.free",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
        ]
        return int(subprocess.run(query, capture_output=True, check=True).stdout) << 20
    if name == "anonymous":  # the process's own: the system's moves by what else runs
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return 0
        return -(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) << 10)
    text = Path("/proc/meminfo").read_text()
    return -(int(re.search(r"Shmem:\s+(\d+)", text)[1]) << 10)


@pytest.mark.parametrize("case", ["reserved_addresses_fault", "unmapped_addresses_fault"])
def test_control_memory_that_answers_with_zeros(case):
    """The same cases over a driver that only drops the pages: they must not fault."""
    program = f"""
import conformance
from avmp_vllm.backing import libc

def drop(address, size):
    libc.map_pages(address, size, libc.PROT_ALL, libc.PRIVATE | libc.MAP_FIXED)

libc.fault_again = drop
libc.PROT_NONE = libc.PROT_ALL
conformance.main("memfd", {case!r})
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_no_driver_is_a_clear_error():
    """Without a library, and with one whose device cannot map, CUDA is refused by a sentence."""
    if not has_bindings() or has_device():
        pytest.skip("cuda-bindings is missing, or there is a device")
    program = "from avmp_vllm.backing.cuda_memory import CudaMemory\nCudaMemory()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "BackingError: there is no CUDA driver" in done.stderr


@pytest.mark.parametrize("driver", ["fake-cuda"], indirect=True)
def test_a_device_without_virtual_memory_is_refused(driver):
    _, environment = driver
    program = "from avmp_vllm.backing.cuda_memory import CudaMemory\nCudaMemory()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "FAKE_CUDA_NO_VMM": "1"},
        capture_output=True,
        text=True,
    )
    assert "CUDA device 0 has no virtual memory management" in done.stderr
