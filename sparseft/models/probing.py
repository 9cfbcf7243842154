"""Tries a model on a few tokens: is it causal, and which of its linears can train?

The gradient of a position's logits towards a token's embedding is exactly zero where attention is masked, and where a
recurrence, a convolution or a window does not reach. No list of architectures could tell: encoders become decoders by
a setting, and a model's own code may do anything.

A layer that is put in a linear's place (a sparse layer, LoRA) trains only if the model calls it and a gradient comes
back. It does not train where the model reads the weight itself (`self.dt_proj.weight @ x`, a fused kernel), never calls
the linear (key and value projections of layers that share another's), or calls it without gradient (an index that only
sorts).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseft import console
from sparseft.distributed.shards import full_shape, is_sharded
from sparseft.errors import UserError, reason_of
from sparseft.models.decoder import context_length, in_experts, input_embeddings

# Rows and length of the tokens that a model is tried on; the second where it cannot be run on so few.
SHAPES = ((7, 8), (2, 128))


class Untraceable(RuntimeError):
    """The tokens' embeddings cannot be seen on their way into the model, so there is no gradient towards them."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode, what it had before the forward pass (recurrent states) and the
    random states come back."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def dependence(model: nn.Module, ids: Tensor, scored: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The logits at `scored`, and the gradient of a random combination of them towards the embedding of each token of
    `ids` (rows, length).

    scored: an index into (rows, length). inputs: what else the forward pass takes. To be called `undisturbed`.

    Returns the logits in fp32, (…, vocabulary), and how strongly they depend on each token, (rows, length); logits that
    are infinite or no number are left out of that. Raises `Untraceable`.
    """
    embeddings = input_embeddings(model)
    if embeddings is None:
        raise Untraceable
    found: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.numel() != ids.numel() * output.shape[-1]:
            return output  # of other tokens
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # a leaf could not be changed in place

    handle = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = run(model, ids, **inputs)[scored].float()
            signs = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(0)).to(logits) * 2 - 1
            total = torch.where(logits.isfinite(), logits * signs, 0.0).sum()
            gradients = torch.autograd.grad(total, found, allow_unused=True) if found and total.requires_grad else ()
    finally:
        handle.remove()
    strength = torch.zeros(ids.shape, device=ids.device)
    if not any(gradient is not None for gradient in gradients):
        raise Untraceable
    for gradient in gradients:
        if gradient is not None:
            each = gradient.float().abs().amax(-1)
            turned = each.shape == ids.shape[::-1] != ids.shape  # XLNet has the positions first
            strength += (each.T if turned else each).reshape(ids.shape)
    return logits.detach(), strength


def run(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits (rows, length, vocabulary) of `ids`, not compiled, without a cache where the model can do without."""
    options = {"use_cache": False} if _takes(model, "use_cache") else {}
    forward = model.forward if getattr(model, "_compiled_call_impl", None) is not None else model
    return forward(input_ids=ids, **options, **inputs).logits


def plain_tokens(model: nn.Module, rows: int, length: int, shift: int = 0) -> Tensor:
    """Random ids (rows, length), the same always; with another `shift`, at every place another one.

    None of them has a meaning of its own in the config: padding and images are not read as other tokens are.
    """
    embeddings, config = input_embeddings(model), model.config
    both = [config, config.get_text_config()]  # type: ignore[union-attr, operator]
    weight = getattr(embeddings, "weight", None)
    count = both[1].vocab_size if weight is None else full_shape(weight)[0]
    special: set[int] = set()
    for name, value in (item for each in both for item in vars(each).items()):
        if re.search(r"token_(id|index)s?$", name):
            special.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    known = torch.arange(count)
    if count - len(special) > 1:
        known = known[~torch.isin(known, torch.tensor(sorted(special), dtype=torch.long))]
    drawn = torch.randint(len(known), (rows, length), generator=torch.Generator().manual_seed(0))
    return known[(drawn + shift) % len(known)].to(next(model.parameters()).device if weight is None else weight.device)


def check_causal(model: nn.Module, what: str) -> None:
    """Refuses a model in which a position sees later ones: trained to predict the next token, it would read it.

    Two witnesses have to agree, so that rounding is never taken for sight: the gradient of a position's logits towards
    later tokens, which is exactly zero in a causal model, and the logits themselves with other tokens there. Weights,
    modes and random states are left as they were; a model in shards has to be `runnable`, in all processes at once.

    what: how the user named the model, for messages.

    Raises:
        UserError: a model that sees later tokens, that cannot be run on a few, or whose logits are no number.
    """
    name = type(model).__name__
    with undisturbed(model):
        for rows, length in SHAPES:
            try:
                sees = _sees_later(model, rows, length)
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the model's code may be anybody's
                if (rows, length) == SHAPES[-1]:
                    raise UserError(
                        f"{what}: {name} cannot be run on {length} tokens, so whether it is a causal language model is "
                        f"not known: {type(error).__name__}: {reason_of(error)}"
                    ) from error
    if sees is None:
        raise UserError(f"{what}: the logits of {name} are no number (nan) for plain text; are its weights whole?")
    if sees:
        raise UserError(
            f"{what}: {name} is not causal: its predictions depend on later tokens, so that it would read the answer "
            "instead of learning it; use a causal language model, not an encoder."
        )


