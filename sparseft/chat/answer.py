"""One answer, told token by token: what text is sure already, and the keys and values that the next one needs again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

MAX_NEW_TOKENS = 1024  # of an answer, where neither the user nor the model says
CACHE = next(  # what `generate` takes and gives keys and values by: from 5.24 on the first
    name for name in ("cache", "past_key_values") if name in GenerateDecoderOnlyOutput.__dataclass_fields__
)
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character


class Telling(BaseStreamer):
    """An answer as it comes: `say` gets each piece of its text once nothing that follows can change it.

    Held back are bytes of a character that is not whole, white space (none is said before and behind an answer) and
    what may become one of `stops`, at which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], say: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, stops, say
        self.ids: list[int] = []
        self.text = ""  # what was said
        self.stopped = False  # at one of `stops`
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt's ids at first, (1, tokens), then each new one, (1,)."""
        if self._prompt:
            self._prompt = False
            return
        if self.stopped:  # known once the token was there, and one more had been asked for
            return
        self.ids += value.flatten().tolist()
        self._say(self._sure(self._decoded()))

    def end(self) -> None:
        """Says what is held back; for an answer that was interrupted too."""
        if not self.stopped:
            self._say(self._decoded().strip())

    def _decoded(self) -> str:
        # Cleaning up would move spaces that the model said, and that text before depends on.
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _sure(self, text: str) -> str:
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)].strip()
        text = text.rstrip(UNFINISHED)
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        return text[: len(text) - held].strip()

    def _say(self, text: str) -> None:
        if len(text) > len(self.text):
            self.say(text[len(self.text) :])
            self.text = text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass
class Memory:
    """The keys and values of what a model has read and said: of the token ids `ids`."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None

    def of(self, prompt: list[int]) -> Any:
        """The cache of the longest beginning of `prompt` that is known, at least one token short of it; else None."""
        same = 0
        for one, other in zip(self.ids, prompt[:-1], strict=False):
            if one != other:
                break
            same += 1
        cache, surplus = self.cache, len(self.ids) - same
        self.forget()
        if cache is None or not same:
            return None
        if surplus:
            # Layers that keep only a window or a state cannot go back.
            if any(type(layer) is not DynamicLayer for layer in cache.layers):
                return None
            cache.crop(-surplus)
        return cache

    def keep(self, ids: list[int], cache: Any) -> None:
        """`ids`: prompt and answer; the last token said was never read."""
        length = None if cache is None else int(cache.get_seq_length())
        if length:
            self.ids, self.cache = ids[:length], cache

    def forget(self) -> None:
        self.ids, self.cache = [], None


class _StopWhen(transformers.StoppingCriteria):
    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.condition(), dtype=torch.bool, device=input_ids.device)


def set_up(model: Any, temperature: float | None, max_new_tokens: int | None, ends: Iterable[int]) -> None:
    """Makes the model's own generation settings those of one row that is told as it comes.

    temperature: 0 is greedy; None leaves it to the model's settings. max_new_tokens: None leaves it to them, or is
    `MAX_NEW_TOKENS`. ends: ids that end an answer beside those of the model's settings.
    """
    own = copy.deepcopy(model.generation_config)
    known = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    own.eos_token_id = sorted({int(end) for end in [*known, *ends] if end is not None}) or None
    if own.pad_token_id is None and own.eos_token_id:
        own.pad_token_id = own.eos_token_id[0]  # as transformers does, which would tell of it
    own.max_new_tokens = max_new_tokens or own.max_new_tokens or MAX_NEW_TOKENS
    own.max_length = own.min_length = own.cache_implementation = None
    own.num_beams = own.num_return_sequences = 1
    own.use_cache = own.return_dict_in_generate = True
    if temperature is not None:
        own.do_sample = temperature > 0
        own.temperature = temperature or None
    if not own.do_sample:
        own.temperature = own.top_p = own.top_k = own.min_p = own.typical_p = None  # each of which it would tell of
    # Not handed to `generate`, which fills what is None there with the model's own.
    model.generation_config = own


def tell(
    model: Any, prompt: list[int], telling: Telling, memory: Memory, max_new_tokens: int, stop: Callable[[], bool]
) -> None:
    """Lets `model` (`set_up`) answer `prompt` (token ids) into `telling`, reading no token again that `memory` holds.

    stop: asked after each token whether the answer is to end. Where this is interrupted, `telling` has what was said.
    """
    cache = memory.of(prompt)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        streamer=telling,
        stopping_criteria=transformers.StoppingCriteriaList([_StopWhen(lambda: telling.stopped or stop())]),
    )
    memory.keep(out.sequences[0].tolist(), getattr(out, CACHE))
