"""RL on tasks with a verifier, whose levels of difficulty are mixed by what the policy can learn from now."""
