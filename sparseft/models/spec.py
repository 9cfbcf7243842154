"""Which linear of a model plays which role (`ModelSpec`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sparseft.errors import UserError, nearest
from sparseft.models.chosen_layers import chosen_layers
from sparseft.models.decoder import (
    base_parameter_count,
    decoder_layers,
    is_linear,
    is_router,
    is_transposed,
    logical_shape,
    other_stacks,
    stacks,
)
from sparseft.models.packed.quantized import check_plain
from sparseft.models.probing import unreached

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
    "Wqkv": ("q", "k", "v"),  # MPT, DBRX
    "Wo": "o",  # ModernBERT
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
    "input_linear": ("gate", "up"),  # Granite's shared experts, which are the MLP of Granite 4 without others
    "output_linear": "down",
    "Wi": ("gate", "up"),  # ModernBERT
    "Wo": "down",
}

COLUMN_ROLES = ("o", "down")  # their units are input features; every other role's are output features


ANYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj")  # these are of an attention whatever their parent is called


def role_of(name: str) -> str | tuple[str, ...] | None:
    """The role of a linear, by its name; of a fused one its roles. None where the name says none."""
    *above, leaf = name.split(".")
    if any(part.endswith("norm") and "attn" not in part for part in above):
        return None  # A.X K2's norms have gates of their own; DBRX's attention lies in a `norm_attn_norm`
    within = [number for number, part in enumerate(above, 1) if "attn" in part or "attention" in part]
    if leaf in ANYWHERE or (within and within[-1] == len(above)):
        return ATTENTION_ROLES.get(leaf)
    return None if within else MLP_ROLES.get(leaf)  # DeepSeek V4's attention has parts with gates of their own


def _layer_configs(config: Any) -> list[Any]:
    """The config of each decoder layer where layers differ, as Gemma 4's in the width of their heads, which the model's
    config then refuses to say; of any other model its config alone."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _kv_heads(config: Any, num_heads: int) -> int:
    """The key/value heads of a layer by its config: Falcon's names are its own."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or num_heads)


def _active_experts(configs: list[Any]) -> float:
    """The share of a layer's routed experts that a token goes through, in the first layer that has any; 1 of a model
    without."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    by_token = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    for config in configs:
        there = next((count for name in names if (count := getattr(config, name, None))), None)
        chosen = next((count for name in by_token if (count := getattr(config, name, None))), None)
        if there and chosen:
            by_layer = chosen if isinstance(chosen, list) else [chosen]  # Hunyuan says it by layer
            return sum(by_layer) / len(by_layer) / there
    return 1.0


