"""Write a small random checkpoint that transformers and vLLM load like any other.

The weights are random but not careless: a model made here answers with varied text that depends on
everything it has read, so that a lost or overwritten byte of its cache changes the answer, and its
best token leads the second best by far more than fp32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from avmp_vllm.models.tokenizer import build_tokenizer, readable_ids

# Names of the parameters by what they do, over the model families of transformers.
_EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight")
_HEADS = ("lm_head.weight",)
_TIME_STEP_BIASES = ("dt_bias", "dt_proj.bias")
_QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight")

# Time steps of the SSM layers, log-uniform in the range the Mamba paper starts from. Small steps
# forget slowly, so a state carries the whole prompt.
_TIME_STEP_RANGE = (1e-3, 1e-1)


def special_token_ids() -> dict[str, int]:
    """Return the keyword arguments of a config that name the tokenizer's special tokens."""
    tokenizer = build_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def write_checkpoint(path: str | Path, config: PretrainedConfig, *, seed: int = 0) -> Path:
    """Write config, weights (safetensors) and tokenizer to the folder ``path``; return it.

    The same config, seed and versions of torch and transformers give the same bytes. Weights are
    drawn in fp32 and stored in ``config.dtype``.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"checkpoint folder {path} is a file; name a folder")
    dtype = config.dtype or torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # parameters that keep the initial values of their own class
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = build_tokenizer()
    with torch.no_grad():
        draw_weights(model, torch.Generator().manual_seed(seed), readable_ids(tokenizer))
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_weights(
    path: str | Path, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], *, seed: int
) -> Path:
    """Write a checkpoint of a model that transformers does not build, tensor by tensor.

    Args:
        path: The folder.
        config: Whatever its class, it is written as it is.
        shapes: Of each tensor by its name in the checkpoint. Those of one dimension are ones,
            but for biases of time steps and ``A_log``.
        seed: Of the weights, which are stored in ``config.dtype``.
    """
    model = nn.Module()
    for name, shape in shapes.items():
        *parents, leaf = name.split(".")
        module = model
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        first = torch.arange(1.0, shape[0] + 1).log() if leaf == "A_log" else torch.ones(shape)
        module.register_parameter(leaf, nn.Parameter(first))
    tokenizer = build_tokenizer()
    with torch.no_grad():
        draw_weights(model, torch.Generator().manual_seed(seed), readable_ids(tokenizer))
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    tensors = {name: tensor.to(config.dtype) for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(path) / "model.safetensors", metadata={"format": "pt"})
    return Path(path)


def draw_weights(model: nn.Module, generator: torch.Generator, spoken: list[int]) -> None:
    """Redraw the weights in place.

    Args:
        model: Of transformers or of vLLM; names of parameters decide what is drawn how.
        generator: On the parameters' device.
        spoken: Tokens that the model may answer with.

    Matrices are normal with a variance of 1 / fan-in, so that every layer adds as much to the
    residual stream as the embedding brought. Rows of the head outside ``spoken`` are zero: those
    tokens are never the best. Norms, ``A_log`` and ``D`` keep the values of their class.

    Where the embeddings are the head too, they are drawn as a head is. At a variance of 1 a model
    would repeat the last token that it read, whatever came before.
    """
    tied = not any(name.endswith(_HEADS) for name, _ in model.named_parameters())
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(_TIME_STEP_BIASES):
            _draw_time_steps(parameter, generator)
        elif name.endswith(_EMBEDDINGS):
            std = 2.0 / math.sqrt(parameter.shape[-1]) if tied else 1.0
            parameter.normal_(std=std, generator=generator)
        elif parameter.dim() > 1 and not name.endswith("A_log"):
            gain = 2.0 if name.endswith(_QUERIES_AND_KEYS + _HEADS) else 1.0
            parameter.normal_(std=gain / math.sqrt(parameter.shape[-1]), generator=generator)
        if name.endswith(_HEADS):
            silent = torch.ones(parameter.shape[0], dtype=torch.bool)
            silent[spoken] = False
            parameter[silent] = 0.0


def _draw_time_steps(bias: torch.Tensor, generator: torch.Generator) -> None:
    """Set ``bias`` so that softplus(bias) is log-uniform over the time step range."""
    low, high = (math.log(step) for step in _TIME_STEP_RANGE)
    step = torch.empty_like(bias).uniform_(low, high, generator=generator).exp_()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
