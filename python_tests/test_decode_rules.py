"""Schedules, transfer rules and bitmaps against their definitions, on random cases."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dllm_ext._C import decode

counts = st.integers(0, 300)
steps = st.integers(1, 300)
confidences = st.lists(
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 0.9, 0.95, 0.999, 1.0]), min_size=1, max_size=40
)


@given(counts, steps)
def test_llada_schedule_sums_to_the_masked_positions_and_never_rises(masked, steps):
    schedule = [decode.llada_transfer_count(masked, steps, t) for t in range(steps)]
    assert sum(schedule) == masked
    assert schedule == sorted(schedule, reverse=True)
    assert max(schedule) - min(schedule) <= 1


@given(counts, steps, st.floats(1e-5, 0.5))
def test_dream_schedule_is_torchs_and_ends_empty(masked, steps, eps):
    times = torch.linspace(1, eps, steps + 1)
    left = masked
    for t in range(steps):
        count = decode.dream_transfer_count(left, eps, steps, t)
        share = 1 - times[t + 1] / times[t]
        assert count == (left if t == steps - 1 else int(torch.tensor(left, dtype=torch.float32) * share))
        left -= count
    assert left == 0


def ranked(confidence):
    """Positions by falling confidence, ties to the lowest."""
    return sorted(range(len(confidence)), key=lambda i: (-confidence[i], i))


@given(confidences, st.floats(0, 1), st.integers(1, 10))
def test_threshold_commits_all_that_reach_it_and_at_least_the_minimum(confidence, threshold, minimum):
    chosen = decode.select_transfers({"threshold": threshold, "num_transfer_tokens": minimum}, confidence)
    reach = sum(c >= threshold for c in confidence)
    assert chosen == sorted(ranked(confidence)[: max(reach, minimum)])


@given(confidences, st.floats(0.01, 5))
def test_factor_commits_the_largest_prefix_whose_every_member_is_within_the_bound(confidence, factor):
    order = ranked(confidence)
    within = [k == 1 or (k + 1) * (1 - confidence[order[k - 1]]) < factor for k in range(1, len(order) + 1)]
    n = max(n for n in range(1, len(order) + 1) if all(within[:n]))
    assert decode.select_transfers({"factor": factor}, confidence) == sorted(order[:n])


@given(confidences, st.integers(1, 50))
def test_a_count_commits_that_many(confidence, n):
    assert decode.select_transfers({"num_transfer_tokens": n}, confidence) == sorted(ranked(confidence)[:n])


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(["llada", "dream"]))
def test_a_block_is_complete_after_its_steps(block, steps, schedule):
    config = {"gen_length": block, "block_length": block, "steps": steps, "schedule": schedule}
    left = block
    for t in range(steps):
        left -= len(decode.select_transfers(config, [0.5] * left, t, block))
    assert left == 0


@given(st.integers(1, 200), st.lists(st.tuples(st.booleans(), st.integers(0, 199))))
def test_a_bitmap_is_a_set(size, operations):
    assume(all(i < size for _, i in operations))
    bitmap, members = decode.Bitmap(size), set()
    for insert, i in operations:
        (bitmap.set if insert else bitmap.reset)(i)
        (members.add if insert else members.discard)(i)
    assert bitmap.members() == sorted(members)
    assert bitmap.count() == len(members)
    assert bitmap.any() == bool(members)
    assert all(bitmap.test(i) == (i in members) for i in range(size))


@pytest.mark.parametrize("field", ["threshold", "factor"])
def test_equal_confidences_go_by_position(field):
    assert decode.select_transfers({field: 1.0}, [0.2, 0.3, 0.3]) == [1]
