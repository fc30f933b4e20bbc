"""Tables computed from word counts: subsampling of frequent words, random draws of words, and the paths of
words through a Huffman tree."""

from __future__ import annotations

import heapq

import numpy as np

FULL = 2**32 - 1


def keep_table(counts: np.ndarray, subsample: float) -> np.ndarray:
    """Return 2^32 times the probability √(t/f) + t/f with which a word of the share f of the text is kept,
    uint32; FULL: always. t = subsample; 0: all words are kept."""
    if not subsample:
        return np.full(len(counts), FULL, np.uint32)
    share = counts / counts.sum()
    probability = np.sqrt(subsample / share) + subsample / share
    return np.minimum(probability * 2.0**32, FULL).astype(np.uint32)


def alias_table(counts: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Walker's alias table of words in proportion to count^power: (limit uint32, alias int32). A word
    drawn evenly stays if 32 random bits are below its limit; else its alias is drawn."""
    weights = counts.astype(np.float64) ** power
    scaled = (weights * (len(counts) / weights.sum())).tolist()
    limit = np.full(len(counts), FULL, np.uint32)
    alias = np.arange(len(counts), dtype=np.int32)
    small = [i for i, x in enumerate(scaled) if x < 1]
    large = [i for i, x in enumerate(scaled) if x >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        limit[low] = min(int(scaled[low] * 2.0**32), FULL)
        alias[low] = high
        scaled[high] -= 1 - scaled[low]
        if scaled[high] < 1:
            small.append(large.pop())
    return limit, alias


def huffman(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the paths of words from the root of a Huffman tree: (starts int64, with one more at the end;
    inner nodes int32, of which there are one fewer than words; labels float32). At each node the label is 1
    for the child of the smaller count, whose code is 0 (arXiv:1310.4546, section 2.1; word2vec's label is 1 −
    code)."""
    num_words = len(counts)
    heap = [(int(count), i) for i, count in enumerate(counts)]
    heapq.heapify(heap)
    parent = np.full(2 * num_words - 1, -1, np.int64)
    label = np.zeros(2 * num_words - 1, np.float32)
    for node in range(num_words, 2 * num_words - 1):
        (low, first), (high, second) = heapq.heappop(heap), heapq.heappop(heap)
        parent[first] = parent[second] = node
        label[first] = 1.0
        heapq.heappush(heap, (low + high, node))
    paths: list[list[int]] = []
    labels: list[list[float]] = []
    for word in range(num_words):
        path, of_path, at = [], [], word
        while parent[at] >= 0:
            of_path.append(float(label[at]))
            at = int(parent[at])
            path.append(at - num_words)
        paths.append(path[::-1])
        labels.append(of_path[::-1])
    starts = np.zeros(num_words + 1, np.int64)
    np.cumsum([len(path) for path in paths], out=starts[1:])
    nodes = np.fromiter((node for path in paths for node in path), np.int32, int(starts[-1]))
    return starts, nodes, np.fromiter((x for each in labels for x in each), np.float32, int(starts[-1]))
