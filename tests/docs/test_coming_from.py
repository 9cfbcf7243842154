"""`docs/coming-from.md`: what stands in its tables exists, on either side where that side is installed."""

from __future__ import annotations

import dataclasses
import re
import typing

import peft
import pytest

import sparseft
from sparseft.config import RunConfig
from sparseft.methods import METHODS
from support.places import ROOT

TEXT = (ROOT / "docs" / "coming-from.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_setting_that_it_names_exists():
    groups = typing.get_type_hints(RunConfig)
    methods = {name for entry in METHODS.values() for name in vars_of(getattr(sparseft, entry.partition(":")[2]))}
    named = set(re.findall(r"\b(model|dataset|trainer|hardware|eval|method)\.(\w+)(?!\w|\()", TEXT))
    assert len(named) > 40
    for group, name in named:
        known = methods if group == "method" else vars_of(groups[group])
        assert name in known, f"{group}.{name}"
    for name in re.findall(r"experiment=(\w+)", TEXT):
        assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file(), name
    for name in re.findall(r"sparseft\.(\w+)\(", TEXT):
        assert hasattr(sparseft, name), name


def vars_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_pefts_names_are_its_own():
    left = [line.split("|")[1] for line in section("PEFT").splitlines() if line.startswith("| `")]
    for name in re.findall(r"model\.(\w+)\(", " ".join(left)):
        assert hasattr(peft.PeftModel, name) or hasattr(peft.LoraModel, name), name
    for name in re.findall(r"`(lora_\w+|target_modules)`", " ".join(left)):
        assert name in vars_of(peft.LoraConfig), name


def test_trls_names_are_its_own():
    trl = pytest.importorskip("trl")
    left = " ".join(line.split("|")[1] for line in section("TRL").splitlines() if line.startswith("| `"))
    names = re.findall(r"`([a-z_]+)(?:=True)?`", left)
    assert len(names) > 5
    for name in names:
        assert name in vars_of(trl.SFTConfig), name
