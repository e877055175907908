"Sweeps that are killed, run twice at once, or lose a node: nothing is lost, nothing made twice."

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack

import nbformat
import pytest

from uniemo.runs.sweeps import Engine, Sweep, run_on_ray, sweep

# writes a line when it begins, and one when it is done
CELL = """
import time
from uniemo.runs import Run

run = Run.current()


def write(word):
    with open(ledger, "a") as f:
        f.write(f"{word} {run.id}\\n")


write("begin")
time.sleep(pause)
write("end")
run.summary(main_metric="value", value=10 * rate + seed)
"""
WANTED = {3: [(1, 0), (2, 0), (3, 0)], 4: [(1, 0), (1, 1), (2, 0), (2, 1)]}
SWEEP = """
import json, sys
from uniemo.runs.sweeps import Engine, sweep
given, folder, jobs = json.loads(sys.argv[1])
sweep(folder + "/cell.ipynb", given, Engine(jobs=jobs), folder)
"""


@pytest.fixture
def given(tmp_path):
    "A notebook of a second in `tmp_path`, and three cells of it."
    ledger = tmp_path / "ledger.txt"
    ledger.touch()
    defaults = f"rate = 0.0\nseed = 0\npause = 1.0\nledger = {str(ledger)!r}"
    cells = [
        nbformat.v4.new_code_cell(defaults, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(CELL),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "cell.ipynb")
    return dict(rate="1,2,3")


def lines(folder, word):
    "How often each cell began or ended."
    found = (line.split() for line in (folder / "ledger.txt").read_text().splitlines())
    return Counter(cell for said, cell in found if said == word)


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def spawn(folder, given, jobs):
    "A sweep as a process of its own; what it says is added to said.txt."
    import json

    asked = json.dumps([given, str(folder), jobs])
    command = [sys.executable, "-c", SWEEP, asked]
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(command, stderr=said, start_new_session=True)


def assert_each_once(folder, given):
    "Complete cells, each of which came to its end once."
    done = Sweep(folder / "cell.ipynb", given, folder)
    assert done.missing() == {}
    assert lines(folder, "end") == dict.fromkeys(done.cells, 1)
    table = done.table()
    assert table.value.tolist() == [10 * rate + seed for rate, seed in WANTED[len(table)]]
    return done


def test_a_stopped_sweep_goes_on(tmp_path, given):
    "SIGTERM in the second cell: it is interrupted in good order, and the rest is made later."
    process = spawn(tmp_path, given, 1)
    wait_for(lambda: len(lines(tmp_path, "begin")) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) != 0
    asked = Sweep(tmp_path / "cell.ipynb", given, tmp_path)
    first, second, *later = asked.runs().values()
    assert first.status == "completed" and second.status == "interrupted"
    assert not any(run.dir.exists() for run in later)
    table = sweep(tmp_path / "cell.ipynb", given, Engine(jobs=2), tmp_path, progress=False)
    assert table.status.tolist() == ["completed"] * 3
    assert_each_once(tmp_path, given)
    assert first.info["attempts"] == 1 and second.info["attempts"] == 2


def test_two_sweeps_at_once_and_one_killed(tmp_path, given):
    "Two processes share the cells; one is killed with all that it started, and the other finishes."
    both = [spawn(tmp_path, given, 1) for _ in range(2)]
    wait_for(lambda: lines(tmp_path, "begin"))
    both[0].kill()
    for process in both:
        process.wait(300)
    assert both[1].returncode == 0, (tmp_path / "said.txt").read_text()
    # what the killed one had started ends by itself, under its lock
    Sweep(tmp_path / "cell.ipynb", given, tmp_path)
    assert_each_once(tmp_path, given)
    assert max(lines(tmp_path, "begin").values()) == 1


def test_a_cell_that_was_killed_before_it_began(tmp_path, given):
    "A folder without a record is begun again."
    asked = Sweep(tmp_path / "cell.ipynb", dict(rate="1,2", pause="0.0"), tmp_path)
    half = asked.folder / next(iter(asked.cells))
    half.mkdir()
    (half / "params.json").write_text("{")
    assert {run.status for run in asked.run()} == {"completed"}


# ---- a cluster


class SlowClock:
    "The module `time`, whose monotonic clock goes slowly: Ray waits for a node 30 seconds of it."

    def __getattr__(self, name):
        return getattr(time, name)

    def monotonic(self):
        return time.monotonic() / 10


# a busy machine is slow, not broken
PATIENCE = dict(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_gcs_rpc_server_reconnect_timeout_s="600",
    RAY_agent_register_timeout_ms="300000",
    RAY_worker_register_timeout_seconds="300",
    # and a lost node is noticed within some seconds
    RAY_health_check_initial_delay_ms="0",
    RAY_health_check_period_ms="1000",
    RAY_health_check_timeout_ms="30000",
    RAY_health_check_failure_threshold="3",
)


def own_ports():
    "Ports of a node's helpers: where they are given, the node does not wait for them to start."
    names = ("metrics_agent_port", "metrics_export_port")
    names += ("dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in names]
        for place in found:
            place.bind(("127.0.0.1", 0))
        return {name: place.getsockname()[1] for name, place in zip(names, found)}


@pytest.fixture
def cluster(monkeypatch):
    "A Ray cluster of two nodes on this machine, one processor each; gives it and the second node."
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("ray", reason="needs Ray: pip install 'uniemo[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr("ray._private.node.time", SlowClock())
    node = dict(num_cpus=1, object_store_memory=80_000_000, include_log_monitor=False)
    head = dict(node, include_dashboard=False, **own_ports())
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        second = cluster.add_node(**node, **own_ports())
        cluster.wait_for_nodes(timeout=300)
    except Exception as e:
        # its nodes wait 15 seconds for their helpers, however busy the machine is
        pytest.skip(f"Ray could not start two nodes here: {e}")
    yield cluster, second
    cluster.shutdown()


def test_a_node_of_the_cluster_is_lost(tmp_path, given, cluster):
    "Both nodes are at work when one is killed: its cell goes on elsewhere, the others stay."
    nodes, second = cluster
    given = dict(rate="1,2", seed="0:2", pause="2.0")
    kept = {}

    def kill():
        def both_at_work():
            return len(lines(tmp_path, "begin")) - len(lines(tmp_path, "end")) == 2

        wait_for(both_at_work)
        kept.update(lines(tmp_path, "end"))
        nodes.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Engine(ray=nodes.address)
    table = sweep(tmp_path / "cell.ipynb", given, engine, tmp_path, progress=False)
    killer.join()
    assert table.status.tolist() == ["completed"] * 4
    done = assert_each_once(tmp_path, given)
    attempts = {cell: run.info["attempts"] for cell, run in done.runs().items()}
    assert sorted(attempts.values()) == [1, 1, 1, 2], "one cell was on the lost node"
    assert all(attempts[cell] == 1 for cell in kept)
    assert (done.folder / "figures" / "sweep.png").exists()


def test_no_cluster_there(tmp_path):
    "An address at which nobody answers is refused before Ray tries for minutes."
    with pytest.raises(ValueError, match="no Ray cluster at '127.0.0.1:1'"):
        next(run_on_ray(tmp_path, {"a": {}}, Engine(ray="127.0.0.1:1")))
