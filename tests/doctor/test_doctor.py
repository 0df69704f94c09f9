"""``avmp doctor`` on a command line: everything refused at once, what fits, and how it is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from avmp_vllm.doctor.check import Check, refusal_of
from avmp_vllm.doctor.serve_line import check_serve_line
from avmp_vllm.engine.entry.options import REFUSALS
from avmp_vllm.models import tiny_hybrids
from avmp_vllm.models.tiny_jamba import write_tiny_jamba

BYTES = 2_400_000
COMMAND = [sys.executable, "-m", "avmp_vllm.cli", "doctor"]


@pytest.fixture(scope="module")
def tiny_jamba(tmp_path_factory) -> str:
    return str(write_tiny_jamba(tmp_path_factory.mktemp("jamba")))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> str:
    return str(tiny_hybrids.write_tiny_llama(tmp_path_factory.mktemp("llama")))


def _checks(found) -> list[Check]:
    return [item for item in found if isinstance(item, Check)]


def _line(*words: str) -> tuple[list[Check], object]:
    """Checks of a command line, and the configuration if it could be built."""
    found = list(check_serve_line(words))
    built = [item for item in found if not isinstance(item, Check)]
    return _checks(found), built[0] if built else None


def _failed(checks: list[Check]) -> list[Check]:
    failed = [check for check in checks if check.mark == "fail"]
    assert all(check.way_out for check in failed), failed
    return failed


# -- a command line --------------------------------------------------------------------------------


def test_a_good_line_is_good(tiny_jamba):
    """With the flag and without it."""
    checks, config = _line(tiny_jamba, "--dtype", "float32", "--block-manager", "avmp")
    assert [check.mark for check in checks] == ["ok", "ok"]
    assert config is not None
    checks, config = _line("--model", tiny_jamba, "--dtype", "float32")
    assert not _failed(checks)
    assert "not given" in checks[0].says


#: A command line's words for refused options. The rest of the table needs other software, or is
#: known only once the configuration is built.
REFUSED = {
    "--kv-transfer-config": ('{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',),
    "--kv-offloading-backend": ("lmcache",),
    "--decode-context-parallel-size": ("2",),
    "--prefill-context-parallel-size": ("2",),
    "--speculative-config": ('{"method": "ngram_gpu", "num_speculative_tokens": 3}',),
    "--disable-hybrid-kv-cache-manager": (),
    "--num-gpu-blocks-override": ("100",),
    "--prefix-match-unit": ("16",),
    "--enable-mamba-shared-prefix-checkpoint": (),
    "--use-replayssm": (),
}


def test_everything_refused_is_reported_at_once(tiny_jamba):
    """Every option with its reason, also a class of one's own and a misspelt option of AVMP's."""
    table = {refusal.option: refusal for refusal in REFUSALS}
    given = {option: words for option, words in REFUSED.items() if option in table}
    assert len(given) > 4
    words = [word for option, values in given.items() for word in (option, *values)]
    words += ["--worker-cls", "my.Worker", "--block-manager", "avmp"]
    checks, config = _line(
        tiny_jamba, *words, "--additional-config", '{"avmp": {"page_token": 32}}'
    )
    failed = _failed(checks)
    refused = {check.data.get("option"): check for check in failed}
    for option in given:
        assert table[option].why in refused[option].says
        assert refused[option].says.startswith(option)
    others = [check.says for check in failed if "option" not in check.data]
    assert any("did you mean 'page_tokens'" in says for says in others)
    assert any(says.startswith("--worker-cls my.Worker") for says in others)
    assert len(failed) == len(given) + 2
    assert config is not None  # without them the line would serve


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-num-seq", "many"), "argument --max-num-seqs"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
        (("--additional-config", "[1]"), "is not a mapping"),
        (("--config", "/no/such.yaml"), "No such file"),
    ],
)
def test_a_line_that_vllm_cannot_read(tiny_jamba, words, says):
    """Its parser's own words."""
    (check,) = _failed(_line(tiny_jamba, *words)[0])
    assert says in check.says


def test_a_model_without_states(tiny_llama):
    """AVMP's reason, and the way out beside it."""
    (check,) = _failed(_line(tiny_llama, "--dtype", "float32")[0])
    assert "has no SSM layers" in check.says
    assert check.way_out == "serve it with --block-manager default"


