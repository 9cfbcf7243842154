"""Composing and checking configurations: what the YAML files hold, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseft import console
from sparseft.bench.trials import named_settings
from sparseft.compose import overrides, validation
from sparseft.compose import run_config as compose
from sparseft.compose.run_config import from_dict, points, to_yaml
from sparseft.config import BITSANDBYTES, OPTIMIZERS, SCHEDULERS, DatasetConfig, RunConfig
from sparseft.errors import UserError
from sparseft.methods import METHODS, get_method
from sparseft.rules import check_type, show
from sparseft.training.arguments import micro_batches
from support.places import ROOT

CONF = ROOT / "conf"
OPTIONS = [
    (group, path.stem)
    for group in overrides.GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]


def make(*words: str, command: str = "train", config_dirs: tuple[str, ...] = ()) -> RunConfig:
    return compose.compose(command, list(words), list(config_dirs))


def refused(*words: str, config_dirs: tuple[str, ...] = ()) -> str:
    """The message that the words are refused with; it never gives Hydra's advice."""
    with pytest.raises(UserError) as caught:
        make(*words, config_dirs=config_dirs)
    message = str(caught.value)
    assert "\n" not in message
    assert "+key" not in message and "To append" not in message
    return message


def field_names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", compose.COMMANDS)
def test_every_top_level_file_composes_to_a_full_run(command: str) -> None:
    config = make(command=command)
    assert (config.model.path, config.dataset.name, config.method_name) == ("bundled:tiny", "commonsense", "sylva")
    dataset = validation.SECTIONS["dataset"](hub_path=config.dataset.hub_path)
    assert config == RunConfig(validation.SECTIONS["model"](), dataset, "sylva", get_method("sylva")())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_composes(group: str, option: str) -> None:
    config = make(f"{group}={option}")
    named = {"model": config.model, "dataset": config.dataset, "hardware": config.hardware}
    if group in named:
        assert named[group].name == option
    if group == "method":
        assert config.method_name == option and type(config.method) is get_method(option)


def test_there_is_a_yaml_for_every_method() -> None:
    assert [option for group, option in OPTIONS if group == "method"] == sorted(METHODS)


def test_no_yaml_is_left_out() -> None:
    known = {f"{group}/{option}.yaml" for group, option in OPTIONS} | {f"{name}.yaml" for name in compose.COMMANDS}
    known |= {"_base.yaml"} | {f"{group}/_defaults.yaml" for group in ("model", "dataset", "hardware")}
    known |= {"dataset/_unchosen.yaml", "method/_sparse.yaml"}
    known |= {f"experiment/{path.name}" for path in (CONF / "experiment").glob("_*.yaml")}  # shared by presets
    assert {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} == known


@pytest.mark.parametrize("section", ["model", "dataset", "hardware"])
def test_the_defaults_of_a_group_are_its_dataclass(section: str) -> None:
    text = (CONF / section / "_defaults.yaml").read_text()
    content = yaml.safe_load(text)
    assert list(content) == field_names(validation.SECTIONS[section])
    assert content == dataclasses.asdict(validation.SECTIONS[section]())


@pytest.mark.parametrize("section", ["trainer", "eval", "chat", "bench"])
def test_the_base_file_holds_each_section(section: str) -> None:
    content = yaml.safe_load((CONF / "_base.yaml").read_text())
    assert list(content[section]) == field_names(validation.SECTIONS[section])
    assert content[section] == dataclasses.asdict(validation.SECTIONS[section]())
    assert set(content) - {"defaults", "trainer", "eval", "chat", "bench"} == set(validation.run_fields())


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_yaml_is_its_dataclass(name: str) -> None:
    content = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    if content.pop("defaults", None):
        content = yaml.safe_load((CONF / "method/_sparse.yaml").read_text()) | content
    assert content.pop("name") == name
    assert set(content) == set(field_names(get_method(name)))
    assert make(f"method={name}").method == get_method(name)()


def test_the_papers_runs() -> None:
    sylva = make("experiment=sylva_llama7b_oasst1")
    assert (sylva.model.path, sylva.dataset.name) == ("huggyllama/llama-7b", "oasst1")
    assert (sylva.method.sparsity, sylva.method.scope) == (0.95, "self_attn")
    assert (sylva.method.num_partition, sylva.method.block_size, sylva.method.num_samples) == (8, 64, 128)
    assert (sylva.trainer.batch_size, sylva.trainer.gradient_accumulation, sylva.trainer.max_length) == (1, 16, 512)
    rates = {"commonsense": 2e-4, "arithmetic": 1e-3}
    for name, rate in {f"s2ft_{m}_{data}": rate for m in ("llama2", "llama3") for data, rate in rates.items()}.items():
        s2ft = make(f"experiment={name}")
        assert s2ft.sparsity is None
        assert (s2ft.trainer.learning_rate, s2ft.trainer.adam_beta2, s2ft.trainer.batch_size) == (rate, 0.95, 16)
        assert (s2ft.trainer.gradient_accumulation, s2ft.trainer.num_epochs) == (4, 3)
        assert (s2ft.trainer.max_grad_norm, s2ft.trainer.weight_decay, s2ft.trainer.scheduler) == (1.0, 0.0, "linear")
        assert s2ft.model.dtype == "bfloat16"


SHAPES = {
    "llama2": ("meta-llama/Llama-2-7b-hf", {"intermediate_size": 11008, "vocab_size": 32000}, 56.6),
    "llama3": (
        "meta-llama/Meta-Llama-3-8B",
        {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8},
        56.4,
    ),
}


