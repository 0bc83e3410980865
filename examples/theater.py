"""Switch attention heads off one at a time, in place; those that the text is better off without stay off.

python examples/theater.py                  # the bundled model
python examples/theater.py Qwen/Qwen3-0.6B  # any causal language model of Transformers
"""

from __future__ import annotations

import sys

import torch

from preceptor.lm.edit_targets import attention_targets
from preceptor.lm.load import load_language_model
from preceptor.systems.surgery.theater import SurgicalTheater

TEXT = "The theory of relativity was developed by Albert Einstein. It changed the way physicists see space and time."

lm = load_language_model(sys.argv[1] if len(sys.argv) > 1 else "starter", device=torch.device("cpu"))
tokens = torch.tensor([[lm.begin_token, *lm.encode(TEXT)]])


@torch.no_grad()
def loss() -> float:
    return float(lm.model(input_ids=tokens, labels=tokens).loss)


best = loss()
print(f"the model as it is: {best:.4f} nats per token")
for target in attention_targets(lm.model, roles=["output"]):
    for head in range(target.num_heads):
        with SurgicalTheater(lm.model, [target]) as theater:
            target.view[0, head] = 0  # nothing that this head says is heard any more
            if (without := loss()) < best:
                best = without
                theater.commit()
        print(f"{target.name} without head {head}: {without:.4f}{', committed' if theater.committed else ''}")
print(f"the model as it is now: {loss():.4f}")
assert loss() == best  # every edit that was not committed is undone bit for bit
