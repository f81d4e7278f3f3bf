"""The benchmark measures what it says; how fast that is decides no test."""
import pytest

import bench
import train
from test_train import TINY


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "CONFIG", train.replace(train.Config(), **TINY | {f"{stage}_samples": 200 for stage in train.STAGES}))
    monkeypatch.setattr(bench, "REPEATS", 1)


def test_each_line_times_its_functions_in_turn():
    called = []
    times = bench.seconds(lambda: called.append("a"), lambda: called.append("b"))
    assert called == ["a", "b"] * 2 and all(time >= 0 for time in times)


@pytest.mark.parametrize("table, n", [("frozen", 3), ("step", 4), ("memory", 4)])
def test_the_tables_are_complete(table, n):
    lines = bench.TABLES[table]()
    assert len(lines) == n and all(line.keys() == lines[0].keys() for line in lines)


def test_no_stage_holds_gradients_of_what_is_frozen_nor_the_optimizer_states_of_it():
    for line in bench.memory():
        assert line["gradients of what is frozen"] == 0 and line["activations"] > 0
        assert 0 < line["gradients"] < line["weights"] and line["optimizer"] < 2.5 * line["gradients"]


def test_gathering_gives_the_same_as_selecting():
    torch = train.torch
    layers = [kind(8, 6, r=2, alpha=3) for kind in (bench.PLoRALinear, bench.Gathered)]
    layers[0].lora_B.data.normal_()
    layers[1].load_state_dict(layers[0].state_dict())
    x, is_image = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    torch.testing.assert_close(layers[0](x, is_image), layers[1](x, is_image))