@pytest.mark.parametrize("data", ["commonsense", "arithmetic"])
@pytest.mark.parametrize("family", SHAPES)
def test_the_papers_parameter_counts(family: str, data: str) -> None:
    """S2FT's presets give the paper's trainable parameters (table 5) on the shapes of the models they name."""
    import torch
    import transformers

    from sparseft import compute_selection

    path, shape, millions = SHAPES[family]
    config = make(f"experiment=s2ft_{family}_{data}")
    assert config.model.path == path and config.method.allocation == "global"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, **shape)
        )
    selection = compute_selection(model, config.method)
    assert round(selection.meta["trainable_parameters"] / 1e6, 1) == millions


def test_the_quickstart_needs_no_network() -> None:
    config = make("experiment=quickstart")
    assert config.model.path == "bundled:tiny" and config.hardware.device == "cpu"


def test_names_of_transformers_are_all_there() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(SCHEDULERS) == {entry.value for entry in SchedulerType}
    names = [*OPTIMIZERS, *BITSANDBYTES, *validation.REFUSED_OPTIMIZERS]
    assert sorted(names) == sorted({entry.value for entry in OptimizerNames})


def test_conf_is_found_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("nonsense: true\n")
    assert make().model.name == "tiny"
    installed = tmp_path / "site-packages" / "sparseft"
    (installed / "conf").mkdir(parents=True)
    (installed / "conf" / "train.yaml").touch()
    monkeypatch.setattr(compose, "__file__", str(installed / "compose" / "run_config.py"))
    assert compose.conf_dir() == installed / "conf"
    (installed / "conf" / "train.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        compose.conf_dir()


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("gpu", "cuda"), ("GPU", "cuda"), ("CUDA", "cuda"), ("Cpu", "cpu"), ("Auto", "auto"), ("cuda", "cuda")],
)
def test_gpu_means_cuda_whatever_the_case(typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, in a file and in a `config.yaml`; what is recorded and used is the one name."""
    import torch

    from sparseft.models.loading import resolve_device

    config = make(f"hardware.device={typed}")
    again = from_dict(config.to_dict() | {"hardware": {"device": typed}})
    assert config.hardware.device == again.hardware.device == meant
    assert f"device: {meant}\n" in to_yaml(config)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        if available or meant != "cuda":
            expected = "cuda" if available and meant != "cpu" else "cpu"
            assert resolve_device(config.hardware.device).type == expected
        else:
            with pytest.raises(UserError, match="finds no CUDA device here"):
                resolve_device(config.hardware.device)


def test_contract_example() -> None:
    config = make(
        "model=llama3-8b", "method=s2ft", "dataset=commonsense", "hardware=1xl4", "sparsity=0.984",
        "trainer.learning_rate=2e-4",
    )  # fmt: skip
    assert config.model.path == "meta-llama/Meta-Llama-3-8B"
    assert config.hardware.device == "cuda" and config.hardware.gradient_checkpointing
    assert (config.sparsity, config.method.sparsity, config.trainer.learning_rate) == (0.984, 0.984, 2e-4)


@pytest.mark.parametrize(
    ("word", "section", "expected"),
    [
        ("trainer.max_steps=-1", "trainer.max_steps", -1),
        ("trainer.num_epochs=2", "trainer.num_epochs", 2.0),
        ("trainer.learning_rate=1e-4", "trainer.learning_rate", 1e-4),
        ("trainer.learning_rate='1e-4'", "trainer.learning_rate", 1e-4),
        ("trainer.max_steps= 7 ", "trainer.max_steps", 7),
        ("trainer.resume=auto", "trainer.resume", "auto"),
        ("trainer.optimizer=sgd", "trainer.optimizer", "sgd"),
        ("eval.batch_size=auto", "eval.batch_size", "auto"),
        ("eval.batch_size=4", "eval.batch_size", 4),
        ("eval.shots=0", "eval.shots", 0),
        ("overwrite=true", "overwrite", True),
        ("+overwrite=true", "overwrite", True),
        ("++seed=3", "seed", 3),
        ("dataset.eval_fraction=0", "dataset.eval_fraction", 0.0),
        ("bench.methods=[s2ft,lora]", "bench.methods", ["s2ft", "lora"]),
        ("trainer.save_steps=${seed}", "trainer.save_steps", 5),
        ("output_dir=runs/${method.name}-${seed}", "output_dir", "runs/sylva-5"),
        ("scope=null", "scope", None),
        ("scope='null'", "scope", "null"),
        ("~scope", "scope", None),
        ("~dataset.max_examples", "dataset.max_examples", None),
    ],
)
def test_values(word: str, section: str, expected: object) -> None:
    seed = [] if "seed=3" in word else ["seed=5"]
    value: object = make(*seed, "dataset.max_examples=9", "scope=mlp", word)
    for name in section.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_folders_of_ours_are_in_the_home_where_they_say_so() -> None:
    """As text is typed in quotes, or stands in a file."""
    config = make("cache_dir=~/c", "hardware.offload_dir=~/o")
    assert (config.cache_dir, config.hardware.offload_dir) == (os.path.expanduser("~/c"), os.path.expanduser("~/o"))
    assert from_dict(config.to_dict()) == config


def test_lists_of_a_method() -> None:
    assert make("method=s2ft", "method.roles=[o,down]").method.roles == ["o", "down"]
    assert make("method=lora", "method.targets=[q_proj,v_proj]").method.targets == ["q_proj", "v_proj"]
    for typed in ("q_proj", "all-linear"):  # as peft has it
        assert refused("method=lora", f"method.targets={typed}") == (
            f"method.targets={typed}: expected a list such as [q_proj,v_proj], or null for all linears in scope."
        )


AS_TYPED = [
    "a=b", "/data/lr=1e-4,seed=0/x.json", "x,y", "runs[1]", "{a}", "(b)", "~/data", "~x", "it's", 'say "hi"', "a b",
    "1e5", "001", "true", "0x10", "1_000", "a:b", "#c", "a#b", "$HOME", "back\\slash", "end\\", "%20", "null,null",
    "range(3)", "choice(a,b)", "None", "NULL", "[1", "é, ü", "+x", "@y", "a\tb", "'a' b", "'", "nan", "-",
]  # fmt: skip


@pytest.mark.parametrize("first", range(0, len(AS_TYPED), 4))
def test_text_reaches_the_field_as_typed(first: int) -> None:
    one, two, three, four = (AS_TYPED[(first + offset) % len(AS_TYPED)] for offset in range(4))
    config = make(f"dataset.train_path={one}", f"output_dir={two}", f"scope={three}", f"model.path={four}")
    assert (config.dataset.train_path, config.output_dir, config.scope, config.model.path) == (one, two, three, four)
    assert config.method.scope == three
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


PATHS = ["/home/jürgen/p.txt", "~/p.txt", "a#b.txt", "a&b.txt", "a=b", "größe.json:0.5", "it's", "a b"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_reach_lists_as_typed(path: str) -> None:
    assert make(f"trainer.sample_prompts={path}").trainer.sample_prompts == path
    assert make(f"trainer.sample_prompts=[{path},b.txt]").trainer.sample_prompts == [path, "b.txt"]
    assert make(f"method.exclude=[{path}]").method.exclude == [path]
    swept = points("train", [f"method.exclude=[{path}],[b]"])
    assert [make(*point).method.exclude for point in swept] == [[path], ["b"]]


def test_a_mix_has_files_of_any_name() -> None:
    assert make("dataset=[größe.json:0.5,~/b.json:0.5]").dataset.mix == ["größe.json:0.5", "~/b.json:0.5"]
    assert "several values make a sweep" in refused("trainer.sample_prompts=a#b.txt,c.txt")
    assert "cannot be read" in refused("method.exclude=[~/a,,b]")


@pytest.mark.parametrize(
    ("quoted", "plain"), [("'a,b'", "a,b"), ('"a b"', "a b"), (r"'it\'s'", "it's"), ("'1e5'", "1e5"), ("' a'", " a")]
)
def test_quotes_around_the_whole_value_are_taken_off(quoted: str, plain: str) -> None:
    assert make(f"output_dir={quoted}").output_dir == plain


@given(st.text(alphabet="ab'\"\\, =", max_size=12))
@settings(max_examples=300, deadline=None)
def test_quoting_agrees_with_hydras_parser(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString

    for quote in Quote:
        quoted = QuotedString(text, quote).with_quotes()
        assert overrides.unquote(quoted) == text
        assert OverridesParser.create().parse_override(f"key={quoted}").value() == text


@given(st.text(min_size=1, max_size=20))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_yaml_holds_any_text(text: str) -> None:
    config = RunConfig(validation.SECTIONS["model"](), validation.SECTIONS["dataset"](), "full", get_method("full")())
    config.output_dir = text
    written = yaml.safe_load(to_yaml(config))
    assert written["output_dir"] == text


@pytest.mark.parametrize("text", ["1e5", "1e-4", "007", "1_0", ".5", "true", "null", "~", "2024-01-01"])
def test_yaml_is_read_alike_by_omegaconf(text: str) -> None:
    from omegaconf import OmegaConf

    assert OmegaConf.create(to_yaml(make(f"output_dir='{text}'"))).output_dir == text


@pytest.mark.parametrize("name", METHODS)
def test_a_config_file_repeats_the_run(name: str) -> None:
    config = make(
        f"method={name}", "seed=7", "trainer.learning_rate=1e-5", "output_dir=o", "trainer.save_steps=3", "eval.shots=2"
    )
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", METHODS)
def test_a_config_file_is_an_experiment_with_two_lines_above_it(name: str, tmp_path: Path) -> None:
    """As docs/configuration.md has them."""
    words = ["seed=7", "hardware=4xa100", "dataset=json", "trainer.save_steps=3", "eval.shots=2"]
    config = make(f"method={name}", *words, *(["sparsity=0.95"] if name != "full" else []))
    page = (ROOT / "docs/configuration.md").read_text()
    head = re.search(r"```yaml\n(# @package _global_\n.*?)```", page, flags=re.DOTALL)
    assert head is not None
    write(tmp_path / "experiment/again.yaml", head[1].replace("s2ft", name) + to_yaml(config))
    assert make("experiment=again", config_dirs=(str(tmp_path),)) == config


@pytest.mark.parametrize(
    ("batch_size", "most", "at_once"), [(6, 4, 3), (7, 4, 1), (8, 2, 2), (3, 4, 3), (4, 4, 4), (6, None, 6)]
)
def test_a_batch_is_split_within_the_hardwares_limit(batch_size: int, most: int | None, at_once: int) -> None:
    config = make("hardware=1xl4", f"trainer.batch_size={batch_size}", f"hardware.micro_batch={show(most)}")
    assert config.hardware.at_once(batch_size) == at_once
    micro_steps = config.trainer.gradient_accumulation * batch_size // at_once
    assert micro_batches(config.trainer, config.hardware) == (at_once, micro_steps)


def test_composing_leaves_hydra_as_it_was(tmp_path: Path) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    make()
    make("method=s2ft")
    assert not GlobalHydra.instance().is_initialized()
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
        from hydra import compose as hydra_compose

        make()
        refused("model=nothing")
        assert hydra_compose("mine") == {"x": 1}
    assert not GlobalHydra.instance().is_initialized()


# -- sparsity, scope and seed -----------------------------------------------------------------------------------------


def test_shared_settings_reach_the_method() -> None:
    config = make("sparsity=0.9", "scope=mlp", "seed=4")
    assert (config.method.sparsity, config.method.scope, config.method.seed) == (0.9, "mlp", 4)
    config = make("method.sparsity=0.8", "seed=4", "method.seed=5")
    assert (config.sparsity, config.method.sparsity) == (None, 0.8)
    assert (config.seed, config.method.seed) == (4, 5)
    assert from_dict(config.to_dict()) == config


def test_a_files_own_seed_of_the_method_stands(tmp_path: Path) -> None:
    """Also where it is 0: a run that says both repeats. A seed on the command line is nearer than a file's."""
    config = make("seed=5", "method.seed=0")
    head = "# @package _global_\ndefaults:\n  - override /method: sylva\n"
    write(tmp_path / "experiment/again.yaml", head + to_yaml(config))
    write(tmp_path / "experiment/seeded.yaml", "# @package _global_\nseed: 5\n")
    write(tmp_path / "method/bare.yaml", "name: s2ft\n")
    folders = (str(tmp_path),)
    assert make("experiment=again", config_dirs=folders) == config == from_dict(config.to_dict())
    assert make("experiment=again", "seed=6", config_dirs=folders).method.seed == 6
    assert make("experiment=seeded", config_dirs=folders).method.seed == 5
    assert make("method=bare", "seed=4", config_dirs=folders).method.seed == 4


def test_null_undoes_what_files_share(tmp_path: Path) -> None:
    text = "# @package _global_\nmethod:\n  sparsity: 0.9\n  scope: mlp\n"
    write(tmp_path / "experiment/mine.yaml", text)
    config = make("experiment=mine", "sparsity=null", "scope=null", config_dirs=(str(tmp_path),))
    assert (config.sparsity, config.method.sparsity, config.scope, config.method.scope) == (None,) * 4
    config = make("experiment=mine", "sparsity=null", "method.sparsity=0.8", config_dirs=(str(tmp_path),))
    assert (config.method.sparsity, config.method.scope) == (0.8, "mlp")


def test_contradictions_are_refused() -> None:
    message = refused("sparsity=0.9", "method.sparsity=0.8")
    assert "sparsity=0.9 and method.sparsity=0.8" in message
    assert "method.scope" in refused("scope=mlp", "method.scope=self_attn")
    assert make("sparsity=0.9", "method.sparsity=0.9").method.sparsity == 0.9
    content = make("sparsity=0.9").to_dict()
    content["method"]["sparsity"] = 0.5
    with pytest.raises(UserError, match="contradict"):
        from_dict(content)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = make("experiment=sylva_llama7b_oasst1", "sparsity=0.5", "scope=null", "method.num_partition=2")
    assert (config.method.sparsity, config.method.scope, config.method.num_partition) == (0.5, None, 2)
    config = make("experiment=sylva_llama7b_oasst1", "method.sparsity=0.6")
    assert (config.sparsity, config.method.sparsity) == (0.6, 0.6)
    assert make("experiment=quickstart", "model=gpt2").model.name == "gpt2"
    assert make("experiment=quickstart", "experiment=null") == make()


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ("quickstart", ["method=lora"]),
        ("quickstart", ["model=gpt2"]),
        ("s2ft_llama2_alpaca", ["dataset=commonsense"]),
        ("s2ft_llama2_alpaca", ["model=tiny", "dataset=oasst1", "method=sylva", "hardware=1xl4"]),
        ("step_llama2_7b", ["hardware=cpu"]),
    ],
)
def test_an_option_takes_the_place_of_an_experiments_section(experiment: str, words: list[str]) -> None:
    """All of it, with what the experiment sets there; the other sections stay the experiment's."""
    console.clear_warnings()
    chosen, options, its_own = make(f"experiment={experiment}", *words), make(*words), make(f"experiment={experiment}")
    typed = [word.partition("=")[0] for word in words]
    for section in ("model", "dataset", "method", "hardware", "trainer", "eval", "bench"):
        expected = getattr(options if section in typed else its_own, section)
        if section == "method":  # which shares the experiment's sparsity and scope
            expected = dataclasses.replace(expected, sparsity=chosen.sparsity, scope=chosen.scope)
        assert getattr(chosen, section) == expected
    assert console.recorded_warnings() == []


