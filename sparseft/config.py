"""What a run is made of, as plain dataclasses, each field with what it may hold. `conf/` says what each means.

`compose/` fills them from `conf/` and the command line; nothing below `commands/` sees Hydra's own types.
No torch here: `sparseft --help` and `--cfg` stay fast.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from sparseft.rules import A_DAY, ABOVE_0, AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, BELOW_1, Rule

BUNDLED = "bundled:"  # paths that start so lie inside the package
BUNDLED_ROOT = Path(__file__).resolve().parent / "bundled"


def in_bundle(path: str) -> Path | None:
    """The file or folder that `bundled:tiny` or `bundled:data/text/train.txt` names, also without `data/`; None where
    nothing of that name is bundled."""
    name = path.removeprefix(BUNDLED)
    found = ((root / name).resolve() for root in (BUNDLED_ROOT, BUNDLED_ROOT / "data"))
    return next((each for each in found if each.is_relative_to(BUNDLED_ROOT) and each.exists()), None)


# Spelt out because importing transformers takes seconds; a test holds them equal to the installed library's.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
# These train every method here and are tested with it; transformers' other names are bitsandbytes' or refused.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = tuple(
    """adamw_bnb_8bit adamw_8bit ademamix ademamix_8bit lion_32bit lion_8bit paged_adamw_32bit paged_adamw_8bit
    paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit
    rmsprop_bnb_32bit""".split()
)

# What a run learns from: examples to imitate (sft), or which of two answers is better, on TRL's trainers.
OBJECTIVES = ("sft", "dpo", "ipo", "kto", "orpo", "simpo")

SMALLEST_FP32, LARGEST_FP32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # weights and their updates are fp32 at most

SPARSITY = Rule(
    lambda value: 0 < value < 1,
    "a share between 0 and 1, both excluded (0.984 freezes 98.4 % of the weights in scope)",
)
SEED = Rule(lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
STEPS = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 to let trainer.num_epochs decide")
EPOCHS = Rule(lambda value: 0 < value <= 1e9, "more than 0, at most 1e9")
RATE = Rule(
    lambda value: SMALLEST_FP32 <= value <= LARGEST_FP32,
    "more than 0, and what fp32 can hold (from 1.2e-38 to 3.4e38)",
)
AUTO = "auto"  # of trainer.learning_rate: found by a ramp
RATE_OR_AUTO = Rule(
    lambda value: value == AUTO or (isinstance(value, float) and RATE.holds(value)),
    f"a number, {RATE.expected}, or auto",
)
DECAY = Rule(lambda value: 0 <= value <= LARGEST_FP32, "at least 0, and what fp32 can hold (up to 3.4e38)")
AVERAGE = Rule(
    lambda value: (found := re.fullmatch(r"(?:last|ema):(0?\.\d+)", value)) is not None and float(found[1]) > 0,
    "last:SHARE (the mean over that share of the steps, at the end) or ema:DECAY, each number between 0 and 1, such as "
    "last:0.25",
)
WHOLE_OR_AUTO = Rule(
    lambda value: value == "auto" or (isinstance(value, int) and value >= 1), "a whole number of at least 1, or auto"
)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # each an extra of the package, by the same name
ACCURACY = Rule(lambda value: 0 < value <= 1, "an accuracy above 0, at most 1")
SHARE = Rule(lambda value: 0 < value <= 1, "a share above 0, at most 1")


@dataclass
class ModelConfig:
    """A causal language model: a Hugging Face id, a folder, a GGUF file, or `bundled:tiny`."""

    name: str = "tiny"
    path: str = "bundled:tiny"
    tokenizer: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "nf4", "int8", "int4"] = "none"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Training examples. With the bundled model a null `train_path` is the bundled set of the family `name`,
    with any other model it is `hub_path`."""

    name: str = "commonsense"
    train_path: str | None = None
    mix: list[str] | None = None
    stopping: Literal["first", "all"] = "first"
    replay: str | None = None
    eval_path: str | None = None
    hub_path: str | None = None
    hub_split: str = "train"
    streaming: bool = False
    eval_fraction: Annotated[float, BELOW_1] = 0.05
    format: Literal[
        "auto", "alpaca", "guanaco", "messages", "oasst_trees", "prompt_completion", "text", "preference", "unpaired"
    ] = "auto"
    max_examples: Annotated[int, AT_LEAST_1] | None = None
    loss_on_prompt: bool = False
    too_long: Literal["cut_answer", "drop"] = "cut_answer"
    packing: bool = False
    plain_chat: bool = False
    chat_date: Annotated[str, A_DAY] | None = None
    paths: Literal["best", "all"] = "best"
    language: str | None = None

    @property
    def title(self) -> str:
        """What the training data are called: their file or files, else the family."""
        return " + ".join(self.mix) if self.mix else self.train_path or self.name


