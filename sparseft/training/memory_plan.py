"""What a training step will take of a device's memory, computed before any weight is loaded.

The model is built on torch's meta device, where tensors have shapes and no content, and a forward and a backward pass
run there while every storage is counted: the same operations and the same bytes, without the arithmetic. Attention
counts as a fused kernel, which keeps its operands, its result and one number a row, never a matrix of scores. The mask
that is added to them where rows are packed, and where attention has a window, is transformers' own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.config import HardwareConfig, RunConfig
from sparseft.distributed import env
from sparseft.distributed.deepspeed import MAX_BUCKET
from sparseft.errors import UserError, reason_of
from sparseft.layers import share_inputs, sparse_layers
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.memory import AllocationCounter, available_bytes, tensor_bytes
from sparseft.models import masks
from sparseft.models.decoder import decoder_layers
from sparseft.models.labelled_loss import ROWS, labelled_loss, usable
from sparseft.models.packed.shape import pack_shapes
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import Request, compute
from sparseft.selection.engine_ranks import describe_export
from sparseft.selection.selection import warn_of_cap
from sparseft.training.distributed_trainer import check_shards
from sparseft.training.preference.objectives import OBJECTIVES
from sparseft.training.recomputing import KINDS, recomputing
from sparseft.training.reselection.running import Running, check_seen
from sparseft.training.reselection.turns import turns_of

# Kinds of attention: torch's, one that takes lengths or blocks in a mask's place, and the architecture's own.
FUSED, MASKLESS, PLAIN = "sdpa_in_plan", "sdpa_in_plan_maskless", "plain_in_plan"
# Copies of the trained parameters that an optimizer keeps, in their dtype, by the start of its name.
STATES = {"adamw_torch": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
# How many numbers ZeRO 3 keeps gathered after use, and how many it gathers ahead: DeepSpeed's defaults.
LIVE, AHEAD = 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in a training step, by what they are for."""

    weights: int  # frozen weights and buffers, with the patterns' indices and base values
    trained: int  # deltas, an adapter's or the model's trained parameters
    gradients: int
    moments: int  # the optimizer's state
    activations: int  # the most that the passes hold at once on top of all that

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.trained + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Shape:
    """A model as `config` makes it trainable, and how many parameters that trains."""

    model: nn.Module  # on the meta device
    trainable: int
    total: int
    autocast: bool  # fp32 weights computed with in bf16, as full fine-tuning does on CUDA
    spec: ModelSpec
    labelled: bool  # the head runs on labelled tokens alone, a few at a time (`trainer.loss`)


