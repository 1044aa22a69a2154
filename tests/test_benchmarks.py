"""The harness of the benchmarks: what its figures mean, and what becomes of them."""

import pytest
import torch

from benchmarks import harness, memory, plots


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls move: ``spend(seconds)`` makes a call."""

    class Clock:
        now = 0.0

        def spend(self, seconds):
            def call():
                self.calls.append(seconds)
                self.now += seconds

            return call

    fake = Clock()
    fake.calls = []
    monkeypatch.setitem(harness.CLOCKS, "fake", lambda: fake.now)
    return fake


def report(rounds=5):
    return harness.Report(threads=1, clock="fake", rounds=rounds, device="a machine, 1 thread")


def test_ratio_is_to_the_baseline_of_the_same_round(clock):
    bench = report()
    bench.measure("q", "m", (2, 10), {"one": clock.spend(0.01), "three": clock.spend(0.03)}, "one", {"three": 1e-7})
    one, three = bench.rows
    assert (one.ratio, three.ratio) == pytest.approx((1, 3))
    assert (three.p20, three.median, three.p80) == pytest.approx((0.03, 0.03, 0.03))
    assert (one.error, three.error) == ("", 1e-7)


def test_of_several_baselines_the_fastest_counts(clock):
    bench = report()
    bench.measure("q", "m", (2, 10), {"slow": clock.spend(0.04), "fast": clock.spend(0.02)}, ["slow", "fast"])
    assert [r.ratio for r in bench.rows] == pytest.approx([2, 1])


def test_providers_take_turns(clock):
    report(rounds=4).time({"a": clock.spend(1.0), "b": clock.spend(2.0)})
    assert clock.calls[-8:] == [1, 2, 2, 1, 1, 2, 2, 1]


def test_short_calls_are_repeated_and_long_ones_get_fewer_rounds(clock):
    assert report(rounds=3).time({"short": clock.spend(harness.MIN_SAMPLE / 10)})["short"] == pytest.approx(
        [harness.MIN_SAMPLE / 10] * 3
    )
    assert len(clock.calls) == 2 + 3 * 10
    assert len(report(rounds=50).time({"long": clock.spend(harness.BUDGET / 7)})["long"]) == 7
    assert len(report(rounds=50).time({"long": clock.spend(harness.BUDGET)})["long"]) == harness.MIN_ROUNDS


def test_a_wrong_or_undefined_result_is_not_timed():
    assert harness.check("x", 1e-6, 1e-5) == 1e-6
    for error in (1e-4, float("nan")):
        with pytest.raises(AssertionError, match="x: error"):
            harness.check("x", error, 1e-5)


def test_saving_replaces_the_rows_of_the_same_questions_only(tmp_path, clock):
    path = tmp_path / "results" / "cpu.csv"
    for question, seconds in (("q", 0.01), ("other", 0.02), ("q", 0.05)):
        bench = report()
        bench.measure(question, "m", (2, 10), {"p": clock.spend(seconds)}, "p")
        bench.save(path)
    rows = plots.read(path)
    assert [(r.question, r.median, r.T, r.P) for r in rows] == [("other", 0.02, 2, 10), ("q", 0.05, 2, 10)]
    assert path.read_text().startswith(
        "question,method,provider,T,P,dtype,device,median,p20,p80,ratio,error,commit,date\n"
    )


def test_memory_is_kept_as_it_is(clock):
    bench = report()
    bench.record("memory", "m", (2, 10), {"floor": [30.0] * 3, "p": [45.0] * 3}, "floor", unit="elements")
    assert [(r.median, r.ratio) for r in bench.rows] == [(30, 1), (45, 1.5)]


@pytest.mark.parametrize(("arguments", "question"), [([], "usual"), (["--large"], "large")])
def test_the_large_case_is_measured_when_asked_for(tmp_path, monkeypatch, arguments, question):
    def measures(question):
        return lambda bench: bench.record(question, "m", (2, 10), {"p": [1.0]}, "p")

    monkeypatch.setattr("sys.argv", ["script", "--csv", str(tmp_path / "cpu.csv"), *arguments])
    monkeypatch.setattr(harness, "allocate", lambda keep: None)  # it would last
    harness.main(measures("usual"), threads=torch.get_num_threads(), large=measures("large"))
    assert [r.question for r in plots.read(tmp_path / "cpu.csv")] == [question]


@pytest.mark.parametrize("gib", [0, 8])
def test_a_large_trunk_that_does_not_fit_is_left_out_and_named(monkeypatch, capsys, gib):
    measured = []
    monkeypatch.setattr(memory, "LARGE_TASKS", (2,))
    monkeypatch.setattr(memory, "_large", lambda tasks: memory.Net(memory.mlp(1024, 1), torch.ones(2, 1024), tasks))
    monkeypatch.setattr(memory, "_field", lambda path, name: gib * 2**30)
    monkeypatch.setattr(memory, "_in_new_process", lambda *call: measured.append(call) or 1.0)
    bench = report()
    memory.run_large(bench)
    ways = len(memory._ways(memory._large(2)))
    said = capsys.readouterr().out
    assert (said.count("LEFT OUT"), len(measured)) == ((ways, 0) if gib == 0 else (0, ways))
    assert bool(bench.rows) == bool(gib)


@pytest.mark.parametrize("peers", [True, False])
def test_every_way_measured_fills_all_gradients(peers):
    net = memory.Net(memory.mlp(4, 2), torch.randn(3, 4), 2, None if peers else memory._heavy_head)
    for name, call in memory._ways(net, peers).items():
        net.clear()
        call()
        assert all(p.grad is not None for p in net.parameters()), name


def test_pictures_are_drawn_without_the_peer_and_say_so(tmp_path, clock, monkeypatch, capsys):
    bench = report()
    bench.measure("gram", "gram", (2, 10), {"read": clock.spend(0.01), "fastmtl": clock.spend(0.02)}, "read")
    bench.measure("aggregate", "PCGrad", (8, 10), {"fastmtl": clock.spend(0.01), "loop": clock.spend(0.1)}, "fastmtl")
    bench.save(tmp_path / "cpu.csv")
    monkeypatch.setattr("sys.argv", ["plots", "--csv", str(tmp_path / "cpu.csv"), "--folder", str(tmp_path)])
    plots.main()
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["aggregate.png", "kernels.png"]
    said = capsys.readouterr().out
    assert "TorchJD was not installed" in said
    assert "solvers: not drawn" in said
