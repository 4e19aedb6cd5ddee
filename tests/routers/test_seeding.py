"""Tests of the seeds of random numbers."""

import traceback

import pytest
import torch

from moe.routers.seeding import seed_all


def test_a_seed_gives_the_numbers_of_pytorch_and_notes_no_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(traceback, "format_stack", lambda: pytest.fail("it notes a stack trace"))
    seed_all(7)
    assert torch.equal(torch.randn(3), expected)
    assert torch.initial_seed() == 7
