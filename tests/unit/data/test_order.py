import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.order import BlockOrder, LengthOrder, epoch_key, permute, rank_slice

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


def test_the_order_of_one_tar_is_that_of_earlier_versions():
    """A run that an earlier version began must go on in the same order."""
    epochs, indices = BlockOrder(np.array([10]), seed=7, block_tars=16)(np.arange(8, 12))
    assert epochs.tolist() == [0, 0, 1, 1]
    assert indices.tolist() == [8, 3, 7, 4]
    assert epoch_key(7, 1) == 9672475392221035855


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=80)
@given(sizes=SIZES, seed=st.integers(0, 2**31), block_tars=st.integers(1, 15))
def test_every_epoch_covers_everything_once(sizes: list[int], seed: int, block_tars: int):
    length = sum(sizes)
    order = BlockOrder(np.array(sizes), seed=seed, block_tars=block_tars)
    epochs, indices = order(np.arange(3 * length))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(length))


@settings(max_examples=80)
@given(sizes=SIZES, seed=st.integers(0, 2**31), block_tars=st.integers(1, 15))
def test_a_block_s_samples_are_of_its_tars(sizes: list[int], seed: int, block_tars: int):
    """And `blocks` names, in order, the blocks in which positions fall."""
    length, firsts = sum(sizes), np.cumsum([0, *sizes])
    order = BlockOrder(np.array(sizes), seed=seed, block_tars=block_tars)
    epochs, indices = order(np.arange(2 * length))
    blocks = range(-(-len(sizes) // block_tars))
    met = []
    for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
        tar = int(np.searchsorted(firsts, index, side="right")) - 1
        assert order.tar_of(index) == tar
        (place,) = [(epoch, block) for block in blocks if tar in order.tars_of(epoch, block)]
        if not met or met[-1] != place:
            met.append(place)
    assert order.blocks(0, 2 * length) == met
    assert len(set(met)) == len(met)
    for place in met:
        assert len(order.tars_of(*place)) <= block_tars


@settings(max_examples=40)
@given(sizes=SIZES, seed=st.integers(0, 2**31), data=st.data())
def test_any_position_is_found_alone(sizes: list[int], seed: int, data: st.DataObject):
    make = lambda: BlockOrder(np.array(sizes), seed=seed, block_tars=2)  # noqa: E731
    length = sum(sizes)
    _, expected = make()(np.arange(5 * length))
    at = data.draw(st.integers(0, 5 * length - 1))
    assert make()(np.array([at]))[1].tolist() == [expected[at]]


def test_positions_are_found_alike_together_and_far_apart():
    """Neighbours come out of kept stretches of the order, others one by one."""
    make = lambda: BlockOrder(np.array([30_000, 25_000]), seed=3, block_tars=1)  # noqa: E731
    together = np.stack(make()(np.arange(120_000)))
    shuffled = np.random.default_rng(0).permutation(120_000).reshape(6, 20_000)
    order = make()
    assert (np.stack(order(shuffled)) == together[:, shuffled]).all()
    few = np.array([[119_999, 5], [54_999, 55_000]])
    assert (np.stack(order(few)) == together[:, few]).all()
    for first in (4090, 54_990, 55_000):
        assert (np.stack(order(np.arange(first, first + 20))) == together[:, first : first + 20]).all()
    assert [found.shape for found in order(np.empty((0, 3), np.int64))] == [(0, 3), (0, 3)]


def test_far_positions_of_many_tars_are_found_at_once():
    order = BlockOrder(np.full(10_000, 64_000), seed=1, block_tars=16)
    epochs, indices = order(np.arange(10**12, 10**12 + 32))
    assert set(epochs.tolist()) == {10**12 // 640_000_000}
    assert len(set(indices.tolist())) == 32


def test_blocks_follow_one_another():
    order = BlockOrder(np.full(5, 3), seed=0, block_tars=2)
    assert [order.after(0, 0), order.after(0, 1), order.after(0, 2)] == [(0, 1), (0, 2), (1, 0)]


def test_an_epoch_may_end_early():
    order = BlockOrder(np.array([4, 3]), seed=0, block_tars=1, epoch_length=6)
    epochs, indices = order(np.arange(12))
    assert epochs.tolist() == [0] * 6 + [1] * 6
    assert [len(set(indices[epochs == epoch].tolist())) for epoch in (0, 1)] == [6, 6]
    # What is left out is not the same in all epochs.
    left_out = [set(range(7)) - set(order(np.arange(6 * e, 6 * e + 6))[1].tolist()) for e in range(20)]
    assert len(set(map(frozenset, left_out))) > 1


def test_epochs_and_seeds_differ_in_order():
    orders = {
        tuple(permute(np.arange(100), 100, epoch_key(seed, epoch))) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


@given(first=st.integers(0, 10**12), share=st.integers(1, 16), data_size=st.sampled_from([1, 2, 3, 4, 8]))
def test_ranks_share_a_step_whatever_their_number(first: int, share: int, data_size: int):
    samples = range(first, first + share * data_size)
    slices = [rank_slice(samples, rank, data_size) for rank in range(data_size)]
    assert [n for part in slices for n in part] == list(samples)


def test_rank_slice_refuses_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="not a multiple"):
        rank_slice(range(6), 0, 4)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=400),
    group=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_an_order_by_length_covers_every_epoch_once(lengths: list[int], group: int, seed: int):
    count = len(lengths)
    order = LengthOrder(np.array(lengths), seed=seed, group=group)
    for epoch in range(2):
        epochs, indices = order(epoch * count + np.arange(count))
        assert (epochs == epoch).all()
        assert sorted(indices.tolist()) == list(range(count))


def test_an_order_by_length_needs_little_padding_and_differs_by_epoch():
    lengths = np.random.default_rng(0).integers(5, 500, 20_000)
    order = LengthOrder(lengths, seed=1, group=64)
    _, first = order(np.arange(20_000))
    _, second = order(20_000 + np.arange(20_000))
    assert (first != second).mean() > 0.99
    batches = lengths[first[: 20_000 // 16 * 16]].reshape(-1, 16)
    assert 1 - batches.sum() / (batches.max(1) * 16).sum() < 0.03
    # Batches are in no order of length.
    means = batches.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.9
