"""The model card: the hub's metadata and a README.md, made of a run's facts. `card.md.j2` lays it out.

A card is written without knowing where it will lie: REPO, BASE and NO_LICENCE stand in it until `filled` replaces them.
Its last line holds a hash of the rest, by which a card that a person has edited is told from one that none has.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import re
from pathlib import Path
from typing import Any

from sparseft import __version__
from sparseft.config import OBJECTIVES
from sparseft.data import prompts
from sparseft.errors import UserError, reason_of, shown
from sparseft.publish.facts import Facts, Score, hub_id_of, shown_config, shown_path, shown_words
from sparseft.publish.usage import BASE, REPO, usage
from sparseft.report.numbers import SPACE, count, duration, fixed, memory, number, percent, signed

CARD = "README.md"
NO_LICENCE = "not stated here: see its page"
NO_BASE = f"The base lay in a folder of this name: put its id on the hub where `{BASE}` stands below."
SEAL = re.compile(r"\n<!-- sparseft card ([0-9a-f]{64}): [^\n]*-->\s*\Z")

# What the hub is told of each kind: its library, and how it relates to its base.
LIBRARIES = {
    **{"sparse": ("sparseft", "adapter"), "patch": ("sparseft", "adapter")},
    **dict.fromkeys(("peft", "peft-lora", "peft-shira"), ("peft", "adapter")),
    **dict.fromkeys(("full", "merged", "packed"), ("transformers", "finetune")),
    **{"mlx": ("mlx", "adapter"), "gguf-lora": ("gguf", "adapter")},
}


def card_of(facts: Facts) -> str:
    """The card as text, with its metadata and seal; REPO, BASE and NO_LICENCE where `filled` puts what is so."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.finalize = lambda value: value if value is not None else ""
    template = importlib.resources.files("sparseft.publish").joinpath("card.md.j2").read_text(encoding="utf-8")
    summary = facts.summary
    body = environment.from_string(template).render(
        title=_title(facts),
        lead=_lead(facts),
        overview=[(name, _cell(value)) for name, value in _overview(facts) if value],
        usage=usage(facts),
        prompt=_prompt(facts),
        trains=_trains(facts),
        roles=[_role(role) for role in facts.roles],
        settings=[(name, _cell(value)) for name, value in _settings(facts) if value],
        loss=_loss(summary),
        scores=[_score(score) for score in facts.scores],
        forgetting=_forgetting(facts),
        limits=_limits(facts),
        licence=f"The base's licence ({facts.licence or NO_LICENCE}) holds for what is derived from it, this model "
        "included. The training data may have one of its own.",
        config=yaml.safe_dump(shown_config(facts), sort_keys=False, allow_unicode=True, width=110).replace("```", "'''")
        if facts.config
        else "",
    )
    return sealed(f"---\n{metadata(facts)}\n---\n\n{body.replace(SPACE, ' ')}")


