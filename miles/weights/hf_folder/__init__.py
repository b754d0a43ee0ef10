"""Models in Hugging Face folders, read as if their weights were not quantised.

| module | idea |
|---|---|
| model_config | transformers' configuration of the model, without the quantisation |
| plain_tensors | the tensors of the files by name, dequantised as they are read |
| pretrained | the model itself, in transformers |

Nothing is converted beforehand, and transformers' own quantisers are never asked.
"""
