"""The rows that made the champion, and whether a challenger may meet it: nothing that trained one of the two measures
the other, and what measured one trains no other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pipeline.config.resources import Resources
from pipeline.errors import ConfigError
from pipeline.execution.engine import Engine
from pipeline.flow.lineage import step_dirs_of, steps_behind
from pipeline.flow.plan import RunPlan
from pipeline.flow.run import run_plan
from pipeline.sources.splits import MOST_SHARED
from pipeline.stages import contest
from pipeline.stages.scorer import BATCH
from pipeline.store.keys import differences
from pipeline.store.records import SPLITS, Evaluation, Tokens
from pipeline.store.step_store import FinishedStep
from pipeline.tasks.tokenizers import read_tokenizer
from pipeline.tracking.listener import Listener
from pipeline.tracking.registry import Registered


def tokens_of(version: Registered, resources: Resources) -> FinishedStep[Tokens] | None:
    """Return the rows that a version was trained on, if their record is in this store."""
    return steps_behind(step_dirs_of(resources), version.lineage).get(Tokens.stage)


def rows_of(version: Registered, resources: Resources) -> FinishedStep[Tokens] | None:
    """Return the rows of a version if they still say what trained and measured it. Splits that are drawn from the text
    need not: the hash that draws them is the same for all."""
    tokens = tokens_of(version, resources)
    if tokens is None or (_given(tokens) and not all(contest.has_rows(tokens, split) for split in SPLITS)):
        return None
    return tokens


def scored_batch(version: Registered, resources: Resources) -> int | None:
    """Return in how many rows a pass a version was scored when it was made; None: it shows in no score."""
    scored = steps_behind(step_dirs_of(resources), version.lineage).get(Evaluation.stage)
    return None if scored is None else scored.record.recipe.get(BATCH)


def _given(tokens: FinishedStep[Tokens]) -> bool:
    """Tell whether a split that measures was given, rather than drawn from the text."""
    return any(tokens.record.recipe["data"][split] is not None for split in SPLITS[1:])


def champions_rows(champion: Registered, resources: Resources) -> FinishedStep[Tokens]:
    """Return the rows of the champion. Raises ConfigError: they are gone, so that nobody can say what trained it."""
    tokens = rows_of(champion, resources)
    if tokens is None:
        raise ConfigError(
            f"The rows that trained the champion, {champion.title}, are not, or no longer, in this store, so that "
            "nobody can say whether they would test a challenger. Set resources.storage_uri to the store of its run, "
            f"make a version champion whose rows are kept (`bitmill rollback {champion.name} --to VERSION`), or "
            "register under another name (register.name)."
        )
    return tokens


def refuse_moving_splits(plan: RunPlan) -> None:
    """Raise ConfigError for text whose splits depend on more than each document's content, or that has no documents."""
    data, text = plan.config.data, plan.pinned.text
    if data.unit == "line":
        raise ConfigError(
            "data.unit is 'line', running text that has no documents, so that nobody can say which of it trained the "
            "champion and which is new. For retraining set data.unit to 'document', with rows or paragraphs of which "
            "each is one, or register without a schedule (`bitmill compress`)."
        )
    drawn = [split for split in ("validation", "test") if split not in text]
    file = next((file for file in text["train"] if file.format == "txt"), None)
    if drawn and file is not None:
        raise ConfigError(
            f"data.source has {file.uri}, a text whose paragraphs belong together: which of them measure depends on "
            f"all files there are, and changes when more come. For retraining give data.{' and data.'.join(drawn)}, or "
            f"rows of which each is a document: .jsonl or .parquet (now data.source is {data.source!r})."
        )


def refuse_endless_documents(plan: RunPlan) -> None:
    """Raise ConfigError for rows that do not show where a document ends."""
    task, source = plan.pinned.task, plan.pinned.tokenizer
    if not task.running or source is None:  # a tokenizer that is learned has an end-of-text
        return
    if task.document_end(read_tokenizer(source.folder, source.gguf_file)) is None:
        raise ConfigError(
            f"The tokenizer (model.tokenizer: {plan.config.model.tokenizer!r}) has no end-of-text token, so that rows "
            "do not show where a document ends, and nobody can say which of them trained the champion. "
            "For retraining give model.tokenizer one with an eos_token, or {train_bpe: 4096} to learn one."
        )


