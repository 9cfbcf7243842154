"""Whether an adapter is of the base it is exported with: asked of the base's files, before anything is written."""

from __future__ import annotations

from sparseft import console
from sparseft.errors import UserError
from sparseft.export.changed_tensors import base_of
from sparseft.export.source import Source
from sparseft.models import fingerprint
from sparseft.models.checkpoint import Checkpoint, Places, without_weights
from sparseft.models.decoder import base_parameters
from sparseft.models.loading import load_model, resolve_device


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
        names = sorted(name for name, _ in base_parameters(model))
        if not all(map(places.holds, names)):
            return
        found = fingerprint.fingerprints_of((name, places.parameter(name, checkpoint.read)) for name in names)
    fingerprint.check_base(found, str(content.get("base_dtype")), source.folder, content)
