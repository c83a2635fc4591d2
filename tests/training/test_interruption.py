"""Signals: when they wait, and when they do not."""

from __future__ import annotations

import os
import signal

import pytest

from pixart_jax import cli
from pixart_jax.errors import Interrupted
from pixart_jax.training.interruption import PreemptionHandler


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_nothing_can_be_lost_a_signal_ends_the_work_at_once(number):
    with pytest.raises(Interrupted, match=number.name), PreemptionHandler():
        tell(number)
        pytest.fail("went on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_a_run_trains_it_waits_for_the_step(number, capfd):
    with pytest.raises(Interrupted), PreemptionHandler() as interruption, interruption.deferred():
        assert interruption.should_stop(1) is None
        tell(number)
        assert interruption.should_stop(2) == number.name
        assert "the step is finished and saved first" in capfd.readouterr().err
        raise Interrupted(number.name)


def test_a_signal_that_no_step_came_after_is_not_forgotten():
    with pytest.raises(Interrupted), PreemptionHandler() as interruption:
        with interruption.deferred():
            tell()
        pytest.fail("went on")


def test_afterwards_signals_do_what_they_did_before():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionHandler():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_that_handles_faults_takes_it_for_one():
    assert not issubclass(Interrupted, Exception)


def test_a_program_says_one_line_and_ends_with_75(capsys):
    def main(argv):
        raise Interrupted("stopped by SIGTERM: step 5 is saved")

    assert cli.run(main, []) == cli.INTERRUPTED == 75
    assert capsys.readouterr().err == "stopped by SIGTERM: step 5 is saved\n"
