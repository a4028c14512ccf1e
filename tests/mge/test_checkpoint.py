"""`best.pt` and everything that is not one."""

import builtins
import io
import os
import pickle
import socket
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mge.backbones import create_backbone
from mge.checkpoint import load_checkpoint, read_training, save_checkpoint
from mge.config import read_labels
from mge.model import MGENet
from mge_runtime.errors import CheckpointError, OutputError, TrainingError
from tests.helpers.tiny_models import tiny_config

CONFIG = tiny_config(
    classes=("ä bird", "b", "c"),
    resize=72,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    box_thresholds=(0.3, 0.45),
    normalize_features=True,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return MGENet(CONFIG).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, model)
    return path.read_bytes()


@pytest.fixture
def path(saved, tmp_path):
    """A good checkpoint, to spoil."""
    path = tmp_path / "best.pt"
    path.write_bytes(saved)
    return path


@pytest.fixture
def content(saved):
    """What a good checkpoint holds, to change."""
    return torch.load(io.BytesIO(saved), weights_only=True)


def refused(path, message, **options):
    """Check that a file is refused by one line that names it."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, **options)
    assert str(path) in str(caught.value)
    assert not set(str(caught.value)) & set("\n\x1b")


def test_what_is_saved_is_loaded(tmp_path, model):
    path = tmp_path / "last.pt"
    training = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "random": (3, (1, 2, 3), None),
        "best": float("-inf"),
    }
    save_checkpoint(path, model, training=training)
    loaded, found = load_checkpoint(path), read_training(path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert torch.equal(found["optimizer"]["state"].pop(0)["momentum_buffer"], torch.ones(2))
    del training["optimizer"]["state"][0]
    assert found == training
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(before, after), name


def test_one_model_one_file_without_training_state(tmp_path, model, saved):
    save_checkpoint(tmp_path / "other-name.pt", model)
    assert (tmp_path / "other-name.pt").read_bytes() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["other-name.pt"]
    with pytest.raises(TrainingError, match=r"other-name\.pt holds a model but no training state; expected last\.pt"):
        read_training(tmp_path / "other-name.pt")


def test_a_failed_write_leaves_the_old_file(path, model, saved, monkeypatch):
    def full(_content, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"cannot write .*best\.pt"):
        save_checkpoint(path, model)
    assert path.read_bytes() == saved
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="no-such-folder"):
        save_checkpoint(path.parent / "no-such-folder" / "best.pt", model)


def test_options_replace_what_our_file_holds(path):
    labels = path.with_name("names.txt")
    assert load_checkpoint(path).config.box_thresholds == (0.3, 0.45)
    assert load_checkpoint(path, box_threshold=0.7).config.box_thresholds == (0.7, 0.7)
    assert load_checkpoint(path, resize=80).config.resize == 80
    larger = load_checkpoint(path, image_size=128).config
    assert (larger.image_size, larger.resize) == (128, 144)  # the margin around the crop stays in proportion
    for option, message in (
        ({"image_size": 100}, r"image_size is 100; expected a multiple of 16"),
        ({"box_threshold": 1.5}, r"box_thresholds is \(1\.5, 1\.5\)"),
        ({"resize": 40}, r"resize is 40; expected at least image_size \(64\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, **option)
    labels.write_text("x\ny\nz\n")
    assert load_checkpoint(path, labels=labels).config.classes == ("x", "y", "z")
    labels.write_text("x\ny\n")
    refused(path, r"has 3 classes, .*names\.txt names 2", labels=labels)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"crow\n  jay \r\nred kite\n\n\n", ("crow", "jay", "red kite")),
        ("\ufeffamsel\nzaunkönig".encode(), ("amsel", "zaunkönig")),
        (b"1 001.Crow\n2 002.Jay\n", ("001.Crow", "002.Jay")),
        (b"0 crow\n1 jay\n", ("crow", "jay")),
        (b"2 crow\n1 jay\n", ("2 crow", "1 jay")),
        (b"1 crow\njay\n", ("1 crow", "jay")),
    ],
)
def test_labels_are_read(tmp_path, content, names):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    assert read_labels(path) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the labels"),
        (b"", "hold no names"),
        (b"\n\n", "hold no names"),
        (b"a\n\nb\n", "no name on line 2"),
        (b"a\nb\na\n", "name 'a' more than once"),
        (b"\xff\xfe\x00", "cannot read the labels .*utf-8"),
    ],
)
def test_labels_that_are_none(tmp_path, content, message):
    labels = tmp_path / "labels.txt"
    if content is not None:
        labels.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_labels(labels)


# Files that are no checkpoint, or not a good one.


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path / "best.pt", "does not exist")
    refused(tmp_path, "is a directory")
    refused(Path("/dev/zero"), "is a pipe, a socket or a device")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(pipe, "is a pipe, a socket or a device")  # at once: nobody writes to it
    with pytest.raises(CheckpointError, match="cannot read the labels"):
        read_labels(pipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, world\n" * 20, "a text file that begins with 'hello, world"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not a file of torch.save"),
        (b"\x80", "cut short, damaged or not a file of torch.save"),
        (pickle.dumps({"a": 1}), "Python pickle that torch.save did not write"),
        (pickle.dumps({"a": 1}, protocol=2), "Python pickle that torch.save did not write"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere(path, zipped, saved, content):
    if not zipped:
        torch.save(content, path, _use_new_zipfile_serialization=False)
        saved = path.read_bytes()
        load_checkpoint(path)
    for length in [3, 9, 64, 500, 5000, len(saved) // 2, len(saved) - 22, len(saved) - 1]:
        path.write_bytes(saved[:length])
        refused(path, "cut short|not a file of torch.save")


def test_a_flipped_byte_in_a_weight(path, saved):
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        assert largest.filename.startswith("archive/data/")
    damaged = bytearray(saved)
    damaged[largest.header_offset + largest.file_size // 2] ^= 0x10
    path.write_bytes(damaged)
    refused(path, f"damaged: entry {largest.filename} fails its checksum")


@pytest.mark.parametrize("change", [lambda c: c[:-4], lambda _: b"", lambda c: c + bytes(64), lambda _: None])
def test_an_entry_of_another_size_than_its_tensor(path, saved, change):
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            spoiled = change(old.read(name)) if name.endswith("/data/7") else old.read(name)
            if spoiled is not None:
                new.writestr(name, spoiled)
    refused(path, r"cut short, damaged .*(record size \(\d+ bytes\) does not match|data/7)")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [(0, (3, 8), (800, 1)), (10**6, (3, 8), (8, 1)), (-8, (3, 8), (8, 1))], ids=str)
def test_a_tensor_beyond_its_storage(path, content, place, zipped):
    offset, size, stride = place

    class Beyond:
        def __reduce__(self):
            storage = torch.arange(24.0)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

    content["model"]["gate.output.weight"] = Beyond()
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "cut short, damaged")


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")  # on its way out, its files are not
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (lambda tensor: tensor.to("meta"), "meta"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda tensor: tensor.to(torch.complex64), "torch.complex64"),
    ],
    ids=["sparse", "meta", "quantized", "complex"],
)
def test_a_weight_that_holds_no_plain_numbers(path, content, make, kind):
    content["model"]["gate.output.bias"] = make(torch.zeros(3))
    torch.save(content, path)
    refused(path, f"'gate.output.bias' is .*{kind}.*; expected plain numbers")


@pytest.mark.parametrize("scheme", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp", "https://a/b", "timm/resnet18"])
def test_nothing_is_fetched_for_a_checkpoint(path, content, scheme, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    content["config"]["arch"] = scheme
    torch.save(content, path)
    refused(path, r"arch is '.*'; expected a CNN of timm itself, nothing is fetched")
    with pytest.raises(CheckpointError, match="nothing is fetched"):
        create_backbone(scheme)  # what `mge-train --arch` asks
    assert asked == []


class Call:
    """Pickles as a call, which an ordinary reader makes."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 2"])
