"""Which tokens a grammar allows next: one matcher per sequence, over the model's vocabulary.

Owns llguidance's form of the vocabulary, the compiled grammars that were used last, and the state
of each matcher. Must not know queues, threads or the device: where grammars are compiled is the
affair of `engine.compiling`, when a matcher moves on the scheduler's, and what becomes of a mask
the runner's. The router has judged each grammar: what goes wrong here ends one sequence only.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.protocol import BadFrame, Vocabulary, unpack_tokens

# Compiled grammars kept for the next sequence with the same one, as the choices of a request are.
_MOST_KEPT = 32
# A state of the lexer takes 1 to 2 kB: at most 100 MB for a grammar, where the default allows 500.
_MAX_LEXER_STATES = 50_000
# Text that a grammar fixes is not cut into tokens for the model: that would take its tokenizer, or
# give tokens it has never seen in this place. It chooses among all that fit, as everywhere else.
_FREE_CUT = '%llguidance {"no_forcing": true}\n'

Words = npt.NDArray[np.uint32]


class GrammarError(Exception):
    """A grammar that cannot be followed; the text goes into the end of its sequence."""


class Grammars:
    """Makes the matchers of one model. To be used by one thread at a time."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        """Takes 3 µs for each id, during which no other Python code runs.

        Raises `GrammarError` where llguidance is missing or the vocabulary has not `vocab_size`
        ids, and `BadFrame` for one that contradicts itself.
        """
        self._llguidance = _import_llguidance()
        pieces = _pieces(vocabulary)
        if len(pieces) != vocab_size:
            raise GrammarError(
                f"the vocabulary has {len(pieces)} ids and the model {vocab_size}: they do not "
                "belong together"
            )
        self._eos = frozenset(vocabulary.eos)
        wrapper = self._llguidance.TokenizerWrapper(_Pieces(pieces, vocabulary))
        self._tokenizer = self._llguidance.LLTokenizer(
            wrapper, eos_token=list(vocabulary.eos) or None
        )
        self._num_words = -(-self._tokenizer.vocab_size // 32)
        self._limits = self._llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        self._roots: OrderedDict[str, Any] = OrderedDict()  # compiled, at their beginnings

    def matcher(
        self, grammar: str, generated: Sequence[int], stop_ids: Iterable[int], min_new: int
    ) -> Matcher:
        """A matcher that has seen the tokens `generated`: those of an earlier engine.

        Takes a millisecond for a grammar of usual size, up to a second for the largest; other
        threads run meanwhile. Raises `GrammarError` if the grammar does not compile, or the tokens
        do not follow it.
        """
        state = self._root(grammar).deep_copy()
        if generated and not state.consume_tokens(list(generated)):
            raise GrammarError("the tokens that are there already do not follow the grammar")
        ends = Ends(self._eos, frozenset(stop_ids))
        return Matcher(state, ends, min_new - len(generated), self._num_words)

    def _root(self, grammar: str) -> Any:
        root = self._roots.get(grammar)
        if root is not None:
            self._roots.move_to_end(grammar)
            return root
        matcher = self._llguidance.LLMatcher
        root = matcher(self._tokenizer, freely_cut(grammar), log_level=0, limits=self._limits)
        if not root.is_error():
            root.compute_bitmask()  # what it learns on the way is shared by all copies
        if root.is_error():
            raise GrammarError("the grammar does not compile, or is too complex")
        self._roots[grammar] = root
        if len(self._roots) > _MOST_KEPT:
            self._roots.popitem(last=False)
        return root


class Ends:
    """The ids that end a sequence, as far as its grammar does not know of them.

    llguidance allows the model's end tokens where the grammar may end. Those that do not end this
    sequence are `never` allowed; what ends it besides them is `added` in such places.
    """

    __slots__ = ("added", "ids", "never", "stops")

    def __init__(self, eos: frozenset[int], stop_ids: frozenset[int]) -> None:
        self.ids = stop_ids
        self.never = _bits(eos - stop_ids)
        self.added = _bits(stop_ids - eos)
        self.stops = _bits(stop_ids)


class Matcher:
    """How far one sequence has come in its grammar.

    `failed`: it left the grammar, or met a limit of llguidance; `complete`: the grammar allows
    nothing any more. Only the scheduler moves it on. A mask has `num_words` words of 32 ids.
    """

    __slots__ = ("_ends", "_min_left", "_state", "complete", "failed", "num_words")

    def __init__(self, state: Any, ends: Ends, min_left: int, num_words: int) -> None:
        """No stop id is allowed for `min_left` more tokens, unless nothing else is."""
        self._state = state
        self._ends = ends
        self._min_left = min_left
        self.num_words = num_words
        self.failed = False
        self.complete: bool = state.is_stopped()

    def advance(self, token: int) -> None:
        """The sequence goes on with this token."""
        state = self._state
        self._min_left -= 1
        if self.failed:
            return
        if token in self._ends.ids and state.is_accepting():
            self.complete = True
        elif state.consume_token(token):
            self.complete = state.is_stopped()
        else:
            self.failed = True

    def fill(self, row: Words, address: int) -> None:
        """Sets the bits of the ids allowed next in `row`, which lies at `address`, and no others.

        On a failure, which `failed` tells of, they are those of the model's end tokens.
        """
        state, ends = self._state, self._ends
        state.unsafe_compute_mask_ptr(address, row.nbytes)
        forbids = self._min_left > 0
        if state.is_error():
            self.failed = True
        elif forbids or ends.never or ends.added:
            whole = row.copy()
            if state.is_accepting():
                _set(row, ends.added)
            _clear(row, ends.never)
            if forbids:
                _clear(row, ends.stops)
            if not row.any():  # nothing but an end is possible: taken, it completes the grammar
                row[:] = whole


class StepMasks:
    """See `engine.plan.StepMasks`."""

    __slots__ = ("_matchers", "rows")

    def __init__(self, rows: list[int], matchers: list[Matcher]) -> None:
        """One matcher for each of `rows`, of which there is at least one."""
        self.rows = rows
        self._matchers = matchers

    def bits(self) -> npt.NDArray[np.int32]:
        words = np.empty((len(self.rows), self._matchers[0].num_words), dtype=np.uint32)
        address, stride = words.ctypes.data, words.strides[0]
        for number, matcher in enumerate(self._matchers):
            matcher.fill(words[number], address + number * stride)
        return words.view(np.int32)


def freely_cut(grammar: str) -> str:
    """The same grammar, in which fixed text may be cut into tokens in any way."""
    if not grammar.lstrip().startswith("{"):
        return _FREE_CUT + grammar
    try:
        outer = json.loads(grammar)
        return json.dumps(outer | {"grammars": [_freely_cut(part) for part in outer["grammars"]]})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return grammar  # llguidance will say what is wrong with it


def _freely_cut(part: dict[str, Any]) -> dict[str, Any]:
    lark = part.get("lark_grammar")
    if not lark:
        lark = f"start: %json {json.dumps(part['json_schema'])}\n"
    return part | {"json_schema": None, "lark_grammar": _FREE_CUT + lark}


class _Pieces:
    """A vocabulary in the form in which llguidance takes it."""

    def __init__(self, pieces: list[bytes], vocabulary: Vocabulary) -> None:
        self.tokens = pieces
        # An end token never is a text, even where the model's files forget to say so.
        self.special_token_ids = sorted({*vocabulary.special, *vocabulary.eos})
        self.eos_token_id = vocabulary.eos[0] if vocabulary.eos else None
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Asked for where fixed text is to be cut as the model would: see `_FREE_CUT`."""
        del text
        raise GrammarError("the engine has no tokenizer")


