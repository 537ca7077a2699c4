"""Sparse autoencoders: harvesting activations, training dictionaries, labelling and ranking their latents."""
