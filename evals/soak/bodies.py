"""The requests of a soak: a catalogue of bodies of every kind, drawn once from a seed.

Everything is greedy, so that the same body has to bring the same text whenever it is sent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
END_OF_TURN_ID = 257  # Of the tiny model, `pascal_sglang.demo.tiny`.
A_ID, Z_ID = 64, 89
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROPERTIES: Mapping[str, Any] = {
    "verdict": {"enum": ["yes", "no", "perhaps"]},
    "code": {"type": "string", "pattern": "^[a-f]{4,12}$"},
}
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": PROPERTIES,
    "required": ["verdict", "code"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """One request without its id.

    kind: its line in the table. limits: `max_new_tokens` of each reply, in the order of their
    index; one for each prompt and parallel sample. refused: the server has to answer with status
    400. same: whether SGLang itself answers it alike whenever it comes; where not, what differs is
    counted apart.
    """

    kind: str
    path: str
    fields: Mapping[str, Any]
    limits: Sequence[int] = ()
    refused: bool = False
    same: bool = True

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Where `stop`, `stop_token_ids` and `ignore_eos` are said; of a batch, the first."""
        found = self.fields.get("sampling_params", self.fields)
        chosen: Mapping[str, Any] = found[0] if isinstance(found, list) else found
        return chosen


@dataclass(frozen=True, slots=True)
class Maker:
    """Draws bodies. processor: the serialized logit processor that ends thinking where
    `custom_params["thinking_budget"]` says."""

    dice: random.Random
    processor: str
    made: list[Body] = field(default_factory=list)

    def prompt(self) -> str:
        """Some have a beginning in common with others."""
        dice = self.dice
        shared = "a beginning that others share " * dice.randint(0, 3)
        return f"{shared}{dice.randint(0, 999)} " + "x" * dice.randint(0, 60)

    def generate(
        self,
        kind: str,
        think: int | None,
        answer: int,
        *,
        same: bool = True,
        fields: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Body:
        """A `/generate` body that thinks for `think` tokens (None: not at all) and then answers.
        fields: more of the request; sampling: more of its `sampling_params`."""
        total = answer + (0 if think is None else think + 1)
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": total, **sampling}
        thinks: dict[str, Any] = {}
        if think is not None:
            thinks = {"require_reasoning": True, "custom_logit_processor": self.processor}
            params["custom_params"] = {"thinking_budget": think, **params.get("custom_params", {})}
        whole = {"text": self.prompt(), **thinks, "sampling_params": params, **(fields or {})}
        if "input_ids" in whole:
            del whole["text"]
        return Body(
            kind=kind,
            path=GENERATE,
            fields=whole,
            limits=[total] * params.get("n", 1),
            same=same,
        )

    def chat(self, kind: str, think: int | None, answer: int, **fields: Any) -> Body:
        """A chat completion of the same meaning."""
        total = answer + (0 if think is None else think + 1)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": self.prompt()}],
            "temperature": 0,
            "max_tokens": total,
            "ignore_eos": True,
            **fields,
        }
        if think is None:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        else:
            body["custom_logit_processor"] = self.processor
            body["custom_params"] = {"thinking_budget": think}
        return Body(kind=kind, path=CHAT, fields=body, limits=[total] * fields.get("n", 1))

    def think(self) -> int:
        return self.dice.randint(3, 80)

    def answer(self) -> int:
        return self.dice.randint(20, 110)

    def pair_of_letters(self) -> str:
        return "".join(self.dice.sample(LETTERS, 2))


def _batch(make: Maker) -> Body:
    bodies = [make.generate("", make.think(), make.answer()) for _ in range(3)]
    return Body(
        kind="batch",
        path=GENERATE,
        fields={
            "text": [body.fields["text"] for body in bodies],
            "sampling_params": [body.fields["sampling_params"] for body in bodies],
            "custom_logit_processor": [make.processor] * 3,
            "require_reasoning": True,
        },
        limits=[body.limits[0] for body in bodies],
    )


def _completion(make: Maker) -> Body:
    total = make.answer()
    fields = {
        "model": "tiny",
        "prompt": make.prompt(),
        "temperature": 0,
        "max_tokens": total,
        "ignore_eos": True,
    }
    return Body(kind="completion", path=COMPLETIONS, fields=fields, limits=[total])


def _huge(make: Maker) -> Body:
    """Most of the prompt is the same as other huge ones'."""
    text = "a long story that many have read " * make.dice.randint(20, 45) + make.prompt()
    return make.generate("huge prompt", make.dice.randint(3, 20), 30, fields={"text": text})


def _too_long(make: Maker) -> Body:
    body = make.generate("too long", None, 10, fields={"text": "x" * 40_000})
    return Body(kind="too long", path=GENERATE, fields=body.fields, refused=True)


