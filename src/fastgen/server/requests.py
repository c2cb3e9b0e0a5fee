"""What clients may send: OpenAI's requests as pydantic models, and what they mean as SamplingParams.

Every field is checked without conversion ("5" is no number), an unknown one is refused by name, and one that is null
counts as not given.
"""

import json
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from fastgen.config import SamplingParams

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Fields of OpenAI's and vLLM's requests that are not supported, with the values that ask for nothing.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("medium",),
    "service_tier": ("auto", "default"),
    "structured_outputs": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
FIRST_WORD = re.compile(r"\w+")
CONTEXT_OVERFLOW_MESSAGE = re.compile(
    r"\d+ prompt tokens and max_tokens="
)  # how the library begins to say what does not fit
# Limits that are checked before there is any work with what a request holds.
MAX_FIELDS = 256  # of an object with named fields
MAX_PROMPTS = 2**14  # texts, or lists of tokens
MAX_TOKEN_IDS = 2**21  # of a list
MAX_MESSAGES = 2**13  # and parts and calls of all of them
MAX_TOOLS = 1024
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 2048  # stop strings, and characters of each
MAX_GUIDED_CHOICES = 4096  # of guided_choice
MAX_LISTED_TOKEN_IDS = 1024  # tokens of logit_bias, and of stop_token_ids
MAX_DETOKENIZE_TOKENS = 2**18  # tokens of /detokenize
MAX_COMPLETIONS_PER_PROMPT = 128  # completions of a prompt, as OpenAI's limit
MAX_TOP_LOGPROBS = 20  # most likely tokens beside each, likewise


class APIError(Exception):
    """A request that is answered by an error, in OpenAI's form. `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def to_body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StrictModel(BaseModel):
    """No conversions, no unknown fields; null is the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"an object of more than {MAX_FIELDS} fields")
        return {k: v for k, v in data.items() if v is not None}


def _limit_items(max_items: int) -> BeforeValidator:
    """Refuses what has more elements, before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise ValueError(f"at most {max_items} are taken, got {len(value)}")
        return value

    return BeforeValidator(check)


def _limit_message_parts(messages: Any) -> Any:
    """Refuses more messages, parts and calls together than a server should spend its time with."""
    if isinstance(messages, list):
        held = [m.get(name) for m in messages if isinstance(m, dict) for name in ("content", "tool_calls")]
        count = len(messages) + sum(len(x) for x in held if isinstance(x, list))
        if count > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages, parts and calls are taken together, got {count}")
    return messages


def _check_encodable(text: str) -> str:
    """JSON's escapes can spell half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("this is no text: half of a surrogate pair is in it") from e
    return text


EncodableString = Annotated[str, AfterValidator(_check_encodable)]
NonEmptyString = Annotated[str, Field(min_length=1), AfterValidator(_check_encodable)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_check_encodable)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True), _limit_items(MAX_TOKEN_IDS)]


class StreamOptions(StrictModel):
    """`include_usage`: a last chunk with the number of tokens. The other two are not supported, and may be false."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


class JsonSchema(StrictModel):
    """A schema and what OpenAI's clients say about it; it is followed whether `strict` or not."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool = True


