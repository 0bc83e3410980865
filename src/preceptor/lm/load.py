"""Loading language models and tokenizers: the bundled starter, a local folder or a hub name; with LoRA if wanted."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, errors, try_to_load_from_cache
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging as transformers_logging

from preceptor.errors import ConfigError, MissingExtraError, ModelError, PreceptorError
from preceptor.lm.model import LanguageModel

STARTER = "starter"
"""The name of the bundled model."""

HUB_TIMEOUT = 10.0
"""Seconds after which a hub that does not answer counts as unreachable."""


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
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    adapter: Adapter | None = None,
    in_4bit: bool = False,
) -> LanguageModel:
    """The model called ``name`` and its tokenizer, on ``device``.

    Weights are read from safetensors only, and code that comes with a model is never run. If the hub cannot be reached
    at the first attempt, an earlier download is used.

    Args:
        name: ``starter``, a local folder, or a name on the Hugging Face hub.
        device: device for the weights.
        dtype: dtype of the weights.
        adapter: a LoRA adapter to train while the model's own weights stay frozen; None trains every weight.
        in_4bit: round the weights of linear layers, but the head's, to 4 bits (QLoRA's NF4, Dettmers et al. 2023, arXiv
            2305.14314); products are computed in ``dtype``. Only with an adapter, on an NVIDIA GPU.

    Raises:
        ConfigError: 4 bits are asked for without an adapter or on another device.
        ModelError: there is no such model, it is damaged, or it is of an unsupported kind.
        MissingExtraError: ``adapter`` is given and peft is not installed, or 4 bits are and bitsandbytes is not.
    """
    options = _in_4bit(device, dtype, adapter) if in_4bit else {}
    source = _source(name)
    # Transformers reports a bad folder through half a dozen exception types; whatever it is, the remedy is the same.
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the weights of others; what matters is checked below
            _check_configuration(name, PreTrainedConfig.get_config_dict(**source)[0])
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                **options,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, report = loaded
    except PreceptorError:
        raise
    except Exception as error:  # whatever Transformers meets in a folder that is not as it should be
        raise ModelError(
            f"model '{name}' cannot be loaded: {_first_line(error)}; give 'starter', a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name that this machine can reach"
        ) from error
    # Missing tensors would be filled with random numbers under a mere warning, hence the report.
    for kind, keys in (("lack", report["missing_keys"]), ("hold", report["unexpected_keys"])):
        if keys:
            what = "tensors" if kind == "lack" else "tensors that config.json has no place for"
            raise ModelError(
                f"the weights of model '{name}' {kind} {len(keys)} {what}, the first of them {sorted(keys)[0]}; "
                "config.json and model.safetensors must be of the same model"
            )
    try:
        if not in_4bit:  # those are on the device already
            model.to(device)
        return LanguageModel(model if adapter is None else with_adapter(model, adapter), tokenizer, name=name)
    except (PreceptorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture or tokenizer of a kind that nobody has tried
        raise ModelError(
            f"model '{name}' cannot be used: {_first_line(error)}; use a decoder-only transformer with its own "
            "tokenizer"
        ) from error


def _in_4bit(device: torch.device, dtype: torch.dtype, adapter: Adapter | None) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` rounds weights to 4 bits as it reads them, straight to the GPU."""
    if adapter is None:
        raise ConfigError("a model in 4 bits is frozen and cannot learn; give it an adapter")
    if device.type != "cuda":
        raise ConfigError(
            f"weights in 4 bits need an NVIDIA GPU, got the device {device.type}; set `model.quantization` to none, or "
            "run where there is one"
        )
    for package in ("bitsandbytes", "accelerate"):  # accelerate puts the weights there while they are read
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("a model in 4 bits", package=package, extra="quantized")
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    return {
        "quantization_config": settings(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
        "device_map": {"": device},
    }


MAX_LAYERS = 1_000
"""More layers than any model has; a mistyped number would build modules for hours."""

_COUNTS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"),
    "dimensions": ("hidden_size", "n_embd"),
    "tokens": ("vocab_size",),
}
"""Numbers of a configuration that must be positive, under the names that families give them."""