@dataclass
class TrainerConfig:
    """The loop. Steps are optimizer steps; `batch_size` counts sequences per device and micro-step."""

    max_steps: Annotated[int, STEPS] = -1
    num_epochs: Annotated[float, EPOCHS] = 3.0
    learning_rate: Annotated[float | str, RATE_OR_AUTO] | None = None
    beta: Annotated[float, ABOVE_0] | None = None
    batch_size: Annotated[int, AT_LEAST_1] = 1
    gradient_accumulation: Annotated[int, AT_LEAST_1] = 16
    max_length: Annotated[int, AT_LEAST_2] = 512
    pad_to: Literal["longest", "max_length"] = "longest"
    loss: Literal["auto", "plain"] = "auto"
    label_smoothing: Annotated[float, BELOW_1] = 0.0
    checkpointing: Literal["auto", "none", "selective", "selective_up", "full"] = "auto"
    compile: Literal["none", "model", "layers", "graphs"] = "none"
    warmup_steps: Annotated[int, AT_LEAST_0] = 100
    scheduler: Literal[SCHEDULERS] = "linear"
    scheduler_args: dict[str, Any] | None = None
    optimizer: Literal[(*OPTIMIZERS, *BITSANDBYTES)] = "adamw_torch"
    average: Annotated[str, AVERAGE] | None = None
    weight_decay: Annotated[float, DECAY] = 0.0
    adam_beta1: Annotated[float, BELOW_1] = 0.9
    adam_beta2: Annotated[float, BELOW_1] = 0.999
    max_grad_norm: Annotated[float, AT_LEAST_0] = 1.0
    max_bad_steps: Annotated[int, AT_LEAST_1] = 10
    logging_steps: Annotated[int, AT_LEAST_1] = 10
    eval_steps: Annotated[int, AT_LEAST_0] | None = None
    eval_task: str | None = None
    target_score: Annotated[float, ACCURACY] | None = None
    patience: Annotated[int, AT_LEAST_1] | None = None
    keep_best: bool = False
    best_after: Annotated[float, BELOW_1] = 0.0
    save_steps: Annotated[int, AT_LEAST_1] | None = None
    save_total_limit: Annotated[int, AT_LEAST_1] = 2
    resume: Literal["auto"] | None = None
    report_to: list[str] | str = field(default_factory=list)
    sample_prompts: list[str] | str | None = None
    sample_steps: Annotated[int, AT_LEAST_1] | None = None
    forget_budget: Annotated[float, ABOVE_0] | None = None
    forget_source: str | None = None

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, where one may stand alone."""
        return [self.report_to] if isinstance(self.report_to, str) else self.report_to


@dataclass
class HardwareConfig:
    """Processes see `batch_size × gradient_accumulation` sequences a step each, whatever `micro_batch` makes of it."""

    name: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    num_processes: Annotated[int, AT_LEAST_1] = 1
    num_machines: Annotated[int, AT_LEAST_1] = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    fsdp: bool = False
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_dir: str | None = None
    micro_batch: Annotated[int, AT_LEAST_1] | None = None
    gradient_checkpointing: bool = False
    memory_gib: Annotated[float, ABOVE_0] | None = None

    def __post_init__(self) -> None:
        known = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}
        self.device = known.get(self.device.lower(), self.device)
        if self.offload_dir is not None:
            self.offload_dir = os.path.expanduser(self.offload_dir)

    def at_once(self, batch_size: int) -> int:
        """Sequences that a process takes at once of `batch_size`: all, or the most that divide it within
        `micro_batch`."""
        limit = min(batch_size, self.micro_batch or batch_size)
        return next(size for size in range(limit, 0, -1) if batch_size % size == 0)

    @property
    def all_processes(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines

    @property
    def in_shards(self) -> str | None:
        """The setting by which no process has the frozen weights whole; None where each has."""
        return "hardware.fsdp=true" if self.fsdp else "hardware.zero_stage=3" if self.zero_stage == 3 else None


def checkpointing_of(trainer: TrainerConfig, hardware: HardwareConfig) -> str:
    """What is computed again in backward passes: none | selective | selective_up | full. The trainer's setting, or what
    the hardware's says where that leaves it open."""
    if trainer.checkpointing != "auto":
        return trainer.checkpointing
    return "full" if hardware.gradient_checkpointing else "none"


