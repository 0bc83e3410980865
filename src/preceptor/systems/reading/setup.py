"""What a run of reading begins with: models, tokenized articles, key vectors and the calibrated temperature."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from preceptor.errors import ConfigError, StorageError
from preceptor.lm.chat import RenderedMarkers, rendered_markers
from preceptor.lm.embedding import MODEL_EMBEDDINGS
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.objectives.selection import calibrated_temperature
from preceptor.runs.device import parse_dtype
from preceptor.runs.files import replace_file, storage_errors
from preceptor.runs.metrics import row_json
from preceptor.runs.world import World
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, load_articles, tokenize_article
from preceptor.systems.reading.config import ModelOptions, ReadingConfig
from preceptor.systems.reading.environment import check_budget, run_episodes
from preceptor.systems.reading.policy import Keys, Policy, identity_projection
from preceptor.systems.reading.rewards import LanguageModelReader, Reader, shared

if TYPE_CHECKING:
    from preceptor.data.embedders.base import TextEmbedder
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

MARKERS_NAME = "chat_markers.json"
"""What the chat templates of a run's models gave when it began: model → texts."""

CALIBRATION_ARTICLES = 8
"""Training articles over which the temperature is calibrated, at most."""


@dataclass(frozen=True)
class Setup:
    """What does not change during a run, except the weights of ``policy``.

    Attributes:
        config, run: of the run.
        policy: the teacher.
        initial_policy: the teacher before training, at the same temperature.
        reader: the student.
        initial_reader: the policy before training as a student, for ``untrained_reader`` normalisation.
        articles, keys: articles in the policy's tokens and their key vectors, by name.
        train, held_out: names of the articles that are trained on and of those that are only evaluated.
    """

    config: ReadingConfig
    run: Run
    policy: Policy
    initial_policy: Policy
    reader: Reader
    initial_reader: Reader
    articles: Mapping[str, TokenizedArticle]
    keys: Mapping[str, Keys]
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    def generators(self, prefix: str = "") -> dict[str, torch.Generator]:
        """The random streams whose names begin with ``prefix``, by the rest of their name."""
        streams = self.run.streams
        return {name.removeprefix(prefix): streams[name] for name in streams if name.startswith(prefix)}