class ResponseFormat(StrictModel):
    """`json_schema` is given with the type of that name, and only then."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema_given(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given for type json_schema, and for no other")
        return self


class SamplingFields(StrictModel):
    """How tokens are drawn, and how many: fields of SamplingParams, by its names."""

    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS_PER_PROMPT)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: Annotated[list[int], Field(fail_fast=True), _limit_items(MAX_LISTED_TOKEN_IDS)] = []
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[str, float], _limit_items(MAX_LISTED_TOKEN_IDS)] = {}

    def to_sampling_kwargs(self) -> dict[str, Any]:
        """As SamplingParams has them."""
        given = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return given | {"stop_token_ids": tuple(self.stop_token_ids), "logit_bias": _parse_logit_bias(self.logit_bias)}


class CompletionRequestBase(SamplingFields):
    """What chat and text completions have in common."""

    model: EncodableString | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True), _limit_items(MAX_STOP_STRINGS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Accepted, and not used: they say who asks, or what is to be kept, and nothing of the answer.
    user: EncodableString | None = None
    safety_identifier: EncodableString | None = None
    metadata: dict[EncodableString, EncodableString] = {}
    store: bool = False
    prompt_cache_key: EncodableString | None = None

    return_weight_versions: bool = False  # of each token: `weight_versions` of a choice
    cache_salt: EncodableString | None = None  # vLLM's, as the guided ones
    response_format: ResponseFormat | None = None
    guided_json: EncodableString | dict[str, Any] | None = None
    guided_regex: EncodableString | None = None
    guided_choice: (
        Annotated[list[EncodableString], Field(min_length=1, fail_fast=True), _limit_items(MAX_GUIDED_CHOICES)] | None
    ) = None
    guided_grammar: EncodableString | None = None

    # Declared so that they are refused with a reason, and not as unknown; see REFUSED.
    service_tier: Any = None
    structured_outputs: Any = None

    _tool_call_grammar: str | None = PrivateAttr(None)  # the grammar of calls, where they are enforced

    def resolve_grammar(self) -> tuple[str, str] | None:
        """The field that wants the output to follow a grammar, and the grammar. Refused if there are several."""
        found, form = dict[str, str](), self.response_format
        if form is not None and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
            found["response_format"] = f"json:{json.dumps(schema)}"
        if self.guided_json is not None:
            given = self.guided_json
            found["guided_json"] = f"json:{given if isinstance(given, str) else json.dumps(given)}"
        if self.guided_regex is not None:
            found["guided_regex"] = f"regex:{self.guided_regex}"
        if self.guided_choice is not None:
            found["guided_choice"] = "lark:start: " + " | ".join(json.dumps(text) for text in self.guided_choice)
        if self.guided_grammar is not None:
            found["guided_grammar"] = f"lark:{self.guided_grammar}"
        if self._tool_call_grammar is not None:
            found["tools"] = self._tool_call_grammar
        if len(found) > 1:
            raise APIError(400, f"{' and '.join(found)} both say what the output follows: give one", param=[*found][1])
        return next(iter(found.items()), None)

    def client_field_names(self) -> dict[str, str]:
        """How clients call what the library calls otherwise."""
        guide = self.resolve_grammar()
        return dict.fromkeys(("grammar", "json", "regex", "lark"), guide[0]) if guide else {}

    def _make_sampling_params(
        self, max_tokens_field: tuple[str, int | None], logprobs: int | None, echo: bool = False
    ) -> SamplingParams:
        reject_unsupported(self)
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise APIError(400, "stream_options needs stream=true", param="stream_options")
        guide = self.resolve_grammar()
        given = self.to_sampling_kwargs() | {"max_tokens": max_tokens_field[1], "grammar": guide[1] if guide else None}
        given["cache_salt"] = self.cache_salt
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        prompt = logprobs if echo else None
        return make_sampling_params(
            {"max_tokens": max_tokens_field[0]} | self.client_field_names(),
            **given,
            logprobs=logprobs,
            prompt_logprobs=prompt,
        )


class ContentPart(StrictModel):
    """A part of a message. Only text is supported. All of a prompt is cached, with a breakpoint or without."""

    type: Literal["text"]
    text: EncodableString
    prompt_cache_breakpoint: dict[str, Any] | None = None


FunctionIdentifier = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]  # of a function, as OpenAI has it


def _check_object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError('this must be a JSON schema of an object, {"type": "object", ...}')
    return schema


def _check_json_object(text: str) -> str:
    try:
        if isinstance(json.loads(text or "{}"), dict):
            return text
    except (ValueError, RecursionError):
        pass
    raise ValueError("this must be the JSON text of an object")


class FunctionDefinition(StrictModel):
    """What may be called. No parameters means that it takes none."""

    name: FunctionIdentifier
    description: EncodableString | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_object_schema)] = {}
    strict: bool = False


class Tool(StrictModel):
    """Only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_template_dict(self) -> dict[str, Any]:
        """As a chat template wants it: `strict` is ours to know."""
        f = self.function
        told: dict[str, Any] = {"name": f.name, "description": f.description or ""}  # templates may print either
        told["parameters"] = f.parameters or {"type": "object", "properties": {}}
        return {"type": self.type, "function": told}


class FunctionChoice(StrictModel):
    """The one that is to be called."""

    name: FunctionIdentifier


class NamedToolChoice(StrictModel):
    """A `tool_choice` of one function."""

    type: Literal["function"]
    function: FunctionChoice


class FunctionCall(StrictModel):
    """A function's name, and the JSON of its arguments."""

    name: FunctionIdentifier
    arguments: Annotated[EncodableString, AfterValidator(_check_json_object)]


class ToolCall(StrictModel):
    """A call that the model made before. `index` is what a stream's deltas have, and clients send back."""

    id: NonEmptyString
    index: int | None = None
    type: Literal["function"]
    function: FunctionCall

    def to_template_dict(self) -> dict[str, Any]:
        """Templates want an object, where clients have its text."""
        called = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": self.type, "function": called}


