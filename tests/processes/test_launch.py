"""The launcher: when processes are started, what becomes of results, failures and signals, and that none is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseft.config import HardwareConfig
from sparseft.distributed import env, launch, ranks
from sparseft.errors import RunError, UserError
from support.running import files, gone, metrics, on, refused, summary, write_data

TWO = "hardware.num_processes=2"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torchrun and SLURM are not there, whatever started the tests."""
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: Any) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


# ---- when ----


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (HardwareConfig(), False),
        (HardwareConfig(num_processes=2), True),
        (HardwareConfig(num_machines=2), True),
        (HardwareConfig(zero_stage=1), True),
    ],
)
def test_processes_are_started_where_the_hardware_asks_for_them(hardware: HardwareConfig, expected: bool) -> None:
    assert launch.needed(hardware) == expected


def test_a_process_that_a_launcher_started_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.needed(HardwareConfig(num_processes=2))
    assert not ranks.is_main()
    launch.check(HardwareConfig(num_processes=2))
    launch.check(HardwareConfig())  # the launcher alone says how many
    with pytest.raises(UserError, match="are 4 processes, but the launcher has started 2"):
        launch.check(HardwareConfig(num_processes=4))


def test_a_slurm_task_for_each_process_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, PROCID=5, STEP_NUM_TASKS=8, LOCALID=1, JOB_NODELIST="node7", JOB_NUM_NODES=2, NODEID=1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that what is set below goes again with the test
        monkeypatch.delenv(name)
    assert not launch.needed(HardwareConfig(num_processes=4, num_machines=2))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "4", "node7"]


def test_a_slurm_task_for_each_machine_starts_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, PROCID=1, STEP_NUM_TASKS=2, NODEID=1, JOB_NUM_NODES=2, JOB_NODELIST="node[07-08]")
    monkeypatch.setenv("MASTER_ADDR", "node07")
    hardware = HardwareConfig(num_processes=4, num_machines=2)
    assert launch.needed(hardware)
    first, envs, store = launch._environments(hardware)
    assert first == 4 and store is None  # the first machine's parent holds it
    assert [env["RANK"] for env in envs.values()] == ["4", "5", "6", "7"]
    assert [env["LOCAL_RANK"] for env in envs.values()] == ["0", "1", "2", "3"]
    assert {env["WORLD_SIZE"] for env in envs.values()} == {"8"}
    assert {env["MASTER_ADDR"] for env in envs.values()} == {"node07"}
    slurm(monkeypatch, STEP_NUM_TASKS=3)
    with pytest.raises(UserError, match="SLURM has given this job 2 machines"):
        launch.check(HardwareConfig(num_processes=4, num_machines=3))


def test_a_batch_script_of_slurm_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch gives the script itself a place, as if it were the first of the job's tasks."""
    slurm(monkeypatch, PROCID=0, NTASKS=4, LOCALID=0, NODEID=0, JOB_NUM_NODES=1, JOB_NODELIST="node7")
    launch.check(HardwareConfig(num_processes=4))
    assert launch.needed(HardwareConfig(num_processes=4)) and "RANK" not in os.environ
    slurm(monkeypatch, NTASKS=8, JOB_NUM_NODES=2, JOB_NODELIST="node[07-08]")
    with pytest.raises(UserError, match="started by nothing that knows the other machines. Use `srun --nodes=2"):
        launch.check(HardwareConfig(num_processes=4, num_machines=2))  # the other machine has no such process


