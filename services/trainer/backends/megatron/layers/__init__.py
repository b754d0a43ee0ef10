"""Layers in plain PyTorch for machines without TransformerEngine. Start at `local_layers`."""