def test_an_experiments_own_option_keeps_its_section() -> None:
    for word in ("method=sylva", "model=tiny", "dataset=commonsense", "hardware=cpu"):
        assert make("experiment=quickstart", word) == make("experiment=quickstart")
    assert make("experiment=s2ft_llama2_alpaca", "dataset=json").dataset.hub_path == "vicgalle/alpaca-gpt4"
    config = make("experiment=quickstart", "method=lora", "method.alpha=3", "model=gpt2", "model.dtype=bfloat16")
    assert (config.method.alpha, config.model.dtype) == (3, "bfloat16")


@pytest.mark.parametrize("experiment", ["fusion", "fusion_smollm2"])
def test_skills_are_trained_with_the_experiments_settings(experiment: str) -> None:
    """Which those of a data set are only where a skill chooses no option in their place."""
    of_all = make(f"experiment={experiment}")
    for _, words in named_settings("bench.skills", of_all.bench.skills):
        own = make(f"experiment={experiment}", *words).dataset
        assert own.eval_fraction == of_all.dataset.eval_fraction != DatasetConfig().eval_fraction or own.max_examples
        assert own.max_examples == of_all.dataset.max_examples
        path = own.train_path or own.hub_path
        assert path is None or own.name in path


@pytest.mark.parametrize(
    ("ran", "word"),
    [
        ("method=sylva method.block_size=8", "method=lora"),
        ("model=tiny model.dtype=float32", "model=qwen2.5-0.5b"),
        ("model=qwen2.5-0.5b", "model=tiny"),
        ("dataset=commonsense dataset.train_path=a.json", "dataset=arithmetic"),
        ("experiment=s2ft_llama2_alpaca", "dataset=commonsense"),
        ("hardware=cpu", "hardware=1xh100"),
    ],
)
def test_an_option_takes_the_place_of_a_runs_section(ran: str, word: str, tmp_path: Path) -> None:
    """A run's `config.yaml` as an experiment has whole sections, and chooses no option but the method."""
    config = make(*ran.split())
    head = f"# @package _global_\ndefaults:\n  - override /method: {config.method_name}\n"
    write(tmp_path / "experiment/again.yaml", head + to_yaml(config))
    again = make("experiment=again", word, config_dirs=(str(tmp_path),))
    section = word.partition("=")[0]
    expected = dataclasses.asdict(make(word))[section] | ({"dtype": again.model.dtype} if section == "model" else {})
    assert dataclasses.asdict(again)[section] == expected
    if section != "dataset":
        same = f"{section}={config.method_name if section == 'method' else getattr(config, section).name}"
        assert make("experiment=again", same, config_dirs=(str(tmp_path),)) == config


