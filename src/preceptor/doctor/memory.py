"""What a run will hold of a GPU's memory, part by part, from the model's configuration alone.

The model is built on the ``meta`` device, where tensors have shapes and no storage, so that a model of any size is
looked at in seconds on any machine. Parameters are counted there; what autograd keeps for the backward pass is measured
by a forward pass on ``meta``, tensor by tensor; so is the KV cache. Attention counts as kernels compute it that never
hold all scores (FlashAttention, memory-efficient), which is what PyTorch takes on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from preceptor.doctor.check import Check
from preceptor.lm.forward import num_slots
from preceptor.lm.load import Adapter, load_model_config, with_adapter
from preceptor.lm.log_probs import MAX_SAVED_LOGITS
from preceptor.runs.device import parse_dtype

CONTEXT_BYTES = 600 * 2**20
"""What CUDA itself takes: its context and kernels."""

SPARE = 1.1
"""Room for what is not counted: the allocator's fragments, kernels' working space, gradients of activations."""

ADAPTER_RANK = 8
"""Rank of the adapter that is proposed where every weight is trained."""

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Of a weight in 4 bits, with its share in a scale of 8 bits for each 64, and in one of 32 bits for 256 of these."""

_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Workload:
    """What one step of a run holds at once.

    Attributes:
        model: name of the model, whose configuration is read.
        dtype: of the weights.
        rank: of a LoRA adapter; 0 trains every weight.
        mixed: matrix products in bfloat16 (autocast).
        rows: sequences in one forward and backward pass.
        row_tokens: tokens of each.
        scored_tokens: positions of each row whose logits the loss needs.
        logit_copies: how many times the loss holds a block of logits in float32.
        cache_rows: sequences that are written at once, on a KV cache.
        cache_tokens: tokens of each, at the end.
        copies: further copies of the model's weights: references and snapshots. With an adapter they share its base.
        by_trial: ``rows`` are halved while memory runs out (``update.micro_batch_size`` 0).
        recomputed: layers keep their inputs alone (gradient checkpointing).
        in_4bit: the frozen weights of linear layers, but the head's, are in 4 bits.
        learns: False = nothing of the model is trained, and no pass keeps activations of more than a layer.
    """

    model: str
    dtype: torch.dtype
    rank: int
    mixed: bool
    rows: int
    row_tokens: int
    scored_tokens: int
    logit_copies: int
    cache_rows: int
    cache_tokens: int
    copies: int
    by_trial: bool = False
    recomputed: bool = False
    in_4bit: bool = False
    learns: bool = True


class Memory(NamedTuple):
    """Bytes of each part. Activations and logits on one side and the KV cache on the other are never held together."""

    weights: int
    gradients: int
    optimiser: int
    reference: int
    activations: int
    logits: int
    kv_cache: int

    @property
    def peak(self) -> int:
        """The most that is held at once, CUDA's own memory and :data:`SPARE` included."""
        held = self.weights + self.gradients + self.optimiser + self.reference
        return CONTEXT_BYTES + int(SPARE * (held + max(self.activations + self.logits, self.kv_cache)))


def reading_workload(config: Any) -> Workload:
    """A step of ``reading``; rows count as long as the configuration lets them become."""
    if config.episode.pool == "mixed":
        return study_workload(config)
    pairs = config.episode.budget or config.data.num_pairs or 16
    # The prompt, and in a chat the marks of a turn around each query and value.
    row = 32 + pairs * (config.episode.query_tokens + config.data.max_value_tokens + 8)
    update = config.update
    has_kl = update.value_kl_coefficient > 0 or update.query_kl_coefficient > 0
    values = config.data.max_value_tokens if update.value_kl_coefficient > 0 else 0
    return Workload(
        model=config.model.name,
        dtype=parse_dtype(config.model.dtype),
        rank=config.model.adapter_rank,
        mixed=False,
        rows=update.micro_batch_size or config.episode.batch_size,
        row_tokens=row,
        scored_tokens=pairs * (config.episode.query_tokens + values),
        logit_copies=10,  # log-probabilities, entropy and KL beside those of the reference, forth and back
        cache_rows=max(config.episode.batch_size, config.evaluation.num_episodes),
        cache_tokens=row,
        copies=1 + (has_kl and update.kl_reference == "snapshot"),
        by_trial=not update.micro_batch_size,
        recomputed=update.gradient_checkpointing,
        in_4bit=config.model.quantization == "4bit",
    )


