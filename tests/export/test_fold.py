import pytest
import timm
import torch
from torch import nn

from mge_export.typed import fold_batch_norms

IMAGE = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))


class TwoReaders(nn.Module):
    """A convolution that feeds a BatchNorm and something else: folding would change the latter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var.fill_(9)

    def forward(self, image):
        features = self.conv(image)
        return [self.norm(features), features]


def randomized(backbone):
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return backbone.eval()


@pytest.mark.parametrize("arch", ["resnet10t", "tf_efficientnet_lite0"])  # plain BatchNorms; with an activation inside
@torch.no_grad()
def test_a_folded_backbone_answers_as_before_without_batch_norms(arch):
    torch.manual_seed(0)
    backbone = randomized(timm.create_model(arch, features_only=True, out_indices=(-2, -1)))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = backbone(IMAGE)
    assert fold_batch_norms(backbone, IMAGE) == norms > 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for found, expected in zip(backbone(IMAGE), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_a_convolution_with_a_second_reader_is_left_alone():
    torch.manual_seed(0)
    backbone = TwoReaders().eval()
    before = backbone(IMAGE)
    assert fold_batch_norms(backbone, IMAGE) == 0
    for found, expected in zip(backbone(IMAGE), before, strict=True):
        assert torch.equal(found, expected)
