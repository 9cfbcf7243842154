"""`sparseft eval`: lm-eval tasks on a run, an adapter or the base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.adapters.description import adapter_hash
from sparseft.config import BUNDLED, ModelConfig, RunConfig
from sparseft.errors import UserError, nearest_path, shown, where_looked
from sparseft.files.untrusted import read_json_object
from sparseft.runs import folder as runs
from sparseft.training import checks


@dataclass
class Target:
    """What is evaluated: a base model, maybe an adapter on it, and where the results go."""

    what: str  # one sentence's subject, as printed and recorded
    model: ModelConfig
    adapter: Path | None
    folder: Path | None  # null: a new folder under outputs/
    base: ModelConfig | None = None  # what a run or an adapter is compared with; null: nothing is
    trained: Path | None = None  # the run's folder where one trained it: it may know the training questions


def run(
    config: RunConfig,
    *,
    tasks: Sequence[str],
    run: str | None = None,
    adapter: str | None = None,
    base: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates and writes `eval/<task>.json` and its samples; returns accuracies by task and group."""
    from sparseft import evaluation
    from sparseft.data.question_hashes import QuestionHashes
    from sparseft.evaluation import contamination
    from sparseft.runs import environment

    console.clear_warnings()
    if not tasks:
        raise UserError("no task given: name mmlu, commonsense, arithmetic, one of their members or an lm-eval task.")
    checks.check_one_process(config, "eval")
    checks.check_tests(config)
    target = find_target(config, run=run, adapter=adapter, base=base, overrides=overrides)
    # What would be refused after the answers, which may take hours, is refused before them.
    check_place(config, target)
    seen = QuestionHashes.load(target.trained) if target.trained is not None else None
    data_dir = config.eval.data_dir
    if data_dir is None and target.model.path.startswith(BUNDLED):
        data_dir = evaluation.BUNDLED_DATA
    console.log(f"evaluating {target.what} on {', '.join(tasks)}")

    # Tasks and data first: a wrong name or folder should not wait for the model to load.
    names = evaluation.expand_tasks(list(tasks), data_dir=data_dir)
    with Requests() as requests:
        plan = evaluation.prepare(names, config.eval, data_dir=data_dir, progress=requests)

        settings = dataclasses.replace(config.eval, prompt=prompt_format(config.eval.prompt, target.folder))

        def score(model: Any, tokenizer: Any) -> dict[str, Any]:
            requests.close()
            return evaluation.evaluate(
                model, tokenizer, names, settings, data_dir=data_dir, plan=plan, progress=requests
            )

        outcome, of_base = score_both(target, config, score)
    if of_base is not None:
        evaluation.compare(outcome, of_base)
        outcome["seconds"] += of_base["seconds"]
    for warning in outcome["warnings"]:
        console.warn(warning)
    contamination.annotate(outcome, plan, seen)
    folder = target.folder or new_folder(config)
    header = {
        "evaluated": target.what,
        "model": target.model.path,
        "adapter": str(target.adapter) if target.adapter else None,
        "adapter_sha256": adapter_hash(target.adapter),
        "base": target.base.path if of_base is not None and target.base is not None else None,
        "data_dir": config.eval.data_dir,
        "split": config.eval.split,
        "commit": environment.package_commit(),
        "settings": dataclasses.asdict(config.eval),
    }
    written = evaluation.write_results(folder, outcome, header)
    if evaluation.MT_BENCH in outcome["samples"]:
        written += write_conversations(folder, config, target, outcome, of_base)
    return {
        "evaluated": target.what,
        "tasks": outcome["tasks"],
        "seconds": outcome["seconds"],
        "files": [str(path) for path in written],
        "warnings": outcome["warnings"],
    }


