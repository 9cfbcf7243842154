"""`sparseft push` against a stand-in of the hub on localhost, and adapters that are fetched from it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

import sparseft as package
from sparseft.compose.run_config import compose
from sparseft.evaluation.target import find_target
from sparseft.files.hub import adapter_folder
from sparseft.publish import listing
from sparseft.publish.card import is_untouched
from sparseft.publish.push import url_of
from sparseft.runs.folder import TRACKED
from support import adapted
from support import hub as stand_in
from support.exported import load, maker
from support.hub import TOKEN, Fault, Hub
from support.published import HOME, finished_run
from support.running import Done, files, refused, sparseft

ROOT = Path(__file__).resolve().parents[2]
FILE = "/{repo_id}/resolve/{revision}/{filename}"
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Any:
    return maker(tmp_path_factory)("llama")


@pytest.fixture
def run(made: Any, tmp_path: Path) -> Path:
    return finished_run(made[1], tmp_path / "run")


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with stand_in.running() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, monkeypatch: Any, tmp_path: Path) -> Hub:
    """The stand-in, empty, as the hub of this process, which is logged in there."""
    running.repos.clear(), running.stored.clear(), running.log.clear()
    running.before = lambda method, path: None
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    return running


def push(run: Path, *words: str, code: int | None = 0) -> Done:
    """`sparseft push RUN me/mine …`; the token is nowhere in what it prints."""
    done = sparseft(run.parent, "push", run, *(words if words and "/" in words[0] else ("me/mine", *words)), code=code)
    assert TOKEN not in done.out + done.err and "secretSecret" not in done.out + done.err
    assert "X-Signature" not in done.err
    return done


# ---- what is sent ----


def test_a_push_leaves_the_adapter_and_its_card(hub: Hub, run: Path) -> None:
    before = files(run)
    done = push(run, "--base-model", "meta/Base-1B", "--license", "mit", "--json").json
    there = hub.repos["me/mine"]
    assert there.files.keys() - {".gitattributes"} == SENT and not there.private and len(there.commits) == 2
    assert there.files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert done["repo"] == "me/mine" and done["url"] == f"{hub.url}/me/mine" and done["commit"] == there.head
    assert {each["path"]: each["bytes"] for each in done["files"]} == {n: len(there.files[n]) for n in SENT}
    card = ModelCard(there.files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("meta/Base-1B", "mit") and is_untouched(card.content)
    described = json.loads(there.files["adapter_config.json"])
    assert described["base_model"] == "meta/Base-1B"
    assert (
        described["base_fingerprint"]
        == json.loads((run / "adapter/adapter_config.json").read_text())["base_fingerprint"]
    )
    assert files(run) == before


def test_nothing_of_the_machine_or_of_others_goes_along(hub: Hub, run: Path) -> None:
    left = {each["path"]: each["why"] for each in push(run, "--json").json["left_out"]}
    sent = b"".join(hub.repos["me/mine"].files.values())
    assert HOME.encode() not in sent and b"alice" not in sent and str(run).encode() not in sent
    assert TOKEN.encode() not in sent
    assert files(run) - {f"adapter/{name}" for name in SENT} == left.keys()
    assert "pickles" in left["checkpoints/checkpoint-4/optimizer.pt"]
    assert "prompts and answers" in left["eval/boolq.samples.jsonl"] and "hashes" in left["train_questions.safetensors"]


@pytest.mark.parametrize("tracker", TRACKED)
def test_what_trackers_keep_is_told_from_other_files(tracker: str, run: Path) -> None:
    (run / tracker / "deep").mkdir(parents=True)
    (run / tracker / "deep/file").write_text(HOME)
    (run / "trackers.json").write_text("{}")
    left = {name: why for name, _, why in listing.listing_of(str(run), "me/mine").left_out}
    assert left[f"{tracker}/deep/file"] == left["trackers.json"] == listing.WATCHED


def test_what_is_asked_for_goes_along(hub: Hub, run: Path) -> None:
    push(run, "--include", "report.html", "--include", "eval/*.samples.jsonl")
    assert hub.repos["me/mine"].files["report.html"] == b"<p>an answer"
    assert "eval/boolq.samples.jsonl" in hub.repos["me/mine"].files


def test_a_dry_run_shows_all_and_asks_nothing(hub: Hub, run: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = files(run.parent)
    done = push(run, "--dry-run")
    assert not hub.log and files(run.parent) == before
    assert "adapter_model.safetensors" in done.err and "left out:" in done.err and "checkpoint" in done.err
    assert "# tiny-base-sylva-own" in done.out and "library_name: sparseft" in done.out
    assert "nothing was sent: 3 files" in done.out
    short = push(run, "--dry-run", "--quiet")
    assert short.out == done.out and "adapter_model.safetensors" not in short.err and "warning: " in short.err
    shown = push(run, "--dry-run", "--json").json
    assert shown["dry_run"] and shown["card_text"].startswith("---\n") and "commit" not in shown


def test_the_files_are_listed_before_anything_is_sent(hub: Hub, run: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr("sparseft.console.log", said.append)
    seen: list[bool] = []
    hub.before = lambda method, path: seen.append(any("adapter_model.safetensors" in line for line in said))
    push(run)
    assert seen and all(seen)


def test_a_private_repository(hub: Hub, run: Path) -> None:
    assert push(run, "--private", "--json").json["private"] and hub.repos["me/mine"].private
    assert "(private)" in push(run).out  # and stays so
    hub.repos["me/mine"].private = False
    assert "is public already" in refused(run.parent, "push", run, "me/mine", "--private")


def test_a_new_repository_is_as_its_owner_has_settled(hub: Hub, run: Path) -> None:
    hub.makes_private = True
    done = push(run)
    assert hub.repos["me/mine"].private and "(private)" in done.err and "(private)" in done.out


def test_an_adapters_folder_and_its_run_are_the_same(hub: Hub, run: Path) -> None:
    push(run)
    first = dict(hub.repos["me/mine"].files)
    push(run / "adapter")
    assert hub.repos["me/mine"].files == first


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_adapters_of_other_kinds(hub: Hub, made: Any, tmp_path: Path, method: str) -> None:
    trained = adapted.attached("llama", method, load(made[0]))
    package.save_adapter(trained, tmp_path / "trained")
    push(tmp_path / "trained", "--base-model", "meta/Base-1B")
    there = hub.repos["me/mine"].files
    assert str(tmp_path).encode() not in b"".join(there.values())
    data = ModelCard(there["README.md"].decode()).data
    expected = ("transformers", "finetune") if method == "full" else ("peft", "adapter")
    assert (data.library_name, data.base_model_relation, data.base_model) == (*expected, "meta/Base-1B")
    fetched = load(adapter_folder("me/mine")) if method == "full" else package.load_adapter(load(made[0]), "me/mine")
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(fetched.eval()(tokens).logits, trained.eval()(tokens).logits)
    said = there["README.md"].decode()
    assert ("takes no DoRA" in said) == (method == "dora") and ("vllm serve" in said) == (method != "dora")


def test_a_model_that_needs_code_of_its_own_is_refused(hub: Hub, made: Any, tmp_path: Path) -> None:
    """The code is not pushed, and without it the repository would not load."""
    trained = adapted.attached("llama", "full", load(made[0]))
    trained.config.auto_map = {"AutoConfig": "configuration_own.Own"}
    package.save_adapter(trained, tmp_path / "trained")
    said = refused(tmp_path, "push", tmp_path / "trained", "me/mine")
    assert "auto_map" in said and "export --format merged" in said and not hub.repos


# ---- pushed again ----


def test_a_password_of_the_endpoint_is_not_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://alice:s3cret@hub.corp")
    assert url_of("me/mine") == "https://hub.corp/me/mine"


def test_a_link_out_of_the_folder_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("mine alone")
    (run / "adapter/tokenizer.key").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(package.UserError, match=r"tokenizer\.key is a link that leads out of its folder"):
        listing.listing_of(str(run), "me/mine")
    (run / "adapter/tokenizer.key").unlink()
    (run / "adapter/tokenizer.key").symlink_to("adapter_config.json")
    assert "tokenizer.key" in {file.name for file in listing.listing_of(str(run), "me/mine").files}


def test_what_the_hub_has_is_not_sent_again(hub: Hub, run: Path) -> None:
    push(run)
    assert push(run, "--json").json["news"] is False and "lie already" in push(run).out
    commits, sent = len(hub.repos["me/mine"].commits), hub.asked("PUT", "/store/")
    push(run)
    assert len(hub.repos["me/mine"].commits) == commits and hub.asked("PUT", "/store/") == sent == 1


def test_an_interrupted_push_goes_on(hub: Hub, run: Path, monkeypatch: Any) -> None:
    """The large file is there, the commit is not: nobody sees half of it, and it is not sent twice."""
    hub.new("me/mine", {"other.txt": b"kept"})

    def interrupt(method: str, path: str) -> None:
        if "/commit/" in path:
            raise ConnectionError

    hub.before = interrupt
    done = push(run, code=1)
    assert "cannot be reached" in done.err and hub.repos["me/mine"].files.keys() == {"other.txt"}
    hub.before = lambda method, path: None
    push(run)
    assert hub.asked("PUT", "/store/") == 1 and hub.repos["me/mine"].files.keys() == SENT | {"other.txt"}


def test_a_card_that_nobody_edited_is_replaced(hub: Hub, run: Path) -> None:
    push(run)
    push(run, "--license", "mit")
    assert ModelCard(hub.repos["me/mine"].files["README.md"].decode()).data.license == "mit"


def test_a_card_that_a_person_edited_stays(hub: Hub, run: Path) -> None:
    push(run)
    mine = hub.repos["me/mine"].files["README.md"] + b"\nMy own words.\n"
    hub.repos["me/mine"].commit({"README.md": mine})
    (run / "adapter/tokenizer_config.json").write_text("{}")
    done = push(run, "--json")
    assert hub.repos["me/mine"].files["README.md"] == mine and "tokenizer_config.json" in hub.repos["me/mine"].files
    assert done.json["card"] == "kept" and "edited by a person" in done.err
    assert "README.md" not in {each["path"] for each in done.json["files"]}
    assert push(run, "--overwrite-card", "--json").json["card"] == "written"
    assert hub.repos["me/mine"].files["README.md"] != mine


def test_a_repository_with_another_kind_of_model_is_refused(hub: Hub, run: Path) -> None:
    hub.new("me/mine", {"config.json": b"{}", "model.safetensors": b"x"})
    assert "holds config.json" in refused(run.parent, "push", run, "me/mine")
    assert len(hub.repos["me/mine"].commits) == 1


def test_a_commit_of_somebody_else_meanwhile_is_not_undone(hub: Hub, run: Path) -> None:
    hub.new("me/mine")

    def meanwhile(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            hub.repos["me/mine"].commit({"README.md": b"written just now"})

    hub.before = meanwhile
    assert "somebody else has changed it" in push(run, code=1).err
    assert hub.repos["me/mine"].files["README.md"] == b"written just now"


# ---- files that change ----


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_changes_while_it_is_sent_is_not_committed(
    hub: Hub, run: Path, monkeypatch: Any, same_size: bool
) -> None:
    monkeypatch.setattr(listing, "IN_MEMORY", 1000)
    path = run / "adapter/adapter_model.safetensors"

    def write(method: str, where: str) -> None:
        if where.endswith("/preupload/main"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            times = path.stat().st_atime_ns, path.stat().st_mtime_ns
            path.write_bytes(bytes(content) if same_size else bytes(content) + b"more")
            os.utime(path, ns=times)

    hub.before = write
    assert "was changed while it was sent: nothing was committed" in push(run, code=1).err
    assert "adapter_config.json" not in hub.repos["me/mine"].files


def test_an_adapter_that_is_not_whole_is_refused(hub: Hub, run: Path) -> None:
    path = run / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    assert "is not the file that adapter_config.json describes" in refused(run.parent, "push", run, "me/mine")
    path.unlink()
    assert "no such file" in refused(run.parent, "push", run, "me/mine")
    assert not hub.log


# ---- wrong input: before anything is asked ----


@pytest.mark.parametrize(
    "name", ["mine", "me/mi ne", "a/b/c", "me/", "me/-x", "https://huggingface.co/me/mine", "me/x..y"]
)
def test_a_wrong_name_is_refused(hub: Hub, run: Path, name: str) -> None:
    assert "no repository's name" in refused(run.parent, "push", run, name) and not hub.log


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base-model", "./here"], "expected the base's id on the hub"),
        (["--license", " "], "--license is empty"),
        (["--include", "raport.html"], "Did you mean 'report.html'?"),
        (["--include", "checkpoints/*"], "never sent"),
    ],
)
def test_wrong_options(hub: Hub, run: Path, words: list[str], said: str) -> None:
    assert said in refused(run.parent, "push", run, "me/mine", *words) and not hub.log


def test_what_is_no_run_is_refused(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert "Did you mean" in refused(run.parent, "push", run.with_name("rum"), "me/mine")
    (tmp_path / "empty").mkdir()
    assert "neither a run, nor an adapter" in refused(run.parent, "push", tmp_path / "empty", "me/mine")
    (run / "summary.json").unlink()
    assert "did not finish" in refused(run.parent, "push", run, "me/mine") and not hub.log


def test_offline_is_said_before_anything(hub: Hub, run: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run.parent, "push", run, "me/mine") and not hub.log


def test_a_missing_token(hub: Hub, run: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(run.parent, "push", run, "me/mine") and not hub.log


def test_the_token_of_hf_auth_login(hub: Hub, run: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text(TOKEN + "\n")
    push(run)
    assert "me/mine" in hub.repos


# ---- what the hub refuses: in one sentence, and never the token ----


def test_a_wrong_token(hub: Hub, run: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongSecret")
    for debug in ([], ["--debug"]):
        done = sparseft_debug(run, *debug)
        assert done.code == 2 and "the hub does not know your token" in done.err
        assert "wrongSecret" not in done.out + done.err


@pytest.mark.parametrize("token", ["hf_secretSecret\x01x", "hf_secretSecret x", "hf_sécretSecret"])
def test_a_token_that_no_header_holds(hub: Hub, run: Path, monkeypatch: Any, token: str) -> None:
    """A library's error would quote the header."""
    monkeypatch.setenv("HF_TOKEN", token)
    for debug in ([], ["--debug"]):
        done = sparseft_debug(run, *debug)
        assert done.code == 2 and "holds characters that no token has" in done.err and not hub.log
        assert token not in done.out + done.err and "secretSecret" not in done.err and "cretSecret" not in done.err


