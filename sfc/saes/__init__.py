"""Sparse autoencoders: kernels, training, formats, quality, and the stores of activations they learn from."""
