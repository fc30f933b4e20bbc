import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.order import epoch_key, global_samples, permute, rank_slice, sample_indices

KEYS = st.integers(0, 2**64 - 1)


@given(length=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection(length, key):
    assert sorted(permute(np.arange(length), length, key)) == list(range(length))


@given(length=st.integers(1, 2**60), key=KEYS, data=st.data())
def test_permute_stays_inside_and_apart_at_any_length(length, key, data):
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    permuted = permute(np.array(indices), length, key)
    assert permuted.dtype == np.int64
    assert ((permuted >= 0) & (permuted < length)).all()
    assert len(set(permuted.tolist())) == len(indices)


@given(length=st.integers(1, 500), key=KEYS, data=st.data())
def test_an_index_is_permuted_alike_alone_and_among_others(length, key, data):
    index = data.draw(st.integers(0, length - 1))
    assert permute(np.array([index]), length, key)[0] == permute(np.arange(length), length, key)[index]


def test_permute_keeps_shape_and_refuses_indices_outside():
    assert permute(np.arange(6).reshape(2, 3), 10, 1).shape == (2, 3)
    assert permute(np.array([], dtype=np.int64), 10, 1).shape == (0,)
    for outside in ([-1], [10]):
        with pytest.raises(ValueError, match="indices must lie in"):
            permute(np.array(outside), 10, 1)


@pytest.mark.parametrize("length", [3, 10, 64, 1000])
def test_each_place_is_equally_likely(length):
    """Chi-squared over many keys, for the first, a middle and the last index."""
    num_keys, num_bins = 2000, min(length, 10)
    for index in (0, length // 2, length - 1):
        found = np.array(
            [permute(np.array([index]), length, epoch_key(0, epoch))[0] for epoch in range(num_keys)]
        )
        counts = np.bincount(found * num_bins // length, minlength=num_bins)
        expected = np.bincount(np.arange(length) * num_bins // length, minlength=num_bins) * (
            num_keys / length
        )
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        # The keys are fixed, so this fails always or never; 30 is beyond 0.05 % for nine degrees.
        assert chi_squared < 30


def test_neighbours_do_not_stay_neighbours():
    permuted = permute(np.arange(10_000), 10_000, epoch_key(0, 0))
    assert (np.abs(np.diff(permuted)) == 1).mean() < 0.001
    assert abs(np.corrcoef(np.arange(10_000), permuted)[0, 1]) < 0.03


def test_the_order_is_the_one_of_earlier_versions():
    """A run that an earlier version began must go on in the same order."""
    epochs, indices = global_samples(step=2, global_size=4, length=10, seed=7)
    assert epochs.tolist() == [0, 0, 1, 1]
    assert indices.tolist() == [8, 3, 7, 4]
    assert epoch_key(7, 1) == 9672475392221035855


@settings(max_examples=50)
@given(length=st.integers(1, 50), global_size=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_every_epoch_covers_everything_once(length, global_size, seed):
    num_steps = -(-3 * length // global_size)
    steps = [global_samples(step, global_size, length, seed) for step in range(num_steps)]
    epochs, indices = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(length))


def test_epochs_and_seeds_differ_in_order():
    orders = {
        tuple(permute(np.arange(100), 100, epoch_key(seed, epoch))) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


@given(
    step=st.integers(0, 10**9),
    share=st.integers(1, 16),
    data_size=st.sampled_from([1, 2, 4, 8]),
    length=st.integers(1, 10**9),
    seed=st.integers(0, 2**31),
)
def test_ranks_share_a_step_whatever_their_number(step, share, data_size, length, seed):
    global_size = share * data_size
    slices = [rank_slice(step, global_size, rank, data_size) for rank in range(data_size)]
    assert [n for part in slices for n in part] == list(range(step * global_size, (step + 1) * global_size))
    _, expected = global_samples(step, global_size, length, seed)
    found = [sample_indices(np.array(part), length, seed)[1] for part in slices]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_rank_slice_refuses_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="no multiple"):
        rank_slice(0, 6, 0, 4)