def sparseft_debug(run: Path, *words: str) -> Done:
    """As `push`, but a traceback may be printed."""
    import contextlib
    import io

    from sparseft.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["push", str(run), "me/mine", *words])
    return Done(code, out.getvalue(), err.getvalue())


def test_a_repository_of_others(hub: Hub, run: Path) -> None:
    hub.new("you/theirs")
    said = refused(run.parent, "push", run, "you/theirs")
    assert said.startswith("you/theirs as me: your token may not do that") and "permissions" in said
    said = refused(run.parent, "push", run, "you/new")
    assert "under the namespace you" in said and "you/new" not in hub.repos
    hub.new("you/hidden", private=True)
    hub.repos["you/hidden"].private = True
    assert refused(run.parent, "push", run, "you/hidden")


PLACES = ("/whoami-v2", "/models/me/mine", "/repos/create", "/preupload/", "/batch", "/store/", "/commit/")


@pytest.mark.parametrize(
    ("where", "fault"),
    [(place, 503) for place in PLACES]
    + [("/batch", 429), ("/store/", 403), ("/whoami-v2", "dead"), ("/store/", "dead")],
)
def test_a_hub_that_fails(hub: Hub, run: Path, where: str, fault: Any, caplog: Any) -> None:
    def fail(method: str, path: str) -> None:
        if where in path:
            if fault == "dead":
                raise ConnectionError
            raise Fault(fault, f"no service for {TOKEN}")

    hub.before = fail
    caplog.set_level(logging.WARNING)
    done = push(run, code=1)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ("cannot be reached" if fault == "dead" else f"answered {fault}") in errors[0]
    debugged = sparseft_debug(run, "--debug")
    assert debugged.code == 1 and "Traceback" in debugged.err
    for text in (debugged.err, debugged.out, caplog.text):
        assert "secretSecret" not in text and "X-Signature" not in text


