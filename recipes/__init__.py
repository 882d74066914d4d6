"""Programs: `python -m recipes.align_qwen3` in a checkout, `mlxmm align-qwen3` where mlxmm is installed."""

from mlxmm import checkout

if __name__ == "recipes":  # in a checkout
    checkout.share_modules("recipes")
