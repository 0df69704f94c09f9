"""What differs between minor releases of vLLM, for each of them, whichever is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError
from avmp_vllm.engine.layout.arena import get_global_kv_cache_groups, get_kv_cache_configs
from avmp_vllm.engine.layout.pages import checkpoint_tokens
from avmp_vllm.version import SUPPORTED_VLLM, minor_of


@pytest.fixture(params=SUPPORTED_VLLM)
def minor(request, monkeypatch) -> str:
    """Pretend that it is installed."""
    monkeypatch.setattr(minors, "minor", lambda: request.param)
    return request.param


def test_versions():
    """Builds and patch releases do not matter; the installed one is supported."""
    assert minor_of("0.32.1+cpu") == "0.32"
    assert minor_of("0.33.0.dev3+g12") == "0.33"
    assert minors.minor() in SUPPORTED_VLLM


def test_tokens_that_hashes_look_ahead(minor):
    """Handed on where there is such a thing."""
    pool = SimpleNamespace(num_hash_lookahead_tokens=3)
    assert minors.hash_lookahead(pool) == (
        {} if minor == "0.32" else {"num_hash_lookahead_tokens": 3}
    )


def test_auxiliary_outputs_follow_the_managers(minor):
    """From 0.33 on they keep a manager, and it must be the one that serves."""

    class Connector:
        def __init__(self, *args: object) -> None:
            self.args = args

    first = Connector()
    scheduler = SimpleNamespace(aux_output_connector=first, kv_cache_manager=1, connector=None)
    minors.renew_auxiliary_outputs(scheduler)
    assert (scheduler.aux_output_connector is first) is (minor == "0.32")
    if minor != "0.32":
        assert scheduler.aux_output_connector.args == (1, None)
    without = SimpleNamespace(aux_output_connector=None)
    minors.renew_auxiliary_outputs(without)
    assert without.aux_output_connector is None


def test_without_avmp_the_groups_are_vllms():
    """What vLLM passes reaches its own functions, also what only one minor passes."""
    config = SimpleNamespace(additional_config={})
    assert get_global_kv_cache_groups(lambda *args: args)(config, [{}]) == (config, [{}])
    for more in ((), (["group"],)):
        wrapped = get_kv_cache_configs(lambda *args: args)
        assert wrapped(config, [{}], [1], *more) == (config, [{}], [1], *more)


@pytest.mark.parametrize(
    ("page", "unit", "given", "spacing"),
    [
        (16, 16, None, 512),
        (16, 64, None, 512),
        (96, 192, None, 576),
        (528, 2112, None, 2112),
        (400, 400, None, 800),
        (16, 64, 128, 128),
    ],
)
def test_the_spacing_is_a_multiple_of_what_layers_take(page, unit, given, spacing):
    """Pages and layers alike; never the page itself."""
    cache = _cache(page)
    assert checkpoint_tokens(AVMPConfig(checkpoint_tokens=given), cache, unit) == spacing


@pytest.mark.parametrize(
    ("page", "unit", "given", "says"),
    [
        (16, 64, 96, r"page's 16 tokens and the 64 at which .* 128 is the next"),
        (16, 16, 16, r"page's 16 tokens, and more than one page, .* 32 is the next"),
        (16, 16, 40, r"48 is the next"),
    ],
)
def test_a_spacing_that_layers_do_not_take_is_refused(page, unit, given, says):
    """A layer that saved nothing there would leave a wrong state in the cache."""
    with pytest.raises(ConfigError, match=says):
        checkpoint_tokens(AVMPConfig(checkpoint_tokens=given), _cache(page), unit)


class _Cache(SimpleNamespace):
    DEFAULT_BLOCK_SIZE = 16


def _cache(page: int) -> _Cache:
    return _Cache(block_size=page, mamba_block_size=None)
