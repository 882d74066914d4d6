"""Plain `mlx.nn`: arrays in, arrays out; no loss, no optimizer."""