def metadata(facts: Facts) -> str:
    """The YAML block of the hub, made and checked by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    library, relation = LIBRARIES[facts.kind]
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=score.data or score.task,
            dataset_name=score.task,
            dataset_split=score.split,
            metric_type="accuracy" if (score.metric or "acc").startswith("acc") else str(score.metric),
            metric_name=_metric_name(score),
            metric_value=round(100 * score.accuracy, 2),
        )
        for score in facts.scores
        if score.asked
    ]
    language = facts.group("dataset").get("language")
    tags = ["sparseft", facts.method, *(["sparse-fine-tuning"] if facts.kind == "sparse" else [])]
    data = ModelCardData(
        base_model=facts.base_id,
        base_model_relation=relation if facts.base_id else None,
        library_name=library,
        pipeline_tag="text-generation",
        license=facts.licence,
        language=language if isinstance(language, str) and language else None,
        datasets=list(dict.fromkeys(filter(None, map(hub_id_of, facts.sources)))) or None,
        tags=tags,
        eval_results=results or None,
        model_name=_title(facts) if results else None,
    )
    return data.to_yaml().strip()


def _metric_name(score: Score) -> str:
    parts = ["accuracy, percent"]
    if score.stderr is not None:
        parts.append(f"± {100 * score.stderr:.2f}")
    if score.base is not None:
        parts.append(f"base {100 * score.base:.2f}")
    return ", ".join([*parts, f"{count(score.samples)} questions, {count(score.shots)} shots"])


# ---- a card as a file ----


def sealed(text: str) -> str:
    """A card with its seal: the hash of what stands above it."""
    text = SEAL.sub("\n", text).rstrip() + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- sparseft card {digest}: replaced by `sparseft push` as long as nobody edits it -->\n"


def is_untouched(text: str) -> bool:
    """Whether a card is as `sealed` left it: nobody has edited it."""
    text = text.replace("\r\n", "\n")
    return SEAL.search(text) is not None and sealed(text).strip() == text.strip()


def filled(text: str, repo: str, base: str | None, licence: str | None) -> str:
    """An untouched card with the places that were left open: the repository, the base's hub id, its licence.

    None leaves what the card knows.
    """
    from huggingface_hub import ModelCard

    card = checked(text)
    body = SEAL.sub("\n", card.text.replace("\r\n", "\n")).replace(REPO, repo)
    if base is not None:
        card.data.base_model = base
        relation = "finetune" if card.data.library_name == "transformers" else "adapter"
        card.data.base_model_relation = card.data.get("base_model_relation") or relation
        body = body.replace(NO_BASE, f"On the hub that is [{base}](https://huggingface.co/{base}).")
    if licence is not None:
        card.data.license = licence
    known = card.data.base_model
    if known:
        body = body.replace(BASE, known if isinstance(known, str) else known[0])
    if card.data.license:
        body = body.replace(NO_LICENCE, str(card.data.license))
    made: Any = ModelCard(f"---\n{card.data.to_yaml().strip()}\n---\n\n{body.strip()}\n", ignore_metadata_errors=False)
    return sealed(str(made.content))


def checked(text: str, name: str = CARD) -> Any:
    """A card as huggingface_hub's ModelCard; metadata that the hub would refuse is a `UserError`. Asks no network."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # what YAML's reader, or the metadata's classes, raise
        said = reason_of(error)
        raise UserError(f"{name}: its metadata, between the lines `---`, cannot be read ({said}).") from error


# ---- what it says ----


def _title(facts: Facts) -> str:
    base = _base_name(facts).rpartition("/")[2]
    stems = [Path((hub_id_of(each) or shown_path(each)).partition(" (")[0]).stem for each in facts.sources]
    return "-".join(part for part in (base, facts.method, *dict.fromkeys(stems)) if part).replace(":", "-")


def _base_name(facts: Facts) -> str:
    return shown_path(facts.base) if facts.base else "an unnamed base"


def _lead(facts: Facts) -> str:
    what = dict.fromkeys(("full", "merged", "packed"), "a model").get(facts.kind, "an adapter")
    base = f"[{facts.base_id}](https://huggingface.co/{facts.base_id})" if facts.base_id else _base_name(facts)
    on = f", trained on {_data(facts)}" if facts.sources else ""
    version = (facts.environment.get("versions") or {}).get("sparseft") or __version__
    text = f"This is {what} of {base}{on} by the method `{facts.method}` of sparseft {version}."
    if facts.base and not facts.base_id and not facts.base.startswith("bundled:"):
        text += f" {NO_BASE}"
    return text


def _data(facts: Facts) -> str:
    """Every source: of the hub its id, with a link to it, else the last part of its path."""
    ids = [(each, hub_id_of(each)) for each in facts.sources]
    return " + ".join(
        f"[{each}](https://huggingface.co/datasets/{known})" if known else f"`{shown_path(each)}`"
        for each, known in ids
    )


def _overview(facts: Facts) -> list[tuple[str, Any]]:
    get, data = facts.summary.get, facts.environment.get("data") or {}
    fingerprint = facts.own.get("base_fingerprint")
    base = facts.base_id or _base_name(facts)
    revision = f"revision `{facts.revision}`" if facts.revision else "no revision pinned"
    examples = f", {count(data['examples'])} examples" if number(data.get("examples")) else ""
    return [
        ("base model", f"{base} ({revision})"),
        ("base fingerprint", f"`{fingerprint}`, by which sparseft knows it" if fingerprint else None),
        ("data", f"{_data(facts)}{examples}" if facts.sources else None),
        ("method", f"`{facts.method}`"),
        ("objective", _objective(facts.summary)),
        ("trained weights", _share(facts)),
        ("training", f"{count(get('steps'))} steps, {count(get('tokens'))} tokens" if get("steps") else None),
        ("hardware and time", _hardware(facts)),
        ("licence of the base", facts.licence or NO_LICENCE),
    ]


def _share(facts: Facts) -> str | None:
    part, whole = number(facts.summary.get("trainable_parameters")), number(facts.summary.get("total_parameters"))
    if part is None:
        total = sum(role.trained for role in facts.roles)
        return count(total) if total else None
    return f"{count(part)} of {count(whole)} ({percent(part / whole)})" if whole else count(part)


