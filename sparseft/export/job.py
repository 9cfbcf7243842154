"""One export: checked, written aside, proven, and only then put in its place."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft import __version__, console
from sparseft.errors import UserError, reason_of
from sparseft.export import NOTE, README, engines
from sparseft.export.changed_tensors import base_of
from sparseft.export.formats.base import Format, Options
from sparseft.export.gain import gain
from sparseft.export.proof import prove
from sparseft.export.source import Source
from sparseft.files.atomic import check_replaceable, explained, name_leftovers, replaced_folder, write_json, write_text
from sparseft.files.untrusted import read_json
from sparseft.models import fingerprint
from sparseft.models.checkpoint import Checkpoint, Places, without_weights
from sparseft.models.loading import load_model, resolve_device

WRITTEN = "written"  # in the note: the names of all other files


def export(
    source: Source,
    format: Format,
    out: str | Path,
    options: Options,
    readme: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Writes `source` in a format into the folder `out`, whole or not at all.

    readme: makes the text of a README.md of the format's facts.

    Returns what the command prints: path, format, facts of the format, and the proof's numbers.

    Raises:
        UserError: a format that does not hold it, an engine that would refuse it, a folder with other files.
        RunError: what was written is not what was trained; nothing of it is kept.
    """
    out = Path(out).expanduser()
    former = [glob.escape(name) for name in written_in(out) or ()]
    check_replaceable(out.resolve(), (NOTE,), former)
    name_leftovers(out.resolve())
    _check_apart(source, out, options)
    engines.check(options.engine, format.name)
    if source.stored_packed and not format.whole:
        raise UserError(
            f"--format {format.name}: of the base {source.target.model.path}, whose files are packed "
            f"({source.stored_packed}), whole models are written alone: use --format merged or packed."
        )
    _ = source.tokenizer  # the proof needs it
    check_base(source)
    notes = format.check(source, options)
    for note in notes:
        console.log(note)
    with (
        explained(f"the export {out}", lambda: None),
        replaced_folder(out.resolve(), (NOTE,), former) as aside,
    ):
        with console.working(f"writing {format.name}"):
            facts = format.write(source, options, aside)
        with console.working("checking every value that was written"):
            format.verify(source, options, aside)
        proof = prove(source, format, options, aside)
        about = {
            "sparseft": __version__,
            "format": format.name,
            "of": source.target.what,
            "base_model": source.target.model.path,
        }
        if readme is not None:
            write_text(aside / README, readme(facts))
        written = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())
        about |= {"method": source.method} | facts | {"proof": proof, WRITTEN: written}
        write_json(aside / NOTE, about)
    kept = gain(source, out, options.base) if format.whole else None  # an interrupt takes nothing away any more
    if kept is not None:
        try:
            write_json(out / NOTE, about | {"gain": kept})
        except OSError as error:  # the export is in its place and whole
            console.warn(f"{out / NOTE} does not say how much of what was learnt survived: {reason_of(error)}")
    rank = facts.get("r")  # of formats that have none, null
    found = {"path": str(out), "format": format.name, "rank": rank, **facts, "notes": notes, "proof": proof}
    return found if kept is None else found | {"gain": kept}


def written_in(folder: Path) -> list[str] | None:
    """The files that an export has written into a folder, as paths in it; None where none says so: all else that lies
    there is the user's own."""
    try:
        content = read_json(folder / NOTE)
    except (OSError, ValueError):
        return None
    written = content.get(WRITTEN) if isinstance(content, dict) else None
    return written if isinstance(written, list) and all(isinstance(name, str) for name in written) else None


def check_base(source: Source) -> None:
    """Refuses (`UserError`) an adapter that was made for other weights than the base's files hold: a few values
    are read, and one that is packed in its files is loaded. Of a base in others than safetensors, or with weights that
    no file has, only the proof knows."""
    if source.fingerprint is None or source.kind == "full":
        return
    content = source.content if source.kind == "sparse" else source.content["sparseft"]
    with console.working("checking the base"):
        if source.stored_packed:
            model = load_model(base_of(source), resolve_device(source.config.hardware.device))
            return fingerprint.check_base(
                fingerprint.base_fingerprints(model), str(content.get("base_dtype")), source.folder, content
            )
        model = without_weights(base_of(source))
        try:
            checkpoint = Checkpoint.of(base_of(source))
        except UserError:
            return
        places = Places(model, checkpoint.tensors)
        if not all(map(places.holds, places.parameters)):
            return
        found = fingerprint.fingerprints_of(places.entries(checkpoint.read))
    fingerprint.check_base(found, str(content.get("base_dtype")), source.folder, content)


def _check_apart(source: Source, out: Path, options: Options) -> None:
    """Refuses a folder in which something lies that is needed: what is exported, or its base, which may be an earlier
    export."""
    models = [model.path for model in (source.target.model, source.target.base) if model is not None]
    places = {source.folder: "what is exported"}
    places |= {
        Path(path).expanduser(): "the base model" for path in (*models, source.content.get("base_model")) if path
    }
    if options.base_gguf is not None:
        places[Path(options.base_gguf).expanduser()] = "the base of --base-gguf"
    for place, what in places.items():
        if place.exists() and place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {out}: there lies {what}; name a new folder.")
