"""`trainer.report_to`: what others watch a run in, fed by transformers' own callbacks with the lines of our metrics.

    with tracked(names, folder, config, model, step) as trackers:   # on the first process; elsewhere there are none
        trackers.log({"step": 10, "loss": 2.3, …})                  # as in metrics.jsonl
        trackers.picture("selection", pixels)
        trackers.finish(summary)

A tracker that cannot start ends the run before it trains. One that fails later is warned about and left out: no network
is worth a run. Each keeps what it writes in a folder of the run, unless its own environment variables say another
place; what it is to be found by again, when the run is continued, stands in `trackers.json`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import transformers

from sparseft import console
from sparseft.compose.run_config import to_yaml
from sparseft.config import RunConfig, flatten
from sparseft.distributed.ranks import is_main
from sparseft.errors import RunError, UserError, without_secrets
from sparseft.files.atomic import plain, write_json
from sparseft.files.untrusted import read_json_object
from sparseft.replaced import variables
from sparseft.runs.folder import MLFLOW, SUMMARY, TENSORBOARD, TRACKERS, TRACKIO, WANDB

PROJECT = "sparseft"  # of those that keep runs in projects, where the environment names none
NOISY = ("transformers", "mlflow", "wandb", "trackio", "tensorboard", "alembic", "matplotlib", "urllib3")


def check(names: list[str]) -> None:
    """Refuses a tracker whose package is not installed, or whose part of transformers is turned off."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without an origin: a folder of that name that is no package
            raise UserError(
                f"trainer.report_to={name}: the package {name} is not installed; pip install 'sparseft[{name}]'."
            )
        off = os.environ.get("DISABLE_MLFLOW_INTEGRATION", "")  # as transformers reads it
        if name == MLFLOW and off.upper() == "TRUE":
            raise UserError(f"trainer.report_to=mlflow: DISABLE_MLFLOW_INTEGRATION={off} turns it off; unset that.")