def _sees_later(model: nn.Module, rows: int, length: int) -> bool | None:
    """Whether a position depends on a later token; None where logits are no number.

    In every row of tokens it is another position, so that no border of a block or a window hides it.
    """
    ids = plain_tokens(model, rows, length)
    at = torch.linspace(0, length - 2, rows).long()
    scored = (torch.arange(rows, device=ids.device), at.to(ids.device))
    later = (torch.arange(length) > at[:, None]).to(ids.device)
    mask = {"attention_mask": torch.ones_like(ids)} if _takes(model, "attention_mask") else {}
    try:
        logits, strength = dependence(model, ids, scored, **mask)
        if (strength[later] == 0).all() and not logits.isnan().any():
            return False
    except Untraceable:  # then only the comparison of outputs below can tell
        with torch.no_grad():
            logits = run(model, ids, **mask)[scored].float()
    if logits.isnan().any():
        return None
    others = torch.where(later, plain_tokens(model, rows, length, shift=1), ids)
    with torch.no_grad():
        changed = run(model, others, **mask)[scored].float()
    return not torch.equal(logits, changed)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward pass can be given the argument `name`."""
    known = inspect.signature(model.forward).parameters
    return name in known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())


READ = "the model reads its weight itself"
KERNEL = "the model hands its weight to a fused kernel"
UNCALLED = "the model does not call it"
NO_GRADIENT = "no gradient reaches it"
LENGTHS = (16, 256)  # tokens of the trials: the second where the first leaves linears out (long contexts' compressors)
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def unreached(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The linears that would not train, with the reason; the model is unchanged afterwards.

    `linears` are the model's, by name. The model is run once, in evaluation mode, with gradients of one number a linear
    and none of its weights; what was found is kept for later calls. Models without values (`meta`) and in shards are
    judged by their source alone. Experts that a trial's tokens do not come to are not judged.

    Raises:
        UserError: the model calls none of them.
    """
    if (known := _FOUND.get(model)) is not None:
        return {name: reason for name, reason in known.items() if name in linears}
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in linears}
    found = {name: READ for name, owner in owners.items() if name.rpartition(".")[2] in _weights_in_training(owner)}
    found |= {name: KERNEL for name, owner in owners.items() if name.rpartition(".")[2] in _kernel_weights(owner)}
    parameters = list(model.parameters())
    if any(p.is_meta or is_sharded(p) for p in parameters):
        return found
    if not isinstance(getattr(input_embeddings(model), "weight", None), Tensor):
        return found
    try:
        found = found | _tried(model, linears)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # of whatever kind the model's own code raises: its batches may need more than tokens
        console.warn(
            f"{type(model).__name__} could not be run on tokens alone ({reason_of(error)}): which of its linears "
            "cannot train is not known before the first step"
        )
    _FOUND[model] = found
    return dict(found)


