"""Ray for real: gangs placed or refused in seconds, deaths told, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from cluster import guard, ray_server
from cluster.actors import Cluster
from cluster.channel import Via
from cluster.discover import discover
from cluster.errors import BadLayout, GangDied, PlacementFailed, WorkerFailed
from cluster.topology import LinkKind
from launch.nodes import ask_nodes
from launch.progress import Progress
from tests.hosted import Parrot, Talker, Unwilling
from tests.hosts import PATIENCE_S, gone, head_address, second_node

SLOTS = 3
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def cluster():
    with Cluster.embedded(SLOTS, num_gpus=2) as cluster:  # GPUs in name only: Ray counts, nobody computes
        yield cluster


@pytest.fixture(scope="module")
def lasting(cluster):
    """A gang that the tests which kill nobody share."""
    (gang,) = cluster.acquire(Parrot, [1], "cpu", timeout_s=PATIENCE_S, threads=2)
    yield gang
    gang.kill()


@pytest.fixture
def pair(cluster):
    (gang,) = cluster.acquire(Parrot, [2], "cpu", timeout_s=PATIENCE_S)
    yield gang
    gang.kill()


def test_a_worker_is_told_what_it_may_use(lasting):
    names = ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
    assert lasting.call(0, "environment", names).result(PATIENCE_S) == ["2", ""]
    (member,) = lasting.members
    assert (member.index, member.device) == (0, 0)
    assert Path(f"/proc/{member.pid}/fd/2").samefile(member.log)


def test_each_gpu_worker_sees_all_gpus_and_knows_its_own(cluster):
    (gang,) = cluster.acquire(Parrot, [2], "cuda", timeout_s=PATIENCE_S)
    assert [member.device for member in gang.members] == [0, 1]
    visible = gang.call_all("environment", [[["CUDA_VISIBLE_DEVICES"]]] * 2)
    assert [call.result(PATIENCE_S) for call in visible] == [[os.environ.get("CUDA_VISIBLE_DEVICES")]] * 2
    gang.kill()


def test_errors_come_back(lasting):
    with pytest.raises(BadLayout) as caught:
        lasting.call(0, "complain").result(PATIENCE_S)
    assert str(caught.value) == "tp3 does not exist here. Use tp2."
    with pytest.raises(WorkerFailed, match="ZeroDivisionError: division by zero") as unexpected:
        lasting.call(0, "divide").result(PATIENCE_S)
    assert "in divide" in unexpected.value.__notes__[0]
    assert lasting.call(0, "echo", "alive").result(PATIENCE_S) == "alive"


def test_what_a_worker_prints_stays_with_it(lasting, capfd):
    lasting.call(0, "say", "for the log only").result(PATIENCE_S)
    assert "for the log only" in Path(lasting.members[0].log).read_text()
    assert capfd.readouterr() == ("", "")


def test_more_than_there_is_fails_at_once(cluster, lasting):
    start_s = time.monotonic()
    with pytest.raises(PlacementFailed) as caught:
        cluster.acquire(Parrot, [9], "cpu", timeout_s=PATIENCE_S)
    assert time.monotonic() - start_s < 2
    address = lasting.members[0].node
    assert f"9 CPU needed; the cluster has 3 on {address}; free: 2; held by Parrot-" in str(caught.value)
    assert str(caught.value).endswith(
        f" of process {os.getpid()} on {os.uname().nodename} (1). Use at most 3, or add nodes."
    )
    with pytest.raises(PlacementFailed, match=r"3 GPU needed; the cluster has 2 .* Use at most 2, or add"):
        cluster.acquire(Parrot, [3], "cuda", timeout_s=PATIENCE_S)


def test_what_others_hold_fails_within_seconds(cluster, lasting):
    start_s = time.monotonic()
    with pytest.raises(PlacementFailed, match=r"free: 2; held by Parrot-\w+ of .* \(1\)\. Use at most 2"):
        cluster.acquire(Parrot, [3], "cpu", timeout_s=PATIENCE_S)
    assert time.monotonic() - start_s < 8


def test_a_class_that_cannot_be_made_frees_its_devices(cluster):
    with pytest.raises(BadLayout, match="no device for me"):
        cluster.acquire(Unwilling, [1, 1], "cpu", timeout_s=PATIENCE_S)


def test_calls_overlap_and_a_killed_gang_tells_who_waits(pair):
    waiting = pair.call(0, "wait")
    assert [call.result(PATIENCE_S) for call in pair.call_all("echo", [[1], ["two"]])] == [1, "two"]
    os.kill(pair.members[1].pid, signal.SIGSTOP)  # a stopped process ignores Ray's own kill
    pair.kill()
    pair.kill()
    assert gone(pair)
    for call in (waiting, pair.call(0, "echo", 1)):
        with pytest.raises(GangDied, match="the gang of 2 was stopped"):
            call.result(PATIENCE_S)


@pytest.mark.parametrize(
    ("method", "args", "words"),
    [
        ("exit", (3, "no space left"), "no space left"),
        ("crash", (), "Segmentation fault"),
        ("signal", (signal.SIGKILL,), "killed or crashed"),
    ],
)
def test_one_death_ends_the_gang_with_its_last_words(pair, capfd, method, args, words):
    deaths = []
    pair.watch(deaths.append)
    waiting = pair.call(0, "wait")
    start_s = time.monotonic()
    pair.call(1, method, *args)
    with pytest.raises(GangDied, match=words) as caught:
        waiting.result(PATIENCE_S)
    assert time.monotonic() - start_s < 5
    assert str(caught.value).startswith(
        f"worker 1 (pid {pair.members[1].pid} on {pair.members[1].node}) died:"
    )
    assert gone(pair)
    assert [str(death) for death in deaths] == [str(caught.value)]
    (death,) = deaths
    assert death.was_killed == (method != "crash")  # Ray cannot tell a kill from an exit
    assert capfd.readouterr().out == ""


def test_sigterm_in_the_middle_of_rays_start_ends_us_our_way(monkeypatch):
    class Ended(Exception):
        pass

    def end(number, frame):
        raise Ended

    def init(**settings):  # as Ray's own does, before its servers answer
        ray._private.utils.set_sigterm_handler(lambda *_: sys.exit(15))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    monkeypatch.setattr(ray, "init", init)
    try:
        with pytest.raises(Ended):
            ray_server._init()
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


OWNER = """
import sys, time
from cluster.actors import Cluster
from tests.hosted import Parrot
with Cluster.embedded(1, num_gpus=0) as cluster:
    (gang,) = cluster.acquire(Parrot, [1], "cpu", timeout_s=60)
    print(gang.members[0].log, flush=True)
    gang.call(0, "wait").result()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_owner_that_is_killed_leaves_neither_process_nor_file(how):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True
    )
    log = Path(owner.stdout.readline().strip())
    directory = log.parents[2]
    assert directory.name.startswith(f"sw-{owner.pid}-")
    assert len(list(guard._members(str(directory)))) >= 2  # its worker and Ray's
    owner.send_signal(how)
    owner.communicate(timeout=PATIENCE_S)
    deadline = time.monotonic() + 10
    while directory.exists():  # the last thing to go
        assert time.monotonic() < deadline, sorted(guard._members(str(directory)))
        time.sleep(0.02)
    assert list(guard._members(str(directory))) == []


