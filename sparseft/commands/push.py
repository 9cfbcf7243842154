"""`sparseft push RUN REPO`: a model card and the files of a run, to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft import console
from sparseft.errors import UserError, shown
from sparseft.publish.card import CARD, checked
from sparseft.publish.facts import is_hub_id
from sparseft.publish.listing import Listing, listing_of
from sparseft.publish.push import check_repo, push, url_of
from sparseft.report.numbers import count


def run(
    folder: str,
    repo: str,
    *,
    dry_run: bool = False,
    private: bool = False,
    overwrite_card: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
    include: Sequence[str] = (),
) -> dict[str, Any]:
    """Sends `folder` to `repo`, or only says what would be sent; returns `{"repo", "url", "files", "left_out", …}`."""
    check_repo(repo)
    if base_model is not None and not is_hub_id(base_model):
        raise UserError(f"--base-model {base_model}: expected the base's id on the hub, owner/name.")
    if licence is not None and not licence.strip():
        raise UserError("--license is empty: expected the hub's name of the base's licence, such as apache-2.0.")
    listing = listing_of(folder, repo, base=base_model, licence=licence, include=include)
    for line in _lines(listing):
        console.log(line)
    _warn(listing)
    result: dict[str, Any] = {
        "repo": repo,
        "url": url_of(repo),
        "files": [{"path": file.name, "bytes": file.size} for file in listing.files],
        "left_out": [{"path": name, "bytes": size, "why": why} for name, size, why in listing.left_out],
        "dry_run": dry_run,
    }
    if dry_run:
        return result | {"card_text": listing.card}
    done = push(listing, repo, private=private, overwrite_card=overwrite_card)
    if done.card == "kept":
        console.warn(f"the {CARD} there was edited by a person, so it stays as it is: --overwrite-card replaces it.")
        result["files"] = [file for file in result["files"] if file["path"] != CARD]
    facts = {"commit": done.commit, "news": done.news, "card": done.card, "private": done.private}
    return result | facts


def _warn(listing: Listing) -> None:
    data = checked(listing.card).data
    if not data.get("base_model"):
        console.warn(
            "the card names no base model that others can load: it was none of the hub's here; --base-model OWNER/NAME "
            "says which it is."
        )
    if not data.get("license"):
        console.warn("the licence of the base is not known here, so the card states none: --license NAME states it.")


def _lines(listing: Listing) -> list[str]:
    """The files with their sizes, and what is left out, by reason."""
    width = max(len(file.name) for file in listing.files)
    lines = [f"{listing.what}, to be sent:"]
    lines += [f"  {shown(file.name):<{width}}  {_size(file.size):>10}" for file in listing.files]
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for name, size, why in listing.left_out:
        by_reason.setdefault(why, []).append((name, size))
    if by_reason:
        lines.append("left out:")
    for why, found in by_reason.items():
        names = sorted({f"{name.split('/')[0]}/" if len(found) > 3 and "/" in name else name for name, _ in found})
        lines.append(f"  {', '.join(map(shown, names))} ({_size(sum(size for _, size in found))}): {why}")
    return lines


def _size(bytes: int) -> str:
    """As the hub shows it: in powers of a thousand."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes >= limit:
            return f"{bytes / limit:.1f} {unit}"
    return f"{count(bytes)} B"


def render(result: dict[str, Any]) -> None:
    """Where it lies now; of a dry run the card."""
    size = _size(sum(file["bytes"] for file in result["files"]))
    if result["dry_run"]:
        print(result["card_text"])
        print(f"nothing was sent: {len(result['files'])} files ({size}) would go to {result['url']}")
        return
    what = "pushed to" if result["news"] else "lie already, as they are here, in"
    print(f"{len(result['files'])} files ({size}) {what} {result['url']}{' (private)' if result['private'] else ''}")
