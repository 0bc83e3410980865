"""The tasks as an environment of ``verifiers`` (extra ``verifiers``), which prime-rl, SkyRL and verl read.

A rollout takes turns: the model writes a query (reading, study) or names a word (bandit), and the environment answers
with what that brings. The reward is the task's own, of the whole episode. ::

    import verifiers
    env = verifiers.load_environment("preceptor.environments.verifiers_env", task="study")

:func:`generator_client` lets a model in this process answer, without a server.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from preceptor.environments import load_task
from preceptor.environments.episodes import Task, finish, is_over
from preceptor.environments.trl_rewards import prompt_rows
from preceptor.errors import ConfigError, MissingExtraError
from preceptor.lm.generators.base import Generator
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

NO_CHOICE = "That stands for no choice.\n"
"""What a turn is answered that names nothing."""

TURNS_PER_CHOICE = 2
"""Turns that a model may take for each choice; what is open then is chosen in the task's own order."""


def load_environment(
    task: str = "reading",
    *,
    preset: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    split: str = "train",
    mode: str | None = None,
    num_rows: int = 64,
    seed: int = 0,
) -> Any:
    """The environment of a task, a ``verifiers.MultiTurnEnv``, as ``verifiers.load_environment`` makes it.

    Args:
        task, preset, overrides, split, mode: of :func:`~preceptor.environments.load_task`.
        num_rows: rows of the dataset; each is a problem.
        seed: by which they are drawn.

    Raises:
        ConfigError: an unknown task or key, or no rows.
        MissingExtraError: verifiers is not installed.
    """
    if num_rows < 1:
        raise ConfigError(f"`num_rows` must be at least 1, got {num_rows}")
    _verifiers()
    loaded = load_task(task, preset=preset, overrides=overrides, split=split, mode=mode)
    return task_environment(loaded, prompt_rows(loaded, num_rows, seed=seed, chat=True))


def task_environment(task: Task, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The environment whose rollouts are episodes of ``task``; ``rows`` are those of ``prompt_rows`` with ``chat``."""
    verifiers = _verifiers()
    from datasets import Dataset

    # The class is made here, because its parent is known only where verifiers is installed.
    class TaskEnvironment(verifiers.MultiTurnEnv):  # type: ignore[misc, name-defined]
        async def setup_state(self, state: Any) -> Any:
            """Begins the episode."""
            state["episode"] = task.episode(int(state["info"]["problem"]))
            return state

        async def env_response(self, messages: Any, state: Any, **unused: Any) -> list[Any]:
            """What the last turn brings; the episode ends with the last choice, or when no turns are left."""
            episode = state["episode"]
            choice = episode.meaning(_text(messages[-1].content))
            answer = NO_CHOICE if choice is None else episode.take(choice)
            response = [verifiers.UserMessage(content=answer)]
            if is_over(episode) or len(state["trajectory"]) >= TURNS_PER_CHOICE * episode.num_turns:
                state["final_env_response"] = response
            return response

    async def episode_reward(state: Any, **unused: Any) -> float:
        """What the task pays for the episode."""
        finish(state["episode"])
        return task.rewards([state["episode"]])[0]

    return TaskEnvironment(
        dataset=Dataset.from_list([{"prompt": row["prompt"], "info": {"problem": row["problem"]}} for row in rows]),
        rubric=verifiers.Rubric(funcs=[episode_reward]),
        env_id=f"preceptor-{task.name}",
    )


def generator_client(
    lm: LanguageModel, engine: Generator, *, sampling: Sampling, num_tokens: int, generator: torch.Generator
) -> Any:
    """A ``verifiers.Client`` whose answers a model in this process gives: the messages' texts, continued by an engine.

    Tokens and log-probabilities come with each answer, for a trainer to learn from.

    Args:
        lm: whose tokens the texts become.
        engine: continues them.
        sampling: how.
        num_tokens: of an answer, at most.
        generator: of the samples.

    Raises:
        MissingExtraError: verifiers is not installed.
    """
    verifiers = _verifiers()
    from verifiers.types import Response, ResponseMessage, ResponseTokens, Usage

    class GeneratorClient(verifiers.Client):  # type: ignore[misc, name-defined]
        def setup_client(self, config: Any) -> Any:
            """No configuration makes a model in this process."""
            raise ConfigError("this client is made with an engine, not with a ClientConfig")

        async def to_native_tool(self, tool: Any) -> Any:
            """No tools."""
            raise ConfigError("this client offers no tools; the tasks need none")

        async def to_native_prompt(self, messages: Any) -> tuple[list[int], dict[str, Any]]:
            """The tokens of the whole conversation."""
            text = "".join(_text(message.content) for message in messages)
            return [lm.begin_token, *lm.encode(text)], {}

        async def get_native_response(
            self, prompt: list[int], model: str, sampling_args: Any, tools: Any = None, **unused: Any
        ) -> Any:
            """One continuation of the tokens."""
            found = engine.generate([prompt], number=1, num_tokens=num_tokens, sampling=sampling, generator=generator)
            counted = found.mask[0]
            return prompt, found.tokens[0][counted].tolist(), found.log_probs[0][counted].tolist(), model

        async def raise_from_native_response(self, response: Any) -> None:
            """Whatever was written is valid."""

        async def from_native_response(self, response: Any) -> Any:
            """The answer as ``verifiers`` has it."""
            prompt, tokens, log_probs, model = response
            ended = tokens[-1] == lm.tokenizer.eos_token_id
            return Response(
                id=uuid.uuid4().hex,
                created=int(time.time()),
                model=model,
                usage=Usage(
                    prompt_tokens=len(prompt),
                    reasoning_tokens=0,
                    completion_tokens=len(tokens),
                    total_tokens=len(prompt) + len(tokens),
                ),
                message=ResponseMessage(
                    content=lm.decode(tokens[:-1] if ended else tokens),
                    finish_reason="stop" if ended else "length",
                    # A turn has a length of its own: one that uses it up is whole, and the rollout goes on.
                    is_truncated=False,
                    tokens=ResponseTokens(
                        prompt_ids=prompt,
                        prompt_mask=[0] * len(prompt),
                        completion_ids=tokens,
                        completion_mask=[1] * len(tokens),
                        completion_logprobs=log_probs,
                    ),
                ),
            )

        async def close(self) -> None:
            """Nothing is open."""

    return GeneratorClient(engine)


def _verifiers() -> Any:
    """The package."""
    try:
        import verifiers
    except ImportError as error:
        raise MissingExtraError("the environment of verifiers", package="verifiers", extra="verifiers") from error
    return verifiers


def _text(content: Any) -> str:
    """The text of a message, whose content may be in parts."""
    if isinstance(content, str):
        return content
    parts = content or ()
    return "".join(str(part["text"] if isinstance(part, Mapping) else part.text) for part in parts)
