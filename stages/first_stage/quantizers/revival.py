"""When entries of a codebook that nothing uses are put to use again. Imports no torch."""

from stages.options import TokenizerTrainOptions

REVIVE_SHARE = 0.95


def revive_share(options: TokenizerTrainOptions) -> float:
    """Share of the training in which dead codes are revived; after it none is disturbed any more."""
    return REVIVE_SHARE if options.revive_share is None else options.revive_share


def is_time_to_revive(options: TokenizerTrainOptions, num_done: int, num_steps: int) -> bool:
    """Whether dead codes are to be revived after `num_done` of `num_steps` optimizer steps."""
    every = options.revive_every_steps
    return every > 0 and num_done % every == 0 and num_done < revive_share(options) * num_steps
