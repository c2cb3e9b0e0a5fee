"""Requests of clients as pydantic models of OpenAI's API, and their conversion to SamplingParams.

Fields are validated without conversion ("5" is not a number), unknown fields are rejected by name, and a field that is
null counts as missing. Methods raise APIError where fields contradict each other.
"""

import json
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Json, PrivateAttr, model_validator

from fastgen.sampling_params import SamplingParams
from fastgen.server.errors import APIError, bad_request

# Limits that are checked before a request's contents are processed.
MAX_FIELDS = 256  # fields of an object with named fields
MAX_PROMPTS = 2**14  # prompts of a request, as texts or token ids
MAX_TOKEN_IDS = 2**21  # token ids of a prompt
MAX_MESSAGES = 2**13  # messages, content parts and tool calls together
MAX_TOOLS = 1024
MAX_STOP_STRINGS, MAX_STOP_CHARS = 64, 2048  # stop strings, and characters of each
MAX_GUIDED_CHOICES = 4096  # items of guided_choice
MAX_LISTED_TOKEN_IDS = 1024  # tokens of logit_bias, and of stop_token_ids
MAX_ALLOWED_TOKEN_IDS = 2**18  # tokens of allowed_token_ids
MAX_DETOKENIZE_TOKENS = 2**18  # tokens of /detokenize
MAX_COMPLETIONS_PER_PROMPT, MAX_TOP_LOGPROBS = 128, 20  # OpenAI's limits
# For each field whose grammar constrains the output, the kind of the grammar.
GRAMMAR_KINDS = {
    "response_format": "json:", "guided_json": "json:", "guided_regex": "regex:", "guided_choice": "lark:start: ",
    "guided_grammar": "lark:", "tools": "",
}  # fmt: skip


class StrictModel(BaseModel):
    """Base of all requests: validates without conversion, rejects unknown fields, reads null as the default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    # Fields of OpenAI's and vLLM's requests that are unsupported, and the values that have no effect and are accepted.
    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"an object of more than {MAX_FIELDS} fields")
        data = {name: value for name, value in data.items() if value is not None}
        for name, accepted in cls.unsupported_fields.items():
            if name in data and data.pop(name) not in accepted:
                problem = f"{name} is not supported by this server"
                problem += f", but for {' or '.join(map(json.dumps, accepted))}" if accepted else ""
                raise APIError(400, problem, param=name, code="unsupported_parameter")
        return data


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
    text.encode()  # raises UnicodeEncodeError, a ValueError
    return text


def _parse_logit_bias(logit_bias: Any) -> Any:
    """Converts the keys of a JSON object to token ids. int() alone would accept 1_0, spaces and other digits."""
    if not isinstance(logit_bias, dict):
        return logit_bias
    if len(logit_bias) > MAX_LISTED_TOKEN_IDS:
        raise ValueError(f"at most {MAX_LISTED_TOKEN_IDS} tokens are taken, got {len(logit_bias)}")
    for token in logit_bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"{token[:20]!r} is no token id")
    return {int(token): bias for token, bias in logit_bias.items()}


EncodableString = Annotated[str, AfterValidator(_check_encodable)]
NonEmptyString = Annotated[str, Field(min_length=1), AfterValidator(_check_encodable)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_check_encodable)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
StopTokenIds = Annotated[list[int], Field(max_length=MAX_LISTED_TOKEN_IDS, fail_fast=True)]
AllowedTokenIds = Annotated[list[int], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_parse_logit_bias)]
NumLogprobs = Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)]
GuidedChoices = Annotated[list[EncodableString], Field(min_length=1, max_length=MAX_GUIDED_CHOICES, fail_fast=True)]


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

    @property
    def schema_dict(self) -> dict[str, Any] | None:
        """The JSON schema of the output, or None for text."""
        return None if self.type == "text" else (self.json_schema or JsonSchema()).schema_


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
    stop_token_ids: StopTokenIds = []
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias = {}
    allowed_token_ids: AllowedTokenIds | None = None


class GenerationRequest(StrictModel):
    """Fields of all requests that generate tokens."""

    model: EncodableString | None = None
    stream: bool = False
    cache_salt: EncodableString | None = None  # vLLM's
    return_weight_versions: bool = False  # adds `weight_versions` to each choice, one per token

    @property
    def field_names(self) -> dict[str, str]:
        """Maps the library's names in error messages to the client's field names."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has token counts."""
        return False

    def _make_sampling_params(self, fields: dict[str, Any]) -> SamplingParams:
        """Makes SamplingParams. Raises APIError for a field out of range."""
        if fields["top_k"] == -1 or fields["top_k"] > 2**31 - 1:  # at least the size of any vocabulary: no limit
            fields["top_k"] = 0
        if 0 <= fields["top_p"] < 1e-6:  # only the most likely token; a smaller value could leave none in float32
            fields["top_p"] = 1e-6
        try:
            return SamplingParams(**fields, cache_salt=self.cache_salt)
        except ValueError as e:
            raise bad_request(str(e), self.field_names) from e


