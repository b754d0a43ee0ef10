"""A rollout engine for any Hugging Face causal language model on CPU or one GPU.

| module | idea |
|---|---|
| engine | the asyncio face: requests in, deltas out |
| worker | the thread that steps the generator |
| generator | requests, model and cache, one step at a time |
| outbox | what the event loop is told, and when |
| scheduler | which requests hold a slot and what each computes next (pure) |
| sequence | one request's tokens, log-probs and versions on the way |
| forward | a scheduler plan turned into one packed forward pass |
| attention | attention over slots, registered with transformers |
| experts | mixture-of-experts layers that see at least 16 rows |
| kv_cache | keys and values by slot and absolute position |
| sampling, random_numbers | one token a row from one uniform number a token |
| stop | end tokens and stop strings |
| routing | which experts each token went to |
| model, parameters | a model without weights, and weights swapped into it |
| invariance | does this machine's arithmetic keep rows independent? |
"""

from miles.services.rollout.engines.torch.engine import EngineFailed, TorchEngine

__all__ = ["EngineFailed", "TorchEngine"]
