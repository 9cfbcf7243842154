"""Which files of a folder are published, which are left out, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparseft.adapters.description import is_adapter, is_whole_model, read_config
from sparseft.errors import UserError, nearest, nearest_path, where_looked
from sparseft.export import NOTE
from sparseft.export.job import written_in
from sparseft.files.atomic import PARTIAL, dumps
from sparseft.files.hashing import check_whole, file_hash
from sparseft.files.hub import ADAPTER_FILES, TEMPLATES, check_inside
from sparseft.files.tensors import ADAPTER_CONFIG, ADAPTER_TENSORS, WHOLE_CONFIG
from sparseft.files.untrusted import parse_json, read_bytes, read_json_object
from sparseft.publish.card import CARD, card_of, checked, filled, is_untouched
from sparseft.publish.facts import check_finished, facts_of, shown_path
from sparseft.runs import folder as runs

# Why a file is not sent, by the first pattern that fits its path. Patterns reach into folders (`*` is `/` too).
TRAINING = "what training continues from: optimizer and random states, which load as pickles"
ANSWERS = "prompts and answers, maybe of other people's data"
WATCHED = "what trackers keep: folders of this machine, prompts and answers, maybe who you are"
IN_THE_CARD = "the card has its facts; it names folders of this machine"
REASONS = (
    (f"{runs.CHECKPOINTS}/*", TRAINING),
    (runs.QUESTIONS, "hashes of the training questions, by which one could ask what was trained on"),
    ("*samples.jsonl", ANSWERS),
    ("eval/mt_bench/*", ANSWERS),
    (runs.REPORT, "may hold prompts and answers"),
    *((name, WATCHED) for name in (runs.TRACKERS, *(f"{folder}/*" for folder in runs.TRACKED))),
    (f"{runs.SELECTION}/*", "the adapter has its indices"),
    *((name, IN_THE_CARD) for name in (runs.CONFIG, runs.ENVIRONMENT, runs.METRICS, runs.SUMMARY, "eval/*.json")),
    (NOTE, IN_THE_CARD),
    (f"{runs.ADAPTER}/{CARD}", "the card takes its place"),
    (f"*{PARTIAL}*", "left by a crash"),
    *((f"*{ending}", "a pickle, which can execute code") for ending in (".bin", ".pt", ".pth", ".pkl")),
)
OTHER = "no part of what is loaded"

IN_MEMORY = 1 << 20  # bytes up to which a file is read once, and sent as it was then
DESCRIBED = (ADAPTER_CONFIG, WHOLE_CONFIG, "patch.json")  # files that name the base


@dataclass(frozen=True)
class Stamp:
    """By which a file that changes is noticed: any write moves the time of its last change, which nobody can set."""

    size: int
    changed: int
    inode: int

    @staticmethod
    def of(path: Path) -> Stamp:
        found = path.stat()
        return Stamp(found.st_size, found.st_ctime_ns, found.st_ino)


@dataclass
class File:
    """One file to send. content: of a small one, as it is sent; a large one is sent from where it lies."""

    name: str
    path: Path
    stamp: Stamp
    content: bytes | None = None

    @property
    def size(self) -> int:
        return self.stamp.size if self.content is None else len(self.content)

    def has_changed(self) -> bool:
        """Whether a large file is another one than when it was listed."""
        try:
            return self.content is None and Stamp.of(self.path) != self.stamp
        except OSError:
            return True


@dataclass
class Listing:
    """What is sent of a folder. card: the text of its README.md, which is among the files."""

    what: str
    files: list[File]
    left_out: list[tuple[str, int, str]]  # path, bytes, why
    card: str


def listing_of(
    folder: str, repo: str, *, base: str | None = None, licence: str | None = None, include: Sequence[str] = ()
) -> Listing:
    """What `push` sends of a run, an adapter's folder or one that `export` has made.

    base, licence: the base's id on the hub and its licence, where the folder does not know them.
    include: patterns of paths in the folder that are sent too, though they are left out otherwise.

    Raises:
        UserError: no such folder, a run that has not finished, files that were altered, a pattern that fits nothing.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")
    if runs.is_checkpoint(path):
        path = path / runs.ADAPTER
    above = path.absolute().parent
    if path.name == runs.ADAPTER and runs.is_run(above) and not runs.is_checkpoint(above) and not runs.is_run(path):
        path = above  # it knows more than its adapter's folder
    if (path / NOTE).is_file():
        what, root = f"the export {path}", path
        place = path
        if (written := written_in(path)) is None:
            raise UserError(
                f"{path / NOTE} does not say which files were written, as an earlier version made it: export it again, "
                "into a new folder."
            )
        wanted = [
            each
            for each in _loaded_from(path)
            if each.relative_to(path).as_posix() in written and not _reason(each.name) and each.name != CARD
        ]
        text = _card_of_export(path)
    elif runs.is_run(path) or is_adapter(path):
        run = runs.is_run(path)
        what, root = f"the run {path}" if run else f"the adapter {path}", path
        if run:
            check_finished(path)
        place = path / runs.ADAPTER if run else path
        check_intact(place)
        wanted = [
            each
            for each in _loaded_from(place)
            if any(fnmatch(each.relative_to(place).as_posix(), name) for name in ADAPTER_FILES)
        ]
        text = card_of(facts_of(path))
    else:
        raise UserError(f"{folder}: neither a run, nor an adapter, nor a folder that `sparseft export` has made.")
    if is_untouched(text):
        text = filled(text, repo, base, licence)
    elif base or licence:
        raise UserError(f"{path / CARD} was edited: write the base model and its licence there, not as options.")
    else:
        checked(text, str(path / CARD))
    check_inside(wanted, place)
    files = [_file(each.relative_to(place).as_posix(), each, base) for each in wanted]
    taken = {each.resolve() for each in wanted}
    others = [each for each in _below(root) if each.resolve() not in taken and each != root / CARD]
    included = _included(root, others, include)
    if twice := {file.name for file in files} & {each.relative_to(root).as_posix() for each in included}:
        raise UserError(f"--include: '{min(twice)}' is the name of a file of the adapter.")
    files += [_file(each.relative_to(root).as_posix(), each, None) for each in included]
    left = []
    for each in others:
        if each not in included:
            name = each.relative_to(root).as_posix()
            left.append((name, each.stat().st_size, _reason(name) or OTHER))
    encoded = text.encode()
    card = File(CARD, root / CARD, Stamp(len(encoded), 0, 0), encoded)
    return Listing(what, [card, *files], left, text)