def test_composing_again_is_quick_and_of_its_own() -> None:
    """Hydra composes shipped files once; what a run makes of them is its own."""
    first = make("trainer.max_steps=3", "method.exclude=[a]")
    kept = len(compose._COMPOSED)
    assert make() != first and make() == make() and len(compose._COMPOSED) == kept


def test_a_setting_without_effect_is_warned_about() -> None:
    console.clear_warnings()
    make("method=full", "sparsity=0.9")
    assert ["sparsity=0.9 has no effect" in warning for warning in console.recorded_warnings()] == [True]


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # groups and options
        ("model=tny", ["Unknown model 'tny'", "Did you mean 'tiny'?", "model.path"]),
        ("method=sylvia", ["Unknown method", "Did you mean 'sylva'?"]),
        ("dataset=oast1", ["Unknown dataset", "Did you mean 'oasst1'?"]),
        ("hardware=cqu", ["Unknown hardware", "Did you mean 'cpu'?"]),
        ("experiment=quickstrat", ["Unknown experiment", "Did you mean 'quickstart'?"]),
        ("modle=tiny", ["Unknown key 'modle'", "Did you mean 'model'?"]),
        ("+modle=tiny", ["Unknown key 'modle'", "Did you mean 'model'?"]),
        ("model=_defaults", ["Unknown model '_defaults'"]),
        ("model=", ["Unknown model ''"]),
        ("model=tiny,gpt2", ["--multirun"]),
        ("model@other=tiny", ["Unknown key 'model@other'"]),
        ("~model", ["always needed", "model=NAME"]),
        # keys
        ("trainer.max_step=5", ["Unknown key 'trainer.max_step'", "Did you mean 'trainer.max_steps'?"]),
        ("+trainer.max_step=5", ["Unknown key 'trainer.max_step'", "Did you mean 'trainer.max_steps'?"]),
        ("++trainer.new=5", ["Unknown key 'trainer.new'", "Available", "trainer.max_steps"]),
        ("~trainer.max_step", ["Unknown key 'trainer.max_step'", "Did you mean 'trainer.max_steps'?"]),
        ("trainer.lr=1", ["Did you mean 'trainer.learning_rate'?"]),
        ("learning_rate=1", ["Did you mean 'trainer.learning_rate'?"]),
        ("batch_size=1", ["trainer.batch_size", "eval.batch_size", "bench.batch_size"]),
        ("sparcity=0.9", ["Did you mean 'sparsity'?"]),
        ("trainr.max_steps=1", ["Did you mean 'trainer.max_steps'?"]),
        ("method.blocksize=8", ["method=sylva has no setting 'method.blocksize'", "Did you mean 'method.block_size'?"]),
        ("method.q_ratio=0.1", ["method=sylva has no setting 'method.q_ratio'", "belongs to s2ft"]),
        ("method.name=lora", ["method=lora"]),
        ("trainer=5", ["'trainer' is a group of settings", "trainer.max_steps"]),
        ("hydra.run.dir=x", ["Unknown key 'hydra.run.dir'"]),
        ("~seed", ["seed is always needed"]),
        ("=5", ["names no key"]),
        # types
        ("trainer.max_steps=abc", ["trainer.max_steps=abc", "a whole number"]),
        ("trainer.max_steps=1.5", ["trainer.max_steps=1.5", "a whole number"]),
        ("trainer.max_steps=true", ["trainer.max_steps=true", "a whole number"]),
        ("trainer.max_steps=null", ["trainer.max_steps=null", "a whole number"]),
        ("trainer.max_steps=1,2", ["--multirun"]),
        ("trainer.max_steps=range(1,3)", ["--multirun"]),
        ("trainer.max_steps=[1", ["cannot be read", "a whole number"]),
        ("trainer.max_steps=", ["trainer.max_steps=:", "a whole number"]),
        ("trainer.learning_rate=fast", ["trainer.learning_rate=fast", "a number, more than 0", "or auto"]),
        ("trainer.learning_rate=nan", ["finite"]),
        ("trainer.learning_rate=inf", ["finite"]),
        ("trainer.learning_rate=true", ["a number"]),
        ("overwrite=yes", ["overwrite=yes", "true or false"]),
        ("overwrite=1", ["overwrite=1", "true or false"]),
        ("bench.methods=s2ft", ["a list such as"]),
        ("bench.methods=[s2ft,1]", ["bench.methods[1]=1", "text"]),
        ("cache_dir=null", ["cache_dir=null", "text"]),
        ("model.path=", ["model.path is empty"]),
        ("scope=", ["scope is empty", "scope=null"]),
        ("output_dir=${nothing}", ["output_dir", "nothing"]),
        ("output_dir=${hydra:runtime.cwd}", ["output_dir"]),
        # allowed values
        ("model.dtype=flaot32", ["model.dtype=flaot32", "Did you mean 'float32'?"]),
        ("model.dtype=float32,bfloat16", ["--multirun"]),
        ("hardware.device=tpu", ["hardware.device=tpu", "auto, cpu, cuda"]),
        ("hardware.device=cuda:1", ["hardware.device=cuda:1", "auto, cpu, cuda", "CUDA_VISIBLE_DEVICES=1"]),
        ("hardware.zero_stage=4", ["hardware.zero_stage=4", "0, 1, 2, 3"]),
        ("eval.split=tset", ["eval.split=tset", "Did you mean 'test'?"]),
        ("dataset.format=alpca", ["dataset.format=alpca", "Did you mean 'alpaca'?"]),
        ("dataset.too_long=cut", ["dataset.too_long=cut", "drop"]),
        ("trainer.scheduler=liner", ["trainer.scheduler=liner", "Did you mean 'linear'?"]),
        ("trainer.optimizer=adamw", ["trainer.optimizer=adamw", "Did you mean 'adamw_torch'?"]),
        ("trainer.resume=yes", ["trainer.resume=yes", "auto"]),
        ("eval.batch_size=atuo", ["eval.batch_size=atuo", "auto"]),
        ("eval.batch_size=0", ["eval.batch_size=0", "at least 1"]),
        ("bench.methods=[s2tf]", ["bench.methods=s2tf", "Did you mean 's2ft'?"]),
        ("bench.methods=[]", ["bench.methods is empty"]),
        ("method.importance=gradeint", ["gradeint", "Did you mean 'gradient'?"]),
        ("method.order=largset", ["largset", "Did you mean 'largest'?"]),
        ("method.allocation=globl", ["globl", "Did you mean 'global'?"]),
        ("method=s2ft method.layout=gathered", ["gathered", "Did you mean 'gather'?"]),
        ("method=s2ft method.roles=[o,dwon]", ["dwon", "Did you mean 'down'?"]),
        ("method.block_size=10", ["method.block_size=10", "4, 8, 16, 32, 64, 128"]),
        # ranges
        ("sparsity=1.0", ["sparsity=1.0", "between 0 and 1"]),
        ("sparsity=0", ["sparsity=0.0", "between 0 and 1"]),
        ("sparsity=98.4", ["sparsity=98.4", "between 0 and 1"]),
        ("method.sparsity=-0.5", ["sparsity=-0.5", "between 0 and 1"]),
        ("dataset.eval_fraction=1", ["dataset.eval_fraction=1.0", "below 1"]),
        ("trainer.learning_rate=0", ["trainer.learning_rate=0.0", "more than 0"]),
        ("trainer.learning_rate=1e300", ["trainer.learning_rate=1e+300", "3.4e38"]),
        ("trainer.learning_rate=1e-300", ["trainer.learning_rate=1e-300", "1.2e-38"]),  # 0 in fp32
        ("trainer.weight_decay=1e300", ["trainer.weight_decay=1e+300", "3.4e38"]),
        ("trainer.num_epochs=1e300", ["trainer.num_epochs=1e+300", "at most 1e9"]),
        (f"trainer.max_steps={10**20}", [f"trainer.max_steps={10**20}", f"at most {2**63 - 1}"]),
        (f"trainer.batch_size={10**22}", [f"trainer.batch_size={10**22}", f"at most {2**63 - 1}"]),
        ("trainer.batch_size=0", ["trainer.batch_size=0", "at least 1"]),
        ("trainer.gradient_accumulation=-1", ["at least 1"]),
        ("trainer.max_steps=0", ["trainer.max_steps=0", "-1"]),
        ("trainer.num_epochs=0", ["more than 0"]),
        ("trainer.adam_beta2=1", ["trainer.adam_beta2=1.0", "below 1"]),
        ("dataset.max_examples=0", ["at least 1"]),
        ("eval.limit=0", ["eval.limit=0", "at least 1"]),
        ("seed=-1", ["seed=-1"]),
        ("hardware.num_processes=0", ["at least 1"]),
        ("method=s2ft sparsity=0.9 method.o_ratio=0.1", ["sparsity=0.9", "ratios"]),
        ("method=s2ft method.roles=[q,v] method.d_ratio=0.1", ["method.roles and method.d_ratio both say what trains"]),
        ("experiment=s2ft_llama2_alpaca method.roles=[q]", ["method.roles and method.o_ratio, method.d_ratio both"]),
        # what a preference objective does not go with
        ("objective=dop", ["objective=dop", "Did you mean 'dpo'?"]),
        ("trainer.beta=0.2", ["trainer.beta=0.2", "objective=sft has none"]),
        ("objective=dpo trainer.beta=0", ["trainer.beta=0.0", "more than 0"]),
        ("objective=dpo trainer.compile=layers", ["trainer.compile=layers", "use none"]),
        ("objective=dpo trainer.label_smoothing=0.1", ["trainer.label_smoothing=0.1", "TRL's", "use 0.0"]),
        ("objective=orpo method=lora method.dropout=0.1", ["method.dropout=0.1", "objective=orpo", "use 0.0"]),
        ("objective=dpo trainer.pad_to=max_length", ["trainer.pad_to=max_length", "use longest"]),
        ("objective=ipo trainer.learning_rate=auto", ["trainer.learning_rate=auto", "give a number"]),
        ("objective=orpo dataset.packing=true", ["dataset.packing=true", "use false"]),
        ("objective=dpo dataset=[a.json:0.5,b.json:0.5]", ["dataset.mix=[a.json:0.5,b.json:0.5]", "use null"]),
        ("objective=dpo dataset.replay=a.json:0.1", ["dataset.replay", "objective=dpo", "use null"]),
        ("objective=dpo trainer.checkpointing=selective", ["trainer.checkpointing=selective", "none or full"]),
        ("objective=simpo hardware.zero_stage=2", ["hardware.zero_stage=2", "one process"]),
        ("objective=kto trainer.batch_size=1", ["trainer.batch_size=1", "use 2 or more"]),
        ("objective=kto trainer.batch_size=4 hardware.micro_batch=1", ["hardware.micro_batch=1", "use 2 or more"]),
        (
            "objective=kto trainer.batch_size=3 hardware.micro_batch=2",
            ["hardware.micro_batch=2 with trainer.batch_size=3"],
        ),
    ],
)
def test_wrong_input(words: str, expected: list[str]) -> None:
    message = refused(*words.split(" "))
    for part in expected:
        assert part in message


