"""TRL's trainers with a run's own steps, checkpoints and metrics: the loss is theirs, the rest `training/trainer.py`'s.

The model that answers are compared with is the base under what trains: by slices where a sparse method trains
(`adapters.reference_model`), with peft's adapter turned off, and of a model that trains whole, whose base is gone with
the first step, a frozen copy.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import ExportableState

from sparseft import console
from sparseft.adapters.reference_model import reference_model
from sparseft.config import RunConfig
from sparseft.data.loaded import LoadedData
from sparseft.distributed import ranks
from sparseft.models.decoder import runnable
from sparseft.models.mixed_precision import as_before
from sparseft.replaced import replaced
from sparseft.training.preference.batches import Collator, Examples, Tokenised, form_of
from sparseft.training.preference.objectives import OBJECTIVES
from sparseft.training.trainer import PLACES, Trainer

Weighed = dict[str, list[tuple[float, int]]]  # of each metric, means and how many they are the mean of


class PreferenceTrainer(Trainer):
    """What the classes of `trainer_class` have in common; `super()` is one of TRL's trainers behind `Trainer`."""

    def __init__(self, model: nn.Module, args: transformers.TrainingArguments, **options: Any) -> None:
        configs = [model.config.get_text_config(), getattr(model, "generation_config", None)]
        given = [(each, each.pad_token_id) for each in configs if each is not None]
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        called = [(each, vars(each).get("forward")) for each in (model, options.get("ref_model")) if each is not None]
        super().__init__(model, args, **options)
        for each, before in called:  # TRL's fused head goes around a wrapper, as for mixed precision
            if before is not None and each.forward is not before:
                each.forward = as_before(before, each.forward)
        for each, pad in given:  # TRL makes it the tokenizer's
            each.pad_token_id = pad
        for parameter, values in trained:  # TRL makes them bf16 over a packed base
            parameter.data = values
        if "ref" in getattr(self.model, "peft_config", {}):  # its copy of the adapter: turned off it is the base too
            self.model.delete_adapter("ref")
        self.processing_class = None  # only TRL's own tokenising needs it
        self.args.train_sampling_strategy = "random"  # of KTO, whose batches need no order here (`batches.mismatched`)
        self.add_callback(Pending(self))

    def feed(self, options: dict[str, Any], labelled: bool) -> None:
        """Batches say what they hold already (`batches.Collator`)."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside checkpoints; `sparseft push` writes one."""

    def _send_telemetry(self) -> None:
        """A run tells nobody of itself."""

    @property
    def fillable(self) -> bool:
        """The collator knows an empty batch, and `compute_loss` counts it for nothing."""
        return True

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.empty = not inputs[PLACES]
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """A step's batches. Its loss is to be the mean over the micro-steps of all processes that are of something."""
        batches, count = super().get_batch_samples(*args, **options)
        filled = ranks.all_gather_object(sum(bool(batch[PLACES]) for batch in batches))
        self.share = len(batches) * len(filled) / max(1, sum(filled))
        return batches, count

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """As TRL computes it, of logits in fp32, in each process of its own pairs.

        What it notes of a training step each process then has of all: micro-step after micro-step, as one process that
        takes them in turn.
        """
        noted = {name: len(values) for name, values in self.collected().items()}
        with self.exact_logits(), ranks.each_for_itself(self.accelerator):
            loss = super().compute_loss(model, inputs, return_outputs, **options)
        if not model.training:
            return loss
        self.note_of_all(noted)
        return loss * (0.0 if self.empty else self.share)

    def note_of_all(self, before: Mapping[str, int]) -> None:
        """Has every process collect what all have since there were `before` values of each metric."""
        if ranks.rank_and_world()[1] == 1:
            return
        collected = self.collected()
        collected.pop("num_tokens", None)  # TRL's own count, here of one process
        new = {name: values[before.get(name, 0) :] for name, values in collected.items()}
        for name, values in collected.items():
            del values[before.get(name, 0) :]
        for each in ranks.all_gather_object({} if self.empty else new):
            for name, values in each.items():
                collected[name].extend(values)
        for name in [name for name, values in collected.items() if not values]:  # an empty batch's alone
            del collected[name]

    def _compute_kl_logps(self, model: nn.Module, batch: Any) -> Any:
        """Of KTO: the log-probabilities by which it estimates how far the model has moved, of all processes."""
        own = super()._compute_kl_logps(model, batch)
        if ranks.rank_and_world()[1] == 1:
            return own
        everywhere = ranks.all_gather_object([] if self.empty else own.tolist())
        return own.new_tensor([value for values in everywhere for value in values])

    def exact_logits(self) -> contextlib.AbstractContextManager[None]:
        """`fp32_logits`, where the head is not TRL's own, which computes so."""
        if not hasattr(self, "get_batch_loss_metrics"):
            return contextlib.nullcontext()
        return fp32_logits(self.accelerator.unwrap_model(self.model))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With what TRL has collected of the steps since the last time, where it is of training: `measured` has its own
        sums."""
        if "loss" in logs:
            super().log(logs, start_time)
        else:
            transformers.Trainer.log(self, logs, start_time)

    def collected(self) -> dict[str, list[float]]:
        """What TRL has collected of the steps since the last line of metrics, to be read and changed."""
        return self._metrics["train"] if hasattr(self, "_metrics") else self._stored_metrics["train"]

    def measured(self, eval_dataset: Any = None) -> dict[str, float]:
        """The loss and TRL's metrics, means over all pairs (or answers) of the evaluation set, whatever the batch."""
        loader, model = self.get_eval_dataloader(eval_dataset), self.model
        training, found = model.training, Weighed()
        model.eval()
        done, display = 0, console.Progress(len(loader.dataset), "evaluate", unit="example", keeps=False)
        unrouted = replaced((self, "aux_loss_enabled", False))  # a router's term says nothing of the pairs
        with torch.no_grad(), display, runnable(model), unrouted:
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss, metrics = self.judged(inputs)
                for name, value in weighed(loss, metrics, inputs).items() if batch[PLACES] else ():
                    found.setdefault(name, []).append(value)
                done += len(batch[PLACES])
                display.update(done)
                self.run_state.leave_together()
        model.train(training)
        everywhere = Weighed()
        for each in ranks.all_gather_object(found):
            for name, values in each.items():
                everywhere.setdefault(name, []).extend(values)
        return means(everywhere)

    def judged(self, inputs: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """A batch's loss and TRL's metrics of it."""
        if hasattr(self, "get_batch_loss_metrics"):
            with self.exact_logits(), ranks.each_for_itself(self.accelerator):
                loss, metrics = self.get_batch_loss_metrics(self.model, inputs, "eval")
            return float(loss), {name.removeprefix("eval_"): value for name, value in metrics.items()}
        loss = float(self.compute_loss(self.model, inputs))
        metrics = {name: values[-1] for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        return loss, metrics


@contextlib.contextmanager
def fp32_logits(model: Any) -> Iterator[None]:
    """Inside, the head's logits are fp32: TRL takes their logarithms in the dtype that they have, and bf16's eight bits
    are a step of 0.03 at a log-probability of 8."""
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits.float())
    try:
        yield
    finally:
        hook.remove()


def weighed(loss: float, metrics: Mapping[str, float], inputs: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """What a batch measured, with how many pairs, or answers of its kind, each value is the mean of."""
    label = inputs.get("label")
    if label is None:
        pairs = len(inputs["input_ids"]) // 2 if "input_ids" in inputs else len(inputs["chosen_input_ids"])
        return {name: (value, pairs) for name, value in {"loss": loss, **metrics}.items()}
    good = int(label.sum())
    counts = {"chosen": good, "rejected": len(label) - good}
    values = {"loss": loss, **metrics}
    values.pop("rewards/margins", None)  # made of the means, at the end
    return {name: (value, counts.get(name.rpartition("/")[2], len(label))) for name, value in values.items()}


def means(found: Weighed) -> dict[str, float]:
    """The means over all batches, and the margin where no batch's was taken."""
    mean = {
        name: sum(value * count for value, count in values) / total
        for name, values in found.items()
        if (total := sum(count for _, count in values))
    }
    if "rewards/margins" not in mean and {"rewards/chosen", "rewards/rejected"} <= mean.keys():
        mean["rewards/margins"] = mean["rewards/chosen"] - mean["rewards/rejected"]
    return mean


class Pending(transformers.TrainerCallback, ExportableState):
    """Keeps in checkpoints what TRL has collected since the last line of metrics, so that a resumed run's next line is
    that of one that never stopped."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (`trainer_state.json`)."""
        return {"args": {}, "attributes": {name: list(values) for name, values in self.trainer.collected().items()}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.trainer.collected().clear()
        for name, values in kept.items():
            self.trainer.collected()[name] = list(values)


def trainer_class(objective: str) -> type[PreferenceTrainer]:
    """The run's trainer with the loss of an objective."""
    return type("ObjectiveTrainer", (PreferenceTrainer, OBJECTIVES[objective].trainer()), {})


def make_trainer(
    config: RunConfig, model: nn.Module, arguments: Any, data: LoadedData, tokenizer: Any, pad: int, **options: Any
) -> PreferenceTrainer:
    """A run's trainer by preferences; `options` as of `Trainer`, but for the data."""
    own = OBJECTIVES[config.objective]
    if own.reference:
        options["ref_model"] = reference_of(model, config)
    assert data.preferences is not None
    held = [data.eval_preferences] if data.eval_preferences is not None else []
    # TRL asks transformers by a name that it will lose.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    tokenizer = copy.deepcopy(tokenizer)  # TRL writes into it
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return trainer_class(config.objective)(
        model,
        arguments,
        train_dataset=Tokenised.of(data.preferences),
        eval_dataset=Tokenised.of(held[0], len(data.preferences)) if held else None,
        data_collator=Collator(Examples(data.preferences, *held), form_of(own.name, pad)),
        processing_class=tokenizer,
        **options,
    )


def reference_of(model: nn.Module, config: RunConfig) -> Any:
    """What answers are compared with, for TRL's `ref_model`; None where TRL turns peft's adapter off, in shards too."""
    if hasattr(model, "peft_config"):
        return None
    if not config.method.trains_all:
        return reference_model(model)
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    before = vars(twin).pop("forward", None)  # a wrapper, copied by reference: it calls the model's own forward pass
    if before is not None:
        twin.forward = as_before(before, twin.forward)  # type: ignore[method-assign]
    size = sum(p.numel() * p.element_size() for p in twin.parameters())
    console.log(
        f"reference: a second copy of the model ({size / 2**30:.2f} GiB), as method={config.method_name} trains every "
        "weight and leaves no base under it"
    )
    return twin