def refuse_strangers(plan: RunPlan, champion: Registered) -> None:
    """Raise ConfigError if the champion read other rows, drew its splits by another rule, was trained on a file that
    is to measure, or was measured by one that is to train; or if that cannot be told."""
    tokens = champions_rows(champion, plan.config.resources)
    ours, theirs = plan.pinned.tokens_recipe, tokens.record.recipe
    changed = [
        f"data.{knob} is {value!r} and was {theirs['data'].get(knob)!r}"
        for knob, value in ours["data"].items()
        if knob not in SPLITS and value != theirs["data"].get(knob)
    ]
    drawn = {True: "left out", False: "given"}
    for split in SPLITS[1:]:
        now, before = ours["data"][split] is None, theirs["data"][split] is None
        if now != before:
            changed.append(f"data.{split} is {drawn[now]} and was {drawn[before]}")
    changed += differences(theirs["task"], ours["task"], "task")
    if not changed and not _same_words(plan, tokens):
        changed = [f"model.tokenizer is {plan.config.model.tokenizer!r}, which cuts text in another way"]
    if changed:
        raise ConfigError(
            f"The champion, {champion.title}, and a challenger would not meet on the same rows: {'; '.join(changed)}. "
            "Documents that one was trained on could test the other. Keep these values, or register under another name "
            "(register.name)."
        )
    contents = {split: {file["content"] for file in theirs["data"][split] or ()} for split in SPLITS}
    for split, file in ((split, file) for split, files in plan.pinned.text.items() for file in files):
        others = SPLITS[1:] if split == "train" else SPLITS[:1]
        if other := next((other for other in others if file.content in contents[other]), None):
            knob = "source" if split == "train" else split
            raise ConfigError(
                f"data.{knob} has {file.uri}, which is among the {other} files of the champion, {champion.title}: what "
                f"a model was trained on cannot measure it, and what measured one trains no other. Leave it out of "
                f"data.{knob}, or register under another name (register.name)."
            )


def _same_words(plan: RunPlan, tokens: FinishedStep[Tokens]) -> bool:
    """Tell whether a challenger's tokenizer cuts text as that of the champion's rows did, wherever its files lie: by
    all that it does, for two of one vocabulary may merge in another order."""
    ours, theirs = plan.pinned.tokenizer, tokens.record.recipe["tokenizer"]
    if ours is None or plan.pinned.tokens_recipe["tokenizer"] == theirs:
        return True
    own, before = read_tokenizer(ours.folder, ours.gguf_file), read_tokenizer(tokens.folder())
    same = own.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    return bool(same and own.eos_token_id == before.eos_token_id)


def refuse_what_measured(plan: RunPlan, champion: Registered, listener: Listener, engine: Engine) -> None:
    """Raise ConfigError if a plan is to train on more than MOST_SHARED of what was given to measure the champion: in
    whatever files it lies now, of which the rows are made to tell. What still measures was compared as they were made.
    """
    before, ours = champions_rows(champion, plan.config.resources), plan.pinned.tokens_recipe["data"]
    theirs = before.record.recipe["data"]
    there = [file for split in SPLITS[1:] for file in ours[split] or ()]
    earlier = [split for split in SPLITS[1:] if any(file not in there for file in theirs[split] or ())]
    if not earlier:
        return
    tokens = run_plan(replace(plan, steps=plan.steps[:1]), listener, True, engine).finished(Tokens)
    for split in earlier:
        known, total = engine.task(partial(contest.trained_on, plan.pinned.task, tokens, before, split), tokens.dir)
        if known > MOST_SHARED * total:
            raise ConfigError(
                f"data.source has {known:,} of the {total:,} documents of the {split} split of the champion, "
                f"{champion.title}, more than {MOST_SHARED:.0%}: what measured one trains no other. Leave them out of "
                "data.source, or register under another name (register.name)."
            )
