"""Machines: the Ray runtime, Ray Train and DeepSpeed adapters, checkpoints, sampler actors, job submission and manifests."""
