"""Requests of clients as pydantic models of OpenAI's API, and their conversion to SamplingParams.

Fields are validated without conversion ("5" is not a number), unknown fields are rejected by name, and a field that is
null counts as missing. Methods raise APIError where fields contradict each other.
"""

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from fastgen.config import SamplingParams
from fastgen.server.errors import APIError, bad_request

# Unsupported fields of OpenAI's and vLLM's requests, with the values that have no effect and are accepted.
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
# Limits that are checked before a request's contents are processed.
MAX_FIELDS = 256  # fields of an object with named fields
MAX_PROMPTS = 2**14  # prompts of a request, as texts or token ids
MAX_TOKEN_IDS = 2**21  # token ids of a prompt
MAX_MESSAGES = 2**13  # messages, content parts and tool calls together
MAX_TOOLS = 1024
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 2048  # stop strings, and characters of each
MAX_GUIDED_CHOICES = 4096  # items of guided_choice
MAX_LISTED_TOKEN_IDS = 1024  # tokens of logit_bias, and of stop_token_ids
MAX_DETOKENIZE_TOKENS = 2**18  # tokens of /detokenize
MAX_COMPLETIONS_PER_PROMPT = 128  # OpenAI's limit
MAX_TOP_LOGPROBS = 20  # OpenAI's limit


class StrictModel(BaseModel):
    """Base of all requests: validates without conversion, rejects unknown fields, reads null as the default."""

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
    """Rejects a list or dict of more than `max_items` before its items are validated."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise ValueError(f"at most {max_items} are taken, got {len(value)}")
        return value

    return BeforeValidator(check)


def _limit_message_parts(messages: Any) -> Any:
    """Rejects messages with more than `MAX_MESSAGES` messages, content parts and tool calls in total."""
    if isinstance(messages, list):
        parts = [m.get(name) for m in messages if isinstance(m, dict) for name in ("content", "tool_calls")]
        count = len(messages) + sum(len(x) for x in parts if isinstance(x, list))
        if count > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages, parts and calls are taken together, got {count}")
    return messages


def _check_encodable(text: str) -> str:
    """Rejects half of a surrogate pair, which JSON can escape and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("this is no text: half of a surrogate pair is in it") from e
    return text


EncodableString = Annotated[str, AfterValidator(_check_encodable)]
NonEmptyString = Annotated[str, Field(min_length=1), AfterValidator(_check_encodable)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_check_encodable)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True), _limit_items(MAX_TOKEN_IDS)]


GuidedChoices = Annotated[list[EncodableString], Field(min_length=1, fail_fast=True), _limit_items(MAX_GUIDED_CHOICES)]


class StreamOptions(StrictModel):
    """Options of a stream: `include_usage` adds a last chunk with token counts. The others are unsupported."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


class JsonSchema(StrictModel):
    """A JSON schema in OpenAI's form; the output follows the schema whether `strict` or not."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema")
    strict: bool = True


