"""AVMP's own options, held in ``additional_config["avmp"]``."""

from __future__ import annotations

import difflib
import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from avmp_vllm.engine.entry.sizes import read_bytes

#: Values of ``--block-manager``.
BLOCK_MANAGERS = ("default", "avmp")

#: Set in the environment of child processes, so that their plugin installs the seams as well.
SELECTED = "AVMP_BLOCK_MANAGER"

#: The method of ``LLM.collective_rpc`` that the engine core answers.
MEMORY_METHOD = "avmp_memory"
#: Options that mean something with one kind of admission alone.
OF_ADMISSION = {"growth_tokens": "growth", "forecast_risk": "forecast"}

#: Options that are gone, and what to do instead.
REPLACED = {
    "tail_tokens": "set cut_tokens, the tokens that a state must be expected to spare later "
    "prompts for its own prompt to be cut"
}


#: Options that only an elastic arena has.
ELASTIC = ("budget", "virtual_bytes", "chunk_bytes", "slack_bytes")

#: Bytes, as a number or as a user writes them.
Bytes = Annotated[int, BeforeValidator(read_bytes)]


class ConfigError(ValueError):
    """An option that cannot be honoured; the message names it, its value and the way out."""


class AVMPConfig(BaseModel):
    """Options of the block manager.

    Attributes:
        page_tokens: Tokens of a KV page. Default: the smallest block that the attention backend
            takes, or vLLM's ``--block-size`` if that is given.
        checkpoint_tokens: With prefix caching, the running state moves on to a new block every so
            many tokens. With vLLM's ``--prefix-cache-retention-interval`` states are kept there,
            too, and a prompt of several steps is cut there. A multiple of the page; the default is
            the multiple nearest to 512 from above, or vLLM's ``--mamba-block-size`` if that is
            given.
        migration_batch: Least capacity that moves between the pools at once, in KV pages' worth of
            bytes.
        admission: When a request is admitted beside others: if those can still grow by what their
            answers are forecast to need, which is learned from those that ended (``forecast``), or
            each by ``growth_tokens`` (``growth``).
        growth_tokens: With ``admission: growth``, which it implies, so many tokens, so that
            admissions do not end in preemptions.
        forecast_risk: With ``admission: forecast``, room is kept for the mean need and so many
            standard deviations.
        victim: Whom vLLM preempts when bytes are short: the request with the fewest tokens to
            compute again (``cheapest``), or the one that was admitted last (``last``).
        cut_tokens: With prefix caching, a prompt is cut to keep a state in the middle of it only
            if that is expected to spare later prompts at least so many tokens; about what can be
            computed in the time of one more step.
        answer_tokens: With prefix caching, the state of a running answer is copied every so many
            tokens, so that the next turn of its conversation resumes there. 0 keeps none.
        cold_states: With prefix caching, what becomes of a kept state of float32 that nobody uses
            when bytes are short: it goes (``exact``), or is first kept in half its bytes, 12 bits a
            value, until a prompt begins at it (``int12``). What is computed from it may then
            differ; running states are exact.
        kernels: How kernels find pages: ``resolved`` (handles become indices once a step, and
            vLLM's own kernels run) or ``handles`` (AVMP's attention and Mamba-1 kernels resolve
            them; Model Runner V2 only). ``auto`` is ``resolved``.
        memory: Whether the whole arena has memory all the time (``fixed``), or just what requests
            and the prefix cache hold (``elastic``).
        budget: Bytes of an elastic arena that may have memory at most; can be changed while it
            runs. Default: what vLLM leaves for the cache.
        virtual_bytes: Addresses of an elastic arena, to which the budget can be raised. Default:
            what vLLM leaves for the cache.
        chunk_bytes: Bytes that get memory at a time. Default: the 256th part of the budget, from
            2 MiB to 32 MiB.
        slack_bytes: An elastic arena gives memory back when it has more than this beyond what is
            held, and keeps half of it for growth. Default: the 16th part of the budget, at least
            four chunks.
        verify: Check every invariant at every step (slow). ``AVMP_VERIFY=1`` does the same.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    page_tokens: int | None = Field(default=None, ge=1)
    checkpoint_tokens: int | None = Field(default=None, ge=1)
    migration_batch: int = Field(default=128, ge=1)
    admission: Literal["forecast", "growth"] = "forecast"
    growth_tokens: int = Field(default=64, ge=0)
    forecast_risk: float = Field(default=1.25, ge=0, allow_inf_nan=False)
    victim: Literal["cheapest", "last"] = "cheapest"
    cut_tokens: int = Field(default=400, ge=0)
    answer_tokens: int = Field(default=64, ge=0)
    cold_states: Literal["exact", "int12"] = "exact"
    kernels: Literal["auto", "resolved", "handles"] = "auto"
    memory: Literal["fixed", "elastic"] = "fixed"
    budget: Bytes | None = Field(default=None, ge=1)
    virtual_bytes: Bytes | None = Field(default=None, ge=1)
    chunk_bytes: Bytes | None = Field(default=None, ge=1)
    slack_bytes: Bytes | None = Field(default=None, ge=0)
    verify: bool = False

    @classmethod
    def read(cls, value: object) -> AVMPConfig:
        """Make the options from a mapping, or from the path of a YAML file that holds one.

        Raises:
            ConfigError: Naming the key and what it may be.
        """
        if isinstance(value, str):
            value = _read_yaml(value)
        if not isinstance(value, dict):
            raise ConfigError(
                f'additional_config["avmp"] must be a mapping or the path of a YAML file, '
                f"not {reprlib.repr(value)}"
            )
        if "growth_tokens" in value and "admission" not in value:
            value = {**value, "admission": OF_ADMISSION["growth_tokens"]}
        try:
            config = cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        for option in ELASTIC:
            given = getattr(config, option)
            if given is not None and config.memory == "fixed":
                raise ConfigError(
                    f'additional_config["avmp"]: option {option!r} = {given} needs '
                    "memory: elastic; set that, or leave it out"
                )
        for key, admission in OF_ADMISSION.items():
            given = getattr(config, key)
            # What is read may be what was written from options that were read before.
            if config.admission != admission and given != cls.model_fields[key].default:
                raise ConfigError(
                    f'additional_config["avmp"]: option {key!r} = {given} does nothing with '
                    f"admission: {config.admission}; leave it out, or set admission: {admission}"
                )
        if os.environ.get("AVMP_VERIFY", "") not in ("", "0"):
            config = config.model_copy(update={"verify": True})
        return config


def _read_yaml(path: str) -> dict[Any, Any]:
    where = f'additional_config["avmp"] = {path!r}'
    form = "it holds a line 'option: value' for each of AVMP's options"
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{where} cannot be read: {reason}; name a YAML file with AVMP's options, or give "
            "them as a mapping"
        ) from None
    try:
        options = yaml.safe_load(content)
    except Exception as error:  # PyYAML lets errors of Python through, RecursionError among them.
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}; {form}") from None
    if options is None:  # An empty file sets no option.
        return {}
    if not isinstance(options, dict):
        raise ConfigError(f"{where} is not a mapping but {reprlib.repr(options)}; {form}")
    return options


def _explain(error: ValidationError) -> str:
    """One line for each problem of the options."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if key in REPLACED:
            lines.append(f"option {key!r} is gone: {REPLACED[key]}")
        elif problem["type"] in ("extra_forbidden", "invalid_key"):
            near = difflib.get_close_matches(key, AVMPConfig.model_fields, n=1, cutoff=0.0)
            lines.append(
                f"unknown option {key!r}: did you mean {near[0]!r}? "
                f"Known: {', '.join(AVMPConfig.model_fields)}"
            )
        else:
            given = reprlib.repr(problem["input"])
            why = problem["msg"].removeprefix("Value error, ")
            lines.append(f"option {key!r} = {given}: {why}")
    return 'additional_config["avmp"]: ' + "; ".join(lines)


def selected(additional_config: object) -> AVMPConfig | None:
    """Return AVMP's options if a configuration asks for it, else None.

    Raises:
        ConfigError: An unknown block manager, options without it, or options that are wrong.
    """
    if not isinstance(additional_config, dict):
        return None
    manager = additional_config.get("block_manager", "default")
    if manager not in BLOCK_MANAGERS:
        raise ConfigError(
            f"unknown block manager {manager!r}: --block-manager is one of "
            f"{', '.join(BLOCK_MANAGERS)}"
        )
    if manager == "default":
        if "avmp" in additional_config:
            raise ConfigError(
                'additional_config has "avmp" options, but AVMP is not in charge: '
                "add --block-manager avmp, or remove them"
            )
        return None
    return AVMPConfig.read(additional_config.get("avmp", {}))
