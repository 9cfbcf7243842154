"""The keys that can be set: which there are, their types, and what was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
from typing import Any

from sparseft.compose import validation
from sparseft.compose.overrides import GROUPS, Override
from sparseft.errors import UserError, nearest
from sparseft.methods import METHODS, get_method
from sparseft.rules import field_types, is_mapping


def known_keys(method_name: str | None = None) -> dict[str, Any]:
    """Every key that can be set, with its type; the method's own keys only if a method is given."""
    keys = dict(validation.run_fields())
    for section, section_class in validation.SECTIONS.items():
        keys |= {f"{section}.{name}": hint for name, hint in field_types(section_class).items()}
    if method_name is not None:
        keys |= {f"method.{name}": hint for name, hint in method_fields(method_name).items()}
    return keys


def annotation_of(key: str, keys: dict[str, Any]) -> Any:
    """The type of a key, also of one below a setting that holds others by any name; None where there is no such key."""
    group = keys.get(key.rpartition(".")[0])
    return Any if key not in keys and group is not None and is_mapping(group) else keys.get(key)


def method_fields(name: str) -> dict[str, Any]:
    return field_types(get_method(name))


def check_key(override: Override, keys: dict[str, Any], method_name: str) -> None:
    """Refuses a key that does not exist, with the nearest that does."""
    key = override.key
    if annotation_of(key, keys) is not None or (key == "method.name" and override.value == method_name):
        return
    if key == "method.name":
        raise UserError(f"{override.word}: the method is chosen as a whole, with method={override.value}.")
    sections = {name.split(".")[0] for name in keys if "." in name}
    if key in sections:
        first = next(name for name in keys if name.startswith(f"{key}."))
        raise UserError(f"{override.word}: '{key}' is a group of settings; set one of them, as in {first}=….")
    if key.startswith("method."):
        owners = [name for name in METHODS if key.removeprefix("method.") in method_fields(name)]
        other = f" (it belongs to {', '.join(owners)})" if owners else ""
        raise UserError(
            f"method={method_name} has no setting '{key}'{other}.{'' if owners else _nearest_key(key, keys)}"
        )
    raise UserError(f"Unknown key '{key}' in {override.word}.{_nearest_key(key, keys)}")


def _nearest_key(key: str, keys: dict[str, Any]) -> str:
    """Where a key that does not exist was probably meant to go, else what there is instead.

    Compares last parts within a section: whole keys would find `trainer.resume` near `trainer.lr`.
    """
    section, _, name = key.rpartition(".")
    same_name = [known for known in keys if known.rpartition(".")[2] == name]
    if same_name:
        return f" Did you mean {' or '.join(repr(known) for known in same_name)}?"
    siblings = [known for known in keys if known.rpartition(".")[0] == section]
    if not section:
        siblings += GROUPS
    pools = [siblings] if section and siblings else [siblings, list(keys)]
    for pool in pools:
        by_name = {known.rpartition(".")[2]: known for known in reversed(pool)}
        initials = {"".join(word[:1] for word in part.split("_")): part for part in by_name if "_" in part}  # lr
        close = [initials[name]] if name in initials else difflib.get_close_matches(name, by_name, n=1)
        if close:
            return f" Did you mean '{by_name[close[0]]}'?"
    whole = nearest(key, keys)
    if section and siblings or not whole.startswith(" Did you mean"):
        sections = {known.split(".")[0] for known in keys if "." in known}
        return nearest("", siblings or sections)
    return whole