class ResponseFormat(StrictModel):
    """Format of the output; `json_schema` belongs to the type of the same name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema_given(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given for type json_schema, and for no other")
        return self


class SamplingFields(StrictModel):
    """Fields of SamplingParams under the library's names."""

    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS_PER_PROMPT)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 disable it
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
        """Returns the keyword arguments of SamplingParams."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return fields | {"stop_token_ids": tuple(self.stop_token_ids), "logit_bias": _parse_logit_bias(self.logit_bias)}


class CompletionRequestBase(SamplingFields):
    """Fields that chat and text completions share."""

    model: EncodableString | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True), _limit_items(MAX_STOP_STRINGS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Accepted without effect: these identify the user or control storage at OpenAI.
    user: EncodableString | None = None
    safety_identifier: EncodableString | None = None
    metadata: dict[EncodableString, EncodableString] = {}
    store: bool = False
    prompt_cache_key: EncodableString | None = None

    return_weight_versions: bool = False  # adds `weight_versions` to each choice, one per token
    cache_salt: EncodableString | None = None  # this and the guided fields are vLLM's
    response_format: ResponseFormat | None = None
    guided_json: EncodableString | dict[str, Any] | None = None
    guided_regex: EncodableString | None = None
    guided_choice: GuidedChoices | None = None
    guided_grammar: EncodableString | None = None

    # Declared to be rejected as unsupported, not as unknown; see UNSUPPORTED_FIELDS.
    service_tier: Any = None
    structured_outputs: Any = None

    _tool_call_grammar: str | None = PrivateAttr(None)  # of enforced tool calls

    def resolve_grammar(self) -> tuple[str, str] | None:
        """Returns the field that constrains the output and its grammar, or None. Raises APIError for several fields."""
        grammars, response_format = dict[str, str](), self.response_format
        if response_format is not None and response_format.type != "text":
            json_schema = response_format.json_schema
            schema = json_schema.schema_ if json_schema else {"type": "object"}
            grammars["response_format"] = f"json:{json.dumps(schema)}"
        if (schema := self.guided_json) is not None:
            grammars["guided_json"] = f"json:{schema if isinstance(schema, str) else json.dumps(schema)}"
        if self.guided_regex is not None:
            grammars["guided_regex"] = f"regex:{self.guided_regex}"
        if self.guided_choice is not None:
            grammars["guided_choice"] = "lark:start: " + " | ".join(json.dumps(text) for text in self.guided_choice)
        if self.guided_grammar is not None:
            grammars["guided_grammar"] = f"lark:{self.guided_grammar}"
        if self._tool_call_grammar is not None:
            grammars["tools"] = self._tool_call_grammar
        if len(grammars) > 1:
            names = [*grammars]
            raise APIError(400, f"{' and '.join(names)} both say what the output follows: give one", param=names[1])
        return next(iter(grammars.items()), None)

    def client_field_names(self) -> dict[str, str]:
        """Maps the library's names in error messages to the client's field names."""
        grammar = self.resolve_grammar()
        return dict.fromkeys(("grammar", "json", "regex", "lark"), grammar[0]) if grammar else {}

    def _make_sampling_params(
        self, max_tokens_field: tuple[str, int | None], logprobs: int | None, echo: bool = False
    ) -> SamplingParams:
        reject_unsupported(self)
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise APIError(400, "stream_options needs stream=true", param="stream_options")
        grammar = self.resolve_grammar()
        fields = self.to_sampling_kwargs() | {
            "max_tokens": max_tokens_field[1],
            "grammar": grammar[1] if grammar else None,
            "cache_salt": self.cache_salt,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "logprobs": logprobs,
            "prompt_logprobs": logprobs if echo else None,
        }
        return make_sampling_params({"max_tokens": max_tokens_field[0]} | self.client_field_names(), **fields)


class ContentPart(StrictModel):
    """A part of a message's content; only text is supported. Breakpoints have no effect: all of a prompt is cached."""

    type: Literal["text"]
    text: EncodableString
    prompt_cache_breakpoint: dict[str, Any] | None = None


FunctionIdentifier = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]  # OpenAI's rule


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
    """A function that the model may call. Without `parameters`, the function has none."""

    name: FunctionIdentifier
    description: EncodableString | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_object_schema)] = {}
    strict: bool = False


