"""The kernels for GPUs, by Triton."""