def test_a_preference_objective_brings_its_data_set() -> None:
    assert make("objective='dpo'").dataset.name == "preference"
    assert make("objective=dpo").dataset.name == "preference" and make().dataset.name == "commonsense"
    assert (
        make("objective=sft").dataset.name == "commonsense"
        and make("objective=dpo", "dataset=json").dataset.name == "json"
    )
    assert make("objective=dpo", "dataset.train_path=a.jsonl").dataset.name == "preference"
    assert make("objective=simpo", "trainer.beta=2.5").trainer.beta == 2.5


def test_a_preference_objective_has_no_dropout() -> None:
    """Also a run of an earlier version, which says a number that TRL made 0."""
    config = make("objective=dpo", "method=lora")
    assert config.method.dropout == 0.0 and make("method=lora").method.dropout == 0.05
    assert make("objective=dpo", "method=dora", "method.dropout=0").method.dropout == 0.0
    content = config.to_dict()
    content["method"]["dropout"] = 0.05
    assert from_dict(content) == config


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("objective=kto", (4, 4)),
        ("objective=kto trainer.batch_size=2", (2, 4)),
        ("objective=kto trainer.gradient_accumulation=1", (4, 1)),
        ("objective='kto'", (4, 4)),
        ("objective=dpo", (1, 16)),
    ],
)
def test_kto_takes_several_answers_at_once(words: str, step: tuple[int, int]) -> None:
    trainer = make(*words.split()).trainer
    assert (trainer.batch_size, trainer.gradient_accumulation) == step