def prepare(config: ReadingConfig, run: Run, services: Services) -> Setup:
    """The setup that ``config`` describes; writes ``articles.json`` into the run folder.

    Raises:
        PreceptorError: a model, article or embedder is not available, or a budget does not fit.
    """
    # The model that learns, and the same model as it is now.
    adapter = Adapter(config.model.adapter_rank, config.model.adapter_alpha) if config.model.adapter_rank else None
    is_shared = config.model.sharding == "full" and run.world.size > 1
    with run.world.first_then_others():
        lm = load_language_model(
            config.model.name,
            device=torch.device("cpu") if is_shared else run.device,  # no GPU may hold all of it
            dtype=parse_dtype(config.model.dtype),
            adapter=adapter,
            in_4bit=config.model.quantization == "4bit",
        )
    lm.recomputes = config.update.gradient_checkpointing
    initial_lm = lm.initial_model()
    if is_shared:
        from preceptor.runs.sharding import share_weights

        share_weights((lm, initial_lm), run.world, run.device)

    # Articles, as text and in the model's tokens.
    with run.world.first_then_others():
        pairs = load_articles(config.data, lm, cache_dir=services.cache_dir)
    every = (*pairs.train, *pairs.held_out)
    train = tuple(each.name for each in pairs.train)
    for each in every:
        if each.num_pairs < config.data.num_pairs:
            run.notice(f"'{each.name}' is short: {each.num_pairs} of {config.data.num_pairs} pairs can be read")
    kept = run.world.of_first(lambda: first_markers(run.path, config.model, lm))
    articles = tokenize_articles(every, lm, config.model, kept=kept)
    _check_budgets(config, articles, lm.context_length, train=train)

    # The policy and its keys, which are embedded once, before training.
    sampling = Sampling(
        temperature=config.episode.temperature,
        top_k=config.episode.top_k,
        top_p=config.episode.top_p,
        # A control token inside a query could end a turn or a text, and a token without text has nothing to say.
        suppressed=lm.never_drawn,
    )
    text_embedder = _text_embedder(config, services, run.device, run.world)

    selection = config.selection
    policy, initial_policy = (
        Policy(
            model,
            sampling=sampling,
            embedding=MODEL_EMBEDDINGS[selection.embedder](model, layer=selection.layer)
            if text_embedder is None
            else None,
            text_embedder=text_embedder,
            centre=selection.centre,
        )
        for model in (lm, initial_lm)
    )
    keys = {name: initial_policy.embed_keys(article) for name, article in articles.items()}
    if selection.projection:  # the initial policy has none: its selection is that of the identity
        policy.projection = identity_projection(keys[train[0]].vectors.shape[1], device=lm.device)

    # The reader: the initial model, the policy as it learns, or another model with its own tokens.
    reader = LanguageModelReader(lm if config.reward.reader == "policy" else initial_lm)
    if config.reward.reader not in ("", "policy"):
        with run.world.first_then_others():
            reader_lm = load_language_model(config.reward.reader, device=run.device)
        reader_lm.model.requires_grad_(False)
        reader_articles = tokenize_articles(every, reader_lm, config.model, kept=kept)
        _check_budgets(config, reader_articles, reader_lm.context_length)
        reader = LanguageModelReader(reader_lm, policy_lm=lm, articles=reader_articles)

    setup = Setup(
        config=config,
        run=run,
        policy=policy,
        initial_policy=initial_policy,
        reader=shared(reader, run.world),
        initial_reader=shared(LanguageModelReader(initial_lm), run.world),
        articles=articles,
        keys=keys,
        train=train,
        held_out=tuple(each.name for each in pairs.held_out),
    )
    policy.temperature = initial_policy.temperature = selection.temperature or calibrate(setup)
    if not (run.path / "articles.json").is_file():  # told once, when nothing can be refused any more
        for remark in (remark for each in every for remark in each.remarks):
            run.notice(remark)
    if run.writes:
        if kept:
            replace_file(run.path / MARKERS_NAME, json.dumps(kept, ensure_ascii=False) + "\n")
        replace_file(run.path / "articles.json", row_json(_articles_json(setup)) + "\n")
    return setup


def tokenize_articles(
    articles: Sequence[ArticlePairs], lm: LanguageModel, options: ModelOptions, *, kept: dict[str, RenderedMarkers]
) -> dict[str, TokenizedArticle]:
    """Every article in the tokens of ``lm``, by name.

    Args:
        articles: their text.
        lm: whose tokens.
        options: prompt and chat template.
        kept: markers by model, as rendered before; those rendered now are added.
    """
    if options.use_chat_template and lm.name not in kept and (rendered := rendered_markers(lm)):
        kept[lm.name] = rendered
    use_chat_template, rendered = options.use_chat_template, kept.get(lm.name)
    return {
        each.name: tokenize_article(
            each, lm, prompt=options.prompt, use_chat_template=use_chat_template, rendered=rendered
        )
        for each in articles
    }


def first_markers(folder: Path, options: ModelOptions, lm: LanguageModel) -> dict[str, RenderedMarkers]:
    """:func:`kept_markers`, and those of ``lm`` as rendered now if there are none yet."""
    kept = kept_markers(folder)
    if options.use_chat_template and lm.name not in kept and (rendered := rendered_markers(lm)):
        kept[lm.name] = rendered
    return kept


def kept_markers(folder: Path) -> dict[str, RenderedMarkers]:
    """What the chat templates of a run's models gave when it began; a template may read the clock.

    Raises:
        StorageError: the run's ``chat_markers.json`` is damaged.
    """
    path = folder / MARKERS_NAME
    if not path.is_file():
        return {}
    with storage_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        kept = {}
        for model, (prompt, query, value) in json.loads(text).items():
            kept[str(model)] = str(prompt), str(query), str(value)
        return kept
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is damaged ({error}); restore it from a copy") from error