def _hardware(facts: Facts) -> str | None:
    seconds = number(facts.summary.get("train_seconds"))
    known = facts.environment
    if seconds is None or not known:
        return None
    world = int(number(known.get("world_size")) or 1)
    device = str(known.get("device_name") or known.get("device")).partition(":")[0]
    where = f"{world} × {device}" if world > 1 or device != "cpu" else f"CPU, {count(known.get('cpu_count'))} cores"
    peak = facts.summary.get("peak_memory_bytes")
    hours = seconds * world / 3600
    text = f"{where}, {duration(seconds)}" + (f" ({hours:,.2f} device hours)" if hours >= 0.1 else "")
    return f"{text}, {memory(peak)} at most" if number(peak) else text


def _settings(facts: Facts) -> list[tuple[str, Any]]:
    if not facts.config:
        return []
    trainer, known = facts.group("trainer"), facts.environment
    own = {key: value for key, value in (facts.own.get("method_config") or {}).items() if value is not None}
    world = int(number(known.get("world_size")) or 1)
    sizes = [int(number(trainer.get(key)) or 1) for key in ("batch_size", "gradient_accumulation")]
    versions = known.get("versions") or {}
    rate = facts.summary.get("learning_rate") or trainer.get("learning_rate")
    commit = str(known.get("commit") or "")
    return [
        ("method's settings", ", ".join(f"`{key}={value}`" for key, value in own.items())),
        ("learning rate", f"{rate:g}, {trainer.get('scheduler')}, {trainer.get('warmup_steps')} steps of warm-up"
         if number(rate) else None),
        ("optimizer", f"`{trainer.get('optimizer')}`, weight decay {trainer.get('weight_decay')}"),
        ("sequences a step", f"{sizes[0] * sizes[1] * world} of up to {count(trainer.get('max_length'))} tokens"),
        ("dtype", known.get("dtype")),
        ("seed", str(facts.summary.get("seed"))),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in VERSIONS if versions.get(name))
         + (f" (commit {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''})" if commit else "")),
        ("started", known.get("started")),
    ]  # fmt: skip


VERSIONS = ("sparseft", "torch", "transformers", "peft", "python")


def _trains(facts: Facts) -> str:
    share = _share(facts)
    if facts.kind in ("full", "merged", "packed") and not facts.roles:
        return "Every weight." if share is None else f"Every weight: {share}."
    if "peft_type" in facts.content:
        return (
            f"{share or 'Parameters'}, in low-rank sides beside the base's linears; its own weights stay as they are."
        )
    scope = number(facts.summary.get("scope_parameters"))
    part = number(facts.summary.get("trainable_parameters"))
    of_scope = f", {percent(part / scope)} of the weights that could have been chosen" if part and scope else ""
    return f"{share or 'A part'} of the base's weights{of_scope}; all others are the base's, bit for bit."


def _role(role: Any) -> list[str]:
    share = percent(role.trained / role.weights) if role.weights else "–"
    return [f"`{role.name}`", count(role.linears), count(role.trained), share]


def _loss(summary: dict[str, Any]) -> str | None:
    before, after = summary.get("eval_loss_before"), summary.get("eval_loss_after")
    if number(after) is None:
        return _trimmed(summary).strip() or None
    change = f"{fixed(before)} before, {fixed(after)} after training" if number(before) is not None else fixed(after)
    if (objective := _objective(summary)) is not None:
        margin, accuracy = (number(summary.get(f"eval_{name}_after")) for name in ("margin", "accuracy"))
        text = f"Loss of {objective} on held-out data: {change}."
        if margin is not None:
            text += f" Margin of rewards after training: {fixed(margin)}"
            text += "." if accuracy is None else f", the right way round in {percent(accuracy)} of the pairs."
        return text
    return f"Loss on held-out examples of the training data, in nats a token: {change}.{_trimmed(summary)}"


def _trimmed(summary: dict[str, Any]) -> str:
    """That what is here is not the adapter as trained, where it was cut back to a budget of forgetting."""
    trim = summary.get("trim")
    if not isinstance(trim, dict) or trim.get("trimmed") is not True:
        return ""
    source, target = trim.get("source") or {}, trim.get("target") or {}
    return (
        " After training the adapter was cut back until it forgets no more than "
        f"{trim.get('budget')} nats a token of `{shown_path(str(source.get('file')))}`: "
        f"{fixed(source.get('forgetting_before'))} as trained, {fixed(source.get('forgetting'))} now. On "
        f"{count(target.get('examples'))} examples of what it learnt, its loss is "
        f"{fixed(target.get('loss_before'))} as trained, {fixed(target.get('loss_after'))} now."
    )


