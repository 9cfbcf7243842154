"""Where a model's weights lie in its checkpoint: which tensors of which files, by which names, and where in them.

A checkpoint may name tensors otherwise than the loaded model, lack a prefix, hold experts one by one of which the model
makes one parameter, or be cut into several files. transformers knows all that (`core_model_loading`); here its own
renamings and converters are asked, by loading the *places* of the entries instead of their values.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import UserError, reason_of, shown
from sparseft.files.tensors import Stored, opened, stored_tensors
from sparseft.files.untrusted import read_json_object
from sparseft.models.conversion import Conversion, Found
from sparseft.models.decoder import base_parameters, find_expert, is_transposed, logical_shape
from sparseft.models.loading import GENERATION, check_model_path, file_beside, load_config
from sparseft.models.packed.quantized import quantized_by

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
WHAT = "model"
CONVERSIONS = 8  # of groups of tensors that are kept at a time


# ---- files ----


@dataclass
class Checkpoint:
    """The safetensors files of a model folder. tensors: what they hold; files: the name of the file each lies in."""

    folder: Path
    tensors: dict[str, Stored]
    files: dict[str, str]

    @staticmethod
    def of(model: ModelConfig) -> Checkpoint:
        """The checkpoint of a folder, a hub id or the bundled model; one without safetensors is a `UserError`."""
        place = check_model_path(model.path)
        return Checkpoint.of_folder(Path(place) if Path(place).is_dir() else _from_hub(place, model.revision))

    @staticmethod
    def of_folder(folder: Path) -> Checkpoint:
        if (folder / FILE).is_file():
            names = [FILE]
        elif (folder / INDEX).is_file():
            files = read_json_object(folder / INDEX, WHAT).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise UserError(f"{folder / INDEX}: needs weight_map, an object of file names.")
            names = sorted(set(files.values()))
        else:
            raise UserError(
                f"{folder}: no {FILE} and no {INDEX}: a checkpoint in safetensors is needed here; "
                "load the model and the tokenizer, save both with save_pretrained, and give that as model.path=FOLDER."
            )
        tensors: dict[str, Stored] = {}
        found: dict[str, str] = {}
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / INDEX}: '{shown(name)}' is no file of the folder.")
            inside = stored_tensors(folder / name, WHAT)
            if twice := sorted(inside.keys() & tensors.keys()):
                raise UserError(f"{folder}: {shown(twice[0])} stands in {found[twice[0]]} and in {name}.")
            tensors |= inside
            found |= dict.fromkeys(inside, name)
        return Checkpoint(folder, tensors, found)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file: only what is looked at is read."""
        with opened(self.folder / self.files[name], WHAT) as file:
            return file.get_tensor(name)


def _from_hub(path: str, revision: str | None) -> Path:
    """The folder in the hub's cache that holds all files of a model's checkpoint."""
    from transformers.utils.hub import cached_file

    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    place = cached_file(path, FILE, **options) or cached_file(path, INDEX, **options)
    if place is None:
        raise UserError(f"model.path={path}: no {FILE} and no {INDEX} there; a checkpoint in safetensors is needed.")
    folder = Path(place).parent
    if Path(place).name == INDEX:
        for name in sorted(set(read_json_object(place, WHAT).get("weight_map", {}).values())):
            cached_file(path, name, revision=revision)
    return folder


# How a model generates, and how one that reads images or sound prepares them.
BESIDE = (
    *(GENERATION, "preprocessor_config.json", "video_preprocessor_config.json"),
    *("processor_config.json", "chat_template.json"),
)


def fetch_beside(model: ModelConfig) -> None:
    """Puts the files `BESIDE` of a model of the hub with its checkpoint in the hub's cache, where it has them."""
    for name in BESIDE:
        file_beside(model.path, name, model.revision)


def without_weights(model: ModelConfig, *, packed: bool = False) -> nn.Module:
    """The model as transformers builds it, on the meta device: its modules and their shapes, in no memory. One that it
    cannot build is a `UserError`. packed: of a packed checkpoint the plain model, else that is one too."""
    from transformers import AutoModelForCausalLM

    config = load_config(model, packed=packed)
    if quantized_by(config) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (ImportError, ValueError) as error:
        raise UserError(f"model.path={model.path}: cannot be built: {reason_of(error)}") from error


# ---- one linear's place in the model ----


