"""Network + loss + optimizer: what a Trainer fits."""
