"""A broad sample of torch.nn: each layer's operators are allowed, and its graph equals eager at other batch sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

VECTOR, SEQUENCE, IMAGE, VOLUME = (6,), (4, 6), (4, 8, 8), (4, 4, 4, 4)

LAYERS = [
    *((layer, VECTOR) for layer in (nn.Linear(6, 3), nn.LayerNorm(6), nn.RMSNorm(6), nn.BatchNorm1d(6))),
    *(
        (layer(), VECTOR)
        for layer in (
            nn.ELU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            nn.PReLU,
            nn.Softplus,
            nn.Tanhshrink,
            nn.Hardswish,
            nn.LogSigmoid,
        )
    ),
    *(
        (layer, VECTOR)
        for layer in (nn.Softmax(1), nn.LogSoftmax(1), nn.GLU(1), nn.Threshold(0.1, 2.0), nn.CELU(inplace=True))
    ),
    *(
        (layer, SEQUENCE)
        for layer in (nn.Conv1d(4, 3, 3), nn.ConvTranspose1d(4, 3, 2), nn.InstanceNorm1d(4), nn.AvgPool1d(2))
    ),
    *(
        (layer, SEQUENCE)
        for layer in (nn.GRU(6, 5, batch_first=True), nn.RNN(6, 5, batch_first=True, bidirectional=True))
    ),
    *(
        (layer, SEQUENCE)
        for layer in (nn.AdaptiveMaxPool1d(2), nn.ReflectionPad1d(2), nn.Flatten(), nn.Unflatten(1, (2, 2)))
    ),
    *(
        (layer, IMAGE)
        for layer in (nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2))
    ),
    *(
        (layer, IMAGE)
        for layer in (nn.BatchNorm2d(4, momentum=0.3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True))
    ),
    *((layer, IMAGE) for layer in (nn.MaxPool2d(2), nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(3), nn.LPPool2d(2, 2))),
    *((layer, IMAGE) for layer in (nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.Unfold(3))),
    *((layer, IMAGE) for layer in (nn.Upsample(scale_factor=2, mode="bilinear"), nn.ZeroPad2d(1), nn.CircularPad2d(1))),
    *((layer, IMAGE) for layer in (nn.LocalResponseNorm(2), nn.ChannelShuffle(2), nn.Softmax2d(), nn.Dropout2d(0.5))),
    *((layer, VOLUME) for layer in (nn.Conv3d(4, 2, 3), nn.MaxPool3d(2), nn.BatchNorm3d(4), nn.AdaptiveAvgPool3d(2))),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_a_layer_equals_eager(round_trip, layer, shape):
    def squares(outputs, targets):
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return first.square().mean()

    class Scaled(nn.Module):
        """The layer behind a parameter, so that its own derivative counts."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.layer = layer

        def forward(self, x):
            return self.layer(x * self.scale)

    trip = round_trip(Scaled(), torch.randn(3, *shape), loss=squares)
    assert trip.exported.variants[0].variant.symbols, "rows are open"
    for rows in (2, 5):
        trip.check(torch.randn(rows, *shape), training=True, tolerance=1e-5)
        trip.check(torch.randn(rows, *shape), training=False, tolerance=1e-5)
