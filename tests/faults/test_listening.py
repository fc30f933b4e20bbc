"""What a run listens on: the loopback alone on one host, the interface between the hosts alone on several."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.listening import observe, on_one_host, on_two_hosts, with_outer_name
from tests.support.two_hosts import ADDRESSES, Hosts, NoNamespacesError, two_hosts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts | str]:
    """Two hosts, or why this machine has none."""
    with ExitStack() as stack:
        found: Hosts | str
        try:
            found = stack.enter_context(two_hosts())
        except NoNamespacesError as error:
            if os.environ.get("CI") and not error.is_kernel:
                pytest.fail(str(error))
            found = str(error)
        yield found


@pytest.mark.parametrize(
    ("way", "processes"),
    [
        ("llmtrain train", set()),
        ("llmtrain train engine=deepspeed", {"process"}),
        ("torchrun.sh, 2 ranks", {"launcher", "rank 0", "rank 1"}),
        ("by hand, 2 ranks", {"rank 0", "rank 1"}),
    ],
)
def test_one_host_listens_on_the_loopback_alone(
    hosts: Hosts | str, corpus: Path, tmp_path: Path, way: str, processes: set[str]
):
    """Also where its name leads to its outer address, which backends left alone would take."""
    prefix: tuple[str, ...] = ()
    if isinstance(hosts, str):
        warnings.warn(f"NOT TESTED HERE: a host with an outer address: {hosts}", stacklevel=1)
    else:
        prefix = with_outer_name(hosts.prefixes[0], hosts.address, tmp_path / "hosts")
    is_warm = way != "llmtrain train engine=deepspeed"  # imports could listen, and this one makes them all
    seen = set().union(*observe(on_one_host(prefix)[way], corpus, tmp_path / "run", is_warm=is_warm))
    assert {listener.process for listener in seen} == processes
    assert not [listener for listener in seen if not listener.is_on_loopback]


@pytest.mark.parametrize(
    ("way", "server"),
    [
        ("torchrun.sh, NODE_RANK", "launcher"),
        ("torchrun.sh, RDZV_ENDPOINT", "launcher"),
        ("by hand, a rank a host", "rank 0"),
    ],
)
def test_two_hosts_listen_on_the_interface_between_them_alone(
    hosts: Hosts | str, corpus: Path, tmp_path: Path, way: str, server: str
):
    if isinstance(hosts, str):
        pytest.skip(f"NOT TESTED HERE: hosts with addresses of their own: {hosts}")
    commands = on_two_hosts(hosts)[way]
    [told] = {
        command.environment.get("MASTER_PORT") or command.environment["RDZV_ENDPOINT"].rpartition(":")[2]
        for command in commands
    }
    seen = observe(commands, corpus, tmp_path / "run", is_warm=True)
    for rank, (found, address) in enumerate(zip(seen, ADDRESSES, strict=True)):
        assert {listener.address for listener in found} == {address}
        assert f"rank {rank}" in {listener.process for listener in found}
    assert (server, ADDRESSES[0], int(told)) in seen[0]
