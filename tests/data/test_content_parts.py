import pytest

from forgebook.data.chat_template import render
from forgebook.data.content_parts import in_parts, roles_of_parts
from forgebook.data.images import IMAGE
from support_vision import EITHER, LLAVA, PIXTRAL, SMOLVLM

TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TEMPLATES = {
    "text": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}", set()),
    "either": (EITHER.format(image="<image>"), set()),
    "smolvlm": (SMOLVLM, {"system", "user", "assistant"}),
    "llava": (LLAVA, {"system", "user", "assistant"}),
    "pixtral": (PIXTRAL, set()),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_role_gets_the_form_that_its_template_shows(name, with_template):
    template, roles = TEMPLATES[name]
    tokenizer = with_template(template)

    def rendered(messages):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:
            return ""

    assert roles_of_parts(rendered) == roles
    text = render(TALK, tokenizer)
    assert text.replace("<|begin|>", "") == "<|system|>S<|end|><|user|>Q<|end|><|assistant|>A<|end|>"


def test_an_image_stands_where_its_mark_is():
    [message] = in_parts([{"role": "user", "content": f"a {IMAGE} b{IMAGE}"}], ())
    text = {"type": "text"}
    assert message["content"] == [text | {"text": "a "}, {"type": "image"}, text | {"text": " b"}, {"type": "image"}]
    assert in_parts(TALK, ()) is TALK
    assert [type(m["content"]) for m in in_parts(TALK, {"user"})] == [str, list, str]
