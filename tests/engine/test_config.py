"""Options: what is accepted, where, and what the errors say."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

import pytest
import torch
from enginelib import engine
from vllm.config import KVTransferConfig
from vllm.config.cache import MambaCacheMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser, human_readable_int

from avmp_vllm.core.keeper import ANSWER_TOKENS, CUT_TOKENS
from avmp_vllm.engine.entry import last_line
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError, selected
from avmp_vllm.engine.entry.options import REFUSALS, refuse
from avmp_vllm.engine.entry.selection import ASYNC_SCHEDULER, SCHEDULER, take_charge
from avmp_vllm.engine.layout.elastic import elastic_sizes
from avmp_vllm.engine.worker.elastic import driver_of


def _parse(*words: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(words)))


# -- the flag and the mapping ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--block-manager", "avmp", "--additional-config", '{"avmp": {"migration_batch": 7}}'),
        ("--additional-config", '{"avmp": {"migration_batch": 7}}', "--block-manager", "avmp"),
        ("--additional-config", '{"block_manager": "avmp", "avmp": {"migration_batch": 7}}'),
    ],
)
def test_flag_and_mapping_in_any_order(words):
    """The flag and ``--additional-config`` may stand before or after each other."""
    assert selected(_parse(*words).additional_config) == AVMPConfig(migration_batch=7)


@pytest.mark.parametrize("words", [(), ("--block-manager", "default")])
def test_default_changes_nothing(words):
    """No trace of the flag remains in the configuration."""
    arguments = _parse(*words)
    assert not arguments.additional_config
    assert selected(arguments.additional_config) is None


def test_flag_wins_over_the_mapping():
    """The more visible place decides."""
    words = ("--block-manager", "default", "--additional-config", '{"block_manager": "avmp"}')
    assert selected(_parse(*words).additional_config) is None


def test_unknown_block_manager_on_the_command_line(capsys):
    """argparse names the option, the value and the choices."""
    with pytest.raises(SystemExit):
        _parse("--block-manager", "avpm")
    error = capsys.readouterr().err
    assert "--block-manager" in error
    assert "avpm" in error
    assert "default" in error


def test_wrong_options_on_a_command_line_are_found_at_once():
    """Not by a process that the command starts."""
    with pytest.raises(ConfigError, match="did you mean 'page_tokens'"):
        _parse("--block-manager", "avmp", "--additional-config", '{"avmp": {"page_token": 4}}')


@pytest.mark.parametrize("value", ["[1]", "5", "{", "true", '"avmp"', "avmp.yaml"])
def test_additional_config_that_is_not_a_mapping(value):
    """Named with the way out if AVMP needs it; else it is vLLM's to judge."""
    with pytest.raises(ConfigError) as refused:
        _parse("--block-manager", "avmp", "--additional-config", value)
    assert str(refused.value).startswith(f"--additional-config {value} is not a mapping")
    assert """write '{"avmp": {...}}'""" in str(refused.value)
    for words in ((), ("--block-manager", "default")):
        assert _parse(*words, "--additional-config", value).additional_config == value


@pytest.mark.parametrize("value", ["", "{}"])
def test_empty_additional_config(value):
    """The same as none."""
    arguments = _parse("--block-manager", "avmp", "--additional-config", value)
    assert selected(arguments.additional_config) == AVMPConfig()


def test_an_uncaught_refusal_is_one_line(capsys):
    """This process's own without a traceback; another process's below the traceback of vLLM."""
    _parse("--block-manager", "avmp")
    sys.excepthook(ConfigError, ConfigError("page_tokens = 1:\n  no"), None)
    assert capsys.readouterr().err == "vllm: error: AVMP: page_tokens = 1: no\n"
    with pytest.raises(ConfigError), last_line.left_by(ConfigError):
        raise ConfigError("too small: \udcff")
    sys.excepthook(RuntimeError, RuntimeError("initialization failed"), None)
    *above, last = capsys.readouterr().err.splitlines()
    assert above == ["RuntimeError: initialization failed"]
    assert last == r"vllm: error: AVMP: too small: \udcff"


