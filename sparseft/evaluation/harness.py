"""The model as lm-eval sees it, and the surroundings of a run: silence, progress, and nothing left changed.

Imports torch, transformers and lm-eval: import this module only when an evaluation starts.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import numpy as np
import torch
import transformers
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from tokenizers.processors import TemplateProcessing

from sparseft.data.loading import no_row
from sparseft.distributed.shards import any_sharded
from sparseft.errors import UserError
from sparseft.evaluation.tasks import FIXED_BATCH
from sparseft.models.decoder import keeps_cache, last_logits, plain_generation
from sparseft.models.loading import vocabulary_rows
from sparseft.replaced import replaced

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]  # (what, done, of how many)

ROOM = 32  # tokens that generation gets at least, at the cost of the prompt's beginning
BOOTSTRAP = 1000  # resamplings for metrics without a closed standard error (accuracy has one)
SEEDS = {"python": 0, "other": 1234}  # lm-eval's own defaults; they matter to tasks that sample


def settled_batch(batch_size: int | str, model: Any) -> int | str:
    """`auto` is found by trying, but not on a CPU, where too large a batch ends the process instead of raising, nor in
    shards, where each process would find its own while the others wait for it."""
    fixed = batch_size == "auto" and (model.device.type == "cpu" or any_sharded(model))
    return FIXED_BATCH if fixed else batch_size


class StopAt(transformers.StoppingCriteria):
    """Ends each row on its own once its generated text holds one of `stops`.

    lm-eval's criterion counts rows as samples, which under beam search (rows are beams) stops whole batches early.
    """

    def __init__(self, stops: list[str], tokenizer: Any, prompt_length: int) -> None:
        self.stops, self.tokenizer, self.prompt_length = stops, tokenizer, prompt_length
        # Two more tokens than the text takes: it may be generated in another split into tokens.
        self.window = 2 + max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(generated)
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class LanguageModel(HFLM):
    """lm-eval's Hugging Face model around a loaded one, which stays where it is.

    `truncated` collects the prompts that did not fit the context and lost their beginning. `plain`: of the model's own
    generation settings only the ids that end an answer count; else what a task leaves open is theirs, as in lm-eval.
    """

    longest = 0  # tokens of the longest continuation, while some are scored

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str, max_length: int | None) -> None:
        tokenizer, self.can_pad = _usable(tokenizer, model)
        limit = resolve_max_length(model.config, tokenizer)
        with _as_tied(model):
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=settled_batch(batch_size, model),
                max_length=min(max_length or limit, limit),
                softmax_dtype="float32",  # in bf16 answers tie that the logits tell apart
            )
        self.plain = True
        self.truncated: set[str] = set()
        self.rows = vocabulary_rows(model)[0]
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = own if isinstance(own, list) else [own]
        self.ends = sorted({int(end) for end in [*ends, self.tokenizer.eos_token_id] if end is not None})

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        ids = super().tok_encode(*args, **kwargs)
        self._check_known(ids)
        return ids

    def _check_known(self, ids: list[int]) -> None:
        """Refuses a token that the model has no embedding of, which a prompt may bring and a GPU dies of."""
        if ids and max(ids) >= self.rows:
            raise UserError(f"a prompt cannot be read: {no_row(max(ids), self.tokenizer, self.rows)}")

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list:
        for texts, context, continuation in requests:
            self._check_known([*context, *continuation])  # BOS may stand for an empty context
            # The last token is only predicted, never read: one more than the context fits.
            if texts is not None and len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(texts[0])
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        with replaced((self, "longest", longest)):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The logits (rows, tokens, vocabulary) of those tokens at the end of the rows (rows, tokens) that predict a
        continuation in any of them: lm-eval counts from the end. Those of all would be most of an evaluation's memory.
        """
        if not self.longest:
            return super()._model_call(inps, *args, **kwargs)
        # Rows are padded on the right with zeros. Where tokens are zeros too, only more is kept.
        filled = (inps != 0) * torch.arange(1, inps.shape[1] + 1, device=inps.device)
        kept = inps.shape[1] - int(filled.amax(1).min()) + self.longest
        with torch.no_grad():
            return self.model(inps, **last_logits(self.model, kept)).logits

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with replaced((self, "longest", 0)):  # rows that are tried have no padding, others may
            return super()._detect_batch_size(*args, **kwargs)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            request.arguments = (request.args[0], self._fit(*request.args[:2]))
        with replaced((self, "batch_size_per_gpu", self.batch_size_per_gpu if self.can_pad else 1)):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _fit(self, prompt: str, generation: dict[str, Any]) -> dict[str, Any]:
        """`generation` with `max_gen_toks` cut to what the context leaves after `prompt`.

        lm-eval reserves the full number and cuts the prompt instead, which costs a question its instruction. Here a
        prompt is cut only where fewer than `ROOM` tokens would be left; in steps of `ROOM`, so that prompts still
        share batches.
        """
        wanted = normalize_gen_kwargs(generation, self.max_gen_toks)["max_gen_toks"]
        least = max(1, min(wanted, ROOM, self.max_length // 2))
        left = self.max_length - len(self.tok_encode(prompt))
        if left < least:
            self.truncated.add(prompt)
        allowed = wanted if left >= wanted else max(least, left // ROOM * ROOM)
        others = {key: value for key, value in generation.items() if key not in _LENGTH_NAMES}
        return {**others, "max_gen_toks": allowed}

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation: Any) -> Any:
        """Token ids (batch, prompt + generated); `context` (batch, prompt) is padded on the left. Of `generation`,
        `ends` are ids that end an answer besides the model's own."""
        if not generation.get("do_sample"):
            generation.pop("temperature", None)  # greedy has none, and transformers warns about it
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        texts = [text for text in stop if text and text != end]
        criteria = [StopAt(texts, self.tokenizer, context.shape[1])] if texts else []
        with plain_generation(self.model) if self.plain else contextlib.nullcontext():
            return self.model.generate(
                input_ids=context,
                # Not max_length: a max_new_tokens in the model's own generation settings would overrule it.
                max_new_tokens=max_length - context.shape[1],
                stopping_criteria=transformers.StoppingCriteriaList(criteria),
                eos_token_id=sorted({*self.ends, *generation.pop("ends", ())}) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                tokenizer=self.tokenizer,  # for `stop_strings` in the model's own
                use_cache=keeps_cache(self.model.config),
                **generation,
            )


_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def _usable(tokenizer: Any, model: Any) -> tuple[Any, bool]:
    """A copy of the tokenizer with a pad and an EOS token that the model has embeddings for, and whether it can pad.

    A token added only for padding would lie outside the embeddings; a tokenizer without any special token therefore
    generates one sequence at a time.
    """
    if not isinstance(tokenizer, (transformers.PreTrainedTokenizer, transformers.PreTrainedTokenizerFast)):
        raise UserError(f"Evaluation needs a Hugging Face tokenizer, got {type(tokenizer).__name__}.")
    tokenizer = copy.deepcopy(tokenizer)
    _end_open(tokenizer)
    rows = vocabulary_rows(model)[0]
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    tokens = [token for token in (getattr(tokenizer, name) for name in names) if token is not None]
    usable = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) < rows]
    if not usable:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>", "eos_token": "<|pad|>"})
        return tokenizer, False
    tokenizer.pad_token = usable[0]
    if tokenizer.eos_token is None:
        tokenizer.eos_token = usable[0]
    return tokenizer, True