GUEST = """
import sys
from cluster.actors import Cluster
from tests.hosted import Parrot
with Cluster.connect(sys.argv[1]) as cluster:
    (gang,) = cluster.acquire(Parrot, [1], "cpu", timeout_s=60)
    print(gang.call(0, "echo", "hello").result(60), gang.members[0].pid)
"""


def test_a_guest_takes_only_its_own_away(lasting):
    guest = subprocess.run(
        [sys.executable, "-c", GUEST, head_address()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    word, pid = guest.stdout.split()
    assert word == "hello"
    assert not os.path.exists(f"/proc/{pid}/exe")
    assert lasting.call(0, "echo", "still here").result(PATIENCE_S) == "still here"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("somewhere", "no Ray cluster answers at somewhere"),
        ("ray://127.0.0.1:10001", "client protocol carries no streams"),
    ],
)
def test_no_cluster_there_is_said_in_seconds(address, message):
    start_s = time.monotonic()
    with pytest.raises(PlacementFailed, match=message):
        Cluster.connect(address)
    assert time.monotonic() - start_s < 5


@pytest.fixture(scope="module")
def two_nodes(cluster):
    """For the last tests here: the others count the slots of one node."""
    with second_node(2):
        yield


def test_a_gang_on_two_nodes_talks_over_sockets_and_dies_as_one(cluster, lasting, two_nodes):
    (gang,) = cluster.acquire(Talker, [4], "cpu", timeout_s=PATIENCE_S)
    nodes = [member.node_id for member in gang.members]
    assert nodes == sorted(nodes)
    assert len(set(nodes)) == 2
    vias = [Via.MEMORY if node == nodes[0] else Via.SOCKET for node in nodes[1:]]
    assert set(vias) == set(Via)
    addresses = gang.call(0, "open_writer", vias, gang.members[0].node).result(PATIENCE_S)
    for i, address in enumerate(addresses, start=1):
        gang.call(i, "open_reader", address).result(PATIENCE_S)
    received = [gang.call(i, "recv", PATIENCE_S) for i in (1, 2, 3)]
    gang.call(0, "send", b"a step").result(PATIENCE_S)
    assert [call.result(PATIENCE_S) for call in received] == [b"a step"] * 3
    os.kill(gang.members[3].pid, signal.SIGKILL)
    with pytest.raises(GangDied, match=r"worker 3 .* died: killed or crashed"):
        gang.call(1, "recv", PATIENCE_S).result(PATIENCE_S)
    assert gone(gang)


def test_each_node_is_asked_what_it_has(cluster, two_nodes):
    """Of slots that the other tests leave free, two on either."""

    class Free:
        acquire = staticmethod(cluster.acquire)

        def count(self, device):
            return 4 if device == "cpu" else 0

    machine = ask_nodes(Free(), "both", None, Progress(quiet=True))
    nodes = [device.node for device in machine.devices]
    here = discover(device="cpu").devices
    assert len(set(nodes)) == 2
    assert len(nodes) == 2 * len(here)
    assert {device.memory_bytes for device in machine.devices} == {here[0].memory_bytes}
    assert machine.link(0, len(nodes) - 1).kind is LinkKind.NETWORK
    if len(here) > 1:
        assert machine.link(0, 1).kind is LinkKind.LOOPBACK
