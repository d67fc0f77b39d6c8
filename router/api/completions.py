"""POST /v1/completions.

Owns the forms of a prompt and the JSON of completion answers. Must not know engines or admission.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import Any, Final, TypeGuard

from starlette.types import Receive, Scope, Send

from router.api.answer import ChunkStream, WholeChoice, answer_stream, answer_whole
from router.api.generation import Generations, new_id, record_of, salt_of, tenant_of
from router.api.http import read_json_body, while_connected
from router.api.logprobs import (
    TokenNames,
    completion_logprobs,
    joined,
    listed_prompt_logprobs,
    prompt_logprobs,
)
from router.api.options import (
    MAX_LOGPROBS,
    MAX_PROMPTS,
    MAX_SEQUENCES,
    check_ranges,
    num_run,
    prompt_logprobs_of,
    sampling_of,
    text_rules_of,
    truncated,
    wanted_tokens,
)
from router.api.schemas import (
    CompletionRequest,
    refuse_tools,
    refuse_unsupported,
)
from router.api.sse import ChunkTemplate
from router.errors import BadRequest
from router.flow import First, Job, Progress
from router.text.assembly import Entry, FinishReason
from router.text.served import ServedModel

DEFAULT_MAX_TOKENS: Final = 16


class Completions:
    """The route: one completion request from its body to its answer."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive)
        await while_connected(scope, receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        request = await self._generations.decode(body, CompletionRequest)
        model = self._generations.generating_model(request.model)
        job = await self._prepare(scope, request, model)
        form = await self._generations.apart(
            num_items(request.prompt), CompletionForm, request, job
        )
        steps = self._generations.run(job)
        if request.stream:
            options = request.stream_options
            include_usage = options is not None and options.include_usage is True
            stream = ChunkStream(form, job, include_usage=include_usage)
            await answer_stream(send, steps, job, stream)
        else:
            await answer_whole(send, steps, job, form)

    async def _prepare(self, scope: Scope, request: CompletionRequest, model: ServedModel) -> Job:
        """Everything that can be refused is refused here. Raises RequestError."""
        refuse_unsupported(request)
        refuse_tools(request)
        check_ranges(request)
        logprobs = -1 if request.logprobs is None else request.logprobs
        if request.logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise BadRequest(f"'logprobs' must be between 0 and {MAX_LOGPROBS}.", param="logprobs")
        max_new = wanted_tokens(request.max_tokens, "max_tokens", lowest=0 if request.echo else 1)
        rules = text_rules_of(request, model, logprobs=logprobs >= 0, continues=True)
        structured = await self._generations.structured(request)
        told = max(prompt_logprobs_of(request), logprobs if request.echo else -1)
        sampling = sampling_of(request, model, logprobs=logprobs, prompt_logprobs=told)
        prompts = await self._generations.apart(
            num_items(request.prompt), prompts_of, request.prompt, model.tokenizer.vocab_size
        )
        if len(prompts) * num_run(request) > MAX_SEQUENCES:
            raise BadRequest(f"Prompts times 'n' may be at most {MAX_SEQUENCES}.", param="n")
        add_special = request.add_special_tokens is not False
        if request.truncate_prompt_tokens is not None:
            # The rest cannot be among the last tokens that fit, and would cost seconds.
            prompts = [prompt[-model.max_chars :] for prompt in prompts]
        encoded = await self._generations.encode(model, prompts, add_special=add_special)
        max_len = self._generations.max_len(model)
        tokens = tuple(truncated(ids, request.truncate_prompt_tokens, max_len) for ids in encoded)
        for prompt in tokens:
            if not prompt:
                raise BadRequest("'prompt' must not be empty.", param="prompt")
            self._generations.check_room(model, prompt, param="prompt")
        return Job(
            record=record_of(scope),
            model=model,
            prompts=tokens,
            max_new=DEFAULT_MAX_TOKENS if max_new is None else max_new,
            sampling=sampling,
            rules=rules,
            n=num_run(request),
            keep=request.n or 1,
            salt=salt_of(scope, request),
            priority=request.priority or 0,
            tenant=tenant_of(scope),
            grammar="" if structured is None else structured.grammar,
        )


class CompletionForm:
    """The JSON of one completion answer."""

    def __init__(self, request: CompletionRequest, job: Job) -> None:
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": job.record.created_s,
            "model": request.model,
            "system_fingerprint": job.model.fingerprint,
        }
        self._job = job
        self._names = TokenNames(job.model.tokenizer, job.rules.pieces)
        self._with_tokens = request.return_token_ids is True
        self._echo = [""] * len(job.prompts)
        if request.echo:
            given = prompts_of(request.prompt, job.model.tokenizer.vocab_size)
            self._echo = [
                prompt if isinstance(prompt, str) else job.model.tokenizer.decode(prompt)
                for prompt in given
            ]
        self._echoes = request.echo is True
        self._tells_logprobs = request.logprobs is not None
        self._tells_prompt = request.prompt_logprobs is not None

    def chunks(self, *, include_usage: bool) -> ChunkTemplate:
        return ChunkTemplate(
            self._head,
            self._job.num_choices,
            opening=b'"text":',
            closing=b"",
            include_usage=include_usage,
        )

    def opening(self, _index: int) -> dict[str, Any] | None:
        return None

    def first(self, index: int, first: First) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if not self._echoes and not self._with_tokens:
            return None
        choice = self._choice(index, self._echo[index // self._job.n])
        if self._echoes and self._tells_logprobs:
            choice["logprobs"] = self._prompt_logprobs(index, first)
        if self._with_tokens:
            choice["prompt_token_ids"] = self._job.prompts[index // self._job.n]
            choice["token_ids"] = []
        return choice, {}

    @property
    def tells_tokens(self) -> bool:
        return self._with_tokens

    def told(self, progress: Progress) -> list[dict[str, Any]]:
        piece = progress.piece
        choice = self._choice(progress.choice, piece.text)
        if piece.entries and self._tells_logprobs:
            choice["logprobs"] = self._logprobs(progress.choice, piece.entries)
        if self._with_tokens:
            choice["token_ids"] = piece.tokens
        return [choice]

    def last(self, index: int, finish: FinishReason) -> dict[str, Any]:
        return {**self._choice(index, ""), "finish_reason": finish}

    def whole(self, choices: list[WholeChoice], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [*starmap(self._whole_choice, enumerate(choices))],
            "usage": usage,
        }

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        prompt = choice.index // self._job.n
        whole = self._choice(index, self._echo[prompt] + choice.text)
        whole["finish_reason"] = choice.finish
        if self._tells_prompt:
            told = choice.first.prompt_logprobs or []
            whole["prompt_logprobs"] = listed_prompt_logprobs(
                self._job.prompts[prompt], told, self._names
            )
        if self._tells_logprobs:
            whole["logprobs"] = self._logprobs(choice.index, choice.entries)
            if self._echoes:
                echoed = self._prompt_logprobs(choice.index, choice.first)
                whole["logprobs"] = joined(echoed, whole["logprobs"])
        if self._with_tokens:
            whole["prompt_token_ids"] = self._job.prompts[prompt]
            whole["token_ids"] = choice.tokens
        return whole

    def _logprobs(self, index: int, entries: Sequence[Entry]) -> dict[str, Any]:
        shift = len(self._echo[index // self._job.n])
        return completion_logprobs(entries, self._names, shift)

    def _prompt_logprobs(self, index: int, first: First) -> dict[str, Any]:
        prompt = self._job.prompts[index // self._job.n]
        return prompt_logprobs(prompt, first.prompt_logprobs or [], self._names)

    @staticmethod
    def _choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def prompts_of(prompt: Any, vocab_size: int) -> list[str | list[int]]:
    """The four forms of `prompt` as one list of texts and token lists. Raises BadRequest."""
    if prompt is None:
        raise BadRequest("'prompt' is required.", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("'prompt' must be a string or a list that is not empty.", param="prompt")
    if _is_tokens(prompt):
        return [_checked(prompt, vocab_size)]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest(f"'prompt' may hold at most {MAX_PROMPTS} prompts.", param="prompt")
    if all(isinstance(part, str) for part in prompt):
        return list(prompt)
    if all(isinstance(part, list) and _is_tokens(part) for part in prompt):
        return [_checked(part, vocab_size) for part in prompt]
    raise BadRequest(
        "'prompt' must be a string, a list of strings, a list of ids, or a list of such lists.",
        param="prompt",
    )


def num_items(prompt: Any) -> int:
    """About how many items `prompts_of` will look at."""
    if not isinstance(prompt, list):
        return 0
    few = prompt[:MAX_PROMPTS]  # more are refused before they are looked at
    return len(prompt) + sum([len(part) for part in few if isinstance(part, list)])


def _is_tokens(values: list[Any]) -> TypeGuard[list[int]]:
    return set(map(type, values)) <= {int}  # not bool


def _checked(tokens: list[int], vocab_size: int) -> list[int]:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise BadRequest("'prompt' holds an id outside the model's vocabulary.", param="prompt")
    return tokens