def _end_open(tokenizer: Any) -> None:
    """Makes a tokenizer that ends every text with EOS leave prompts open, as training does; BOS and the like stay."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
    if start + len(bare) == len(full):
        return
    if not tokenizer.is_fast:
        raise UserError("The tokenizer ends every text with a special token; set add_eos_token=false in its config.")
    before = [
        (token, tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.convert_ids_to_tokens(full[:start])
    ]
    template = " ".join([*(token for token, _ in before), "$A"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=before)


def group_of(name: str, members: list[Task], by_size: bool) -> Group:
    """A group of lm-eval, whose accuracy is the mean over its tasks, weighted by their sizes or not."""
    group = Group(
        name,
        aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=by_size)],
        metadata={"version": "1.0"},
    )
    for member in members:
        group.add(member)
    return group


def weighs_alike(group: Group) -> bool:
    """Whether a group's score is the mean over its tasks, whatever their sizes."""
    return bool(group.aggregate_metric_list) and not group.aggregate_metric_list[0].weight_by_size


def run_tasks(lm: Any, tasks: dict[str, Task], groups: dict[str, Group], limit: int | None) -> dict[str, Any]:
    """lm-eval's results for these tasks, samples included; with the same shots each time."""
    for task in tasks.values():  # a sampler draws on from where an evaluation before this one left it
        task.set_fewshot_seed(seed=SEEDS["other"])
    # Not simple_evaluate: it indexes all of lm-eval's tasks and inspects the machine, ten seconds for nothing here.
    raw = lm_eval.evaluator.evaluate(
        lm=lm,
        task_dict={"tasks": tasks, "groups": groups},
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
    )
    assert raw is not None  # only ranks other than 0 get None, and there is one process
    return raw


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Runs without gradients and from fixed seeds, and leaves modes, `use_cache` and random states as they were."""
    modes = [(module, "training", module.training) for module in model.modules()]
    # Scoring needs no key/value cache, which costs memory; generation asks for one itself.
    settings = (model.config, getattr(model, "generation_config", None))
    caches = [(item, "use_cache", False) for item in settings if hasattr(item, "use_cache")]
    with replaced(*modes, *caches), torch.no_grad(), seeded(_cuda_devices(model)):
        yield


@contextlib.contextmanager
def _as_tied(model: Any) -> Iterator[None]:
    """Keeps lm-eval from tying a loaded model's weights again, which fails, or undoes what an adapter did to a head."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def seeded(cuda_devices: list[int]) -> Iterator[None]:
    """Fixed seeds inside; the caller's random states come back. lm-eval draws even while it builds a task."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            random.seed(SEEDS["python"])
            np.random.seed(SEEDS["other"])
            torch.manual_seed(SEEDS["other"])
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def _cuda_devices(model: torch.nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


@contextlib.contextmanager
def quiet(progress: Progress | None = None) -> Iterator[None]:
    """Keeps lm-eval off the terminal: its prints and log lines, and its bars, which go to `progress` instead."""
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        for name in ("lm_eval", "transformers", "datasets"):
            stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(replaced((module, "tqdm", _bars(progress))))
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield
    for line in printed.getvalue().splitlines():
        log.debug("lm-eval: %s", line)


@contextlib.contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(max(level, before))
    try:
        yield
    finally:
        logger.setLevel(before)


def _bars(progress: Progress | None) -> type:
    """In place of `tqdm`: reports to `progress`."""

    class Bar:
        """The part of tqdm's interface that lm-eval uses."""

        def __init__(self, items: Any = None, *_: Any, total: int | None = None, desc: str = "", **__: Any) -> None:
            self.items, self.desc, self.done = items, desc, 0
            self.total = len(items) if total is None and hasattr(items, "__len__") else total
            self.update(0)  # the first batch, of the longest requests, takes longest

        def __iter__(self) -> Iterator[Any]:
            for item in self.items:
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self.done += count
            if progress is not None and self.desc:  # the bars without a name build one task's prompts: too short
                progress(self.desc, self.done, self.total)

        def close(self) -> None:
            pass

    return Bar
