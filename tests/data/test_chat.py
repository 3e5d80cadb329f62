"""Chat templates against transformers' apply_chat_template: texts, tokens, and the mask of the assistant's turns."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates need jinja2; install the extra 'chat'")

from lmx.core.errors import ConfigError, DataError, FolderError  # noqa: E402
from lmx.data import Tokenizer, train_bpe  # noqa: E402
from lmx.data.chat import ChatTemplate, assistant_spans, encode_chat, load_template, render  # noqa: E402

CHATML = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + eos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant, at turn ' ~ loop.index0) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{% endif %}
"""
TOOLS = """{%- set ns = namespace(calls=0) %}
{%- if tools %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
<call {{ ns.calls }}>{{ call.function | tojson(indent=2) }}</call>
        {%- endfor %}
    {%- else %}
[{{ message.role | upper }}] {{ message.content }}{{ eos_token if message.role == 'assistant' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}[ASSISTANT] {% endif %}"""
FORGETFUL = """{%- for message in messages %}<{{ message.role }}>
{%- if message.role == 'assistant' and not loop.last %}...{% else %}{{ message.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
CHAT = [
    {"role": "user", "content": "  What is 2 < 3 & \"why\"? "},
    {"role": "assistant", "content": "It is true, naïve 🙂."},
    {"role": "user", "content": "And <|im_end|> 日本?"},
    {"role": "assistant", "content": "Yes.\n"},
]
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": {"at": "<b>"}}}]},
    {"role": "skip", "content": "x"},
    {"role": "tool", "content": "sunny", "thinking": "hm"},
]
SKY = [{"type": "function", "function": {"name": "sky", "description": "of <a> city", "parameters": {}}}]
MARKS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_bpe(["the assistant says hello to the user and the system " * 9], 300)
    made.backend.add_special_tokens(MARKS)
    return Tokenizer(made.backend, "<|endoftext|>")


@pytest.fixture(scope="module")
def theirs(tokenizer):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of chat templates")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._recognising, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def ours(source: str) -> ChatTemplate:
    return ChatTemplate(source, dict(bos_token="<|endoftext|>", eos_token="<|im_end|>"))


@pytest.mark.parametrize(
    "source, messages, options",
    [
        (CHATML, CHAT, {}),
        (CHATML, [{"role": "system", "content": "Short."}, *CHAT[:1]], {}),
        (LLAMA, CHAT[:3], {}),
        (LLAMA, [{"role": "system", "content": " Be brief. "}, *CHAT], {}),
        (TOOLS, CALLS, dict(tools=SKY)),
        (TOOLS, CHAT, dict(eos_token="</s>")),
    ],
)
def test_texts_are_those_of_transformers(theirs, source, messages, options):
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=prompt, tokenize=False, **options
        )
        assert render(messages, ours(source), prompt, **options) == wanted
    assert len(wanted) > 40


def test_ids_and_mask_are_those_of_transformers_where_the_template_marks_turns(theirs, tokenizer):
    wanted = theirs.apply_chat_template(
        CHAT, chat_template=LLAMA, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    ids, mask = encode_chat(tokenizer, CHAT, ours(LLAMA))
    assert ids.tolist() == wanted["input_ids"] and mask.astype(int).tolist() == wanted["assistant_masks"]
    said = "".join(tokenizer.backend.decode(ids[mask].tolist(), skip_special_tokens=False))
    assert said == "It is true, naïve 🙂.<|im_end|>Yes.<|im_end|>"


def test_turns_are_found_by_rendering_prefixes(tokenizer):
    text, spans = assistant_spans(CHAT, ours(CHATML))
    assert [text[a:b] for a, b in spans] == ["It is true, naïve 🙂.<|im_end|>", "Yes.\n<|im_end|>"]
    ids, mask = encode_chat(tokenizer, CHAT, ours(CHATML))
    said = tokenizer.backend.decode(ids[mask].tolist(), skip_special_tokens=False)
    assert said == "It is true, naïve 🙂.<|im_end|>Yes.\n<|im_end|>"
    assert ids.tolist() == tokenizer.encode(text, special=True)
    assert assistant_spans(CALLS[:2], ours(TOOLS), tools=SKY)[1] == []
    text, spans = assistant_spans(CHAT, ours(TOOLS), tools=SKY)
    assert [text[a:b] for a, b in spans] == ["It is true, naïve 🙂.<|im_end|>", "Yes.\n<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_turn():
    text, ((begin, end),) = assistant_spans(CHAT[:2], FORGETFUL)
    assert text[begin:end] == "It is true, naïve 🙂."
    with pytest.raises(DataError, match=r"where turn 1 \(the assistant's\) lies cannot be told: the chat up to it"):
        assistant_spans(CHAT, FORGETFUL)
    with pytest.raises(DataError, match="turn 0 .* no turn comes before it. Use a template that marks"):
        assistant_spans(CHAT[1:], CHATML)


def test_special_tokens_are_recognised_when_asked(tokenizer):
    text = "hello<|im_end|>"
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.encode(text, special=True)[-1] == end and end not in tokenizer.encode(text)
    assert end not in tokenizer.encode_batch([text])[0]  # and the switch reached nobody else
    assert tokenizer.encode("hello", special=True) == tokenizer.encode("hello")
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids[-1] == end and offsets[-1] == (5, 15)


def test_where_templates_are_found(tmp_path):
    with pytest.raises(FolderError, match="has no chat template .* it is not a chat model, or the template was left"):
        load_template(tmp_path)
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None, "chat_template": CHATML}
    write = lambda: (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))  # noqa: E731
    write()
    assert load_template(tmp_path) == ChatTemplate(CHATML, {"eos_token": "</s>", "bos_token": "<s>"})
    config["chat_template"] = [{"name": "default", "template": LLAMA}, {"name": "tool_use", "template": TOOLS}]
    write()
    assert load_template(tmp_path).source == LLAMA and load_template(tmp_path, "tool_use").source == TOOLS
    with pytest.raises(DataError, match="no chat template 'tooluse', but default, tool_use; did you mean 'tool_use'?"):
        load_template(tmp_path, "tooluse")
    (tmp_path / "chat_template.jinja").write_text(FORGETFUL)
    assert load_template(tmp_path).source == FORGETFUL
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not a JSON object"):
        load_template(tmp_path)


@pytest.mark.parametrize(
    "source, messages, message",
    [
        (LLAMA, CHAT[:1] * 2, "refuses this chat: roles must alternate user/assistant, at turn 1"),
        ("a\n{% if %}", CHAT, "an error in line 2"),
        ("{{ messages[0].content + 1 }}", CHAT, "fails on this chat: TypeError"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "refuses this chat: .*unsafe"),
        ("{{ messages.append(1) }}", CHAT, "refuses this chat: .*not safely callable|refuses this chat: .*unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", CHAT, "begins with an underscore"),
        (CHATML, [], "at least one message such as"),
        (CHATML, "hello", "at least one message such as .* got 'hello'"),
        (CHATML, [{"role": "user", "content": np.zeros(2)}], "are plain data .* got a ndarray"),
    ],
)
def test_what_cannot_be_rendered(source, messages, message):
    with pytest.raises(DataError, match=message):
        render(messages, ours(source))


def test_tools_are_schemas_and_jinja2_is_an_extra(monkeypatch):
    with pytest.raises(DataError, match="got a builtin_function_or_method: give its JSON schema"):
        render(CHAT, TOOLS, tools=[print])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"Jinja2, which is not installed: pip install 'lmx\[chat\]'"):
        render(CHAT, CHATML)