# -- the user's own files ---------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_config_dir_adds_files(tmp_path: Path) -> None:
    folder = tmp_path / "my, [conf]='s"
    write(folder / "model" / "mine.yaml", "name: mine\npath: /models/mine\n")
    write(
        folder / "experiment" / "big.yaml",
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /method: s2ft\n"
        "sparsity: 0.9\ntrainer:\n  learning_rate: 1e-4\n",
    )
    config = make("model=mine", config_dirs=(str(folder),))
    assert (config.model.path, config.model.dtype) == ("/models/mine", "auto")
    config = make("experiment=big", "trainer.max_steps=3", config_dirs=(str(folder),))
    assert (config.model.name, config.method_name, config.method.sparsity) == ("mine", "s2ft", 0.9)
    assert (config.trainer.learning_rate, config.trainer.max_steps) == (1e-4, 3)
    assert "Did you mean 'mine'?" in refused("model=mien", config_dirs=(str(folder),))


def test_config_dir_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "own" / "hardware" / "box.yaml", "name: box\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    assert make("hardware=box", config_dirs=("own",)).hardware.device == "cpu"


@pytest.mark.parametrize(
    ("name", "text", "word", "expected"),
    [
        ("model/bad.yaml", "path: [1\n", "model=bad", ["bad.yaml, line", "not valid YAML"]),
        ("model/bad.yaml", "path: ${nosuch\n", "model=bad", ["at path", "${nosuch"]),
        ("model/bad.yaml", "pth: x\n", "model=bad", ["Unknown key 'model.pth'", "Did you mean 'path'?"]),
        ("model/bad.yaml", "path: 5\n", "model=bad", ["model.path=5", "text", "quote"]),
        ("model/bad.yaml", "defaults:\n  - tinny\n", "model=bad", ["model/tinny.yaml", "model/bad", "'tiny'"]),
        ("method/bad.yaml", "name: s2tf\n", "method=bad", ["Unknown method 's2tf'", "'s2ft'"]),
        ("method/bad.yaml", "sparsity: 0.5\n", "method=bad", ["method.name is missing"]),
        ("experiment/bad.yaml", "seed: 1\n", "experiment=bad", ["@package _global_"]),
        ("experiment/bad.yaml", "# @package _global_\nsede: 1\n", "experiment=bad", ["'sede'", "'seed'"]),
        ("experiment/bad.yaml", "# @package _global_\ntrainer: 1\n", "experiment=bad", ["trainer"]),
        ("experiment/bad.yaml", "# @package _global_\nseed: ${sede}\n", "experiment=bad", ["seed", "sede"]),
        (
            "experiment/bad.yaml",
            "# @package _global_\ndefaults:\n  - override /modle: tiny\n",
            "experiment=bad",
            ["modle"],
        ),
        ("model/tiny.yaml", "path: x\n", "seed=1", ["tiny.yaml", "ships a model of that name"]),
    ],
)
def test_mistakes_in_own_files(tmp_path: Path, name: str, text: str, word: str, expected: list[str]) -> None:
    write(tmp_path / name, text)
    message = refused(word, config_dirs=(str(tmp_path),))
    for part in expected:
        assert part in message


