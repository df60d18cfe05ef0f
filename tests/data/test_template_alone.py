"""Messages without tools are rendered without apply_chat_template's detour: text and refusals are the same."""

from typing import Any

import pytest
from template_families import FAMILIES, tokenizer_of

from eaft_verl.data.spec import RowError
from eaft_verl.data.template import TODAY, ChatTemplate, _is_ordinary, template_arguments

_TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}\n{% endfor %}{{ add_generation_prompt }}",
    "macro": "{% macro say(m) %}{{ bos_token }}{{ m.content | trim }}{% endmacro %}{{ say(messages[0]) }}{{ missing }}",
    "scopes": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}{{ range(3) | list }}{{ dict(a=1) }}{{ tools }}",
    "blocks": "{% block said %}{{ messages[-1].content }}{{ eos_token }}{% endblock %}{{ self.said() }}{{ documents }}",
    "tracked": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ pad_token }}",
    "dated": "{{ strftime_now('%d %b %Y') }}{{ messages | tojson(indent=2) }}{{ cycler('a', 'b').next() }}",
    "refusing": "{{ messages[0].content }}{{ raise_exception('no ' ~ messages[0].role) }}",
    "sandboxed": "{{ messages.append(1) }}",
    "escaping": "{{ messages.__class__.__mro__ }}",
    "broken": "{{ messages[0].content + 1 }}",
}
_TEXTS = (
    "2+3?",
    " <b>&amp; {{ x }} {% if %}\n",
    "日本語 e\u0301 👩‍👩‍👧 \x1b[0m\u2028\u00a0",
    "<think>\n\n</think>\n\na</think>b",
    "",
)
_CHATS = [
    *([{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] + "."}] for text in _TEXTS),
    [{"role": role, "content": f"{role} {n}\r\n"} for n, role in enumerate(("system", *("user", "assistant") * 3))],
    [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "why", "content": "a"}],
    [{"role": "assistant", "content": "first"}],
]


def _either(render: Any) -> Any:
    try:
        return render()
    except Exception as error:
        return str(error)


def _compared(tokenizer: Any) -> set[str]:
    assert _is_ordinary(tokenizer)
    found = set()
    for chat in _CHATS:
        for generate in (False, True):
            given = {"tokenize": False, "add_generation_prompt": generate, **template_arguments(None)}
            said = _either(lambda: ChatTemplate(tokenizer).render(chat, generate))  # noqa: B023
            expected = _either(lambda: tokenizer.apply_chat_template(chat, **given))  # noqa: B023
            assert said.removeprefix("the chat template refuses this conversation: ") == expected
            found.add(said)
    return found


@pytest.mark.parametrize("family", ["chatml", "llama3_1", "gemma3", "mistral_small", "deepseek_v3", "glm4_5"])
def test_families(family: str) -> None:
    assert family in FAMILIES
    assert len(_compared(tokenizer_of(family))) >= len(_CHATS)


def test_what_templates_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("llama3_1")
    for name, template in _TEMPLATES.items():
        monkeypatch.setattr(tokenizer, "chat_template", template)
        found = _compared(tokenizer)
        if name == "dated":
            assert all(said.startswith(TODAY.strftime("%d %b %Y")) for said in found)
        if name in ("refusing", "sandboxed", "escaping", "broken"):
            assert all(said.startswith("the chat template refuses") for said in found)
    monkeypatch.setattr(tokenizer, "chat_template", {"default": _TEMPLATES["plain"], "tool_use": "tools"})
    assert len(_compared(tokenizer)) > len(_CHATS)


def test_a_tokenizer_with_a_method_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml")
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **given: f"own {len(messages)}")
    assert ChatTemplate(tokenizer).render(_CHATS[0]) == "own 2"
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "chat_template", _TEMPLATES["refusing"])
    with pytest.raises(RowError, match="refuses this conversation: no user"):
        ChatTemplate(tokenizer).render(_CHATS[0])