class Weight(NamedTuple):
    """Where a linear's (out, in) weight lies: the parameter, the first of its entries, and whether it is (in, out)."""

    parameter: str
    offset: int
    shape: tuple[int, int]
    transposed: bool

    def flat(self, entries: Tensor) -> Tensor:
        """Entries of the logical weight (row · in + column) as entries of the parameter."""
        if self.transposed:
            entries = entries % self.shape[1] * self.shape[0] + entries // self.shape[1]
        return entries + self.offset

    def within(self, parameter: Tensor) -> Tensor:
        """The logical weight (out, in) as a view of the contiguous parameter that holds it."""
        rows, columns = self.shape
        part = parameter.view(-1).narrow(0, self.offset, rows * columns)
        return part.view(columns, rows).t() if self.transposed else part.view(rows, columns)


def weight_of(model: nn.Module, module: str) -> Weight:
    """The weight of the linear or the expert `module`; a name that the model lacks is a `UserError`."""
    expert = find_expert(model, module)
    if expert is not None:
        out, inside = expert.weight.shape
        return Weight(module.rpartition(".")[0], expert.number * out * inside, (out, inside), False)
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise UserError(f"the base model has no module '{shown(module)}'.") from None
    return Weight(f"{module}.weight", 0, logical_shape(linear), is_transposed(linear))


# ---- parameters and checkpoint tensors ----


@dataclass
class Group:
    """Tensors of the checkpoint of which transformers makes some parameters: one of one, mostly.

    twins: further names under which a file holds the same tied weight.
    """

    names: list[str]
    pattern: str | None = None  # of the converter that does it; None: the tensor is the parameter
    parameters: list[str] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)


class Entries(NamedTuple):
    """A parameter that is in no memory: its shape, and what gives its values (k,) of flat entries (k,)."""

    shape: torch.Size
    at: Callable[[Tensor], Tensor]


