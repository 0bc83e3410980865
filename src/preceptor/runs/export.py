"""What a run learned, taken out: model folders that Transformers and PEFT load, their model card, and the hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from preceptor.errors import ConfigError, MissingExtraError, ModelError, ServiceError
from preceptor.runs.files import TEMPORARY, replace_file, storage_errors
from preceptor.runs.record import require_unchanged

MODEL = "model"
"""Folder of a run with what it learned."""

STUDY_NOTE = (
    "These weights make the vectors by which a study's policy compares questions and passages. The policy itself is "
    "`study.safetensors` in the run's folder (`preceptor study --policy RUN`); text that this model writes was not "
    "measured."
)

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT, and Transformers where PEFT is installed, know an adapter's folder."""


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes ``model`` (a PEFT model's adapter alone) and ``tokenizer`` so that ``from_pretrained(folder)`` loads them.

    ``weights`` are written instead of the model's own, of which this process may have a part only. The folder is
    replaced as a whole or not at all. Raises ``StorageError`` when the disk is full or refuses; a folder that was there
    is then untouched.
    """
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    with storage_errors(f"save the model in {folder}"), _without_progress_bar():
        if temporary.exists():
            shutil.rmtree(temporary)
        model.save_pretrained(temporary, **({} if weights is None else {"state_dict": dict(weights)}))
        tokenizer.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)


def write_model_card(folder: Path) -> None:
    """Writes ``README.md`` into the run's model folder, made from its ``result.json`` and ``manifest.json``."""
    model, result, manifest = folder / MODEL, _read(folder / "result.json"), _read(folder / "manifest.json")
    if model.is_dir():
        replace_file(model / "README.md", model_card(result, manifest, _base_model(model)))


def export_model(folder: Path, destination: Path, *, merge: bool = False) -> Path:
    """Copies the model of the run in ``folder`` to ``destination`` and returns it.

    Args:
        folder: of a finished run.
        destination: must not exist yet, or be empty.
        merge: load the adapter's base model, add the adapter to its weights, and write a whole model.

    Raises:
        ConfigError: the run has no model, ``destination`` is in use, or there is no adapter to merge.
        ModelError: the base model cannot be loaded.
        StorageError: the run has changed since it ended, or the disk is full or refuses.
    """
    source = folder / MODEL
    if (folder / "result.json").is_file():
        require_unchanged(folder, models=True)  # a model that is gone is told from one that there never was
    if not (source / "config.json").is_file() and not (source / ADAPTER_CONFIG).is_file():
        if (folder / "result.json").is_file():
            raise ConfigError(f"{folder} has no {MODEL}/ to export: a run of this kind trains no model that is kept")
        raise ConfigError(f"{folder} has no {MODEL}/ to export; a run writes it at its end: preceptor resume {folder}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} is not empty; give a folder that does not exist yet")
    if merge and not (source / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{source} is a whole model, there is no adapter to merge; leave --merge out")
    if not merge:
        with storage_errors(f"copy {source} to {destination}"):
            shutil.copytree(source, destination, dirs_exist_ok=True)
        return destination
    model, tokenizer = load_model(source)
    save_model(model.merge_and_unload(), tokenizer, destination)
    with storage_errors(f"copy to {destination}"):
        # No adapter any more, so the card is that of a whole model.
        result, manifest = _read(folder / "result.json"), _read(folder / "manifest.json")
        replace_file(destination / "README.md", model_card(result, manifest, None))
        for name in ("selection.safetensors", "selection.json"):
            if (source / name).is_file():
                shutil.copy(source / name, destination / name)
    return destination


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that a run wrote to ``folder``, as Transformers loads them; with an adapter on its base.

    ``dtype`` is that of a whole model or of an adapter's base; None is that of the file, or of the adapter's own.

    Raises:
        ModelError: the folder or the adapter's base model cannot be loaded.
        MissingExtraError: it is an adapter and PEFT is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Transformers takes the name of a folder that is not there for that of a hub repository.
    if not (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} holds no model; either the run trained none, or restore the folder from a copy")
    base = _base_model(folder)
    if base is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingExtraError("loading a LoRA adapter", package="peft", extra="lora") from error
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        with _without_progress_bar(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses what Transformers deprecates
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
            if dtype is not None:
                options["dtype"] = dtype
            elif base is not None:
                options["dtype"] = _adapter_dtype(folder)
            model = AutoModelForCausalLM.from_pretrained(base or folder, use_safetensors=True, **options)
            return (model if base is None else PeftModel.from_pretrained(model, folder)), tokenizer
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the model in {folder} cannot be loaded ({reason}); restore it from a copy") from error


def push_to_hub(folder: Path, name: str, *, private: bool = True) -> str:
    """Uploads the model folder ``folder`` to the hub repository ``name`` (``user/model``) and returns its address.

    The token is the hub client's own (``HF_TOKEN``, or that of ``hf auth login``). Raises ``ServiceError``.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Model trained with Preceptor")
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no name of a hub repository; write it as USER/MODEL") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(f"the hub did not take {folder} as {name}: {reason}; it is unchanged here") from error
    return str(address)


def _base_model(folder: Path) -> str | None:
    """The model that the adapter in ``folder`` belongs to; None for a whole model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return str(_read(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))


def _adapter_dtype(folder: Path) -> torch.dtype:
    """The type that the adapter was trained in, and so its base too, whatever type the base's own file is in."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


def _read(path: Path) -> Mapping[str, Any]:
    with storage_errors(f"read {path}"):
        content: Mapping[str, Any] = json.loads(path.read_bytes())
    return content


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Transformers' own bar would break into the run's."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(result: Mapping[str, Any], manifest: Mapping[str, Any], base_model: str | None) -> str:
    """``README.md`` of a model folder, in Markdown with the hub's metadata on top.

    Args:
        result: of ``result.json``.
        manifest: of ``manifest.json``.
        base_model: that an adapter belongs to; None for a whole model.
    """
    system = str(manifest.get("system", ""))
    metadata: dict[str, Any] = {
        "library_name": "transformers" if base_model is None else "peft",
        # A study trains its model for the vectors of texts alone.
        "pipeline_tag": "feature-extraction" if "study" in result else "text-generation",
        "tags": ["preceptor", f"preceptor-{system}"],
    }
    if base_model is not None and not Path(base_model).is_dir():  # a folder of this machine names nothing elsewhere
        metadata["base_model"] = base_model
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            f"# A model trained by Preceptor's `{system}`",
            "",
            str(result.get("verdict", "")),
            "",
            *([STUDY_NOTE, ""] if "study" in result else []),
            *_table(result),
            "## How it was made",
            "",
            *_facts(manifest),
            "",
            "```bash",
            f"preceptor run {system} --config config.yaml --seed {manifest.get('seed')}",
            "```",
            "",
        ]
    )


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """The short table of methods, where the result has one."""
    methods = result.get("arms") or {}
    metrics = [metric for metric in result.get("table", []) if any(metric in own for own in methods.values())]
    if not metrics:
        return
    yield "## Measured"
    yield ""
    yield f"Means with 95 % intervals over {len(result.get('seeds', []))} seed(s)."
    yield ""
    yield f"| method | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |"
    yield f"|---|{'---|' * len(metrics)}"
    for name, own in methods.items():
        yield f"| {name.replace('_', ' ')} | {' | '.join(_cell(own.get(metric)) for metric in metrics)} |"
    yield ""


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate.get("mean") is None:
        return ""
    interval = "" if estimate.get("low") is None else f" [{estimate['low']:.4g}, {estimate['high']:.4g}]"
    return f"{estimate['mean']:.4g}{interval}"


def _facts(manifest: Mapping[str, Any]) -> Iterator[str]:
    environment, code = manifest.get("environment", {}), manifest.get("code", {})
    yield f"- Preceptor {environment.get('preceptor')}, commit {code.get('commit')}"
    yield f"- torch {environment.get('torch')}, transformers {environment.get('transformers')}"
    yield f"- seed {manifest.get('seed')}, device {manifest.get('device')}, {environment.get('threads')} thread(s)"