def study_workload(config: Any) -> Workload:
    """A study: passes of a fixed number of tokens by the reader and, in the last updates, by a model that learns."""
    # Imported here, as every part of a system is: the forecast of another one needs none of it.
    from preceptor.systems.reading.study.features import MAX_WRITTEN_ROWS
    from preceptor.systems.reading.study.scores import MAX_TOKENS

    study, update = config.study, config.update
    text = 1 + config.data.max_value_tokens
    # Of what is read, and then of questions with their answers.
    read = text * (config.episode.budget + 2 * max(study.num_questions, 2))
    row = text if study.model_steps else read
    rows = max(1, MAX_TOKENS // row)
    written = "written_query" in study.channels
    return Workload(
        model=config.model.name,
        dtype=parse_dtype(config.model.dtype),
        rank=config.model.adapter_rank,
        mixed=False,
        rows=min(rows, update.micro_batch_size or rows) if study.model_steps else rows,
        row_tokens=row,
        scored_tokens=0 if study.model_steps else config.data.max_value_tokens,
        logit_copies=1,
        cache_rows=MAX_WRITTEN_ROWS if written else 0,
        cache_tokens=text + config.episode.query_tokens,
        copies=1 if study.model_steps else 0,
        by_trial=bool(study.model_steps) and not update.micro_batch_size,
        recomputed=update.gradient_checkpointing and bool(study.model_steps),
        learns=bool(study.model_steps),
    )


def curriculum_workload(config: Any) -> Workload:
    """A step of ``curriculum``: documents in micro-batches, or rollouts of PPO where these are more."""
    documents = max(1, config.update.batch_tokens // config.data.block_tokens)
    rollouts = config.ppo.prompts * config.ppo.group_size if config.ppo.weight else 0
    written = config.ppo.prompt_tokens + config.ppo.continuation_tokens
    limit = config.update.micro_batch_size or max(documents, rollouts)
    # Rows of documents are the longer ones; as many rollouts as hold more tokens count as rows of that length.
    rows = max(min(limit, documents), -(-min(limit, rollouts) * written // config.data.block_tokens))
    return Workload(
        model=config.model.name,
        dtype=parse_dtype(config.model.dtype),
        rank=config.model.adapter_rank,
        mixed=config.update.bf16,
        rows=rows,
        row_tokens=config.data.block_tokens,
        scored_tokens=config.data.block_tokens,
        logit_copies=1,  # the loss computes logits in blocks and saves at most this many exponentials
        cache_rows=rollouts,
        cache_tokens=written,
        copies=2,  # the untrained model, and the frozen one that rewards and KL ask
        by_trial=not config.update.micro_batch_size,
    )


WORKLOADS: dict[str, Callable[[Any], Workload]] = {"reading": reading_workload, "curriculum": curriculum_workload}
"""Systems whose memory can be told before a run."""


def memory_checks(system: str, config: Any, *, gpu_bytes: int) -> Iterator[Check]:
    """The parts of what ``system`` will hold under ``config``, and whether a GPU of ``gpu_bytes`` holds it.

    Where it does not, the first of some settings under which it does is named: a smaller micro-batch, whose results
    are the same up to rounding; then an adapter; then weights in bfloat16.

    Raises:
        ModelError: the model's configuration cannot be read.
        MissingExtraError: an adapter is asked for and peft is not installed.
    """
    if system not in WORKLOADS:
        told = f"not told for {system}, only for {' and '.join(WORKLOADS)}"
        yield Check("warn", "GPU memory", told, "begin the run on the GPU (without --gpu-memory)")
        return
    if not config.model.name:
        yield Check("warn", "GPU memory", "the run makes its own small model", "begin the run on the GPU")
        return
    work = WORKLOADS[system](config)
    whole, work = work.rows, fitted(work, gpu_bytes=gpu_bytes)
    memory = forecast_memory(work)
    if work.by_trial:
        yield Check("ok", "GPU memory, rows in a pass", f"{work.rows} of {whole}, found by trial as the run begins")
    for name, size in memory._asdict().items():
        yield Check("ok", f"GPU memory, {name.replace('_', ' ').replace('kv', 'KV')}", _size(size))
    figure = f"about {_size(memory.peak)} at the peak, of {_size(gpu_bytes)}"
    if memory.peak <= gpu_bytes:
        yield Check("ok", "GPU memory", f"{figure}: it fits")
        return
    fitting = settings_that_fit(system, config, gpu_bytes=gpu_bytes)
    remedy = f"it fits with {' '.join(f'--set {setting}' for setting in fitting)}" if fitting else _hopeless(work)
    yield Check("fail", "GPU memory", figure, remedy)


def fitted(work: Workload, *, gpu_bytes: int) -> Workload:
    """``work`` with as many rows in a pass as trials will find that a GPU of ``gpu_bytes`` holds, 1 at least."""
    while work.by_trial and work.rows > 1 and forecast_memory(work).peak > gpu_bytes:
        work = replace(work, rows=work.rows // 2)
    return work


def settings_that_fit(system: str, config: Any, *, gpu_bytes: int) -> list[str]:
    """The fewest of the settings that :func:`memory_checks` tries, as ``key=value``; empty where none is enough."""
    for settings in _candidates(WORKLOADS[system](config)):
        # Through the configuration, since it says how settings act on the workload.
        work = WORKLOADS[system](_changed(config, settings))
        if forecast_memory(fitted(work, gpu_bytes=gpu_bytes)).peak <= gpu_bytes:
            return [f"{key}={value}" for key, value in settings.items()]
    return []


def _candidates(work: Workload) -> Iterator[dict[str, Any]]:
    adapter = {} if work.rank else {"model.adapter_rank": ADAPTER_RANK}
    smaller = {} if work.dtype == torch.bfloat16 else {"model.dtype": "bfloat16"}
    tried: list[dict[str, Any]] = []
    for base in ({}, adapter, smaller, {**adapter, **smaller}):
        if base in tried:
            continue
        tried.append(base)
        rows = work.rows
        while rows >= 1:
            yield base if rows == work.rows else {**base, "update.micro_batch_size": rows}
            rows = 0 if work.by_trial else rows // 2


def _changed(config: Any, settings: dict[str, Any]) -> Any:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def _hopeless(work: Workload) -> str:
    least = replace(work, rank=work.rank or ADAPTER_RANK, dtype=torch.bfloat16, rows=1)
    return (
        f"even an adapter on bfloat16 weights and one row at a time take {_size(forecast_memory(least).peak)}; take a "
        "smaller model or a larger GPU"
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


def forecast_memory(work: Workload) -> Memory:
    """The bytes that ``work`` holds, by part; nothing is loaded or computed."""
    model, trained = _meta_model(work.model, work.dtype, work.rank)
    parameters = list(model.parameters())  # each once, also where input and output embeddings are tied
    weights = sum(_bytes(tensor) for tensor in [*parameters, *model.buffers()])
    if work.in_4bit:
        weights -= sum(_bytes(weight) - int(weight.numel() * NF4_BYTES) for weight in _rounded(model))
    learning = sum(_bytes(parameter) for parameter in parameters if id(parameter) in trained) if work.learns else 0
    # A frozen copy holds what is trained; a model with an adapter is its own reference, with the adapter off.
    copied = learning * max(0, work.copies - 1) if work.rank else weights * work.copies
    # Two measurements tell what each row adds from what is kept once, such as copies of the weights in bfloat16.
    one, two = (_kept_bytes(work.model, work.dtype, work.rank, work.mixed, rows, work.row_tokens) for rows in (1, 2))
    activations = one + (two - one) * (work.rows - 1)
    if not work.learns:  # of one layer at a time
        activations //= int(model.config.get_text_config().num_hidden_layers)
    elif work.recomputed:  # the inputs of all layers, and all of one layer while its backward pass runs
        text = model.config.get_text_config()
        inputs = work.rows * work.row_tokens * int(text.hidden_size) * work.dtype.itemsize
        activations = int(text.num_hidden_layers) * inputs + activations // int(text.num_hidden_layers)
    vocabulary = int(model.config.get_text_config().vocab_size)
    logits = min(work.rows * work.scored_tokens * vocabulary, max(MAX_SAVED_LOGITS, vocabulary)) * 4
    return Memory(
        weights=weights,
        gradients=learning,
        optimiser=2 * learning,  # Adam's two moments, in the dtype of the weights
        reference=copied,
        activations=activations,
        logits=logits * work.logit_copies,
        kv_cache=_cache_bytes(work.model, work.dtype) * work.cache_rows * num_slots(work.cache_tokens),
    )


def _rounded(model: Any) -> Iterator[Tensor]:
    """The weights that 4 bits are for: of linear layers, but not of the head or of an adapter."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name:
            yield module.weight


@cache
def _meta_model(name: str, dtype: torch.dtype, rank: int) -> tuple[Any, frozenset[int]]:
    """The model called ``name`` without storage, and the ids of the parameters that learn."""
    config: PreTrainedConfig = load_model_config(name)
    with torch.device("meta"):
        automatic: Any = AutoModelForCausalLM  # its methods are not typed
        model = automatic.from_config(config, dtype=dtype, trust_remote_code=False)
        if rank:
            model = with_adapter(model, Adapter(rank))
    return model.eval(), frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


@cache
def _kept_bytes(name: str, dtype: torch.dtype, rank: int, mixed: bool, num_rows: int, num_tokens: int) -> int:
    """Bytes that autograd keeps of rows of ``num_tokens`` until their backward pass; without their logits."""
    model, _ = _meta_model(name, dtype, rank)
    decoder = model.get_base_model().base_model if rank else model.base_model
    with _flash_attention(model), _products_in_bfloat16() if mixed else contextlib.nullcontext():
        return kept_bytes(
            lambda: decoder(**_inputs(num_rows, num_tokens, dtype), use_cache=False), parameters=model.parameters()
        )


def kept_bytes(forward: Callable[[], object], *, parameters: Iterator[nn.Parameter]) -> int:
    """Bytes of the tensors that autograd keeps in ``forward()`` for a backward pass, each storage once.

    Parameters are left out: they are held anyway.
    """
    held = {parameter.untyped_storage()._cdata for parameter in parameters}
    found: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no number is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in found.values())


@cache
def _cache_bytes(name: str, dtype: torch.dtype) -> int:
    """Bytes of the KV cache for each slot of a row."""
    model, _ = _meta_model(name, dtype, 0)
    with torch.no_grad(), _flash_attention(model):
        written = model.base_model(**_inputs(1, _PROBE_TOKENS, dtype), use_cache=True).past_key_values
    return sum(_bytes(layer.keys) + _bytes(layer.values) for layer in written.layers) // _PROBE_TOKENS


def _inputs(num_rows: int, num_tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    meta = torch.device("meta")
    return {
        "input_ids": torch.zeros(num_rows, num_tokens, dtype=torch.long, device=meta),
        "position_ids": torch.arange(num_tokens, device=meta).expand(num_rows, -1),
        # Four-dimensional masks are taken as they are; others would be looked into, and there is nothing in them.
        "attention_mask": torch.zeros(num_rows, 1, num_tokens, num_tokens, dtype=dtype, device=meta),
    }


class _Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: queries, keys, values, output, and a normaliser a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalisers)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError  # nothing is computed on meta


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    # A mask rules out grouped kernels, so that keys and values are repeated for every head. [row, head, time, width]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    apply: Any = _Attention.apply
    # Under autocast rotations leave queries and keys in float32, and attention takes them in the products' dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return apply(query, key, value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _flash_attention(model: Any) -> Iterator[None]:
    """The model computes attention by :func:`_fused` while the block runs."""
    name, config = "preceptor_meta", model.config.get_text_config()
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, _fused)
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


class _products_in_bfloat16(TorchFunctionMode):
    """What autocast does to linear layers, which it does not do on ``meta``: operands, weights too, in bfloat16."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            args = tuple(value.to(torch.bfloat16) if isinstance(value, Tensor) else value for value in args)
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(num_bytes: int) -> str:
    """``1.5 GiB``, or ``300 MiB`` below one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
