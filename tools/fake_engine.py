"""An engine without a model: it speaks the wire and does what a JSON script says.

usage: python tools/fake_engine.py --script FILE        (the router starts it like this:)
       router --engine-command "python tools/fake_engine.py --script FILE" --models DIR

DIR is a folder written by tools/tiny_model.py, whose tokenizer has one token per byte: byte b is
token b + 16, ids 0-15 are special (<pad> <s> </s> <unk> <|im_start|> <|im_end|> <|endoftext|>
<tool_call> </tool_call> <think> </think> and reserved ones). No torch, no weights are read.

Like a real engine it reads its configuration as one line of JSON from standard input, exits when
that pipe closes, drains on SIGTERM, leaves on the second one, answers Ping, honours Abort, max_new,
min_new, stop_ids, logprobs and prompt_logprobs (made-up numbers, always the same for the same
token; the chosen token is its own best rival), and sends correct waiting/running numbers.

THE SCRIPT (every field is optional; an unknown one is an error, exit 64)
  rules          list of rules; the first one that fits answers, without one the prompt is echoed
  tokens_per_s   of each sequence, if its rule does not say; 0 = one token in every step
  step_ms        least time between two steps; 0 = as fast as possible. One step is one message for
                 all sequences that are due.
  max_batch      sequences running at once, the others wait (0: as the router says)
  max_len, vocab_size, num_blocks, version     what Ready reports (0/null: 4096, 272, 4096, true)
  grammar_log    a path: each vocabulary and each grammar that arrives is added as a line of JSON,
                 with replica and epoch. Both are taken and change nothing.
  embedding_size, generates                    the same (8, true); embedding_size 0: makes none
  load_s         seconds between start and Ready, announced by Busy unless silent_load is true
  start_faults   list of faults of the process itself, see below

A RULE
  match          "text": exactly this prompt · "*": every prompt · {"exact": .., "contains": ..,
                 "regex": ..}: all that are given must hold. The prompt is decoded with special
                 tokens by name, so a chat reads "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>..."
  replica, epoch only in the engine with this replica number / this start count (1, 2, ..)
  reply          text to generate, or a list of texts of which seed modulo length is taken (n > 1)
  tokens / hex   the same as token ids / as bytes in hex (invalid UTF-8, half characters)
  repeat         true: the reply again and again until max_new
  first_token_s  seconds before the first token          tokens_per_s    later tokens, 0 = each step
  delays_s       seconds before token 0, 1, 2, ..; where given they replace the two above
  cached         prompt tokens said to come from the prefix cache
  finish         "stop" (default; adds the first of stop_ids as last token, if there are any),
                 "length", "abort" or "error"            detail          text of an error
  faults         list of faults, played when the sequence is about to generate token `at_token`
A submit with pooling is answered, after first_token_s, by a vector that depends on its tokens and
on the kind of pooling (`fake_embedding` in tools/fake_batch.py), unless finish is "error" or
"abort"; faults are played at token 0.
A sequence that continues one of another engine goes on where that one stopped, and so does
`at_token`: it counts all generated tokens.

A FAULT: {"kind": .., ..}. `at_token` (default 0) in a rule, `when` in start_faults: "start" (before
anything is sent), "load" (default: after Busy), "ready" (after Ready). `replica` and `epoch` as in
a rule. `once_file`: a path; the fault is played only if the file does not exist, and makes it.
  crash          how: "kill" (default, SIGKILL), "segv", "abort", "exit" with `code`, "grow" (takes
                 memory until somebody ends it, up to 1 GiB; then exits with `code`)
  fatal          sends Fatal(reason, code), exits with `code`
  hang           neither reads nor sends nor heeds SIGTERM, for `seconds` (0: for ever)
  stop           SIGSTOP to itself
  frozen         reads and answers Ping, but no step happens, for `seconds` (0: for ever)
  slow_step      one step takes `seconds`; announce: true sends Busy first
  bad_id         generates `token` (default 1000000) in place of the right one
  garbage        sends a frame of the bytes `hex`        truncated       half of a valid message
  stale          sends tokens and an end for the sequence under the epoch before this one
  repeat_step    sends the last message again            unknown_id      tokens for no sequence
  duplicate_finish  the end is sent twice                no_finish       the end is never sent
  never_ready    (start_faults, "start" or "load") answers Ping, but never becomes ready
crash, fatal, hang, stop and garbage also work in start_faults. `seconds` of a hang over, the
engine goes on; signals that came meanwhile are lost.

EXAMPLE
  {"tokens_per_s": 50, "rules": [
    {"match": {"contains": "capital of France"}, "reply": "Paris.", "first_token_s": 0.2},
    {"match": {"contains": "crash once"}, "reply": "0123456789",
     "faults": [{"kind": "crash", "at_token": 4, "once_file": "crashed"}]},
    {"match": {"contains": "poison"}, "faults": [{"kind": "crash", "how": "segv"}]},
    {"match": {"regex": "count to \\\\d+"}, "reply": "1 2 3 ", "repeat": true, "tokens_per_s": 0}]}
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.config import EngineConfig, decode_config
from engine.inbox import EXIT_PARENT_GONE, Item, ParentGone, Skipped, Terminate
from engine.link import (
    RouterLink,
    catch_signals,
    connect,
    leave_with_parent,
    show_stacks_on_demand,
)
from engine.main import EXIT_USAGE, read_line, report
from engine.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Busy,
    Drain,
    Fatal,
    Finish,
    Ping,
    Pong,
    Ready,
    Stats,
    StepOutput,
    Submit,
    ToRouter,
    Vocabulary,
    encode,
    pack_tokens,
    unpack_tokens,
)
from tools.fake_batch import FakeBatch, FakeSequence
from tools.fake_script import Fault, Script, load_script
from tools.tiny_model import encode_text

# Time for the socket's own thread to send what was queued before a fault hits.
_MOST_TAKEN_MIB = 1024
_FLUSH_S = 0.05
_FOREVER_S = 1e9
_STRANGER = (1 << 53) - 1  # an id that no router gives
_SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT}


class FakeEngine:
    """The process around the batch: messages, signals, faults."""

    def __init__(self, script: Script, config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
        self.exit_code: int | None = None
        self._script = script
        self._config = config
        self._socket = socket
        self._batch = FakeBatch(script, config)
        self._never_ready = False
        self._last_frame = b""
        self._frozen_until_s = 0.0
        self._draining = False
        self._terminations = 0
        self._bad_frames = 0
        self._frames_sent = 0
        self._frames_received = 0

    def start(self) -> None:
        """Everything up to Ready."""
        script, epoch = self._script, self._config.epoch
        self._play_start("start")
        if not script.silent_load:
            self._send(Busy(epoch, "load", script.load_s + 30.0))
        self._play_start("load")
        time.sleep(script.load_s)
        if not self._never_ready:
            version = PROTOCOL_VERSION if script.version is None else script.version
            self._send(Ready(epoch, version, self._batch.limits))
            self._frames_sent = 0
        self._play_start("ready")

    def serve(self, link: RouterLink) -> int:
        """Step until there is an exit code."""
        while self.exit_code is None:
            now = time.monotonic()
            frozen_s = self._frozen_until_s - now
            inbox = link.receive(min(frozen_s, 3600.0) if frozen_s > 0 else self._batch.wait_s(now))
            now = time.monotonic()
            self._apply(inbox, now)
            if self.exit_code is None and now >= self._frozen_until_s:
                self._step(now)
        return self.exit_code

    def _play_start(self, when: str) -> None:
        for fault in self._script.start_faults:
            if fault.when == when and fault.concerns(self._config) and fault.due():
                self._play_on_process(fault)

    def _apply(self, inbox: list[Item], now: float) -> None:
        for item in inbox:
            self._frames_received += not isinstance(item, Terminate | ParentGone)
            match item:
                case Submit() if self._draining:
                    self._batch.end(item.id, "abort", "the engine is draining")
                case Submit():
                    self._log_grammar(item)
                    self._batch.add(item, now)
                case Vocabulary():
                    self._log_grammar(item)
                case Abort():
                    self._batch.abort(item.ids, now)
                case Ping():
                    self._send(
                        Pong(self._config.epoch, item.n, self._complete(self._batch.stats()))
                    )
                case Drain():
                    self._draining = True
                case Terminate():
                    self._draining = True
                    self._terminations += 1
                    if self._terminations > 1:
                        self.exit_code = 128 + item.signal
                case ParentGone():
                    self.exit_code = EXIT_PARENT_GONE
                case Skipped():
                    self._bad_frames += 1

    def _log_grammar(self, item: Submit | Vocabulary) -> None:
        entry: dict[str, object] = {"replica": self._config.replica, "epoch": self._config.epoch}
        if isinstance(item, Vocabulary):
            entry |= {"ids": len(unpack_tokens(item.lengths)), "eos": item.eos}
        elif item.grammar:
            entry |= {"id": item.id, "grammar": item.grammar}
        else:
            return
        if self._script.grammar_log:
            with Path(self._script.grammar_log).open("ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")

    def _step(self, now: float) -> None:
        for sequence, fault in self._batch.take_faults(now):
            if fault.due():
                self._play_on_sequence(fault, sequence, now)
        if now < self._frozen_until_s or self.exit_code is not None:
            return
        output = self._batch.step(now)
        if output is not None:
            complete = msgspec.structs.replace(output, stats=self._complete(output.stats))
            self._last_frame = encode(complete)
            self._put(self._last_frame)
        if self._draining and not self._batch.busy:
            self.exit_code = 0

    def _play_on_sequence(self, fault: Fault, sequence: FakeSequence, now: float) -> None:
        match fault.kind:
            case "bad_id":
                sequence.replace_next(fault.token)
            case "no_finish":
                sequence.ends = 0
            case "duplicate_finish":
                sequence.ends = 2
            case "frozen":
                self._frozen_until_s = now + (fault.seconds or _FOREVER_S)
            case "stale":
                self._send(_three_tokens(self._config.epoch - 1, sequence.id))
            case "unknown_id":
                self._send(_three_tokens(self._config.epoch, _STRANGER))
            case "truncated":
                frame = encode(_three_tokens(self._config.epoch, sequence.id))
                self._put(frame[: len(frame) // 2])
            case "repeat_step":
                self._put(self._last_frame)
            case _:
                self._play_on_process(fault)

    def _play_on_process(self, fault: Fault) -> None:
        match fault.kind:
            case "garbage":
                self._put(bytes.fromhex(fault.hex))
            case "slow_step":
                if fault.announce:
                    self._send(Busy(self._config.epoch, "step", fault.seconds))
                time.sleep(fault.seconds)
            case "fatal":
                self._send(Fatal(self._config.epoch, fault.reason, fault.code))
                self.exit_code = fault.code
            case "never_ready":
                self._never_ready = True
            case "hang":
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(fault.seconds or _FOREVER_S)
            case "stop":
                time.sleep(_FLUSH_S)
                os.kill(os.getpid(), signal.SIGSTOP)
            case "crash":
                time.sleep(_FLUSH_S)
                _crash(fault)
            case _:
                report(f"fault {fault.kind!r} has no meaning here")

    def _complete(self, stats: Stats) -> Stats:
        return msgspec.structs.replace(
            stats,
            bad_frames=self._bad_frames,
            frames_sent=self._frames_sent,
            frames_received=self._frames_received,
        )

    def _send(self, message: ToRouter) -> None:
        self._put(encode(message))

    def _put(self, frame: bytes) -> None:
        self._socket.send(frame)
        self._frames_sent += 1


def _three_tokens(epoch: int, id_: int) -> StepOutput:
    """What no client must ever see."""
    tokens = pack_tokens(encode_text("BAD"))
    return StepOutput(epoch, 0, (id_,), (3,), tokens, finished=(Finish(id_, "stop"),))


def _crash(fault: Fault) -> NoReturn:
    if fault.how == "grow":
        taken: list[bytes] = []
        while len(taken) < _MOST_TAKEN_MIB:
            taken.append(b"x" * (1 << 20))  # written to: a page that is only asked for is not there
    elif fault.how != "exit":
        number = _SIGNALS[fault.how]
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(fault.code)


def main(words: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fake_engine.py",
        usage="fake_engine.py --script FILE    (configuration as one line on standard input)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--script", type=Path, help="JSON as described above; without: echo")
    path: Path | None = parser.parse_args(words).script
    try:
        script = Script() if path is None else load_script(path.read_bytes())
    except (OSError, ValueError, re.error, msgspec.MsgspecError) as error:
        report(f"the script {path} cannot be used: {error}")
        return EXIT_USAGE
    show_stacks_on_demand()
    try:
        config = decode_config(read_line(0))
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        report(f"the first line of standard input is no engine configuration: {error}")
        return EXIT_USAGE
    leave_with_parent(0)
    with zmq.Context() as context:
        socket = connect(context, config)
        try:
            engine = FakeEngine(script, config, socket)
            engine.start()
            return engine.serve(RouterLink(socket, catch_signals(), 0, config.epoch, report))
        finally:
            socket.close(linger=500)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
