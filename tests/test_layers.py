"""results/layers.py at tiny sizes."""

import layers
from torch import nn

from models import ConvTransposeByBlocks


def test_every_convolution_is_measured_with_the_work_that_it_is(tiny_config, monkeypatch):
    monkeypatch.setattr(layers, "REPEATS", 1)
    config = tiny_config()
    found = layers.convolutions(config)
    assert len(found) == 8
    images, total = config.train_seq_len * config.batch_size, 0
    for number, (layer, x) in enumerate(found.values()):
        pixels = (x if isinstance(layer, nn.ConvTranspose2d) else layer(x)).shape[2:].numel()
        if isinstance(layer, ConvTransposeByBlocks):  # at the border too they count as whole
            pixels = layer(x).shape[2:].numel() // 4
        work = 2 * images * pixels * layer.weight.numel()
        measured = layers.measure(layer, x)
        assert list(measured) == ["forward", "input", "weights"][:: 1 if number else 2]
        assert all(flops == work and seconds > 0 for flops, seconds in measured.values())
        total += work * len(measured)
    first, *lines, last = layers.table(config)
    assert "matrix product" in first and len(lines) == 8 and f"{total / 1e9:.3g} GFLOP" in last