def _objective(summary: dict[str, Any]) -> str | None:
    """The preference objective that was trained by; None for imitation."""
    found = summary.get("objective")
    return found if found in OBJECTIVES[1:] else None


def _score(score: Score) -> list[str]:
    own = percent(score.accuracy, score.stderr)
    base, difference = "–", "–"
    if score.base is not None:
        base = percent(score.base, score.base_stderr)
        error = "" if score.difference_stderr is None else f" ± {100 * score.difference_stderr:.1f}"
        difference = signed(100 * (score.accuracy - score.base)) + error
    questions = count(score.samples) + (f", {count(score.overlap)} of them trained on" if score.overlap else "")
    return [_cell(score.task), base, own, difference, questions, count(score.shots)]


def _forgetting(facts: Facts) -> str:
    """The tasks that were not trained, the base's scores beside this model's; members of a group stand in the table."""
    others = [score for score in facts.scores if score.asked and not score.learnt and score.base is not None]
    if not others:
        return (
            "Not measured: no task that was not trained has the base's score beside this model's, so nothing is known "
            "here of what it unlearnt."
            + (f" `sparseft eval mmlu --adapter {REPO}` measures it." if facts.kind in ("sparse", "peft") else "")
        )
    lines = []
    for score in others:
        assert score.base is not None
        change, error = 100 * (score.accuracy - score.base), score.difference_stderr
        if error is None and score.stderr is not None and score.base_stderr is not None:
            error = math.hypot(score.stderr, score.base_stderr)  # as of two that have nothing to do with each other
        if error is None:
            verdict = "the error of the difference is not known"
        elif abs(change) <= 200 * error:
            verdict = "within two standard errors of no change"
        else:
            verdict = "a loss beyond two standard errors" if change < 0 else "a gain beyond two standard errors"
        of, now = percent(score.base, score.base_stderr), percent(score.accuracy, score.stderr)
        lines.append(f"- {_cell(score.task)}, not trained: the base {of}, this model {now} ({verdict})")
    return "\n".join(lines)


def _limits(facts: Facts) -> list[str]:
    lines = [
        f"For text in the manner of its training data{f' ({_data(facts)})' if facts.sources else ''}; made to study "
        "and to build on, not tested for any particular use.",
        "What its base gets wrong, invents or is biased to, this model does too; the training data adds its own. It "
        "was not trained or tested for safety.",
    ]
    if facts.scores:
        lines.append("The scores are of the tasks above and of no others; small differences lie within their errors.")
    else:
        lines.append("No task was evaluated: how good its answers are is not known here.")
    if any(score.overlap for score in facts.scores):
        lines.append("Some of the questions were trained on, as the table says: those scores are too high.")
    warnings = facts.summary.get("warnings")
    told = [shown_words(str(text), facts.paths) for text in warnings] if isinstance(warnings, list) else []
    lines += [f"From training: {_cell(text)}" for text in told]
    return lines


def _prompt(facts: Facts) -> str | None:
    kind = (facts.environment.get("data") or {}).get("format")
    if kind == "messages" and facts.group("dataset").get("plain_chat"):
        kind = "plain"
    elif kind == "oasst_trees":
        kind = "guanaco"  # as which trees are written
    alpaca = prompts.alpaca_prompt("{instruction}")
    guanaco = f"{prompts.human_turn('{question}')}{prompts.ASSISTANT}"
    plain = prompts.plain_conversation([], "{question}")
    own = facts.tokenizer
    whose = "the base's tokenizer" if own is None else f"the tokenizer {_cell(shown_path(own))}"
    texts = {
        "alpaca": f"As LLM-Adapters' and Alpaca's instructions:\n\n```text\n{alpaca}```",
        "guanaco": f"In guanaco's turns:\n\n```text\n{guanaco}\n```",
        "messages": f"As conversations, by the chat template of {whose}.",
        "plain": f"As conversations without a chat template:\n\n```text\n{plain}\n```",
        "prompt_completion": "By each record's `prompt` as it stands, with nothing around it.",
        "text": "Not at all: it went on with plain text.",
    }
    return texts.get(str(kind))


def _cell(value: Any) -> str:
    """A text that a table's cell can hold."""
    return shown(str(value).replace(SPACE, " "), 600).replace("|", "\\|").replace("<", "&lt;")
