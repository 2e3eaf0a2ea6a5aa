"""A request gets its grammar on another instance, at once or when it is compiled there."""

import threading
import types
from array import array

import pytest
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from pascal_sglang.engine.migration import grammar
from pascal_sglang.engine.migration.grammar import restore_grammar


class Grammar(BaseGrammarObject):
    """Takes tokens below 100, and remembers them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def accept_token(self, token):
        if token >= 100:
            raise ValueError("not in the grammar")
        self.seen.append(token)

    def copy(self):
        return Grammar()


class Backend(BaseGrammarBackend):
    """Compiles when it is told to."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    def dispatch_regex(self, key_string):
        self.go_on.wait()
        return Grammar()


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_S", 60)
    made = GrammarManager.__new__(GrammarManager)
    made.grammar_queue, made.grammar_backend = [], Backend()
    made._enable_strict_thinking = False
    made.scheduler = types.SimpleNamespace(model_config=types.SimpleNamespace())
    yield made
    made.grammar_backend.go_on.set()
    made.grammar_backend.executor.shutdown()


def request(output):
    req = Req("r", None, array("q", [1]), SamplingParams(regex="a+"), vocab_size=128)
    req.output_ids = array("q", output)
    return req


def test_a_grammar_is_given_the_output_so_far(manager):
    manager.grammar_backend.go_on.set()
    first, second = request([7, 8, 9]), request([5])
    assert restore_grammar(first, manager)
    assert restore_grammar(second, manager)
    assert (first.grammar.seen, second.grammar.seen) == ([7, 8, 9], [5])
    assert manager.grammar_queue == []


def test_a_grammar_that_takes_long_is_there_the_next_time(manager, monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_S", 0.0)
    req = request([7])
    assert not restore_grammar(req, manager)
    assert (req.grammar, manager.grammar_queue) == (None, [])
    manager.grammar_backend.go_on.set()
    manager.grammar_backend.executor.shutdown(wait=True)
    assert restore_grammar(req, manager), "nothing is compiled again"


def test_a_grammar_that_does_not_take_the_output_is_refused(manager):
    manager.grammar_backend.go_on.set()
    assert not restore_grammar(request([7, 100]), manager)
