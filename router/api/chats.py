"""From a chat request to a checked job: everything that any chat route has in common.

Owns the order of the checks. /v1/chat/completions, /v1/responses and /v1/messages put their
requests into a `ChatRequest` and come here. Must not know HTTP answers or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from starlette.types import Scope

from router.api.conversation import adds_generation_prompt, template_messages
from router.api.generation import Generations, record_of, salt_of, tenant_of
from router.api.options import (
    MAX_LOGPROBS,
    check_ranges,
    num_run,
    prompt_logprobs_of,
    sampling_of,
    text_rules_of,
    truncated,
    wanted_tokens,
)
from router.api.schemas import ChatRequest, refuse_unsupported
from router.api.structured import Structured
from router.errors import BadRequest
from router.flow import Job
from router.text.assembly import TextRules
from router.text.grammar import after_thinking
from router.text.scanner import ScanRules
from router.text.served import ServedModel
from router.text.tool_forms import ToolUse, choice_of, opens_thinking, tools_of

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TAIL_TOKENS: Final = 16  # of a prompt, in which an opened thinking block is looked for


class Chats:
    """Makes jobs of chat requests."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def prepare(self, scope: Scope, request: ChatRequest, model: ServedModel) -> Job:
        """Everything that can be refused is refused here. Raises RequestError."""
        refuse_unsupported(request)
        check_ranges(request)
        logprobs = _num_logprobs(request)
        max_new = wanted_tokens(request.max_tokens, "max_tokens")
        if request.max_completion_tokens is not None:
            max_new = wanted_tokens(request.max_completion_tokens, "max_completion_tokens")
        use = _tool_use(request)
        structured = await self._generations.structured(request)
        if structured is not None and use is not None and use.forced:
            raise BadRequest(
                f"'{structured.param}' cannot be used with a 'tool_choice' that asks for a call.",
                param=structured.param,
            )
        prompt = await self.prompt(request, model, use)
        prompt = truncated(prompt, request.truncate_prompt_tokens, self._generations.max_len(model))
        self._generations.check_room(model, prompt, param="messages")
        sampling = sampling_of(
            request, model, logprobs=logprobs, prompt_logprobs=prompt_logprobs_of(request)
        )
        rules = _text_rules(request, model, prompt, use, logprobs=logprobs >= 0)
        return Job(
            record=record_of(scope),
            model=model,
            prompts=(prompt,),
            max_new=max_new,
            sampling=sampling,
            rules=rules,
            n=num_run(request),
            keep=request.n or 1,
            salt=salt_of(scope, request),
            priority=request.priority or 0,
            tenant=tenant_of(scope),
            grammar=await self._grammar(model, rules, structured, use),
        )

    async def prompt(
        self, request: ChatRequest, model: ServedModel, use: ToolUse | None
    ) -> list[int]:
        """The ids of the conversation, not cut to the context. Raises BadRequest."""
        shown = () if use is None or use.choice.kind == "none" else use.tools
        return await self._generations.render(
            model,
            template_messages(request.messages),
            add_generation_prompt=adds_generation_prompt(
                request.messages, request.add_generation_prompt, request.continue_final_message
            ),
            continue_final=request.continue_final_message is True,
            kwargs=_template_kwargs(request),
            tools=shown,
        )

    async def count(self, request: ChatRequest, model: ServedModel) -> int:
        """Tokens of the prompt that `prepare` would make. Raises RequestError."""
        return len(await self.prompt(request, model, _tool_use(request)))

    async def _grammar(
        self,
        model: ServedModel,
        rules: TextRules,
        structured: Structured | None,
        use: ToolUse | None,
    ) -> str:
        grammar = "" if structured is None else structured.grammar
        if use is not None and use.forced:
            grammar = await self._generations.call_grammar(model.tool_form, use)
        thinking = rules.scan.thinking if rules.scan is not None else None
        if grammar and thinking is not None and thinking.starts_open:
            return after_thinking(grammar, thinking.close, model.control_id(thinking.close))
        return grammar


def _tool_use(request: ChatRequest) -> ToolUse | None:
    """Raises BadRequest. None without tools."""
    tools = tools_of(request.tools or [])
    choice = choice_of(request.tool_choice, tools)
    if not tools:
        return None
    return ToolUse(tools, choice, request.parallel_tool_calls is not False)


def _text_rules(
    request: ChatRequest,
    model: ServedModel,
    prompt: Sequence[int],
    use: ToolUse | None,
    *,
    logprobs: bool,
) -> TextRules:
    continues = request.continue_final_message is True
    rules = text_rules_of(request, model, logprobs=logprobs, continues=continues)
    scan = _scan_rules(request, model, prompt, use)
    if scan is not None:
        rules = replace(rules, scan=scan)
        if request.skip_special_tokens is not False:  # marks of calls may be control tokens
            rules = replace(rules, pieces=model.scanned_pieces)
    if model.template is not None and model.template.opens_line and not continues:
        rules = replace(rules, strip_lines=True)
    return rules


def _scan_rules(
    request: ChatRequest, model: ServedModel, prompt: Sequence[int], use: ToolUse | None
) -> ScanRules | None:
    thinking = model.thinking
    if thinking is not None and request.separate_reasoning is not False:
        tail = model.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special=False)
        thinking = replace(
            thinking,
            starts_open=opens_thinking(tail),
            show=request.include_reasoning is not False,
        )
    else:
        thinking = None
    rules = model.tool_form.scan_rules(thinking, use)
    return None if rules.thinking is None and rules.syntax is None else rules


def _template_kwargs(request: ChatRequest) -> dict[str, Any]:
    """Variables of the template. OpenAI's switch for thinking becomes those that models know."""
    kwargs = dict(request.chat_template_kwargs or {})
    effort = request.reasoning_effort
    if effort is None:
        return kwargs
    if effort not in EFFORTS:
        raise BadRequest(
            f"'reasoning_effort' must be one of: {', '.join(EFFORTS)}.", param="reasoning_effort"
        )
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", **kwargs}


def _num_logprobs(request: ChatRequest) -> int:
    """-1 none, else how many rivals of each token are wanted. Raises BadRequest."""
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise BadRequest(
            f"'top_logprobs' must be between 0 and {MAX_LOGPROBS}.", param="top_logprobs"
        )
    if not request.logprobs:
        if top:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return -1
    return top or 0
