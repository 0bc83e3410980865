"""A language model as a policy over words: what it would answer, and one step of REINFORCE towards one of them."""

from __future__ import annotations

import torch

from preceptor.lm.load import load_language_model
from preceptor.lm.sampling import draw
from preceptor.systems.bandit.policy import Vocabulary, decide
from preceptor.systems.bandit.prompts import prompts_for
from preceptor.systems.bandit.rewards import RewardBaseline, policy_gradient_loss


def main() -> None:
    lm = load_language_model("starter", device=torch.device("cpu"))
    words = ("tea", "coffee")  # a word may be several tokens
    vocabulary = Vocabulary(lm, words)
    contexts = [
        vocabulary.context(lm, prompt) for prompt in prompts_for(words, ["Would you like {options}? I take"] * 8)
    ]
    optimizer = torch.optim.AdamW(lm.trainable_parameters().values(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    baseline = RewardBaseline("leave_one_out", ["drinks"])
    for step in range(6):
        decision = decide(lm, contexts)  # acting and scoring are this one pass
        probability = decision.log_probs.exp().mean(0)[0].item()
        print(f"step {step}: P(tea) {probability:.3f}, mass on the two words {decision.p_candidates.mean().item():.1e}")
        actions = draw(decision.log_probs, generator)
        rewards = (actions == 0).double()  # tea pays
        loss, _ = policy_gradient_loss(decision.log_probs, actions, baseline.advantages(rewards, "drinks"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
