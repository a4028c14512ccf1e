"""What DeepStream's nvinfer needs of a chain: a graph of planar pixels, labels in one line, a configuration.

Not run: no DeepStream was at hand. The graph is compared with `chain.onnx` by tests/export/test_deepstream.py.
usage: python prepare.py chain.onnx FOLDER
"""

import json
import re
from pathlib import Path

import click
import onnx
from onnx import TensorProto, helper

from mge_runtime.cli.common import reports_errors
from mge_runtime.errors import InputError, OutputError, brief
from mge_runtime.files import atomic_path

# Keys of NVIDIA's page on Gst-nvinfer.
CONFIG = """\
[property]
gpu-id=0
gie-unique-id=2
# 2: objects of a detector, whose gie-unique-id follows; 1: whole frames
process-mode=2
operate-on-gie-id=1
onnx-file=chain.onnx
model-engine-file=chain.onnx_b8_gpu0_fp32.engine
labelfile-path=labels.txt
# a classifier, in FP32
network-type=1
network-mode=0
batch-size=8
# RGB of 0 to 255
model-color-format=0
net-scale-factor=1
infer-dims=3;{size};{size}
output-blob-names=probabilities
classifier-threshold=0.5
"""


def planar(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a chain begin with planar pixels, as nvinfer makes them, and end with the probabilities alone.

    Args:
        model: `chain.onnx`, whose input is `frame`, uint8 [B, S, S, 3]; changed in place.

    Returns:
        The model: `image_1`, float32 RGB [B, 3, S, S] of 0 to 255, to `probabilities` [B, C]. Normalization stays in
        the graph, since nvinfer has one factor for all channels; nvinfer's default parser takes each output for one
        classifier's probabilities.
    """
    graph = model.graph
    size = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for node in graph.node:
        if "frame" in node.input:  # the cast to float32, of the first expert and of a gate that sees the frame
            node.CopyFrom(helper.make_node("Transpose", ["image_1"], node.output, node.name, perm=[0, 2, 3, 1]))
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image_1", TensorProto.FLOAT, ["batch", 3, size, size]))
    del graph.output[1:]
    return model


@click.command()
@click.argument("chain", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@reports_errors
def main(chain: Path, folder: Path) -> None:
    """Write chain.onnx, labels.txt and config_infer.txt for DeepStream to FOLDER."""
    out = folder / "chain.onnx"
    if out.exists() and out.samefile(chain):
        raise InputError(f"cannot write {out}: it is the chain that is read; name another folder")
    try:
        model = onnx.load(chain)
        metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key != "mge"}
        names, size = metadata["class_names"], metadata["size"]
    except Exception as error:  # protobuf, JSON and missing files of weights
        reason = f"{brief(error)}; expected one that mge-export --onnx wrote"
        raise InputError(f"cannot use the chain {chain}: {reason}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}; name another place") from error
    with atomic_path(out) as path:
        onnx.save_model(planar(model), path)
    labels = ";".join(re.sub(r"[;\r\n]", " ", name) for name in names)  # nvinfer splits there
    (folder / "labels.txt").write_text(labels + "\n")
    (folder / "config_infer.txt").write_text(CONFIG.format(size=size))


if __name__ == "__main__":
    main()