def test_yaml_file(tmp_path):
    """Options may live in a file."""
    path = tmp_path / "avmp.yaml"
    path.write_text("checkpoint_tokens: 256\nmigration_batch: 16\n")
    config = selected({"block_manager": "avmp", "avmp": str(path)})
    assert config == AVMPConfig(checkpoint_tokens=256, migration_batch=16)


def test_verify_by_environment(monkeypatch):
    """``AVMP_VERIFY=1`` turns checking on without touching the configuration."""
    assert not AVMPConfig.read({}).verify
    monkeypatch.setenv("AVMP_VERIFY", "1")
    assert AVMPConfig.read({}).verify
    monkeypatch.setenv("AVMP_VERIFY", "0")
    assert not AVMPConfig.read({}).verify


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"block_manager": "AVMP"}, "unknown block manager 'AVMP'.*default, avmp"),
        ({"avmp": {}}, "AVMP is not in charge.*--block-manager avmp"),
        (
            {"block_manager": "avmp", "avmp": {"checkpoint_token": 4}},
            "unknown option 'checkpoint_token': did you mean 'checkpoint_tokens'",
        ),
        (
            {"block_manager": "avmp", "avmp": {"tail_tokens": 128}},
            "option 'tail_tokens' is gone: set cut_tokens, the tokens that [^;]* to be cut$",
        ),
        (
            {"block_manager": "avmp", "avmp": {"migration_batch": "many"}},
            "option 'migration_batch' = 'many': .*integer",
        ),
        (
            {"block_manager": "avmp", "avmp": {"migration_batch": 0}},
            "option 'migration_batch' = 0: .*greater than or equal to 1",
        ),
        (
            {"block_manager": "avmp", "avmp": {"kernels": "fast"}},
            "option 'kernels' = 'fast': .*'auto', 'resolved' or 'handles'",
        ),
        (
            {"block_manager": "avmp", "avmp": {"admission": "oracle"}},
            "option 'admission' = 'oracle': .*'forecast' or 'growth'",
        ),
        (
            {"block_manager": "avmp", "avmp": {"admission": "forecast", "growth_tokens": 16}},
            "option 'growth_tokens' = 16 does nothing with admission: forecast; .* growth$",
        ),
        (
            {"block_manager": "avmp", "avmp": {"admission": "growth", "forecast_risk": 1.0}},
            "option 'forecast_risk' = 1.0 does nothing with admission: growth; .* forecast$",
        ),
        (
            {"block_manager": "avmp", "avmp": {"forecast_risk": -0.5}},
            "option 'forecast_risk' = -0.5: .*greater than or equal to 0",
        ),
        (
            {"block_manager": "avmp", "avmp": {"victim": "first"}},
            "option 'victim' = 'first': .*'cheapest' or 'last'",
        ),
        ({"block_manager": "avmp", "avmp": {"verify": 1}}, "option 'verify' = 1: .*boolean"),
        (
            {"block_manager": "avmp", "avmp": {"memory": "contiguous"}},
            "option 'memory' = 'contiguous': .*'fixed' or 'elastic'$",
        ),
        (
            {"block_manager": "avmp", "avmp": {"slack_bytes": 0}},
            "option 'slack_bytes' = 0 needs memory: elastic",
        ),
        (
            {"block_manager": "avmp", "avmp": {"memory": "elastic", "budget": "2X"}},
            "option 'budget' = '2X': write bytes, 512MiB, 2GiB, 2GB, or 2G as for --kv",
        ),
        (
            {"block_manager": "avmp", "avmp": {"memory": "elastic", "budget": 1.5}},
            "option 'budget' = 1.5: write bytes",
        ),
        (
            {"block_manager": "avmp", "avmp": {"memory": "elastic", "chunk_bytes": 0}},
            "option 'chunk_bytes' = 0: .*greater than or equal to 1",
        ),
        ({"block_manager": "avmp", "avmp": 3}, "a mapping or the path of a YAML file, not 3"),
        ({"block_manager": "avmp", "avmp": {5: 1}}, "unknown option '5': .*Known: page_tokens"),
        ({"block_manager": "avmp", "avmp": {None: 1}}, "unknown option 'None': .*Known"),
        (
            {"block_manager": "avmp", "avmp": {"verify": [[]] * 99}},
            r"'verify' = \[\[\], .*\.\.\.\]",
        ),
        ({"block_manager": "avmp", "avmp": "/no/such.yaml"}, "/no/such.yaml' cannot be read: No"),
        ({"block_manager": "avmp", "avmp": "/"}, "'/' cannot be read: Is a directory; name a"),
        ({"block_manager": "avmp", "avmp": ""}, "'' cannot be read: Is a directory; name a"),
        (
            {"block_manager": "avmp", "avmp": "a\0b"},
            r"'a\\x00b' cannot be read: embedded null byte",
        ),
    ],
)
def test_wrong_options(additional, message):
    """Each error names the key, the value, and what it may be."""
    with pytest.raises(ConfigError, match=message):
        selected(additional)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{: [", r"given\.yaml' is not YAML: .*line 1, column 2"),
        (b"page_tokens: \xff", r"given\.yaml' is not YAML: .*invalid start byte"),
        (b"page_tokens: 3\0", r"given\.yaml' is not YAML: .*special characters are not allowed"),
        (b"[" * 5000, r"given\.yaml' is not YAML: maximum recursion depth exceeded"),
        (b"page_tokens: 2024-13-01", r"given\.yaml' is not YAML: month must be in 1\.\.12"),
        (b"page_tokens: !!int ''", r"given\.yaml' is not YAML: .*index out of range"),
        (b"- page_tokens", r"given\.yaml' is not a mapping but \['page_tokens'\]"),
        (b"false", r"given\.yaml' is not a mapping but False"),
        (b"5: 1", "unknown option '5': .*Known: page_tokens"),
        (b"~: 1", "unknown option 'None': .*Known: page_tokens"),
        (b"page_tokens: &a [*a]", r"option 'page_tokens' = \[.*\]: .*valid integer"),
    ],
)
def test_file_that_holds_no_options(tmp_path, content, message):
    """The file or the key is named, in one line."""
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        selected({"block_manager": "avmp", "avmp": str(path)})
    assert len(str(refused.value).splitlines()) == 1


