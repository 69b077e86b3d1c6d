"""One configuration: its sections, and what they must agree on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.base import Bounded, Closed, Name
from pipeline.config.data import Data, Evaluate, Model, TaskSettings, TrainBpe
from pipeline.config.presets import PRESETS, PresetName, filled
from pipeline.config.quant import Pack, Quant
from pipeline.config.resources import Resources
from pipeline.config.retrain import Retrain
from pipeline.config.sweep import Sweep
from pipeline.config.training import Cache, Distill, Finetune
from pipeline.metrics import LM_EVAL, METRICS, metric_of, named_by_lm_eval


class Gate(Bounded):
    """A student that fails the gate on the validation split is kept but not registered. `at_least` and `at_most` bound
    metrics of that split by name, those of `evaluate.suites` among them."""

    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None


class Register(Closed):
    """The name under which a student is registered, and the gate that it must pass."""

    name: Name | None = None  # the config's own name unless given
    gate: Gate = Gate()


class Config(Closed):
    """One YAML a run."""

    name: Name
    preset: PresetName | None = None  # fills quant, distill and pack; what the file itself sets wins
    model: Model
    task: TaskSettings = TaskSettings()
    data: Data
    finetune: Finetune | None = None
    cache: Cache = Cache()
    quant: Quant = Quant()
    distill: Distill
    evaluate: Evaluate = Evaluate()
    pack: Pack = Pack()
    register_: Register = Field(default=Register(), alias="register")
    resources: Resources = Resources()
    sweep: Sweep | None = None  # read by `bitmill sweep` alone; never part of a key
    retrain: Retrain | None = None  # read by `bitmill retrain` alone; never part of a key

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, fields: Any) -> Any:
        preset = fields.get("preset") if isinstance(fields, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return fields  # an unknown preset is refused by its type
        return filled(fields, preset)

    @property
    def needs_states(self) -> str | None:
        """Return why distillation needs more of the teacher than draws from its distribution, with the knob; None: it
        does not."""
        if self.distill.contrast_weight > 0:
            weight = self.distill.contrast_weight
            return f"distill.contrast_weight is {weight:g}, which contrasts hidden states: set it to 0"
        if self.task.name == "next_utterance":
            return "task.name is next_utterance, whose teacher gives each token of a candidate its probability"
        return None

    @property
    def bounds(self) -> list[tuple[str, str]]:
        """Return each bound of a gate: its knob, and the metric."""
        gates = {"register.gate": self.register_.gate, "retrain.gate": self.retrain and self.retrain.gate}
        return [(f"{name}.{knob}", metric) for name, gate in gates.items() if gate for knob, metric, _ in gate.bounds]

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.pack.encoding == "base3" and not self.quant.ternary:
            raise ValueError(
                f"pack.encoding: base3 holds ternary codes only; quant.bits is {self.quant.bits} and "
                f"quant.quantizer is {self.quant.quantizer}; use encoding: dense, or a ternary quantizer at 2 bits "
                "throughout"
            )
        if self.task.name != "language_modeling" and self.data.unit == "line":
            raise ValueError(
                f"data.unit: line is running text, which the task {self.task.name} cannot use; leave it out"
            )
        if self.task.name == "chat" and isinstance(self.model.tokenizer, TrainBpe):
            raise ValueError(
                "model.tokenizer: {train_bpe} has no chat template, by which task.name: chat writes conversations; "
                "give the directory of a tokenizer that has one"
            )
        if self.task.name == "chat" and self.task.loss_on == "assistant" and self.distill.contrast_weight > 0:
            raise ValueError(
                f"distill.contrast_weight is {self.distill.contrast_weight:g}, which contrasts hidden states of all "
                "tokens, and task.loss_on is assistant, what the assistant says alone: set distill.contrast_weight: 0, "
                "use --preset best, or set task.loss_on: all"
            )
        if self.quant.quantizer == "laq" and self.distill.optimizer != "adam":
            raise ValueError(
                f"quant.quantizer: laq weights its error by Adam's second moment, and distill.optimizer is "
                f"{self.distill.optimizer}; use adam, or quant.quantizer: laq_uniform"
            )
        if self.quant.quantizer in ("laq", "laq_uniform") and self.resources.strategy == "fsdp":
            raise ValueError(
                f"quant.quantizer: {self.quant.quantizer} looks at whole matrices after each step, which no worker "
                "holds with resources.strategy: fsdp; use another quantizer, such as quantgpt, or strategy: ddp"
            )
        compiles = self.resources.compile is None and self.resources.gpus_per_worker > 0
        if self.distill.products == "int8" and (
            self.resources.strategy == "fsdp" or self.resources.compile or compiles
        ):
            raise ValueError(
                "distill.products is int8, which layers that are shared out (resources.strategy: fsdp) or compiled "
                "(resources.compile, on GPUs unless it is false) do not have; use products: float, or strategy: ddp "
                "with compile: false"
            )
        for knob, metric in self.bounds:
            self._refuse_unmeasured(knob, metric)
        if isinstance(self.model.source, dict) and self.finetune is None:
            raise ValueError("model.source is an architecture without weights; add a finetune section to train it")
        if self.distill.compared_layer != -1 and self.cache.mode == "states":
            raise ValueError(
                f"distill.contrast_layer is {self.distill.contrast_layer}, and cached states are those of the last "
                "layer only (-1); set cache.mode: online"
            )
        if self.cache.mode == "logits" and self.needs_states:
            raise ValueError(
                f"cache.mode is logits, of which nothing but tokens drawn from the teacher are kept, and "
                f"{self.needs_states}; or set cache.mode: states, or online"
            )
        for section, knobs, task in (
            ("evaluate", ("beams", "generated_rows"), "summarization"),
            ("data", ("summary_column",), "summarization"),
            ("data", ("candidates_column", "persona_column"), "next_utterance"),
            ("data", ("messages_column", "tools_column"), "chat"),
        ):
            for knob, value in getattr(self, section).changed(*knobs):
                if self.task.name != task:
                    raise ValueError(
                        f"{section}.{knob} is {value!r} and has no effect, because task.name is {self.task.name}; "
                        f"leave it out, or use the task {task}"
                    )
        for section, training in (("finetune", self.finetune), ("distill", self.distill)):
            if training is not None and training.batch_size < self.resources.workers:
                raise ValueError(
                    f"{section}.batch_size is {training.batch_size}, fewer rows than resources.workers "
                    f"({self.resources.workers}); raise one or lower the other"
                )
            shared_out = self.resources.strategy == "fsdp" and self.resources.workers > 1
            if training is not None and shared_out and training.batch_size % self.resources.workers:
                raise ValueError(
                    f"{section}.batch_size is {training.batch_size}, no multiple of resources.workers "
                    f"({self.resources.workers}), which resources.strategy: fsdp has pass rows equally often; use a "
                    "multiple, or strategy: ddp"
                )
        return self

    def _refuse_unmeasured(self, knob: str, name: str) -> None:
        """Raise ValueError for a bound on a metric that no validation split of this run will have."""
        metric, suites = metric_of(name), self.evaluate.suites
        ours = [m.name for m in METRICS.values() if m.of_text and m.task in ("", self.task.name) and m.name != "gap"]
        valid = [own for own in ours if METRICS[own].suite in ("", *suites)]
        tasks = [named_by_lm_eval(suite.partition(":")[2], "") for suite in suites if suite.startswith(f"{LM_EVAL}:")]
        if metric is not None and metric.suite == LM_EVAL and any(name.startswith(f"{task}_") for task in tasks):
            return
        if name not in valid:
            missing = "" if metric is None or not metric.suite else f", which evaluate.suites ({metric.suite}) measures"
            named = [*valid, *(f"{task}_METRIC" for task in tasks)]
            raise ValueError(f"{knob} names {name!r}{missing}; this run measures {', '.join(named)}")
