"""What a run of reading begins with: models, articles in their tokens, key vectors, the calibrated temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from preceptor.data.embedders.base import TextEmbedder
from preceptor.data.embedders.openai import OpenAIEmbedder
from preceptor.data.embedders.sentence_transformers import SentenceTransformerEmbedder
from preceptor.errors import ConfigError
from preceptor.lm.embedding import MODEL_EMBEDDINGS
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.objectives.selection import calibrated_temperature
from preceptor.run.device import parse_dtype
from preceptor.run.files import replace_file
from preceptor.run.strict_json import row_json
from preceptor.systems.reading.articles import load_readings
from preceptor.systems.reading.config import ReadingConfig, SelectionOptions
from preceptor.systems.reading.episode import check_budget, run_episodes
from preceptor.systems.reading.material import Material, encode_reading
from preceptor.systems.reading.policy import Keys, Policy
from preceptor.systems.reading.reader import LanguageModelReader, Reader

if TYPE_CHECKING:
    from preceptor.run.folder import Run

CALIBRATION_ARTICLES = 8
"""Training articles over which the temperature is calibrated, at most."""


@dataclass(frozen=True)
class Classroom:
    """Teacher, student and what is to be read; an update changes the policy's weights and nothing else here.

    Attributes:
        policy: the teacher.
        untrained: the teacher as it was before training, at the same temperature.
        reader: the student.
        untrained_reader: the policy before training as a student, for ``untrained_reader`` normalisation.
        materials, keys: articles and their key vectors, by name.
        train, held_out: names of the articles that teach and of those that only judge.
    """

    policy: Policy
    untrained: Policy
    reader: Reader
    untrained_reader: Reader
    materials: Mapping[str, Material]
    keys: Mapping[str, Keys]
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def prepare(config: ReadingConfig, run: Run, *, cache_dir: Path, openai_api_key: str | None) -> Classroom:
    """The classroom that ``config`` describes; writes ``articles.json`` into the run folder.

    Raises:
        PreceptorError: a model, article or embedder that cannot be had, or a budget that does not fit.
    """
    adapter = Adapter(config.model.adapter_rank, config.model.adapter_alpha) if config.model.adapter_rank else None
    lm = load_language_model(
        config.model.name, device=run.device, dtype=parse_dtype(config.model.dtype), adapter=adapter
    )
    untrained_lm = lm.initial_model()
    readings = load_readings(config.data, lm, cache_dir=cache_dir)
    for reading in (*readings.train, *readings.held_out):
        if reading.num_pairs < config.data.num_pairs:
            run.notice(f"'{reading.name}' is short: {reading.num_pairs} of {config.data.num_pairs} pairs can be read")
    everything = (*readings.train, *readings.held_out)

    def encoded(language_model: LanguageModel) -> dict[str, Material]:
        return {
            reading.name: encode_reading(
                reading,
                language_model,
                prompt=config.model.prompt,
                use_chat_template=config.model.use_chat_template,
            )
            for reading in everything
        }

    materials = encoded(lm)
    _check_budgets(config, materials, lm.context_length, train=[reading.name for reading in readings.train])
    sampling = Sampling(
        temperature=config.episode.temperature,
        top_k=config.episode.top_k,
        top_p=config.episode.top_p,
        suppressed=tuple(token for token in lm.special_tokens if token < lm.vocab_size),
    )
    text_embedder = _text_embedder(
        config.selection, cache_dir=cache_dir, openai_api_key=openai_api_key, device=run.device
    )
    policy, untrained = (
        Policy(
            model,
            sampling=sampling,
            embedding=MODEL_EMBEDDINGS[config.selection.embedder](model, layer=config.selection.layer)
            if text_embedder is None
            else None,
            text_embedder=text_embedder,
            centre=config.selection.centre,
        )
        for model in (lm, untrained_lm)
    )
    keys = {name: untrained.embed_keys(material) for name, material in materials.items()}
    if config.selection.projection:
        policy.projection = identity_projection(next(iter(keys.values())).vectors.shape[1], device=lm.device)
    reader: Reader
    if config.reward.reader in ("", "policy"):
        reader = LanguageModelReader(lm if config.reward.reader else untrained_lm)
    else:
        reader_lm = load_language_model(config.reward.reader, device=run.device)
        reader_lm.model.requires_grad_(False)
        reader_materials = encoded(reader_lm)
        _check_budgets(config, reader_materials, reader_lm.context_length)
        reader = LanguageModelReader(reader_lm, policy_lm=lm, materials=reader_materials)
    classroom = Classroom(
        policy=policy,
        untrained=untrained,
        reader=reader,
        untrained_reader=LanguageModelReader(untrained_lm),
        materials=materials,
        keys=keys,
        train=tuple(reading.name for reading in readings.train),
        held_out=tuple(reading.name for reading in readings.held_out),
    )
    policy.temperature = untrained.temperature = config.selection.temperature or calibrate(
        classroom,
        target_fraction=config.selection.entropy_fraction,
        num_episodes=config.episode.batch_size,
        query_tokens=config.episode.query_tokens,
        generators={name: run.streams[f"calibration_{name}"] for name in ("query", "selection")},
    )
    replace_file(run.path / "articles.json", row_json(_articles(classroom)) + "\n")
    return classroom


def _check_budgets(
    config: ReadingConfig, materials: Mapping[str, Material], context_length: int, *, train: Sequence[str] = ()
) -> None:
    """Refuse what does not fit before anything is computed.

    The final measurement reads every pair, whatever the budget of training is. A query is taken to be as long for a
    reader of another vocabulary as for the policy.
    """
    needs: dict[str, Any] = {
        "query_tokens": config.episode.query_tokens,
        "probe_after_queries": config.reward.kind == "probe" and config.reward.context == "queries",
    }
    for name, material in materials.items():
        check_budget(context_length, material, budget=material.reading.num_pairs, **needs)
        if name in train and config.episode.budget:
            check_budget(context_length, material, budget=config.episode.budget, **needs)


def identity_projection(dimension: int, *, device: torch.device) -> nn.Linear:
    """A linear map without bias that starts at the identity, so that training starts at the untrained selection."""
    projection = nn.Linear(dimension, dimension, bias=False, device=device)
    nn.init.eye_(projection.weight)
    return projection


def calibrate(
    classroom: Classroom,
    *,
    target_fraction: float,
    num_episodes: int,
    query_tokens: int,
    generators: dict[str, torch.Generator],
) -> float:
    """The temperature at which the untrained policy's first selections have ``target_fraction`` of maximum entropy.

    The geometric mean over the first training articles.
    """
    logarithms = []
    for name in classroom.train[:CALIBRATION_ARTICLES]:
        keys = classroom.keys[name]
        trajectories = run_episodes(
            classroom.untrained,
            classroom.materials[name],
            keys,
            num_episodes=max(num_episodes, 8),
            budget=1,
            query_tokens=query_tokens,
            generators=generators,
        )
        temperature = calibrated_temperature(
            trajectories.query_vectors[:, 0],
            keys.vectors.cpu(),
            available_mask=trajectories.available_mask[:, 0],
            target_fraction=target_fraction,
        )
        logarithms.append(math.log(temperature))
    return math.exp(sum(logarithms) / len(logarithms))


def _text_embedder(
    options: SelectionOptions, *, cache_dir: Path, openai_api_key: str | None, device: torch.device
) -> TextEmbedder | None:
    """The configured embedder of texts, or None where the policy's own vectors are used."""
    named: dict[str, Any] = {"model": options.text_model} if options.text_model else {}
    if options.embedder == "openai":
        if not openai_api_key:
            raise ConfigError("`selection.embedder` openai needs a key; set the environment variable OPENAI_API_KEY")
        return OpenAIEmbedder(
            **named, api_key=openai_api_key, cache_dir=cache_dir / "embeddings", max_usd=options.max_usd
        )
    if options.embedder == "sentence_transformers":
        return SentenceTransformerEmbedder(
            **(named or {"model": "sentence-transformers/all-MiniLM-L6-v2"}), device=str(device)
        )
    return None


def _articles(classroom: Classroom) -> dict[str, Any]:
    """The text that decisions refer to by article and pair."""
    return {
        name: {
            "title": material.reading.title,
            "split": "train" if name in classroom.train else "held_out",
            "pairs": [
                {"index": index, "key": key, "value": value}
                for index, (key, value) in enumerate(zip(material.reading.keys, material.reading.values, strict=True))
            ],
            "probes": [material.reading.probe] if material.reading.probe else [],
            "key_version": classroom.keys[name].version,
        }
        for name, material in classroom.materials.items()
    }