@dataclass
class EvalConfig:
    data_dir: str | None = None
    split: Literal["test", "validation", "any"] = "test"
    shots: Annotated[int, AT_LEAST_0] | None = None
    limit: Annotated[int, AT_LEAST_1] | None = None
    batch_size: Annotated[int | str, WHOLE_OR_AUTO] = 8
    num_beams: Annotated[int, AT_LEAST_1] = 1
    max_new_tokens: Annotated[int, AT_LEAST_1] | None = None
    compare_base: bool = True
    prompt: Literal["auto", "alpaca", "guanaco", "chat"] = "auto"
    model_id: str | None = None


@dataclass
class ChatConfig:
    prompt: Literal["auto", "chat", "alpaca", "guanaco", "plain", "raw"] = "auto"
    temperature: Annotated[float, AT_LEAST_0] | None = None
    max_new_tokens: Annotated[int, AT_LEAST_1] | None = None


@dataclass
class BenchConfig:
    methods: list[str] = field(default_factory=lambda: ["floor", "s2ft", "sylva", "lora", "full"])
    steps: Annotated[int, AT_LEAST_1] = 12
    warmup_steps: Annotated[int, AT_LEAST_0] = 2
    batch_size: Annotated[int, AT_LEAST_1] = 2
    length: Annotated[int, AT_LEAST_1] = 256
    labelled: Annotated[float, SHARE] = 1.0
    width: int | None = None
    depth: int | None = None
    shape: str | None = None
    vocabulary: Annotated[int, AT_LEAST_2] | None = None
    accumulation: Annotated[int, AT_LEAST_1] = 1
    targets: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=lambda: ["eager"])
    profile: bool = False
    axes: list[str] = field(default_factory=lambda: ["width", "length", "batch", "density", "depth"])
    widths: list[int] = field(default_factory=lambda: [192, 256, 384, 512])
    lengths: list[int] = field(default_factory=lambda: [64, 256, 512, 1024])
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    densities: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2])
    depths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    importances: list[str] = field(default_factory=lambda: ["activation", "gradient", "fisher", "sylva"])
    samples: Annotated[int, AT_LEAST_1] = 8
    adapters: list[str] = field(default_factory=list)
    seeds: Annotated[int, AT_LEAST_1] = 3
    jobs: Annotated[int, AT_LEAST_1] = 1
    skills: list[str] = field(default_factory=lambda: [f"{s}: dataset={s}" for s in ("arithmetic", "commonsense")])
    rates: list[Annotated[float, RATE]] = field(default_factory=list)
    weights: list[float] = field(default_factory=lambda: [1.0])
    source: list[str] = field(default_factory=list)
    forgetting: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1])
    target_tasks: list[str] = field(default_factory=list)
    source_tasks: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=lambda: [f"{m}: method={m}" for m in ("s2ft", "sylva", "lora", "full")])


@dataclass
class RunConfig:
    """One composed run. `method` is the config class of `methods/` (S2FTConfig, SylvaConfig, …)."""

    model: ModelConfig
    dataset: DatasetConfig
    method_name: str
    method: Any
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    objective: Literal[OBJECTIVES] = "sft"
    seed: Annotated[int, SEED] = 0
    sparsity: Annotated[float, SPARSITY] | None = None
    scope: str | None = None
    output_dir: str | None = None
    cache_dir: str = ".cache/sparseft"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.model.dtype == "auto" and self.hardware.dtype is not None:
            self.model = replace(self.model, dtype=self.hardware.dtype)
        self.cache_dir = os.path.expanduser(self.cache_dir)  # `cache_dir=~/x` reaches us as typed, unlike `~/x` alone

    @property
    def checkpointing(self) -> str:
        """`checkpointing_of` the run."""
        return checkpointing_of(self.trainer, self.hardware)

    @property
    def by_preference(self) -> bool:
        """Whether it learns which of two answers is better, not to imitate one."""
        return self.objective != "sft"

    def to_dict(self) -> dict[str, Any]:
        """As in `config.yaml`: the groups' names beside their fields, ready for `compose.from_dict`."""
        content = asdict(self)
        content["method"] = {"name": content.pop("method_name"), **content["method"]}
        return content


def flatten(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = value
    return flat
