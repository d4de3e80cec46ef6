"""docs/faults.md says what the matrix asserts, and every known kind of failure has a test that names it."""

from __future__ import annotations

import itertools

import pytest

from tests.support.fault_matrix import PROMISES, Fault, Phase
from tests.support.faults_document import DOCUMENT, outcome_rows, peers_section, section_of
from tests.support.peers import SUFFERINGS, named_tests

WRITE_ANEW = "run `make faults`"


def test_every_phase_and_fault_has_a_promise() -> None:
    assert set(PROMISES) == set(itertools.product(Phase, Fault))


def test_the_document_has_every_cell_with_the_outcome_that_is_asserted() -> None:
    promised = {(str(phase), str(fault)): promise.outcome for (phase, fault), promise in PROMISES.items()}
    assert outcome_rows(DOCUMENT.read_text()) == promised, WRITE_ANEW


@pytest.mark.parametrize("number", SUFFERINGS)
def test_each_kind_of_failure_is_named_by_a_test(number: int) -> None:
    assert named_tests().get(number), SUFFERINGS[number].name


def test_no_test_names_a_number_that_does_not_exist() -> None:
    assert set(named_tests()) == set(SUFFERINGS)


def test_the_document_lists_the_tests() -> None:
    assert section_of(DOCUMENT.read_text(), "peers") == peers_section(), WRITE_ANEW