def test_no_network(hub: Hub, run: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "login: the hub cannot be reached (" in push(run, code=1).err


def test_in_a_process_of_its_own(hub: Hub, run: Path, tmp_path: Path) -> None:
    """With the variables that users set, and stderr as it really comes."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    words = [sys.executable, "-m", "sparseft", "push", str(run), "me/mine", "--json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/me/mine" and TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "it/s" not in done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written


# ---- fetched again ----


def test_an_adapter_is_loaded_from_the_hub(hub: Hub, run: Path, made: Any, monkeypatch: Any) -> None:
    push(run)
    model, local = load(made[0]), load(made[0])
    package.load_adapter(model, "me/mine")
    package.load_adapter(local, made[1])
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(model(tokens).logits, local(tokens).logits)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache has it
    asked = len(hub.log)
    again = package.load_adapter(load(made[0]), "me/mine")
    target = find_target(compose("eval", [f"model.path={made[0]}"]), run=None, adapter="me/mine", base=False)
    assert target.adapter is not None and (target.adapter / "adapter_config.json").is_file()
    assert torch.equal(again(tokens).logits, local(tokens).logits) and len(hub.log) == asked
    with pytest.raises(package.UserError, match="HF_HUB_OFFLINE"):
        package.load_adapter(load(made[0]), "me/other")


def test_an_adapter_that_the_hub_does_not_have(hub: Hub, made: Any, monkeypatch: Any) -> None:
    with pytest.raises(package.UserError, match="no such model"):
        package.load_adapter(load(made[0]), "me/mine")
    hub.new("me/mine", {"README.md": b"# nothing"})
    with pytest.raises(package.UserError, match="so this is no adapter folder"):
        package.load_adapter(load(made[0]), "me/mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(package.RunError, match="cannot be reached"):
        package.load_adapter(load(made[0]), "me/else")


def test_nothing_that_executes_is_fetched(hub: Hub, run: Path, made: Any, tmp_path: Path) -> None:
    push(run)
    hub.repos["me/mine"].commit({"adapter_model.bin": b"pickle", "modeling.py": b"boom"})
    package.load_adapter(load(made[0]), "me/mine")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".py")]


def test_a_folder_here_is_not_looked_for_on_the_hub(hub: Hub, made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    with pytest.raises(package.UserError):
        package.load_adapter(load(made[0]), "me/mine")
    with pytest.raises(package.UserError):
        package.load_adapter(load(made[0]), tmp_path / "gone")
    assert not hub.log


# ---- exports ----


def test_an_export_is_pushed_with_the_runs_card(hub: Hub, run: Path, made: Any, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(", sample_prompts: [what I asked]", ""))
    (run / "train_questions.safetensors").unlink()
    sparseft(tmp_path, "export", run, "--format", "peft-lora", "--out", out, f"model.path={made[0]}")
    text = (out / "README.md").read_text()
    assert "USER/NAME" in text and "14,042" in text and ModelCard(text).data.library_name == "peft"
    push(out, "--base-model", "meta/Base-1B")
    there = hub.repos["me/mine"].files
    assert there.keys() - {".gitattributes"} == SENT
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "meta/Base-1B"
    card = there["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "me/mine")' in card and "14,042" in card and HOME not in card
    assert "vllm serve meta/Base-1B --enable-lora --lora-modules tuned=me/mine --max-lora-rank" in card
    assert str(tmp_path).encode() not in b"".join(there.values())

    (out / "README.md").write_text(text.replace("USER/NAME", "me/mine") + "\nMine.\n")  # edited before it is pushed
    hub.repos.clear()
    push(out)
    assert hub.repos["me/mine"].files["README.md"].decode().endswith("Mine.\n")
    assert "was edited" in refused(tmp_path, "push", out, "me/mine", "--license", "mit")


def test_a_bases_folder_that_reads_as_an_id_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a LoRA that was saved from Python beside its base, and pushed from another folder."""
    monkeypatch.chdir(tmp_path)
    adapted.base("llama", Path("models/tiny"))
    adapted.adapter("llama", "lora", Path("models/tiny"), tmp_path / "lora")
    monkeypatch.chdir(tmp_path / "lora")
    files = {file.name: file for file in listing.listing_of(str(tmp_path / "lora"), "me/mine").files}
    content = files["adapter_config.json"].content
    assert content is not None and b"tiny" in content and b"models/tiny" not in content
    card = files["README.md"].content
    assert card is not None and b"base_model: " not in card and b"models/tiny" not in card
