"""The Hugging Face hub: adapters fetched by their id, and what goes wrong there in a sentence that no token gets into.

huggingface_hub is imported where it is used. Offline (`HF_HUB_OFFLINE=1`) the hub's cache is all there is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.errors import HUB_ID, RunError, UserError, looks_local, nearest_path, shown, without_secrets

TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's chat templates beside its first one

# What a tokenizer is kept in, in a folder of whatever kind.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.vocab", "tekken.json", "chat_template*"),
)

# What an adapter's or a whole model's folder may hold: safetensors, JSON and a tokenizer, nothing that executes.
ADAPTER_FILES = [
    *("adapter_config.json", "adapter_model.safetensors", "sparseft_config.json", "config.json"),
    *("generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(*TOKENIZER_FILES, f"{TEMPLATES}/*"),
]

# What a new adapter takes the place of, in the folder of another one: also the code that transformers copies beside a
# model, and whatever else tokenizers are kept in. Files of another kind (a GGUF made there) are somebody's own.
REPLACED = (*ADAPTER_FILES, "*.json", "*.txt", "*.codes", "*.py", "*.safetensors", "README.md")

NAME = "expected owner/name, of letters, digits, '-', '_' and '.'"


def check_inside(paths: Iterable[Path], folder: Path) -> None:
    """Refuses files of a folder that are links out of it: what they name was not put there to be given away. The files
    of a snapshot in the hub's cache are links into the `blobs` of its own repository, which count as its own.

    Raises:
        UserError: names the first.
    """
    inside = folder.resolve()
    own = [inside, *([inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else [])]
    for path in paths:
        if not any(path.resolve().is_relative_to(each) for each in own):
            raise UserError(
                f"{path} is a link that leads out of its folder, which is not followed: put the file that it names in "
                "its place, or take it away."
            )


def adapter_folder(path: str | Path, option: str = "") -> Path:
    """The folder of an adapter: itself where it is one, and of a hub id `owner/name` that is no path here its copy in
    the hub's cache, fetched unless it is up to date there. option: how the user gave it, for messages.

    Raises:
        UserError: the hub has no such model, or it is private, or it is not in the cache and the hub may not be asked.
        RunError: the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    name = str(path)
    if folder.exists() or not HUB_ID.fullmatch(name) or looks_local(name):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hint = nearest_path(name)
    with explained(f"{option}{name}: no such folder.{hint} As an id of the hub"), calm():
        try:
            return Path(snapshot_download(name, allow_patterns=ADAPTER_FILES))
        except LocalEntryNotFoundError:
            if is_offline():
                why = "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub"
                raise UserError(f"{option}{name}: no such folder.{hint} As an id of the hub: {why}.") from None
            raise


def cached_file(repo: str, name: str) -> Path | None:
    """A file of a model in the hub's cache, None where it is not there. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Inside, huggingface_hub shows its bars only where this program would, on a terminal and not when quiet, and logs
    errors alone: what it says of each try again quotes addresses that are signed."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown = console.is_terminal(sys.stderr) and not console.is_quiet()
    hides, verbosity = not shown and not are_progress_bars_disabled(), logging.get_verbosity()
    if hides:
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hides:
            enable_progress_bars()


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` says that the hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Inside, what the hub or the way to it refuses becomes a sentence about `what`: UserError where the name, the
    token or its rights are wrong, else RunError.

    The errors of the libraries end here: their texts, and those of what they come from, may quote a request's headers.
    """
    problem: Exception
    try:
        yield
        return
    except (UserError, RunError):
        raise
    except Exception as error:
        problem = _problem(what, error)
    raise problem from None  # so that no traceback shows them either


def _problem(what: str, error: Exception) -> Exception:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError):  # of the storage, not the hub
        return RunError(f"{what}: the hub's storage answered {_status(error.__cause__)}: try again.")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked: unset it.")
    if isinstance(error, HFValidationError):
        return UserError(f"{what}: no name that the hub takes: {NAME}.")
    if isinstance(error, GatedRepoError):
        return UserError(f"{what}: the hub asks who you are, and to accept the model's terms on its page first.")
    if isinstance(error, HfHubHTTPError):
        status = _status(error)
        said = f" The hub says: {without_token(error.server_message)}" if error.server_message else ""
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return UserError(f"{what}: the hub does not know your token: make one that can write and `hf auth login`.")
        if status == 403:
            return UserError(f"{what}: your token may not do that.{said}")
        if status in (401, 404):
            return UserError(f"{what}: the hub has no such model, or it is private and your token may not see it.")
        if status == 400:
            return UserError(f"{what}: the hub refuses it.{said}")
        if status in (409, 412):
            return RunError(f"{what}: somebody else has changed it meanwhile: try again.")
        return RunError(f"{what}: the hub answered {status or 'nothing that could be read'}: try again later.{said}")
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError.__bases__):  # an HTTP library's, and the system's
        return RunError(f"{what}: the hub cannot be reached ({_cause(cause)}): try again.")
    return RunError(f"{what}: huggingface_hub failed ({type(error).__name__}: {without_token(str(error))}).")


def _status(error: Any) -> int:
    """Of the answer that an error of the hub is about; 0: there was none."""
    return 0 if error.response is None else int(error.response.status_code)


def _cause(error: BaseException) -> str:
    """The kind of what lies at the bottom of an error, and its words where they are the system's."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    words = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {words}" if isinstance(error, OSError) and words else type(error).__name__


def without_token(text: str) -> str:
    """A text with the user's token, should it stand there, and the secrets of URLs taken out; on one line."""
    from huggingface_hub import get_token

    token = get_token()
    text = without_secrets(text.replace(token, "***") if token else text)
    return shown(" ".join(text.split()), 300)