@pytest.mark.parametrize("how", ["eval", "system"])
def test_code_in_a_file_does_not_run(tmp_path, how, form):
    witness, path = tmp_path / "witness", tmp_path / "best.pt"
    touch = Call(os.system, f"touch '{witness}'")
    call = touch if how == "system" else Call(builtins.eval, f"open({str(witness)!r}, 'w').close()")
    content = {"format": "mge", "version": 1, "config": CONFIG.to_dict(), "model": {}, "training": call}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=2 if form == "pickle 2" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, r"did not write, so it was not opened|Python object [\w.]+, which could run code")
    assert not witness.exists()
    # The file is one that runs: otherwise nothing would be shown above.
    pickle.loads(path.read_bytes()) if form.startswith("pickle") else torch.load(path, weights_only=False)
    assert witness.exists()


def test_archives_of_others(tmp_path):
    path = tmp_path / "best.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, "Python object torch.nn.modules.linear.Linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out, its files are not
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    refused(path, "TorchScript archive")
    for name, message in (
        ("manifest.json", "exported bundle, not a checkpoint; run it with mge-run"),
        ("readme.txt", "a ZIP of 1 other files"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "{}")
        refused(path, message)
    for name in ("backbone.safetensors", "backbone.pt"):
        save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / name)
        refused(tmp_path / name, "safetensors file, which mge-train --init")