def score_both(
    target: Target, config: RunConfig, score: Callable[[Any, Any], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What `score(model, tokenizer)` makes of the target, and of its base where that is to be compared.

    An adapter is loaded first, so that one that does not fit is refused before hours of work, and detached for the
    base, which is then the plain model that the base alone is. Whole models are loaded one after the other.
    """
    from sparseft.adapters.lifecycle import detach, load_adapter, merge, mergeable

    compared = target.base is not None and config.eval.compare_base
    model, tokenizer = load_target(target, config)
    if target.adapter is None:
        outcome = score(model, tokenizer)
        if not compared:
            return outcome, None
        del model  # two at once may not fit
        console.log(f"the base model {target.base.path} on the same questions")
        return outcome, score(*load_target(Target("", target.base, None, None), config))
    of_base = None
    if compared:
        console.log(f"the base model {target.base.path} on the same questions first (eval.compare_base=false: not)")
        model = detach(model)
        of_base = score(model, tokenizer)
        model = load_adapter(model, target.adapter).eval()
    if mergeable(model):
        model = merge(model)  # else every layer of LoRA would compute its low-rank product beside the dense one
    return score(model, tokenizer), of_base


def prompt_format(wanted: str, run: Path | None) -> str:
    """`eval.prompt`, with `auto` the format that the run was trained on where that is a conversation's."""
    if wanted != "auto" or run is None or not (run / runs.ENVIRONMENT).is_file():
        return wanted
    format = (read_json_object(run / runs.ENVIRONMENT).get("data") or {}).get("format")
    return {"alpaca": "alpaca", "guanaco": "guanaco", "messages": "chat"}.get(format, "auto")


def write_conversations(
    folder: Path, config: RunConfig, target: Target, outcome: dict[str, Any], of_base: dict[str, Any] | None
) -> list[Path]:
    """MT-Bench's answers in FastChat's format, one file a model."""
    from sparseft import evaluation

    place = target.folder or target.adapter
    if place is not None and place.name == runs.ADAPTER:
        place = place.absolute().parent  # it is the run's folder that has a name of its own
    name = config.eval.model_id or (place.absolute().name if place is not None else Path(target.model.path).name)
    written = {evaluation.file_stem(name): outcome}
    if of_base is not None and target.base is not None:
        base = evaluation.file_stem(Path(target.base.path).name)
        written[base if base not in written else f"{base}-base"] = of_base
    return [
        evaluation.write_answers(folder, results["samples"][evaluation.MT_BENCH], model_id)
        for model_id, results in written.items()
    ]


def check_place(config: RunConfig, target: Target) -> None:
    """Refuses a folder that the results could not be written into; makes nothing."""
    if target.folder is None and not config.output_dir:
        runs.check_writable(runs.OUTPUTS, "folder")
        return
    folder = target.folder or new_folder(config)
    what = "the run's folder" if target.folder else "output_dir"
    runs.check_writable(folder, what)
    runs.check_writable(folder / runs.EVAL, what)


def new_folder(config: RunConfig) -> Path:
    """Where results of a base or an adapter lie: `output_dir`, or a new folder under outputs/."""
    if config.output_dir:
        return Path(config.output_dir).expanduser()
    return runs.new_folder(f"eval-{runs.timestamp()}")


def find_target(
    config: RunConfig, *, run: str | None, adapter: str | None, base: bool, overrides: Sequence[str] = ()
) -> Target:
    """Which base model and adapter are meant; model overrides win over what a run or an adapter names."""
    from sparseft.adapters.description import is_adapter

    given = [name for name, value in (("--run", run), ("--adapter", adapter), ("--base", base)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them.")
    if base:
        return Target(f"the base model {config.model.path}", config.model, None, None)
    if adapter is not None:
        path = Path(adapter).expanduser()
        if not path.is_dir():
            raise UserError(f"--adapter {adapter}: no such folder{where_looked(adapter)}.{nearest_path(adapter)}")
        if not is_adapter(path) and is_adapter(path / runs.ADAPTER):
            path = path / runs.ADAPTER  # a run folder was given
        return _with_adapter(f"the adapter {adapter}", config, overrides, path, None)
    if run is None and not runs.LATEST.is_symlink() and not runs.LATEST.exists():
        return Target(f"the base model {config.model.path} (there is no run yet)", config.model, None, None)
    folder = runs.find_run(run) if run is not None else runs.latest_run()
    latest = "the latest run" if run is None else "the run"
    if not is_adapter(folder / runs.ADAPTER):
        raise UserError(f"{latest} {folder} has no adapter (it did not finish): continue it with trainer.resume=auto.")
    runs.check_own(folder)
    model = _run_model(folder)
    return _with_adapter(f"{latest} {folder}", config, overrides, folder / runs.ADAPTER, folder, model)


def _run_model(folder: Path) -> ModelConfig:
    """The model of a run, but for `trust_remote_code`: who evaluates says that, not a folder from elsewhere."""
    from sparseft.compose.run_config import from_dict
    from sparseft.files.untrusted import read_yaml_object

    return dataclasses.replace(from_dict(read_yaml_object(folder / runs.CONFIG)).model, trust_remote_code=False)


def _with_adapter(
    what: str,
    config: RunConfig,
    overrides: Sequence[str],
    path: Path,
    folder: Path | None,
    model: ModelConfig | None = None,
) -> Target:
    from sparseft.adapters.description import is_whole_model, read_config

    content = read_config(path)
    keys = {word.lstrip("+~").partition("=")[0] for word in overrides}
    if model is None:
        own = content.get("sparseft") or {}
        known = content.get("base_model") or own.get("base_model") or content.get("base_model_name_or_path")
        model = config.model
        if not keys & {"model", "model.path"} and not is_whole_model(path):
            if not known:
                raise UserError(f"{path}: the adapter names no base model: give model.path=FOLDER or a hub id.")
            model = dataclasses.replace(config.model, name="adapter", path=str(known))
    elif "model" in keys:
        model = config.model
    changed = {key.removeprefix("model."): None for key in keys if key.startswith("model.")}
    model = dataclasses.replace(model, **{field: getattr(config.model, field) for field in changed})
    trained = folder or path.absolute().parent
    if is_whole_model(path):
        if keys & {"model", "model.path"}:
            raise UserError(f"{path} is a whole model, so it has no base: leave model and model.path out.")
        tokenizer = model.tokenizer or model.path if folder is not None else config.model.tokenizer
        if "model.tokenizer" not in keys and (path / "tokenizer_config.json").is_file():
            tokenizer = None
        elif folder is None and tokenizer is None:
            tokenizer = _tokenizer_of_base(path, content)
        # A folder alone does not say what it was before training; a run does.
        base = model if folder is not None else None
        whole = dataclasses.replace(model, path=str(path), tokenizer=tokenizer)
        return Target(what, whole, None, folder, base, trained)
    return Target(f"{what} (on {model.path})", model, path, folder, model, trained)


def _tokenizer_of_base(path: Path, content: dict[str, Any]) -> str:
    """The base that a whole model says it was trained from, for a tokenizer that the folder itself lacks."""
    from sparseft.models.loading import check_model_path

    base = content.get("base_model")
    try:
        if isinstance(base, str) and base:
            check_model_path(base)
            return base
        where = "it names no base"
    except UserError:
        where = f"its base {shown(base)} is not there"
    raise UserError(f"{path} has no tokenizer, and {where}: give model.tokenizer=FOLDER or a hub id.")


def load_target(target: Target, config: RunConfig) -> tuple[Any, Any]:
    """The model with its adapter in the weights, and the tokenizer."""
    import transformers

    from sparseft.adapters.lifecycle import load_adapter
    from sparseft.models.loading import load_model, load_tokenizer, resolve_device

    transformers.logging.disable_progress_bar()
    device = resolve_device(config.hardware.device)
    tokenizer = load_tokenizer(target.model)
    model = load_model(target.model, device)
    if target.adapter is not None:
        model = load_adapter(model, target.adapter)
    return model.eval(), tokenizer


class Requests:
    """lm-eval's request counts as one progress display at a time."""

    def __init__(self) -> None:
        self.display: console.Progress | None = None
        self.what: str | None = None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the present display."""
        if self.display is not None:
            self.display.__exit__(None, None, None)
            self.display = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what.startswith("Tokenizing"):  # over in a moment
            return
        if self.display is None or what != self.what or done < self.display.completed:
            self.close()
            self.what = what
            self.display = console.Progress(total, what, unit="request")
            self.display.__enter__()
        self.display.update(done)


def render(result: dict[str, Any]) -> None:
    """Accuracies as a table, beside the base's where it was compared, then where the files lie."""
    from sparseft.evaluation import contamination

    entries = result["tasks"].items()
    if any("difference" in entry for _, entry in entries):
        columns = ["task", "base", "adapter", "difference", "p", "samples", "shots"]
        rows = [
            [name, _share(entry.get("base")), _share(entry.get("accuracy")), _difference(entry),
             _probability(entry.get("p_value")), entry.get("samples"), entry.get("shots")]
            for name, entry in entries
        ]  # fmt: skip
    else:
        columns = ["task", "accuracy", "stderr", "samples", "shots"]
        rows = [
            [name, _share(entry.get("accuracy")), _share(entry.get("stderr")), entry.get("samples"), entry.get("shots")]
            for name, entry in entries
        ]
    console.table(f"Evaluated: {result['evaluated']}", columns, rows)
    if "p" in columns:
        print("difference: adapter - base ± standard error, paired by question; p: exact sign test (McNemar)")
    if trained_on := contamination.rows(result["tasks"]):
        columns = contamination.OF_BOTH if contamination.compared(result["tasks"]) else contamination.COLUMNS
        console.table("Test questions that were training questions", columns, trained_on)
    print(f"files: {Path(result['files'][0]).parent}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(entry: dict[str, Any]) -> str:
    if entry.get("difference") is None:
        return "-"
    error = entry["difference_stderr"]
    return f"{entry['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _probability(value: float | None) -> str:
    """`0.0312`; below that four places show nothing, so `3e-07`."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}"