def test_an_interrupt_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra makes an error of its own of whatever OmegaConf raises, also where a signal had come."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf.errors import OmegaConfBaseException

    def interrupted(*_: object, **__: object) -> None:
        raise OmegaConfBaseException() from KeyboardInterrupt()

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", interrupted)
    monkeypatch.setattr(compose, "_COMPOSED", {})  # what is composed already is not composed again
    with pytest.raises(KeyboardInterrupt):
        make()


def test_a_missing_config_dir_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(config_dirs=(str(tmp_path / "nowhere"),))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": "x"}, "seed=x"),
        ({"sede": 1}, "Did you mean 'seed'"),
        ({"method": {"name": "nothing"}}, "Unknown method"),
        ({"method": None}, "method.name is missing"),
        ({"trainer": {"max_stps": 1}}, "Did you mean 'max_steps'"),
        ({"sparsity": 2.0, "method": {"name": "sylva"}}, "between 0 and 1"),
    ],
)
def test_mistakes_in_a_config_file(change: dict, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        from_dict(make().to_dict() | change)


def test_a_config_file_may_be_partial_and_spell_numbers_freely() -> None:
    config = from_dict(yaml.safe_load("method: {name: s2ft}\nsparsity: 0.9\ntrainer: {learning_rate: 1e-4}\n"))
    assert config.trainer.learning_rate == 1e-4 and config.method.sparsity == 0.9


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1"], [["seed=1"]]),
        ([], [[]]),
        (["method=s2ft,lora", "seed=1,2"], [[f"method={m}", f"seed={s}"] for m in ("s2ft", "lora") for s in (1, 2)]),
        (["seed=range(1,4)"], [["seed=1"], ["seed=2"], ["seed=3"]]),
        (["seed=choice(5,7)", "~scope"], [["seed=5", "~scope"], ["seed=7", "~scope"]]),
        (["+method=choice(s2ft,full)"], [["method=s2ft"], ["method=full"]]),
        (["hardware=glob(1x*)"], [["hardware=1xh100"], ["hardware=1xl4"]]),
        (["method=glob([s*,l*])"], [["method=lora"], ["method=losia"], ["method=s2ft"], ["method=sylva"]]),
        (["trainer.learning_rate=1e-4,2e-4"], [["trainer.learning_rate=0.0001"], ["trainer.learning_rate=0.0002"]]),
        (["scope=mlp,self_attn,null"], [["scope=mlp"], ["scope=self_attn"], ["scope=null"]]),
        (["output_dir='a,b',c"], [["output_dir='a,b'"], ["output_dir=c"]]),
        (["output_dir='a,b'"], [["output_dir='a,b'"]]),
        (["output_dir=/x=1/a.json,~/b.json"], [["output_dir=/x=1/a.json"], ["output_dir=~/b.json"]]),
        (["dataset.train_path=a[1,2].json"], [["dataset.train_path=a[1,2].json"]]),
        (["dataset.train_path=it's,b"], [["dataset.train_path=it's"], ["dataset.train_path=b"]]),
        (["scope=choice(1e5,'a,b')"], [["scope=1e5"], ["scope='a,b'"]]),
        (["bench.methods=[s2ft,lora],[full]"], [["bench.methods=[s2ft,lora]"], ["bench.methods=[full]"]]),
        (["bench.methods=[s2ft,lora]"], [["bench.methods=[s2ft,lora]"]]),
        (["method.rank=1,2"], [["method.rank=1"], ["method.rank=2"]]),
        (["nothing=1,2"], [["nothing=1,2"]]),
        (["overwrite=true,false"], [["overwrite=True"], ["overwrite=False"]]),
    ],
)  # fmt: skip
def test_points(words: list[str], expected: list[list[str]]) -> None:
    assert points("train", words) == expected


