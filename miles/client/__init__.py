"""Python client of the gateway's REST API: `pip install miles[client]`.

from miles.client import MilesClient

with MilesClient("http://127.0.0.1:8000") as client:
    job = client.submit({"name": "sums", "hf_checkpoint": "models/smollm2", ...})
    for event in client.watch(job["id"]):
        print(event)
"""

from miles.client.client import MilesClient
from miles.client.errors import GatewayUnreachableError, MilesError, UnexpectedAnswerError

__all__ = ["GatewayUnreachableError", "MilesClient", "MilesError", "UnexpectedAnswerError"]
