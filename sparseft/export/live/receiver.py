"""The sampler's side of live patching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import RunError, UserError, shown
from sparseft.export.holders import Holder, Slot, holder_of, rest_fingerprint
from sparseft.export.live.messages import BEGIN, END, STEP, Message, Part, unpack_begin, values_in, values_size
from sparseft.export.live.sender import TIMEOUT
from sparseft.export.live.transports import Folder, PatchPeer
from sparseft.files.tensors import Stored

# What a server's own loader of sparse updates takes: name, full shape, dtype, flat indices (k,), new values (k,).
Update = Callable[[str, tuple[int, ...], torch.dtype, Tensor, Tensor], Any]


class PatchReceiver:
    """Keeps a model's weights those of the model that a `PatchSender` in another process sends from, bit for bit.

    `for step in receiver:` applies one step after another until the sender closes; `receiver.receive()` the next one.
    A step is applied as a whole or not at all: one that was lost, comes twice, out of order or damaged is refused, and
    the weights stay those of the step before.

    target: a plain model of transformers, or a state dict with the checkpoint's names, on any device and in the
    sender's dtype, changed in place; or a function `update(name, shape, dtype, indices, values)`, called for each
    tensor of a step, in the checkpoint's own coordinates: what a server's loader of sparse updates takes.
    source: the folder or the `PatchPeer` that the sender sends to. timeout: seconds to wait for a step (of a peer:
    those of its group count).

    Raises:
        UserError: a target with another base than the sender's, or in another dtype.
        RunError: a step that does not follow the one before, or none in time.
    """

    def __init__(
        self,
        target: nn.Module | Mapping[str, Tensor] | Update,
        source: str | Path | PatchPeer,
        *,
        timeout: float = TIMEOUT,
    ) -> None:
        self.target, self.timeout = target, timeout
        self.transport = source if isinstance(source, PatchPeer) else Folder(source)
        self.update: Update | None = None
        if not isinstance(target, nn.Module | Mapping):
            if not callable(target):
                raise UserError(f"expected a model, a state dict or a function to update, got {type(target).__name__}.")
            self.update = target
        self.step = 0  # the last one that was applied
        self._session: int | None = None
        self._plan = 0
        self._moving: list[Part] = []
        self._slots: dict[str, list[Slot]] = {}
        self._ended = False

    def receive(self, timeout: float | None = None) -> int | None:
        """Waits for the next step and applies it; returns its number, None once the sender has closed."""
        if self._ended:
            return None
        message = self.transport.receive(self.timeout if timeout is None else timeout)
        self._check(message)
        if message.kind == END:
            self._ended = True
        elif message.kind == BEGIN:
            self._begin(message)
        else:
            if message.body.numel() != values_size(self._moving):
                raise RunError(f"step {message.sequence} does not hold the values that were announced.")
            self._apply(message.body)
        self.transport.applied(message)
        if self._ended:
            return None
        self.step = message.sequence
        return self.step

    def __iter__(self) -> Iterator[int]:
        while (step := self.receive()) is not None:
            yield step

    def close(self) -> None:
        """Takes no further step."""
        self._ended = True

    def __enter__(self) -> PatchReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, message: Message) -> None:
        """Refuses a message that is not the one after the last."""
        there = f"the weights are those of step {self.step}."
        if self._session is None:
            if message.kind != BEGIN or message.sequence != 1:
                raise RunError(f"the sender has begun before this receiver: it is at step {message.sequence}.")
        elif message.session != self._session:
            raise RunError(f"another sender has begun; {there} Make a new receiver on the base's weights.")
        if message.sequence > self.step + 1:
            raise RunError(f"step {self.step + 1} was lost: step {message.sequence} came; {there}")
        if message.sequence <= self.step:
            raise RunError(f"step {message.sequence} came again, or late; {there}")
        if message.kind == STEP and message.plan != self._plan:
            raise RunError(f"step {message.sequence} is of other entries than were announced; {there}")

    def _begin(self, message: Message) -> None:
        described, still, moving, values = unpack_begin(message.body)
        if values.numel() != values_size(moving):
            raise RunError(f"step {message.sequence} does not hold the values that were announced.")
        slots: dict[str, list[Slot]] = {}
        once: list[tuple[Part, Tensor, list[Slot]]] = [(part, given, []) for part, given in still]
        if self.update is None:
            checkpoint = {str(name): tuple(shape) for name, shape in described["checkpoint"].items()}
            holder = holder_of(self.target, checkpoint)
            _check_target(holder, described, checkpoint, [*(part for part, _ in still), *moving])
            slots = {part.name: holder.slots(part.name, part.index.long().cpu()) for part in moving}
            once = [(part, given, holder.slots(part.name, part.index.long().cpu())) for part, given in still]
        # A copy: what was received is let go.
        self._moving = [part._replace(index=part.index.clone()) for part in moving]
        self._slots, self._plan, self._session = slots, message.plan, message.session
        for part, given, places in once:
            self._set(part, given, places)
        self._apply(values)

    def _apply(self, body: Tensor) -> None:
        for part, values in values_in(body, self._moving):
            self._set(part, values, self._slots.get(part.name, []))

    @torch.no_grad()
    def _set(self, part: Part, values: Tensor, slots: list[Slot]) -> None:
        if self.update is not None:
            self.update(part.name, part.shape, part.dtype, part.index, values)
        for slot in slots:
            slot.write(values)


def _check_target(
    holder: Holder, described: dict[str, Any], checkpoint: dict[str, tuple[int, ...]], parts: list[Part]
) -> None:
    """Refuses a target that is not of the sender's base."""
    base = shown(described.get("base_model") or "unknown")
    for name, shape in checkpoint.items():
        there = holder.stored(name)
        if there is None or there.shape != shape:
            found = "is not there" if there is None else f"is {there.shape}, there {shape}"
            raise UserError(f"the sender's model is another ({base}): here '{shown(name)}' {found}.")
    sent: dict[str, list[Tensor]] = {}
    for part in parts:
        there = holder.stored(part.name)
        assert there is not None
        if there != Stored(part.dtype, part.shape):
            dtypes = [str(each).removeprefix("torch.") for each in (there.dtype, part.dtype)]
            raise UserError(
                f"'{shown(part.name)}' is {dtypes[0]}, the sender's is {dtypes[1]}: load it in {dtypes[1]}."
            )
        sent.setdefault(part.name, []).append(part.index.cpu().long())
    patched = {name: torch.cat(indices) for name, indices in sent.items()}
    if rest_fingerprint(checkpoint, holder.read, patched) != described.get("rest_fingerprint"):
        raise UserError(
            f"the sender's model has another base ({base}): weights that it does not train are not those of this one."
        )