def _tried(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    context = context_length(model.config)
    read: dict[str, str] = {}
    missed: dict[str, str] | None = None  # in every trial so far
    for length in LENGTHS:
        found = _trial(model, linears, min(length, context or length))
        read |= {name: reason for name, reason in found.items() if reason == READ}
        missed = {n: r for n, r in found.items() if r != READ and (missed is None or n in missed)}
        if not missed:
            break
    left = read | (missed or {})
    if len(left) < len(linears):
        return left
    if set(left.values()) == {UNCALLED}:
        raise UserError(
            f"{type(model).__name__} makes its logits without any linear of the layers that were taken for its "
            f"decoder's ({next(iter(linears))} for one), so that they would learn nothing: sparseft cannot train it."
        )
    return {}  # the forward is not this decoder's (a stub): it tells nothing


def _trial(model: nn.Module, linears: Mapping[str, nn.Module], length: int) -> dict[str, str]:
    names = {id(module): name for name, module in linears.items()}
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    # A weight that several modules hold is read by the others too; tied weights are refused where they are chosen.
    weights = {name: m._parameters.get("weight") for name, m in linears.items()}  # None: packed under another name
    reads = _Reads({id(w): name for name, w in weights.items() if w is not None and holders[id(w)] == 1})
    probes: dict[str, Tensor] = {}  # a zero that is added to each linear's output

    def enter(module: nn.Module, inputs: Any) -> None:
        reads.inside.append(names[id(module)])

    def leave(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        reads.inside.pop()
        name = names[id(module)]
        probe = probes.setdefault(name, torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
        return output + probe

    handles = []
    with undisturbed(model), torch.enable_grad():
        try:
            for module in {id(module): module for module in linears.values()}.values():
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            with reads:
                logits = run(model, plain_tokens(model, 1, length))
        finally:
            for handle in handles:
                handle.remove()
        gradients: Sequence[Tensor | None] = [None] * len(probes)
        if probes and logits.requires_grad:
            gradients = torch.autograd.grad(logits.float().square().mean(), list(probes.values()), allow_unused=True)
    reached = {name for name, gradient in zip(probes, gradients, strict=True) if gradient is not None}
    found: dict[str, str] = {}
    for name, module in linears.items():
        own = names[id(module)]  # of a module with several names, the one that was noted
        if own in reads.found:
            found[name] = READ
        elif own not in probes:
            if not in_experts(name):
                found[name] = UNCALLED
        elif own not in reached:
            found[name] = NO_GRADIENT
    return found


class _Reads(TorchFunctionMode):
    """Notes the linears whose weight enters an operation with gradients outside their own forward pass."""

    LIKE = ("to", "type_as", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty",
            "new_tensor", "new_full", "size", "stride", "expand_as", "view_as", "reshape_as")  # fmt: skip

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights, self.inside, self.found = weights, [], set()  # type: ignore[var-annotated]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and torch.is_grad_enabled():
            given = [*args, *(kwargs or {}).values()]
            if getattr(func, "__name__", "") in self.LIKE:  # only its dtype, device or shape, but for `weight.to(…)`
                given = args[:1] if func.__name__ == "to" else []
            for item in given:
                name = self.weights.get(id(item))
                if name is not None and name not in self.inside:
                    self.found.add(name)
        return result


def without_gradient(model: nn.Module) -> list[str]:
    """What is to train and has no gradient, or zeros only: names of deltas, of linears with LoRA, of parameters.

    Of routed experts none is named, as the tokens may have passed them by. Waits for the device once.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not in_experts(name):
            # LoRA's B starts at zero, which leaves A without a gradient in the first step: the pair counts.
            trained = name.removeprefix("_orig_mod.").removeprefix("base_model.model.").partition(".lora_")[0]
            gradients.setdefault(trained, []).extend([] if parameter.grad is None else [parameter.grad])
    found = [(name, gradient) for name, those in gradients.items() for gradient in those]
    if found:
        device = found[0][1].device
        flags = torch.stack([(gradient != 0).any().to(device) for _, gradient in found]).tolist()
        moved = {name for (name, _), flag in zip(found, flags, strict=True) if flag}
    else:
        moved = set()
    return [name for name in gradients if name not in moved]


# ---- by the source: paths that this device or mode does not take ----

# Callees whose use of a weight the trial sees for itself, or that only ask what it is.
_FACTS = ("dtype", "device", "shape")
_PLAIN = ("F", "torch", "nn", "init", "isinstance", "getattr", "hasattr", "type", "len", "str", "print", "id")


def _is_kernel(callee: ast.expr, known: Mapping[str, Any]) -> bool:
    """Whether a call is of a function (of a module's or of `self`), not of torch's own or of a tensor's method."""
    plain = isinstance(callee, ast.Name)
    while isinstance(callee, ast.Attribute):
        callee = callee.value
    if not isinstance(callee, ast.Name) or callee.id in _PLAIN:
        return False
    return plain or callee.id == "self" or callee.id in known


@functools.cache
def _kernel_weights(cls: type) -> frozenset[str]:
    """The children whose `weight` the methods of a module's class give to a function: `kernel(x, self.o_proj.weight)`.

    Such functions are kernels that run on some devices, or in training mode, only.
    """
    found: set[str] = set()
    for method, tree in _sources(cls):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if _is_kernel(call.func, method.__globals__):
                found |= _weights(call.args) | _weights(keyword.value for keyword in call.keywords)
    return frozenset(found)


@functools.cache
def _weights_in_training(cls: type) -> frozenset[str]:
    """The children whose `weight` a module's class computes with, or changes, in training mode alone, which the trial
    does not see: `if self.training: weight = self.coefs.weight.clamp(…)` (Gemma 3n)."""
    found: set[str] = set()
    for _, tree in _sources(cls):
        for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)):
            test = ast.unparse(branch.test)
            if "self.training" in test:
                taken: Any = branch.orelse if "not self.training" in test else branch.body
                inside = [n for part in (taken if isinstance(taken, list) else [taken]) for n in ast.walk(part)]
                asked = {id(n.value) for n in inside if isinstance(n, ast.Attribute) and n.attr in _FACTS}
                found |= _weights(node for node in inside if id(node) not in asked)
    return frozenset(found)


def _weights(nodes: Iterable[ast.AST]) -> set[str]:
    """The children whose `weight` is among the nodes themselves: `self.o_proj.weight`."""
    parts = [ast.unparse(node).split(".") for node in nodes if isinstance(node, ast.Attribute)]
    return {part[1] for part in parts if len(part) == 3 and part[0] == "self" and part[2] == "weight"}


def _sources(cls: type) -> Iterator[tuple[Callable[..., Any], ast.AST]]:
    """The methods of a module's class with what they say."""
    for method in _methods(cls):
        with contextlib.suppress(OSError, TypeError, SyntaxError):  # made at run time: there is no source
            yield method, ast.parse(textwrap.dedent(inspect.getsource(method)))


def _methods(cls: type) -> Iterator[Callable[..., Any]]:
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base is object:
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and "init" not in name and "reset" not in name:
                yield value
