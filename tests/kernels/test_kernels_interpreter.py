"""Every kernel against its reference under the Triton interpreter, in a process of its own.

To work on one of these tests: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

_FOLDER = Path(__file__).parent / "interpreted"
_MODULES = sorted(path.stem for path in _FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[ElementTree.Element]:
    """Run the folder once; return its test cases."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(_FOLDER), f"--junit-xml={report}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(ended.stdout[-20000:], ended.stderr[-5000:])
    assert report.exists(), "the interpreter process wrote no report"
    return list(ElementTree.parse(report).iter("testcase"))


@pytest.mark.parametrize("module", _MODULES)
def test_interpreted(module: str, cases: list[ElementTree.Element]) -> None:
    """The module ran, and every test in it passed; none was skipped."""
    mine = [case for case in cases if case.get("classname", "").split(".")[-1] == module]
    assert mine, f"no test of {module} ran"
    for case in mine:
        assert not list(case), f"{case.get('name')}: {[child.get('message') for child in case]}"
        print(f"{case.get('name')}: passed in {case.get('time')} s")
