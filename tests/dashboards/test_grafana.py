"""The Grafana dashboard: every metric it asks for exists, and every metric of AVMP's is in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from avmp_vllm.models.tiny_jamba import write_tiny_jamba

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "avmp.json"
#: Every name of a metric in an expression; PromQL's functions and labels have no colon.
METRIC = re.compile(r"vllm:[a-z0-9_]+")

#: What `/metrics` serves, from an engine in a process of its own.
_EXPOSE = """
import sys
from prometheus_client import REGISTRY, generate_latest
from vllm import LLM
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128,
          kv_cache_memory_bytes=8 << 20, disable_log_stats=False,
          additional_config={"block_manager": "avmp"})
print(generate_latest(REGISTRY).decode())
"""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


@pytest.fixture(scope="module")
def exposed(tmp_path_factory) -> dict[str, set[str]]:
    """Labels of every series that an AVMP server exposes, by name."""
    model = write_tiny_jamba(tmp_path_factory.mktemp("jamba"))
    done = subprocess.run(
        [sys.executable, "-c", _EXPOSE, str(model)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    series: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(vllm:\w+)\{(.*)\} ", done.stdout, re.MULTILINE):
        series.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return series


def _panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in _panels(dashboard) for target in panel["targets"]]


def _missing(expressions: list[str], exposed: dict[str, set[str]]) -> set[str]:
    """Metrics that are asked for and not there."""
    return {name for text in expressions for name in METRIC.findall(text)} - set(exposed)


def test_every_metric_asked_for_exists(dashboard, exposed):
    """In expressions and in the variables' queries."""
    expressions = _expressions(dashboard)
    queries = [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert all(METRIC.search(text) for text in (*expressions, *queries))
    assert _missing(expressions + queries, exposed) == set()


@pytest.mark.parametrize(
    "name", ["vllm:avmp_made_up_total", "vllm:avmp_migrations", "vllm:gpu_cache_usage_perc"]
)
def test_a_made_up_metric_is_found_missing(dashboard, exposed, name):
    """The control of the test above: an invention, a counter without its ending, an old name."""
    assert _missing([*_expressions(dashboard), f"sum (rate({name}[1m]))"], exposed) == {name}


def test_every_metric_of_avmp_is_drawn(dashboard, exposed):
    """But for the times at which counters were made."""
    ours = {name for name in exposed if name.startswith("vllm:avmp_")}
    ours = {name for name in ours if not name.endswith("_created")}
    assert len(ours) > 10
    drawn = {name for text in _expressions(dashboard) for name in METRIC.findall(text)}
    assert ours - drawn == set()


def test_labels_asked_for_exist(dashboard, exposed):
    """What is summed by, selected and shown; ``instance`` is Prometheus's own."""
    asked = 0
    for panel in _panels(dashboard):
        for target in panel["targets"]:
            text = target["expr"]
            labels = set(re.findall(r"(\w+)=~?\"", text))
            for group in re.findall(r"by \(([\w, ]+)\)", text):
                labels |= set(group.split(", "))
            labels |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name in METRIC.findall(text):
                assert labels - {"instance"} <= exposed[name], (text, labels)
                asked += len(labels)
    assert asked


def test_expressions_are_whole(dashboard):
    """Each selects the server and the model, and closes what it opens."""
    for text in _expressions(dashboard):
        assert text.count('{instance=~"$instance", model_name=~"$model"') == len(
            METRIC.findall(text)
        )
        for begin, end in ("()", "[]", "{}"):
            assert text.count(begin) == text.count(end), text
        for name in METRIC.findall(text):
            counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
            assert counter == (f"rate({name}" in text), f"{name}: counters need a rate, gauges none"


def test_panels_are_complete(dashboard):
    """A title, a unit, a description and the chosen data source each; no two in one place."""
    panels = _panels(dashboard)
    places = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
        assert at["x"] + at["w"] <= 24
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    names = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource": "datasource", "instance": "query", "model": "query"}
    assert "__inputs" not in dashboard  # it imports without a question