def _said(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that the module has as a number."""
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value), None)


@dataclass(frozen=True)
class Heads:
    """The heads of one attention, and the features of each."""

    count: int  # of queries
    kv_count: int
    keys: int  # features of a head of q and k
    values: int  # of v, and of what o reads

    def of(self, attention: nn.Module) -> Heads:
        """With the widths that the attention names as its own: those of DeepSeek's latent attention, of linear
        attention, of Gemma 4's layers with attention to all tokens."""
        keys = _said(attention, "qk_head_dim", "head_k_dim", "head_dim")
        values = _said(attention, "v_head_dim", "head_v_dim", "head_dim")
        return replace(self, keys=keys or self.keys, values=values or self.values)


@dataclass(frozen=True)
class RoleSlice:
    """The units of one role in one module: `count` runs of `unit` rows or columns, from `start`."""

    module: str
    layer: int
    role: str  # q | k | v | o | gate | up | down; of a linear chosen by its name: the last part of that
    side: str  # rows (output features) | columns (input features)
    start: int
    unit: int  # features a unit: a head's, or 1
    count: int
    other: int  # length of the weight's other side: entries a feature


@dataclass
class ModelSpec:
    """A decoder's linears with their logical shapes (out, in), its heads, and the slots that S2FT chooses from."""

    linears: dict[str, tuple[int, int]]
    transposed: set[str]  # modules that store their weight as (in, out)
    num_heads: int  # these three as the config says; where layers differ, those of the first
    num_kv_heads: int
    head_dim: int
    total_parameters: int
    slots: list[RoleSlice] = field(default_factory=list)
    layer_of: dict[str, int] = field(default_factory=dict)  # the decoder layer of each linear, frozen ones too
    depth: int = 0  # decoder layers
    layers: frozenset[int] | None = None  # those that a method may train; None: all
    head_weights: int = 0  # that make logits of a hidden state
    active_experts: float = 1.0  # the share of a layer's experts that a token goes through
    experts: list[str] = field(default_factory=list)  # 3-D parameters of experts that nothing here can train
    stacked: set[str] = field(default_factory=set)  # linears that are one expert of a 3-D parameter: no modules
    # Linears that could not train, whatever replaced them, with the reason (`probing.py`); not among `linears`.
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
        configs = _layer_configs(config)
        num_heads = getattr(configs[0], "num_attention_heads", None)
        if not isinstance(num_heads, int):
            raise UserError(
                f"{type(model).__name__} has no single number of attention heads in its config "
                f"(num_attention_heads={num_heads}): sparseft trains transformers' decoders built on attention."
            )
        prefix, layers = decoder_layers(model)
        linears: dict[str, tuple[int, int]] = {}
        transposed: set[str] = set()
        experts: list[str] = []
        stacked: set[str] = set()
        for index, layer in enumerate(layers):
            modules = dict(layer.named_modules())
            for name, module in modules.items():
                full_name = f"{prefix}.{index}.{name}"
                if is_linear(module) and not is_router(modules[name.rpartition(".")[0]], name):
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
        queries = [shape[0] for name, shape in linears.items() if name.endswith("q_proj")]
        heads = []
        for own in configs:
            count = int(own.num_attention_heads)
            width = getattr(own, "head_dim", None) or (queries[0] if queries else int(config.hidden_size)) // count
            heads.append(Heads(count, _kv_heads(own, count), int(width), int(width)))
        spec = ModelSpec(
            linears=linears,
            transposed=transposed,
            num_heads=heads[0].count,
            num_kv_heads=heads[0].kv_count,
            head_dim=heads[0].keys,
            total_parameters=base_parameter_count(model),
            experts=experts,
            stacked=stacked,
            frozen=frozen,
            frozen_shapes=frozen_shapes,
            layer_of={n: int(n[len(prefix) + 1 :].split(".", 1)[0]) for n in (*linears, *frozen_shapes)},
            depth=len(layers),
            head_weights=int(config.hidden_size) * int(config.vocab_size),
            active_experts=_active_experts(configs),
        )
        for name in linears:
            layer = spec.layer_of[name]
            in_layer = heads[layer] if layer < len(heads) else heads[0]
            own = in_layer if name in stacked else in_layer.of(model.get_submodule(name.rpartition(".")[0]))
            spec.slots += spec._slots_of(name, layer, own)
        interleaved = config.model_type in ("codegen", "minimax") or not getattr(config, "multi_query", True)
        if interleaved:  # GPT-BigCode without it, too
            # These fused projections mix q, k and v head by head, so that no run of rows is one of them.
            fused = {slot.module for slot in spec.slots if isinstance(role_of(slot.module), tuple)}
            spec.slots = [s for s in spec.slots if s.module not in fused or s.role not in ("q", "k", "v")]
        # What does not have the channels of the `down` beside it is no gate or up alone: Moshi's `fc1` is both in one.
        channels = {spec.parent_of(slot.module): slot.count for slot in spec.slots if slot.role == "down"}
        spec.slots = [
            s
            for s in spec.slots
            if s.role not in ("gate", "up") or s.count == channels.get(spec.parent_of(s.module), s.count)
        ]
        return spec

    def _slots_of(self, name: str, layer: int, heads: Heads) -> list[RoleSlice]:
        rows, columns = self.linears[name]
        roles = role_of(self.path_of(name))
        if roles is None:
            return []
        if isinstance(roles, str):
            side = "columns" if roles in COLUMN_ROLES else "rows"
            length, other = (columns, rows) if side == "columns" else (rows, columns)
            unit = heads.keys if roles in ("q", "k") else heads.values if roles in ("v", "o") else 1
            if roles == "q" and rows == 2 * heads.count * unit:
                unit *= 2  # gated attention: below each head's query lie the rows of its gate
            if length % unit:
                return []
            return [RoleSlice(name, layer, roles, side, 0, unit, length // unit, other)]
        if roles == ("gate", "up"):
            counts, unit = [rows // 2, rows // 2], 1
        else:
            counts, unit = [heads.count, heads.kv_count, heads.kv_count], heads.keys
        if sum(counts) * unit != rows:
            return []
        starts = [unit * sum(counts[:i]) for i in range(len(counts))]
        return [
            RoleSlice(name, layer, role, "rows", start, unit, count, columns)
            for role, start, count in zip(roles, starts, counts, strict=True)
        ]

    def narrowed(self, layers: Any) -> ModelSpec:
        """The same model, of which a method may train the linears of some layers only (`method.layers`).

        What is in scope, as the shares of a budget are counted by, stays that of all layers. UserError where the model
        has no such layer.
        """
        return replace(self, layers=chosen_layers(layers, self.depth))

    def trains_in(self, name: str) -> bool:
        """Whether the linear lies in a layer that a method may train."""
        return self.layers is None or self.layer_of[name] in self.layers

    def frozen_experts(self, sparse: bool) -> list[str]:
        """The 3-D parameters of experts that a method leaves as they are; sparse methods train each expert's own."""
        stacked = [] if sparse else sorted({name.rpartition(".")[0] for name in self.stacked})
        return self.experts + stacked

    @property
    def known(self) -> dict[str, tuple[int, int]]:
        """All linears of the decoder layers: also those that cannot train, which an adapter made elsewhere may have."""
        return self.linears | self.frozen_shapes

    def frozen_note(self, scope: str | None) -> str | None:
        """Which linears in scope cannot train, and why, in a sentence; None where all can."""
        by_reason: dict[str, dict[str, list[str]]] = {}
        for name, reason in self.frozen.items():
            if (scope is None or scope in name) and self.trains_in(name):
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
        """The linears that may train whose name contains `scope` (None: all); none is a `UserError` that says what
        there is."""
        chosen = {name: shape for name, shape in self._in_all_layers(scope).items() if self.trains_in(name)}
        if not chosen:
            layers = sorted({self.layer_of[name] for name in self._in_all_layers(scope)})
            raise UserError(
                f"method.layers and scope={scope} leave nothing to train: the linears in scope lie in the decoder "
                f"layers {', '.join(map(str, layers))}."
            )
        return chosen

    def _in_all_layers(self, scope: str | None) -> dict[str, tuple[int, int]]:
        chosen = {name: shape for name, shape in self.linears.items() if scope is None or scope in name}
        if not chosen and (note := self.frozen_note(scope)):
            raise UserError(f"scope={scope} leaves nothing to train: {note}.")
        if not chosen:
            parts = sorted({part for name in self.linears for part in name.split(".") if not part.isdigit()})
            raise UserError(f"scope={scope} matches no linear of the decoder layers.{nearest(scope or '', parts)}")
        return chosen

    def weights_in(self, scope: str | None) -> int:
        """Weights of the linears in scope, of all layers."""
        return sum(rows * columns for rows, columns in self._in_all_layers(scope).values())

    def share_of(self, sparsity: float, scope: str | None) -> float:
        """The share of the linears that may train which makes (1 − sparsity) of the weights in scope, of all layers.

        UserError where they have fewer weights than that.
        """
        wanted = (1.0 - sparsity) * self.weights_in(scope)
        there = sum(rows * columns for rows, columns in self.linears_in(scope).values())
        if wanted > there:
            raise UserError(
                f"sparsity={sparsity} asks for {wanted:,.0f} trainable weights, but the linears of the layers in "
                f"method.layers have only {there:,}: raise sparsity or name more layers."
            )
        return 1.0 - sparsity if self.layers is None else wanted / there

    def feature_slots(self, sides: Mapping[str, str]) -> list[RoleSlice]:
        """Slots of single features of the linears named in `sides` ("rows" or "columns"), in the model's order.

        Those of linears of one name compete with each other, as a feature's cost is the length of the other side.
        """
        slots = []
        for name, (rows, columns) in self.linears.items():
            if side := sides.get(name):
                count, other = (rows, columns) if side == "rows" else (columns, rows)
                leaf = self.path_of(name).rpartition(".")[2]
                slots.append(RoleSlice(name, self.layer_of[name], leaf, side, 0, 1, count, other))
        return slots

    def path_of(self, name: str) -> str:
        """The name that a linear's role is read from: an expert's is that of the 3-D parameter that holds it."""
        return name.rpartition(".")[0] if name in self.stacked else name

    def parent_of(self, name: str) -> str:
        """The module around a linear, or around the 3-D parameter that holds it."""
        return self.path_of(name).rpartition(".")[0]

    def leaves(self, scope: str | None) -> str:
        """The last parts of the names of the linears in scope, for messages: `dense, query_key_value`."""
        return ", ".join(sorted({self.path_of(name).rpartition(".")[2] for name in self.linears_in(scope)}))

    def slots_in(self, scope: str | None) -> list[RoleSlice]:
        """The slots of the linears in scope, in the model's order."""
        names = self.linears_in(scope)
        return [slot for slot in self.slots if slot.module in names]
