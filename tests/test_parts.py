"""results/parts.py at tiny sizes."""

import parts
import torch

import dreamer


def test_every_part_of_the_step_is_measured(tiny_config, monkeypatch):
    monkeypatch.setattr(parts, "REPEATS", 1)
    assert all(seconds > 0 for seconds in parts.measure(tiny_config()).values())


def test_the_parts_are_those_of_the_step_and_the_last_is_the_step(tiny_config):
    agent = dreamer.Dreamer(tiny_config(algo="Dreamerv2"), parts.ACTIONS, torch.device("cpu"))
    found = parts.parts(agent, parts.random_batch(agent.config, agent.device))
    assert list(found) == ["encoder", "RSSM", "decoder", "behaviour", "gradient step"]
    before = [p.detach().clone() for p in agent.parameters()]
    for name, part in found.items():
        part()
        changed = [not torch.equal(p, old) for p, old in zip(agent.parameters(), before)]
        assert all(changed) if name == "gradient step" else not any(changed)