class Tool(StrictModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_template_dict(self) -> dict[str, Any]:
        """Returns the tool in the form of chat templates, without `strict`."""
        f = self.function
        function: dict[str, Any] = {"name": f.name, "description": f.description or ""}  # templates may print it
        function["parameters"] = f.parameters or {"type": "object", "properties": {}}
        return {"type": self.type, "function": function}


class FunctionChoice(StrictModel):
    """The function of a `NamedToolChoice`."""

    name: FunctionIdentifier


class NamedToolChoice(StrictModel):
    """A `tool_choice` that requires a call of one function."""

    type: Literal["function"]
    function: FunctionChoice


class FunctionCall(StrictModel):
    """Name and JSON arguments of a call."""

    name: FunctionIdentifier
    arguments: Annotated[EncodableString, AfterValidator(_check_json_object)]


class ToolCall(StrictModel):
    """A tool call of an earlier answer. Clients send back the `index` that a stream's chunks have."""

    id: NonEmptyString
    index: int | None = None
    type: Literal["function"]
    function: FunctionCall

    def to_template_dict(self) -> dict[str, Any]:
        """Returns the call in the form of chat templates, with the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(StrictModel):
    """A message of a chat. Chat templates see the role developer as system.

    `reasoning_content` is the reasoning of an assistant's earlier answer, for templates that render reasoning.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: EncodableString | list[ContentPart] = ""
    name: EncodableString | None = None
    reasoning_content: EncodableString | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: NonEmptyString | None = None
    # Further fields of answers, which clients send back; accepted only if empty.
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
        """Returns the message in the form of chat templates."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.to_template_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def to_template_dicts(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Returns messages in the form of chat templates; results of tools get the function's name, which some need."""
    results, function_names = list[dict[str, Any]](), dict[str, str]()
    for i, message in enumerate(messages):
        function_names |= {call.id: call.function.name for call in message.tool_calls}
        results.append(message.to_template_dict())
        if (call_id := message.tool_call_id) is not None:
            param = f"messages.{i}.tool_call_id"
            if call_id not in function_names:
                raise APIError(400, f"{param}: no call before it has the id {call_id!r}", param=param)
            results[-1].setdefault("name", function_names[call_id])
    return results


def _check_distinct_names(tools: list[Tool]) -> list[Tool]:
    counts = Counter(tool.function.name for tool in tools)
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"there is more than one function {duplicates[0]}")
    return tools


ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_limit_message_parts)]


Tools = Annotated[list[Tool], Field(fail_fast=True), _limit_items(MAX_TOOLS), AfterValidator(_check_distinct_names)]


class RequestWithTools(StrictModel):
    """A request with messages and tools."""

    tools: Tools = []


class ChatRequest(CompletionRequestBase, RequestWithTools):
    """Body of POST /chat/completions."""

    messages: ChatMessages
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    prediction: dict[str, Any] | None = None  # would only make the answer faster; no effect

    # See UNSUPPORTED_FIELDS.
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
        """Returns "none", "auto", "required" or "named". Raises APIError for a choice that does not fit the tools."""
        for name in ("tool_choice", "parallel_tool_calls"):
            if not self.tools and getattr(self, name) not in (None, "none"):
                raise APIError(400, f"{name} needs tools", param=name)
        if isinstance(self.tool_choice, NamedToolChoice):
            choice, names = self.tool_choice.function.name, [tool.function.name for tool in self.tools]
            if choice not in names:
                problem = f"tool_choice: no function {choice} is among the tools: {', '.join(names)}"
                raise APIError(400, problem, param="tool_choice")
            return "named"
        return self.tool_choice or ("auto" if self.tools else "none")

    def enforce_tool_calls(self, grammar: str | None) -> None:
        """Constrains the output to a grammar of tool calls. Raises APIError beside another grammar, also for None."""
        other = self.resolve_grammar()
        if other is not None:
            problem = f"{other[0]} is the form of all output, and calls have another: leave it out, or tool_choice=none"
            raise APIError(400, problem, param=other[0])
        self._tool_call_grammar = grammar

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Without a limit, output may fill the context. Raises APIError by field."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            problem = "max_tokens and max_completion_tokens are two names of the same: give one"
            raise APIError(400, problem, param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._make_sampling_params((name, getattr(self, name)), logprobs)


TextPrompts = Annotated[list[NonEmptyString], Field(min_length=1, fail_fast=True), _limit_items(MAX_PROMPTS)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), _limit_items(MAX_PROMPTS)]


class CompletionRequest(CompletionRequestBase):
    """Body of POST /completions."""

    prompt: NonEmptyString | TokenIds | TextPrompts | TokenPrompts
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    best_of: int | None = None

    suffix: Any = None  # see UNSUPPORTED_FIELDS

    @property
    def prompts(self) -> list[str | list[int]]:
        """Returns one or several prompts as a list."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)  # type: ignore[return-value]

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Raises APIError by field."""
        if self.echo and self.stream and self.logprobs is not None:
            raise APIError(400, "echo with logprobs cannot be streamed: the prompt's come at the end", param="echo")
        if self.best_of not in (None, self.n):
            problem = f"best_of={self.best_of} is not supported by this server: leave it out, or make it n={self.n}"
            raise APIError(400, problem, param="best_of", code="unsupported_parameter")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self._make_sampling_params(("max_tokens", max_tokens), self.logprobs, self.echo)