# Fields of SamplingParams that concern text.
TEXT_FIELDS = ("stop", "bad_words", "include_stop_str_in_output", "skip_special_tokens", "truncate_prompt_tokens")


class CompletionRequestBase(SamplingFields, GenerationRequest):
    """Fields that chat and text completions share."""

    unsupported_fields = {"service_tier": ("auto", "default"), "structured_outputs": ()}

    stop: StopString | StopStrings = []
    # vLLM's
    bad_words: StopStrings = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    stream_options: StreamOptions | None = None
    # Accepted without effect: these identify the user or control storage at OpenAI.
    user: EncodableString | None = None
    safety_identifier: EncodableString | None = None
    metadata: dict[EncodableString, EncodableString] = {}
    store: bool = False
    prompt_cache_key: EncodableString | None = None

    response_format: ResponseFormat | None = None
    guided_json: EncodableString | dict[str, Any] | None = None  # the guided fields are vLLM's
    guided_regex: EncodableString | None = None
    guided_choice: GuidedChoices | None = None
    guided_grammar: EncodableString | None = None

    _tool_call_grammar: str | None = PrivateAttr(None)  # of enforced tool calls

    def resolve_grammar(self) -> tuple[str, str] | None:
        """Returns the field that constrains the output and its grammar, or None. Raises APIError for several fields."""
        schema = self.response_format and self.response_format.schema_dict
        choices = self.guided_choice and " | ".join(map(json.dumps, self.guided_choice))
        values = schema, self.guided_json, self.guided_regex, choices, self.guided_grammar, self._tool_call_grammar
        grammars = [
            (name, kind + (value if isinstance(value, str) else json.dumps(value)))
            for (name, kind), value in zip(GRAMMAR_KINDS.items(), values, strict=True)
            if value is not None
        ]
        if len(grammars) > 1:
            names = [name for name, _ in grammars]
            raise APIError(400, f"{' and '.join(names)} both say what the output follows: give one", param=names[1])
        return grammars[0] if grammars else None

    @property
    def field_names(self) -> dict[str, str]:
        """Maps the library's names in error messages to the client's field names."""
        grammar = self.resolve_grammar()
        return dict.fromkeys(("grammar", "json", "regex", "lark"), grammar[0]) if grammar else {}

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _make_sampling_params(self, fields: dict[str, Any]) -> SamplingParams:
        if self.include_usage and not self.stream:
            raise APIError(400, "stream_options needs stream=true", param="stream_options")
        grammar = self.resolve_grammar()
        shared_fields = self.model_dump(include={*TEXT_FIELDS, *SamplingFields.model_fields})
        return super()._make_sampling_params(shared_fields | {"grammar": grammar and grammar[1]} | fields)


class ContentPart(StrictModel):
    """A part of a message's content; only text is supported. Breakpoints have no effect: all of a prompt is cached."""

    type: Literal["text"]
    text: EncodableString
    prompt_cache_breakpoint: dict[str, Any] | None = None


FunctionIdentifier = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]  # OpenAI's rule
JsonObject = Annotated[Json[dict[str, Any]], BeforeValidator(lambda text: "{}" if text == "" else text)]


def _check_object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError('this must be a JSON schema of an object, {"type": "object", ...}')
    return schema


class FunctionDefinition(StrictModel):
    """A function that the model may call. Without `parameters`, the function has none."""

    name: FunctionIdentifier
    description: EncodableString = ""  # templates may print it
    parameters: Annotated[dict[str, Any], AfterValidator(_check_object_schema)] = {}
    strict: bool = False