def check_intact(folder: Path) -> None:
    """Refuses an adapter whose tensors are not those that it describes: truncated, altered, or half written; and a
    model that does not load without code of its own."""
    if is_whole_model(folder):
        check_whole(folder)
        if "auto_map" in read_json_object(folder / "config.json", numbers=False):
            raise UserError(
                f"{folder / 'config.json'} names Python code of the model's own (auto_map), which is not pushed: push "
                "the folder that `sparseft export --format merged model.trust_remote_code=true` leaves."
            )
        return
    content = read_config(folder)
    own = content if "peft_type" not in content else content.get("sparseft") or {}
    tensors = folder / ADAPTER_TENSORS
    if not tensors.is_file():
        raise UserError(f"{tensors}: no such file: the adapter is not whole.")
    known = own.get("sha256")
    if known is not None and file_hash(tensors) != known:
        raise UserError(f"{folder}: {ADAPTER_TENSORS} is not the file that {ADAPTER_CONFIG} describes (altered).")


def _card_of_export(folder: Path) -> str:
    check_inside([folder / CARD], folder)
    try:
        return read_bytes(folder / CARD).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CARD}: export it again, which writes one, or write your own.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CARD}: cannot be read ({error}).") from error


def _loaded_from(folder: Path) -> list[Path]:
    """The files of a folder from which something is loaded, and its further chat templates."""
    return sorted(each for each in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")) if each.is_file())


def _below(root: Path) -> Iterator[Path]:
    """Every file below a folder but a run's lock; what links out of it is none of its own."""
    inside = root.resolve()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != runs.LOCK and path.resolve().is_relative_to(inside):
            yield path


def _reason(name: str) -> str | None:
    return next((why for pattern, why in REASONS if fnmatch(name, pattern)), None)


def _included(root: Path, others: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    names = {each.relative_to(root).as_posix(): each for each in others}
    found: dict[str, Path] = {}
    for pattern in patterns:
        fits = [name for name in names if fnmatch(name, pattern)]
        if not fits:
            raise UserError(f"--include {pattern}: no file of {root} is called so.{nearest(pattern, names)}")
        for name in fits:
            if _reason(name) == TRAINING:
                raise UserError(f"--include {pattern}: '{name}' is never sent: {TRAINING}.")
            found[name] = names[name]
    return list(found.values())


def _file(name: str, path: Path, base: str | None) -> File:
    stamp = Stamp.of(path)
    if stamp.size > IN_MEMORY and name not in DESCRIBED:
        return File(name, path, stamp)
    content = read_bytes(path)
    if name in DESCRIBED:
        content = dumps(_public(read_described(path, content), base), indent=2).encode() + b"\n"
    return File(name, path, stamp, content)


def read_described(path: Path, content: bytes) -> dict[str, Any]:
    """A description that was read already; what is no JSON object is the `UserError` of reading it."""
    try:
        parsed = parse_json(content.decode("utf-8"))
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else read_json_object(path)


def _public(content: dict[str, Any], base: str | None) -> dict[str, Any]:
    """A description whose base is a name that strangers can load: `base`, or of a folder its last part alone."""
    changed, own = dict(content), content.get("sparseft")
    for key in ("base_model", "base_model_name_or_path", "model"):  # the last one is mlx-lm's
        if isinstance(name := changed.get(key), str):
            if isinstance(own, dict) and own.get("base_model") == f"./{name}":
                name = f"./{name}"  # a folder, of which PEFT does not say that it is one
            changed[key] = base or shown_path(name)
    if isinstance(own, dict):
        changed["sparseft"] = _public(own, base)
    return changed