def test_contents_of_others(tmp_path):
    path = tmp_path / "other.pt"
    resnet = {"module.conv1.weight": torch.zeros(1), "module.layer1.0.conv1.weight": torch.zeros(1)}
    for content, message in [
        *(
            (nested, "looks like a bare ResNet, .*mge-train --init")
            for nested in (resnet, {"model": resnet, "epoch": 3})
        ),
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"epoch": 3, "note": "x"}, "is a dict of 'epoch', 'note' without weights"),
        ({}, "is a dict of nothing"),
        ({"blocks.0.weight": torch.zeros(3)}, "holds 1 weights of another model, such as 'blocks.0.weight'"),
        ({1: torch.zeros(3)}, "holds 1 weights of another model, such as '1'"),
        ({"conv5.0.weight": torch.ones(1), "classifier.weight": torch.ones(1)}, "authors' baseline"),
    ]:
        torch.save(content, path)
        refused(path, message)


def set_weight(name, value):
    return lambda content: content["model"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "format version 2; this mge reads up to version 1, upgrade"),
        (lambda c: c.update(version="1"), "format version '1'"),
        (lambda c: c.update(version=True), "format version True"),
        (lambda c: c.pop("config"), "no dict 'config'"),
        (lambda c: c.pop("model"), "no dict 'model'"),
        (lambda c: c["config"].pop("classes"), "'classes' is missing"),
        (lambda c: c["config"].update(color="red"), "unknown field 'color'"),
        (lambda c: c["config"].update(arch="resnet9000"), "arch is 'resnet9000'"),
        (lambda c: c["config"].update(classes=["a", "b"]), r"'experts.0.global_head.fc.weight' is float32 \[3, 96\]"),
        (lambda c: c["config"].update(experts=2, box_thresholds=[0.2]), "'experts.2.* has no place"),
        (lambda c: c["model"].pop("gate.output.bias"), "'gate.output.bias' is missing"),
        (set_weight("gate.extra", torch.zeros(1)), "'gate.extra' has no place"),
        (set_weight("gate.output.bias", torch.zeros(3, dtype=torch.int64)), r"is int64 \[3\]; .* float32 \[3\]"),
        (set_weight("gate.output.bias", [0.0]), "'gate.output.bias' is a list"),
        (set_weight("gate.output.bias", torch.tensor([0, torch.nan, 0])), "1 of 3 values NaN or infinite"),
        (set_weight("gate.output.bias", torch.full((3,), -torch.inf)), "3 of 3 values NaN or infinite"),
    ],
)
def test_a_checkpoint_at_odds_with_itself(path, content, change, message):
    change(content)
    torch.save(content, path)
    refused(path, message)
