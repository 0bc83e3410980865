"""A running vLLM server as an engine, spoken to by its OpenAI-compatible completions endpoint (extra ``vllm``).

Start it as follows; ``--logprobs-mode`` makes it say the probabilities that it really sampled from, and the development
mode lets a trainer replace its weights. Both processes must see the same folder. ::

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from preceptor.config import is_service_url
from preceptor.errors import ConfigError, MissingExtraError, ServiceError
from preceptor.lm.generators.base import Generations, end_token
from preceptor.lm.load import save_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

FORBIDDEN = -100.0
"""Logit bias of a suppressed token: the lowest that the API takes."""


class VLLMGenerator:
    """A vLLM server that holds a copy of the model's weights.

    Args:
        lm: whose weights the server is given, and whose tokens it must have.
        url: its address, up to and without ``/v1``.
        folder: weights are written here for the server to read.
        api_key: sent to ``url`` only; never kept in an attribute, shown or written.
        timeout: seconds that a request may take.

    Raises:
        ConfigError: the address is none.
        MissingExtraError: httpx is not installed.
        ServiceError: the server is out of reach, or serves nothing.
    """

    name = "vLLM"

    def __init__(
        self, lm: LanguageModel, *, url: str, folder: Path, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("rollouts by vLLM", package="httpx", extra="vllm") from error
        if not is_service_url(url) or "?" in url:  # not repeated: it may hold a secret
            raise ConfigError("the address of a vLLM server must be http(s)://host:port without a user name or a query")
        self._lm, self._folder = lm, folder
        root = url.rstrip("/").removesuffix("/v1")
        client = httpx.Client(
            base_url=root, timeout=timeout, headers={"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

        def request(method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
            try:
                answer = client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise ServiceError(f"the vLLM server at {root} does not answer ({_line(error)}); start it") from error
            if answer.status_code != 200:
                said = _line(answer.text.replace(api_key, "<api key>") if api_key else answer.text)
                raise ServiceError(
                    f"the vLLM server at {root} refused {path} with status {answer.status_code}: {said}"
                    f"{_REMEDIES.get(path, '')}"
                )
            try:
                return answer.json() if answer.content else None
            except json.JSONDecodeError as error:
                raise ServiceError(
                    f"the vLLM server at {root} answered {path} with something else than JSON"
                ) from error

        # A closure and no attribute: vars(), repr() and pickle cannot show the key.
        self._request: Callable[..., Any] = request
        models = request("GET", "/v1/models")
        try:
            self._model = str(models["data"][0]["id"])
        except (TypeError, KeyError, IndexError) as error:
            raise ServiceError(f"the vLLM server at {root} names no model; start it with one") from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        number: int,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Generations:
        """``number`` continuations of every prompt (:meth:`~preceptor.lm.generators.base.Generator.generate`).

        Raises:
            ServiceError: the server is out of reach, or its answer is not as asked for.
        """
        end = end_token(self._lm)
        answer = self._request(
            "POST",
            "/v1/completions",
            {
                "model": self._model,
                "prompt": [list(prompt) for prompt in prompts],
                "n": number,
                "max_tokens": num_tokens,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or -1,
                "top_p": sampling.top_p,
                # What a model's own file may set otherwise: nothing but our end token ends a row, nothing is penalised.
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "ignore_eos": True,
                "stop_token_ids": [end] if end >= 0 else [],
                "logit_bias": {str(token): FORBIDDEN for token in sampling.suppressed},
                "seed": int(torch.randint(2**31, (), generator=generator)),
                "logprobs": 0,  # of the sampled token alone
                "return_token_ids": True,
                "skip_special_tokens": False,
            },
        )
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            rows = [[int(token) for token in choice["token_ids"]] for choice in choices]
            said = [[float(value) for value in choice["logprobs"]["token_logprobs"]] for choice in choices]
        except (TypeError, KeyError, ValueError) as error:
            raise ServiceError(
                f"the vLLM server answered without token ids or log-probabilities ({error!r}); it must be "
                "0.10.2 or newer"
            ) from error
        if len(rows) != len(prompts) * number or any(
            not 0 < len(row) == len(values) <= num_tokens for row, values in zip(rows, said, strict=True)
        ):
            raise ServiceError(
                f"the vLLM server answered with {len(rows)} continuations, {len(prompts) * number} of 1 to "
                f"{num_tokens} tokens with a log-probability each were asked for"
            )
        filler, device = max(end, 0), self._lm.device
        return Generations(
            tokens=torch.tensor([row + [filler] * (num_tokens - len(row)) for row in rows], device=device),
            mask=torch.tensor([[place < len(row) for place in range(num_tokens)] for row in rows], device=device),
            log_probs=torch.tensor([row + [0.0] * (num_tokens - len(row)) for row in said], device=device),
        )

    def refresh(self) -> None:
        """Writes the weights, has the server read them, and has it forget what it computed with the old ones.

        Raises:
            ServiceError: the server is out of reach, or refuses new weights.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        save_language_model(self._lm, self._folder)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder.resolve())}}
        self._request("POST", "/collective_rpc", body)
        self._request("POST", "/reset_prefix_cache")


_REMEDIES = {
    "/collective_rpc": "; start it with VLLM_SERVER_DEV_MODE=1, on a machine that sees the run folder",
    "/reset_prefix_cache": "; start it with VLLM_SERVER_DEV_MODE=1",
    "/v1/models": "; if it asks for a key, set the environment variable VLLM_API_KEY",
}


def _line(said: object) -> str:
    """The first 200 characters, in one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(said)).split())[:200]
