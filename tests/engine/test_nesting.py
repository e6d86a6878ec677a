"""What score requests share, on two levels: prompt tokens that are computed, and what runs behind which prefix."""

from __future__ import annotations

import dataclasses

from cai.engine import ScoreRequest
from cai.engine.native.nesting import NOTHING, Nested, by_prefix, prefix_of

HEAD, CASE, OWN, CASES, ASKS = 100, 30, 7, 5, 4


def asked(cases=CASES, asks=ASKS, head=HEAD):
    """`asks` requests about each case: HEAD tokens that all share, CASE of the case, OWN of each."""
    contexts = [
        (*range(HEAD), *range(1000 * c, 1000 * c + CASE), *range(9000 + 10 * a, 9000 + 10 * a + OWN))
        for c in range(1, cases + 1)
        for a in range(asks)
    ]
    return [ScoreRequest(i, ids, (5,), HEAD + CASE, head) for i, ids in enumerate(contexts)]


def tokens(requests):
    """Prompt tokens that a slice of requests computes, every part of a prefix once."""
    parts, own = {}, 0
    for prefix, group in by_prefix(requests):
        start = 0
        for end in prefix.ends:
            parts[prefix.token_ids[:end], start] = end - start
            start = end
        own += sum(len(r.context_ids) + len(r.continuation_ids) - 1 - start for r in group)
    return sum(parts.values()) + own


def test_the_head_of_a_stage_is_computed_once_for_all_cases():
    own = CASES * ASKS * OWN
    assert tokens(asked(head=0)) == CASES * (HEAD + CASE) + own  # one level
    assert tokens(asked()) == HEAD + CASES * CASE + own


def test_every_request_is_in_one_group_behind_what_it_begins_with():
    requests = [*asked(3, 3), *asked(4, 1), ScoreRequest(90, (1, 2, 3), (4,)), ScoreRequest(91, (7, 8, 9), (4,), 2, 1)]
    found = list(by_prefix(requests))
    assert sorted(id(r) for _, group in found for r in group) == sorted(map(id, requests))
    for prefix, group in found:
        assert all(r.context_ids[: len(prefix.token_ids)] == prefix.token_ids for r in group)
        assert all(len(r.context_ids) > len(prefix.token_ids) for r in group)


def test_a_request_alone_with_its_case_runs_behind_the_head():
    assert [(len(p.token_ids), p.head_len, len(g)) for p, g in by_prefix(asked(3, 1))] == [(HEAD, 0, 3)]
    mixed = [*asked(2, 2), dataclasses.replace(asked(3, 1)[2], id=9)]  # a slice ends within a case
    assert [(len(p.token_ids), len(g)) for p, g in by_prefix(mixed)] == [(HEAD + CASE, 2), (HEAD + CASE, 2), (HEAD, 1)]
    assert tokens(mixed) == HEAD + 2 * CASE + 4 * OWN + CASE + OWN


def test_one_request_alone_has_no_prefix():
    assert [(p, len(g)) for p, g in by_prefix(asked(1, 1))] == [(NOTHING, 1)]
    assert tokens(asked(1, 1)) == HEAD + CASE + OWN


def test_short_parts_are_no_prefixes_of_their_own():
    ids = tuple(range(200))
    of = {
        (100, 0): (100, 0),
        (100, 50): (100, 50),
        (100, 90): (90, 0),  # ten tokens of the case
        (100, 100): (100, 0),
        (60, 100): (60, 0),  # less is shared than the head that is named
        (100, 10): (100, 0),
        (10, 0): (0, 0),
        (10, 10): (0, 0),
        (0, 100): (0, 0),
        (400, 50): (199, 50),  # one token stays the request's own
    }
    for (prefix_len, head_len), (length, head) in of.items():
        found = prefix_of(ScoreRequest(0, ids, (1,), prefix_len, head_len))
        assert found == Nested(ids[:length], head), (prefix_len, head_len)