def calibrate(setup: Setup) -> float:
    """The temperature at which the first selections of the initial policy have the configured share of maximum entropy.

    The geometric mean over the first training articles.
    """
    episode = setup.config.episode
    logarithms = []
    for name in setup.train[:CALIBRATION_ARTICLES]:
        keys = setup.keys[name]
        if len(set(setup.articles[name].keys)) == 1:
            setup.run.notice(f"every key of '{name}' reads the same, so a query cannot prefer one")
            continue  # its selection is uniform at every temperature
        # One step is enough: every key is still available, and the temperature does not change what queries are drawn.
        trajectories = run_episodes(
            setup.initial_policy,
            setup.articles[name],
            keys,
            num_episodes=max(episode.batch_size, 8),
            budget=1,
            query_tokens=episode.query_tokens,
            generators=setup.generators("calibration_"),
            world=setup.run.world,
        )
        temperature = calibrated_temperature(
            trajectories.query_vectors[:, 0],  # batch dimension
            keys.vectors.cpu(),
            available_mask=trajectories.available_mask[:, 0],
            target_fraction=setup.config.selection.entropy_fraction,
        )
        logarithms.append(math.log(temperature))  # temperatures act as factors, so the mean is geometric
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0


def _check_budgets(
    config: ReadingConfig, articles: Mapping[str, TokenizedArticle], context_length: int, *, train: Sequence[str] = ()
) -> None:
    """Refuse what does not fit before anything is computed.

    The final evaluation reads every pair, whatever the budget of training is. A query is assumed to be as long for a
    reader of another vocabulary as for the policy.
    """
    lengths: dict[str, Any] = {
        "query_tokens": config.episode.query_tokens,
        "probe_after_queries": config.reward.kind == "probe" and config.reward.context == "queries",
    }
    # Every article is refused here, before the first update, and not when its turn comes.
    for name, article in articles.items():
        check_budget(context_length, article, budget=article.num_pairs, **lengths)
        if name in train and config.episode.budget:
            check_budget(context_length, article, budget=config.episode.budget, **lengths)


def _text_embedder(
    config: ReadingConfig, services: Services, device: torch.device, world: World
) -> TextEmbedder | None:
    """The configured embedder of texts, or None where the policy's own vectors are used."""
    options = config.selection
    named: dict[str, Any] = {"model": options.text_model} if options.text_model else {}
    if options.embedder == "openai":
        # Imported only where they are used: both need a package that few runs need.
        from preceptor.data.embedders.openai import OpenAIEmbedder

        world.refuse("`selection.embedder` openai, which pays for each text,")
        if not services.openai_api_key:
            raise ConfigError("`selection.embedder` openai needs a key; set the environment variable OPENAI_API_KEY")
        return OpenAIEmbedder(
            **named,
            api_key=services.openai_api_key,
            base_url=options.base_url or services.openai_base_url,
            dimensions=options.text_dimension or None,
            cache_dir=services.cache_dir / "embeddings",
            max_usd=options.max_usd,
        )
    if options.embedder == "sentence_transformers":
        from preceptor.data.embedders.sentence_transformers import SentenceTransformerEmbedder

        named.setdefault("model", "sentence-transformers/all-MiniLM-L6-v2")
        return SentenceTransformerEmbedder(**named, device=str(device))
    return None


def _articles_json(setup: Setup) -> dict[str, Any]:
    """The text that decisions refer to by article and pair."""
    return {
        name: {
            "title": article.pairs.title,
            "split": "train" if name in setup.train else "held_out",
            "pairs": [
                {"index": index, "key": key, "value": value}
                for index, (key, value) in enumerate(zip(article.pairs.keys, article.pairs.values, strict=True))
            ],
            "probes": [article.pairs.probe] if article.pairs.probe else [],
            "key_version": setup.keys[name].version,
        }
        for name, article in setup.articles.items()
    }
