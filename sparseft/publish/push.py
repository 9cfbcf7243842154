"""Sends what `listing` has listed to a repository of the Hugging Face hub, in one commit: all of it or nothing.

Large files go first, into the hub's storage, where nobody sees them yet; the commit that names them comes last. A push
that was interrupted is called again: what the storage has already is not sent twice. The commit names the one it
follows, so that it never undoes what somebody else has committed meanwhile.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparseft import __version__, console
from sparseft.errors import RunError, UserError, shown, without_secrets
from sparseft.files.hub import NAME, calm, explained, is_offline
from sparseft.publish.card import CARD, is_untouched
from sparseft.publish.listing import Listing

# What a loader takes a repository for: of another kind than what is pushed, it would win over it, or be taken along.
LOADED = "adapter_config.json adapter_model.* adapters.* config.json model*.safetensors patch.* *.gguf".split()


@dataclass
class Pushed:
    """What came of it.

    card: written | kept (a person has edited it); news: whether any file differs from what lay there.
    """

    url: str
    commit: str
    card: str
    private: bool
    news: bool


def check_repo(repo: str) -> None:
    """Refuses a repository's name that the hub would refuse; asks no network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        right = repo.count("/") == 1
    except HFValidationError:
        right = False
    if not right:
        raise UserError(f"'{shown(repo)}' is no repository's name: {NAME}.")


def url_of(repo: str) -> str:
    """Where a repository is looked at."""
    from huggingface_hub import constants

    return f"{without_secrets(constants.ENDPOINT)}/{repo}"


def push(listing: Listing, repo: str, *, private: bool = False, overwrite_card: bool = False) -> Pushed:
    """Sends the files to `repo`, which is made where it is not there. What else lies there stays.

    Raises:
        UserError: no token, a wrong one, or one without the right; a repository that holds something else.
        RunError: the hub cannot be reached or fails, or a file was changed while it was sent; nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_token()
    api = HfApi(library_name="sparseft")
    with explained("login"):
        user = str(api.whoami().get("name"))
    with explained(repo):
        head, names, hidden = _state(api, repo)
        if head is None:
            with explained(f"{repo} as {user}"):
                api.create_repo(repo, private=private or None, exist_ok=True)  # None: as its owner has settled
            head, names, hidden = _state(api, repo)
            console.log(f"made {url_of(repo)}{' (private)' if hidden else ''}")
        elif private and not hidden:
            raise UserError(f"{repo} is public already: --private is for a new one; change it in its settings.")
        others = names - {file.name for file in listing.files}
        if foreign := sorted(name for name in others if any(fnmatch(name, pattern) for pattern in LOADED)):
            raise UserError(
                f"{repo} holds {foreign[0]}, which is no part of {listing.what} and would be loaded beside or before "
                "it: push to another repository, or delete it there."
            )
        keeps = CARD in names and not overwrite_card and not is_untouched(_their_card(api, repo, head))
        files = [file for file in listing.files if not (keeps and file.name == CARD)]
        operations = [
            CommitOperationAdd(file.name, file.path if file.content is None else file.content) for file in files
        ]
    with explained(f"{repo} as {user}"), calm():
        api.preupload_lfs_files(repo, operations, free_memory=False)
        if changed := [file.name for file in files if file.has_changed()]:
            raise RunError(f"{changed[0]} was changed while it was sent: nothing was committed; push again.")
        done = api.create_commit(repo, operations, commit_message=f"sparseft {__version__}", parent_commit=head)
        _, names, hidden = _state(api, repo)
        if missing := sorted({file.name for file in files} - names):
            raise RunError(f"{repo} does not hold {missing[0]}, which was sent: does its .gitignore name it?")
    return Pushed(url_of(repo), done.oid, "kept" if keeps else "written", hidden, done.oid != head)


def _check_token() -> None:
    """Refuses to start without a token, and with one that no header can hold: a library's error would quote it."""
    from huggingface_hub import get_token

    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or see what would be by --dry-run.")
    token = get_token()
    if not token:
        raise UserError("no token of the hub: set HF_TOKEN, or log in by `hf auth login`, with one that can write.")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("the hub's token (HF_TOKEN, or that of `hf auth login`) holds characters that no token has.")


def _state(api: Any, repo: str) -> tuple[str | None, set[str], bool]:
    """The last commit (None: there is no such repository), the names of its files, and whether it is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return None, set(), False
    return info.sha, {file.rfilename for file in info.siblings or []}, bool(info.private)


def _their_card(api: Any, repo: str, head: str | None) -> str:
    with tempfile.TemporaryDirectory() as place:  # not the cache: a card that was cached could be an older one
        path = api.hf_hub_download(repo, CARD, revision=head, local_dir=place)
        return Path(path).read_bytes().decode("utf-8", "replace")
