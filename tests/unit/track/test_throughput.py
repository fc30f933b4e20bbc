import mmap

from llmtrain.track.throughput import ThroughputMeter, memory_bytes


def test_the_first_step_counts_only_until_there_is_a_second() -> None:
    meter = ThroughputMeter(window=3)
    assert meter.tokens_per_second == 0.0
    meter.add(100, 10.0)
    assert meter.tokens_per_second == 10.0
    meter.add(100, 1.0)
    assert meter.tokens_per_second == 100.0
    for _ in range(3):
        meter.add(100, 2.0)
    assert meter.tokens_per_second == 50.0


def test_memory_is_that_of_this_process() -> None:
    before = memory_bytes("cpu")
    # Of the kernel: the heap may give what was freed and is resident still.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert memory_bytes("cpu") - before > 48 * 2**20