def _check_configuration(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what would fail late, take hours or fetch code, before anything is built.

    Raises:
        ModelError: a quantized model, an attention kernel from the hub, or an impossible size.
    """
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "") if isinstance(quantization, Mapping) else quantization
        raise ModelError(
            f"model '{name}' is quantized ({str(method)[:40] or 'quantization_config'}), and quantized weights cannot "
            "be trained; give the model that it was made from"
        )
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_configuration(name, value)  # such as the `text_config` of a model that also sees
        elif key.endswith("_implementation") and "/" in str(value):
            raise ModelError(
                f"config.json of model '{name}' asks for code from the hub ({key}: {str(value)[:60]!r}), which is "
                f"never run; remove {key}"
            )
        for what, keys in _COUNTS.items():
            if key in keys and value is not None:
                largest = MAX_LAYERS if what == "layers" else 2**31
                if not isinstance(value, int) or not 1 <= value <= largest:
                    raise ModelError(
                        f"config.json of model '{name}' has {key} {str(value)[:30]}, it must be 1 to {largest:,} {what}"
                    )


def load_model_config(name: str) -> PreTrainedConfig:
    """The configuration of the model called ``name``, without its weights or its tokenizer.

    Args:
        name: ``starter``, a local folder with a ``config.json``, or a name on the Hugging Face hub.

    Raises:
        ModelError: there is no such model, or its configuration is damaged or of an unsupported kind.
    """
    source = _source(name)
    try:
        with _quiet():
            _check_configuration(name, PreTrainedConfig.get_config_dict(**source)[0])
            config: PreTrainedConfig = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    except PreceptorError:
        raise
    except Exception as error:  # whatever Transformers meets in a folder that is not as it should be
        raise ModelError(
            f"the configuration of model '{name}' cannot be read: {_first_line(error)}; give 'starter', a folder with "
            "config.json, or a hub name that this machine can reach"
        ) from error
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called ``name``, for a model built from random weights.

    Args:
        name: ``starter``, a local folder, a name on the Hugging Face hub, or ``tiktoken:`` and the name of one of
            tiktoken's encodings, such as ``tiktoken:gpt2`` (downloaded once).

    Raises:
        ModelError: there is no such tokenizer, or it cannot be reached.
        MissingExtraError: an encoding of tiktoken is asked for and tiktoken is not installed.
    """
    # tiktoken's encodings come without model or configuration, so they are rebuilt as a tokenizer here.
    if name.startswith("tiktoken:"):
        return _from_tiktoken(name.removeprefix("tiktoken:"))
    path = Path(name).expanduser()
    source = _folder(path) if path.is_dir() else _source(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:  # whatever Transformers meets in a folder that is not as it should be
        raise ModelError(
            f"tokenizer '{name}' cannot be loaded: {_first_line(error)}; give 'starter', a folder with tokenizer.json, "
            "a hub name that this machine can reach, or 'tiktoken:gpt2'"
        ) from error
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def save_language_model(lm: LanguageModel, folder: Path) -> None:
    """Write model and tokenizer into ``folder``, where :func:`load_language_model` finds them."""
    with _quiet():
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)


def _from_tiktoken(name: str) -> PreTrainedTokenizerBase:
    """tiktoken's encoding ``name`` as a tokenizer of Transformers."""
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError(f"tokenizer 'tiktoken:{name}'", package="tiktoken", extra="tiktoken") from error
    try:
        encoding = tiktoken.get_encoding(name)
    except (ValueError, OSError) as error:  # network errors of its client are OSErrors
        raise ModelError(
            f"tiktoken's encoding '{name}' is out of reach ({_first_line(error)}); give 'tiktoken:gpt2' where the "
            "network allows it, or a local folder with tokenizer.json"
        ) from error
    # The converter reads a file only, so write one and throw it away.
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "tokenizer.model"
        with ranks.open("wb") as file:  # the converter's format: a base64 token and its rank per line
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
    """Arguments with which ``from_pretrained`` finds ``name``."""
    if name == STARTER:
        return _folder(resources.files("preceptor") / "starter")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {name} has no config.json; give the folder that save_pretrained wrote")
        return _folder(path)
    # A hub name has one slash and no leading dot: anything else is a mistyped path, and the hub would not know it.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name} does not exist; check the path")
    return _hub_source(name)


def _folder(path: object) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(path), "local_files_only": True}


def _hub_source(name: str) -> dict[str, Any]:
    """The newest commit of ``name`` on the hub, so that tokenizer and weights are of the same one; else a cached one.

    The hub is asked here because Transformers would retry an unreachable hub, file by file, for about a minute.
    """
    remedy = "give 'starter', a folder that save_pretrained wrote, or a hub name that this machine can reach"
    try:
        # One commit for all files: a push between two downloads would otherwise mix tokenizer and weights.
        commit = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
        return {"pretrained_model_name_or_path": name, "revision": commit}
    except errors.GatedRepoError as error:
        raise ModelError(f"model '{name}' is gated; accept its terms on the hub and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(f"there is no model '{name}', neither as a folder here nor on the hub; {remedy}") from error
    # Network errors, whichever HTTP client the hub package uses.
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
    """Silences Transformers' advice and progress bars, but not those of downloads; restores every setting on exit."""
    # Remember every switch that is thrown below, since they are global to the process.
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    shows_downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # disables those of downloads too
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


def with_adapter(model: PreTrainedModel, adapter: Adapter) -> Any:
    """``model`` with a LoRA adapter whose matrices alone learn; raises :class:`MissingExtraError` without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("training a LoRA adapter", package="peft", extra="lora") from error
    alpha: Any = adapter.alpha  # annotated as an integer, but peft only divides it by the rank
    # No dropout, since the probabilities trained on must be those sampled from (the model is in evaluation mode).
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # peft initialises one of the two matrices at random. A fixed seed makes it the same in every run, and the fork
    # keeps the global random state as it was.
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # deprecations in Transformers, and settings that peft corrects itself
        return get_peft_model(model, settings)
