"""Language-model activations, kept and asked: see `README.md`."""
