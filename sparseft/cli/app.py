"""The command line: options and overrides in, exit codes out. Nothing heavy is imported until a command runs.

Exit codes: 0 done, 1 failed while running, 2 the input was wrong, 130 interrupted. Results go to stdout, all else to
stderr.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Annotated, Any

import typer

from sparseft import __version__, console
from sparseft.cli.jobs import Options, command_module, configured, finish, is_setting, nearest_setting
from sparseft.cli.outcome import FAILED, INTERRUPTED, WRONG_INPUT, emit, execute, flush_stdout, open_streams
from sparseft.compose.overrides import is_override, paths_and_overrides
from sparseft.errors import UserError, nearest

BENCHMARKS = "train scaling host preprocess quality time fusion front kernels loader serve".split()
# What a benchmark measures unless another experiment is named.
EXPERIMENTS = {"host": "host", "time": "time_to_loss", "fusion": "fusion", "front": "front", "serve": "serve"}

# typer carries its own copy of click, and does not export the base of its errors.
ClickException: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="sparseft",
    help="Fine-tunes large language models by training a small, well-chosen part of their own weights.",
    epilog="\b\nExamples:\n"
    "  sparseft train experiment=quickstart\n"
    "  sparseft train model=llama3-8b method=s2ft dataset=commonsense sparsity=0.984\n"
    "  sparseft eval mmlu --shots 5\n\n"
    "Settings are overrides, key=value; `sparseft train --cfg` shows them all with their values.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", hidden=True)]
Multirun = Annotated[
    bool, typer.Option("--multirun", "-m", help="Sweep over a,b, choice(a,b) and range(1,4): a run for each point.")
]
Cfg = Annotated[bool, typer.Option("--cfg", help="Print the composed configuration and run nothing.")]
ConfigDir = Annotated[
    list[str] | None,
    typer.Option("--config-dir", metavar="DIR", help="Folder of your own files, DIR/model/mine.yaml; repeatable."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no log, only warnings and the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        emit(f"sparseft {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        emit(context.get_help())


@app.command(
    short_help="Choose what to train and cache it for `train`.",
    epilog="\b\nExample:\n  sparseft preprocess method=sylva dataset=oasst1 sparsity=0.95 scope=self_attn",
)
def preprocess(
    words: Words = None,
    multirun: Multirun = False,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Choose what to train (calibration, importance, selection) and cache it for `train`.

    KEY=VALUE sets a setting or chooses an option of a group (model, dataset, method, hardware, experiment).
    """
    options = Options(multirun, cfg, config_dir, json, debug, quiet)
    return configured("preprocess", words or [], options, lambda module, config, _: module.run(config))