def _no_request(make: Maker) -> Body:
    """Something that SGLang's own checks refuse."""
    wrong = make.dice.choice(
        (
            {"max_new_tokens": -1},
            {"top_p": 7.0},
            {"min_new_tokens": 9, "max_new_tokens": 3},
            {"frequency_penalty": 99.0},
        )
    )
    fields = {"text": "never answered", "sampling_params": {"temperature": 0, **wrong}}
    return Body(kind="refused", path=GENERATE, fields=fields, refused=True)


def _letters(make: Maker) -> list[int]:
    return make.dice.sample(range(A_ID, Z_ID + 1), 2)


# Penalties: what SGLang has counted of a request depends on the passes in between under overlap
# scheduling, and starts anew with every retraction (docs/known-differences.md).
KINDS: Mapping[str, Callable[[Maker], Body]] = {
    "thinking": lambda m: m.generate("thinking", m.think(), m.answer()),
    "long thinking": lambda m: m.generate("long thinking", 220, 60),
    "no thinking": lambda m: m.generate("no thinking", None, m.answer()),
    "chat": lambda m: m.chat("chat", m.think(), m.answer()),
    "chat, no thinking": lambda m: m.chat("chat, no thinking", None, m.answer()),
    "completion": _completion,
    "stop string": lambda m: m.generate(
        "stop string", m.think(), 110, stop=[m.pair_of_letters() for _ in range(6)]
    ),
    "stop token": lambda m: m.generate("stop token", m.think(), 110, stop_token_ids=_letters(m)),
    "end of turn": lambda m: m.generate(
        "end of turn", m.think(), 110, ignore_eos=False, logit_bias={str(END_OF_TURN_ID): 6.0}
    ),
    "chat stop": lambda m: m.chat("chat stop", m.think(), 110, stop=[m.pair_of_letters()]),
    "samples": lambda m: m.generate("samples", m.think(), m.answer(), n=3),
    "chat samples": lambda m: m.chat("chat samples", m.think(), m.answer(), n=2),
    "batch": _batch,
    "log probabilities": lambda m: m.generate(
        "log probabilities",
        m.think(),
        m.answer(),
        fields={"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [A_ID, Z_ID]},
    ),
    "prompt log probabilities": lambda m: m.generate(
        "prompt log probabilities",
        m.think(),
        m.answer(),
        fields={"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
    ),
    "chat log probabilities": lambda m: m.chat(
        "chat log probabilities", m.think(), m.answer(), logprobs=True, top_logprobs=3
    ),
    "frequency penalty": lambda m: m.generate(
        "frequency penalty", m.think(), m.answer(), same=False, frequency_penalty=0.6
    ),
    "presence penalty": lambda m: m.generate(
        "presence penalty", m.think(), m.answer(), same=False, presence_penalty=0.6
    ),
    "repetition penalty": lambda m: m.generate(
        "repetition penalty", m.think(), m.answer(), same=False, repetition_penalty=1.2
    ),
    "min_new_tokens": lambda m: m.generate(
        "min_new_tokens",
        None,
        90,
        same=False,
        ignore_eos=False,
        logit_bias={str(END_OF_TURN_ID): 12.0},
        min_new_tokens=30,
    ),
    "JSON": lambda m: m.generate("JSON", None, 90, ignore_eos=False, json_schema=_schema(m)),
    "JSON after thinking": lambda m: m.generate(
        "JSON after thinking", m.think(), 90, ignore_eos=False, json_schema=_schema(m)
    ),
    "chat JSON": lambda m: m.chat(
        "chat JSON",
        m.think(),
        90,
        ignore_eos=False,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": SCHEMA},
        },
    ),
    "regex": lambda m: m.generate("regex", None, 90, ignore_eos=False, regex="[a-m]{20,60}"),
    "short prompt": lambda m: m.generate(
        "short prompt", m.think(), m.answer(), fields={"text": m.dice.choice(LETTERS)}
    ),
    "huge prompt": _huge,
    "ids": lambda m: m.generate(
        "ids",
        m.think(),
        m.answer(),
        fields={"input_ids": [m.dice.randint(A_ID, Z_ID) for _ in range(m.dice.randint(1, 90))]},
    ),
    "own pace": lambda m: m.generate(
        "own pace",
        m.think(),
        m.answer(),
        custom_params={"pascal": {"answer_tpot_ms": m.dice.choice((10, 40, 400))}},
    ),
    "too long": _too_long,
    "refused": _no_request,
}


def _schema(make: Maker) -> str:
    """Some are new to the server, whose grammar it has to compile first."""
    limit = make.dice.randint(4, 20)
    code = {"type": "string", "pattern": f"^[a-f]{{4,{limit}}}$"}
    return json.dumps({**SCHEMA, "properties": {**PROPERTIES, "code": code}})


def catalogue(seed: int, each: int, processor: str, kinds: Sequence[str]) -> list[Body]:
    """`each` bodies of every kind, in an order drawn from the seed."""
    make = Maker(random.Random(seed), processor)
    found = [KINDS[kind](make) for kind in kinds for _ in range(each)]
    make.dice.shuffle(found)
    return found
