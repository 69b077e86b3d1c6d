"""The section `resources`: where a run happens, never what it gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Closed, Name, NotNegative, Positive, Rate
from pipeline.credentials import taking_none, without_credentials


class Prices(Closed):
    """What things cost, in any one currency, for the sums of `--plan` alone. None is assumed: there is no sum without
    `worker_hour`, and what is 0 adds nothing to it."""

    worker_hour: Rate | None = None  # of a worker, with its GPU if it has one
    gib_month: NotNegative = 0.0  # of what the store keeps
    cache_months: NotNegative = 1.0  # that a teacher's cache is kept
    thousand_writes: NotNegative = 0.0  # requests to S3 that write or list
    thousand_reads: NotNegative = 0.0


class Resources(Closed):
    """What never changes the answer, up to float order: places, workers, batches of a pass.

    Two exceptions: with dropout, which only finetune has, the masks differ with workers and micro_batch; and with
    quant.activation_range: tensor, the paper's, a range spans what is passed through the model at once.
    """

    storage_uri: str = "./bitmill-store"
    tracking_uri: str | None = None
    namespace: Name | None = None  # a folder below storage_uri
    ray_address: str | None = None
    workers: Annotated[int, Field(ge=0)] = 1  # 0: everything in this process, without Ray
    # With so few training goes on where nodes are gone, until more come; null: with `workers` or not at all
    min_workers: Positive | None = None
    cpus_per_worker: Rate = 1
    gpus_per_worker: NotNegative = 0  # 0: all is computed on CPUs, whatever there is
    strategy: Literal["ddp", "fsdp"] = (
        "ddp"  # fsdp: no worker holds whole what trains, or a teacher that runs beside it
    )
    micro_batch: Positive = 8  # rows a worker passes through the model at once while training; half if memory is full
    inference_batch: Positive = 16  # rows of a pass of the cache and of the evaluation
    activation_checkpointing: bool = False
    compile: bool | None = None  # layers and losses of a training step; null: on GPUs, unless strategy is fsdp
    checkpoint_minutes: Rate = 5  # of training between two checkpoints: as many at most are trained again
    scale_up_minutes: NotNegative = 0  # that a command waits for nodes of an autoscaler; 0: those that are there
    max_failures: Annotated[int, Field(ge=0)] = 3  # worker losses that one training job survives
    local_cache_dir: str | None = None
    # of copies that a node keeps of what it reads from S3; those used longest ago go, but none of the last ten minutes
    local_cache_gib: Rate = 100
    max_worker_hours: Rate | None = None  # a sweep starts no further trial once so much is used; a tick ends, rejected
    max_cache_gib: Rate = 50  # of a teacher's states: beyond it cache.mode auto runs the teacher in each step
    prices: Prices = Prices()
    worker_tflops: Rate | None = None  # of a large product on a worker's device, for --plan; null: as far as is known

    def compiles(self, device: Any) -> bool:
        """Tell whether what trains on a torch device is compiled."""
        return device.type == "cuda" and self.strategy == "ddp" if self.compile is None else self.compile

    @property
    def least_workers(self) -> int:
        """Return how few workers training makes do with."""
        return self.workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _no_more_than_workers(self) -> Resources:
        if self.least_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, and workers {self.workers}; set min_workers to at most workers, "
                "or leave it out"
            )
        if self.strategy == "fsdp" and self.least_workers < self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, and strategy fsdp, whose model need not fit into fewer workers; "
                "leave min_workers out, or use strategy: ddp"
            )
        return self

    @model_validator(mode="after")
    def _layers_of_parts(self) -> Resources:
        if self.compile and self.strategy == "fsdp":
            raise ValueError(
                "compile is true, and strategy is fsdp, which gathers the parts of layers and compiles none; "
                "leave compile out, or use strategy: ddp"
            )
        return self

    @field_validator("tracking_uri")
    @classmethod
    def _without_credentials(cls, uri: str | None) -> str | None:
        return None if uri is None else without_credentials(uri)

    @field_validator("storage_uri", "ray_address")
    @classmethod
    def _no_credentials(cls, uri: str | None) -> str | None:
        return None if uri is None else taking_none(uri)

    @field_validator("storage_uri")
    @classmethod
    def _plain_directory(cls, uri: str) -> str:
        return uri.removeprefix("file://")
