"""Machines: the Ray runtime, Ray Train and DeepSpeed adapters, checkpoints, the sampler actor, job submission."""
