import timm
import torch

from mge.backbones import create_backbone


def test_backbone_ends_at_strides_16_and_32():
    backbone, channels4, channels5 = create_backbone("plainnet_w16")
    assert (channels4, channels5) == (128, 128)
    c4, c5 = backbone(torch.zeros(2, 3, 112, 96))
    assert c4.shape == (2, 128, 7, 6)
    assert c5.shape == (2, 128, 4, 3)
    assert (c5 >= 0).all()  # ReLU at the end: attention needs no normalization
    assert sum(p.numel() for p in backbone.parameters()) < 0.25e6


def test_features_are_those_of_the_classifier():
    torch.manual_seed(0)
    model = timm.create_model("plainnet_w16", num_classes=5).eval()
    backbone = timm.create_model("plainnet_w16", features_only=True, out_indices=(-1,)).eval()
    backbone.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.fc(backbone(images)[0].mean((2, 3))), model(images))
