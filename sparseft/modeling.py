"""Loads a Hugging Face causal LM, and says which of its modules plays which role (`ModelSpec`)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparseft.config import BUNDLED, ModelConfig
from sparseft.errors import HUB_ID, UserError, looks_local, nearest, nearest_path, reason_of, where_looked
from sparseft.expert_weights import is_router, other_stacks, stacks
from sparseft.files import check_whole
from sparseft.load_report import check_complete, without_report
from sparseft.probing import check_causal
from sparseft.quantized import check_config, check_plain, is_plain
from sparseft.reached import unreached
from sparseft.sharding import full_shape, gathered, running

# Last part of a module's name -> its role. A tuple names the parts of a fused projection in their order.
ATTENTION_ROLES: dict[str, str | tuple[str, ...]] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "c_proj": "o",  # GPT-2, below an attention module
    "dense": "o",  # GPT-NeoX, Bloom, Falcon, Phi
    "qkv_proj": ("q", "k", "v"),  # Phi-3
    "c_attn": ("q", "k", "v"),  # GPT-2
}
MLP_ROLES: dict[str, str | tuple[str, ...]] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": ("gate", "up"),  # Phi-3
    "fc1": "up",  # OPT
    "fc2": "down",
    "c_fc": "up",  # GPT-2
    "c_proj": "down",
    "dense_h_to_4h": "up",  # GPT-NeoX, Bloom, Falcon
    "dense_4h_to_h": "down",
    "fc_in": "up",  # GPT-J
    "fc_out": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
STATE = "_sparseft"  # the attribute of an attached model that holds `adapter.State`
COLUMN_ROLES = ("o", "down")  # their units are input features; every other role's are output features


@dataclass(frozen=True)
class Slot:
    """The units of one role in one module: `count` runs of `unit` rows or columns, from `start`."""

    module: str
    layer: int
    role: str  # q | k | v | o | gate | up | down; of a linear chosen by its name: its side
    side: str  # rows (output features) | columns (input features)
    start: int
    unit: int  # features a unit: head_dim, or 1
    count: int
    other: int  # length of the weight's other side: entries a feature


@dataclass
class ModelSpec:
    """A decoder's linears with their logical shapes (out, in), its heads, and the slots that S2FT chooses from."""

    linears: dict[str, tuple[int, int]]
    transposed: set[str]  # modules that store their weight as (in, out)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    total_parameters: int
    slots: list[Slot] = field(default_factory=list)
    layer_of: dict[str, int] = field(default_factory=dict)  # the decoder layer of each linear
    experts: list[str] = field(default_factory=list)  # 3-D parameters of experts that nothing here can train
    stacked: set[str] = field(default_factory=set)  # linears that are one expert of a 3-D parameter: no modules
    # Linears that nothing put in their place could train, with the reason (`reached.py`); not among `linears`.
    frozen: dict[str, str] = field(default_factory=dict)
    frozen_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, *, tried: bool = True) -> ModelSpec:
        """Reads a (plain or attached) Hugging Face causal LM; nothing is materialised, so meta models do too.

        tried: whether linears that cannot train are told apart, for which the model is run once. To load an adapter
        they need not be: `known` has both.
        """
        check_plain(model)
        config = model.config.get_text_config()
        num_heads = getattr(config, "num_attention_heads", None)
        if not isinstance(num_heads, int):
            raise UserError(
                f"{type(model).__name__} has no single number of attention heads in its config "
                f"(num_attention_heads={num_heads}): sparseft trains transformers' decoders built on attention."
            )
        num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
        prefix, layers = decoder_layers(model)
        linears: dict[str, tuple[int, int]] = {}
        transposed: set[str] = set()
        experts: list[str] = []
        stacked: set[str] = set()
        for index, layer in enumerate(layers):
            modules = dict(layer.named_modules())
            for name, module in modules.items():
                full_name = f"{prefix}.{index}.{name}"
                owner, _, leaf = name.rpartition(".")
                if is_linear(module) and not is_router(modules[owner], leaf):
                    linears[full_name] = logical_shape(module)
                    if is_transposed(module):
                        transposed.add(full_name)
                for parameter, (count, rows, columns) in stacks(module).items():
                    members = [f"{full_name}.{parameter}.{number}" for number in range(count)]
                    linears |= dict.fromkeys(members, (rows, columns))
                    stacked.update(members)
                experts += [f"{full_name}.{parameter}" for parameter in other_stacks(module)]
        frozen = unreached(model, {n: model.get_submodule(n) for n in linears if n not in stacked}) if tried else {}
        frozen_shapes = {name: linears.pop(name) for name in frozen}
        if not linears:
            raise UserError(
                f"No linear layers were found in the {len(layers)} decoder layers under '{prefix}' of "
                f"{type(model).__name__}, so there is nothing to train sparsely."
            )
        head_dim = getattr(config, "head_dim", None)
        if not head_dim:
            queries = [shape[0] for name, shape in linears.items() if name.endswith("q_proj")]
            head_dim = (queries[0] if queries else int(config.hidden_size)) // num_heads
        spec = ModelSpec(
            linears=linears,
            transposed=transposed,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(head_dim),
            num_layers=len(layers),
            total_parameters=base_parameter_count(model),
            experts=experts,
            stacked=stacked,
            frozen=frozen,
            frozen_shapes=frozen_shapes,
        )
        for name in linears:
            spec.layer_of[name] = int(name[len(prefix) + 1 :].split(".", 1)[0])
            spec.slots += spec._slots_of(name, spec.layer_of[name])
        if config.model_type == "codegen" or not getattr(config, "multi_query", True):  # GPT-BigCode without it
            # Their fused projections mix q, k and v head by head, so that no run of rows is one of them.
            spec.slots = [slot for slot in spec.slots if slot.role not in ("q", "k", "v")]
        return spec

    def _slots_of(self, name: str, layer: int) -> list[Slot]:
        rows, columns = self.linears[name]
        path = name.rpartition(".")[0] if name in self.stacked else name
        parent, leaf = path.rsplit(".", 2)[-2:]
        table = ATTENTION_ROLES if "attn" in parent or "attention" in parent else MLP_ROLES
        roles = table.get(leaf)
        if roles is None:
            return []
        if isinstance(roles, str):
            side = "columns" if roles in COLUMN_ROLES else "rows"
            length, other = (columns, rows) if side == "columns" else (rows, columns)
            unit = self.head_dim if roles in ("q", "k", "v", "o") else 1
            if length % unit:
                return []
            return [Slot(name, layer, roles, side, 0, unit, length // unit, other)]
        if roles == ("gate", "up"):
            counts, unit = [rows // 2, rows // 2], 1
        else:
            counts, unit = [self.num_heads, self.num_kv_heads, self.num_kv_heads], self.head_dim
        if sum(counts) * unit != rows:
            return []
        starts = [unit * sum(counts[:i]) for i in range(len(counts))]
        return [
            Slot(name, layer, role, "rows", start, unit, count, columns)
            for role, start, count in zip(roles, starts, counts, strict=True)
        ]

    def frozen_experts(self, sparse: bool) -> list[str]:
        """The 3-D parameters of experts that a method leaves as they are; sparse methods train each expert's own."""
        stacked = [] if sparse else sorted({name.rpartition(".")[0] for name in self.stacked})
        return self.experts + stacked

    @property
    def known(self) -> dict[str, tuple[int, int]]:
        """All linears of the decoder layers: also those that cannot train, which an adapter made elsewhere may have."""
        return self.linears | self.frozen_shapes

    def frozen_note(self, scope: str | None) -> str | None:
        """Which linears in scope cannot train, and why, in a sentence; null where all can."""
        by_reason: dict[str, dict[str, list[str]]] = {}
        for name, reason in self.frozen.items():
            if scope is None or scope in name:
                number = next((part for part in name.split(".") if part.isdigit()), "")
                kind = name.replace(f".{number}.", ".{}.", 1)
                by_reason.setdefault(reason, {}).setdefault(kind, []).append(number)
        if not by_reason:
            return None
        parts = []
        for reason, kinds in by_reason.items():
            names = (k.replace("{}", n[0] if len(n) == 1 else f"{{{','.join(n)}}}") for k, n in kinds.items())
            parts.append(f"{', '.join(names)} ({reason})")
        count = sum(len(numbers) for kinds in by_reason.values() for numbers in kinds.values())
        who = "1 linear cannot train and stays" if count == 1 else f"{count} linears cannot train and stay"
        return f"{who} frozen: {'; '.join(parts)}"

    def check_trains(self, names: Iterable[str]) -> None:
        """Refuses linears that cannot train, by name and reason."""
        for name in names:
            if name in self.frozen:
                raise UserError(f"'{name}' cannot be trained: {self.frozen[name]}.")

    def linears_in(self, scope: str | None) -> dict[str, tuple[int, int]]:
        """The linears whose name contains `scope` (null: all); none is a `UserError` that says what there is."""
        chosen = {name: shape for name, shape in self.linears.items() if scope is None or scope in name}
        if not chosen and (note := self.frozen_note(scope)):
            raise UserError(f"scope={scope} leaves nothing to train: {note}.")
        if not chosen:
            parts = sorted({part for name in self.linears for part in name.split(".") if not part.isdigit()})
            raise UserError(f"scope={scope} matches no linear of the decoder layers.{nearest(scope or '', parts)}")
        return chosen

    def named_slots(self, rows: list[str], columns: list[str], scope: str | None) -> list[Slot]:
        """Slots of single features in the linears whose names end in one of the given suffixes (whole parts of a name;
        an expert goes by its parameter's name). A suffix that matches nothing, or a linear named for both, is a
        `UserError`.
        """
        linears, slots = self.linears_in(scope), []
        paths = {name: name.rpartition(".")[0] if name in self.stacked else name for name in linears}
        chosen: dict[str, str] = {}
        for side, suffixes in (("rows", rows), ("columns", columns)):
            for suffix in suffixes:
                ending = [n for n, path in paths.items() if f".{path}".endswith(f".{suffix}") or n == suffix]
                if not ending:
                    self.check_trains(n for n in self.frozen if n.endswith(f".{suffix}") and (scope or "") in n)
                    raise UserError(
                        f"method.{side}: no linear in scope is called '{suffix}'; found {self.leaves(scope)}."
                        f"{nearest(suffix, [path.rpartition('.')[2] for path in paths.values()])}"
                    )
                for name in ending:
                    if chosen.setdefault(name, side) != side:
                        raise UserError(f"method.rows and method.columns both name {name}: choose one side.")
        for name in (name for name in linears if name in chosen):  # in the model's order
            out, inner = linears[name]
            length, other = (out, inner) if chosen[name] == "rows" else (inner, out)
            slots.append(Slot(name, self.layer_of[name], chosen[name], chosen[name], 0, 1, length, other))
        return slots

    def leaves(self, scope: str | None) -> str:
        """The last parts of the names of the linears in scope, for messages: `dense, query_key_value`."""
        names = (n.rpartition(".")[0] if n in self.stacked else n for n in self.linears_in(scope))
        return ", ".join(sorted({name.rpartition(".")[2] for name in names}))

    def slots_in(self, scope: str | None) -> list[Slot]:
        """The slots of the linears in scope, in the model's order."""
        names = self.linears_in(scope)
        return [slot for slot in self.slots if slot.module in names]


def inside_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `function(model, …)` take what `torch.compile` made of a model: it works on the model inside, by whose
    names adapters are kept. A model that stays attached is returned as it was given, compiled."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **options: Any) -> Any:
        inner = getattr(model, "_orig_mod", model)
        result = function(inner, *args, **options)
        return model if result is inner and hasattr(inner, STATE) else result

    return call


# Subclasses of `nn.Linear` with a forward pass of their own that computes the very same product.
SAME_PRODUCT = ("FalconLinear",)


def is_linear(module: nn.Module) -> bool:
    """Whether sparseft can train the module's weight: it is the one matrix of plain numbers by which the module
    multiplies. `nn.Linear` and transformers' `Conv1D` are, and what was converted already; their subclasses only where
    they compute the same product (a router or a grouped linear does not) and hold nothing beside weight and bias.
    """
    if getattr(module, "sparseft_linear", False):
        return True
    own = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    weight = module._parameters.get("weight")  # not what parametrizations and weight norm compute in its place
    if weight is None or not own.keys() <= {"weight", "bias"} or not all(map(is_plain, own.values())):
        return False
    if len(full_shape(weight)) != 2:
        return False
    kind = type(module)
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    if not isinstance(module, nn.Linear) or kind is NonDynamicallyQuantizableLinear:  # read by nn.MultiheadAttention
        return False
    same = kind.forward is nn.Linear.forward or kind.__name__ in SAME_PRODUCT
    return same and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))  # accelerate's moves inputs only


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "transposed", False))


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """(out features, in features), however the weight is stored."""
    rows, columns = full_shape(module.weight)
    return (columns, rows) if is_transposed(module) else (rows, columns)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: of the config's length, the one with the most parameters."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    fitting = [item for item in lists if len(item[1]) == count] or lists
    if not fitting:
        raise UserError(f"{type(model).__name__} has no list of decoder layers (nn.ModuleList).")
    return max(fitting, key=lambda item: sum(full_shape(p).numel() for p in item[1].parameters()))