class GenerateSamplingParams(SamplingFields):
    """SamplingParams of the library without fields for text."""

    max_tokens: int | None = 16
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    logprob_mode: Literal["raw", "processed"] = "raw"


class GenerateRequest(StrictModel):
    """Body of POST /inference/v1/generate: token ids in, token ids out."""

    model: EncodableString | None = None
    token_ids: TokenIds
    sampling_params: GenerateSamplingParams = GenerateSamplingParams()
    cache_salt: EncodableString | None = None
    stream: bool = False
    return_weight_versions: bool = False

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Raises APIError by field."""
        params = self.sampling_params
        if self.stream and params.prompt_logprobs is not None:
            problem = "prompt_logprobs cannot be streamed: they come at the end"
            raise APIError(400, problem, param="sampling_params.prompt_logprobs")
        names = {name: f"sampling_params.{name}" for name in GenerateSamplingParams.model_fields}
        fields = params.model_dump() | params.to_sampling_kwargs()
        return make_sampling_params(names, **fields, cache_salt=self.cache_salt)


class TokenizeRequest(RequestWithTools):
    """Body of POST /tokenize: a text, or messages and tools for the chat template."""

    model: EncodableString | None = None
    prompt: EncodableString | None = None
    messages: ChatMessages | None = None
    add_special_tokens: bool = True  # to `prompt`

    @model_validator(mode="after")
    def _check_prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools go with messages")
        return self


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: EncodableString | None = None
    tokens: Annotated[list[int], Field(fail_fast=True), _limit_items(MAX_DETOKENIZE_TOKENS)]


class AbortRequest(StrictModel):
    """Body of POST /abort: the id in a response, and in its header x-request-id."""

    request_id: EncodableString


class ProfileRequest(StrictModel):
    """Body of POST /profile: traces `steps` steps after `skip` steps."""

    steps: Annotated[int, Field(ge=1, le=64)] = 8  # collecting a longer trace would stall the engine
    skip: Annotated[int, Field(ge=0, le=100_000)] = 2


class LoadAdapterRequest(StrictModel):
    """Body of POST /load_lora_adapter: a name and a folder in PEFT's format; `load_inplace` replaces an adapter."""

    lora_name: EncodableString
    lora_path: EncodableString
    load_inplace: bool = False


class UnloadAdapterRequest(StrictModel):
    """Body of POST /unload_lora_adapter."""

    lora_name: EncodableString


def reject_unsupported(request: CompletionRequestBase) -> None:
    """Raises APIError for a field of `UNSUPPORTED_FIELDS` that has an effect."""
    for name, accepted in UNSUPPORTED_FIELDS.items():
        value = getattr(request, name, None)
        if value is not None and value not in accepted:
            problem = f"{name} is not supported by this server"
            problem += f", but for {' or '.join(map(json.dumps, accepted))}" if accepted else ""
            raise APIError(400, problem, param=name, code="unsupported_parameter")


def make_sampling_params(field_names: dict[str, str], **fields: Any) -> SamplingParams:
    """Makes SamplingParams. Raises APIError for a field out of range; `field_names` maps names to the client's."""
    if fields["top_k"] == -1 or fields["top_k"] > 2**31 - 1:  # at least the size of any vocabulary: no limit
        fields["top_k"] = 0
    if 0 <= fields["top_p"] < 1e-6:  # only the most likely token; a smaller value could leave none in float32
        fields["top_p"] = 1e-6
    try:
        return SamplingParams(**fields)
    except ValueError as e:
        raise bad_request(str(e), field_names) from e


def _parse_logit_bias(logit_bias: dict[str, float]) -> dict[int, float]:
    """Converts the keys of a JSON object to token ids. int() alone would accept 1_0, spaces and other digits."""
    for token in logit_bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise APIError(400, f"logit_bias: {token[:20]!r} is no token id", param="logit_bias")
    return {int(token): bias for token, bias in logit_bias.items()}
