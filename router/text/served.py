"""The models as clients name them: names, tokenizer, template, context length.

Owns the table of names. Must not know engines, files or HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

from router.errors import ModelNotFound
from router.text.formats import ChatFormat
from router.text.pooling import PoolingRule
from router.text.scanner import ThinkingRule
from router.text.tokenizer import Tokenizer
from router.text.tool_forms import ToolForm
from router.versions import key_of


@dataclass(frozen=True)
class ServedModel:
    """One model as clients see it. `name` stands in metrics; fleet and admission know its `key`.

    `max_len` bounds prompt and answer together; engines may report less. One that does not
    `generate` (an encoder) makes embeddings only. `thinking` is None where the model does not
    think; whether a prompt has opened it already is not known here.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatFormat | None
    max_len: int
    created_s: int  # unix time
    generates: bool = True
    pooling: PoolingRule = field(default_factory=PoolingRule)
    tool_form: ToolForm = field(default_factory=ToolForm)
    thinking: ThinkingRule | None = None
    version: int = 1  # how often its name came to mean other files

    @property
    def key(self) -> str:
        """What fleet and admission know it by."""
        return key_of(self.name, self.version)

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]

    def control_id(self, text: str) -> int | None:
        """The control token that is written like this, None if it is an ordinary text."""
        return self._control_ids.get(text)

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {self.tokenizer.token_text(token): token for token in self.tokenizer.special_ids}

    @cached_property
    def scanned_pieces(self) -> Sequence[bytes]:
        """id -> bytes without control tokens, but with those that calls and thinking consist of."""
        words = [*self.tool_form.words]
        if self.thinking is not None:
            words += (self.thinking.open, self.thinking.close)
        pieces = list(self.tokenizer.pieces())
        for word in words:
            token = self.control_id(word)
            if token is not None:
                pieces[token] = word.encode()
        return pieces

    @cached_property
    def max_chars(self) -> int:
        """More characters than this are more than `max_len` tokens, whatever they are."""
        return self.max_len * max(map(len, self.tokenizer.pieces(skip_special=False)))

    @cached_property
    def embedding_frame(self) -> tuple[int, int]:
        """How many ids its tokenizer puts before and behind a text to be embedded."""
        nothing, some = (self.tokenizer.encode_for_embedding(text) for text in ("", "a"))
        pairs = zip(nothing, some, strict=False)
        first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return first, len(nothing) - first

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes when answers may."""
        facts = f"{self.name}:{self.max_len}:{self.tokenizer.vocab_size}"
        return "fp_" + hashlib.blake2b(facts.encode(), digest_size=5).hexdigest()


class ModelTable:
    """All served models by each of their names, and by key those that engines still work for.

    A name from a request is only ever a key here. `show` exchanges the whole list: a reader finds
    the old one or the new one.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._by_key: dict[str, ServedModel] = {}
        self.show(models)

    def show(self, models: Iterable[ServedModel]) -> None:
        """From now on clients see these. Those they saw before keep their keys until `forget`."""
        self.models = tuple(models)
        self._by_name = {name: model for model in self.models for name in model.names}
        self._by_key |= {model.key: model for model in self.models}

    def forget(self, key: str) -> None:
        """No engine works for that one any more."""
        self._by_key.pop(key, None)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the command line."""
        return tuple(self._by_name)

    def of_key(self, key: str) -> ServedModel:
        """The model that engines know by this key. Raises KeyError."""
        return self._by_key[key]

    def find(self, name: str) -> ServedModel:
        """Raises ModelNotFound, which lists the names."""
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFound(f"This model is not served here. Served: {', '.join(self.names)}.")
        return model

    def find_or_only(self, name: str) -> ServedModel:
        """As `find`, but where one model is served, no name means that one."""
        return self.models[0] if not name and len(self.models) == 1 else self.find(name)