class Tracker:
    """One of them. Steps are optimizer steps; `logs` are numbers by the names that metrics have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def begin(self, args: Any, model: Any, known: dict[str, Any] | None, step: int) -> dict[str, Any]:
        """Starts; returns by what it is found again. known: that of the run which goes on at `step`, None of a new
        one."""
        raise NotImplementedError

    def where(self) -> str:
        """What to type, or to open, to look at it."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], step: int) -> None:
        self.callback.on_log(None, _state(step), None, logs=logs)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """pixels: uint8 (height, width, 3)."""
        raise NotImplementedError

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows of texts, all with the same keys."""
        raise NotImplementedError

    def summary(self, content: dict[str, Any]) -> None:
        """What `summary.json` says."""
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        raise NotImplementedError

    callback: Any = None  # transformers'


class TensorBoard(Tracker):
    def begin(self, args: Any, model: Any, known: dict[str, Any] | None, step: int) -> dict[str, Any]:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        self.place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(self.folder / TENSORBOARD)
        # What an earlier session wrote of steps that come again is not shown.
        self.writer = SummaryWriter(self.place, purge_step=None if known is None else step + 1)
        self.callback = TensorBoardCallback(self.writer)
        self.callback.on_train_begin(args, _state(step), None, model=model)
        return {}

    def where(self) -> str:
        return f"tensorboard --logdir {_shown(self.place)}"

    def picture(self, name: str, pixels: Any, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        self.writer.add_text(name, markdown(rows), step)

    def summary(self, content: dict[str, Any]) -> None:
        self.writer.add_text("summary", markdown([{"": name, " ": value} for name, value in content.items()]))

    def end(self, failed: bool) -> None:
        self.callback.on_train_end(None, None, None)


class WandB(Tracker):
    def begin(self, args: Any, model: Any, known: dict[str, Any] | None, step: int) -> dict[str, Any]:
        import wandb
        from transformers.integrations import WandbCallback

        self.wandb = wandb
        own = {  # where the environment says nothing; W&B itself reads that once a process
            "project": PROJECT,
            "name": args.run_name,
            "dir": str(self.folder),
            "run_id": (known or {}).get("id"),
            "resume": "allow" if known else None,
        }
        options = {name: os.environ.get(f"WANDB_{name.upper()}") or value for name, value in own.items()}
        options["id"] = options.pop("run_id")
        if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False, verify=False):
            options["mode"] = "offline"
        self.run = wandb.init(**options, settings=wandb.Settings(silent=True))
        self.callback = WandbCallback()
        self.callback.on_train_begin(args, _state(step), None, model=model)
        return {"id": self.run.id}

    def where(self) -> str:
        if self.run.offline:
            return (
                f"wandb sync {_shown(Path(self.run.dir).parent)} (offline, as there is no login or WANDB_MODE says so)"
            )
        return self.run.url or "disabled by WANDB_MODE"

    def _log(self, name: str, value: Any, step: int) -> None:
        self.run.log({name: value, "train/global_step": step})  # by which the callback has all charts drawn

    def picture(self, name: str, pixels: Any, step: int) -> None:
        self._log(name, self.wandb.Image(pixels), step)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        self._log(name, self.wandb.Table(list(rows[0]), [list(row.values()) for row in rows]), step)

    def summary(self, content: dict[str, Any]) -> None:
        self.run.summary.update(content)

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(Tracker):
    def begin(self, args: Any, model: Any, known: dict[str, Any] | None, step: int) -> dict[str, Any]:
        import mlflow
        from transformers.integrations import MLflowCallback

        self.mlflow, self.set_here = mlflow, not mlflow.is_tracking_uri_set()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if self.set_here:
            self._open_store(experiment)
        # MLflow's parameters are texts by names, and those of a run that goes on stand.
        settings = flatten(args.to_dict()) if known is None else {}
        args.to_dict = lambda: settings
        names = {"MLFLOW_EXPERIMENT_NAME": experiment, "MLFLOW_RUN_ID": (known or {}).get("id")}
        self.callback = MLflowCallback()
        with variables(**{name: value for name, value in names.items() if value and name not in os.environ}):
            self.callback.on_train_begin(args, _state(step), None, model=model if known is None else None)
        return {"id": mlflow.active_run().info.run_id}

    def _open_store(self, experiment: str) -> None:
        """A store in the run's folder: a database, or files where there is no SQLAlchemy (mlflow-skinny)."""
        place = self.folder / MLFLOW
        place.mkdir(exist_ok=True)
        if importlib.util.find_spec("sqlalchemy") is not None:
            self.mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
        else:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self.mlflow.set_tracking_uri((place / "store").as_uri())
        if self.mlflow.get_experiment_by_name(experiment) is None:
            self.mlflow.create_experiment(experiment, artifact_location=(place / "artifacts").as_uri())

    def where(self) -> str:
        uri = self.mlflow.get_tracking_uri()
        kind, _, place = uri.partition("//")
        if kind not in ("file:", "sqlite:"):
            return uri
        if kind == "file:":
            return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {_shown(place)}"
        return f"mlflow ui --backend-store-uri sqlite:///{_shown(place.removeprefix('/'))}"

    def picture(self, name: str, pixels: Any, step: int) -> None:
        self.mlflow.log_image(pixels, f"{name}-{step}.png")

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        self.mlflow.log_text(markdown(rows), f"{name}-{step}.md")

    def summary(self, content: dict[str, Any]) -> None:
        self.mlflow.log_dict(content, SUMMARY)
        numbers = {f"summary/{name}": value for name, value in content.items() if type(value) in (int, float)}
        self.mlflow.log_metrics(numbers)  # which MLflow's table of runs compares

    def end(self, failed: bool) -> None:
        self.mlflow.flush_async_logging()
        if failed:
            self.mlflow.end_run("FAILED")
        self.callback.on_train_end(None, _state(0), None)
        self.callback = None  # now: once collected it ends whatever run of MLflow is open then
        if self.set_here:
            self.mlflow.set_tracking_uri(None)  # the next run of this process has a store of its own