class ChatMessage(StrictModel):
    """What somebody said. A developer is the system to chat templates.

    `reasoning_content` is the reasoning of an assistant's former answer, for templates that have a place for it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: EncodableString | list[ContentPart] = ""
    name: EncodableString | None = None
    reasoning_content: EncodableString | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: NonEmptyString | None = None
    # What answers have beside it; nothing else of theirs has a place in a prompt.
    refusal: Literal[""] = ""
    annotations: Annotated[list[Any], Field(max_length=0)] = []

    @model_validator(mode="after")
    def _check_role_fields(self) -> "ChatMessage":
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id must be given for the role tool, and for no other")
        for name in ("tool_calls", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise ValueError(f"{name}: only the assistant has this")
        return self

    def to_template_dict(self) -> dict[str, Any]:
        """As a chat template wants it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            found["name"] = self.name
        if self.reasoning_content:
            found["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            found["tool_calls"] = [call.to_template_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


def to_template_dicts(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """All of them; a tool's get the name of what was called, which some templates ask for."""
    found, called = list[dict[str, Any]](), dict[str, str]()
    for i, message in enumerate(messages):
        called |= {c.id: c.function.name for c in message.tool_calls}
        found.append(message.to_template_dict())
        if message.tool_call_id is not None:
            param = f"messages.{i}.tool_call_id"
            if message.tool_call_id not in called:
                raise APIError(400, f"{param}: no call before it has the id {message.tool_call_id!r}", param=param)
            found[-1].setdefault("name", called[message.tool_call_id])
    return found


def _check_distinct_names(tools: list[Tool]) -> list[Tool]:
    count = Counter(tool.function.name for tool in tools)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"there is more than one function {twice[0]}")
    return tools


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_limit_message_parts)]


class RequestWithTools(StrictModel):
    """What has messages, and tools beside them."""

    tools: Annotated[
        list[Tool], Field(fail_fast=True), _limit_items(MAX_TOOLS), AfterValidator(_check_distinct_names)
    ] = []


class ChatRequest(CompletionRequestBase, RequestWithTools):
    """POST /chat/completions"""

    messages: ChatMessages
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    prediction: dict[str, Any] | None = None  # of the answer, which it could make faster and not change; not used

    # See REFUSED.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def tool_choice_mode(self) -> str:
        """`none`, `auto`, `required`, or `named`; what does not go together is Refused, by name."""
        for name in ("tool_choice", "parallel_tool_calls"):
            if not self.tools and getattr(self, name) not in (None, "none"):
                raise APIError(400, f"{name} needs tools", param=name)
        if isinstance(self.tool_choice, NamedToolChoice):
            wanted, names = self.tool_choice.function.name, [tool.function.name for tool in self.tools]
            if wanted not in names:
                problem = f"tool_choice: no function {wanted} is among the tools: {', '.join(names)}"
                raise APIError(400, problem, param="tool_choice")
            return "named"
        return self.tool_choice or ("auto" if self.tools else "none")

    def enforce_tool_calls(self, grammar: str | None) -> None:
        """Have the output follow the grammar of calls. A form of all output leaves no room for calls."""
        other = self.resolve_grammar()
        if other is not None:
            problem = f"{other[0]} is the form of all output, and calls have another: leave it out, or tool_choice=none"
            raise APIError(400, problem, param=other[0])
        self._tool_call_grammar = grammar

    def to_sampling_params(self) -> SamplingParams:
        """ValueError-free: what is wrong is Refused, by name. No limit means the rest of the context."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            problem = "max_tokens and max_completion_tokens are two names of the same: give one"
            raise APIError(400, problem, param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        new = self.max_completion_tokens is not None
        most = ("max_completion_tokens", self.max_completion_tokens) if new else ("max_tokens", self.max_tokens)
        return self._make_sampling_params(most, (self.top_logprobs or 0) if self.logprobs else None)


TextPrompts = Annotated[list[NonEmptyString], Field(min_length=1, fail_fast=True), _limit_items(MAX_PROMPTS)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), _limit_items(MAX_PROMPTS)]


class CompletionRequest(CompletionRequestBase):
    """POST /completions"""

    prompt: NonEmptyString | TokenIds | TextPrompts | TokenPrompts
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    best_of: int | None = None

    suffix: Any = None  # see REFUSED

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many, as many."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[return-value]

    def to_sampling_params(self) -> SamplingParams:
        """What is wrong is Refused, by name."""
        if self.echo and self.stream and self.logprobs is not None:
            raise APIError(400, "echo with logprobs cannot be streamed: the prompt's come at the end", param="echo")
        if self.best_of not in (None, self.n):
            problem = f"best_of={self.best_of} is not supported by this server: leave it out, or make it n={self.n}"
            raise APIError(400, problem, param="best_of", code="unsupported_parameter")
        most = 16 if self.max_tokens is None else self.max_tokens
        return self._make_sampling_params(("max_tokens", most), self.logprobs, self.echo)


class GenerateSamplingParams(SamplingFields):
    """The library's own SamplingParams, without text."""

    max_tokens: int | None = 16
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    logprob_mode: Literal["raw", "processed"] = "raw"


