"""What functions read besides their arguments."""

import logging

import torch

from functional_sgd.fingerprint import fingerprint, reads_outside

LOGGER = logging.getLogger("functional_sgd.tests")
DTYPE = torch.float32


def logs(x):
    LOGGER.debug("called")
    return x.to(DTYPE)


def calls_torch(x, *, scale=2.0):
    return torch.relu(x) * scale


def loads_later(x):
    return lambda: x + LATER  # noqa: F821


def test_functions_of_their_arguments_read_nothing():
    assert not reads_outside(calls_torch)
    assert not reads_outside(loads_later)  # there is no such name yet


def test_what_loggers_keep_for_themselves_does_not_count():
    before = fingerprint(logs)
    LOGGER.debug("it remembers levels")
    LOGGER.disabled = not LOGGER.disabled
    assert fingerprint(logs) == before
    LOGGER.disabled = not LOGGER.disabled


def test_another_object_under_the_same_name_does(monkeypatch):
    before = fingerprint(logs)
    monkeypatch.setitem(globals(), "DTYPE", torch.float64)
    assert fingerprint(logs) != before


def test_names_in_functions_within_count(monkeypatch):
    before = fingerprint(loads_later)
    monkeypatch.setitem(globals(), "LATER", 1.0)
    assert reads_outside(loads_later)
    assert fingerprint(loads_later) != before


def test_names_of_attributes_are_no_globals(monkeypatch):
    def spread(x):
        return x.var()

    before = fingerprint(spread)
    monkeypatch.setitem(globals(), "var", 3.0)
    assert fingerprint(spread) == before
