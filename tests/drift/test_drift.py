"""Each minor release of vLLM that AVMP is written for has what AVMP takes from it.

vLLM's source is read, not imported, so the release that is not installed is compared as well: pip
downloads it once (some 350 MB; only its Python files are kept). An upgrade of vLLM fails here, in
words, before it fails in a stack trace.
"""

from __future__ import annotations

import ast
import inspect

import meanings
import own
import pytest

from avmp_vllm.doctor import drift
from avmp_vllm.doctor.source import Function, Gone, SourceTree, parameters
from avmp_vllm.engine.entry import minors, seams
from avmp_vllm.version import SUPPORTED_VLLM

#: Looks into another module by minor release; tested by itself.
CHOOSES = minors.__name__
#: Overrides that do not take all that vLLM's function takes, and why that is right.
BY_NAME = {
    "vllm.v1.attention.backend:AttentionBackend.validate_configuration": "vLLM passes names only",
}


# -- functions -------------------------------------------------------------------------------------


def test_functions_take_what_avmp_passes(vllm, minor):
    """What is wrapped, overridden and called is there, with the parameters that are relied on."""
    assert drift.drifted(vllm, minor) == []


def test_functions_mean_what_they_meant(vllm, minor):
    """Their text is what somebody has read; see ``meanings.py`` for what to do where it is not."""
    found, known = meanings.of(vllm, minor), meanings.recorded(minor)
    changed = [where for where in found if found[where] != known.get(where)]
    assert not changed, "read what has changed in: " + ", ".join(changed)
    assert not set(known) - set(found), "recorded, and relied on no more"


def test_overrides_are_listed(vllm):
    """A subclass that stands before a method of vLLM's needs that method to stay as it is."""
    found = {
        where
        for subclass in own.subclasses(vllm)
        for where, _, _ in own.overridden(subclass, vllm)
        if not subclass.cls.module.startswith("avmp_vllm.bench")
    }
    assert sorted(found - set(drift.OVERRIDDEN)) == []
    assert len(found) > 70


def test_overrides_take_what_vllm_passes(vllm):
    """A new parameter of vLLM's would end a step with a TypeError, not a start with a message."""
    refused = []
    for subclass in own.subclasses(vllm):
        for where, ours, stock in own.overridden(subclass, vllm):
            problem = own.refusal(ours, stock)
            if problem and where not in BY_NAME and ours.name != "__init__":
                refused.append(f"{subclass.name}.{ours.name} {problem}")
    assert not refused


def test_wrappers_take_what_vllm_passes(vllm, minor):
    """The same for what stands at a seam."""
    refused = []
    for seam in drift.all_seams(minor):
        stock = vllm.find(f"{seam.module}:{seam.path}").node
        assert isinstance(stock, Function)
        problem = own.refusal(_wrapper(seam), stock)
        if problem:
            refused.append(f"{seam.wrapper} {problem}")
    assert not refused


def _wrapper(seam: seams.Seam) -> Function:
    """The function that a seam's wrapper returns."""
    maker = own.OWN.find(seam.wrapper).node
    (made,) = [
        node
        for node in own.functions(maker)
        if node is not maker and node.name not in ("hook", "accepted")
    ]
    return made


# -- names -----------------------------------------------------------------------------------------


def test_names_that_are_imported_exist(vllm):
    """Modules move between releases."""
    missing = {
        f"{module}: {source}.{name}"
        for module in own.modules()
        if module != CHOOSES
        for source, name in own.uses(module, vllm)
        if not vllm.has(source, name)
    }
    assert sorted(missing) == []


def test_attributes_of_subclasses_exist(vllm):
    """What AVMP's subclasses read of themselves and do not make is made by vLLM."""
    unknown = {
        subclass.name: names
        for subclass in own.subclasses(vllm)
        if (names := own.unknown_of_self(subclass, vllm))
    }
    assert unknown == {}


def test_attributes_of_arguments_exist(vllm):
    """What AVMP's functions read of vLLM's requests, configurations, specs and so on."""
    found = [line for module in own.modules() for line in own.Reader(module, vllm).unknown()]
    assert found == []


def test_what_is_chosen_by_minor_exists(vllm, minor, monkeypatch):
    """Every branch of ``minors.py`` that this minor takes finds what it imports and calls."""
    monkeypatch.setattr(minors, "minor", lambda: minor)
    module = "vllm.v1.core." + ("kv_cache_utils" if minor == "0.32" else "kv_cache_planning")
    for name in ("get_kv_cache_groups", "get_kv_cache_config_from_groups", "get_kv_cache_configs"):
        assert vllm.has(module, name)
    old = minor == "0.32"
    parser = f"vllm.entrypoints.{'launchers' if old else 'common'}.cli_args"
    assert vllm.has(parser, "make_arg_parser")
    assert vllm.has(parser, "validate_parsed_serve_args")
    alignment = (
        "vllm.model_executor.layers.mamba.abstract",
        "get_mamba_prefill_checkpoint_alignment",
    )
    assert vllm.has(*alignment) is not old
    for name in ("block_pool:BlockPool", "sched.scheduler:Scheduler"):
        attributes = vllm.attributes(vllm.find(f"vllm.v1.core.{name}"))
        assert ("num_hash_lookahead_tokens" in attributes) is not old
    connector = "vllm.distributed.aux_output_connector.connector:AuxOutputSchedulerConnector"
    taken = parameters(vllm.find(f"{connector}.__init__").node)
    assert taken == (("self",) if old else ("self", "kv_cache_manager", "kv_connector"))
    planned = parameters(vllm.find(f"{module}:get_kv_cache_configs").node)
    assert ("global_kv_cache_groups" in planned) is not old


