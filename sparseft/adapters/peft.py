"""LoRA and DoRA in peft's wrapper: load a folder, switch, fuse, save, and give the base back or merge.

peft writes part of what an adapter trained into the base itself (biases, embeddings that its file holds) and lets
modules that it replaced stay in the model. Here the base's own values are kept aside (`Overwritten`), so that the base
is the base again, bit for bit, whenever no adapter is active.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.description import CONFIG, FORMAT_VERSION, TENSORS, check_peft, peft_hash
from sparseft.adapters.state import BASE, DEFAULT, Kind, Names, Now, State, state_for, state_of
from sparseft.adapters.tied_weights import always_tied, changed_apart, tell_untied, untie
from sparseft.adapters.units import Units
from sparseft.distributed.shards import any_sharded, gathered
from sparseft.errors import UserError, shown
from sparseft.files.atomic import move, write_json
from sparseft.files.hashing import BODY, file_hash
from sparseft.files.tensors import read_tensors
from sparseft.files.untrusted import read_json_object
from sparseft.methods.base import MethodConfig
from sparseft.methods.exact_targets import as_written, exact_targets, portable
from sparseft.models.decoder import STATE
from sparseft.models.fingerprint import check_base
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection

WRAPPED = "base_model.model."  # what peft's wrapper puts before the base's names
INSIDE = ("token_adapter", "base_layer", "original_module")  # and into them, where it put a layer around a module
PEFT_PARTS = {*WRAPPED.split("."), *INSIDE, "modules_to_save", "weight", "bias"}  # of the names of its weights
HOOKS = ("_require_grads_hooks", "_require_grads_hook")


@dataclass
class Overwritten:
    """The base's parameters that some adapter gives other values: the active one's are in the model.

    `parameters`: the base's own, by their names before it was wrapped, each once; `names`: every name that one has
    there (a tied one has two) with the name in `parameters`. `base` and `own` hold values by those names: the base's,
    and those of each adapter (of the active one: as they were when it became active).
    """

    parameters: dict[str, nn.Parameter]
    names: dict[str, str]
    buffers: frozenset[str]
    hooks: dict[str, Any]  # transformers' on the embeddings, for gradient checkpointing
    base: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> Overwritten:
        """Nothing overwritten yet, of a model before peft wraps it."""
        parameters = dict(model.named_parameters())
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        names = {name: name_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        buffers = frozenset(name for name, _ in model.named_buffers())
        return Overwritten(parameters, names, buffers, {k: v for k, v in vars(model).items() if k in HOOKS})

    def values(self, names: Any) -> dict[str, Tensor]:
        """Copies of the present values."""
        return {name: self.parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        """Puts values into the model."""
        for name, value in values.items():
            self.parameters[name].copy_(value)


class Peft(Kind):
    """Adapters of peft's wrapper around the model."""

    called = "a peft adapter"

    def __init__(self, kept: Overwritten) -> None:
        self.kept = kept

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: MethodConfig,
        selection: Selection | None,
        spec: ModelSpec | None,
        fingerprints: list[str] | None = None,
    ) -> nn.Module:
        spec = ModelSpec.of(model) if spec is None else spec
        state = State.of(model, cls(Overwritten.of(model)), config.name, spec, fingerprints)
        state.config, state.active, state.method_config = config, DEFAULT, dataclasses.asdict(config)
        model = config.convert(model, None, spec)
        setattr(model, STATE, state)
        return model

    @classmethod
    def load(
        cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str, keep: str, activate: bool
    ) -> nn.Module:
        if keep != "device":
            raise UserError(f"{folder}: keep='{keep}' is for sparse adapters: peft keeps its own beside the weights.")
        if state_of(model) is None and hasattr(model, "peft_config"):
            raise UserError(
                f"{folder}: the model has peft's layers from elsewhere: merge them, or load all by sparseft."
            )
        state = state_for(model, cls, folder)
        own = content["sparseft"] if isinstance(content.get("sparseft"), dict) else {}
        if state is None:
            method = str(own.get("method") or content["peft_type"]).lower()
            state = State.of(model, cls(Overwritten.of(model)), method)
        if own:
            check_base(state.fingerprints, state.dtype, folder, own)
        _check_telling(state.kind.kept, name)
        before = state.active
        model = _load(model, folder, content, name, state.kind.kept, before)
        state.active, state.method_config = name, dict(own.get("method_config") or {})
        setattr(model, STATE, state)
        if not activate and before != name:
            _switch(model, state.kind.kept, name, before)
            state.active = before
        return model

    def names(self, model: Any) -> Collection[str]:
        return model.peft_config

    def save(self, model: Any, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """peft's own files, with the adapter's values of the base's parameters."""
        active = state.active
        if name != active:
            _switch(model, self.kept, active, name)
        try:
            with _quiet():
                _write(model, name, state.header, folder)
        finally:
            if name != active:
                _switch(model, self.kept, name, active)

    def switch(self, model: Any, state: State, name: str | None) -> None:
        if name is not None:
            self.check_name(model, name)
        _switch(model, self.kept, state.active, name)

    def fuse(self, model: Any, state: State, weights: dict[str, float], name: str) -> None:
        for known in weights:
            self.check_name(model, known)
        _check_telling(self.kept, name)
        _fuse(model, self.kept, state.active, weights, name)
        _switch(model, self.kept, None, name)
        state.active = name

    def units(self, model: Any, state: State) -> dict[str, Units]:
        """A rank of a linear is a column of its second factor. DoRA's magnitudes, biases, embeddings and whole modules
        have no such units."""
        name = state.active
        config = model.peft_config[name]
        others = [key for key, value in model.named_parameters() if value.requires_grad and ".lora_" not in key]
        others += [key for key, _ in model.named_parameters() if ".lora_embedding_" in key and name in key.split(".")]
        whole = bool(config.modules_to_save or config.trainable_token_indices)
        if config.use_dora or config.lora_bias or whole or self.kept.own.get(name) or others:
            raise UserError(
                f"'{name}' is more than a plain LoRA (DoRA, biases, embeddings, whole modules): it is no sum of parts "
                "that could be scaled one by one."
            )
        return {
            key: Units.of(parameter, 1)
            for key, parameter in model.named_parameters()
            if ".lora_B." in key and name in key.split(".")
        }

    @contextlib.contextmanager
    def by_row(self, model: Any, state: State, names: Names, now: Now) -> Iterator[dict[str, Any]]:
        """By peft's own way, which wants an adapter to be active, and none of those that differ by more than layers."""
        used = list(dict.fromkeys(name for name in names if name is not None))
        for name in used:
            if model.peft_config[name].use_dora:
                raise UserError(f"'{name}' is a DoRA adapter, which peft cannot mix in one batch: use it alone.")
            if name in self.kept.own:
                parameter = next(iter(self.kept.own[name]))
                raise UserError(f"'{name}' trained the base's own {parameter}, which all rows share: use it alone.")
        before = state.active
        _switch(model, self.kept, before, used[0] if used else None)
        try:
            yield {"adapter_names": [BASE if name is None else name for name in names]} if used else {}
        finally:
            _switch(model, self.kept, used[0] if used else None, before)

    def leave(self, model: Any, state: State, *, merged: bool) -> nn.Module:
        """A head or embedding that only the adapter's part of a tied pair changed is untied, in the config too."""
        base = model.get_base_model()
        if merged and state.active is not None:
            if (reason := self.unmergeable(model, state)) is not None:
                raise UserError(f"'{state.active}' cannot be merged: {reason}.")
            untie(base, state.active)
            with _quiet():
                _unwrap(base, state.active)
            tell_untied(base)
        else:
            _switch(model, self.kept, state.active, None)
            _unwrap(base, None)
        _drop_hooks(base, self.kept)
        return base

    def unmergeable(self, model: Any, state: State) -> str | None:
        return None if state.active is None else _unmergeable(model, state.active)

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        import peft

        tensors = read_tensors(folder / TENSORS, "adapter")
        whole = contextlib.nullcontext()
        if any_sharded(model):
            whole = gathered([p for p in model.parameters() if p.requires_grad], changed=True)
        with whole:
            peft.set_peft_model_state_dict(model, tensors, adapter_name=state.active or DEFAULT)


# ---- loading ----


def _load(
    model: nn.Module, folder: Path, content: dict[str, Any], name: str, kept: Overwritten, active: str | None
) -> nn.Module:
    """Loads a LoRA (or DoRA) folder that peft reads, onto a plain model or peft's wrapper, whole or not at all.

    Returns the wrapper with `name` active and every module's training mode kept; `active` is what was active before.
    """
    import peft

    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: no {TENSORS}; weights in another format (pickle) are not loaded.")
    tensors = check_peft(folder, content)
    plain = not isinstance(model, peft.PeftModel)
    modes = {id(module): module.training for module in model.modules()}
    put_back = _structure(model)
    wrapper: Any = model
    try:
        with _quiet(), as_written(content):
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            if plain:
                wrapper = peft.get_peft_model(model, dataclasses.replace(config, bias="none"), adapter_name=name)
                own = _fill(wrapper, kept, tensors, name)
            else:
                _check_beside(model, config, name)
                if name in model.peft_config:
                    model.delete_adapter(name)
                own = _add(model, kept, tensors, name, config)
                kept.own.pop(name, None)
                active = active if active != name else None
    except Exception as error:  # peft raises many kinds for a folder that does not fit; all of them are the folder's
        put_back()  # peft leaves what it had put in place by then
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(line.strip() for line in lines[:2])  # torch's first line of misfits only introduces them
        raise UserError(f"{folder}: peft cannot load it on this model: {shown(reason, 300)}") from error
    wrapper.peft_config[name].bias = config.bias
    trained = _trained_biases(wrapper, kept, name)
    base = kept.values((own.keys() | trained) - kept.base.keys()) | kept.base  # never written yet, or kept
    own = {n: own.get(n, base[n].clone()) for n in own.keys() | trained}
    own = {n: value for n, value in own.items() if n in trained or not torch.equal(value, base[n])}
    kept.base = {n: value for n, value in base.items() if n in own or n in kept.base}
    if own:
        kept.own[name] = own
    _switch(wrapper, kept, active, name)
    _set_modes(wrapper, modes)  # peft's new modules would drop out in evaluation mode too
    return wrapper


def _check_telling(kept: Overwritten, name: str) -> None:
    """Refuses an adapter's name that peft would take for a part of a weight's name, where it would save and load other
    weights than the adapter's, or that is no folder's."""
    parts = {part for known in kept.names for part in known.split(".")}
    if name in parts | PEFT_PARTS or name.startswith("lora_") or any(letter in name for letter in "./\\"):
        raise UserError(
            f"a peft adapter cannot be called {name!r}: expected no dots and slashes, and no part of a weight's name."
        )


def _structure(model: nn.Module) -> Callable[[], None]:
    """Notes which modules, parameters and settings a model and all in it hold (no values); returns what puts them back.

    The containers stay the same ones, as tied layers share them.
    """
    attributes = [vars(module) for module in model.modules()]
    boxes = [value for each in attributes for value in each.values() if isinstance(value, dict | list | set)]
    before = [(box, copy.copy(box)) for box in (*attributes, *boxes)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for box, content in before:
            box.clear()
            box.extend(content) if isinstance(box, list) else box.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return put_back


def _check_beside(model: Any, config: Any, name: str) -> None:
    """Refuses what peft cannot hold beside the adapters that are there: it looks for the tokens of one in all."""
    others = {known: other for known, other in model.peft_config.items() if known != name}
    for known, other in others.items():
        if bool(other.trainable_token_indices) != bool(config.trainable_token_indices):
            raise ValueError(f"only one of it and '{known}' trains single tokens, and peft cannot hold both at once")


def _add(model: Any, kept: Overwritten, tensors: dict[str, Tensor], name: str, config: Any) -> dict[str, Tensor]:
    """Adds one more adapter to peft's wrapper; returns what it gives the base's own parameters."""
    with _without_biases(model):
        model.add_adapter(name, dataclasses.replace(config, bias="none"))
        return _fill(model, kept, tensors, name)


@contextlib.contextmanager
def _without_biases(model: Any) -> Iterator[None]:
    """Inside, peft knows of no adapter with biases: it refuses a second one, having no place for its values."""
    known = {name: config.bias for name, config in model.peft_config.items()}
    for name in known:
        model.peft_config[name].bias = "none"
    try:
        yield
    finally:
        for name, bias in known.items():
            if name in model.peft_config:
                model.peft_config[name].bias = bias


def _fill(model: Any, kept: Overwritten, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Fills peft's layers from a file's tensors; returns those for the base's own parameters, which stay as they are.

    Raises whatever peft does, `ValueError` where tensors are missing, unknown or of another shape.
    """
    import peft
    from peft.utils.other import ModulesToSaveWrapper

    modules = tuple(
        f"{module_name}."
        for module_name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    )
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        inner = key.removeprefix(WRAPPED)
        plain = inner
        for part in INSIDE:
            plain = plain.replace(f".{part}.", ".")
        if plain in kept.buffers:
            raise ValueError(f"it would overwrite the base's {plain}")
        if inner.endswith(".modules_to_save.bias"):
            continue  # with bias: all, peft writes the biases of whole modules a second time
        if plain not in kept.names or (inner.startswith(modules) and ".original_module." not in inner):
            rest[key] = value
            continue
        parameter = kept.parameters[kept.names[plain]]
        if value.shape != parameter.shape:
            raise ValueError(
                f"size mismatch for {plain}: {tuple(value.shape)} in the file, {tuple(parameter.shape)} here"
            )
        own[kept.names[plain]] = value.to(parameter)
    try:
        result = peft.set_peft_model_state_dict(model, rest, adapter_name=name)
    except KeyError as error:  # of a whole module or single tokens
        raise ValueError(f"the file lacks tensors: {error.args[0]}") from error
    missing = [key for key in result.missing_keys if ".lora_" in key and name in key.split(".")]
    for problem, keys in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if keys:
            raise ValueError(f"the file {problem} tensors: {', '.join(map(shown, keys[:3]))}")
    return own


def _trained_biases(model: Any, kept: Overwritten, name: str) -> set[str]:
    """The base's biases that peft trains as part of the adapter `name`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    bias = model.peft_config[name].bias
    if bias == "none":
        return set()
    if bias == "all":
        wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and name in m.modules_to_save]
        replaced = {id(parameter) for wrapper in wrappers for parameter in wrapper.original_module.parameters()}
        return {
            n for n, parameter in kept.parameters.items() if f".{n}".endswith(".bias") and id(parameter) not in replaced
        }
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer) and name in m.r]
    chosen = {id(layer.bias) for layer in layers if getattr(layer, "bias", None) is not None}
    return {parameter for parameter, value in kept.parameters.items() if id(value) in chosen}


