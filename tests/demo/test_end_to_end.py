"""The whole demo, small: two real servers, real HTTP, every answer compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AVMP = [sys.executable, "-m", "avmp_vllm.cli", "demo"]


def processes_about(word: str) -> list[str]:
    """Command lines of the processes that mention ``word``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if word in line:
            found.append(line)
    return found


@pytest.mark.timeout(420)
def test_avmp_and_stock_give_equal_answers_over_http(tmp_path: Path) -> None:
    options = {
        "--output": str(tmp_path),
        "--requests": "12",
        "--arena-mib": "2",
        "--max-model-len": "1024",
        "--concurrency": "6",
        "--long-concurrency": "2",
    }
    words = [word for option in options.items() for word in option]
    done = subprocess.run([*AVMP, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["requests"] == 12
    assert report["parity"] == 1.0
    assert report["throughput_ratio"] > 0
    assert report["migrations_kv_to_ssm"] > 0
    assert report["migrations_ssm_to_kv"] > 0
    assert report["relocated_bytes"] > 0
    for side in ("avmp", "stock"):
        assert report[side]["answered"] == 12
        assert report[side]["completion_tokens"] > 12 * 32
    assert report["avmp"]["peak_pages_ssm"] > 0
    assert report["stock"]["peak_pages_ssm"] is None  # stock vLLM it was
    assert "12 of 12" in done.stdout
    assert processes_about(str(tmp_path)) == []


def test_a_bad_conversation_file_is_one_line_before_any_server(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text('[{"id": "a", "conversations": [{"from": "human"}]}]')
    done = subprocess.run(
        [*AVMP, "--sharegpt", str(path), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"avmp demo: error: {path}: entry 0 (id 'a'): conversations[0]: field 'value' is missing"
    )
    assert not (tmp_path / "out").exists()
