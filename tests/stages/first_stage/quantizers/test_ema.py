"""The codebook of moving averages follows its formula, and only in training."""

import torch
from quantizer_support import features, quantizer_of

from stages.first_stage.quantizers.base import to_vectors
from stages.first_stage.quantizers.ema import AverageQuantizer
from stages.options import TokenizerTrainOptions


def test_entries_move_by_the_published_formula():
    quantizer = quantizer_of("vq-ema").train()
    quantizer.configure(TokenizerTrainOptions(codebook_decay=0.9))
    z = features(quantizer)
    counts, sums = quantizer.counts_K.clone(), quantizer.sums_KD.clone()
    codes, vectors = quantizer(z).codes_BHW.flatten(), to_vectors(z)
    for k in range(16):
        chosen = vectors[codes == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(chosen)
        sums[k] = 0.9 * sums[k] + 0.1 * chosen.sum(0)
    smoothed = (counts + 1e-5) / (counts.sum() + 16e-5) * counts.sum()
    torch.testing.assert_close(quantizer.embedding.weight.data, sums / smoothed[:, None])


def test_evaluation_moves_nothing():
    quantizer = quantizer_of("vq-ema").eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(features(quantizer))
    quantizer.train().encode(features(quantizer))
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_the_codebook_settles_on_the_means_of_the_data():
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    quantizer = AverageQuantizer(4, 2, decay=0.8).train()
    quantizer.start(centres + 0.5)
    for _ in range(60):
        z = (centres[torch.randint(4, (256,))] + 0.1 * torch.randn(256, 2)).t().reshape(1, 2, 16, 16)
        quantizer(z)
    torch.testing.assert_close(quantizer.codebook(), centres, atol=0.05, rtol=0)


def test_a_revived_entry_stays_where_it_was_put():
    quantizer = quantizer_of("vq-ema").train()
    vectors = 50.0 + torch.randn(7, 4)
    counts = torch.ones(16, dtype=torch.int64)
    counts[5] = 0
    quantizer.revive(counts, vectors)
    quantizer(features(quantizer))  # nothing in here is near it
    torch.testing.assert_close(quantizer.codebook()[5], vectors[0], atol=0.1, rtol=0)


def test_nothing_is_learned_by_gradient():
    quantizer = quantizer_of("vq-ema")
    assert not [p for p in quantizer.parameters() if p.requires_grad]
    assert list(quantizer(features(quantizer)).losses) == ["commitment"]


def test_the_gradient_of_the_entropy_is_that_of_the_codebook_before_it_moved():
    quantizer = quantizer_of("vq-ema")
    quantizer.configure(TokenizerTrainOptions(entropy_weight=1.0))
    z = features(quantizer)
    quantizer.start(to_vectors(z))
    gradients = {}
    for mode in (False, True):  # training last, for it moves the codebook
        given = z.clone().requires_grad_()
        quantizer.train(mode)(given).losses["entropy"].backward()
        gradients[mode] = given.grad
    assert gradients[True].abs().sum() > 0
    assert torch.equal(gradients[True], gradients[False])