def test_points_compose() -> None:
    swept = points("train", ["method=s2ft,lora", "scope='a,b',1e5", "overwrite=true,false", "seed=choice(1,2)"])
    configs = [make(*point) for point in swept]
    assert len(configs) == 16
    assert {config.scope for config in configs} == {"a,b", "1e5"}
    assert [config.seed for config in configs[:4]] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainer.learning_rate=interval(0,1)", "range("),
        ("hardware=glob(z*)", "matches nothing"),
        ("trainer.max_steps=glob(*)", "group"),
        ("trainer.max_steps=1,,2", "cannot be read"),
        ("scope=a,,b", "empty value"),
        ("trainer.max_steps", "key=value"),
    ],
)
def test_wrong_sweeps(word: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        points("train", [word])


def test_runs_of_before_compile_as_they_did() -> None:
    content = make().to_dict()
    for before, now in ((True, "model"), (False, "none")):
        old = content | {
            "hardware": content["hardware"] | {"compile": before},
            "trainer": {name: value for name, value in content["trainer"].items() if name not in ("compile", "pad_to")},
        }
        assert from_dict(old).trainer.compile == now
        assert "compile" in old["hardware"]  # what was given is left as it was
    with pytest.raises(UserError, match="Unknown key 'hardware.compile' in .* Did you mean 'trainer.compile'"):
        make("hardware.compile=true")


@pytest.mark.parametrize(("value", "shown"), [("3", "'3'"), ("null", "'null'"), ("1e3x", "1e3x"), (True, "true")])
def test_text_that_looks_like_a_number_is_shown_in_quotes(value: object, shown: str) -> None:
    """Of a config made in Python: `method.rank=3: expected a whole number` would be a riddle."""
    with pytest.raises(UserError, match=f"^method.rank={shown}: expected a whole number or null"):
        check_type("method.rank", value, int | None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("method.layers=null", r"all, upper:SHARE .* or 12-29\."),
        ("method.layers=true", r"all, upper:SHARE .* or 12-29\."),
        ("method.num_samples=many", r"a whole number of calibration examples, .* such as 0\.01 or null\."),
        ("trainer.batch_size=many", r"a whole number\."),
    ],
)
def test_a_wrong_type_names_what_the_rule_takes(words: str, expected: str) -> None:
    """Not the types that stand in the annotation so that the rule gets to see such values."""
    with pytest.raises(UserError, match=f"^{words}: expected {expected}$"):
        make("method=sylva", words)


def test_a_models_folder_does_not_read_as_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's files are read where the folder is not there: for the model card, say."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny", "tokenizers/mine"):
        (tmp_path / folder).mkdir(parents=True)
    for tokenizer, named in (("tokenizers/mine", "./tokenizers/mine"), ("meta/Chat", "meta/Chat")):
        model = compose.compose("train", ["model.path=models/tiny", f"model.tokenizer={tokenizer}"]).model
        assert (model.path, model.tokenizer) == ("./models/tiny", named)
        earlier = from_dict({"model": {"path": "models/tiny", "tokenizer": tokenizer}, "method": {"name": "s2ft"}})
        assert (earlier.model.path, earlier.model.tokenizer) == (
            model.path,
            model.tokenizer,
        )  # a run that was started by another version goes on