def test_a_step_of_one_task_is_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `srun --pty bash` is."""
    slurm(monkeypatch, PROCID=0, NTASKS=1, STEP_NUM_TASKS=1, LOCALID=0, NODEID=0, JOB_NUM_NODES=1, JOB_NODELIST="h")
    for hardware, starts in ((HardwareConfig(), False), (HardwareConfig(num_processes=4), True)):
        launch.check(hardware)
        assert launch.needed(hardware) is starts and "RANK" not in os.environ


@pytest.mark.parametrize(
    ("tasks", "hardware", "expected"),
    [
        (4, HardwareConfig(), "num_processes=1 on hardware.num_machines=1 takes 1"),
        (2, HardwareConfig(num_processes=4), "num_processes=4 on hardware.num_machines=1 takes 1 or 4"),
        (4, HardwareConfig(num_processes=4, num_machines=2), "num_processes=4 on hardware.num_machines=2 takes 2 or 8"),
        (1, HardwareConfig(num_processes=4, num_machines=2), "num_processes=4 on hardware.num_machines=2 takes 2 or 8"),
    ],
)
def test_another_number_of_tasks_is_refused(
    monkeypatch: pytest.MonkeyPatch, tasks: int, hardware: HardwareConfig, expected: str
) -> None:
    slurm(monkeypatch, PROCID=0, STEP_NUM_TASKS=tasks, LOCALID=0, NODEID=0, JOB_NUM_NODES=hardware.num_machines,
          JOB_NODELIST="h")  # fmt: skip
    with pytest.raises(UserError) as raised:
        launch.check(hardware)
    said = f"{tasks} task{'s' * (tasks > 1)}"
    assert str(raised.value) == (
        f"SLURM_STEP_NUM_TASKS={tasks}: srun has started {said}, but hardware.{expected}; write `srun "
        f"--nodes={hardware.num_machines} --ntasks-per-node=1 sparseft …`, or unset SLURM_STEP_NUM_TASKS where each "
        "task is a run of its own."
    )


@pytest.mark.parametrize("port", ["abc", "0", "65536", ""])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    slurm(monkeypatch, STEP_NUM_TASKS=2, NNODES=2, NODEID=0, NODELIST="h")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"^MASTER_PORT={port}: expected a port number"):
        launch.check(HardwareConfig(num_processes=2, num_machines=2))


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SLURMS = {"PROCID": "0", "STEP_NUM_TASKS": "4", "LOCALID": "0", "NODEID": "0", "NNODES": "2", "NODELIST": "h"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: expected a whole number, from 1 up."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a whole number, from 1 up."),
        ({"RANK": "one"}, "RANK=one: expected a whole number, from 0 up."),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: expected a whole number, from -1 up."),
        ({"LOCAL_RANK": "\u0663"}, "LOCAL_RANK=\u0663: expected a whole number, from -1 up."),
        (PLACE | {"RANK": "2"}, "RANK=2: expected a whole number, 0 to 1, as WORLD_SIZE is 2."),
        (PLACE | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a whole number, from 0 up."),
        (PLACE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2: expected a whole number, 0 to 1."),
        (PLACE | {"LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE=1.5: expected a whole number, from 1 up."),
        (PLACE | {"MASTER_PORT": "http"}, "MASTER_PORT=http: expected a port number, 1 to 65535."),
        (PLACE | {"MASTER_ADDR": ""}, "RANK and WORLD_SIZE are set, as if a launcher had started this process, but not "
         "MASTER_ADDR: expected RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun sets them; for a "
         "process alone unset RANK and WORLD_SIZE."),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a whole number, 0 to 3."),
        ({"SLURM_STEP_NUM_TASKS": "4(x2)"}, "SLURM_STEP_NUM_TASKS=4(x2): expected a whole number, from 1 up."),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2: expected a whole number, 0 to 1."),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "2"}, "SLURM_NODEID=2: expected a whole number, 0 to 1."),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "two"}, "SLURM_NNODES=two: expected a whole number, from 1 up."),
    ],
)  # fmt: skip
def test_a_place_that_is_none_is_refused_in_a_sentence(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    several = any(name.startswith("SLURM_") for name in variables)
    if several:
        slurm(monkeypatch, **SLURMS)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ["hardware=cpu", TWO, "hardware.num_machines=2"] if several else ["hardware=cpu"]
    assert refused(in_tmp, "train", *words) == message
    if not several and "MASTER_ADDR" not in message:
        assert refused(in_tmp, "eval", "mmlu", "--base", "hardware=cpu") == message
        assert refused(in_tmp, "preprocess", "hardware=cpu") == message
    assert not files(in_tmp)


@pytest.mark.parametrize(("given", "passed"), [("4,2", 4), ("3", 3), ("", 0)])
def test_threads_are_the_first_of_a_list(monkeypatch: pytest.MonkeyPatch, given: str, passed: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    _, envs, _ = launch._environments(HardwareConfig(num_processes=2))
    assert envs[1]["OMP_NUM_THREADS"] == str(passed or max(1, (os.cpu_count() or 1) // 2))


@pytest.mark.parametrize("given", ["many", "0", ",2", "-1"])
def test_threads_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(UserError, match=f"^OMP_NUM_THREADS={given}: expected a whole number, from 1 up."):
        launch._environments(HardwareConfig(num_processes=2))


# What transformers and accelerate would read: other launchers' places, and settings of a training that is not ours.
OTHERS = {
    "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "no_such",
    "ACCELERATE_USE_CPU": "maybe", "ACCELERATE_TORCH_DEVICE": "cuda", "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_USE_FSDP": "true",
}  # fmt: skip


def test_a_run_is_the_same_whatever_others_left_in_the_environment(in_tmp: Path, model_folder: Any) -> None:
    """Each variable by itself would have ended the run, kept it waiting for a second process, or changed the losses."""
    words = [*on(model_folder(), write_data(in_tmp)["json"]), "method=s2ft", "sparsity=0.9", "trainer.max_steps=2"]
    for name, variables in (("plain", {}), ("others", OTHERS)):
        done = subprocess.run(
            [sys.executable, "-m", "sparseft", "train", *words, "trainer.logging_steps=1", f"output_dir={name}"],
            cwd=in_tmp, env=os.environ | variables, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in metrics(in_tmp / name) if "loss" in line] for name in ("plain", "others")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_what_others_left_in_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OTHERS.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with env.alone():
        assert before.keys() - os.environ.keys() == OTHERS.keys() - {"MASTER_ADDR"}
    assert dict(os.environ) == before
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with env.alone():
        assert PLACE.items() <= os.environ.items() and not any(name.startswith("ACCELERATE_") for name in os.environ)


def test_several_machines_need_someone_who_knows_them() -> None:
    with pytest.raises(UserError, match="srun --nodes=2"):
        launch.check(HardwareConfig(num_machines=2))


# ---- what is wrong is said before any process starts ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.batch_size=0"], "trainer.batch_size=0"),
        (["model.path=./nowhere"], "model.path=./nowhere"),
        (["dataset.train_path=missing.json"], "missing.json"),
        (["hardware.zero_stage=3", "method.reselect_steps=5"], "weights, which hardware.zero_stage=3 has in shards"),
        (["hardware.offload=cpu"], "it is ZeRO that offloads"),
        (["hardware.offload=nvme", "hardware.zero_stage=2"], "needs hardware.zero_stage=3"),
        (["hardware.num_machines=2"], "hardware.num_machines=2"),
    ],
)
def test_wrong_input_starts_no_process(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    def started(*args: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launch, "_run_children", started)
    assert expected in refused(in_tmp, "train", "hardware=cpu", TWO, *words)
    assert not files(in_tmp)


def test_shipped_hardware(in_tmp: Path) -> None:
    from sparseft.compose.run_config import compose

    expected = {"auto": (1, 0), "cpu": (1, 0), "1xl4": (1, 0), "1xh100": (1, 0), "4xa100": (4, 2), "8xh100": (8, 2)}
    for name, (processes, stage) in expected.items():
        hardware = compose("train", [f"hardware={name}"]).hardware
        assert (hardware.name, hardware.num_processes, hardware.zero_stage) == (name, processes, stage)
    several = compose("train", ["hardware=multinode"]).hardware
    assert (several.num_machines, several.num_processes, several.zero_stage) == (2, 8, 3)


# ---- what becomes of them ----


@pytest.mark.parametrize(
    ("outcomes", "error", "message"),
    [
        # the rank that failed first; the others fail for want of it
        ([(1, "lost the others", 2.0), (1, "disk full", 1.0)], RunError, "disk full"),
        ([(1, "lost the others", 1.0), (2, "no such column", 2.0)], UserError, "no such column"),
        ([(130, "interrupted.", 1.0), (1, "lost the others", 2.0)], KeyboardInterrupt, ""),
    ],
)
def test_the_first_failure_is_the_one_that_is_raised(outcomes: Any, error: type, message: str) -> None:
    failed = [launch.End(code, text, traceback="T", time=when) for code, text, when in outcomes]
    with pytest.raises(error) as raised:
        launch._raise(failed, None)
    assert str(raised.value) == message


def test_a_process_that_was_killed_is_named_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "none" / "attempt_0" / "1"
    log.mkdir(parents=True)
    (log / "stderr.log").write_text("one\n\ntwo\n")
    outcome = launch._end(tmp_path, 5, 1, -signal.SIGKILL, 100.0)
    assert (outcome.code, outcome.message) == (
        1, "process 5 was killed by SIGKILL (out of memory?). Its last words: one | two",
    )  # fmt: skip
    assert launch._end(tmp_path, 4, 0, 0, 0.0).code == 0
    lost = launch.End(1, "lost the others", traceback="T", time=99.5)  # noticed before the launcher did
    stopped = launch._end(tmp_path, 6, 2, -signal.SIGTERM, 99.0)  # by the launcher
    with pytest.raises(RunError, match="killed by SIGKILL"):
        launch._raise([lost, stopped, outcome], None)


class Command:
    """`sparseft train` with two processes as a user starts it, its stderr read as it comes."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sparseft", "train", TWO, *words],
            cwd=folder, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True,
        )  # fmt: skip

    def err(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.err():
            assert self.process.poll() is None and time.monotonic() < end, self.err()
            time.sleep(0.1)

    def children(self) -> list[int]:
        done = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, self.err()


def long_run(folder: Path, model: Path, *words: str) -> Command:
    data = write_data(folder, 24)["json"]
    command = Command(
        folder, *on(model, data), "method=s2ft", "sparsity=0.9", "trainer.max_steps=100000", "output_dir=run",
        "dataset.eval_fraction=0", "trainer.logging_steps=1", *words,
    )  # fmt: skip
    command.wait_for("run: run")
    end = time.monotonic() + 60
    while not (folder / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end, command.err()
        time.sleep(0.1)
    assert len(command.children()) == 2
    return command


def test_a_run_is_not_lost_with_the_folder_that_its_processes_report_in(
    in_tmp: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where TMPDIR is cleaned of what is old."""
    place = in_tmp / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    data = write_data(in_tmp, 24)["json"]
    command = Command(
        in_tmp, *on(model_folder(), data), "method=s2ft", "sparsity=0.9", "trainer.max_steps=3", "output_dir=run",
        "dataset.eval_fraction=0", "--json",
    )  # fmt: skip
    command.wait_for("run: run")
    shutil.rmtree(next(place.glob("sparseft-*")))
    code, out, err = command.end()
    assert code == 0, err
    assert json.loads(out) == summary(in_tmp / "run") | {"run": "run"}


def test_ctrl_c_saves_once_and_leaves_no_process(in_tmp: Path, model_folder: Any) -> None:
    command = long_run(in_tmp, model_folder())
    children = command.children()
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    assert (code, out) == (130, ""), err
    assert "Traceback" not in err
    assert err.count("SIGINT: finishing the step and saving") == 1
    (checkpoint,) = (in_tmp / "run" / "checkpoints").iterdir()
    assert err.rstrip().endswith(f"error: interrupted. The last good checkpoint is run/checkpoints/{checkpoint.name}.")
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}
    assert gone(children)


def test_a_signal_to_every_process_saves_too(in_tmp: Path, model_folder: Any) -> None:
    """As systemd ends a service: the processes get the signal, and once more from the command that started them."""
    command = long_run(in_tmp, model_folder())
    children = command.children()
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.05)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end()
    assert (code, out) == (130, ""), err
    assert "Traceback" not in err and err.count("SIGTERM: finishing the step and saving") == 1
    assert len(list((in_tmp / "run" / "checkpoints").iterdir())) == 1
    assert gone(children)


def test_a_process_that_dies_takes_the_others_along(in_tmp: Path, model_folder: Any) -> None:
    command = long_run(in_tmp, model_folder())
    children = command.children()
    os.kill(children[1], signal.SIGKILL)
    code, out, err = command.end()
    assert (code, out) == (1, ""), err
    assert "killed by SIGKILL" in err.splitlines()[-1] and "Traceback" not in err
    assert gone(children)


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system's own signal at a parent's death is Linux's"
)
def test_no_process_outlives_a_parent_that_was_killed(in_tmp: Path, model_folder: Any) -> None:
    command = long_run(in_tmp, model_folder())
    children = command.children()
    command.process.kill()
    command.end()
    assert gone(children, 60)


def test_what_is_wrong_inside_a_process_keeps_its_exit_code(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    message = refused(in_tmp, "train", *on(model_folder(), data), "method=s2ft", TWO, "scope=nowhere", "output_dir=run")
    assert message.startswith("scope=nowhere matches no linear")
    assert not (in_tmp / "run").exists()


def test_what_the_first_process_refuses_all_refuse(in_tmp: Path, model_folder: Any) -> None:
    """One task a process: nobody stands over them, and the others would wait for hours."""
    (in_tmp / "run").mkdir()
    (in_tmp / "run" / "config.yaml").write_text("seed: 0\n")
    words = [*on(model_folder(), write_data(in_tmp)["json"]), "method=s2ft", TWO, "output_dir=run"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = PLACE | {"MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "sparseft", "train", *words], cwd=in_tmp, stderr=subprocess.PIPE, text=True,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, 2], said
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] for text in said]
    assert errors[0] == errors[1] and len(errors[0]) == 1, said
    assert "output_dir 'run' already holds a run: " in errors[0][0]
    assert all("Traceback" not in text for text in said)


def test_the_result_comes_once_and_the_folder_tells_the_command(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    words = [*on(model_folder(), data), "method=sylva", "sparsity=0.9", "method.block_size=8", "method.num_samples=4"]
    command = Command(in_tmp, *words, "trainer.max_steps=2", "output_dir=run", "--json")
    code, out, err = command.end()
    assert code == 0, err
    assert out.count("\n") == 1 and '"run": "run"' in out
    for line in ("model: ", "selection: computed", "eval loss before", "eval loss after"):
        assert err.count(line) == 1, err
    import json

    environment = json.loads((in_tmp / "run" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert "sparseft train hardware.num_processes=2" in environment["command_line"]
    assert summary(in_tmp / "run")["steps"] == 2
