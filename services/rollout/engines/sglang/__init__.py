"""A rollout engine of SGLang servers, which run as processes of their own, in an interpreter of their own.

| module | idea |
|---|---|
| engine | the asyncio face: requests in, deltas out |
| options, flags | what servers are built from, and their command line |
| replica | one server: started, watched, restarted, or attached to |
| server, probes, api, events | its process, its heartbeat, its HTTP, its server-sent events |
| requests, batches | a request as SGLang spells it, and several in one POST |
| responses | the streamed answer |
| active | requests that run or wait |
| routing | which server gets a request (pure) |
| concurrency | how many requests a server gets at once (pure) |
| weights, updates | one version into all servers, into one server |
| buckets, staging | tensors in flat shared buffers |
| remote, member | versions that the trainer broadcasts straight into servers |
| draft | the draft model, with versions of its own |
| names, layout | parameter names, and the parameters that a model has |
| experts | which experts each token went to |
"""

from miles.services.rollout.engines.sglang.engine import SglangEngine
from miles.services.rollout.engines.sglang.errors import EngineFailed, ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.options import SglangOptions

__all__ = ["EngineFailed", "ServerRefused", "ServerUnstartable", "SglangEngine", "SglangOptions"]
