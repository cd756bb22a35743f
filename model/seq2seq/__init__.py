"""Encoder-decoders (`model.type: encoder_decoder`). Imports model, kernels."""
