"""Texts to vectors, by a local model or a hosted one.

Embedders made of the policy's own hidden states or attention projections live with the language models in
``preceptor.lm``.
"""
