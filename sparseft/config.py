"""What a run is made of, as plain dataclasses.

`compose/` fills them from `conf/` and the command line; nothing below `commands/` sees Hydra's own types.
No torch here: `sparseft --help` and `--cfg` stay fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

BUNDLED = "bundled:"  # paths that start so lie inside the package (`sparseft/bundled/…`)


@dataclass
class ModelConfig:
    """A causal language model: a Hugging Face id, a folder, or `bundled:tiny`."""

    name: str = "tiny"
    path: str = "bundled:tiny"
    tokenizer: str | None = None  # null: the model's own
    revision: str | None = None  # of a hub id
    dtype: str = "auto"  # auto: as stored | float32 | bfloat16 | float16
    attn_implementation: str | None = None  # null: transformers' choice (sdpa)
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Training examples. With the bundled model a null `train_path` is the bundled set of the family `name`,
    with any other model it is `hub_path`."""

    name: str = "commonsense"  # oasst1 | commonsense | arithmetic | json | text
    train_path: str | None = None  # a file (JSON array, JSON lines, parquet, text) or a hub id
    eval_path: str | None = None
    hub_path: str | None = None  # the published set, used where train_path is null
    hub_split: str = "train"
    eval_fraction: float = 0.05  # of the training examples, when there is no eval_path
    format: str = "auto"  # auto | alpaca | guanaco | messages | oasst_trees | prompt_completion | text
    max_examples: int | None = None  # the first so many
    loss_on_prompt: bool = False
    too_long: str = "cut_answer"  # cut_answer | drop: never the question
    packing: bool = False  # several examples a row of max_length tokens, none of which sees another
    plain_chat: bool = False  # of messages: as "User: …" and "Assistant: …", whatever template the tokenizer has
    paths: str = "best"  # of message trees: best | all
    language: str | None = None  # of message trees: only messages in it (en); null: all


@dataclass
class TrainerConfig:
    """The loop. Steps are optimizer steps; `batch_size` counts sequences per device and micro-step."""

    max_steps: int = -1  # -1: num_epochs decides
    num_epochs: float = 3.0
    learning_rate: float | None = None  # null: the method's own default
    batch_size: int = 1
    gradient_accumulation: int = 16
    max_length: int = 512  # tokens
    warmup_steps: int = 100
    scheduler: str = "linear"  # any name of transformers' SchedulerType
    scheduler_args: dict[str, Any] | None = None  # what that schedule takes besides, by name
    optimizer: str = "adamw_torch"  # compose/validation.py: OPTIMIZERS, BITSANDBYTES
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    max_bad_steps: int = 10  # in a row without a finite loss and gradient, after which the run ends
    logging_steps: int = 10
    eval_steps: int | None = None  # null: before and after training only
    eval_task: str | None = None  # scored at each evaluation, on its validation split; at the end on the test split
    target_score: float | None = None  # training ends once eval_task's accuracy reaches it
    keep_best: bool = False  # what is left is the best evaluation's adapter (by eval_task, else by loss), not the last
    best_after: float = 0.0  # share of the steps before which no evaluation counts as the best
    save_steps: int | None = None  # null: at the end only
    save_total_limit: int = 2
    resume: str | None = None  # auto: the last good checkpoint


@dataclass
class HardwareConfig:
    """Processes see `batch_size × gradient_accumulation` sequences a step each, whatever `micro_batch` makes of it."""

    name: str = "auto"
    device: str = "auto"  # auto | cpu | cuda (gpu means that too)
    dtype: str | None = None  # of the model where model.dtype is auto; null: as stored
    num_processes: int = 1  # on each machine
    num_machines: int = 1
    zero_stage: int = 0
    offload: str = "none"  # none | cpu | nvme: where ZeRO keeps the optimizer (stage 3: the parameters too)
    offload_dir: str | None = None  # for nvme
    micro_batch: int | None = None  # at most so many sequences at once; null: trainer.batch_size
    gradient_checkpointing: bool = False
    compile: bool = False
    memory_gib: float | None = None  # of one device, for `train --plan`; null: as torch finds it

    def __post_init__(self) -> None:
        known = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}
        self.device = known.get(self.device.lower(), self.device)


@dataclass
class EvalConfig:
    data_dir: str | None = None  # null: the bundled tests with the bundled model, else the hub's
    split: str = "test"  # test | validation | any: test where the data has it, else validation
    shots: int | None = None  # null: the task's own number
    limit: int | None = None  # examples a task
    batch_size: int | str = 8  # or "auto"
    num_beams: int = 1
    max_new_tokens: int | None = None  # of a generated answer; null: the task's own number
    compare_base: bool = True  # a run or an adapter: also the base, on the same questions
    prompt: str = "auto"  # of mt_bench: alpaca | guanaco | chat | auto: the one of training, else chat if there is one
    model_id: str | None = None  # in mt_bench's answers; null: the run's or the model's name


@dataclass
class BenchConfig:
    methods: list[str] = field(default_factory=lambda: ["floor", "s2ft", "sylva", "lora", "full"])
    steps: int = 10  # timed steps a method
    warmup_steps: int = 2
    batch_size: int = 2
    length: int = 256  # tokens
    width: int | None = None  # with depth: a random Llama of that shape instead of the model
    depth: int | None = None  # layers
    shape: str | None = None  # a published shape with random weights: llama-7b | llama2-7b | llama2-13b | llama3-8b
    accumulation: int = 1  # train: forward and backward passes a step
    targets: list[str] = field(default_factory=list)  # train: "s2ft / floor <= 1.00", … (bench/targets.py)
    ways: list[str] = field(default_factory=lambda: ["eager"])  # train: eager | compile | liger | checkpointing, or a+b
    profile: bool = False  # train: also a profiler's trace of each method, and where the time goes
    axes: list[str] = field(default_factory=lambda: ["width", "length", "batch", "density", "depth"])  # scaling
    widths: list[int] = field(default_factory=lambda: [192, 256, 384, 512])
    lengths: list[int] = field(default_factory=lambda: [64, 256, 512, 1024])
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    densities: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2])
    depths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    importances: list[str] = field(default_factory=lambda: ["activation", "gradient", "fisher", "sylva"])  # preprocess
    samples: int = 8  # preprocess: calibration examples
    seeds: int = 3  # quality: runs a variant
    # quality: what is trained and compared, each "name: key=value …" on top of the run's own settings
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
    bench: BenchConfig = field(default_factory=BenchConfig)
    seed: int = 0
    sparsity: float | None = None  # null: the method's own default
    scope: str | None = None  # substring of module names; null: every linear of the decoder layers
    output_dir: str | None = None  # the run folder; null: outputs/<date>-<time>-<method>-<dataset>
    cache_dir: str = ".cache/sparseft"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.model.dtype == "auto" and self.hardware.dtype is not None:
            self.model = replace(self.model, dtype=self.hardware.dtype)

    def to_dict(self) -> dict[str, Any]:
        """As in `config.yaml`: the groups' names beside their fields, ready for `compose.from_dict`."""
        content = asdict(self)
        content["method"] = {"name": content.pop("method_name"), **content["method"]}
        return content
