"""`sparseft train`: fine-tunes and leaves a run folder."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.errors import RunError, UserError
from sparseft.methods import get_method


def run(config: RunConfig) -> dict[str, Any]:
    """Fine-tunes as configured and returns `summary.json` with the run's folder."""
    import transformers

    from sparseft.commands import report
    from sparseft.commands.preparing import prepare, select
    from sparseft.compose import to_yaml
    from sparseft.runs import environment, link_latest, prepare_run_folder, truncate_metrics, write_json, write_text

    console.clear_warnings()
    resume = config.trainer.resume is not None
    method = get_method(config.method_name)
    config.method.validate()
    if config.sparsity is not None and not hasattr(config.method, "sparsity"):
        console.warn(f"sparsity={config.sparsity} has no effect: method {config.method_name} trains every weight")
    transformers.set_seed(config.seed)
    prepared = prepare(config)
    selected = select(config, prepared) if method.sparse else None

    # Only now, with everything checked and loaded, does the run's folder come into being.
    folder = prepare_run_folder(
        config.output_dir, config.method_name, config.dataset.name, overwrite=config.overwrite, resume=resume
    )
    config.output_dir = str(folder)
    link_latest(folder)
    write_text(folder / "config.yaml", to_yaml(config))
    dtype = str(next(prepared.model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / "environment.json", environment(str(prepared.device), dtype, 1))
    console.log(f"run: {folder}")

    job = Job(config, prepared, selected, folder)
    checkpoint = job.resume_point() if resume else None
    if resume:
        truncate_metrics(folder / "metrics.jsonl", job.step_of(checkpoint))
    summary = job.train(checkpoint)
    write_json(folder / "summary.json", summary)
    report.run([str(folder)])
    return summary | {"run": str(folder)}


class Job:
    """One training run: attach, measure, train, measure, save."""

    def __init__(self, config: RunConfig, prepared: Any, selected: Any, folder: Path) -> None:
        self.config, self.prepared, self.selected, self.folder = config, prepared, selected, folder
        self.method = get_method(config.method_name)

    def resume_point(self) -> str | None:
        """The checkpoint to continue from; null: none was written, so the run starts anew in its folder."""
        from sparseft.trainer import last_checkpoint

        checkpoint = last_checkpoint(self.folder)
        console.log(f"resume: {checkpoint or 'no checkpoint yet, starting from the beginning'}")
        return checkpoint

    @staticmethod
    def step_of(checkpoint: str | None) -> int:
        """The optimizer step of a checkpoint's folder; -1 for none."""
        return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else -1

    def selection(self) -> Any:
        """What trains: on resume the run's own selection, else the cached or computed one."""
        from sparseft.selection import Selection

        own = self.folder / "selection"
        if self.config.trainer.resume and (own / "selection.json").is_file():
            return Selection.load(own)
        self.selected.selection.save(own)
        return self.selected.selection

    def train(self, checkpoint: str | None) -> dict[str, Any]:
        """Trains and returns the summary."""
        from sparseft.adapter import attach, save_adapter, state_of, trainable_count
        from sparseft.commands.preparing import describe_selection
        from sparseft.data.batches import Collator, padding_id
        from sparseft.modeling import ModelSpec
        from sparseft.runs import read_metrics
        from sparseft.trainer import Trainer, memory_bytes, train, training_arguments

        config, prepared = self.config, self.prepared
        spec = ModelSpec.of(prepared.model)
        if spec.experts and self.method.kind != "whole":
            console.warn(
                f"{len(spec.experts)} expert matrices (3-D parameters such as {spec.experts[0]}) stay frozen: "
                "training them is not available yet"
            )
        base_dtype = next(prepared.model.parameters()).dtype
        selection = self.selection() if self.method.sparse else None
        if selection is not None:
            describe_selection(selection, config)
        model = attach(prepared.model, config.method, selection)
        if config.model.path.startswith("bundled:"):
            state_of(model).base_model = config.model.path
        trainable = trainable_count(model)
        if selection is None:
            console.log(f"trainable: {trainable:,} parameters of {spec.total_parameters:,} in the model")

        trainer_config = config.trainer
        rate = trainer_config.learning_rate if trainer_config.learning_rate is not None else self.method.learning_rate
        steps = self.total_steps()
        autocast = prepared.device.type == "cuda" and base_dtype.itemsize == 2 and self.method.kind == "whole"
        arguments = training_arguments(
            trainer_config,
            config.hardware,
            run=self.folder,
            seed=config.seed,
            device=prepared.device,
            learning_rate=rate,
            total_steps=steps,
            autocast=autocast,
        )
        trainer = Trainer(
            model,
            arguments,
            run=self.folder,
            train_dataset=prepared.data.train,
            eval_dataset=prepared.data.eval,
            data_collator=Collator(padding_id(prepared.tokenizer)),
            processing_class=None,
        )
        before = None
        if prepared.data.eval is not None:
            recorded = [r for r in read_metrics(self.folder / "metrics.jsonl") if "eval_loss" in r and r["step"] == 0]
            before = recorded[0]["eval_loss"] if recorded else trainer.evaluate()["eval_loss"]
            console.log(f"eval loss before: {before:.4f} ({prepared.data.eval_source})")
        start = time.perf_counter()
        output = train(trainer, checkpoint)
        seconds = time.perf_counter() - start
        after = trainer.evaluate()["eval_loss"] if prepared.data.eval is not None else None
        if after is not None:
            console.log(f"eval loss after: {after:.4f}")
            if not math.isfinite(after):
                raise RunError(f"the evaluation loss after training is {after}: try a lower trainer.learning_rate.")
        save_adapter(model, self.folder / "adapter")
        if self.method.kind == "whole":
            prepared.tokenizer.save_pretrained(self.folder / "adapter")
        tokens = trainer.state.num_input_tokens_seen
        return {
            "method": config.method_name,
            "model": config.model.path,
            "dataset": config.dataset.train_path or config.dataset.name,
            "sparsity": self.realised_sparsity(spec, trainable),
            "scope": config.scope,
            "trainable_parameters": trainable,
            "scope_parameters": sum(r * c for r, c in spec.linears_in(config.scope).values()),
            "total_parameters": spec.total_parameters,
            "steps": trainer.state.global_step,
            "tokens": tokens,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "peak_memory_bytes": memory_bytes(prepared.device, peak=True),
            "train_loss": output.training_loss,
            "eval_loss_before": before,
            "eval_loss_after": after,
            "seed": config.seed,
            "learning_rate": rate,
            "selection_cached": self.selected.cached if self.selected else None,
            "method_config": asdict(config.method),
            "warnings": console.recorded_warnings(),
        }

    def realised_sparsity(self, spec: Any, trainable: int) -> float | None:
        """The share of the weights in scope that stayed frozen; null where every weight trains."""
        if self.method.kind == "whole":
            return None
        return 1 - trainable / sum(r * c for r, c in spec.linears_in(self.config.scope).values())

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as the Trainer counts them."""
        config = self.config.trainer
        if config.max_steps > 0:
            return config.max_steps
        batches = math.ceil(len(self.prepared.data.train) / config.batch_size)
        return math.ceil(config.num_epochs * max(1, math.ceil(batches / config.gradient_accumulation)))


def render(result: dict[str, Any]) -> None:
    """What came of it, on stdout."""
    change = ""
    if result["eval_loss_before"] is not None:
        change = f"eval loss {result['eval_loss_before']:.4f} -> {result['eval_loss_after']:.4f}, "
    share = result["trainable_parameters"] / result["total_parameters"]
    print(
        f"{result['method']}: {change}{result['trainable_parameters']:,} trainable parameters ({share:.2%} of the "
        f"model), {result['steps']} steps in {result['train_seconds']:.1f} s"
    )
    print(f"run: {result['run']}")


__all__ = ["UserError", "render", "run"]
