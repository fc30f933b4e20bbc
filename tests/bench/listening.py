"""What listens where while llmtrain trains: on one host, and on two hosts in network namespaces.

    python -m tests.bench.listening

For each way to start a run, every TCP port on which its processes listened at any look, from the start to the
first step. With root and `ip netns` the one host is one whose name leads to its outer address; without, it is
this machine, and two hosts are not looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.corpora import prepare_small_corpus
from tests.support.listening import Command, observe, on_one_host, on_two_hosts, with_outer_name
from tests.support.two_hosts import NoNamespacesError, two_hosts


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = prepare_small_corpus(folder)
        print(f"{'hosts':<7}{'started by':<33}{'process':<10}{'listens on':<14}ports")
        try:
            with two_hosts() as hosts:
                prefix = with_outer_name(hosts.prefixes[0], hosts.address, folder / "hosts")
                show("1", on_one_host(prefix), corpus, folder)
                show("2", on_two_hosts(hosts), corpus, folder)
        except NoNamespacesError as error:
            show("1", on_one_host(), corpus, folder)
            print(f"2      not looked at: {error}")


def show(hosts: str, ways: Mapping[str, Sequence[Command]], corpus: Path, folder: Path) -> None:
    for way, commands in ways.items():
        rows: dict[tuple[str, str], list[int]] = {}
        try:
            for found in observe(commands, corpus, Path(tempfile.mkdtemp(dir=folder)) / "run"):
                for process, address, port in sorted(found):
                    rows.setdefault((process, address), []).append(port)
        except RuntimeError as error:
            print(f"{hosts:<7}{way:<33}does not start: {error}")
            continue
        for (process, address), ports in rows.items() or [(("-", "nothing"), [])]:
            print(f"{hosts:<7}{way:<33}{process:<10}{address:<14}{' '.join(map(str, ports))}", flush=True)


if __name__ == "__main__":
    main()
