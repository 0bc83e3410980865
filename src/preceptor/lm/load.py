"""Language models and tokenizers by hub name, local folder or the bundled starter; whole or with a LoRA adapter."""

from __future__ import annotations

import base64
import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, errors, try_to_load_from_cache
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging as transformers_logging

from preceptor.errors import ConfigError, MissingExtraError, ModelError
from preceptor.lm.model import LanguageModel

STARTER = "starter"
"""The name of the bundled model."""

HUB_TIMEOUT = 10.0
"""Seconds until a hub that does not answer counts as out of reach."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) on the linear layers of the decoder.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: scale, > 0; the update is multiplied by alpha / rank.

    Raises:
        ConfigError: a value outside its range.
    """

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        faults = []
        if self.rank < 1:
            faults.append(f"the adapter's `rank` must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            faults.append(f"the adapter's `alpha` must be above 0, got {self.alpha}")
        if faults:
            raise ConfigError(*faults)


def load_language_model(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, adapter: Adapter | None = None
) -> LanguageModel:
    """The model and tokenizer called ``name``, on ``device``, ready to act and to learn.

    Only safetensors are read, and no code that comes with a model is run. A hub that cannot be reached is asked once;
    what was downloaded before is then used.

    Args:
        name: ``starter``, a local folder, or a name on the Hugging Face hub.
        device: where the weights live.
        dtype: of the weights.
        adapter: train a LoRA adapter and keep the model's own weights frozen; None trains every weight.

    Raises:
        ModelError: there is no such model, it is damaged, or it does not fit.
        MissingExtraError: an adapter is asked for and peft is not installed.
    """
    source = _source(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            model, report = loaded
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"model '{name}' cannot be loaded: {_first_line(error)}; give 'starter', a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that this machine can reach"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights of model '{name}' lack {len(missing)} tensors, the first of them {missing[0]}; "
            "config.json and model.safetensors must be of the same model"
        )
    model.to(device)
    return LanguageModel(model if adapter is None else _with_adapter(model, adapter), tokenizer, name=name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer for a model that is built from random weights.

    Args:
        name: ``starter``, a local folder, a name on the Hugging Face hub, or ``tiktoken:gpt2`` for an encoding that
            tiktoken knows (which it downloads once).

    Raises:
        ModelError: there is no such tokenizer, or it is out of reach.
        MissingExtraError: tiktoken is asked for and not installed.
    """
    if name.startswith("tiktoken:"):
        return _from_tiktoken(name.removeprefix("tiktoken:"))
    path = Path(name).expanduser()
    source = _folder(path) if path.is_dir() else _source(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"tokenizer '{name}' cannot be loaded: {_first_line(error)}; give 'starter', a folder with tokenizer.json, "
            "a hub name that this machine can reach, or 'tiktoken:gpt2'"
        ) from error
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def save_language_model(lm: LanguageModel, folder: Path) -> None:
    """Write model and tokenizer so that :func:`load_language_model` finds them in ``folder``."""
    with _quiet():
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)


def _from_tiktoken(name: str) -> PreTrainedTokenizerBase:
    """The encoding ``name`` of tiktoken as a tokenizer of Transformers."""
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError(f"tokenizer 'tiktoken:{name}'", package="tiktoken", extra="tiktoken") from error
    try:
        encoding = tiktoken.get_encoding(name)
    except (ValueError, OSError) as error:  # its client's network errors are OSErrors
        raise ModelError(
            f"tiktoken's encoding '{name}' is out of reach ({_first_line(error)}); give 'tiktoken:gpt2' where the "
            "network allows it, or a local folder with tokenizer.json"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "tokenizer.model"
        with ranks.open("wb") as file:  # the format that the converter reads: a token in base64 and its rank a line
            for token, rank in encoding._mergeable_ranks.items():
                file.write(base64.b64encode(token) + b" " + str(rank).encode() + b"\n")
        converter = TikTokenConverter(  # type: ignore[no-untyped-call]
            vocab_file=str(ranks), pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens
        )
        converted = converter.converted()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=converted, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )


def _source(name: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that find ``name``."""
    if name == STARTER:
        return _folder(resources.files("preceptor") / "starter")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {name} has no config.json; give the folder that save_pretrained wrote")
        return _folder(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name} does not exist; check the path")
    return _hub_source(name)


def _folder(path: object) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}


def _hub_source(name: str) -> dict[str, Any]:
    """The hub's model ``name`` at its newest commit, so that tokenizer and weights are of one; or what is cached of it.

    Transformers itself would ask a hub that does not answer again and again, file by file, for about a minute.
    """
    remedy = "give 'starter', a folder that save_pretrained wrote, or a hub name that this machine can reach"
    try:
        commit = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
        return {"pretrained_model_name_or_path": name, "revision": commit}
    except errors.GatedRepoError as error:
        raise ModelError(f"model '{name}' is gated; accept its terms on the hub and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(f"there is no model '{name}', neither as a folder here nor on the hub; {remedy}") from error
    # The errors of whichever client the hub is reached by.
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return _folder(Path(cached).parent)
        raise ModelError(
            f"model '{name}' is no folder here, the hub cannot be reached ({_first_line(error)}), and it was not "
            f"downloaded before; {remedy}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' progress bars and advice, but with a download's; all settings are put back."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    shows_downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # switches off downloads' too
    if shows_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not shows_downloads:
            disable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _with_adapter(model: PreTrainedModel, adapter: Adapter) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("training a LoRA adapter", package="peft", extra="lora") from error
    alpha: Any = adapter.alpha  # peft annotates an integer and divides by the rank
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # peft draws one of an adapter's two matrices; here it is the same in every run and moves no other random stream.
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # peft on what Transformers deprecates, and on what it sets right by itself
        return get_peft_model(model, settings)
