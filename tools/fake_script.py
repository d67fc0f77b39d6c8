"""The script of tools/fake_engine.py: what to answer to which prompt, and which fault to play.

Owns the JSON format. Must not know sockets or time. A field that is not listed here is an error.
`tools/fake_engine.py --help` explains every field.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import msgspec

from engine.config import EngineConfig
from engine.protocol import Submit
from tools.tiny_model import FIRST_BYTE, encode_text

FaultKind = Literal[
    "crash",
    "fatal",
    "hang",
    "stop",
    "frozen",
    "slow_step",
    "bad_id",
    "garbage",
    "truncated",
    "stale",
    "repeat_step",
    "unknown_id",
    "duplicate_finish",
    "no_finish",
    "never_ready",
]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    replica: int | None = None
    epoch: int | None = None

    def concerns(self, config: EngineConfig) -> bool:
        """Is this part of the script meant for this engine?"""
        return self.replica in (None, config.replica) and self.epoch in (None, config.epoch)


class Fault(_Part, frozen=True):
    """One fault. `when` places it in the life of the engine, `at_token` in that of a sequence."""

    kind: FaultKind
    when: Literal["start", "load", "ready"] = "load"
    at_token: int = 0
    how: Literal["kill", "segv", "abort", "exit", "grow"] = "kill"
    code: int = 1
    seconds: float = 0.0
    announce: bool = False
    token: int = 1_000_000
    hex: str = "fffe00"
    reason: str = "a fault of the script"
    once_file: str = ""

    def due(self) -> bool:
        """False if `once_file` says that it was played already; otherwise leaves that mark."""
        if not self.once_file:
            return True
        try:
            os.close(os.open(self.once_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions on the prompt's text; all that are given must hold."""

    exact: str | None = None
    contains: str | None = None
    regex: str | None = None

    def fits(self, text: str) -> bool:
        return (
            self.exact in (None, text)
            and (self.contains is None or self.contains in text)
            and (self.regex is None or re.search(self.regex, text, re.DOTALL) is not None)
        )


class Rule(_Part, frozen=True):
    """What to do with the prompts that `match`; an exact text, "*" for all, or conditions."""

    match: str | Match = "*"
    reply: str | list[str] | None = None
    tokens: list[int] | None = None
    hex: str | None = None
    repeat: bool = False
    first_token_s: float = 0.0
    tokens_per_s: float | None = None
    delays_s: list[float] = []
    cached: int = 0
    finish: Literal["stop", "length", "abort", "error"] = "stop"
    detail: str = ""
    faults: list[Fault] = []

    def fits(self, text: str) -> bool:
        """Does the rule answer this prompt?"""
        if isinstance(self.match, Match):
            return self.match.fits(text)
        return self.match in ("*", text)

    def answer(self, submit: Submit, prompt: list[int]) -> list[int]:
        """The tokens to generate, without the one that ends them. Default: the prompt's bytes."""
        if self.tokens is not None:
            return self.tokens
        if self.hex is not None:
            return [byte + FIRST_BYTE for byte in bytes.fromhex(self.hex)]
        if isinstance(self.reply, list):
            return encode_text(self.reply[submit.sampling.seed % len(self.reply)])
        if self.reply is not None:
            return encode_text(self.reply)
        return [token for token in prompt if token >= FIRST_BYTE]


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    rules: list[Rule] = []
    start_faults: list[Fault] = []
    load_s: float = 0.0
    silent_load: bool = False
    version: int | None = None
    max_batch: int = 0
    max_len: int = 0
    num_blocks: int = 4096
    vocab_size: int = 0
    embedding_size: int = 8
    generates: bool = True
    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    grammar_log: str = ""

    def rule_for(self, text: str, config: EngineConfig) -> Rule:
        """The first rule that fits, else the one that echoes."""
        fitting = (rule for rule in self.rules if rule.concerns(config) and rule.fits(text))
        return next(fitting, Rule())


def load_script(data: bytes) -> Script:
    """Raises msgspec.MsgspecError, ValueError or re.error with the reason."""
    script = msgspec.json.decode(data, type=Script)
    for rule in script.rules:
        bytes.fromhex(rule.hex or "")
        if rule.reply == []:
            raise ValueError("a list of replies must not be empty")
        if isinstance(rule.match, Match) and rule.match.regex is not None:
            re.compile(rule.match.regex)
        for fault in rule.faults:
            bytes.fromhex(fault.hex)
    return script
