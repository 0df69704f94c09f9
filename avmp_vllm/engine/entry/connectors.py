"""Which KV connectors work, and by which of AVMP's classes.

A connector reads and writes pages while the engine goes on. vLLM's own ones name pages by physical
number, and AVMP moves pages, so each that is served has a class of ours in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.engine.entry.config import ConfigError, selected

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

#: Connectors that are served: vLLM's name, and the module with a class of that name.
CONNECTORS = {"OffloadingConnector": "avmp_vllm.engine.offload.connector"}
#: Options of a connector that do not work, and why.
REFUSED_EXTRA = {
    "blocks_per_chunk": "the host keeps pages and states one by one",
    "block_size": "the host keeps pages and states one by one",
    "canonical_layout": "it is for models with attention layers alone",
    "eviction_policy": "what goes is what was used least recently",
    "cache_policy_module_path": "what goes is what was used least recently",
    "store_threshold": "what is computed is stored at once",
    "sync_load_budget_bytes": "loads run beside the steps",
}
#: Kinds of host that do not work, and why.
REFUSED_SPECS = {
    "TieringOffloadingSpec": "its tiers hold entries of one size, and pages and states differ",
}


def refuse(vllm_config: VllmConfig) -> None:
    """Refuse an option of a connector that is served, where it cannot work.

    Raises:
        ConfigError: Naming the option, its value and the way out.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    name, extra = transfer.kv_connector, transfer.kv_connector_extra_config
    module = transfer.kv_connector_module_path
    if module not in (None, CONNECTORS[name]):
        raise _refusal(f"kv_connector_module_path = {module}", "it names pages by physical number")
    if transfer.kv_role != "kv_both":
        raise _refusal(f"kv_role = {transfer.kv_role}", "offloading stores and loads; use kv_both")
    spec = extra.get("spec_name", "")
    if spec in REFUSED_SPECS:
        raise _refusal(f"spec_name = {spec}", REFUSED_SPECS[spec])
    for option, why in REFUSED_EXTRA.items():
        if extra.get(option):
            raise _refusal(f"{option} = {extra[option]}", why)
    if not vllm_config.cache_config.enable_prefix_caching:
        raise _refusal(
            "--no-enable-prefix-caching", "states go to the host by the prefix that they stand for"
        )
    config = selected(vllm_config.additional_config)
    if config is not None and config.memory == "elastic":
        raise _refusal("memory: elastic", "a transfer may still read what loses its memory")
    if vllm_config.speculative_config is not None:
        raise _refusal(
            f"--speculative-config {vllm_config.speculative_config.method}",
            "the two were not tried together",
        )


def _refusal(option: str, why: str) -> ConfigError:
    return ConfigError(
        f"--kv-transfer-config with {option} does not work with --block-manager avmp: {why}. "
        "Remove it, or use --block-manager default."
    )


def take_charge(transfer: KVTransferConfig | None) -> None:
    """Name AVMP's class for a connector that it serves."""
    if transfer is not None and transfer.kv_connector is not None:
        transfer.kv_connector_module_path = CONNECTORS[transfer.kv_connector]
