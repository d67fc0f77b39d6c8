"""The API corpus: 173 numbered failures of other servers, and what must be seen here instead.

Numbers have gaps, as near doubles were left out when the corpus was put together.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Case(NamedTuple):
    """What one case is about."""

    kind: str
    right: str


_BY_KIND: Final[dict[str, dict[int, str]]] = {
    "utf8": {
        1: "a character in several tokens is streamed whole",
        2: "so it is when many streams run at once",
        4: "whole answers get it too",
        6: "the first space of a sentencepiece continuation is kept, once",
        7: "sentencepiece words keep the spaces between them",
        8: "runs of spaces keep their length",
        9: "a chunk holds new text only",
        11: "many clients at once: deltas join to the text of the ids",
    },
    "stop": {
        12: "no piece of a stop string is sent before it is known to be none",
        13: "a stop string may lie in several tokens",
        14: "text is cut before the match, also inside a token",
        16: "an empty list of stop strings changes nothing",
        17: "an empty stop string changes nothing",
        19: "a stop token is counted, not shown",
        21: "ignore_eos ignores all end tokens of the model",
        22: "min_tokens holds back all end tokens of the model",
        23: "the stop string is shown where that is asked for",
        25: "a stop string may begin inside a token",
        26: "nothing behind a match is shown or counted",
    },
    "usage": {
        28: "usage is null in all chunks but the last",
        29: "empty stream_options ask for nothing",
        30: "one chunk without choices carries the usage",
        32: "a stream counts as the whole answer does",
        33: "tokens are counted, not chunks",
        35: "without being asked every chunk has a choice",
        36: "whole answers have their three counts",
    },
    "finish": {
        38: "a tool call ends with tool_calls",
        39: "the word is exactly that, and the SDK knows it",
        42: "length means that max_tokens were made",
        43: "one finish reason a choice, in its last chunk",
        45: "also with log-probabilities",
        46: "a tool call cut by max_tokens ends with length, not with an error",
    },
    "logprobs": {
        47: "bytes are the token's true ones",
        48: "token texts are texts, not the glyphs of the vocabulary",
        49: "no alternative is without a name",
        50: "minus infinity becomes a number",
        51: "each token of a chunk has its own alternatives",
        52: "echo covers the prompt, with nulls first",
        54: "echo with max_tokens 0 tells of the prompt alone",
        56: "twenty alternatives, the likeliest first",
        58: "tokens are JSON strings",
        59: "streams carry one entry per visible token",
    },
    "choices": {
        61: "indexes are those of the n choices",
        62: "each of them has its role, text and end",
        63: "role chunks come first, in order; the SDK's stream helper works",
        64: "n choices in a whole answer, in order",
        65: "none goes missing under load",
        67: "every chunk has a list of choices",
        68: "no success without a choice",
        69: "the role is told once",
    },
    "tools": {
        72: "id, type and name in a call's first delta only",
        73: "one entry per index in a chunk",
        75: "a named call streams its type",
        76: "a required call streams, with arguments that parse",
        78: "streamed and whole calls are the same",
        80: "one call only where several were not wanted",
        82: "a history with calls and null content",
        83: "the same without the content key",
        84: "the prompt holds the call and its result",
        85: "templates see arguments as a mapping",
        87: "tools offered, plain text answered",
    },
    "reasoning": {
        88: "a closing tag in pieces is never shown",
        90: "with thinking off tool calls are found",
        91: "a second thinking block is treated alike in both ways",
        92: "no delta has both reasoning and content",
        94: "what was held at the cut is reasoning",
    },
    "schema": {
        95: "a schema that is none is refused",
        96: "a regex that is none is refused",
        97: "schemas without a known shape are refused",
        98: "what cannot be enforced is refused by name",
        99: "the SDK's parse with a model class",
        101: "twenty hot answers obey the schema",
        103: "a pattern with \\d in a tool's schema",
        104: "an unknown format is refused by name",
        106: "JSON mode ends with its brace",
        108: "a schema and a chat template together",
        110: "the schema as LangChain sends it",
        111: "a cut object ends with length",
    },
    "errors": {
        112: "an error is an object of four keys",
        113: "also for unknown routes, wrong methods and failed engines",
        114: "it names the field, and nothing of the inside",
        116: "a failed engine is told in general words",
        118: "an unknown model is told as such, with those served",
        120: "embeddings of a model that makes none",
    },
    "validate": {
        121: "numbers that JSON does not know",
        122: "and the answer to them is JSON",
        124: "a bias for a word",
        125: "a bias for an id outside the vocabulary",
        126: "a bias for a negative id, or out of range",
        127: "no choices at all",
        128: "a boolean as a string",
        130: "stream_options without a stream",
        131: "temperature 0 is greedy",
        132: "top_p 1 and 0",
        135: "no messages",
        137: "prompt_logprobs of everything",
    },
    "context": {
        138: "a long prompt is refused before the headers",
        139: "with the true numbers",
        141: "max_tokens beyond the room is a cap",
        142: "a long prompt costs others nothing",
        144: "max_completion_tokens rules; the defaults of both routes",
    },
    "prompt": {
        145: "an empty prompt",
        146: "negative ids",
        147: "ids beyond the vocabulary, or beyond 64 bits",
        148: "several prompts",
        150: "ids as a prompt, nothing added",
    },
    "sampling": {
        152: "a seed gives the same beside others",
        153: "without one answers differ",
        155: "a tiny temperature is greedy",
        156: "a huge one is refused",
        157: "presence and frequency count the answer only, repetition the prompt too",
        159: "top_k 1 is greedy",
        161: "a bias forces a token, or forbids it",
    },
    "embed": {
        162: "empty texts are refused",
        163: "token ids",
        164: "base64",
        165: "an unknown encoding",
        166: "a long text is refused unless cutting is asked for",
        169: "reranking is not served, and says so",
    },
    "abort": {
        171: "a client that leaves a whole answer frees everything",
        172: "so does one that leaves a stream",
        173: "also with keys and request log on",
    },
    "overload": {
        176: "a full queue is told at once, with the time to wait",
        178: "health tells of a dead engine",
        179: "no stream hangs when an engine dies",
        181: "the exit code tells that engines are used up",
        182: "requests while the model loads",
    },
    "body": {
        183: "a form instead of JSON",
        184: "half a document",
        185: "JSON that is no object",
        186: "a compressed body",
        187: "half a surrogate pair",
        189: "a body without end",
    },
    "fields": {
        191: "unknown fields are ignored",
        192: "so is a literal extra_body",
        194: "null means absent",
        196: "unknown members of messages",
        197: "fields of the hosted service",
    },
    "template": {
        198: "one start token",
        200: "a template that refuses the system role",
        201: "the template's own words, nothing of its source",
        202: "developer is system",
        203: "an invented role",
        204: "a model without a template",
        205: "control tokens in a message are plain text",
        207: "content in parts",
        209: "an image for a text model",
        210: "a conversation that ends with the assistant",
        211: "continue_final_message with add_generation_prompt",
    },
    "midstream": {
        214: "a failure in a stream is an event",
        215: "and the response ends after it",
        216: "comments while nothing comes",
        217: "what can be refused is refused before the headers",
    },
    "http": {
        220: "a preflight needs no key",
        221: "refusals carry the headers of CORS",
        222: "keys are compared in constant time, as bytes",
        225: "two requests with one request id",
        227: "the request id comes back",
        228: "slashes, methods and HEAD",
    },
    "msgresp": {
        229: "message_start knows the input tokens",
        230: "tool arguments come as deltas",
        232: "the SDK's responses stream with reasoning and text",
        233: "input as a list of messages",
        234: "the order of events of a responses stream",
        237: "errors in the form of the route",
        238: "both headers for keys",
        239: "thinking in the history",
    },
    "replica": {
        240: "another replica takes over",
        241: "a replica that loads gets nothing",
        242: "client errors do not count against a replica",
    },
    "timeout": {
        245: "the queue has a limit of its own",
        246: "hundreds at once: each one is answered",
        247: "long answers are not cut unless a limit is set",
    },
}

CASES: Final = {
    number: Case(kind, right) for kind, cases in _BY_KIND.items() for number, right in cases.items()
}

NOT_YET: Final[dict[int, str]] = {}  # number -> why its test is left out
