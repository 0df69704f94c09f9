"""Every command of vLLM that builds an engine, with the flag and without.

vLLM hands engine arguments on in ways of its own: as keywords, through pickle, parsed once more.
Each command runs in this process, from its words to the engine's configuration; the benchmarks and
``run-batch`` also run for real; and ``vllm serve`` shows what a user reads when AVMP refuses.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from avmp_vllm.demo.server import free_port
from avmp_vllm.engine.entry import last_line
from avmp_vllm.engine.entry.config import SELECTED
from avmp_vllm.models.tiny_jamba import write_tiny_jamba

FLAG = ("--block-manager", "avmp")
ENGINE = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"),
    *("--kv-cache-memory-bytes", "8000000"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny Jamba that knows the token ids which ``bench latency`` draws, those below 10,000."""
    return str(write_tiny_jamba(tmp_path_factory.mktemp("jamba"), vocab_size=10_000))


@pytest.fixture
def batch(tmp_path, model) -> Path:
    """The input of ``run-batch``."""
    request = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 3,
        },
    }
    path = tmp_path / "batch.jsonl"
    path.write_text(json.dumps(request))
    return path


# -- in this process, up to the engine's configuration ---------------------------------------------


class _Built(BaseException):
    """A command got as far as its engine's configuration; no ``except Exception`` stops it."""

    def __init__(self, config: Any) -> None:
        self.config = config