def _pieces(vocabulary: Vocabulary) -> list[bytes]:
    """id -> bytes. Raises `BadFrame`."""
    lengths, data = unpack_tokens(vocabulary.lengths), vocabulary.pieces
    if min(lengths, default=0) < 0 or sum(lengths) != len(data):
        raise BadFrame(f"pieces of {sum(lengths)} bytes in a vocabulary of {len(data)}")
    ids = (*vocabulary.special, *vocabulary.eos)
    if ids and not 0 <= min(ids) <= max(ids) < len(lengths):
        raise BadFrame(f"a control token outside of a vocabulary of {len(lengths)}")
    return [data[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def _import_llguidance() -> Any:
    """Imported with the first grammar: most engines never see one. Raises `GrammarError`."""
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            "grammars need llguidance, which the engine cannot import: pip install llguidance"
        ) from error
    return llguidance


def _bits(ids: Iterable[int]) -> list[tuple[int, np.uint32]]:
    """(word, bits in it) of some ids."""
    words: dict[int, int] = {}
    for token in ids:
        words[token // 32] = words.get(token // 32, 0) | 1 << token % 32
    return [(word, np.uint32(bits)) for word, bits in words.items()]


def _set(row: Words, bits: list[tuple[int, np.uint32]]) -> None:
    for word, value in bits:
        row[word] |= value


def _clear(row: Words, bits: list[tuple[int, np.uint32]]) -> None:
    for word, value in bits:
        row[word] &= ~value