class Places:
    """Which entries of a model's parameters are which of a checkpoint's tensors."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Stored]) -> None:
        """model: also on the meta device, with an adapter or without; tensors: all of the checkpoint, by name."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.tensors = tensors
        self.parameters = dict(base_parameters(model))
        self._model = model
        transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._converters = {pattern: each for each in converters for pattern in each.source_patterns}
        # As in a state dict: with both names of what is tied.
        known: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        first = {id(parameter): name for name, parameter in reversed(self.parameters.items())}
        prefix = model.base_model_prefix
        self.groups: dict[str, Group] = {}  # by the parameter that transformers names the group after
        self._ways: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target in known:
                target = first.get(id(known[target]), target)
                self._ways[target].append((name, pattern))
                group = self.groups.setdefault(target, Group([], pattern))
                same = group.twins if group.names and pattern is None else group.names
                same.append(name)
        self._group_of: dict[str, Group] = {}  # by parameter
        self.group_with: dict[str, Group] = {}  # by tensor
        for target, group in self.groups.items():
            group.parameters = [target]
            self.group_with |= dict.fromkeys([*group.names, *group.twins], group)
            if group.pattern is not None:
                shapes = {name: torch.empty(tensors[name].shape, device="meta") for name in group.names}
                try:
                    group.parameters = list(self._converted(target, group, shapes.__getitem__))
                except RuntimeError as error:  # of torch: shapes that do not go together
                    where, first_name = model.config.name_or_path, shown(group.names[0])
                    raise UserError(f"{where}: {first_name} and what belongs to it: {reason_of(error)}.") from error
            self._group_of |= dict.fromkeys(group.parameters, group)
        self._conversions: dict[int, Conversion] = {}  # the latest ones, by the group

    def _converted(self, target: str, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What transformers makes of a group's tensors, by parameter."""
        converter = copy.deepcopy(self._converters[group.pattern or ""])
        ways = dict(self._ways[target])
        for name in group.names:
            converter.add_tensor(target, name, ways[name], read(name))
        made = converter.convert(target, model=self._model, config=self._model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name, value in made.items():
            if name not in self.parameters or value.shape != self.parameters[name].shape:
                raise UserError(f"the checkpoint's {shown(group.names[0])} does not become {shown(name)} of the model.")
        return made

    def _conversion(self, group: Group) -> Conversion:
        """What becomes of a converted group; what cannot be followed is a `UserError`."""
        if id(group) not in self._conversions:
            shapes = {name: self.tensors[name].shape for name in group.names}
            try:
                made = Conversion(shapes, lambda read: self._converted(group.parameters[0], group, read))
            except ValueError as error:
                raise UserError(
                    f"what transformers makes of the checkpoint's {shown(group.names[0])} cannot be followed: {error}."
                ) from error
            if len(self._conversions) >= CONVERSIONS:
                del self._conversions[next(iter(self._conversions))]
            self._conversions[id(group)] = made
        return self._conversions[id(group)]

    def _moves(self, group: Group) -> bool:
        """Whether a converted group's entries are moved and nothing else."""
        try:
            self._conversion(group)
        except UserError:
            return False
        return True

    def names(self) -> list[str]:
        """The checkpoint's tensors that are parameters of the model."""
        return [name for name, group in self.group_with.items() if group.parameters[0] in self.parameters]

    def holds(self, parameter: str) -> bool:
        """Whether the checkpoint has a parameter (of a tied one: under its first name)."""
        return parameter in self._group_of

    def group_of(self, parameter: str) -> Group:
        """The tensors of which a parameter is made; one that the checkpoint lacks, or has in another shape, is a
        `UserError`."""
        if parameter not in self._group_of:
            raise UserError(f"the checkpoint has no tensor of its own for '{shown(parameter)}'.")
        group = self._group_of[parameter]
        if group.pattern is None:  # what is converted was held against the model before
            name, own = group.names[0], tuple(self.parameters[parameter].shape)
            if (there := tuple(self.tensors[name].shape)) != own:
                where = self._model.config.name_or_path
                raise UserError(f"{where}: {shown(name)} is {there} in the checkpoint, {own} by its config.")
        return group

    def in_checkpoint(self, parameter: str, flat: Tensor) -> list[Found]:
        """Where entries (k,) of a parameter are in the checkpoint; what `group_of` refuses is a `UserError`."""
        group = self.group_of(parameter)
        if group.pattern is None:
            index, which = flat.sort()
            return [Found(group.names[0], index, which)]
        return self._conversion(group).in_tensors(parameter, flat)

    def in_model(self, name: str, index: Tensor) -> list[Found]:
        """Where entries (k,) of a checkpoint's tensor are in the model; none where it has no such parameter."""
        group = self.group_with.get(name)
        if group is None or group.parameters[0] not in self.parameters:
            return []
        if group.pattern is None:
            flat, which = index.sort()
            return [Found(group.parameters[0], flat, which)]
        return self._conversion(group).in_parameters(name, index)

    def parameter(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A parameter as transformers makes it of the checkpoint's tensors, which `read` gives by name."""
        group = self.group_of(name)
        if group.pattern is None:
            return read(group.names[0])
        return self._converted(group.parameters[0], group, read)[name]

    def pieces(self, name: str, read: Callable[[str], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """A parameter's flat values, each piece with the place of its first one: the experts that are stacked in it one
        by one, so that they need not be in memory at once, any other parameter whole."""
        group, shape = self.group_of(name), self.parameters[name].shape
        stacked = len(shape) == 3 and shape[1] > 1  # a convolution along a sequence has (channels, 1, width)
        size = shape[1:].numel() if stacked else shape.numel()
        if group.pattern is not None and self._moves(group):
            conversion = self._conversion(group)
            for start in range(0, shape.numel(), size):
                yield start, conversion.part(name, start, start + size, read)
            return
        whole = self.parameter(name, read).reshape(-1)
        yield from ((start, whole[start : start + size]) for start in range(0, shape.numel(), size))

    def entries(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Entries]]:
        """The parameters in the order of their names, of which `read` is asked for no more than the values that are."""
        for name in sorted(self.parameters):
            yield name, Entries(self.parameters[name].shape, partial(self._values, name, read))

    def _values(self, name: str, read: Callable[[str], Tensor], flat: Tensor) -> Tensor:
        group = self.group_of(name)
        if group.pattern is not None and not self._moves(group):
            return self.parameter(name, read).reshape(-1)[flat]
        parts = self.in_checkpoint(name, flat)
        values = [read(part.name).reshape(-1)[part.index] for part in parts]
        return torch.cat(values)[torch.cat([part.which for part in parts]).argsort()]

    def stored(
        self, parameters: Callable[[str], Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint that the model has (`names`: at least those), of the values that its
        parameters (by name) hold, in their dtype: a view where it is the parameter itself."""
        for group in self.groups.values():
            if names is not None and set(names).isdisjoint((*group.names, *group.twins)):
                continue
            if group.pattern is None:
                if group.parameters[0] in self.parameters:  # not a buffer
                    for name in (*group.names, *group.twins):
                        yield name, parameters(group.parameters[0])
                continue
            yield from self._conversion(group).undone(parameters)


def saved_tensors(model: nn.Module) -> dict[str, Stored]:
    """The checkpoint that `save_pretrained` would write of a model, as names, shapes and dtypes."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: parameter.detach().to("meta") for name, parameter in base_parameters(model)}
    made = revert_weight_conversion(model, state)  # type: ignore[arg-type]
    return {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