def runnable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, a model in shards can be run, a decoder layer at a time (`sharding.running`); any other as it is."""
    return running(model, lambda: decoder_layers(model)[1])


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own parameters, tied ones once: without the deltas that sparse layers add."""
    deltas = {id(module.delta) for module in model.modules() if getattr(module, "sparseft_pattern", False)}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in deltas)


def base_parameter_count(model: nn.Module) -> int:
    """Parameters of the base model, tied ones once."""
    return sum(full_shape(p).numel() for _, p in base_parameters(model))


def base_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """A hash over the base weights' names, shapes and `samples` evenly spaced values each.

    Values are rounded to bf16, and those below fp16's smallest normal number to zero, so that a checkpoint loaded in
    fp32 or bf16 has the same fingerprint, and in fp16 too if it is stored in half precision.
    To be taken before any delta is written.
    """
    return base_fingerprints(model, samples)[0]


def base_fingerprints(model: nn.Module, samples: int = 64) -> list[str]:
    """`base_fingerprint`, and where it differs, the one that the same weights have once they are loaded in fp16: there
    fp32 values are rounded twice. Two models are of one base where the lists share an entry.
    """
    digest, as_fp16 = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(base_parameters(model), key=lambda item: item[0]):
        shape = full_shape(parameter)
        for each in (digest, as_fp16):
            each.update(f"{name}{tuple(shape)}".encode())
        if parameter.is_meta or shape.numel() == 0:
            continue
        positions = torch.linspace(0, shape.numel() - 1, min(samples, shape.numel()), dtype=torch.float64).long()
        with gathered([parameter]):
            flat = parameter.detach().reshape(-1)
            sampled = flat[positions.to(flat.device)].cpu()
        for each, values in ((digest, sampled), (as_fp16, sampled.half())):
            values = values.to(torch.bfloat16).float()
            values = values.masked_fill(values.abs() < 2.0**-14, 0.0)  # this also leaves one sign of zero
            each.update(values.numpy().tobytes())
    return list(dict.fromkeys((digest.hexdigest(), as_fp16.hexdigest())))