class GenerateRequest(StrictModel):
    """POST /inference/v1/generate: token ids in, token ids out."""

    model: EncodableString | None = None
    token_ids: TokenIds
    sampling_params: GenerateSamplingParams = GenerateSamplingParams()
    cache_salt: EncodableString | None = None
    stream: bool = False
    return_weight_versions: bool = False  # as of completions

    def to_sampling_params(self) -> SamplingParams:
        """What is wrong is Refused, by name."""
        asked = self.sampling_params
        if self.stream and asked.prompt_logprobs is not None:
            problem = "prompt_logprobs cannot be streamed: they come at the end"
            raise APIError(400, problem, param="sampling_params.prompt_logprobs")
        names = {name: f"sampling_params.{name}" for name in GenerateSamplingParams.model_fields}
        return make_sampling_params(
            names, **(asked.model_dump() | asked.to_sampling_kwargs()), cache_salt=self.cache_salt
        )


class TokenizeRequest(RequestWithTools):
    """POST /tokenize: a text, or messages as the chat template has them, with tools or without."""

    model: EncodableString | None = None
    prompt: EncodableString | None = None
    messages: ChatMessages | None = None
    add_special_tokens: bool = True  # of a prompt

    @model_validator(mode="after")
    def _check_prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools go with messages")
        return self


class DetokenizeRequest(StrictModel):
    """POST /detokenize"""

    model: EncodableString | None = None
    tokens: Annotated[list[int], Field(fail_fast=True), _limit_items(MAX_DETOKENIZE_TOKENS)]


class AbortRequest(StrictModel):
    """POST /abort: the id that a response or its header x-request-id names."""

    request_id: EncodableString


class ProfileRequest(StrictModel):
    """POST /profile: how many steps are traced, after how many others."""

    steps: Annotated[int, Field(ge=1, le=64)] = 8  # the trace of more would take the engine too long to collect
    skip: Annotated[int, Field(ge=0, le=100_000)] = 2


class LoadAdapterRequest(StrictModel):
    """POST /load_lora_adapter: a name, and a folder of PEFT's files. `load_inplace`: one of that name is replaced."""

    lora_name: EncodableString
    lora_path: EncodableString
    load_inplace: bool = False


class UnloadAdapterRequest(StrictModel):
    """POST /unload_lora_adapter"""

    lora_name: EncodableString


def reject_unsupported(request: CompletionRequestBase) -> None:
    """Refuse, by name, what asks for something that is not there. The one place that decides it."""
    for name, harmless in UNSUPPORTED_FIELDS.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            problem = f"{name} is not supported by this server"
            problem += f", but for {' or '.join(map(json.dumps, harmless))}" if harmless else ""
            raise APIError(400, problem, param=name, code="unsupported_parameter")


def make_sampling_params(field_names: dict[str, str], **fields: Any) -> SamplingParams:
    """SamplingParams, or a 400 for the field that is out of range; `names` has those that clients call otherwise."""
    if fields["top_k"] == -1 or fields["top_k"] > 2**31 - 1:  # more than any vocabulary is all of it
        fields["top_k"] = 0
    if 0 <= fields["top_p"] < 1e-6:  # the likeliest token alone, also in single precision, where none might be left
        fields["top_p"] = 1e-6
    try:
        return SamplingParams(**fields)
    except ValueError as e:
        raise bad_request(str(e), field_names) from e


def bad_request(message: str, field_names: dict[str, str] | None = None) -> APIError:
    """Makes the 400 for a message of the library, whose first word is the field it is about.

    Fields that clients know by another name (`names`) are renamed there and nowhere else: what follows may quote the
    client.
    """
    message, field_names = message.removeprefix("SamplingParams."), field_names or {}
    if CONTEXT_OVERFLOW_MESSAGE.match(message):  # two numbers and two names, no words of the client's
        name = field_names.get("max_tokens", "max_tokens")
        message = message.replace("max_tokens", name)
    else:
        word = FIRST_WORD.match(message)
        first = word[0] if word else ""
        name = field_names.get(first, first)
        message = name + message[len(first) :]
    known = (*SamplingParams.__dataclass_fields__, *field_names.values(), "prompt")
    return APIError(400, message, param=name if name in known else None)


def _parse_logit_bias(logit_bias: dict[str, float]) -> dict[int, float]:
    """Tokens are texts in JSON's objects. int() takes more than digits: 1_0, spaces, other scripts."""
    for token in logit_bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise APIError(400, f"logit_bias: {token[:20]!r} is no token id", param="logit_bias")
    return {int(token): bias for token, bias in logit_bias.items()}
