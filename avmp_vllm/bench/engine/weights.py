"""Random weights inside vLLM, for a model that is only a config: nothing to download or to store.

vLLM's own ``--load-format dummy`` draws all weights, norms included, from +-0.001: every token is
then much like every other, and a lost state would change no answer. These are drawn by the rules of
the project's tiny checkpoints, so that answers depend on everything that was read.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from avmp_vllm.models.checkpoint import draw_weights

LOAD_FORMAT = "avmp_random"
SEED = 0


def fill(model: nn.Module) -> None:
    """Set all weights of a Jamba as vLLM builds it; the same on the same kind of device."""
    device = next(model.parameters()).device
    vocabulary: int = model.config.vocab_size  # type: ignore[assignment]
    with torch.no_grad():
        # What the class of transformers would have set; vLLM leaves it to the checkpoint.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # norms and D
                parameter.fill_(1.0)
        generator = torch.Generator(device).manual_seed(SEED)
        draw_weights(model, generator, list(range(vocabulary)))
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):  # -exp(A_log), A_log = log(1 .. states)
                states = parameter.shape[-1]
                parameter.copy_(-torch.arange(1, states + 1, device=device).expand_as(parameter))


@register_model_loader(LOAD_FORMAT)
class RandomWeights(BaseModelLoader):
    """Reads nothing."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to download."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Draw the weights, before vLLM packs them for its kernels."""
        fill(model)
