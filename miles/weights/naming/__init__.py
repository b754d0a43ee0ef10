"""Names and shapes of a model's tensors: the one contract between trainers and engines.

| module | idea |
|---|---|
| contract | which tensors a version consists of, from the configuration alone |
| model_tensors | all tensors of a model, from its config.json alone |
| conversion | between the forms of transformers' modules and of checkpoint files, as tensors come |
| rules | the conversion of a family, from transformers' own tables |
| published | a model's tensors as a contract wants them |
"""