def test_a_model_that_is_not_there(tmp_path):
    """vLLM's own error."""
    (check,) = _failed(_line(str(tmp_path / "nothing"))[0])
    assert check.name == "vLLM"
    assert "nothing" in check.says


def test_the_last_clause_of_a_refusal_is_the_way_out():
    """As AVMP's messages are written."""
    check = refusal_of("x", ValueError("page_tokens = 5: too odd; choose 16, or leave it out"))
    assert check.says == "page_tokens = 5: too odd"
    assert check.way_out == "choose 16, or leave it out"


# -- the command -----------------------------------------------------------------------------------


def _doctor(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, or with other code in its process first."""
    start = f"{code}\nimport sys; from avmp_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "doctor"] if code else COMMAND
    return subprocess.run(
        [*command, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
    )


LINE = ("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(BYTES))


def test_what_fits_is_what_the_engine_logs(tiny_jamba, monkeypatch):
    """The layers are built without weights, and come to the same figures."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # whatever is asked for, the report is alone
    done = _doctor("--json", tiny_jamba, *LINE, "--max-num-seqs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    found = {check["name"]: check["data"] for check in report["checks"]}
    fits = [check["data"] for check in report["checks"] if check["name"] == "fits"]

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    from avmp_vllm.engine.layout import capacity

    llm = LLM(
        tiny_jamba,
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=BYTES,
        max_num_seqs=4,
        enforce_eager=True,
        distributed_executor_backend="uni",
        additional_config={"block_manager": "avmp"},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    logged = "\n".join(capacity.describe(scheduler.vllm_config, scheduler.kv_cache_config))
    llm.llm_engine.engine_core.shutdown()
    assert f"AVMP arena: {found['memory']['cache_bytes']:,} bytes" in logged
    assert re.search(rf"KV page +{found['page sizes']['page_bytes']:,} bytes", logged)
    assert re.search(rf"SSM block +{found['page sizes']['block_bytes']:,} bytes", logged)
    assert [fit["tokens"] for fit in fits] == [256, 512]
    for fit in fits:
        sequences, stock = fit["sequences"], fit["stock_sequences"]
        total = f"{sequences * fit['tokens']:,}"
        assert re.search(rf" {fit['tokens']} +{sequences} +{total} +{stock} ", logged)


def test_the_report_is_aligned_and_ends_with_a_status(tiny_jamba):
    """One line a check, and the way out on the next."""
    done = _doctor(tiny_jamba, *LINE, "--use-replayssm", "--max-model-len", "8192")
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "installation"
    for line in lines:
        if line.startswith("  "):
            assert re.match(r"  (ok  |warn|fail|    )  .{14}  \S", line), line
    at = next(i for i, line in enumerate(lines) if "--use-replayssm: " in line)
    assert lines[at].startswith("  fail  refused ")
    assert lines[at + 1].strip() == "-> remove it, or use --block-manager default"
    assert any("a request of max_model_len=8192 tokens needs" in line for line in lines)
    assert lines[-1] == "2 to mend, each with its way out (->)"


_WITHOUT_VLLM = """
import importlib.metadata, sys
for name in ("vllm", "torch", "triton", "transformers", "pydantic", "psutil", "prometheus_client"):
    sys.modules[name] = None
stock = importlib.metadata.version
def version(name):
    if name in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        raise importlib.metadata.PackageNotFoundError(name)
    return stock(name)
importlib.metadata.version = version
"""


def test_without_vllm_it_says_so():
    """A clear line, and no traceback; the rest is not tried."""
    done = _doctor("model", "--use-replayssm", code=_WITHOUT_VLLM)
    assert done.returncode == 1
    assert done.stderr == ""
    assert re.search(
        r"^  fail  vllm +not installed\n +-> in a clone: `make setup`", done.stdout, re.M
    )
    assert "refused" not in done.stdout
    report = json.loads(_doctor("--json", code=_WITHOUT_VLLM).stdout)
    assert not report["ok"]
    assert {check["name"] for check in report["checks"] if check["mark"] == "fail"} == {
        "vllm",
        "torch",
        "transformers",
    }