def test_the_default_of_cut_tokens_is_the_keeper_s():
    """The options stand without the core, which is not loaded where AVMP is not in charge."""
    assert AVMPConfig().cut_tokens == CUT_TOKENS
    assert AVMPConfig().answer_tokens == ANSWER_TOKENS


@pytest.mark.parametrize("content", [b"", b"# nothing yet\n", b"{}"])
def test_file_without_options(tmp_path, content):
    """Sets none."""
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    assert AVMPConfig.read(str(path)) == AVMPConfig()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("2k", 2000),
        ("2K", 2048),
        ("25.6k", 25_600),
        ("3G", 3 << 30),
        ("3g", 3 * 10**9),
        ("3GiB", 3 << 30),
        ("1.5gib", 3 << 29),
        ("3 GB", 3 * 10**9),
        ("1T", 1 << 40),
    ],
)
def test_bytes_are_written_as_for_vllms_options(text, size):
    """And as ``avmp plan`` takes them; a capital letter counts in 1,024s where it stands alone."""
    config = AVMPConfig.read({"memory": "elastic", "budget": text})
    assert config.budget == size
    if isinstance(text, str) and not text.endswith(("B", "b")):
        assert human_readable_int(text) == size


MIB = 1 << 20


@pytest.mark.parametrize(
    ("avmp", "expected"),
    [
        ({}, (1000 * MIB, 1000 * MIB, 2 * MIB, 1000 * MIB // 16)),
        ({"budget": 301 * MIB}, (1000 * MIB, 300 * MIB, 2 * MIB, 301 * MIB // 16 - MIB // 16)),
        ({"virtual_bytes": "8GiB"}, (8192 * MIB, 1000 * MIB, 2 * MIB, 1000 * MIB // 16)),
        ({"chunk_bytes": "64MiB"}, (960 * MIB, 960 * MIB, 64 * MIB, 256 * MIB)),
        ({"slack_bytes": 0}, (1000 * MIB, 1000 * MIB, 2 * MIB, 8 * MIB)),
    ],
)
def test_sizes_of_an_elastic_arena(avmp, expected):
    """Of a cache of 1,001 MiB: addresses, budget, chunk and slack."""
    sizes = elastic_sizes(AVMPConfig.read({"memory": "elastic", **avmp}), 1001 * MIB)
    assert (sizes.virtual_bytes, sizes.budget, sizes.chunk_bytes, sizes.slack_bytes) == expected


def test_a_fixed_arena_has_no_such_sizes():
    """It is the default."""
    assert elastic_sizes(AVMPConfig(), 1001 * MIB) is None


@pytest.mark.parametrize(
    ("avmp", "message"),
    [
        ({"budget": "2GiB"}, "option 'budget' = 2147483648: vLLM leaves 104857600 bytes"),
        ({"budget": "50MiB", "virtual_bytes": "40MiB"}, "'virtual_bytes' = 41943040: the budget"),
        ({"chunk_bytes": "1GiB"}, "'chunk_bytes' = 1073741824: the budget of 104857600 bytes is"),
        ({"budget": "1MiB"}, "'chunk_bytes' = 2097152: the budget of 1048576 bytes is less"),
    ],
)
def test_sizes_of_an_elastic_arena_that_cannot_be(avmp, message):
    """Of a cache of 100 MiB."""
    with pytest.raises(ConfigError, match=message):
        elastic_sizes(AVMPConfig.read({"memory": "elastic", **avmp}), 100 * MIB)


def test_chunks_that_a_driver_does_not_take():
    """Named with the next that it takes; those below a huge page go without them."""
    with pytest.raises(ConfigError, match="multiples of 4096 bytes; choose 8192"):
        driver_of(torch.device("cpu"), 5000)
    driver_of(torch.device("cpu"), 8192).close()


# -- vLLM's options --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_config(tiny_jamba):
    """A configuration that AVMP takes, before AVMP's classes are named in it."""
    return EngineArgs(
        tiny_jamba, dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20
    ).create_engine_config()


def test_supported_configuration_is_not_refused(vllm_config):
    """The control of the refusals below."""
    refuse(vllm_config)


#: How each refused option looks when it is set, by the path to it in ``VllmConfig``.
SET = {
    "--kv-transfer-config": {"kv_transfer_config": argparse.Namespace(kv_connector="Nixl")},
    "--kv-offloading-backend": {"cache_config.kv_offloading_backend": "lmcache"},
    "--decode-context-parallel-size": {"parallel_config.decode_context_parallel_size": 2},
    "--prefill-context-parallel-size": {"parallel_config.prefill_context_parallel_size": 2},
    "--speculative-config": {"speculative_config": argparse.Namespace(method="medusa")},
    "--attention-config.hisparse_config": {"attention_config.hisparse_config": object()},
    "--disable-hybrid-kv-cache-manager": {"scheduler_config.disable_hybrid_kv_cache_manager": True},
    "--num-gpu-blocks-override": {"cache_config.num_gpu_blocks_override": 100},
    "--prefix-match-unit": {"cache_config.prefix_match_unit": 16},
    "--enable-mamba-shared-prefix-checkpoint": {
        "cache_config.enable_mamba_shared_prefix_checkpoint": True
    },
    "--use-replayssm": {"cache_config.use_replayssm": True},
}


def test_every_mamba_cache_mode_of_vllm_is_known():
    """AVMP refuses none: these two are all that vLLM takes."""
    assert set(get_args(MambaCacheMode)) == {"none", "align"}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.option)
def test_refused_options(vllm_config, monkeypatch, refusal):
    """Each option under which handles or bands would be wrong is refused, with the way out."""
    ((path, value),) = SET[refusal.option].items()
    *owners, name = path.split(".")
    owner = vllm_config
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setitem(owner.__dict__, name, value)
    with pytest.raises(ConfigError, match=rf"{refusal.option} = .*--block-manager default"):
        refuse(vllm_config)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv_connector_module_path": "my.module"}, "kv_connector_module_path = my.module"),
        ({"kv_role": "kv_producer"}, "kv_role = kv_producer"),
        ({"spec_name": "TieringOffloadingSpec"}, "spec_name = TieringOffloadingSpec"),
        ({"blocks_per_chunk": 4}, "blocks_per_chunk = 4"),
        ({"store_threshold": 2}, "store_threshold = 2"),
    ],
)
def test_options_of_a_connector_that_do_not_work(vllm_config, monkeypatch, given, named):
    """Each is named; without it the connector is taken, and AVMP's class put in its place."""
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    monkeypatch.setitem(vllm_config.__dict__, "kv_transfer_config", transfer)
    refuse(vllm_config)
    for name, value in given.items():
        if hasattr(transfer, name):
            setattr(transfer, name, value)
        else:
            transfer.kv_connector_extra_config[name] = value
    with pytest.raises(ConfigError, match=rf"--kv-transfer-config with {named}.*Remove it"):
        refuse(vllm_config)


def test_a_connector_needs_the_prefix_cache_and_no_drafts(vllm_config, monkeypatch):
    """States go to the host by their prefix; nor does it take an elastic arena."""
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    monkeypatch.setitem(vllm_config.__dict__, "kv_transfer_config", transfer)
    monkeypatch.setattr(vllm_config.cache_config, "enable_prefix_caching", False)
    with pytest.raises(ConfigError, match="with --no-enable-prefix-caching"):
        refuse(vllm_config)
    monkeypatch.undo()
    monkeypatch.setitem(vllm_config.__dict__, "kv_transfer_config", transfer)
    drafts = argparse.Namespace(method="ngram")
    monkeypatch.setitem(vllm_config.__dict__, "speculative_config", drafts)
    with pytest.raises(ConfigError, match="with --speculative-config ngram"):
        refuse(vllm_config)
    monkeypatch.undo()
    monkeypatch.setitem(vllm_config.__dict__, "kv_transfer_config", transfer)
    additional = {"block_manager": "avmp", "avmp": {"memory": "elastic"}}
    monkeypatch.setitem(vllm_config.__dict__, "additional_config", additional)
    with pytest.raises(ConfigError, match="with memory: elastic"):
        refuse(vllm_config)


def test_growth_tokens_imply_their_admission():
    """Who gives a constant wants no forecast."""
    assert AVMPConfig.read({"growth_tokens": 64}).admission == "growth"
    assert AVMPConfig.read({}).admission == "forecast"


def test_stages_take_no_elastic_arena_and_no_connector(vllm_config, monkeypatch):
    """Each is named, with the way out."""
    monkeypatch.setattr(vllm_config.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(vllm_config.scheduler_config, "async_scheduling", False)
    refuse(vllm_config)
    additional = {"block_manager": "avmp", "avmp": {"memory": "elastic"}}
    with monkeypatch.context() as patch:
        patch.setitem(vllm_config.__dict__, "additional_config", additional)
        with pytest.raises(ConfigError, match="memory = 'elastic' does not work with --pipeline"):
            refuse(vllm_config)
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    monkeypatch.setitem(vllm_config.__dict__, "kv_transfer_config", transfer)
    monkeypatch.setattr(vllm_config.cache_config, "enable_prefix_caching", True)
    with pytest.raises(ConfigError, match="do not work with --pipeline-parallel-size 2"):
        refuse(vllm_config)


def test_cold_states_need_a_cache_and_stand_alone(vllm_config, monkeypatch):
    """Each option that they were not tried with is named, with the way out."""
    avmp = {"cold_states": "int12"}
    additional = {"block_manager": "avmp", "avmp": avmp}
    monkeypatch.setitem(vllm_config.__dict__, "additional_config", additional)
    monkeypatch.setattr(vllm_config.cache_config, "enable_prefix_caching", False)
    with pytest.raises(ConfigError, match=r"cold_states = 'int12' .* add --enable-prefix-caching"):
        refuse(vllm_config)
    monkeypatch.setattr(vllm_config.cache_config, "enable_prefix_caching", True)
    refuse(vllm_config)
    drafts = argparse.Namespace(method="ngram")
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    for owner, name, value, named in (
        (vllm_config.parallel_config, "pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        (vllm_config, "speculative_config", drafts, "--speculative-config"),
        (vllm_config, "kv_transfer_config", transfer, "--kv-transfer-config or --kv-offloading"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(owner.__dict__, name, value)
            with pytest.raises(ConfigError, match=f"not tried with {named}.*to 'exact'"):
                refuse(vllm_config)
    avmp["memory"] = "elastic"
    with pytest.raises(ConfigError, match="not tried with memory = 'elastic'"):
        refuse(vllm_config)


def test_kernels_by_handle_take_no_drafts(vllm_config, monkeypatch):
    """Whatever the drafter; without one they are taken."""
    additional = {"block_manager": "avmp", "avmp": {"kernels": "handles"}}
    monkeypatch.setitem(vllm_config.__dict__, "additional_config", additional)
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", property(lambda self: True))
    refuse(vllm_config)
    drafts = argparse.Namespace(method="ngram")
    monkeypatch.setitem(vllm_config.__dict__, "speculative_config", drafts)
    with pytest.raises(ConfigError, match=r"does not work with --speculative-config ngram.*'reso"):
        refuse(vllm_config)


def test_pipelines_take_no_drafts_and_schedule_ahead_on_v2_alone(vllm_config, monkeypatch):
    """A pipeline by itself is taken."""
    monkeypatch.setitem(vllm_config.parallel_config.__dict__, "pipeline_parallel_size", 2)
    refuse(vllm_config)
    with monkeypatch.context() as drafting:
        drafts = argparse.Namespace(method="ngram")
        drafting.setitem(vllm_config.__dict__, "speculative_config", drafts)
        with pytest.raises(ConfigError, match="--speculative-config ngram was not tried"):
            refuse(vllm_config)
    monkeypatch.setitem(vllm_config.scheduler_config.__dict__, "async_scheduling", True)
    with pytest.raises(ConfigError, match=r"--async-scheduling with .* 2 needs Model Runner V2"):
        refuse(vllm_config)
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", property(lambda self: True))
    refuse(vllm_config)


def test_kernels_by_handle_need_runner_v2(tiny_jamba):
    """Named, with the setting that works."""
    additional = {"block_manager": "avmp", "avmp": {"kernels": "handles"}}
    with pytest.raises(ConfigError, match=r"kernels = 'handles' needs Model Runner V2.*'resolved'"):
        EngineArgs(tiny_jamba, dtype="float32", additional_config=additional).create_engine_config()
    arguments = EngineArgs(
        tiny_jamba, attention_backend="TRITON_ATTN", additional_config=additional
    )
    with pytest.raises(ConfigError, match="--attention-backend TRITON_ATTN: kernels = 'handles'"):
        arguments.create_engine_config()


def test_other_classes_are_refused(vllm_config, monkeypatch):
    """AVMP brings its own scheduler and worker."""
    monkeypatch.setattr(vllm_config.parallel_config, "worker_cls", "my.Worker")
    with pytest.raises(ConfigError, match=r"--worker-cls my.Worker"):
        take_charge(vllm_config)
    monkeypatch.undo()
    monkeypatch.setattr(vllm_config.scheduler_config, "scheduler_cls", "my.Scheduler")
    with pytest.raises(ConfigError, match=r"--scheduler-cls my.Scheduler"):
        take_charge(vllm_config)


@pytest.mark.parametrize(
    ("asynchronous", "expected"), [(None, SCHEDULER), (False, SCHEDULER), (True, ASYNC_SCHEDULER)]
)
def test_scheduler_class_follows_the_option(tiny_jamba, asynchronous, expected):
    """The CPU platform schedules synchronously unless asked by name."""
    config = EngineArgs(
        tiny_jamba,
        dtype="float32",
        async_scheduling=asynchronous,
        additional_config={"block_manager": "avmp"},
    ).create_engine_config()
    assert config.scheduler_config.scheduler_cls == expected


# -- models and sizes ------------------------------------------------------------------------------


def test_model_without_ssm_layers(tiny_llama):
    """Named, with the way out."""
    with pytest.raises(ConfigError, match=r"has no SSM layers.*--block-manager default"):
        EngineArgs(tiny_llama, additional_config={"block_manager": "avmp"}).create_engine_config()


def test_model_without_attention_layers(tiny_mamba):
    """Named, with the way out."""
    with pytest.raises(ConfigError, match=r"has no attention layers.*--block-manager default"):
        EngineArgs(tiny_mamba, additional_config={"block_manager": "avmp"}).create_engine_config()


@pytest.mark.parametrize(
    ("avmp", "options", "message"),
    [
        ({"page_tokens": 48}, {}, "page_tokens = 48: CPU_ATTN takes pages of a multiple of 32"),
        ({"checkpoint_tokens": 100}, {}, "checkpoint_tokens = 100: .*page's 32.*128 is the next"),
        ({"checkpoint_tokens": 32}, {}, "checkpoint_tokens = 32: .*more than one page"),
        (
            {"memory": "elastic", "chunk_bytes": 65536, "budget": 700_000},
            {},
            r"max_model_len=512 .* has 67108864, of which \d+ get no memory: .*'budget'",
        ),
        (
            {"cold_states": "int12"},
            {"mamba_ssm_cache_dtype": "bfloat16"},
            "cold_states = 'int12': an encoded state .*bfloat16.* --mamba-ssm-cache-dtype float32",
        ),
        (
            {"cold_states": "int12"},
            {"prefix_cache_retention_interval": 1024},
            "cold_states = 'int12': AVMP does not choose the states .*set it to 'exact'",
        ),
        ({}, {"kv_cache_memory_bytes": 600_000}, "max_model_len=512 .*--kv-cache-memory-bytes"),
        ({}, {"kv_cache_memory_bytes": 100_000}, "of 100000 bytes .*--gpu-memory-utilization"),
    ],
)
def test_sizes_that_cannot_work(tiny_jamba, avmp, options, message):
    """Refused at start-up, naming the option, the value and a value that works."""
    with (
        pytest.raises(ValueError, match=message),
        engine(tiny_jamba, avmp=avmp, enable_prefix_caching=True, **options),
    ):
        pass


def test_page_and_spacing_follow_vllms_options(tiny_jamba):
    """``--block-size`` and ``--mamba-block-size`` mean what their names say."""
    from enginelib import runner_of

    with engine(
        tiny_jamba, avmp={}, enable_prefix_caching=True, block_size=64, mamba_block_size=256
    ) as llm:
        sizes = [g.kv_cache_spec.block_size for g in runner_of(llm).kv_cache_config.kv_cache_groups]
    assert sizes == [64, 256]


def test_max_model_len_is_found(tiny_jamba):
    """``--max-model-len -1`` gives the longest that the arena holds."""
    with engine(tiny_jamba, avmp={}, max_model_len=-1, kv_cache_memory_bytes=2_000_000) as llm:
        longest = llm.llm_engine.model_config.max_model_len
    assert longest == (2_000_000 // 32_768 * 32_768 - 2 * 116_736) // 32_768 * 32


def test_too_many_sequences_are_clamped(tiny_jamba, caplog_vllm):
    """A warning with both numbers, not a crash."""
    from enginelib import scheduler_of

    with engine(tiny_jamba, avmp={}, kv_cache_memory_bytes=1_000_000, max_num_seqs=64) as llm:
        assert scheduler_of(llm).max_num_running_reqs == 5
    assert "--max-num-seqs 64 lowered to 5" in caplog_vllm.text


def test_capacity_block(tiny_jamba, caplog_vllm):
    """What fits, by length, beside stock vLLM in the same bytes."""
    with engine(tiny_jamba, avmp={}, kv_cache_memory_bytes=4_000_000):
        pass
    text = caplog_vllm.text
    assert "AVMP arena: 4,000,000 bytes" in text
    assert "32,768 bytes  32 tokens of 2 attention layers" in text
    assert "116,736 bytes  one state of 6 SSM layers" in text
    assert "stock vLLM: block of 128 tokens, 29 usable blocks, 4 block tables" in text
