"""What a worker process answers."""

from __future__ import annotations

from miles.reward_sdk.frames import decode_answer, encode_answer
from miles.rpc.gen import reward_pb2, sample_pb2


def test_an_answer_carries_its_scores_and_how_long_and_how_many_calls_they_took() -> None:
    scores = [reward_pb2.Score(reward=sample_pb2.Reward(value=0.5)), reward_pb2.Score(error="of the user's making")]
    response = reward_pb2.ScoreResponse(request_id=7, scores=scores)
    assert decode_answer(encode_answer(0.25, 2, response)) == (0.25, 2, response)
    assert decode_answer(encode_answer(0.0, 0, reward_pb2.ScoreResponse())) == (0.0, 0, reward_pb2.ScoreResponse())
