"""TensorRT and TensorRT-RTX: targets, the builder, attestation, and where built engines lie. One code for both."""