class _ProcessHere:
    """Runs its target in this process, on arguments that went through pickle as in a real one."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        engine_args, *others = args
        self._run = lambda: target(pickle.loads(pickle.dumps(engine_args)), *others)

    def start(self) -> None:
        self._run()


@pytest.fixture
def vllm_command(monkeypatch, tmp_path) -> Callable[..., Any]:
    """Run ``vllm`` with some words; return the engine configuration that it makes of them."""
    from vllm.benchmarks import mm_processor
    from vllm.entrypoints.cli.main import main
    from vllm.entrypoints.launchers.render import entry

    load_general_plugins()
    create = EngineArgs.create_engine_config

    def build(self: EngineArgs, *args: Any, **kwargs: Any) -> None:
        raise _Built(create(self, *args, **kwargs))

    async def build_renderer(vllm_config: Any, *args: Any) -> None:
        raise _Built(vllm_config)

    monkeypatch.setattr(EngineArgs, "create_engine_config", build)
    monkeypatch.setattr(entry, "build_and_serve_renderer", build_renderer)
    monkeypatch.setattr(mm_processor, "validate_args", lambda args: None)
    monkeypatch.setattr(multiprocessing, "Process", _ProcessHere)
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda *args, **kwargs: None)
    # The servers of vLLM put their process's name before every line that is printed.
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    # Two API servers share one, which vLLM would leave behind to every server started later.
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["vllm", *map(str, words)])
        with pytest.raises(_Built) as built:
            main()
        return built.value.config

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


COMMANDS = {
    "serve": ("serve", "MODEL", "--port", "PORT"),
    "serve, two API servers": ("serve", "MODEL", "--port", "PORT", "--api-server-count", "2"),
    "bench latency": ("bench", "latency", "--model", "MODEL"),
    "bench throughput": (
        *("bench", "throughput", "--model", "MODEL", "--dataset-name", "random"),
        *("--num-prompts", "1"),
    ),
    "bench throughput, asynchronous": (
        *("bench", "throughput", "--model", "MODEL", "--dataset-name", "random"),
        *("--num-prompts", "1", "--async-engine"),
    ),
    "bench startup": ("bench", "startup", "--model", "MODEL", "--num-iters-cold", "1"),
    "bench mm-processor": ("bench", "mm-processor", "--model", "MODEL"),
    "run-batch": ("run-batch", "-i", "BATCH", "-o", "BATCH.out", "--model", "MODEL"),
    "preload": ("preload", "--model", "MODEL"),
}


@pytest.mark.parametrize("flag", [(), FLAG], ids=["without", "with"])
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_flag_reaches_the_engine_of_every_command(vllm_command, model, batch, words, flag):
    """AVMP's scheduler with the flag, vLLM's own without."""
    filled = {"MODEL": model, "BATCH": batch, "PORT": free_port()}
    config = vllm_command(*(filled.get(word, word) for word in words), *ENGINE, *flag)
    scheduler = str(config.scheduler_config.scheduler_cls)
    assert ("AVMP" in scheduler) == bool(flag), scheduler
    assert bool(config.additional_config) == bool(flag)


@pytest.mark.parametrize("flag", [(), FLAG], ids=["without", "with"])
def test_launch_render_takes_the_flag(vllm_command, model, flag):
    """It has no engine, and so nothing to put AVMP in charge of."""
    config = vllm_command("launch", "render", model, "--port", free_port(), *ENGINE, *flag)
    assert config.scheduler_config.scheduler_cls is None


def test_bench_sweep_startup_takes_the_flag():
    """A sweep starts other commands; this one looks at which options they take."""
    from vllm.benchmarks.sweep.startup import _get_supported_startup_keys

    load_general_plugins()
    assert "block_manager" in _get_supported_startup_keys()


@pytest.mark.parametrize("flag", [(), FLAG], ids=["without", "with"])
def test_snapshot_create_takes_the_flag(vllm_command, model, flag):
    """Its words go to a server that it starts; vLLM takes models from a hub only."""
    with pytest.raises(ValueError, match="requires an immutable remote model"):
        vllm_command("snapshot", "create", model, "--snapshot-dir", "none", *ENGINE, *flag)


# -- for real --------------------------------------------------------------------------------------


def _vllm(*words: object, multiprocessing: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of vLLM; its two streams come back as one."""
    environment = {
        **{k: v for k, v in os.environ.items() if k not in (SELECTED, last_line.FILE)},
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    return subprocess.run(
        [Path(sys.executable).with_name("vllm"), *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


BENCHMARKS = {
    "latency": (
        *("--input-len", "8", "--output-len", "4", "--batch-size", "1"),
        *("--num-iters-warmup", "1", "--num-iters", "1"),
    ),
    "throughput": (
        *("--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "4"),
        *("--num-prompts", "2"),
    ),
}


@pytest.mark.parametrize("flag", [(), FLAG], ids=["without", "with"])
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmarks_run(model, benchmark, flag):
    """To their figures, and with AVMP's arena only where it is asked for."""
    one_process = ("--distributed-executor-backend", "uni")
    options = (*BENCHMARKS[benchmark], *ENGINE, *one_process, *flag)
    done = _vllm("bench", benchmark, "--model", model, *options)
    assert done.returncode == 0, done.stdout
    assert "Avg latency:" in done.stdout or "Throughput:" in done.stdout
    assert ("AVMP arena: 8,000,000 bytes" in done.stdout) == bool(flag)


def test_bench_startup_runs(model):
    """Its engines live in processes of their own, one after another."""
    iterations = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1")
    done = _vllm("bench", "startup", "--model", model, *iterations, *ENGINE, *FLAG)
    assert done.returncode == 0, done.stdout
    assert "STARTUP TIME BENCHMARK RESULTS" in done.stdout
    assert done.stdout.count("AVMP arena: 8,000,000 bytes") == 2


def test_run_batch_runs(model, batch):
    """An asynchronous engine, its core and its worker, each a process."""
    output = batch.with_suffix(".out")
    words = ("run-batch", "-i", batch, "-o", output, "--model", model, *ENGINE, *FLAG)
    done = _vllm(*words, multiprocessing=True)
    assert done.returncode == 0, done.stdout
    assert "AVMP arena: 8,000,000 bytes" in done.stdout
    (answer,) = map(json.loads, output.read_text().splitlines())
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 3


def test_too_small_an_arena_is_the_last_line(tiny_jamba):
    """Refused by the engine core, two processes away, below the tracebacks of vLLM."""
    words = ("serve", tiny_jamba, "--port", free_port(), *ENGINE, *FLAG)
    done = _vllm(*words, "--kv-cache-memory-bytes", 300_000, multiprocessing=True)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("vllm: error: AVMP: a request of max_model_len=256 tokens needs"), last
    assert "the arena has 300000: raise --kv-cache-memory-bytes" in last


def test_page_that_the_backend_does_not_take_is_the_last_line(tiny_jamba):
    """Refused by a worker, three processes away."""
    words = ("serve", tiny_jamba, "--port", free_port(), *ENGINE, *FLAG)
    done = _vllm(*words, "--additional-config.avmp.page_tokens", 48, multiprocessing=True)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("vllm: error: AVMP: page_tokens = 48: CPU_ATTN takes pages of"), last


def test_wrong_options_end_a_command_without_a_traceback(tiny_jamba):
    """The message is all that there is."""
    done = _vllm("serve", tiny_jamba, *FLAG, "--additional-config", "[1]")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("vllm: error: AVMP: --additional-config [1] is not a mapping"), last
