"""The value network of ``gae``: predicts, at each token of a continuation, the return from that token on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from preceptor.lm.cpu.attention import CpuAttention
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import num_heads
from preceptor.systems.curriculum.policy import Rollouts


class ValueNetwork(nn.Module):
    """A transformer trunk with a linear head that starts at zero, so the first values are all 0.

    It shares no weight with the policy, so neither loss can disturb the other's network.
    """

    def __init__(self, trunk: Trunk, *, filler: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.width, 1)
        # Zero weights: until it has learned something the network predicts 0 and moves no advantage.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._filler = filler

    def forward(self, rollouts: Rollouts) -> Float[Tensor, "batch token"]:
        """V of the state in which each token was sampled, in units of the reward; float32."""
        tokens, keep = rollouts.padded(self._filler)
        # [batch, time, dimension] → the predicting positions [batch · token, dimension] → [batch · token]
        values: Tensor = self.head(self.trunk(tokens)[keep])[:, 0]
        return values.float().view(len(rollouts), rollouts.num_tokens)


class Trunk(nn.Module):
    """Gives the value head one vector per token; causal, rows padded on the right."""

    width: int

    def forward(self, tokens: Tensor) -> Float[Tensor, "batch time dimension"]:
        """The vectors of all positions."""
        raise NotImplementedError


class SmallTrunk(Trunk):
    """A small transformer over the policy's vocabulary, with random weights from torch's global generator."""

    def __init__(self, *, vocab_size: int, width: int, num_layers: int, context_length: int) -> None:
        super().__init__()
        self.width = width
        heads = num_heads(width, dimensions=64)  # as in the policy's usual sizes
        self.model = LlamaModel(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=num_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=context_length,
            )
        )

    def forward(self, tokens: Tensor) -> Float[Tensor, "batch time dimension"]:
        """The last hidden state of each position."""
        with CpuAttention():
            hidden: Tensor = self.model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


class CopiedTrunk(Trunk):
    """A copy of the policy as it is now, which is then trained on its own; the head reads its last layer."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        trained = lm.trainable_parameters().keys()
        # In a tuple, so that torch does not register the model here too: it is registered as `self.model`.
        self._copy = (lm.frozen_copy(),)
        self.model = self._copy[0].model
        # Trains what the policy trains: all weights, or the adapter's alone.
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.width = int(lm.model.config.get_text_config().hidden_size)

    def forward(self, tokens: Tensor) -> Float[Tensor, "batch time dimension"]:
        """The output of the last layer at each position."""
        lm = self._copy[0]
        keep_none = torch.zeros_like(tokens, dtype=torch.bool)  # no logits, only the hidden states
        captured = lm.forward(tokens, keep=keep_none, capture=lm.layers[-1]).captured
        assert captured is not None, "a captured module always gives its output"
        return captured


def build_value_network(lm: LanguageModel, *, kind: str, width: int, num_layers: int, seed: int) -> ValueNetwork:
    """A value network for ``lm`` on its device.

    Args:
        lm: the policy.
        kind: ``small`` (a small transformer) or ``copy`` (a copy of the policy).
        width: hidden size of a small trunk.
        num_layers: of a small trunk.
        seed: of the random weights; torch's global generator is left as it was.
    """
    # Initialisation draws from the global generator; the fork gives it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk: Trunk
        if kind == "copy":
            trunk = CopiedTrunk(lm)
        else:
            trunk = SmallTrunk(
                vocab_size=lm.vocab_size, width=width, num_layers=num_layers, context_length=lm.context_length
            )
        network = ValueNetwork(trunk, filler=lm.begin_token)
    return network.to(lm.device).eval()