@app.command(
    short_help="Fine-tune; leaves a run folder.",
    epilog="\b\nExamples:\n"
    "  sparseft train method=s2ft trainer.max_steps=50\n"
    "  sparseft train --plan model=llama3-8b hardware=1xh100\n"
    "  sparseft train -m method=s2ft,sylva,lora seed=0,1 output_dir=outputs/sweep",
)
def train(
    words: Words = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what memory it takes; loads no weights.")] = False,
    multirun: Multirun = False,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Fine-tune; leaves a run folder.

    KEY=VALUE sets a setting or chooses an option of a group (model, dataset, method, hardware, experiment).
    """
    options = Options(multirun, cfg, config_dir, json, debug, quiet)
    module = "plan" if plan else "train"
    return configured("train", words or [], options, lambda found, config, _: found.run(config), module=module)


@app.command(
    short_help="Show what would be learnt from a file.",
    epilog="\b\nExamples:\n"
    "  sparseft data my-chats.jsonl model.path=./my-model\n"
    "  sparseft data dataset=commonsense trainer.max_length=128 --examples 5",
)
def data(
    words: Annotated[list[str] | None, typer.Argument(metavar="PATH|KEY=VALUE", hidden=True)] = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=0, help="Examples to show.")] = 3,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show what `train` would learn from a file: examples with the tokens that count marked, their lengths, what is cut
    or left out, and the template.

    PATH is dataset.train_path: a file or a hub id (default: the data of the settings). KEY=VALUE sets a setting, as for
    `train`. No weights are loaded.
    """
    paths, overrides = paths_and_overrides(words or [])

    def check() -> None:
        if len(paths) > 1:
            raise UserError(f"One file at a time: '{paths[1]}' comes after '{paths[0]}'.")
        if paths and any(word.lstrip("+~").startswith("dataset.train_path=") for word in overrides):
            raise UserError(f"'{paths[0]}' and dataset.train_path set the same: give one of them.")
        overrides.extend(f"dataset.train_path={path}" for path in paths)

    def call(module: Any, config: Any, _: list[str]) -> dict[str, Any]:
        return module.run(config, examples=examples)

    options = Options(False, cfg, config_dir, json, debug, quiet)
    return configured("train", overrides, options, call, check, module="data")


@app.command(
    "eval",
    short_help="Evaluate a run, an adapter or the base model.",
    epilog="\b\nExamples:\n"
    "  sparseft eval mmlu --shots 5\n"
    "  sparseft eval commonsense gsm8k --run outputs/latest --limit 100 --batch-size auto\n"
    "  sparseft eval mmlu --base model=llama3-8b",
)
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="TASK|KEY=VALUE", hidden=True)] = None,
    shots: Annotated[int | None, typer.Option("--shots", metavar="N", help="Examples before each question.")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="A run (default: the latest).")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", metavar="DIR", help="An adapter folder.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, untrained.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Examples per task.")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N|auto", help="Sequences at once.")] = None,
    multirun: Multirun = False,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Evaluate a run (default: the latest), an adapter or the base model.

    TASK is mmlu, commonsense, arithmetic, one of their members (boolq, gsm8k, …) or any task of lm-eval.
    KEY=VALUE sets a setting or chooses an option of a group (model, hardware, …).
    """
    overrides = [word for word in words or [] if is_override(word)]
    tasks = [word for word in words or [] if not is_override(word)]

    def check() -> None:
        given = [name for name, value in (("--run", run), ("--adapter", adapter), ("--base", base)) if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: give one of them.")
        for name, value in (("shots", shots), ("limit", limit), ("batch_size", batch_size)):
            if value is not None:
                if any(word.lstrip("+~").partition("=")[0] == f"eval.{name}" for word in overrides):
                    raise UserError(f"--{name.replace('_', '-')} and eval.{name} set the same: give one of them.")
                overrides.append(f"eval.{name}={value}")
        if not tasks and not cfg:
            raise UserError(
                "No task given: name mmlu, commonsense, arithmetic, a member of these or a task of lm-eval."
            )

    def call(module: Any, config: Any, point: list[str]) -> dict[str, Any]:
        return module.run(config, tasks=tasks, run=run, adapter=adapter, base=base, overrides=point)

    return configured("eval", overrides, Options(multirun, cfg, config_dir, json, debug, quiet), call, check)


@app.command(
    short_help="Talk to a run, an adapter or the base model.",
    epilog="\b\nExamples:\n"
    "  sparseft chat\n"
    "  sparseft chat --run outputs/my-run chat.temperature=0.7\n"
    "  echo 'What is 12 + 30?' | sparseft chat --base model.path=./my-model",
)
def chat(
    words: Words = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="A run (default: the latest).")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", metavar="DIR", help="An adapter folder.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, untrained.")] = False,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Talk to a run (default: the latest), an adapter or the base model, in the terminal or through a pipe.

    A line is a question; /help lists the commands: the base, another adapter or both side by side, a system message,
    saving. KEY=VALUE sets a setting or chooses an option of a group (model, hardware, …).
    """
    overrides = list(words or [])

    def check() -> None:
        for word in overrides:
            if not is_override(word):
                raise UserError(f"'{word}' is not a setting (key=value): a run is given as --run {word}.")

    def call(module: Any, config: Any, point: list[str]) -> Any:
        return module.run(config, run=run, adapter=adapter, base=base, overrides=point, as_json=json)

    return configured("chat", overrides, Options(False, cfg, config_dir, json, debug), call, check)


