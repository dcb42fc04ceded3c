"""Second stage: the decoder-only transformer over codes, its conditioning and its sampler."""
