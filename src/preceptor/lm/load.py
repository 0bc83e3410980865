"""Language models by hub name, local folder or the bundled starter, whole or with a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from preceptor.errors import MissingExtraError, ModelError
from preceptor.lm.language_model import LanguageModel

STARTER = "starter"
"""The name of the bundled model."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) on the linear layers of the decoder.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: scale; the update is multiplied by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0


def load_language_model(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, adapter: Adapter | None = None
) -> LanguageModel:
    """The model and tokenizer called ``name``, on ``device``, ready to act and to learn.

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
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, HFValidationError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"model '{name}' cannot be loaded: {_first_line(error)}; give 'starter', a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that this machine can reach"
        ) from error
    if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
        raise ModelError(
            f"the tokenizer of '{name}' has {len(tokenizer)} entries and the model "
            f"{model.get_output_embeddings().weight.shape[0]}; use the tokenizer the model was trained with"
        )
    model.to(device)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return LanguageModel(model, tokenizer, name=name)


def _source(name: str) -> str:
    if name == STARTER:
        return str(resources.files("preceptor") / "starter")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {name} has no config.json; give the folder that save_pretrained wrote")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name} does not exist; check the path")
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _with_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("training a LoRA adapter", package="peft", extra="lora") from error
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)