def test_every_seam_is_of_some_minor():
    """A minor that is dropped takes its seams along."""
    for seam in (*seams.SELECTION, *seams.ENGINE, *seams.API, *seams.RUNNER_V1, *seams.RUNNER_V2):
        assert seam.minors
        assert set(seam.minors) <= set(SUPPORTED_VLLM)


# -- controls: what these tests are for is found ---------------------------------------------------


class Edited(SourceTree):
    """A source with a change."""

    def edit(self, module: str, before: str, after: str) -> None:
        """Change a module's text."""
        path = self._path(module)
        assert path is not None
        text = path.read_text("utf-8")
        assert before in text
        self._modules[module] = ast.parse(text.replace(before, after))


@pytest.fixture
def edited(vllm) -> Edited:
    """A source to change."""
    return Edited(vllm.root)


def test_control_a_parameter_is_renamed(edited, minor):
    """Named with what it takes now."""
    edited.edit("vllm.v1.core.block_pool", "def touch(self, blocks:", "def touch(self, pages:")
    (line,) = drift.drifted(edited, minor)
    assert (
        line
        == "vllm.v1.core.block_pool:BlockPool.touch takes (self, pages) and not (self, blocks, ...)"
    )


def test_control_a_function_is_gone(edited, minor):
    """Named."""
    edited.edit("vllm.v1.engine.core", "update_kv_cache_capacity", "say_capacity")
    (line,) = drift.drifted(edited, minor)
    assert line.startswith("vllm.v1.engine.core:update_kv_cache_capacity is gone")


def test_control_a_call_gets_another_argument(edited):
    """As ``get_kv_cache_configs`` did between 0.32 and 0.33."""
    module = "vllm.v1.core.block_pool"
    edited.edit(
        module, "def evict_blocks(self, block_ids:", "def evict_blocks(self, why, block_ids:"
    )
    pool = next(each for each in own.subclasses(edited) if each.name.endswith(":AVMPBlockPool"))
    problems = [
        own.refusal(ours, stock)
        for where, ours, stock in own.overridden(pool, edited)
        if where.endswith(".evict_blocks")
    ]
    assert problems == ["has block_ids in the place of why"]


def test_control_an_attribute_is_renamed(edited):
    """Of a parent class, and of an argument."""
    manager = "vllm.v1.core.single_type_kv_cache_manager"
    edited.edit(manager, "_partial_hit_reqs", "_hits_inside")
    unknown = [own.unknown_of_self(each, edited) for each in own.subclasses(edited)]
    assert {"_partial_hit_reqs"} in unknown
    edited.edit("vllm.v1.request", "shared_prefix_boundary", "junction")
    found = list(own.Reader("avmp_vllm.engine.scheduler.checkpoints", edited).unknown())
    assert any(line.endswith("reads Request.shared_prefix_boundary") for line in found)


def test_control_a_module_moves(tmp_path):
    """Imports through other modules and under conditions are followed; the rest is missed."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from .a import f as g\nimport os\n")
    (package / "a.py").write_text("if True:\n    def f(self, x, *, y=1, **z): '''Say.'''\n")
    tree = SourceTree(tmp_path)
    assert tree.has("vllm", "g")
    assert tree.has("vllm", "a")
    assert not tree.has("vllm", "f")
    assert parameters(tree.find("vllm:g").node) == ("self", "x", "y", "z")
    with pytest.raises(Gone, match=r"no module vllm\.b"):
        tree.find("vllm.b:f")


def test_control_what_a_function_says(tmp_path):
    """A changed line has another hash; a comment, a docstring and an indent have not."""
    (tmp_path / "vllm.py").write_text("def f(x):\n    '''Say.'''\n    return x + 1\n")
    first = SourceTree(tmp_path).digest("vllm:f")
    (tmp_path / "vllm.py").write_text(
        "if True:\n    def f(x):\n        '''Other.'''\n\n        # why\n        return x + 1\n"
    )
    assert SourceTree(tmp_path).digest("vllm:f") == first
    (tmp_path / "vllm.py").write_text("def f(x):\n    return x + 2\n")
    assert SourceTree(tmp_path).digest("vllm:f") != first


def test_the_source_tells_what_inspection_tells():
    """Of the installed vLLM, where both can be asked."""
    tree = SourceTree.installed()
    for seam in seams.of(seams.SELECTION + seams.ENGINE, minors.minor()):
        node = tree.find(f"{seam.module}:{seam.path}").node
        assert parameters(node) == tuple(inspect.signature(seams.stock(seam)).parameters)
