from __future__ import annotations

import torch
from recorded import random_sample

from miles.drafts.packed_batch import pack, usable
from miles.drafts.recording import RecordedSample


def samples() -> list[RecordedSample]:
    """Of which the second has a prompt of one token, and the third a gap in what is learnt."""
    generator = torch.Generator().manual_seed(0)
    found = [random_sample(generator, length=length, prompt=prompt) for length, prompt in ((9, 4), (4, 1), (12, 2))]
    found[2].loss_mask_R[3:5] = False
    return found


def test_each_row_reads_and_predicts_what_its_position_says():
    given = samples()
    batch = pack(given, (1, 3), 3, torch.device("cpu"))
    rows = [(sample, t) for sample in given for t in range(len(sample.tokens_T) - 2)]

    roots = list(range(len(rows)))
    for step in range(3):
        learnt = batch.learnt_rows[step].tolist()
        targets = batch.targets(step)
        expected = []
        for row, (sample, t) in enumerate(rows):
            response = t + 2 + step - sample.prompt_length
            if 0 <= response < len(sample.loss_mask_R) and sample.loss_mask_R[response]:
                target = targets[torch.tensor(len(expected))]
                expected.append(row)
                read = sample.hidden_TD[-1][t + 1 + step]
                assert batch.embeds_ND(step)[row].equal(read)
                assert target.sampled_N == sample.tokens_T[t + 2 + step]
                assert target.top_tokens_NK.equal(sample.top_tokens_RK[response])
                assert target.top_log_probs_NK.equal(sample.top_log_probs_RK[response])
        assert learnt == expected
        roots = [row for row in roots if row in expected]
    assert batch.roots.tolist() == roots

    for row, (sample, t) in enumerate(rows):
        assert batch.hidden_NF[row].equal(torch.cat([sample.hidden_TD[1][t], sample.hidden_TD[3][t]]))
    assert batch.positions_N.tolist() == [t for _, t in rows]


def test_samples_without_a_token_that_a_row_predicts_are_not_usable():
    generator = torch.Generator().manual_seed(0)
    short, first, whole = (random_sample(generator, length=n, prompt=1) for n in (2, 3, 3))
    first.loss_mask_R[:] = torch.tensor([True, False])  # which no row predicts, as none is before the prompt's one
    whole.loss_mask_R[:] = True
    assert [usable(sample) for sample in (short, first, whole)] == [False, False, True]