class Trackio(Tracker):
    def begin(self, args: Any, model: Any, known: dict[str, Any] | None, step: int) -> dict[str, Any]:
        self.place = os.environ.get("TRACKIO_DIR") or str(self.folder / TRACKIO)
        with variables(TRACKIO_DIR=self.place):  # it looks once, when it is imported
            import trackio
        keep_trackio_in(Path(self.place))
        self.trackio = trackio
        # A run is found again by its name, which other folders' runs have too where all write to one place.
        shared = any(os.environ.get(f"TRACKIO_{name}") for name in ("DIR", "SPACE_ID", "SERVER_URL"))
        name = (known or {}).get("name") or args.run_name + (f"-{uuid.uuid4().hex[:8]}" if shared else "")
        # Not by transformers' callback: that goes on with any older run of this name, and counts lines as steps.
        trackio.init(PROJECT, name, config=args.to_dict(), resume="never" if known is None else "allow")
        return {"name": name}

    def where(self) -> str:
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        return remote or f"TRACKIO_DIR={_shown(self.place)} trackio show --project {PROJECT}"

    def log(self, logs: dict[str, float], step: int) -> None:
        from transformers.integrations.integration_utils import rewrite_logs

        self.trackio.log(rewrite_logs(logs), step=step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        self.trackio.log({name: self.trackio.Image(pixels)}, step=step)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        data = [list(row.values()) for row in rows]
        self.trackio.log({name: self.trackio.Table(columns=list(rows[0]), data=data)}, step=step)

    def summary(self, content: dict[str, Any]) -> None:
        step = content.get("steps") or 0
        self.trackio.log({f"summary/{name}": value for name, value in content.items()}, step=step)

    def end(self, failed: bool) -> None:
        self.trackio.finish()


def keep_trackio_in(place: Path) -> None:
    """Has trackio, whose modules hold its folder as constants, write to `place` from now on."""
    own = {"TRACKIO_DIR": place, "MEDIA_DIR": place / "media", "ARTIFACTS_DIR": place / "artifacts"}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            for constant in own.keys() & vars(module).keys():
                setattr(module, constant, own[constant])


KINDS: dict[str, type[Tracker]] = {
    TENSORBOARD: TensorBoard,
    WANDB: WandB,
    MLFLOW: MLflow,
    TRACKIO: Trackio,
}


class Trackers:
    """Those of a run, as one."""

    def __init__(self, opened: dict[str, Tracker]) -> None:
        self.opened = opened
        self.new: set[str] = set()  # those that have nothing of the run yet, as of one that is continued with one more

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics."""
        left_out = {"step", "epoch", "averaged"} if "eval_loss" in record else {"step"}
        logs = {name: value for name, value in record.items() if name not in left_out and value is not None}
        self._each(lambda tracker: tracker.log(logs, record["step"]))

    def picture(self, name: str, pixels: Any, step: int, only: Collection[str] | None = None) -> None:
        """pixels: uint8 (height, width, 3); only: the trackers that get it, None for all."""
        self._each(lambda tracker: tracker.picture(name, pixels, step), only)

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Rows of texts, all with the same keys; at least one."""
        self._each(lambda tracker: tracker.table(name, rows, step))

    def summary(self, content: dict[str, Any]) -> None:
        """What `summary.json` says, of which trackers get what is a number, text, true or false."""
        content = {name: value for name, value in plain(content).items() if isinstance(value, str | int | float)}
        self._each(lambda tracker: tracker.summary(content))

    def end(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.end(failed))

    def _each(self, act: Callable[[Tracker], None], only: Collection[str] | None = None) -> None:
        for name, tracker in list(self.opened.items()):
            if only is not None and name not in only:
                continue
            try:
                with _silent():
                    act(tracker)
            except Exception as error:  # whatever a tracker or its network comes up with
                console.warn(f"{name}: {_words(error)}; the run goes on without it")
                del self.opened[name]
                with contextlib.suppress(Exception), _silent():
                    tracker.end(failed=True)


@contextlib.contextmanager
def tracked(
    config: RunConfig, arguments: transformers.TrainingArguments, model: Any, folder: Path, resumed: int | None
) -> Iterator[Trackers]:
    """The trackers that the run asks for, from before it trains until it has ended, well or not.

    resumed: the step that a continued run goes on from, None of a new one.
    """
    trackers = Trackers({})
    if is_main():
        known = read_json_object(folder / TRACKERS) if (folder / TRACKERS).is_file() else {}
        for name in config.trainer.trackers:
            known.setdefault(name, None)  # not begun yet
            write_json(folder / TRACKERS, known)  # before, as it says too which folders are the run's
            try:
                known[name] = _open(trackers, name, config, arguments, model, folder, resumed, known[name])
            except BaseException:
                trackers.end(failed=True)
                raise
            write_json(folder / TRACKERS, known)
    failed = True
    try:
        yield trackers
        failed = False
    finally:
        trackers.end(failed)


def _open(
    trackers: Trackers, name: str, config: RunConfig, arguments: Any, model: Any, folder: Path, resumed: int | None,
    known: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Starts a tracker, says where it is to be seen, and returns by what it is found again."""
    tracker = KINDS[name](folder)
    settings = copy.copy(arguments)  # the run's own settings, where transformers' callbacks ask for its arguments
    settings.run_name = folder.resolve().name
    settings.to_dict = lambda: {name: part for name, part in config.to_dict().items() if name != "bench"}
    settings.to_json_string = lambda: "".join(f"    {line}\n" for line in to_yaml(config).splitlines())  # as code
    again = known if resumed is not None else None
    if again is None:
        trackers.new.add(name)
    try:
        with _silent():
            found = tracker.begin(settings, model, again, resumed or 0)
    except Exception as error:
        raise RunError(f"trainer.report_to={name}: it cannot be started: {_words(error)}.") from error
    trackers.opened[name] = tracker
    console.log(f"{name}: {without_secrets(tracker.where())}")
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _state(step: int) -> transformers.TrainerState:
    return transformers.TrainerState(global_step=step, is_world_process_zero=True)


def _shown(path: str | Path) -> str:
    """A path for a command to type: from the working directory where it lies below that."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _words(error: Exception) -> str:
    """What it says, for the log and for the run's summary, which reports and model cards repeat."""
    return without_secrets(" ".join(str(error).split())).rstrip(".")[:300] or type(error).__name__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what trackers print, log and warn of on the way; their failures are exceptions."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in NOISY:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