def _set_modes(model: nn.Module, modes: dict[int, bool]) -> None:
    """Gives known modules back their training mode, and new ones that of the module they lie in."""

    def visit(module: nn.Module, inherited: bool) -> None:
        module.training = modes.get(id(module), inherited)
        for child in module.children():
            visit(child, module.training)

    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    visit(model, modes.get(id(root), root.training))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences peft's warnings of what is taken care of here."""
    with warnings.catch_warnings():
        for message in (
            "Unexpected keyword arguments",  # `sparseft`, our own key
            "The PEFT config's `base_model_name_or_path`",  # a base kept elsewhere
            "Careful, disabling adapter layers with bias",
            "Model has `tie_word_embeddings=True`",
            "Model with `tie_word_embeddings=True`",
            "Setting `save_embedding_layers` to `True`",
            "Could not find a config file in",
            ".*was active which is now deleted",
            "fan_in_fan_out is set to",
            "`is_gradient_checkpointing` is deprecated",  # of transformers, by peft
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


# ---- switching ----


def _switch(model: Any, kept: Overwritten, active: str | None, name: str | None) -> None:
    """Makes the adapter `name` of peft's wrapper the active one instead of `active`; None: the base, bit for bit."""
    if active in kept.own:  # it may have been trained since
        kept.own[active] = kept.values(kept.own[active])
    kept.write(kept.base | kept.own.get(name, {}) if name is not None else kept.base)
    with _quiet():
        _choose(model, kept, name)


def _choose(model: Any, kept: Overwritten, name: str | None) -> None:
    """Tells peft which adapter computes, and which of the base's biases train with it."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)
    trained = _trained_biases(model, kept, name) if name is not None else set()
    for parameter in kept.base:
        kept.parameters[parameter].requires_grad_(parameter in trained)


def _write(model: nn.Module, name: str, header: dict[str, Any], folder: Path) -> None:
    """Writes peft's own files, with a `sparseft` key in `adapter_config.json`."""
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts every other adapter into a folder of its own
        for file in (folder / name).iterdir():
            move(file, folder)
        (folder / name).rmdir()
    content = portable(read_json_object(folder / CONFIG, "adapter"), model, name)
    own = {"format_version": FORMAT_VERSION, **header, "sha256": file_hash(folder / TENSORS)}
    own[BODY] = peft_hash(content, own)
    write_json(folder / CONFIG, content | {"sparseft": own})


# ---- fusing ----


def _fuse(model: Any, kept: Overwritten, active: str | None, weights: dict[str, float], name: str) -> None:
    """Adds the LoRA adapter `name` to peft's wrapper: the exact weighted sum of others, their ranks added up.

    Biases and whole modules that they trained are summed by what they differ from the base.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

    for known in weights:
        config = model.peft_config[known]
        if config.use_dora:
            raise UserError(f"fuse: '{known}' is a DoRA adapter, whose magnitudes do not add up: merge it instead.")
        if config.trainable_token_indices:
            reason = "has trainable_token_indices, which peft does not add up"
            raise UserError(f"fuse: '{known}' {reason}: merge it instead.")
    if name in weights:
        raise UserError(f"fuse: '{name}' cannot be made of itself: name the sum differently.")
    _switch(model, kept, active, None)  # the base's own values, which differences are taken from
    base = model.get_base_model()
    layers = {
        layer_name: (layer, [known for known in weights if known in layer.r])
        for layer_name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
    }
    targets = sorted(n for n, (layer, parts) in layers.items() if parts and not isinstance(layer, ParamWrapper))
    rank = max(sum(layer.r[known] for known in parts) for layer, parts in layers.values() if parts)
    configs = [model.peft_config[known] for known in weights]
    parameters = next((c.target_parameters for c in configs if c.target_parameters), None)  # peft wants one spelling
    config = dataclasses.replace(
        configs[0], r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={},
        target_modules=targets, target_parameters=parameters, exclude_modules=None, layers_to_transform=None,
        layers_pattern=None, bias="none", lora_bias=any(c.lora_bias for c in configs), inference_mode=False,
        modules_to_save=sorted({module for c in configs for module in c.modules_to_save or ()}) or None,
    )  # fmt: skip
    if parameters:
        config.lora_dropout = 0.0  # peft's condition
    modes = {id(module): module.training for module in model.modules()}
    with _quiet(), _without_biases(model), exact_targets():
        if name in model.peft_config:
            model.delete_adapter(name)  # peft would leave the old one as it is
            kept.own.pop(name, None)
        model.add_adapter(name, config)
    with torch.no_grad():
        for layer, parts in layers.values():
            if parts:
                _add_up(layer, {known: weights[known] for known in parts}, name)
        for module in base.modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                start = dict(module.original_module.named_parameters())
                for parameter_name, total in module.modules_to_save[name].named_parameters():
                    parts = {k: module.modules_to_save[k] for k in weights if k in module.modules_to_save}
                    values = {k: part.get_parameter(parameter_name) for k, part in parts.items()}
                    total.copy_(_weighted(start[parameter_name], values, weights))
        own = {
            parameter: _weighted(kept.base[parameter], {k: v[parameter] for k, v in known.items()}, weights)
            for parameter in kept.base
            if (known := {k: v for k, v in kept.own.items() if k in weights and parameter in v})
        }
    if own:
        kept.own[name] = own
    biases = {c.bias for c in configs} - {"none"}
    model.peft_config[name].bias = "all" if biases else "none"
    _set_modes(model, modes)
    with _quiet():
        _choose(model, kept, None)


def _weighted(base: Tensor, values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """base + Σ weight × (value − base), in fp32 at least, in the base's dtype."""
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    total = start.clone()
    for known, value in values.items():
        total += weights[known] * (value.to(start) - start)
    return total.to(base.dtype)


def _add_up(layer: Any, weights: dict[str, float], name: str) -> None:
    """Fills the adapter `name` of one LoRA layer: the others' factors side by side, zeros in the ranks left over."""
    layer.scaling[name] = 1.0
    embedding = name in layer.lora_embedding_A
    experts = getattr(layer, "num_experts", 1)

    def factors(known: str) -> tuple[Tensor, Tensor]:
        """(experts, rank, in) and (out, rank, experts), as peft keeps those of experts in one parameter."""
        left = layer.lora_embedding_A[known] if embedding else layer.lora_A[known].weight
        right = layer.lora_embedding_B[known] if embedding else layer.lora_B[known].weight
        return left.view(experts, -1, left.shape[1]), right.view(len(right), -1, experts)

    first, second = factors(name)
    first.zero_()
    second.zero_()
    bias = None if embedding else layer.lora_B[name].bias
    if bias is not None:
        bias.zero_()
    start = 0
    for known, weight in weights.items():
        scale = weight * layer.scaling[known]
        left, right = factors(known)
        stop = start + left.shape[1]
        first[:, start:stop] = left
        second[:, start:stop] = scale * right
        start = stop
        if bias is not None and layer.lora_B[known].bias is not None:
            bias += scale * layer.lora_B[known].bias


# ---- leaving ----


def _unmergeable(model: Any, name: str) -> str | None:
    """Why the adapter `name` cannot become weights of the plain model; None: it can."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    for module_name, module in base.named_modules():
        if isinstance(module, LoraLayer) and module.lora_bias.get(name):
            if getattr(module.get_base_layer(), "bias", None) is None:
                return f"it adds a bias (lora_bias) to {module_name}, which has none"
    if changed_apart(base, name) and (always := always_tied(base)):
        return f"it changes {always[0]} apart from {always[1]}, which this model always ties to it"
    return None


def _drop_hooks(model: nn.Module, kept: Overwritten) -> None:
    """Takes away the hooks on the embeddings that were added since; peft adds one for gradient checkpointing."""
    known = list(kept.hooks.get("_require_grads_hooks") or kept.hooks.values())
    for hook in getattr(model, "_require_grads_hooks", None) or ():
        if all(hook is not other for other in known):
            hook.remove()
    for attribute in HOOKS:
        vars(model).pop(attribute, None)
    vars(model).update(kept.hooks)


def _unwrap(model: nn.Module, name: str | None) -> None:
    """Takes peft's layers out of a model, merging the adapter `name` into what they wrap (None: nothing)."""
    visited: set[int] = set()

    def visit(parent: nn.Module) -> None:
        if id(parent) in visited:
            return
        visited.add(id(parent))
        for child_name, child in list(parent._modules.items()):
            if child is not None:
                inner = _inside(child, name)
                parent._modules[child_name] = inner
                visit(inner)

    visit(model)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _inside(module: nn.Module, name: str | None) -> nn.Module:
    """What a layer of peft's stands for; with `name` merged in where it is not None. Any other module is itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    while True:
        if isinstance(module, ModulesToSaveWrapper):
            chosen = module.modules_to_save
            module = chosen[name] if name is not None and name in chosen else module.original_module
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            if name is not None and name in tokens.trainable_tokens_delta:
                tokens.merge(adapter_names=[name])
            module = tokens.base_layer
        elif hasattr(module, "unload_and_optionally_merge_module"):  # nested, or of more than one weight
            merge, names = name is not None, None if name is None else [name]
            module = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=names)
        elif isinstance(module, BaseTunerLayer):
            if name is not None:
                module.merge(adapter_names=[name])
            module = module.base_layer
        else:
            return module
