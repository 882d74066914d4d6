"""mlxmm: multimodal training on MLX."""

from mlxmm import blas

blas.enable()
