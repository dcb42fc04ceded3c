"""Options of the processes that train."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed ZeRO."""

    zero_stage: Literal[0, 1, 2, 3] = option(
        1, "What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = option(False, "Keep the optimizer state in host memory; needs zero_stage of at least 1.")
    offload_parameters: bool = option(False, "Keep the parameters in host memory; needs zero_stage=3.")
    bucket_size: int = option(
        50_000_000, "Elements that one collective reduces or gathers at most; buffers grow with it.", low=1
    )


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Workers of the two training jobs."""

    num_workers: int | tuple[int, ...] = option(
        1,
        "Training processes (world size). For `train` also [min, max]: the run shrinks and grows with the cluster.",
        low=1,
    )
    use_gpu: bool = option(False, "One GPU per worker.")
    cpus_per_worker: float = option(1.0, "CPUs that Ray reserves per worker.", above=0.0)
    threads_per_worker: int | None = option(
        None, "Torch threads per worker; an equal share of its machine if not given.", low=1
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option(
        "PACK", "How Ray places the workers on nodes."
    )
    max_failures: int = option(
        3, "Times a job restarts its workers without a new commit in between before it gives up.", low=0
    )
    hang_timeout_seconds: float = option(
        600.0, "A worker that ends no step for so long is ended and counts as failed.", above=0.0
    )
    resize_every_seconds: float = option(
        60.0, "With num_workers=[min, max]: how often the cluster is looked at for more workers.", above=0.0
    )

    @property
    def min_workers(self) -> int:
        """Fewest processes a job runs with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most processes a job runs with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[-1]
