"""Chat templates render as transformers renders them, and refuse in the client's words."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.tokenizer import ChatTemplate, Tokenizer
from protocol.errors import InvalidRequestError, StartupError

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hi  "},
]

TEMPLATES = {
    "chatml": CHATML,
    "whitespace control": """
{%- for message in messages %}
    {%- if loop.index0 == 5 %}{% break %}{% endif %}
    {{ bos_token if loop.first else '' }}[{{ message.role }}] {{ message.content | trim }}
{% endfor %}
""",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_renders_as_transformers(name: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(CONVERSATION)
    [theirs], _ = render_jinja_template(
        [CONVERSATION],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert ours == theirs


@pytest.mark.parametrize("content", ["So far", "So far "])
def test_continues_the_final_message(content: str) -> None:
    messages = [*CONVERSATION, {"role": "assistant", "content": content}]
    text = ChatTemplate(CHATML, {}).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("<|im_start|>assistant\n" + content)


def test_a_template_that_drops_the_final_message_cant_continue_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidRequestError, match="drops the final message") as caught:
        template.render(CONVERSATION, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_content_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = ChatTemplate("{{ messages[0].content }}", {}).render(
        [{"role": "user", "content": parts}]
    )
    assert text == "one\ntwo"


@pytest.mark.parametrize(
    ("source", "role"),
    [("{{ messages[0].role }}", "system"), ("{# developer #}{{ messages[0].role }}", "developer")],
)
def test_developer_is_system_where_the_template_knows_no_better(source: str, role: str) -> None:
    assert ChatTemplate(source, {}).render([{"role": "developer", "content": "x"}]) == role


def test_a_tool_calls_arguments_are_an_object_in_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.a + 1 }}", {})
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert template.render([message]) == "2"


def test_variables_reach_the_template_but_dont_replace_the_messages() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ messages[0].content }}", {})
    variables = {"enable_thinking": False, "messages": []}
    assert template.render(CONVERSATION[1:], variables=variables) == "False Hi  "


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'].__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].nothing.at_all }}",
    ],
)
def test_a_refusal_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert caught.value.field == "messages"


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartupError, match="can't be parsed"):
        ChatTemplate("{% for %}", {})


def test_from_dir_reads_template_and_special_tokens(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_jinja_file_wins_over_the_config(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ eos_token }}")
    assert Tokenizer.from_dir(model_dir).render_chat(CONVERSATION) == "<|im_end|>"


def test_the_default_is_taken_from_a_list_of_templates(model_dir: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.from_dir(model_dir).render_chat(CONVERSATION) == "A"


def test_a_model_without_template_says_so(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.from_dir(model_dir).render_chat(CONVERSATION)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{")]
)
def test_an_unreadable_file_stops_the_start(model_dir: Path, name: str, text: str) -> None:
    (model_dir / name).write_text(text)
    with pytest.raises(StartupError, match=name):
        Tokenizer.from_dir(model_dir)


def test_a_missing_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_an_unknown_decoder_stops_the_start(model_dir: Path) -> None:
    file = model_dir / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    file.write_text(json.dumps(raw))
    with pytest.raises(StartupError, match="BPEDecoder"):
        Tokenizer.from_dir(model_dir)