@app.command(
    short_help="Measure methods side by side.",
    epilog="\b\nExample:\n  sparseft bench train model.path=./my-model bench.length=512 sparsity=0.95",
)
def bench(
    words: Annotated[list[str] | None, typer.Argument(metavar="BENCHMARK|KEY=VALUE", hidden=True)] = None,
    profile: Annotated[bool, typer.Option("--profile", help="train: traces, and where the time goes.")] = False,
    multirun: Multirun = False,
    cfg: Cfg = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure methods side by side; prints a table and leaves `bench.json`.

    BENCHMARK is train (the default), scaling, host, preprocess, quality, time, fusion, front, kernels, loader or
    serve. KEY=VALUE sets a setting or chooses an option of a group (model, hardware, …). Exit code 1: nothing was
    measured, a method failed, a target of bench.targets is missed, or a stage of loader is below its target.
    """
    overrides = [word for word in words or [] if is_override(word)]
    named = [word for word in words or [] if not is_override(word)]
    what = named[0] if named else "train"

    def check() -> None:
        if what not in BENCHMARKS:
            raise UserError(f"Unknown benchmark '{what}'.{nearest(what, BENCHMARKS)}")
        if len(named) > 1:
            raise UserError(f"One benchmark at a time: '{named[1]}' comes after '{what}'.")
        if profile and what != "train":
            raise UserError(f"--profile belongs to 'sparseft bench train', not to 'bench {what}'.")
        if profile:
            overrides.append("bench.profile=true")
        if what in EXPERIMENTS and not any(word.lstrip("+~").startswith("experiment=") for word in overrides):
            overrides.insert(0, f"experiment={EXPERIMENTS[what]}")

    def call(module: Any, config: Any, point: list[str]) -> dict[str, Any]:
        return module.run(config, what=what, words=point, config_dirs=config_dir or [])

    return configured("bench", overrides, Options(multirun, cfg, config_dir, json, debug, quiet), call, check)


@app.command(
    short_help="Write what other tools load.",
    epilog="\b\nExamples:\n"
    "  sparseft export outputs/latest --format peft-lora --engine vllm --out for-vllm\n"
    "  sparseft export outputs/latest --format merged --out my-model\n"
    "  sparseft export ./adapter --format gguf-lora --out for-llama.cpp model.path=./base",
)
def export(
    words: Annotated[list[str] | None, typer.Argument(metavar="DIR|KEY=VALUE", hidden=True)] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="peft-lora, peft-shira, merged, packed, patch, gguf-lora or mlx."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="The folder to write.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="ENGINE", help="Refuse what it would: vllm, sglang, tgi, lorax, llama.cpp, mlx or peft."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Of what is written: float32, bfloat16 or float16.")
    ] = None,
    base_gguf: Annotated[
        str | None, typer.Option("--base-gguf", metavar="FILE", help="gguf-lora: prove it in llama.cpp, on this base.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="merged, of a quantized base: as trained, or the checkpoint."),
    ] = None,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Write what other tools load, from a run or an adapter folder, and prove that it answers as what was trained.

    DIR is the run (default: the latest) or the adapter. KEY=VALUE sets a setting, such as model.path=FOLDER where the
    base has moved. Exit code 1: what was written is not what was trained; nothing of it is kept.
    """
    folders, overrides = paths_and_overrides(words or [])

    def check() -> None:
        if len(folders) > 1:
            raise UserError(f"One run or adapter at a time: '{folders[1]}' comes after '{folders[0]}'.")
        for name, value in (("format", format), ("out", out)):
            if value is None:
                raise UserError(f"--{name} is missing: sparseft export DIR --format FORMAT --out DIR.")

    def call(module: Any, config: Any, point: list[str]) -> dict[str, Any]:
        folder = folders[0] if folders else None
        given = {"engine": engine, "dtype": dtype, "base_gguf": base_gguf, "base": base}
        return module.run(config, folder=folder, format=format, out=out, overrides=point, **given)

    return configured("export", overrides, Options(False, False, config_dir, json, debug, quiet), call, check)


@app.command(
    short_help="Cut an adapter back until it forgets little enough.",
    epilog="\b\nExamples:\n"
    "  sparseft trim outputs/latest --forget 0.02 --source general.txt\n"
    "  sparseft trim outputs/my-run --forget 0.1 --source general.jsonl --out my-adapter",
)
def trim(
    words: Annotated[list[str] | None, typer.Argument(metavar="RUN|KEY=VALUE", hidden=True)] = None,
    forget: Annotated[
        float | None, typer.Option("--forget", metavar="NATS", help="How much the source's loss may rise, a token.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="FILE", help="What is not to be forgotten: general text.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="The new adapter's folder (default: beside the run).")
    ] = None,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Cut a run's adapter back until it forgets no more of a text than a budget, and keep the most of what it learnt.

    RUN is the run (default: the latest), whose own adapter stays as it is. KEY=VALUE sets a setting, such as
    model.path=FOLDER or dataset.train_path=FILE where something has moved.
    """
    folders, overrides = paths_and_overrides(words or [])

    def check() -> None:
        if len(folders) > 1:
            raise UserError(f"One run at a time: '{folders[1]}' comes after '{folders[0]}'.")
        for name, value in (("forget", forget), ("source", source)):
            if value is None:
                raise UserError(f"--{name} is missing: sparseft trim RUN --forget NATS --source FILE.")

    def call(module: Any, config: Any, point: list[str]) -> dict[str, Any]:
        folder = folders[0] if folders else None
        return module.run(config, folder=folder, forget=forget, source=source, out=out, overrides=point)

    return configured("trim", overrides, Options(False, False, config_dir, json, debug, quiet), call, check)


@app.command(
    short_help="Write one HTML page of one or several runs.", epilog="\b\nExample:\n  sparseft report outputs/latest"
)
def report(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", hidden=True)] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Write one self-contained HTML page of a run (default: the latest) or of several side by side."""
    return finish("report", execute(lambda: command_module("report").run(list(runs or [])), debug), json, debug)


@app.command(
    short_help="Publish a run on the Hugging Face hub.",
    epilog="\b\nExamples:\n"
    "  sparseft push outputs/latest me/my-adapter --dry-run\n"
    "  sparseft push outputs/latest me/my-adapter --private --license apache-2.0",
)
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    repo: Annotated[str, typer.Argument(metavar="REPO", hidden=True)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID", help="The base on the hub, where it was a folder here.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", metavar="NAME", help="The base's licence.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Send such files too: report.html, 'eval/*'; repeatable."),
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md there that a person has edited.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Publish a run on the Hugging Face hub: a model card and what others load.

    RUN is a run's folder, an adapter's, or one that `sparseft export` has made; REPO is owner/name, made if it is not
    there. The token is HF_TOKEN, or that of `hf auth login`.
    """

    def work() -> Any:
        options = {"dry_run": dry_run, "private": private, "overwrite_card": overwrite_card, "base_model": base_model}
        return command_module("push").run(run, repo, licence=licence, include=include or [], **options)

    with console.quiet() if quiet else contextlib.nullcontext():
        return finish("push", execute(work, debug), json, debug)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line (default: of this process) and returns the exit code."""
    open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    try:
        code = command.main(_without_job(_without_local_rank(arguments)), prog_name="sparseft", standalone_mode=False)
    except ClickException as error:
        code = _usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:  # of --help, as everything else is printed within `execute`
        code = FAILED
        console.error(f"stdout cannot be written: {error.strerror}")
    except SystemExit:  # typer's end where the reader of --help went away
        code = 0
    lost = flush_stdout()
    if lost and not code:
        console.error(lost)
        return FAILED
    return code or 0


def _without_local_rank(arguments: list[str]) -> list[str]:
    """DeepSpeed's runner puts `--local_rank=N` before the command; LOCAL_RANK says the same."""
    return arguments[1:] if arguments and re.fullmatch(r"--local_rank=[0-9]+", arguments[0]) else arguments


def _without_job(arguments: list[str]) -> list[str]:
    """Hydra's `--cfg job` means our `--cfg`."""
    kept: list[str] = []
    for argument in arguments:
        if argument == "--cfg=job":
            kept.append("--cfg")
        elif not (argument == "job" and kept and kept[-1] == "--cfg"):
            kept.append(argument)
    return kept


def _usage_error(error: Any) -> int:
    """One message for what the option parser refuses, with the nearest option or command."""
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".") + "."
    if type(error).__name__ == "NoSuchOption":
        option = error.option_name.partition("=")[0]
        if is_setting(option.lstrip("-")):
            hint = f" A setting is written without dashes: {option.lstrip('-')}=…"
        else:
            options = (name for parameter in context.command.params for name in parameter.opts)
            hint = nearest(option, [name for name in options if name.startswith("-")])  # arguments have bare names
            takes_settings = any(parameter.name == "words" for parameter in context.command.params)
            if takes_settings and not hint.startswith(" Did you mean"):
                setting = nearest_setting(context.command.name, option.lstrip("-"))
                hint = f"{setting} A setting is written key=value, without dashes." if setting else hint
        message = f"No such option: {option}.{hint}"
    elif "No such command" in message:
        name = message.partition("'")[2].partition("'")[0]
        message = f"No such command: {name}.{nearest(name, context.command.commands)}"
    console.error(f"{message} (see {context.command_path if context else 'sparseft'} --help)")
    return WRONG_INPUT


if __name__ == "__main__":
    raise SystemExit(main())