def bundled_path(path: str) -> str:
    """`bundled:tiny` -> the folder inside the package; any other path as it is."""
    if not path.startswith(BUNDLED):
        return path
    folder = Path(__file__).parent / "bundled" / path.removeprefix(BUNDLED)
    if not folder.exists():
        known = [entry.name for entry in (Path(__file__).parent / "bundled").iterdir() if entry.is_dir()]
        raise UserError(f"model.path={path}: nothing of that name is bundled.{nearest(folder.name, known)}")
    return str(folder)


def check_model_path(path: str) -> str:
    """The folder or hub id to load; a path that looks local and is not there is a `UserError`."""
    resolved = bundled_path(path)
    folder = Path(resolved).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path}: the folder has no config.json, so it is no Hugging Face model.")
        return str(folder)
    if folder.exists():
        raise UserError(f"model.path={path}: expected a Hugging Face model folder, this is a file.")
    if looks_local(resolved) and not _in_hub_cache(resolved):
        here = folder.parent
        hub = f" '{here}' is a folder here, so this is not looked up on the hub." if HUB_ID.fullmatch(path) else ""
        raise UserError(f"model.path={path}: no such folder{where_looked(resolved)}.{nearest_path(folder)}{hub}")
    return resolved


def _in_hub_cache(path: str) -> bool:
    """Whether a path such as `Qwen/Qwen3-8B`, in a folder that has a `Qwen`, is a model that the hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    return bool(HUB_ID.fullmatch(path)) and isinstance(try_to_load_from_cache(path, "config.json"), str)


def resolve_device(device: str) -> torch.device:
    """`auto` -> cuda where there is one, else cpu; `cuda` without one is a `UserError`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA device here; use hardware.device=auto or cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _load(what: str, path: str, loader, **options):
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        return loader(check_model_path(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, UserError):
            raise
        gone = isinstance(error, OSError) and not Path(bundled_path(path)).expanduser().exists()
        here = f"no such folder{where_looked(path)}, and " if gone else ""
        raise UserError(f"model.path={path}: {here}the {what} could not be loaded: {reason_of(error)}") from error


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The model on `device`, in evaluation mode, in the dtype asked for (`auto`: as stored).

    A checkpoint that lacks a weight is a `UserError`: a random one in its place would be trained and never noticed. So
    is one that full fine-tuning wrote and that was altered since, one that is quantised, and a model that is not
    causal, which is tried.
    """
    from transformers import AutoModelForCausalLM

    load_config(config, "model")  # refuses what is quantised, before any weight
    check_whole(Path(config.path).expanduser())
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype}: expected {', '.join(DTYPES)}.{nearest(config.dtype, DTYPES)}")
    options: dict[str, object] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.revision:
        options["revision"] = config.revision
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # said below, in a sentence
    with without_report():
        model, report = _load("model", config.path, AutoModelForCausalLM.from_pretrained, **options)
    check_complete(config.path, report)
    model = model.to(device).eval()
    with runnable(model):
        check_causal(model, f"model.path={config.path}")
    return model


def load_config(config: ModelConfig, what: str = "config"):
    """The model's config.json, as transformers reads it; no weights. That of quantised ones is a `UserError`, and
    that of a model of another kind (T5, images). `what` is said not to be loaded where there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"revision": config.revision} if config.revision else {}
    content = _load(
        what, config.path, AutoConfig.from_pretrained, trust_remote_code=config.trust_remote_code, **options
    )
    check_config(content, f"model.path={config.path}")
    if type(content) not in AutoModelForCausalLM._model_mapping and not hasattr(content, "auto_map"):
        raise UserError(
            f"model.path={config.path}: transformers has no causal language model of the type '{content.model_type}'; "
            "use one that predicts the next token of a text."
        )
    return content


def context_length(config: Any) -> int | None:
    """The tokens that a model's config says it takes at most; null where it names no bound (XLNet says -1, others what
    no sequence reaches)."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounded = isinstance(length, int | float) and 0 < length < 1e9
    return int(length) if bounded else None


def vocabulary_rows(model: nn.Module) -> tuple[int, int]:
    """How many tokens a model can read and how many it can predict: the rows of its embeddings and of its head."""
    named: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    weights = [getattr(table, "weight", None) for table in tables]
    rows, logits = (named if weight is None else int(full_shape(weight)[0]) for weight in weights)
    return rows, logits


def load_tokenizer(config: ModelConfig):
    """The tokenizer (`model.tokenizer`, else the model's own)."""
    from transformers import AutoTokenizer

    options = {"revision": config.revision} if config.revision else {}
    path = config.tokenizer or config.path
    return _load(
        "tokenizer", path, AutoTokenizer.from_pretrained, trust_remote_code=config.trust_remote_code, **options
    )