class Tool(StrictModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition

    def to_template_dict(self) -> dict[str, Any]:
        """Returns the tool in the form of chat templates, without `strict`."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        function = self.function.model_dump(exclude={"strict"}) | {"parameters": parameters}
        return {"type": self.type, "function": function}


class FunctionChoice(StrictModel):
    """The function of a `NamedToolChoice`."""

    name: FunctionIdentifier


class NamedToolChoice(StrictModel):
    """A `tool_choice` that requires a call of one function."""

    type: Literal["function"]
    function: FunctionChoice


class FunctionCall(FunctionChoice):
    """Name and arguments of a call; clients send the arguments as JSON text."""

    arguments: JsonObject


class ToolCall(StrictModel):
    """A tool call of an earlier answer. Clients send back the `index` that a stream's chunks have."""

    id: NonEmptyString
    index: int | None = None
    type: Literal["function"]
    function: FunctionCall


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
        """Returns the message in the form of chat templates: text content, no empty fields, arguments as an object."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        optional = self.model_dump(
            include={"name", "reasoning_content", "tool_calls", "tool_call_id"},
            exclude={"tool_calls": {"__all__": {"index"}}},
        )
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message | {name: value for name, value in optional.items() if value}


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
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_check_distinct_names)]


def _check_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    json.dumps(variables, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError
    return variables


class ChatTemplateFields(StrictModel):
    """vLLM's options for the chat template; see `fastgen.ChatPrompt`."""

    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check_final_message(self) -> "ChatTemplateFields":
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message=true needs add_generation_prompt=false")
        return self

    @property
    def template_options(self) -> dict[str, Any]:
        """The keyword arguments of `fastgen.text.chat_template.render`."""
        return self.model_dump(include={*ChatTemplateFields.model_fields})


class ChatRequest(ChatTemplateFields, CompletionRequestBase):
    """Body of POST /chat/completions."""

    unsupported_fields = CompletionRequestBase.unsupported_fields | {
        "audio": (),
        "chat_template": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "prompt_cache_retention": ("in_memory",),
        "reasoning_effort": ("medium",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: ChatMessages
    tools: Tools = []
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: NumLogprobs = None
    prediction: dict[str, Any] | None = None  # would only make the answer faster; no effect

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
        """Constrains the output to a grammar of tool calls. Raises APIError if the request sets another grammar."""
        if (other := self.resolve_grammar()) is not None:
            problem = f"{other[0]} is the form of all output, and calls have another: leave it out, or tool_choice=none"
            raise APIError(400, problem, param=other[0])
        self._tool_call_grammar = grammar

    @property
    def field_names(self) -> dict[str, str]:
        """Maps the library's names in error messages to the client's field names."""
        max_tokens = {"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {}
        return super().field_names | max_tokens

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Without a limit, output may fill the context. Raises APIError by field."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            problem = "max_tokens and max_completion_tokens are two names of the same: give one"
            raise APIError(400, problem, param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._make_sampling_params({"max_tokens": max_tokens, "logprobs": logprobs})


TextPrompts = Annotated[list[NonEmptyString], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(CompletionRequestBase):
    """Body of POST /completions."""

    unsupported_fields = CompletionRequestBase.unsupported_fields | {"suffix": ("",)}

    prompt: NonEmptyString | TokenIds | TextPrompts | TokenPrompts
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: NumLogprobs = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Returns one or several prompts as a list."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)  # type: ignore[return-value]

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Raises APIError by field."""
        if self.echo and self.stream and self.logprobs is not None:
            raise APIError(400, "echo with logprobs cannot be streamed: the prompt's come at the end", param="echo")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise APIError(400, "truncate_prompt_tokens cannot be combined with echo", param="truncate_prompt_tokens")
        if self.best_of not in (None, self.n):
            problem = f"best_of={self.best_of} is not supported by this server: leave it out, or make it n={self.n}"
            raise APIError(400, problem, param="best_of", code="unsupported_parameter")
        prompt_logprobs = self.logprobs if self.echo else None
        return self._make_sampling_params({"logprobs": self.logprobs, "prompt_logprobs": prompt_logprobs})


class GenerateSamplingParams(SamplingFields):
    """SamplingParams of the library without fields for text."""

    max_tokens: int | None = 16
    logprobs: NumLogprobs = None
    prompt_logprobs: NumLogprobs = None
    logprob_mode: Literal["raw", "processed"] = "raw"


class GenerateRequest(GenerationRequest):
    """Body of POST /inference/v1/generate: token ids in, token ids out."""

    token_ids: TokenIds
    sampling_params: GenerateSamplingParams = GenerateSamplingParams()

    @property
    def field_names(self) -> dict[str, str]:
        """Maps the library's names in error messages to the client's field names."""
        names = {name: f"sampling_params.{name}" for name in GenerateSamplingParams.model_fields}
        return names | {"prompt": "token_ids"}

    def to_sampling_params(self) -> SamplingParams:
        """Returns the library's settings. Raises APIError by field."""
        if self.stream and self.sampling_params.prompt_logprobs is not None:
            problem = "prompt_logprobs cannot be streamed: they come at the end"
            raise APIError(400, problem, param="sampling_params.prompt_logprobs")
        return self._make_sampling_params(self.sampling_params.model_dump())


class TokenizeRequest(ChatTemplateFields):
    """Body of POST /tokenize: a text, or messages and tools for the chat template."""

    model: EncodableString | None = None
    prompt: EncodableString | None = None
    messages: ChatMessages | None = None
    tools: Tools = []
    add_special_tokens: bool = True  # to `prompt`

    @model_validator(mode="after")
    def _check_prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools go with messages")
        if self.messages is None and self.template_options != ChatTemplateFields().template_options:
            raise ValueError("options of the chat template go with messages")
        return self


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: EncodableString | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_DETOKENIZE_TOKENS, fail_fast=True)]


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
