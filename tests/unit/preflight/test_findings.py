"""preflight: what is off is told from what is as the others, by host, rank and link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.preflight import findings, gpus, inventory
from llmtrain.preflight.config import PreflightConfig
from llmtrain.preflight.links import Link, ring_turns, turns
from llmtrain.preflight.places import Places
from llmtrain.preflight.units import size_text, speed_text

CONFIG = PreflightConfig()


def inventories(hosts: int = 3, ranks: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "node": str(rank // ranks),
            "hostname": f"n{rank // ranks}",
            "versions": {"torch": "2.13.0", "NCCL": None},
            "device": {"name": "H100"},
            "gpus": {} if rank % ranks else {"driver": "580.1", "count": ranks, "errors": []},
            "free": {"memory": 1 << 40, "run": 1 << 40, "tmp": 1 << 40, "shm": None},
        }
        for rank in range(hosts * ranks)
    ]


def places(hosts: int = 3, ranks: int = 2) -> Places:
    return Places.of(inventories(hosts, ranks))


def test_equal_hosts_are_not_off():
    facts = inventories()
    assert findings.version_problems(facts, places()) == []
    assert not list(findings.host_problems(facts, places(), CONFIG))
    assert not list(findings.clock_problems([0.0, 0.4, -0.4], places(), CONFIG))
    speeds = [{"bf16 products": 100.0 + rank} for rank in range(6)]
    assert not list(findings.speed_problems(speeds, places(), CONFIG))


def test_hosts_that_are_off_are_named():
    facts = inventories()
    for rank in (2, 3):
        facts[rank]["versions"]["torch"] = "2.12.0"
    facts[5]["versions"]["NCCL"] = "2.1"
    assert [str(problem) for problem in findings.version_problems(facts, places())] == [
        "host n1 (ranks 2-3): version of torch: got 2.12.0, most ranks have 2.13.0; "
        "install the same version on all hosts",
        "rank 5 (host n2): version of NCCL: got 2.1, most ranks have none; "
        "install the same version on all hosts",
    ]
    facts[4]["gpus"] = {"driver": "570.2", "count": 1, "errors": ["GPU 0: 2 ECC errors"]}
    facts[0]["free"]["run"] = 5 << 20
    found = [str(problem) for problem in findings.host_problems(facts, places(), CONFIG)]
    assert found[0].startswith("host n2 (ranks 4-5): NVIDIA driver: got 570.2, most ranks have 580.1")
    assert found[1].startswith("host n2 (ranks 4-5): number of GPUs: got 1, most ranks have 2")
    assert found[2].startswith("host n0: disk of .: got 5 MiB free; allowed: 1.9 GiB or more")
    assert found[3].startswith("host n2: got GPU 0: 2 ECC errors")
    [skewed] = findings.clock_problems([0.0, 7.5, 0.1], places(), CONFIG)
    assert (skewed.where, skewed.got) == ("host n1", "a clock +7.4 s from the others'")


@pytest.mark.parametrize(
    ("slow", "where"),
    [([3], ["rank 3 (host n1)"]), ([2, 3], ["host n1 (ranks 2-3)"]), ([0, 3], ["rank 0 (", "rank 3 ("])],
)
def test_slow_ranks_are_named(slow: list[int], where: list[str]):
    speeds = [{"memory": 40e9 if rank in slow else 100e9} for rank in range(6)]
    found = list(findings.speed_problems(speeds, places(), CONFIG))
    assert len(found) == len(where)
    for problem, start in zip(found, where, strict=True):
        assert problem.where.startswith(start)
        assert problem.got == "40.0 GB/s, 2.5 times slower than the median"


def test_of_two_ranks_the_slow_one_is_named():
    [found] = findings.speed_problems([{"memory": 2e9}, {"memory": 1e9}], places(1, 2), CONFIG)
    assert found.where.startswith("rank 1")


def links_of(where: Places, slow: set[tuple[int, int]]) -> list[Link]:
    return [
        Link(*pair, between_hosts, 1e9 if pair in slow else 9e9, 1e-5)
        for between_hosts, pairs in turns(where)
        for pair in pairs
    ]


def test_slow_links_are_named_by_what_they_have_in_common():
    where = places(4, 2)
    assert not list(findings.link_problems(links_of(where, set()), where, CONFIG))
    one = findings.link_problems(links_of(where, {(2, 4)}), where, CONFIG)
    assert [p.where for p in one] == ["rank 2 (host n1) and rank 4 (host n2): messages between them"]
    both_sides = {(0, 2), (1, 3), (2, 4), (3, 5)}
    [host] = findings.link_problems(links_of(where, both_sides), where, CONFIG)
    assert host.where == "host n1 (ranks 2-3): messages to its neighbours"
    alone = places(1, 4)
    [rank] = findings.link_problems(links_of(alone, {(1, 2), (2, 3)}), alone, CONFIG)
    assert rank.where == "rank 2 (host n0): messages to its neighbours"


@pytest.mark.parametrize("length", range(7))
def test_a_ring_has_every_link_once_and_no_place_twice_in_a_turn(length: int):
    found = ring_turns(length)
    links = [frozenset(link) for turn in found for link in turn]
    assert len(links) == len(set(links)) == {0: 0, 1: 0, 2: 1}.get(length, length)
    for turn in found:
        places_of_turn = [place for link in turn for place in link]
        assert len(places_of_turn) == len(set(places_of_turn))


def test_gpu_errors_are_read_from_the_drivers_words():
    table = "0, NVIDIA H100, 580.82, 81559, 3, 2, No, No, Not Active, Not Active\n"
    table += "1, NVIDIA H100, 580.82, 81559, 3, [N/A], Yes, No, Active, Not Active\n"
    found = gpus.parse_table(table, (*gpus.BASIC, *gpus.HEALTH))
    log = "[1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
    log += "[2] NVRM: Xid (PCI:0000:3c:00): 31, pid=7, Ch 00000010, MMU Fault\n"
    assert gpus.errors_of(found, log) == [
        "GPU 0: 2 ECC errors that could not be corrected",
        "GPU 1: a row of its memory waits for a reset to be remapped",
        "GPU 1: slowed down by power or heat",
        "GPU at 0000:3b:00: Xid 79 in the kernel's log, the GPU has fallen off its bus",
    ], "Xid 31 comes from a program"


def test_speeds_and_sizes_as_text():
    assert [speed_text(v, "FLOP") for v in (3.125e14, 9.999e11, 5.0)] == [
        "312 TFLOP/s", "1.00 TFLOP/s", "5.00 FLOP/s",
    ]  # fmt: skip
    assert (size_text(64 << 20), size_text(3 << 29)) == ("64 MiB", "1.5 GiB")


def test_cached_files_count_as_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "CGROUP", tmp_path)
    parts = {"max": "1000", "current": "900", "stat": "anon 300\ninactive_file 500\n"}
    for name, text in parts.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert inventory._free_memory() == 600
