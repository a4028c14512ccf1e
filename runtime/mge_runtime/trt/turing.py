"""What TensorRT-RTX cannot do for compute capability 7.5 (Turing)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from mge_runtime.fields import JsonValue

__all__ = ["TURING", "turing_refusal"]

TURING = "sm75"

# ONNX operators that become matrix products. TensorRT-RTX 1.7's own words: "Cannot compile operation for Turing (SM75):
# FP32 GEMM is not supported".
_PRODUCTS = ("Gemm", "MatMul", "Einsum")


def turing_refusal(graph: str, plan: Mapping[str, JsonValue]) -> str | None:
    """Why TensorRT-RTX cannot build a graph for SM75; None: it can.

    Args:
        graph: its name.
        plan: its precision plan, `Manifest.precision`: "type" and "operators".
    """
    operators = cast("Mapping[str, Mapping[str, int]]", plan.get("operators") or {})
    products = [name for name in _PRODUCTS if any("float32" in kind for kind in operators.get(name, {}))]
    if not products and not (plan.get("type") == "fp32" and "Conv" in operators):
        return None
    what = f"its {' and '.join(products)} are in FP32" if products else "its convolutions are in FP32"
    return (
        f"graph {graph} cannot run on {TURING}: {what}, and TensorRT-RTX has no FP32 matrix products for Turing; "
        "expected trunks and Linear heads in FP16: mge-export --fp16 --target rtx:sm75"
    )
