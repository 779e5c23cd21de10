"""The request bodies of the API: OpenAI's fields and vLLM's extensions.

Fields that Tandem doesn't know are ignored, as OpenAI and vLLM do; those that it knows but can't
honour are declared all the same, so that they're refused where they would change the output.
"""

from typing import Any, Literal

import msgspec

Json = Any
Side = Literal["left", "right"]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NamedSchema(msgspec.Struct, kw_only=True):
    """OpenAI's envelope of a JSON Schema; every output is held to it, `strict` or not."""

    schema: dict[str, Json]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputsBody(msgspec.Struct, kw_only=True):
    """vLLM's `structured_outputs`: one of the first five, by whom, and how to write JSON."""

    json: str | dict[str, Json] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    backend: str | None = None
    disable_any_whitespace: bool | None = None

    disable_additional_properties: Json = None
    structural_tag: Json = None
    whitespace_pattern: Json = None


class SharedFields(msgspec.Struct, kw_only=True):
    """Mean the same in all APIs; None is the model's or the protocol's default."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputsBody | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None


class SamplingBody(SharedFields, kw_only=True):
    """How tokens are chosen. The last fields have no effect here: see `unsupported.py` for the
    values that are harmless."""

    n: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Json] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None
    thinking_token_budget: int | None = None

    audio: Json = None
    ec_transfer_params: Json = None
    function_call: Json = None
    functions: Json = None
    guided_whitespace_pattern: Json = None
    kv_transfer_params: Json = None
    length_penalty: Json = None
    logits_processors: Json = None
    logprob_token_ids: Json = None
    media_io_kwargs: Json = None
    mm_processor_kwargs: Json = None
    modalities: Json = None
    prompt_embeds: Json = None
    repetition_detection: Json = None
    return_prompt_text: Json = None
    structural_tag: Json = None
    suffix: Json = None
    use_beam_search: Json = None
    vllm_xargs: Json = None
    watermarking: Json = None
    web_search_options: Json = None


class CompletionBody(SamplingBody, kw_only=True):
    """`prompt` is a text, several texts, token ids, or several lists of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class FunctionDefinition(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Json] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, kw_only=True):
    name: str


class AllowedTool(msgspec.Struct, kw_only=True):
    function: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct, kw_only=True):
    """Some of `tools`, with which it is as "auto" or "required" says."""

    mode: Literal["auto", "required"]
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, kw_only=True):
    """One function, or those among which the model may choose."""

    type: Literal["function", "allowed_tools"] = "function"
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Json] = ""


class ToolCall(msgspec.Struct, kw_only=True, omit_defaults=True):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ContentPart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Text, or an assistant's refusal to write any."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`reasoning` is the later name of `reasoning_content`."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatBody(SamplingBody, kw_only=True):
    """The second half says how the messages become a prompt. With `echo` an answer that goes on
    with the last message repeats it first."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    documents: list[dict[str, Json]] | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Either a prompt or messages; how the latter become a prompt is said as in `ChatBody`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    documents: list[dict[str, Json]] | None = None
    reasoning_effort: str | None = None
    tools: list[Tool] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None