class _FusedAttention(torch.autograd.Function):
    """The bytes of a fused attention kernel, without its arithmetic."""

    @staticmethod
    def forward(ctx, query, key, value, mask):  # (batch, heads, tokens, head_dim), (batch, 1, tokens, tokens) or None
        batch, heads, tokens, _ = query.shape
        result = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        of_rows = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, of_rows, mask)
        return result

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class Counter(AllocationCounter):
    """Counts on the meta device, also the product of all experts with their tokens, which torch has there for bf16
    and aligned shapes alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func is torch.ops.aten._grouped_mm.default
        return super().__torch_dispatch__(_grouped_product if product else func, types, args, kwargs)


def _grouped_product(x: Tensor, weight: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result of `torch._grouped_mm` without its content: (S, a) by (E, a, b) gives (S, b), and in the backward pass
    (a, S) by (S, b) gives (E, a, b), (E, a, b) by (b, S) gives (a, S)."""
    groups = (len(offs),) if x.dim() == weight.dim() else ()
    return x.new_empty(*groups, x.shape[-2], weight.shape[-1])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    as_they_are = (
        attention_mask is None and key.shape[-1] == value.shape[-1] <= 256
    )  # as transformers gives them to torch's
    if groups > 1 and not as_they_are:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return _FusedAttention.apply(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


def _plain_attention(module: nn.Module, *operands: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The architecture's own attention in plain torch."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *operands, **options)


def trainable_shape(config: RunConfig, content: transformers.PretrainedConfig, dtype: torch.dtype) -> Shape:
    """The model of `content` (its config.json) on the meta device, trainable by the run's method.

    Which units train makes no difference to the memory, so a selection that would need data is drawn at random.
    """
    model = _on_meta(content, dtype, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    settings = config.method
    if config.model.quantize != "none":
        pack_shapes(model, config.model.quantize)
        if getattr(settings, "residual", False):  # base values are kept either way
            settings = dataclasses.replace(settings, residual=False)
    autocast = settings.widens(dtype) and not on_cpu(config.hardware)
    spec = ModelSpec.of(model).narrowed(settings.layers)
    if settings.sparse:
        request = Request.of(spec, settings.for_benchmark())
        check_shards(request, config.hardware, model)
        check_seen(request, settings)
        selection = compute(model, request)
        warn_of_cap(selection, settings)
        if settings.importance == "random":  # else the run's own selection is another
            describe_export(selection, request.spec, settings)
        model = attach(model, request.settings, selection, spec=request.spec)
        _indices_with_content(model, selection)
    else:
        describe_export(None, spec, settings)
        model = attach(model, settings.for_benchmark() if autocast else settings, spec=spec)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return Shape(model.train(), trainable, total, autocast, spec, usable(model, config))


def _on_meta(content: transformers.PretrainedConfig, dtype: torch.dtype, config: RunConfig) -> nn.Module:
    for name, attention, mask in ((FUSED, _attention, masks.added), (MASKLESS, _attention, None),
                                  (PLAIN, _plain_attention, masking_utils.eager_mask)):  # fmt: skip
        transformers.AttentionInterface.register(name, attention)
        if mask is not None:
            transformers.AttentionMaskInterface.register(name, mask)

    def build(attention: str | None) -> nn.Module:
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(
                    copy.deepcopy(content),
                    dtype=dtype,
                    attn_implementation=attention,
                    trust_remote_code=config.model.trust_remote_code,
                )
        except (ImportError, ValueError) as error:
            raise UserError(f"model.path={config.model.path}: cannot be built: {reason_of(error)}") from error

    asked = config.model.attn_implementation
    # flash attention's package is needed where the run happens, not to plan it
    maskless = any(name in (asked or "") for name in ("flash", "flex_attention"))
    model = build(None if maskless else asked)
    _check_experts(model, config.model.path)
    text = content.get_text_config()
    dropout = max(getattr(text, name, 0.0) or 0.0 for name in ("attention_dropout", "attn_pdrop"))
    kind = MASKLESS if maskless else FUSED if str(model.config._attn_implementation).startswith("sdpa") else PLAIN
    if model._can_set_attn_implementation():  # Falcon, GPT-J and MPT have their own alone, which is counted as it is
        # torch's fused kernel for the CPU knows no dropout
        model = build(PLAIN if dropout and on_cpu(config.hardware) else kind)
    model.config.get_text_config().pad_token_id = None  # or transformers looks for padding among the tokens
    return model


def _check_experts(model: nn.Module, path: str) -> None:
    """Refuses experts that are not computed by one grouped product over all tokens, whoever gets which of them: then
    the memory depends on the data. Shared experts are an MLP that all tokens go through."""
    leaves = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    for module in (module for leaf, module in leaves if leaf.endswith("experts") and leaf != "shared_experts"):
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if implementation != "grouped_mm":
            raise UserError(
                f"train --plan: {path} has experts ({type(module).__name__}) that are computed one after another, and "
                "which tokens each gets depends on the data; there is no plan for such models."
            )


def _indices_with_content(model: nn.Module, selection: Any) -> None:
    """Gives blocks and grids their indices back, which have no content on the meta device: what is saved depends on
    them."""
    for name, layer in sparse_layers(model).items():
        for kind, pattern in layer.patterns.items():
            if kind in ("blocks", "grid"):
                pattern.set_index(selection.modules[name][kind], pattern.base_values)
    share_inputs(model)


def passes(
    shape: Shape,
    batch: int,
    length: int,
    *,
    checkpointing: str,
    laid: str | None = None,
    device: str = "cpu",
    compute: Callable[[], Tensor] | None = None,
) -> int:
    """The most bytes that a forward and a backward pass over `batch` × `length` tokens, all of them labelled, allocate
    at once, the gradients of the trained parameters included. laid: the input that says how rows are filled, as
    `masks.unasked` knows it; None: all are whole. device: the type of the one that is planned for. compute: what makes
    the loss where that is not the model's own."""
    model = shape.model
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.disable_input_require_grads()  # as training does: nothing below the lowest trained layer
    elif getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    given: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if laid is not None and compute is None:
        given[laid] = ids
    way: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if shape.labelled and compute is None:
        given[ROWS] = torch.arange(batch * length, device="meta")[: batch * (length - 1)]
        way = labelled_loss(model, torch.device(device))
    kinds = KINDS.get(checkpointing)
    share_inputs_in_training(model)
    with Counter() as counter, computed_without_content(model):
        alone = compute is None and masks.needs_none(device, model.dtype)
        names = given if alone else [laid or ""]
        with masks.unasked(names), way, recomputing(model, kinds) if kinds else contextlib.nullcontext():
            loss = model(**given).loss if compute is None else compute()
        loss.backward()
        del loss
    for parameter in trainable_parameters(model).values():
        parameter.grad = None
    return counter.peak


@contextlib.contextmanager
def computed_without_content(model: nn.Module) -> Iterator[None]:
    """Inside, what needs the content of tensors of the meta device is a `UserError`."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise UserError(
            f"train --plan: {type(model).__name__} computes with what its tensors hold, which there is no plan for "
            f"({reason_of(error)})."
        ) from error


def step_memory(config: RunConfig, shape: Shape, *, batch: int, length: int) -> Memory:
    """The memory of one device in a step of `batch` sequences, pairs or answers of `length` tokens each."""
    trained = list(trainable_parameters(shape.model).values())
    own = {id(parameter) for parameter in trained}
    frozen = [p for p in (*shape.model.parameters(), *shape.model.buffers()) if id(p) not in own]
    weights, parameters = tensor_bytes(frozen), tensor_bytes(trained)
    gradients = parameters
    device = "cpu" if on_cpu(config.hardware) else "cuda"
    compute = None
    if config.by_preference:
        from sparseft.training.preference.planned import loss_of  # brings TRL, seconds that others need not wait

        compute = loss_of(config, shape.model, batch, length, device)
        if config.method.trains_all and OBJECTIVES[config.objective].reference:  # a frozen copy, as wide as what trains
            weights += tensor_bytes(shape.model.parameters()) * (2 if shape.autocast else 1)
    with _looking(config, shape):
        most = passes(shape, batch, length, checkpointing=config.checkpointing, device=device, compute=compute,
                      laid=_laid(config, batch))  # fmt: skip
        activations = most - gradients
    if shape.autocast:  # the copies in half precision stay for the step; weights and gradients are twice as wide
        activations += parameters
        parameters, gradients = 2 * parameters, 2 * gradients
    moments = optimizer_bytes(config.trainer.optimizer, trained) * (2 if shape.autocast else 1)
    if config.trainer.average is not None:
        moments += 4 * sum(parameter.numel() for parameter in trained)
    if config.method.reselects_running and config.method.reselects_in_turn:
        moments += _sensitivity_bytes(shape)
    activations = max(activations, _while_updating(config, trained))
    return sharded(config, shape, Memory(weights, parameters, gradients, moments, activations))


def _laid(config: RunConfig, batch: int) -> str | None:
    """What a micro-batch brings that needs a mask, where its rows differ in length or hold several examples."""
    if config.dataset.packing and not config.by_preference:
        return "position_ids"
    return "attention_mask" if batch > 1 or config.by_preference or config.trainer.pad_to == "max_length" else None


@contextlib.contextmanager
def _looking(config: RunConfig, shape: Shape) -> Iterator[None]:
    """Inside, passes keep and make what re-selection by running gradients looks at in a step: of the last layers, which
    are the first in a backward pass, when the most is kept."""
    method = config.method
    if not method.reselects_running or method.reselects_in_turn:
        yield
        return
    layers = sparse_layers(shape.model)
    budget = method.budget(shape.spec)
    budget.candidates = [c for c in budget.candidates if c.module in layers and layers[c.module].patterns]
    running = Running(method.reselect_steps, shape.model, shape.spec, budget, order=method.order, seed=method.seed)
    running.look(method.reselect_steps - 1)
    try:
        yield
    finally:
        running.look_away()


def _sensitivity_bytes(shape: Shape) -> int:
    """What re-selection in turn keeps of the largest decoder layer: gradient and two averages in fp32, and for a moment
    as much again of its largest linear (`importance/sensitivity.py`)."""
    layers = sparse_layers(shape.model)
    turns = turns_of(shape.model, shape.spec)
    sizes = [[layers[name].out_features * layers[name].in_features for name in names] for names in turns]
    return 12 * max((sum(own) + max(own) for own in sizes), default=0)


def _while_updating(config: RunConfig, trained: list[Tensor]) -> int:
    """Bytes that the optimizer's step takes for itself, when the activations are gone."""
    optimizer = config.trainer.optimizer
    if config.method.sparse or "fused" in optimizer or (optimizer == "adamw_torch" and not config.hardware.zero_stage):
        return 0  # one kernel (`Trainer.create_optimizer`)
    if on_cpu(config.hardware):  # one parameter after another, each with its denominator made in two steps
        return 2 * max(parameter.nbytes for parameter in trained)
    return tensor_bytes(trained)  # the denominators of all at once


@env.alone()
def optimizer_bytes(optimizer: str, trained: list[Tensor]) -> int:
    """Bytes that the optimizer keeps for the parameters it trains (on the meta device). UserError where that is not
    known here and cannot be tried."""
    for start, copies in STATES.items():
        if optimizer.startswith(start) and not optimizer.endswith("bit"):
            return copies * tensor_bytes(trained)
    parameters = [nn.Parameter(torch.empty_like(tensor)) for tensor in trained]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    arguments = transformers.TrainingArguments(optim=optimizer, use_cpu=True, report_to=[])
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = kind(parameters, **options)
        made.step()
    except Exception as error:  # whatever an optimizer makes of tensors without content
        raise UserError(
            f"trainer.optimizer={optimizer}: what it keeps is not known to the plan, and it cannot be tried without "
            f"weights ({reason_of(error)})."
        ) from error
    return tensor_bytes([held for state in made.state.values() for held in state.values() if torch.is_tensor(held)])


def on_cpu(hardware: HardwareConfig) -> bool:
    """Whether the run is to be on the CPU."""
    return hardware.device == "cpu" or (hardware.device == "auto" and not torch.cuda.is_available())


def device_bytes(hardware: HardwareConfig) -> int | None:
    """The memory of one device: as the config says, else of the device here; None where there is none of that kind."""
    if hardware.memory_gib is not None:
        return int(hardware.memory_gib * 2**30)
    if on_cpu(hardware):
        return available_bytes() // hardware.num_processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def sharded(config: RunConfig, shape: Shape, memory: Memory) -> Memory:
    """What is left on one device when FSDP2 or DeepSpeed's ZeRO shards over all processes."""
    if config.hardware.fsdp:
        return _with_fsdp(config, shape, memory)
    processes, stage = config.hardware.all_processes, config.hardware.zero_stage
    offload = config.hardware.offload != "none"
    if processes == 1 and stage == 0:
        return memory
    changes: dict[str, int] = {}
    if stage == 0:  # DistributedDataParallel reduces in buckets of its own
        changes["gradients"] = 2 * memory.gradients
    else:  # a flat copy of the trained parameters is what the optimizer updates, in fp32
        shard, bucket = -(-4 * shape.trainable // processes), 4 * min(shape.trainable, MAX_BUCKET)
        changes["moments"] = 0 if offload else -(-memory.moments // processes) + shard
        # Whole as the backward pass makes them, in the bucket that is reduced, and in the copy that is sent of it.
        changes["gradients"] = memory.gradients + 2 * bucket
    if stage == 3:
        changes["gradients"] = memory.gradients + bucket + shard
        everything = config.method.trains_all
        frozen = [parameter for parameter in shape.model.parameters() if not parameter.requires_grad]
        gathered = _gathered(shape.model, list(shape.model.parameters()) if everything else frozen)
        kept = memory.weights - tensor_bytes(frozen) + gathered  # indices and base values are not sharded
        changes["weights"] = kept if offload else kept - (-tensor_bytes(frozen) // processes)
        if everything:  # an adapter is small enough to stay whole everywhere
            changes["trained"] = -(-memory.trained // processes)
    return dataclasses.replace(memory, **changes)


def _with_fsdp(config: RunConfig, shape: Shape, memory: Memory) -> Memory:
    """FSDP2's groups are the decoder layers, the embeddings where the head is not tied to them, and the rest, which is
    whole for all of a pass; beside it what is in use, and the next layer, which comes in one piece that is then taken
    apart. Of a model that trains a group's gradients are whole until they are reduced, in a piece of their own."""
    processes, model = config.hardware.all_processes, shape.model
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    everything = config.method.trains_all
    base = {id(parameter): parameter for parameter in (model.parameters() if everything else frozen)}
    width = 2 if shape.autocast else 1  # what trains is gathered as wide as it is kept

    def whole(part: nn.Module) -> int:
        """Bytes of a group, which is left out from then on."""
        return width * tensor_bytes([base.pop(id(p)) for p in part.parameters() if id(p) in base])

    layer = max(whole(part) for part in decoder_layers(model)[1])
    first = 0 if tied else whole(embeddings)
    rest = width * tensor_bytes(list(base.values()))
    kept = memory.weights - tensor_bytes(frozen)  # indices and base values are not sharded
    weights = kept + rest + 2 * layer + max(layer, first) - (-tensor_bytes(frozen) // processes)
    if not everything:  # gradients are averaged in one piece, when the activations are gone
        return dataclasses.replace(memory, weights=weights, activations=max(memory.activations, memory.gradients))
    return dataclasses.replace(
        memory, weights=weights, trained=-(-memory.trained // processes), moments=-(-memory.moments // processes),
        gradients=-(-memory.gradients // processes) + 2 * max(rest, layer, first),
    )  # fmt: skip


def _gathered(model: nn.Module, parameters: list[Tensor]) -> int:
    """Bytes of the sharded `parameters` that ZeRO 3 has gathered at once: those that were needed last, at least a
    decoder layer or the embeddings, and the buffer into which the next ones come."""
    embeddings = model.get_input_embeddings()
    every, width = tensor_bytes(parameters), embeddings.weight.element_size()
    largest = max(tensor_bytes(part.parameters()) for part in (*decoder_layers(model)[1], embeddings))
    return max(min(every, LIVE * width), largest) + min(every, AHEAD * width)
