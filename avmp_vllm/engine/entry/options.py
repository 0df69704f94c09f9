"""vLLM options that AVMP refuses, because handles or bands would be wrong under them.

A user who asks for AVMP and cannot have it learns so at start-up; nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from avmp_vllm.engine.entry import connectors
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError, selected

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Refusal(NamedTuple):
    """An option, when it stands in the way, its value, and why."""

    option: str
    value: Callable[[VllmConfig], object]
    stands: Callable[[object], bool]
    why: str


#: Methods of speculative decoding that work: with no cache of their own, or one of full attention.
DRAFTERS = ("ngram", "mtp", "eagle", "eagle3")


def _given(value: object) -> bool:
    return value is not None


def _true(value: object) -> bool:
    return bool(value)


def _parallel(value: object) -> bool:
    return isinstance(value, int) and value > 1


REFUSALS = (
    Refusal(
        "--kv-transfer-config",
        lambda c: c.kv_transfer_config and c.kv_transfer_config.kv_connector,
        lambda name: name is not None and name not in connectors.CONNECTORS,
        "KV connectors and P/D transfer address pages by physical number, and AVMP moves pages; it "
        f"serves {', '.join(connectors.CONNECTORS)}, which --kv-offloading-size chooses",
    ),
    Refusal(
        "--kv-offloading-backend",
        lambda c: c.cache_config.kv_offloading_backend,
        lambda backend: backend not in (None, "native"),
        "it is a KV connector, and AVMP serves vLLM's own alone: native",
    ),
    Refusal(
        "--decode-context-parallel-size",
        lambda c: c.parallel_config.decode_context_parallel_size,
        _parallel,
        "a KV page would be spread over ranks",
    ),
    Refusal(
        "--prefill-context-parallel-size",
        lambda c: c.parallel_config.prefill_context_parallel_size,
        _parallel,
        "a KV page would be spread over ranks",
    ),
    Refusal(
        "--speculative-config",
        lambda c: c.speculative_config and c.speculative_config.method,
        lambda method: method is not None and method not in DRAFTERS,
        f"of the drafters only {', '.join(DRAFTERS)} were tried; others keep caches of their own",
    ),
    Refusal(
        "--attention-config.hisparse_config",
        lambda c: c.attention_config.hisparse_config,
        _given,
        "HiSparse keeps pages on the host in a pool of its own",
    ),
    Refusal(
        "--disable-hybrid-kv-cache-manager",
        lambda c: c.scheduler_config.disable_hybrid_kv_cache_manager,
        _true,
        "AVMP is a hybrid cache manager",
    ),
    Refusal(
        "--num-gpu-blocks-override",
        lambda c: c.cache_config.num_gpu_blocks_override,
        _given,
        "an arena has pages of two sizes; give its bytes with --kv-cache-memory-bytes",
    ),
    Refusal(
        "--prefix-match-unit",
        lambda c: c.cache_config.prefix_match_unit,
        _given,
        "prefix hits land on pages, whose tokens are AVMP's page_tokens",
    ),
    Refusal(
        "--enable-mamba-shared-prefix-checkpoint",
        lambda c: c.cache_config.enable_mamba_shared_prefix_checkpoint,
        _true,
        "AVMP decides which states are kept by what they are worth, also where prompts part",
    ),
    Refusal(
        "--use-replayssm",
        lambda c: c.cache_config.use_replayssm,
        _true,
        "FlashInfer's variant keeps each state's place in its ring of inputs in tables beside the "
        "cache, by physical slot, and AVMP moves states without them; Triton's, all of whose "
        "buffers lie in the state's block, has not been tried",
    ),
)


def refuse(vllm_config: VllmConfig) -> None:
    """Refuse what AVMP cannot serve.

    Raises:
        ConfigError: Naming the option, its value and the way out.
    """
    for refusal in REFUSALS:
        value = refusal.value(vllm_config)
        if refusal.stands(value):
            raise ConfigError(
                f"{refusal.option} = {value} does not work with --block-manager avmp: "
                f"{refusal.why}. Remove it, or use --block-manager default."
            )
    connectors.refuse(vllm_config)
    config = selected(vllm_config.additional_config)
    by_handle = config is not None and config.kernels == "handles"
    if by_handle and not vllm_config.use_v2_model_runner:
        raise ConfigError(
            "kernels = 'handles' needs Model Runner V2, which runs on CUDA: set kernels to "
            "'resolved', or unset VLLM_USE_V2_MODEL_RUNNER if it is 0"
        )
    drafts = vllm_config.speculative_config
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if drafts is not None and stages > 1:
        raise ConfigError(
            f"--speculative-config {drafts.method} was not tried with --pipeline-parallel-size "
            f"{stages}: remove one of them"
        )
    if config is not None and config.memory == "elastic" and stages > 1:
        raise ConfigError(
            f"memory = 'elastic' does not work with --pipeline-parallel-size {stages}: its budget "
            "is that of one arena; set memory to 'fixed'"
        )
    if vllm_config.kv_transfer_config is not None and stages > 1:
        raise ConfigError(
            f"--kv-transfer-config and --kv-offloading-size do not work with "
            f"--pipeline-parallel-size {stages}: a transfer knows the pages of one stage; remove "
            "one of them"
        )
    if config is not None and config.cold_states != "exact":
        _refuse_cold_states(vllm_config, config)
    ahead = vllm_config.scheduler_config.async_scheduling
    if ahead and stages > 1 and not vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"--async-scheduling with --pipeline-parallel-size {stages} needs Model Runner V2: "
            "remove one of them"
        )
    if by_handle and drafts is not None:
        raise ConfigError(
            f"kernels = 'handles' does not work with --speculative-config {drafts.method}: its "
            "kernels read one state a request; set kernels to 'resolved'"
        )
    model = vllm_config.model_config
    if model.is_attention_free:
        raise ConfigError(
            f"{model.model} has no attention layers: AVMP manages models that mix attention and "
            "SSM layers; serve it with --block-manager default"
        )
    if not model.is_hybrid:
        raise ConfigError(
            f"{model.model} has no SSM layers: AVMP manages models that mix attention and SSM "
            "layers; serve it with --block-manager default"
        )


def _refuse_cold_states(vllm_config: VllmConfig, config: AVMPConfig) -> None:
    """Refuse encoded states where there are none, and beside what they were not tried with."""
    option = f"cold_states = {config.cold_states!r}"
    if not vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            f"{option} is for what a prefix cache keeps: add --enable-prefix-caching, or set it to "
            "'exact'"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    beside = {
        f"--pipeline-parallel-size {stages}": stages > 1,
        "--kv-transfer-config or --kv-offloading-size": vllm_config.kv_transfer_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "memory = 'elastic'": config.memory == "elastic",
    }
    for other, stands in beside.items():
        if stands:
            raise ConfigError(f"{option} was not tried with {other}: set it to 'exact'")
