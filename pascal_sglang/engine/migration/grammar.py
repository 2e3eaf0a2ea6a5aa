"""The grammar of a request that came from another instance.

SGLang's object that follows the output does not travel. The one that the request's parameters ask
for is made anew here, and is given the output so far. SGLang gives every request one under
`--enable-strict-thinking`.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import Any

from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.managers.schedule_batch import Req

# How long the target waits for a grammar that it has not compiled yet, in seconds; about as long as
# SGLang waits in a pass for those of new requests.
COMPILE_S = 0.05


def restore_grammar(req: Req, manager: Any) -> bool:
    """Give `req` its grammar, by SGLang's `GrammarManager`.

    False if it takes longer to compile: it will be there for another try. False too if it does not
    take the output, which another backend has written.
    """
    if manager.process_req_with_grammar(req):
        manager.grammar_queue.remove(req)
        compiled, key = req.grammar, req.grammar_key
        req.grammar = req.grammar_key = None
        wait([compiled], COMPILE_S)
        if not compiled.done():
            compiled.add_done_callback(lambda done: _keep(manager.grammar_backend, key, done))
            return False
        _keep(manager.grammar_backend, key, compiled)
        if manager.process_req_with_grammar(req):
            manager.grammar_queue.remove(req)
            return False
    if req.grammar is None or isinstance(req.grammar, InvalidGrammarObject):
        return False
    try:
        for token in req.output_ids:
            req.grammar.accept_token(token)
    except ValueError:
        return False
    return True


def _keep(backend: Any, key: Any, compiled: Future[Any]) -> None:
    if compiled.exception() is None:
        backend.set_cache(key, compiled.result().copy())
